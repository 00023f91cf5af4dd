"""The ways to run a workload that are compared. Every method runs on the one loaded model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from headrace.compare.workloads import Workload

BASE = "serial"
"""What every method is held against; always part of a comparison, always first."""
DEFAULT = (BASE, "fused")


@dataclass(frozen=True, slots=True)
class RequestRun:
    """One request of one run. Times are seconds from the arrival of the workload, queueing included."""

    token_ids: tuple[int, ...]
    """Generated tokens, with the one that ended them, if one did."""
    finish_reason: str
    first_token_s: float
    end_s: float


@dataclass(frozen=True, slots=True)
class Outcome:
    """One run of the whole workload under one method."""

    requests: tuple[RequestRun, ...]
    """In the order of the questions."""
    seconds: float
    """From the arrival of all requests to the end of the last."""
    iterations: int
    """Steps that computed at least one token."""
    computed_tokens: int
    """Prompt tokens and generated ones that went through the model."""
    preemptions: int

    @property
    def outputs(self) -> tuple[tuple[int, ...], ...]:
        return tuple(request.token_ids for request in self.requests)

    @property
    def output_tokens(self) -> int:
        return sum(map(len, self.outputs))


class Method(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def description(self) -> str:
        """One line for a reader who knows nothing of it."""

    def run(self, workload: Workload) -> Outcome:
        """Answers the workload once. Raises EngineError if a request fails."""


def with_base(names: Sequence[str]) -> tuple[str, ...]:
    """The methods to run: the base first, each name once."""
    return tuple(dict.fromkeys((BASE, *names)))
