"""What a step sends to the device: one buffer, one copy.

layout   where each array of the step lies in the buffer, by the sizes of the step
host     pinned, one for each plan that may be in flight: the copy out of it goes on while Python goes on
device   one for all: a step's kernels are in the stream before the next step's copy. A CUDA graph reads the places
         of its own layout, always the same ones
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

INTS = 5
"""Of a draw (`kernels.sampling.Draws`): top-k, the seed's low and high word, output position, mode."""
FLOATS = 3
"""Temperature, top-p, min-p."""
WIDE = 2
"""The first arrays, of 8 bytes a number."""
ALIGNMENT = 16


@dataclass(frozen=True, slots=True)
class Layout:
    """Sizes of a step."""

    tokens: int
    spans: int
    tiles: int
    places: int
    """Positions whose logits are wanted."""
    draws: int
    """How many of them, the first ones, the device's sampler looks at."""

    @property
    def shapes(self) -> Sequence[tuple[int, ...]]:
        """Of the fields of `StepArrays`, in order."""
        draws = (self.draws, FLOATS), (self.draws, INTS)
        flat = ((self.tokens,),) * 4 + ((self.spans,),) * 4
        return (*draws, *flat, (self.tiles, 2), (self.places,), (self.draws,))

    @property
    def stops(self) -> Sequence[int]:
        """Bytes to where each array's share of the buffer ends. Arrays begin at multiples of 16: how a kernel reads one
        must not depend on the sizes of those before it."""
        sizes = [(8 if index < WIDE else 4) * math.prod(shape) for index, shape in enumerate(self.shapes)]
        return list(accumulate(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes))


@dataclass(frozen=True, slots=True, eq=False)
class StepArrays:
    """A step's arrays, on the host (numpy) or the device (torch). All but the draws are int32."""

    draw_floats: Any
    """(D, FLOATS) float64"""
    draw_ints: Any
    """(D, INTS) int64"""
    token_ids: Any
    """[T] PENDING: the token that the row sampled last"""
    token_rows: Any
    """[T]"""
    positions: Any
    """[T]"""
    slots: Any
    """[T] -1: nothing is stored"""
    starts: Any
    """[R]"""
    lengths: Any
    """[R]"""
    contexts: Any
    """[R]"""
    rows: Any
    """[R] in the block tables"""
    tiles: Any
    """(tiles, 2) a span and its first query"""
    places: Any
    """[P] in the flat arrays"""
    draw_rows: Any
    """[D] the row whose last token this becomes; one past the last row: nobody's"""

    @classmethod
    def at(cls, buffer: Any, layout: Layout, kinds: tuple[Any, Any, Any]) -> StepArrays:
        """Views of a flat buffer of bytes. `kinds`: its library's float64, int64, int32."""
        views, start = [], 0
        for index, (shape, stop) in enumerate(zip(layout.shapes, layout.stops, strict=True)):
            kind, size = kinds[min(index, WIDE)], 8 if index < WIDE else 4
            views.append(buffer[start : start + size * math.prod(shape)].view(kind).reshape(shape))
            start = stop
        return cls(*views)


NUMPY_KINDS = (np.float64, np.int64, np.int32)
TORCH_KINDS = (torch.float64, torch.int64, torch.int32)


class Staging:
    """Buffers for steps of up to `largest`."""

    def __init__(self, largest: Layout, depth: int, device: torch.device) -> None:
        size = largest.stops[-1]
        pinned = device.type == "cuda"
        self._hosts = [torch.empty(size, dtype=torch.uint8, pin_memory=pinned) for _ in range(depth)]
        self._device = torch.zeros(size, dtype=torch.uint8, device=device)
        self._turn = 0

    @property
    def nbytes(self) -> int:
        """On the device."""
        return self._device.nbytes

    def on_device(self, layout: Layout) -> StepArrays:
        """Where a step of this layout lies."""
        return StepArrays.at(self._device, layout, TORCH_KINDS)

    def send(self, layout: Layout, write: Callable[[StepArrays], None]) -> None:
        """Has `write` fill the host's arrays, and sends them. Of `depth` plans in flight none may still be copied from
        the buffer that comes next: whoever submits has waited for the one before those."""
        host = self._hosts[self._turn]
        self._turn = (self._turn + 1) % len(self._hosts)
        arrays: NDArray[np.uint8] = host.numpy()
        write(StepArrays.at(arrays, layout, NUMPY_KINDS))
        size = layout.stops[-1]
        self._device[:size].copy_(host[:size], non_blocking=True)
