"""KVStore: the memory behind the blocks."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def _zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros that take no memory until they are written: torch.zeros writes them all, numpy asks the system for them."""
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)).view(dtype).view(shape)


class KVStore:
    """K and V of every layer: (blocks + 1, KV heads, block size, head dim) in the compute type.

    A head's tokens lie together within a block, so that gathering a row's keys copies long runs. The last block is
    owned by nobody and always zero: block tables are padded with it.
    """

    def __init__(self, shapes: Sequence[tuple[int, int]], num_blocks: int, block_size: int, dtype: torch.dtype) -> None:
        """`shapes`: (KV heads, head dim) of each layer. Memory is taken up as blocks are first written."""
        self.block_size = block_size
        self.layers = [
            tuple(_zeros((num_blocks + 1, heads, block_size, dim), dtype) for _ in range(2)) for heads, dim in shapes
        ]

    @property
    def nbytes(self) -> int:
        return sum(pool.nbytes for pools in self.layers for pool in pools)

    def places(self, slots_T: Tensor, heads: int) -> Tensor:
        """[T × heads] where each token's heads lie, in units of one head's vector."""
        blocks, offsets = slots_T // self.block_size, slots_T % self.block_size
        head = torch.arange(heads)
        return ((blocks[:, None] * heads + head) * self.block_size + offsets[:, None]).flatten()

    def write(self, layer: int, places: Tensor, k_THD: Tensor, v_THD: Tensor) -> None:
        """Stores tokens' keys and values at `places`."""
        for pool, values in zip(self.layers[layer], (k_THD, v_THD), strict=True):
            dim = pool.shape[-1]
            pool.view(-1, dim).index_copy_(0, places, values.reshape(-1, dim))

    def gather(self, layer: int, runs: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of whole blocks -> (runs × block size, head dim) each; `runs` counts (block, head) pairs."""
        keys, values = (
            pool.view(-1, self.block_size * pool.shape[-1]).index_select(0, runs).view(-1, pool.shape[-1])
            for pool in self.layers[layer]
        )
        return keys, values

    def zero_blocks(self, blocks: Tensor) -> None:
        """A freed block may hold NaN, and 0 × NaN would reach whoever gets it next."""
        for pools in self.layers:
            for pool in pools:
                pool.index_fill_(0, blocks, 0.0)

    def zero_slots(self, slots_T: Tensor) -> None:
        """Forgets tokens that turned out not to be part of their sequence."""
        for layer, (keys, _) in enumerate(self.layers):
            nothing = keys.new_zeros(len(slots_T), *keys.shape[1::2])
            self.write(layer, self.places(slots_T, keys.shape[1]), nothing, nothing)

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """(source, destination), one after another."""
        for pools in self.layers:
            for pool in pools:
                for source, target in pairs:
                    pool[target] = pool[source]
