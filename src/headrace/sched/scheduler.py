"""Scheduler: which tokens are computed next, and where their KV goes.

    one rule   a sequence has num_tokens and num_planned; each step spends a token budget and a block budget on
               letting num_planned catch up
    fairness   who waits and may join does so before the budget is spent; every row is then sure of its share,
               max_tokens // max_rows tokens a step, and what is left goes to the oldest first. A row that finds no
               block takes those of the youngest row, or, being the youngest, stands still
    laws       docs/CONTRACTS.md §1: rows and blocks come back only when the last step that names them is committed;
               a block is published at the commit of the step that filled it; a failed row's blocks never are
    order      plan() may run before commit() of up to depth - 1 earlier plans; commits come in the order of plans

Nothing here knows tensors, text or threads. Methods do not block.
"""

from __future__ import annotations

import heapq
from bisect import insort
from collections import deque
from dataclasses import dataclass, field

from headrace.core.types import (
    Admit,
    Capacity,
    ErrorEvent,
    Event,
    FinishEvent,
    FinishReason,
    Request,
    RowOut,
    RowStep,
    StepPlan,
    StepResult,
    TokenEvent,
)
from headrace.sched.policy import Policy
from headrace.sched.prefix import PrefixCache
from headrace.sched.sequence import Sequence, Status
from headrace.sched.stop import stop_reason


@dataclass(slots=True)
class SchedulerStats:
    """Totals since the start."""

    iterations: int = 0
    """Plans that computed at least one token."""
    computed_tokens: int = 0
    cached_tokens: int = 0
    """Tokens whose KV was found in the prefix cache instead of being computed."""
    preemptions: int = 0


@dataclass(slots=True)
class _Span:
    """What a plan lets one row do."""

    sequence: Sequence
    start: int
    stop: int
    sampled: bool


@dataclass(slots=True)
class _Flight:
    """A plan that is not committed yet."""

    step: int
    spans: dict[int, _Span] = field(default_factory=dict)


class Scheduler:
    """One backend's scheduler. `eos_ids` end every request that does not ignore them."""

    def __init__(
        self, capacity: Capacity, max_model_len: int, eos_ids: frozenset[int], policy: Policy, cache: PrefixCache
    ) -> None:
        if capacity.max_tokens < capacity.max_rows:
            raise ValueError(f"max_tokens {capacity.max_tokens} must be ≥ max_rows {capacity.max_rows}")
        if max_model_len > capacity.blocks * capacity.block_size:
            raise ValueError(
                f"max_model_len {max_model_len} must fit {capacity.blocks} blocks of {capacity.block_size}"
            )
        self._capacity = capacity
        self._max_model_len = max_model_len
        self._eos_ids = eos_ids
        self._policy = policy
        self._cache = cache
        self._pool = cache.pool
        self._sequences: dict[str, Sequence] = {}
        self._num_fresh = 0
        self._deadlines: list[tuple[float, int, str]] = []
        self._waiting: list[Sequence] = []
        self._running: list[Sequence] = []
        self._leaving: list[Sequence] = []
        self._free_rows = list(range(capacity.max_rows - 1, -1, -1))
        self._release: list[int] = []
        self._flights: deque[_Flight] = deque()
        self._events: list[Event] = []
        self._arrivals = 0
        self._step = 0
        self.stats = SchedulerStats()

    # ------------------------------------------------------------ requests

    def add(self, request: Request) -> None:
        """Queues a validated request. Raises ValueError if its id is in use."""
        if request.id in self._sequences:
            raise ValueError(f"request id {request.id!r} is in use")
        sampling = request.sampling
        num_prompt = len(request.token_ids)
        sequence = Sequence(
            request=request,
            number=self._arrivals,
            stop_ids=frozenset(sampling.stop_token_ids) | (frozenset() if sampling.ignore_eos else self._eos_ids),
            max_total=(
                self._max_model_len
                if sampling.max_tokens is None
                else min(num_prompt + sampling.max_tokens, self._max_model_len)
            ),
            root_key=self._cache.root(request.salt, request.adapter),
            tokens=list(request.token_ids),
        )
        self._arrivals += 1
        self._sequences[request.id] = sequence
        self._num_fresh += 1
        if request.deadline_s is not None:
            heapq.heappush(self._deadlines, (request.deadline_s, sequence.number, request.id))
        insort(self._waiting, sequence, key=lambda s: s.place)

    def abort(self, request_id: str, now_s: float) -> None:
        """Ends a request wherever it is; an unknown or ended id is no error."""
        if sequence := self._sequences.get(request_id):
            self._end(sequence, self._finish_event(sequence, FinishReason.ABORT, sequence.num_output, now_s))

    def finish(self, request_id: str, num_output: int, now_s: float) -> None:
        """The client found a stop string: the answer is the first `num_output` tokens (law 5)."""
        if sequence := self._sequences.get(request_id):
            self._end(sequence, self._finish_event(sequence, FinishReason.STOP, num_output, now_s))

    def fail(self, request_id: str, code: str, message: str, now_s: float) -> None:
        """Ends a request with an error."""
        if sequence := self._sequences.get(request_id):
            self._end(sequence, ErrorEvent(request_id, code, message, now_s))

    def use_policy(self, policy: Policy) -> None:
        """Changes who may join. Raises ValueError while a request is unfinished."""
        if self._sequences:
            raise ValueError("the policy can change only while nothing runs")
        self._policy = policy

    def take_events(self) -> list[Event]:
        """Events since the last call, in order."""
        events, self._events = self._events, []
        return events

    @property
    def unfinished(self) -> tuple[str, ...]:
        """Ids without a terminal event, oldest first."""
        return tuple(self._sequences)

    @property
    def has_work(self) -> bool:
        """Whether a request has no terminal event yet, or a plan no commit."""
        return bool(self._sequences or self._flights)

    @property
    def in_flight(self) -> int:
        """Plans that wait for their commit."""
        return len(self._flights)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    def wake_s(self) -> float | None:
        """When a plan may become possible with nothing but time passing; None: only through add() or commit()."""
        oldest = self._oldest_fresh()
        return None if oldest is None else self._policy.wake_s(self._active(), oldest.request.arrival_s)

    # ------------------------------------------------------------ plan

    def plan(self, now_s: float) -> StepPlan | None:
        """The next step, or None where there is nothing to compute now."""
        if self._deadlines:
            self._expire(now_s)
        flight = _Flight(self._step)
        admits = self._join(now_s) if self._waiting else []
        rows = self._spread(flight)
        if not rows:
            return None
        plan = StepPlan(self._step, tuple(rows), tuple(admits), tuple(self._release))
        self._release = []
        self._step += 1
        self._flights.append(flight)
        self.stats.iterations += 1
        return plan

    def _join(self, now_s: float) -> list[Admit]:
        """Admits from the queue, in order; the first that finds no room keeps those behind it waiting.

        Passed over: who would compute what a running row is about to publish, and, once the policy lets no more join,
        who never joined: those that were preempted come back whatever the policy says.
        """
        admits: list[Admit] = []
        passed = 0
        quota = 0
        if oldest := self._oldest_fresh():
            waiting = min(self._num_fresh, self._capacity.max_rows)
            quota = self._policy.quota(waiting, self._active(), oldest.request.arrival_s, now_s)
        while passed < len(self._waiting) and self._free_rows:
            sequence = self._waiting[passed]
            if not sequence.was_admitted and quota <= 0:
                if len(self._waiting) == self._num_fresh:
                    break
                passed += 1
                continue
            cached = self._match(sequence)
            if passed < self._capacity.max_rows and self._is_coming(sequence, len(cached)):
                passed += 1
                continue
            if not self._room_for(sequence, cached):
                break
            del self._waiting[passed]
            if not sequence.was_admitted:
                quota -= 1
                self._policy.joined()
            admits.append(self._admit(sequence, cached))
        return admits

    def _match(self, sequence: Sequence) -> list[int]:
        """Blocks that need not be computed: none while its prompt's log-probabilities are wanted, for a block holds no
        logits."""
        if sequence.unscored:
            return []
        return self._cache.match(sequence.root_key, sequence.tokens, sequence.request.images)

    def _is_coming(self, sequence: Sequence, num_cached: int) -> bool:
        """Whether a running row will publish the block after its first `num_cached`: to wait is to find it."""
        stop = (num_cached + 1) * self._capacity.block_size
        tokens = sequence.tokens
        if not self._cache.enabled or sequence.unscored or sequence.request.images or stop >= len(tokens):
            return False
        return any(
            len(other.keys) <= num_cached
            and other.root_key == sequence.root_key
            and not other.request.images
            and len(other.tokens) >= stop
            and other.tokens[stop - 1] == tokens[stop - 1]
            and other.tokens[:stop] == tokens[:stop]
            for other in self._running
        )

    def _room_for(self, sequence: Sequence, cached: list[int]) -> bool:
        """Whether its known tokens fit beside those of the running rows and one more block for each of these, so that
        joining does not at once mean preempting. Alone, it always fits."""
        idle = sum(self._pool.refs(block) == 0 for block in cached)
        promised = sum(self._blocks_for(s.num_tokens) + 1 - len(s.blocks) for s in self._running)
        needed = self._blocks_for(len(sequence.tokens)) - len(cached)
        return needed + promised <= self._pool.available - idle

    def _admit(self, sequence: Sequence, cached: list[int]) -> Admit:
        for block in cached:
            self._pool.share(block)
        sequence.row = self._free_rows.pop()
        sequence.status = Status.RUNNING
        sequence.blocks = list(cached)
        sequence.num_announced = 0
        sequence.keys = []
        sequence.num_planned = sequence.num_computed = len(cached) * self._capacity.block_size
        self._publish(sequence)
        if not sequence.was_admitted:
            sequence.num_cached = sequence.num_computed
            sequence.was_admitted = True
            self._num_fresh -= 1
        self.stats.cached_tokens += sequence.num_computed
        insort(self._running, sequence, key=lambda s: s.place)
        request = sequence.request
        return Admit(
            row=sequence.row,
            token_ids=tuple(sequence.tokens),
            num_prompt=sequence.num_prompt,
            sampling=request.sampling,
            stop_ids=sequence.stop_ids,
            images=request.images,
            adapter=request.adapter,
        )

    def _spread(self, flight: _Flight) -> list[RowStep]:
        """Spends the token budget and the block budget on the running rows, oldest first."""
        rows: list[RowStep] = []
        budget = self._capacity.max_tokens
        share = budget // self._capacity.max_rows
        todo: deque[tuple[Sequence, int]] = deque()
        reserved = 0
        for sequence in self._running:
            if remaining := sequence.remaining:
                todo.append((sequence, remaining))
                reserved += min(share, remaining)
        while todo:
            sequence, remaining = todo.popleft()
            reserved -= min(share, remaining)
            wanted = min(remaining, budget - reserved)
            while (fits := self._fitting(sequence, wanted)) == 0 and todo and not self._blocks_coming():
                youngest, remaining = todo.pop()
                reserved -= min(share, remaining)
                self._preempt(youngest)
            if fits:
                rows.append(self._span(flight, sequence, fits))
                budget -= fits
        self.stats.computed_tokens += self._capacity.max_tokens - budget
        return rows

    def _span(self, flight: _Flight, sequence: Sequence, length: int) -> RowStep:
        """Plans the next `length` tokens of a sequence, for which there are blocks."""
        start = sequence.num_planned
        stop = start + length
        missing = self._blocks_for(stop) - len(sequence.blocks)
        if missing > 0:
            sequence.blocks += self._pool.allocate(missing)
        new_blocks = tuple(sequence.blocks[sequence.num_announced :])
        sequence.num_announced = len(sequence.blocks)
        sampled = stop == sequence.num_tokens
        sequence.num_planned = stop
        sequence.steps_in_flight += 1
        sequence.sampling_in_flight += sampled
        flight.spans[sequence.row] = _Span(sequence, start, stop, sampled)
        score = sequence.unscored and start < sequence.num_prompt - 1
        return RowStep(sequence.row, start, length, new_blocks=new_blocks, sample=sampled, score_prompt=score)

    def _blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self._capacity.block_size)

    def _fitting(self, sequence: Sequence, wanted: int) -> int:
        """How many of the `wanted` next tokens the blocks at hand allow."""
        size = self._capacity.block_size
        held = len(sequence.blocks) * size - sequence.num_planned
        return wanted if wanted <= held else max(0, min(wanted, held + self._pool.available * size))

    def _blocks_coming(self) -> bool:
        """Whether blocks come back at a commit that is due, without preempting anyone else."""
        return any(self._pool.refs(block) == 1 for sequence in self._leaving for block in sequence.blocks)

    def _oldest_fresh(self) -> Sequence | None:
        """The request that has waited longest to join for the first time."""
        return next((s for s in self._sequences.values() if not s.was_admitted), None) if self._num_fresh else None

    def _active(self) -> int:
        """Requests that have joined and are unfinished, preempted ones included."""
        return len(self._sequences) - self._num_fresh

    def _expire(self, now_s: float) -> None:
        while self._deadlines and self._deadlines[0][0] <= now_s:
            _, number, request_id = heapq.heappop(self._deadlines)
            sequence = self._sequences.get(request_id)
            if sequence is not None and sequence.number == number:
                message = f"not finished by its deadline, {sequence.num_output} tokens generated"
                self._end(sequence, ErrorEvent(request_id, "deadline_exceeded", message, now_s))

    # ------------------------------------------------------------ commit

    def commit(self, result: StepResult, now_s: float) -> None:
        """Takes the oldest plan's result: tokens, endings, published blocks, blocks and rows that come back."""
        flight = self._flights.popleft()
        spans = flight.spans
        if result.step != flight.step or [out.row for out in result.rows] != list(spans):
            raise ValueError(f"result of step {result.step} does not answer plan {flight.step}")
        for out in result.rows:
            span = spans[out.row]
            sequence = span.sequence
            sequence.steps_in_flight -= 1
            sequence.sampling_in_flight -= span.sampled
            if not sequence.ended:
                self._commit_row(sequence, span, out, now_s)
            if sequence.status is Status.LEAVING and sequence.steps_in_flight == 0:
                self._give_back(sequence)

    def _commit_row(self, sequence: Sequence, span: _Span, out: RowOut, now_s: float) -> None:
        if out.error is not None:
            # What an earlier chunk left may be the cause: nobody may find it again.
            self._cache.withdraw(sequence.blocks)
            self._end(sequence, ErrorEvent(sequence.request.id, out.error.code, out.error.message, now_s))
            return
        sequence.num_computed = span.stop
        self._publish(sequence)
        if out.prompt_logprobs:
            # After a preemption some are told a second time.
            sequence.prompt_logprobs += out.prompt_logprobs[len(sequence.prompt_logprobs) - span.start :]
        reason = None
        taken = 0
        for token in out.tokens:
            sequence.tokens.append(token)
            taken += 1
            if reason := stop_reason(sequence):
                break
        if taken:
            logprobs = out.logprobs[:taken]
            first = sequence.num_output == taken
            scores = tuple(sequence.prompt_logprobs) if first else ()
            self._events.append(TokenEvent(sequence.request.id, out.tokens[:taken], logprobs, now_s, scores))
        if reason is not None:
            stop_id = sequence.tokens[-1] if reason is FinishReason.STOP else None
            self._end(sequence, self._finish_event(sequence, reason, sequence.num_output, now_s, stop_id))

    def _publish(self, sequence: Sequence) -> None:
        size = self._capacity.block_size
        while (len(sequence.keys) + 1) * size <= sequence.num_computed:
            index = len(sequence.keys)
            parent = sequence.keys[-1] if sequence.keys else sequence.root_key
            ids = tuple(sequence.tokens[index * size : (index + 1) * size])
            images = sequence.request.images
            sequence.keys.append(self._cache.insert(parent, ids, index * size, images, sequence.blocks[index]))

    def _finish_event(
        self, sequence: Sequence, reason: FinishReason, num_output: int, now_s: float, stop_id: int | None = None
    ) -> FinishEvent:
        return FinishEvent(
            sequence.request.id, reason, sequence.num_prompt, num_output, sequence.num_cached, now_s, stop_id
        )

    # ------------------------------------------------------------ leaving

    def _end(self, sequence: Sequence, event: Event) -> None:
        """The one place where a request ends: its only terminal event goes out here."""
        self._events.append(event)
        sequence.ended = True
        del self._sequences[sequence.request.id]
        self._num_fresh -= not sequence.was_admitted
        if sequence.status is Status.WAITING:
            self._waiting.remove(sequence)
            sequence.status = Status.ENDED
        elif sequence.status is Status.RUNNING:
            self._leave(sequence)

    def _preempt(self, sequence: Sequence) -> None:
        """Takes a row's blocks; it goes back to its place in the queue and computes everything anew."""
        self.stats.preemptions += 1
        self._leave(sequence)

    def _leave(self, sequence: Sequence) -> None:
        self._running.remove(sequence)
        sequence.status = Status.LEAVING
        self._leaving.append(sequence)
        if sequence.steps_in_flight == 0:
            self._give_back(sequence)

    def _give_back(self, sequence: Sequence) -> None:
        """No step in flight names the sequence any more: its row and blocks may be used again."""
        self._leaving.remove(sequence)
        self._release.append(sequence.row)
        self._free_rows.append(sequence.row)
        self._pool.release(sequence.blocks)
        sequence.row = -1
        sequence.blocks = []
        if sequence.ended:
            sequence.status = Status.ENDED
        else:
            sequence.status = Status.WAITING
            insort(self._waiting, sequence, key=lambda s: s.place)

    def check_integrity(self) -> None:
        """Raises AssertionError unless pool, cache, rows and sequences agree. For tests: after every call."""
        holders = self._running + self._leaving
        self._cache.check_integrity([s.blocks for s in holders])
        rows = [s.row for s in holders]
        if sorted(rows + self._free_rows) != list(range(self._capacity.max_rows)):
            raise AssertionError("a row is lost or has two users")
        for s in holders:
            if len(s.blocks) != self._blocks_for(s.num_planned):
                raise AssertionError(f"{s.request.id} holds {len(s.blocks)} blocks for {s.num_planned} tokens")
            if not s.num_computed <= s.num_planned <= s.num_tokens:
                raise AssertionError(f"{s.request.id}: computed {s.num_computed}, planned {s.num_planned}")
        flying = sum(len(flight.spans) for flight in self._flights)
        if flying != sum(s.steps_in_flight for s in holders):
            raise AssertionError("steps in flight are not those of the sequences")
        listed = {id(s) for s in self._waiting + self._running} | {id(s) for s in self._leaving if not s.ended}
        if listed != {id(s) for s in self._sequences.values()}:
            raise AssertionError("a request is lost")
        if self._num_fresh != sum(not s.was_admitted for s in self._waiting):
            raise AssertionError("requests that never joined are miscounted")
