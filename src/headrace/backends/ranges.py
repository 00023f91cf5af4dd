"""Named ranges of a backend's steps: where the time goes, for as long as somebody profiles."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

GATHER, EMBED, LAYER, ATTENTION, MLP, HEAD = "gather", "embed", "layer", "attention", "mlp", "head"
SAMPLE = "headrace.sample"
VISION = "headrace.vision"


@dataclass(frozen=True, slots=True)
class Range:
    """A stretch of time. One that lies within another is a part of it."""

    name: str
    begin_ns: int
    """Nanoseconds of `time.monotonic_ns()`."""
    end_ns: int
    layer: int | None = None
    """Which of the model's layers it belongs to."""
    weight_bytes: int = 0
    """Of weights that a product reads once; 0: no product, or it is not known."""
    multiply_adds: int = 0
    """Of a product, each one two floating-point operations; 0: no product, or it is not known."""
    is_detail: bool = False
    """An operator of a library, below the ranges that headrace names."""


@runtime_checkable
class Profiled(Protocol):
    """A backend that can say where its time goes. While it is not asked to, that costs nothing."""

    def profile(self, on: bool) -> None:
        """From now on, or no more, it keeps its ranges. Raises EngineError without a model."""

    def ranged(self, name: str) -> AbstractContextManager[object]:
        """Shows a range of the caller's, while it lasts, to a profiler from outside that the backend's own ranges go
        to as well (NVTX); nothing is kept of it."""

    def take_ranges(self) -> list[Range]:
        """What was kept since the last call, to be asked for while the profile is off. Raises EngineError without a
        model."""
