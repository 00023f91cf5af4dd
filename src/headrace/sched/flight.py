"""A plan between its making and its commit."""

from __future__ import annotations

from dataclasses import dataclass, field

from headrace.sched.sequence import Sequence


@dataclass(slots=True)
class Span:
    """What a plan lets one row do."""

    sequence: Sequence
    start: int
    stop: int
    sampled: bool


@dataclass(slots=True)
class Flight:
    """A plan that is not committed yet."""

    step: int
    spans: dict[int, Span] = field(default_factory=dict)
    """By row."""
    num_joined: int = 0
    """Requests that joined with it for the first time."""
    num_tokens: int = 0
    has_prompt: bool = False
    """Whether it computes a token of a prompt."""
