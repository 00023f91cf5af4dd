"""The memory behind the blocks on a GPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from headrace.core.errors import ConfigError, shorten

FP8 = torch.float8_e4m3fn
KV_DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "fp8": FP8,
}


@dataclass(frozen=True, slots=True, eq=False)
class LayerCache:
    """One layer's keys and values: (blocks, KV heads, block size, head dim). Nothing past a row's context is ever read,
    so blocks need no cleaning."""

    keys: Tensor
    values: Tensor
    key_scales: Tensor | None = None
    """(blocks, KV heads, block size) float32, where the cache is fp8: value = code × scale."""
    value_scales: Tensor | None = None

    @property
    def tensors(self) -> Sequence[Tensor]:
        return [x for x in (self.keys, self.values, self.key_scales, self.value_scales) if x is not None]


def make_caches(
    shapes: Sequence[tuple[int, int]], num_blocks: int, block_size: int, kv_dtype: str, device: torch.device
) -> list[LayerCache]:
    """`shapes`: (KV heads, head dim) of each layer. Raises ConfigError."""
    if kv_dtype not in KV_DTYPES:
        raise ConfigError(f"kv_dtype: got {shorten(kv_dtype)}, allowed on a GPU: {', '.join(KV_DTYPES)}")
    dtype = KV_DTYPES[kv_dtype]
    made = []
    for heads, dim in shapes:
        shape = (num_blocks, heads, block_size)
        keys, values = (torch.zeros(*shape, dim, dtype=dtype, device=device) for _ in range(2))
        scales = [torch.ones(shape, device=device) if dtype == FP8 else None for _ in range(2)]
        made.append(LayerCache(keys, values, *scales))
    return made


def copy_blocks(caches: Sequence[LayerCache], pairs: Sequence[tuple[int, int]]) -> None:
    """(source, destination) of whole blocks, one after another."""
    for source, target in pairs:
        for cache in caches:
            for tensor in cache.tensors:
                tensor[target].copy_(tensor[source])
