"""Which kernel multiplies a few rows with a plain weight: a table, measured on the card it is for.

N: rows of a weight, K: its columns, M: rows of x.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType

import torch
from torch import Tensor
from torch.nn import functional

from headrace.backends.torch.kernels.gemv import MOST_TOKENS, gemv
from headrace.backends.torch.kernels.matmul import FEW_TOKENS, Card, matmul, new_counters, tile_of

BUCKETS = (1, 2, 3, 4, 8, 16, 32, FEW_TOKENS)
"""Rows of x that are measured: what is between goes by the next."""

COLD_BYTES = 1 << 28
"""Several times the largest second-level cache: a weight is read again only after so many bytes of others."""

MOST_COPIES = 64
"""Of a small weight: a run is to stay short."""

MOST_BYTES = 1 << 29
"""Taller weights (a head) are measured by so much of them: their time goes with their height."""

GAIN = 0.98
"""A kernel of ours is taken where it needs at most so much of the library's time."""

Key = tuple[int, int, int]
"""N, K, bucket of M."""

Kernel = Callable[[Tensor, Tensor], Tensor]
"""x, weight -> product."""

Timer = Callable[[Callable[[], object]], float]
"""Seconds that one call takes on the device: the median of several replays of a captured graph, since launching takes
longer than the smaller products."""


def by_library(tokens: int) -> str:
    """Where our kernels do not run, or are not wanted."""
    return "library"


def by_size(tokens: int) -> str:
    """One or two rows make a product a stream of bytes: the tensor cores have nothing to do."""
    return "gemv" if tokens <= 2 else "library"


@dataclass(frozen=True, slots=True)
class Choices:
    """`library`: torch's own product; `gemv`, to 4 rows: `kernels/gemv.py`; `tiles`, to 64: `kernels/matmul.py`."""

    unmeasured: Callable[[int], str]
    """M -> kernel, for what the table does not hold."""
    table: Mapping[Key, str] = field(default_factory=lambda: MappingProxyType({}))

    def kernel(self, rows: int, columns: int, tokens: int) -> str:
        if not 0 < tokens <= FEW_TOKENS:
            return "library"
        bucket = next(bucket for bucket in BUCKETS if bucket >= tokens)
        return self.table.get((rows, columns, bucket)) or self.unmeasured(tokens)


LIBRARY = Choices(by_library)
UNMEASURED = Choices(by_size)
"""What can be told of a GPU that has not been asked."""


def measure(
    shapes: Iterable[tuple[int, int]], dtype: torch.dtype, device: torch.device, card: Card, timer: Timer
) -> Choices:
    """The quickest kernel for weights (N, K) and each bucket of M, on random numbers that no cache holds.

    Takes up to MOST_BYTES of the device's memory, and gives it back.
    """
    table: dict[Key, str] = {}
    counters = new_counters(card, device)
    for rows, columns in sorted(set(shapes)):
        row_bytes = columns * dtype.itemsize
        height = max(1, min(rows, MOST_BYTES // row_bytes))
        copies = max(1, min(MOST_COPIES, COLD_BYTES // (height * row_bytes)))
        weights = [torch.randn(height, columns, dtype=dtype, device=device) for _ in range(copies)]
        for bucket in BUCKETS:
            x = torch.randn(bucket, columns, dtype=dtype, device=device)
            kernels = _candidates(bucket, height, columns, dtype, card, counters)
            seconds = {name: timer(partial(_each, kernel, x, weights)) for name, kernel in kernels.items()}
            best = min(seconds, key=lambda name: seconds[name])
            table[rows, columns, bucket] = best if seconds[best] <= GAIN * seconds["library"] else "library"
    return Choices(by_size, MappingProxyType(table))


def _each(kernel: Kernel, x: Tensor, weights: Sequence[Tensor]) -> None:
    for weight in weights:
        kernel(x, weight)


def _candidates(
    tokens: int, rows: int, columns: int, dtype: torch.dtype, card: Card, counters: Tensor
) -> dict[str, Kernel]:
    """Every kernel that can meet so many rows, by name."""
    tile = tile_of(tokens, rows, columns, dtype, card)
    kernels: dict[str, Kernel] = {
        "library": lambda x, weight: functional.linear(x, weight),
        "tiles": lambda x, weight: matmul(x, weight, None, tile, counters),
    }
    if tokens <= MOST_TOKENS:
        kernels["gemv"] = lambda x, weight: gemv(x, weight, None)
    return kernels
