"""Named ranges while somebody profiles: for torch's profiler, and as NVTX ranges where torch is built for CUDA.

The parts of a decoder are then put inside ranges, and taken out again: in between no step asks whether it is watched.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from headrace.backends.ranges import ATTENTION, LAYER, MLP, Range
from headrace.backends.torch.layers import as_is
from headrace.backends.torch.parameters import Linear

ANCHORS = 8
"""Ranges whose begin both clocks tell: torch's and ours."""
MARK = "headrace range "
"""How torch's profiler knows a range of ours: this and its number."""
PARTS: Mapping[str, str] = {
    "pre_attn": "pre_attn norm",
    "attention": ATTENTION,
    "after_attn": "after attention",
    "pre_mlp": "pre_mlp norm",
    "mlp": MLP,
    "after_mlp": "after mlp",
    "after": "after both",
    "qkv": "qkv",
    "o": "o",
    "router": "router",
    "gate_up": "gate, up",
    "up": "up",
    "down": "down",
}
"""Attributes of a layer and of its parts -> the range."""


class Ranges:
    """Opens ranges, from when it is made until `end`."""

    def __init__(self) -> None:
        self._kept: list[Range] = []
        """By number; times come at the end."""
        self._nvtx = has_nvtx()
        self._profiler = torch.autograd.profiler.profile()
        self._profiler.__enter__()
        for _ in range(ANCHORS):
            began_ns = time.monotonic_ns()
            with self._recorded(Range("", began_ns, began_ns)):
                pass

    @contextmanager
    def __call__(
        self, name: str, layer: int | None = None, weight_bytes: int = 0, multiply_adds: int = 0
    ) -> Iterator[None]:
        """See `backends.ranges.Range`."""
        with self.shown(name), self._recorded(Range(name, 0, 0, layer, weight_bytes, multiply_adds)):
            yield

    @contextmanager
    def shown(self, name: str) -> Iterator[None]:
        """The NVTX range alone."""
        if not self._nvtx:
            yield
            return
        torch.cuda.nvtx.range_push(name)
        try:
            yield
        finally:
            torch.cuda.nvtx.range_pop()

    def _recorded(self, one: Range) -> torch.profiler.record_function:
        self._kept.append(one)
        return torch.profiler.record_function(f"{MARK}{len(self._kept) - 1}")

    def end(self) -> list[Range]:
        """Every range, and the operators that they call as details of them, on our clock."""
        self._profiler.__exit__(None, None, None)
        # As they were recorded: torch's own list of events takes 80 µs an event to make.
        recorded = self._profiler.kineto_results
        assert recorded is not None
        events = recorded.events()
        marks = {int(one.name().removeprefix(MARK)): one for one in events if one.name().startswith(MARK)}
        thread = marks[0].start_thread_id()
        # The smallest difference is that of the anchor that was held up least.
        shift_ns = min(marks[i].start_ns() - self._kept[i].begin_ns for i in range(ANCHORS))

        def times(event: Any) -> tuple[int, int]:
            begin_ns = event.start_ns() - shift_ns
            return begin_ns, begin_ns + event.duration_ns()

        found = []
        for number, event in marks.items():
            if number >= ANCHORS:
                begin_ns, end_ns = times(event)
                found.append(replace(self._kept[number], begin_ns=begin_ns, end_ns=end_ns))
        operators = [one for one in events if one.start_thread_id() == thread and not one.name().startswith(MARK)]
        free_ns = 0
        for event in sorted(operators, key=lambda one: one.start_ns()):
            begin_ns, end_ns = times(event)
            # What an operator calls in its turn is left out: most of it takes no time.
            if begin_ns >= free_ns:
                found.append(Range(event.name(), begin_ns, end_ns, is_detail=True))
                free_ns = end_ns
        return found


def has_nvtx() -> bool:
    """Whether this build of torch opens NVTX ranges."""
    try:
        torch.cuda.nvtx.range_push("headrace")
        torch.cuda.nvtx.range_pop()
    except RuntimeError:
        return False
    return True


@dataclass(frozen=True, slots=True)
class Ranged:
    """A part of the decoder, inside a range."""

    inner: Callable[..., Tensor]
    ranges: Ranges
    name: str
    layer: int | None

    def __call__(self, x: Tensor, *rest: Any) -> Tensor:
        weight = self.inner.weight if isinstance(self.inner, Linear) else None
        numbers = 0 if weight is None else weight.numel()
        num_bytes = 0 if weight is None else numbers * weight.element_size()
        with self.ranges(self.name, self.layer, num_bytes, len(x) * numbers):
            return self.inner(x, *rest)


@dataclass(slots=True)
class Naming:
    """What was put inside ranges, and what had been there."""

    ranges: Ranges
    originals: list[tuple[Any, str, Any]] = field(default_factory=list)

    def put(self, owner: Any, attribute: str, name: str, layer: int | None = None) -> None:
        """An attribute of `owner`, unless it does nothing."""
        inner = getattr(owner, attribute, as_is)
        if inner is not as_is:
            self.originals.append((owner, attribute, inner))
            setattr(owner, attribute, Ranged(inner, self.ranges, name, layer))

    def layers(self, layers: Sequence[Any]) -> list[Ranged]:
        """The layers inside ranges, and so what they are made of."""
        for index, layer in enumerate(layers):
            self._parts(layer, index)
        return [Ranged(layer, self.ranges, LAYER, index) for index, layer in enumerate(layers)]

    def _parts(self, part: Any, layer: int) -> None:
        inside = [getattr(part, attribute) for attribute in PARTS if hasattr(part, attribute)]
        for attribute, name in PARTS.items():
            self.put(part, attribute, name, layer)
        for one in (*inside, *getattr(part, "experts", ())):
            self._parts(one, layer)

    def undo(self) -> None:
        for owner, attribute, inner in self.originals:
            setattr(owner, attribute, inner)
