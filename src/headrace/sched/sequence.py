"""Sequence: the scheduler's record of one request, the only mutable one."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto

from headrace.core.types import Request, TokenLogprobs


class Status(Enum):
    WAITING = auto()
    """In the queue, without a row and without blocks."""
    RUNNING = auto()
    """Has a row."""
    LEAVING = auto()
    """Ended or preempted; keeps row and blocks until the last step that names them is committed (law 3)."""
    ENDED = auto()


@dataclass(slots=True, eq=False)
class Sequence:
    """`num_tokens` exist or are being sampled; steps let `num_planned`, then `num_computed`, catch up with them."""

    request: Request
    number: int
    """Arrival number: the order among requests of one priority."""
    stop_ids: frozenset[int]
    max_total: int
    """Most tokens it may have: its prompt and max_tokens, cut to what the context holds."""
    root_key: bytes
    tokens: list[int]
    """Prompt, then every token that a committed step has sampled."""
    status: Status = Status.WAITING
    ended: bool = False
    """Its terminal event is out: whatever is still in flight is dropped."""
    row: int = -1
    blocks: list[int] = field(default_factory=list)
    num_announced: int = 0
    """Leading blocks that a plan has told the backend of."""
    keys: list[bytes] = field(default_factory=list)
    """Keys of its leading blocks that are full and committed."""
    num_planned: int = 0
    """Tokens whose KV is written once every planned step has run."""
    num_computed: int = 0
    """Tokens whose KV committed steps have written."""
    sampling_in_flight: int = 0
    """Tokens that planned, uncommitted steps will sample."""
    steps_in_flight: int = 0
    tried_until: int = 0
    """Where it stood when a step failed: once committed steps have computed so many tokens, that was not its fault."""
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    """Of the prompt's tokens from the second on, as far as committed steps have told; where asked for."""
    num_cached: int = 0
    """Prompt tokens that its first admission found in the prefix cache."""
    joined_s: float | None = None
    """When it was first admitted; None: not yet."""

    @property
    def was_admitted(self) -> bool:
        """Whether it has ever had a row."""
        return self.joined_s is not None

    @property
    def num_prompt(self) -> int:
        return len(self.request.token_ids)

    @property
    def num_output(self) -> int:
        return len(self.tokens) - self.num_prompt

    @property
    def num_tokens(self) -> int:
        """Tokens that exist for the device: known ones, and those being sampled."""
        return len(self.tokens) + self.sampling_in_flight

    @property
    def remaining(self) -> int:
        """Tokens the next step may compute. None once the last wanted token is known or being sampled, nor while one
        is being sampled on which a grammar's next mask depends (law 2)."""
        if self.sampling_in_flight and self.request.grammar:
            return 0
        num_tokens = len(self.tokens) + self.sampling_in_flight
        return 0 if num_tokens >= self.max_total else num_tokens - self.num_planned

    @property
    def unscored(self) -> bool:
        """Whether log-probabilities of its prompt are asked for and not all known."""
        wanted = self.request.sampling.prompt_logprobs is not None
        return wanted and len(self.prompt_logprobs) < self.num_prompt - 1

    @property
    def place(self) -> tuple[int, int]:
        """Its place in every order: by priority, then by arrival; kept through preemptions."""
        return (self.request.priority, self.number)

    def check_integrity(self) -> None:
        """Raises AssertionError unless its counts are in order."""
        if not self.num_computed <= self.num_planned <= self.num_tokens:
            raise AssertionError(f"{self.request.id}: computed {self.num_computed}, planned {self.num_planned}")
