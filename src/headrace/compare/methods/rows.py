"""Rows of a backend that no engine runs, for methods that plan by themselves, and the answers that come out of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from headrace.backends.base import Backend
from headrace.compare.methods import RequestRun
from headrace.compare.workloads import Workload
from headrace.core.errors import EngineError, HeadraceError, RequestError
from headrace.core.sizing import blocks_for
from headrace.core.types import Admit, Capacity, FinishReason, Request, RowStep, StepPlan, StepResult
from headrace.core.validate import validate

if TYPE_CHECKING:
    from headrace.engine.model import OpenModel


@dataclass(slots=True, eq=False)
class Answer:
    """What has come of one request so far. Times are seconds from the start of the run."""

    request: Request
    arrival_s: float
    limit: int
    """Most tokens it may have: what is asked for, cut to what the context holds."""
    stop_ids: frozenset[int]
    token_ids: list[int] = field(default_factory=list)
    token_s: list[float] = field(default_factory=list)
    reason: FinishReason | None = None
    """Why it has ended; None: it has not."""

    @property
    def known(self) -> tuple[int, ...]:
        """Its prompt, and its tokens so far."""
        return (*self.request.token_ids, *self.token_ids)

    def take(self, token_id: int, elapsed_s: float) -> None:
        """Its next token; ended as the engine ends it (`sched.stop`)."""
        self.token_ids.append(token_id)
        self.token_s.append(elapsed_s)
        if token_id in self.stop_ids:
            self.reason = FinishReason.STOP
        elif len(self.token_ids) >= self.limit:
            self.reason = FinishReason.LENGTH

    def run(self, end_s: float | None = None) -> RequestRun:
        """The whole of it. `end_s`: when it was handed over; None: with its last token."""
        assert self.reason is not None
        end_s = self.token_s[-1] if end_s is None else end_s
        return RequestRun(tuple(self.token_ids), str(self.reason), self.arrival_s, tuple(self.token_s), end_s)


def open_answers(opened: OpenModel, workload: Workload, name: str) -> list[Answer]:
    """One for each request, in order of arrival. `name` begins the requests' ids. Raises EngineError where the model
    cannot take one, as the engine does."""
    stop_ids = frozenset() if workload.ignore_eos else opened.eos_token_ids
    answers = []
    for index, asked in enumerate(workload.requests):
        sampling = workload.sampling(index)
        request = Request(f"{name} request {index + 1}", asked.token_ids, sampling, asked.images)
        try:
            validate(request, opened.limits)
        except RequestError as error:
            raise EngineError(f"{request.id} failed ({error.code}): {error}") from error
        limit = min(asked.max_tokens, opened.limits.max_model_len - len(asked.token_ids))
        answers.append(Answer(request, asked.arrival_s, limit, stop_ids))
    return answers


def tokens_kept(opened: OpenModel, workload: Workload) -> int:
    """Most tokens of one request that lie in the KV cache."""
    return min(workload.longest, opened.limits.max_model_len)


def padded_tokens(opened: OpenModel, workload: Workload) -> int:
    """Of the longest prompt and the longest answer: what a batch that is padded to both has room for."""
    answers = (min(one.max_tokens, opened.limits.max_model_len - len(one.token_ids)) for one in workload.requests)
    return max(len(one.token_ids) for one in workload.requests) + max(answers)


def wait_until(moment_s: float, clock: Callable[[], float], sleep: Callable[[float], None]) -> None:
    while (left_s := moment_s - clock()) > 0:
        sleep(left_s)


@dataclass(slots=True, eq=False)
class Row:
    """A row of the backend with blocks of its own, and who is in it."""

    number: int
    blocks: Sequence[int]
    """Enough for all the tokens that it will ever hold."""
    answer: Answer
    token_ids: list[int]
    """Prompt and what was sampled, more than the answer has where that was at its end already."""
    computed: int = 0
    """Leading tokens whose KV is there."""

    @property
    def left(self) -> int:
        """Known tokens that are not computed yet."""
        return len(self.token_ids) - self.computed


class Rows:
    """Steps of a backend, one at a time, in rows and blocks that its user gives out. Not thread-safe."""

    def __init__(self, backend: Backend, capacity: Capacity) -> None:
        """`backend`: without rows."""
        self.capacity = capacity
        self.computed_tokens = 0
        self._backend = backend
        self._live: set[int] = set()
        self._leaving: list[int] = []
        self._step = 0

    def step(self, spans: Sequence[tuple[Row, int]]) -> list[int | None]:
        """Computes so many more tokens of each row, at most `capacity.max_tokens` in all; a row that is new is admitted
        before. Returns the token that follows, where all that is known of a row is computed now: the row has got it
        too. Raises EngineError if a row fails."""
        fresh = [row for row, _ in spans if row.number not in self._live]
        plan = StepPlan(
            self._step,
            tuple(self._span(row, count) for row, count in spans),
            tuple(_admit(row) for row in fresh),
            tuple(self._leaving),
        )
        self._step += 1
        self._leaving = []
        self._live.update(row.number for row in fresh)
        result = self._execute(plan)
        self.computed_tokens += sum(count for _, count in spans)
        tokens: list[int | None] = []
        for (row, count), step, out in zip(spans, plan.rows, result.rows, strict=True):
            if out.error is not None:
                raise EngineError(f"{row.answer.request.id} failed ({out.error.code}): {out.error.message}")
            row.computed += count
            row.token_ids += out.tokens
            tokens.append(out.tokens[0] if step.sample else None)
        return tokens

    def _execute(self, plan: StepPlan) -> StepResult:
        try:
            self._backend.submit(plan)
            return self._backend.result()
        except HeadraceError:
            raise
        except Exception as error:
            raise EngineError(f"{type(error).__name__} in the backend: {error}") from error

    def release(self, row: Row) -> None:
        """Its number and its blocks may be given to another."""
        self._live.remove(row.number)
        self._leaving.append(row.number)

    def _span(self, row: Row, count: int) -> RowStep:
        size = self.capacity.block_size
        stop = row.computed + count
        blocks = row.blocks[blocks_for(row.computed, size) : blocks_for(stop, size)]
        return RowStep(row.number, row.computed, count, new_blocks=tuple(blocks), sample=stop == len(row.token_ids))


def _admit(row: Row) -> Admit:
    request = row.answer.request
    return Admit(
        row.number,
        tuple(row.token_ids),
        len(request.token_ids),
        request.sampling,
        row.answer.stop_ids,
        request.images,
    )
