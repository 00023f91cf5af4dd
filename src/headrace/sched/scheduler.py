"""Scheduler: which tokens are computed next, and where their KV goes.

    one rule   a sequence has num_tokens and num_planned; each step spends a token budget and a block budget on
               letting num_planned catch up
    fairness   who waits and may join does so before the budget is spent; every row is then sure of its share,
               max_tokens // max_rows tokens a step, and what is left goes to the oldest first. A row that finds no
               block takes those of the youngest row, or, being the youngest, stands still
    laws       docs/CONTRACTS.md §1: rows and blocks come back only when the last step that names them is committed;
               a block is published at the commit of the step that filled it; a failed row's blocks never are
    order      plan() may run before commit() of up to depth - 1 earlier plans; commits come in the order of plans
    faults     after a step that raised, recover() takes everyone back to the queue, and isolation.py finds out whose
               fault it was; until then (`isolating`) each plan is committed before the next is made

Nothing here knows tensors, text or threads. Methods do not block.
"""

from __future__ import annotations

from bisect import insort
from collections import deque

from headrace.core.metrics import EngineStats
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
from headrace.sched.admission import Admission
from headrace.sched.flight import Flight, Span
from headrace.sched.isolation import Isolation
from headrace.sched.pace import Pace
from headrace.sched.policy import Policy
from headrace.sched.prefix import PrefixCache
from headrace.sched.sequence import Sequence, Status
from headrace.sched.stats import SchedulerStats
from headrace.sched.stop import stop_reason
from headrace.sched.timers import Timers, overdue

__all__ = ["Scheduler", "SchedulerStats"]


class Scheduler:
    """One backend's scheduler. `eos_ids` end every request that does not ignore them.

    `step_seconds`: a step is to take about so long at most (pace.py); None: steps are as large as the capacity allows.
    """

    def __init__(
        self,
        capacity: Capacity,
        max_model_len: int,
        eos_ids: frozenset[int],
        policy: Policy,
        cache: PrefixCache,
        step_seconds: float | None = None,
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
        self._admission = Admission(cache)
        self._sequences: dict[str, Sequence] = {}
        self._num_fresh = 0
        self._timers = Timers()
        self._waiting: list[Sequence] = []
        self._running: list[Sequence] = []
        self._leaving: list[Sequence] = []
        self._free_rows = list(range(capacity.max_rows - 1, -1, -1))
        self._release: list[int] = []
        self._flights: deque[Flight] = deque()
        self._isolation = Isolation()
        share = capacity.max_tokens // capacity.max_rows
        self._pace = None if step_seconds is None else Pace(step_seconds, capacity.max_tokens, share)
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
        self._timers.add(request, sequence.number)
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

    @property
    def isolating(self) -> bool:
        """Whether a fault is being looked into."""
        return self._isolation.active

    def wake_s(self) -> float | None:
        """When plan() may do something with nothing but time passing; None: not before add() or commit()."""
        oldest = self._oldest_fresh()
        opens_s = None if oldest is None else self._policy.wake_s(self._active(), oldest.request.arrival_s)
        return None if opens_s is None else min(opens_s, self._timers.next_s())

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._sequences

    def planned(self, row: int) -> Sequence:
        """Whose row it is in the newest plan."""
        return self._flights[-1].spans[row].sequence

    def engine_stats(self) -> EngineStats:
        """Totals, and how things stand now."""
        return self.stats.report(len(self._running), len(self._waiting), self._pool, self._capacity.block_size)

    # ------------------------------------------------------------ plan

    def plan(self, now_s: float) -> StepPlan | None:
        """The next step, or None where there is nothing to compute now."""
        self._expire(now_s)
        if self._isolation.active:
            self._isolation.proceed()
            for sequence in self._isolation.parked(self._running):
                self._preempt(sequence)
        flight = Flight(self._step)
        fresh = self._num_fresh
        admits = self._join(now_s) if self._waiting else []
        flight.num_joined = fresh - self._num_fresh
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
        if (oldest := self._oldest_fresh()) and not self._isolation.active:
            waiting = min(self._num_fresh, self._capacity.max_rows)
            quota = self._policy.quota(waiting, self._active(), oldest.request.arrival_s, now_s)
        while passed < len(self._waiting) and self._free_rows:
            sequence = self._waiting[passed]
            if not sequence.was_admitted and quota <= 0:
                if len(self._waiting) == self._num_fresh:
                    break
                passed += 1
                continue
            if not self._isolation.allows(sequence):
                passed += 1
                continue
            cached = self._admission.match(sequence)
            if passed < self._capacity.max_rows and self._admission.is_coming(sequence, len(cached), self._running):
                passed += 1
                continue
            if not self._admission.room_for(sequence, cached, self._running):
                break
            del self._waiting[passed]
            if not sequence.was_admitted:
                quota -= 1
                self._policy.joined()
            admits.append(self._admit(sequence, cached, now_s))
        return admits

    def _admit(self, sequence: Sequence, cached: list[int], now_s: float) -> Admit:
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
            sequence.joined_s = now_s
            self._num_fresh -= 1
        self.stats.cached_tokens += sequence.num_computed
        self.stats.queried_tokens += len(sequence.tokens) if self._cache.enabled and not sequence.unscored else 0
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

    def _spread(self, flight: Flight) -> list[RowStep]:
        """Spends the token budget and the block budget on the running rows, oldest first."""
        rows: list[RowStep] = []
        todo = deque((s, wanted) for s in self._running if (wanted := s.remaining))
        budget = most = self._capacity.max_tokens
        share = budget // self._capacity.max_rows
        if self._pace is not None and todo:
            budget = most = self._pace.budget(len(todo))
            share = min(share, budget // len(todo))
        reserved = sum(min(share, remaining) for _, remaining in todo)
        while todo:
            sequence, remaining = todo.popleft()
            reserved -= min(share, remaining)
            wanted = min(remaining, budget - reserved)
            while (fits := self._admission.fitting(sequence, wanted)) == 0 and todo and not self._blocks_coming():
                youngest, remaining = todo.pop()
                reserved -= min(share, remaining)
                self._preempt(youngest)
            if fits:
                rows.append(self._span(flight, sequence, fits))
                budget -= fits
        self.stats.computed_tokens += most - budget
        return rows

    def _span(self, flight: Flight, sequence: Sequence, length: int) -> RowStep:
        """Plans the next `length` tokens of a sequence, for which there are blocks."""
        start = sequence.num_planned
        stop = start + length
        missing = self._admission.blocks_for(stop) - len(sequence.blocks)
        if missing > 0:
            sequence.blocks += self._pool.allocate(missing)
        new_blocks = tuple(sequence.blocks[sequence.num_announced :])
        sequence.num_announced = len(sequence.blocks)
        sampled = stop == sequence.num_tokens
        sequence.num_planned = stop
        sequence.steps_in_flight += 1
        sequence.sampling_in_flight += sampled
        flight.spans[sequence.row] = Span(sequence, start, stop, sampled)
        flight.num_tokens += length
        flight.has_prompt |= start < sequence.num_prompt
        score = sequence.unscored and start < sequence.num_prompt - 1
        return RowStep(sequence.row, start, length, new_blocks=new_blocks, sample=sampled, score_prompt=score)

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
        for number, request_id in self._timers.due(now_s):
            sequence = self._sequences.get(request_id)
            if sequence is None or sequence.number != number:
                continue
            if late := overdue(sequence.request, sequence.was_admitted, sequence.num_output, now_s):
                self._end(sequence, ErrorEvent(request_id, *late, now_s))

    # ------------------------------------------------------------ commit

    def commit(self, result: StepResult, now_s: float, seconds: float = 0.0) -> None:
        """Takes the oldest plan's result: tokens, endings, published blocks, blocks and rows that come back.

        `seconds`: what the step took, for the pace; 0: not known.
        """
        flight = self._flights.popleft()
        spans = flight.spans
        if result.step != flight.step or [out.row for out in result.rows] != list(spans):
            raise ValueError(f"result of step {result.step} does not answer plan {flight.step}")
        self.stats.step(flight.num_tokens, flight.has_prompt, flight.num_joined, seconds)
        if self._pace is not None:
            self._pace.measured(flight.num_tokens, seconds)
        for out in result.rows:
            span = spans[out.row]
            sequence = span.sequence
            sequence.steps_in_flight -= 1
            sequence.sampling_in_flight -= span.sampled
            if not sequence.ended:
                self._commit_row(sequence, span, out, now_s)
                self._isolation.computed(sequence)
            if sequence.status is Status.LEAVING and sequence.steps_in_flight == 0:
                self._give_back(sequence)

    def _commit_row(self, sequence: Sequence, span: Span, out: RowOut, now_s: float) -> None:
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
        counts = (sequence.num_prompt, num_output, sequence.num_cached)
        return FinishEvent(sequence.request.id, reason, *counts, now_s, stop_id, sequence.joined_s)

    # ------------------------------------------------------------ faults

    def recover(self) -> str | None:
        """After a step that raised, once the backend has forgotten every row and plan (`Backend.reset`).

        Every row goes back to its place in the queue, or ends if it was leaving; what was in flight is computed anew.
        Returns the id of the request that fails alone, which is to be ended with `fail`, or None: then the next plans
        are trials (`isolating`), or the fault has nobody to be blamed.
        """
        self.stats.faults += 1
        self._flights.clear()
        rows = self._running + self._leaving
        guilty = self._isolation.blame(s for s in rows if not s.ended)
        if guilty is not None:
            # What an earlier chunk left may be the cause: nobody may find it again.
            self._cache.withdraw(guilty.blocks)
        for sequence in rows:
            sequence.steps_in_flight = sequence.sampling_in_flight = 0
            sequence.tried_until = max(sequence.tried_until, sequence.num_planned)
            if sequence.status is Status.RUNNING:
                self._preempt(sequence)
            else:
                self._give_back(sequence)
        self._release = []
        return None if guilty is None else guilty.request.id

    # ------------------------------------------------------------ leaving

    def _end(self, sequence: Sequence, event: Event) -> None:
        """The one place where a request ends: its only terminal event goes out here."""
        self._events.append(event)
        sequence.ended = True
        self._isolation.ended(sequence)
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
        if not self._running and not self._leaving and self._pool.num_held:
            # Lost by a bug: that must cost neither the blocks nor the engine. What lies in them is not to be trusted.
            self.stats.leaks += 1
            self._cache.clear()

    def check_integrity(self) -> None:
        """Raises AssertionError unless pool, cache, rows and sequences agree. For tests: after every call."""
        holders = self._running + self._leaving
        self._cache.check_integrity([s.blocks for s in holders])
        rows = [s.row for s in holders]
        if sorted(rows + self._free_rows) != list(range(self._capacity.max_rows)):
            raise AssertionError("a row is lost or has two users")
        for s in holders:
            if len(s.blocks) != self._admission.blocks_for(s.num_planned):
                raise AssertionError(f"{s.request.id} holds {len(s.blocks)} blocks for {s.num_planned} tokens")
            s.check_integrity()
        flying = sum(len(flight.spans) for flight in self._flights)
        if flying != sum(s.steps_in_flight for s in holders):
            raise AssertionError("steps in flight are not those of the sequences")
        listed = {id(s) for s in self._waiting + self._running} | {id(s) for s in self._leaving if not s.ended}
        if listed != {id(s) for s in self._sequences.values()}:
            raise AssertionError("a request is lost")
        if self._num_fresh != sum(not s.was_admitted for s in self._waiting):
            raise AssertionError("requests that never joined are miscounted")
