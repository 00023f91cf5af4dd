"""Drives a backend with plans written by hand: for tests of backends, without the scheduler."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from headrace.backends.base import Backend
from headrace.core.types import Admit, Capacity, RowOut, RowStep, SamplingParams, StepPlan


@dataclass(slots=True)
class LiveRow:
    """What the driver knows of a row."""

    blocks: list[int]
    num_prompt: int
    computed: int = 0
    announced: int = 0
    """Leading blocks the backend has been told of."""


@dataclass(slots=True)
class Driver:
    """Hands out rows and blocks naively and keeps no tokens: those are the backend's business."""

    backend: Backend
    capacity: Capacity
    rows: dict[int, LiveRow] = field(default_factory=dict)
    free_blocks: list[int] = field(default_factory=list)
    step: int = 0
    _admits: list[Admit] = field(default_factory=list)
    _release: list[int] = field(default_factory=list)
    _copies: list[tuple[int, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.free_blocks = list(range(self.capacity.blocks - 1, -1, -1))

    def admit(
        self,
        token_ids: Sequence[int],
        sampling: SamplingParams | None = None,
        *,
        num_prompt: int | None = None,
        shared: Sequence[int] = (),
        stop_ids: frozenset[int] = frozenset(),
        row: int | None = None,
        adapter: str = "",
    ) -> int:
        """A row for these tokens, from the next plan on. `shared`: blocks that already hold its beginning."""
        if row is None:
            row = next(r for r in range(self.capacity.max_rows) if r not in self.rows)
        prompt = len(token_ids) if num_prompt is None else num_prompt
        self.rows[row] = LiveRow(list(shared), prompt, len(shared) * self.capacity.block_size)
        asked = sampling or SamplingParams()
        self._admits.append(Admit(row, tuple(token_ids), prompt, asked, stop_ids, adapter=adapter))
        return row

    def release(self, row: int, reuse: bool = True) -> LiveRow:
        """Forgets a row with the next plan. Its blocks are handed out again, unless `reuse` is False."""
        gone = self.rows.pop(row)
        self._release.append(row)
        if reuse:
            self.free_blocks.extend(reversed(gone.blocks))
        return gone

    def copy(self, source: int, target: int) -> None:
        """Copies a block with the next plan, before its rows run."""
        self._copies.append((source, target))

    def span(
        self, row: int, length: int, *, sample: bool = True, drafts: Sequence[int] = (), logits: bool = False
    ) -> RowStep:
        """The row's next `length` tokens, then its drafts, with the blocks they need."""
        live = self.rows[row]
        stop = live.computed + length + len(drafts)
        while len(live.blocks) * self.capacity.block_size < stop:
            live.blocks.append(self.free_blocks.pop())
        new = tuple(live.blocks[live.announced :])
        live.announced = len(live.blocks)
        return RowStep(row, live.computed, length, tuple(drafts), new, sample, None, logits)

    def submit(self, *steps: RowStep) -> None:
        """One plan with these rows and all that is pending."""
        plan = StepPlan(self.step, steps, tuple(self._admits), tuple(self._release), tuple(self._copies))
        self._admits, self._release, self._copies = [], [], []
        self.step += 1
        for step in steps:
            self.rows[step.row].computed = step.start + step.length
        self.backend.submit(plan)

    def result(self) -> dict[int, RowOut]:
        """Row -> what came out of the oldest plan."""
        outs = {out.row: out for out in self.backend.result().rows}
        for row, out in outs.items():
            if row in self.rows:
                self.rows[row].computed += out.accepted
        return outs

    def run(self, *steps: RowStep) -> dict[int, RowOut]:
        self.submit(*steps)
        return self.result()

    def prefill(self, row: int, length: int, chunk: int | None = None) -> RowOut:
        """Computes the row's first tokens in chunks and samples after the last."""
        while self.rows[row].computed < length:
            left = length - self.rows[row].computed
            size = min(left, chunk or self.capacity.max_tokens)
            out = self.run(self.span(row, size, sample=size == left))[row]
        return out

    def decode(self, rows: Sequence[int], count: int) -> dict[int, list[int]]:
        """`count` more tokens for rows whose last token has just been sampled, all in one batch."""
        tokens: dict[int, list[int]] = {row: [] for row in rows}
        for _ in range(count):
            for row, out in self.run(*(self.span(row, 1) for row in rows)).items():
                if out.error is not None:
                    raise AssertionError(f"row {row}: {out.error}")
                tokens[row] += out.tokens
        return tokens

    def generate(
        self, token_ids: Sequence[int], count: int, chunk: int | None = None, adapter: str = "", **sampling: object
    ) -> list[int]:
        """`count` tokens after a prompt, alone, in a row of its own that is given back."""
        asked = replace(SamplingParams(), **sampling)  # type: ignore[arg-type]
        row = self.admit(token_ids, asked, adapter=adapter)
        first = self.prefill(row, len(token_ids), chunk)
        if first.error is not None:
            raise AssertionError(str(first.error))
        tokens = [*first.tokens, *self.decode([row], count - 1)[row]]
        self.release(row)
        return tokens
