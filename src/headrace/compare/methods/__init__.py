"""The ways to run a workload that are compared: what every one of them is, and what a run of one tells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from headrace.compare.workloads import Workload
from headrace.core.config import ResolvedConfig
from headrace.core.errors import ConfigError

BASE = "serial"
"""What every method is held against; always part of a comparison, always first."""
DEFAULT = (BASE, "fused")


@dataclass(frozen=True, slots=True)
class RequestRun:
    """One request of one run. Times are seconds from the start of the run."""

    token_ids: tuple[int, ...]
    """Generated tokens, with the one that ended them, if one did."""
    finish_reason: str
    """stop or length."""
    arrival_s: float
    token_s: tuple[float, ...]
    """When each token was in our hands."""
    end_s: float

    @property
    def first_token_s(self) -> float:
        """When its first token was there; an answer without tokens: its end."""
        return self.token_s[0] if self.token_s else self.end_s

    @property
    def ttft_s(self) -> float:
        """Time to the first token, from the request's arrival, queueing included."""
        return self.first_token_s - self.arrival_s

    @property
    def latency_s(self) -> float:
        """From the request's arrival to its end."""
        return self.end_s - self.arrival_s


@dataclass(frozen=True, slots=True)
class Iteration:
    """A step of an engine that computed at least one token."""

    end_s: float
    """Seconds from the start of the run."""
    in_flight: int
    """Requests that had joined the running batch and had not ended when it was computed."""
    tokens: int
    """Prompt tokens and generated ones that it computed."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """One run of the whole workload under one method."""

    requests: tuple[RequestRun, ...]
    """In the workload's order."""
    seconds: float
    """From the start of the run to the end of the last request."""
    iterations: tuple[Iteration, ...] = ()
    """Empty where the method does not tell them."""
    computed_tokens: int | None = None
    """Prompt tokens and generated ones that went through the model, those computed twice or for nothing included; None:
    not told."""
    preemptions: int = 0
    cpu_s: float | None = None
    """Processor time of all processes of the method, in the run."""
    peak_rss_bytes: int | None = None
    """Highest resident memory of all processes of the method in the run, weights included."""
    joules: Mapping[str, float] = field(default_factory=dict)
    """Of the whole machine, in the run: source of the figure (nvml, rapl, estimated) -> joules."""

    @property
    def outputs(self) -> tuple[tuple[int, ...], ...]:
        return tuple(request.token_ids for request in self.requests)

    @property
    def output_tokens(self) -> int:
        return sum(map(len, self.outputs))


class Method(Protocol):
    """One way to run workloads. `start`, any number of `run`, `close`."""

    name: str
    description: str
    """One line for a reader who knows nothing of it; it states any cap."""
    config: ResolvedConfig | None
    """The arithmetic of ours that it computes in; None: an engine from outside."""
    exact: bool
    """Whether it promises the base's own token ids: the same weights in the same arithmetic of ours."""

    def start(self, workload: Workload) -> float:
        """Gets ready for this workload and pieces of it. Returns the seconds that loading took.

        Raises HeadraceError where the method cannot run here: the message says why, and what would help.
        """

    def run(self, workload: Workload) -> Outcome:
        """Answers the workload once, each request no earlier than it arrives. Raises EngineError if one fails."""

    def close(self) -> None:
        """Gives back what is the method's own. Idempotent."""


def with_base(names: Sequence[str]) -> tuple[str, ...]:
    """The methods to run: the base first, each name once."""
    return tuple(dict.fromkeys((BASE, *names)))


def refuse_images(name: str, workload: Workload, why: str) -> None:
    """For a method that cannot pass them on. Raises ConfigError for a workload with images."""
    if any(one.images for one in workload.requests):
        raise ConfigError(f"{name}: workload {workload.name} has images: {why}")
