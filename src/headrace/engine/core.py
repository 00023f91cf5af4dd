"""EngineCore: the loop that every way in shares. It knows no text and no HTTP.

step    plan → masks → submit → (once `depth` plans are in flight, or none can be planned) result → commit → events
fault   a step that raises ends at most the request whose row makes it raise: the backend forgets its rows, the
        scheduler tries them anew in halves until one fails alone. Only a dead device, or a bug of this loop, ends all
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Protocol

from headrace.backends.base import Backend
from headrace.core.errors import BackendUnavailable, EngineError, HeadraceError, UnsupportedParameter
from headrace.core.metrics import EngineStats
from headrace.core.types import (
    EngineLimits,
    ErrorEvent,
    Event,
    FinishEvent,
    FinishReason,
    Request,
    StepPlan,
    StepResult,
    TokenEvent,
)
from headrace.core.validate import validate
from headrace.sched.policy import Policy
from headrace.sched.scheduler import Scheduler, SchedulerStats
from headrace.sched.timers import overdue

LONE_FAULTS = 3
"""Requests that fail alone, one after the other, with no step that succeeds meanwhile: then it is the device."""
COMPILING_POLL_S = 0.005
FAULT = "an internal fault while this request was computed; it was ended, and no other was affected"
STOPPED = "the engine has stopped after an internal fault"


class GrammarSource(Protocol):
    """Compiles grammars without blocking, and says which tokens may come next. Errors are HeadraceErrors."""

    def begin(self, request: Request) -> None:
        """Starts on the request's grammar."""

    def state(self, request_id: str) -> str:
        """compiling or ready. Raises if the grammar cannot be used."""

    def mask(self, request_id: str, output_ids: tuple[int, ...]) -> bytes:
        """`RowStep.mask` after these tokens of the answer. Raises if nothing can follow them."""

    def drop(self, request_id: str) -> None:
        """The request has ended."""


class EngineCore:
    """Drives one scheduler and one backend. Not thread-safe: one thread steps and submits.

    `grammars`: None: requests with a grammar are refused. `on_fault` hears of each exception that a step raised.
    """

    def __init__(
        self,
        backend: Backend,
        scheduler: Scheduler,
        limits: EngineLimits,
        clock: Callable[[], float] = time.monotonic,
        *,
        grammars: GrammarSource | None = None,
        on_fault: Callable[[BaseException], None] = lambda error: None,
    ) -> None:
        self._backend = backend
        self._scheduler = scheduler
        self._limits = limits
        self._clock = clock
        self._grammars = grammars
        self._on_fault = on_fault
        self._events: list[Event] = []
        self._compiling: dict[str, Request] = {}
        """Requests that wait for their grammar, outside the scheduler."""
        self._constrained: set[str] = set()
        """Every request with a grammar whose end has not been told yet."""
        self._submitted_s: deque[float] = deque()
        """When each plan in flight was submitted."""
        self._answered_s = -math.inf
        self._lone_faults = 0
        self._cleared = False
        """Whether a step has succeeded since the last fault that is looked into came."""
        self._error: HeadraceError | None = None
        self._refusal: HeadraceError | None = None
        """What clients are told of it."""

    # ------------------------------------------------------------ requests

    def submit(self, request: Request) -> None:
        """Queues a request. What is wrong with it comes back as its ErrorEvent, like every other ending.

        Raises ValueError if the id is in use.
        """
        if request.id in self._compiling or request.id in self._scheduler:
            raise ValueError(f"request id {request.id!r} is in use")
        if self._refusal is not None:
            self._refuse(request.id, self._refusal)
            return
        try:
            validate(request, self._limits)
            if request.grammar:
                self._compile(request)
            else:
                self._scheduler.add(request)
        except HeadraceError as error:
            self._refuse(request.id, error)

    def use_policy(self, policy: Policy) -> None:
        """Changes who may join the running batch. Raises ValueError while a request is unfinished."""
        self._scheduler.use_policy(policy)

    def finish(self, request_id: str, num_output: int) -> None:
        """A stop string was found: the answer is its first `num_output` tokens."""
        self._scheduler.finish(request_id, num_output, self._clock())
        self._collect()

    def abort(self, request_id: str) -> None:
        """Ends a request wherever it is; an unknown or ended one is no error."""
        if request := self._compiling.get(request_id):
            num_prompt = len(request.token_ids)
            self._events.append(FinishEvent(request_id, FinishReason.ABORT, num_prompt, 0, 0, self._clock()))
            self._drop(request_id)
        self._scheduler.abort(request_id, self._clock())
        self._collect()

    def _refuse(self, request_id: str, error: HeadraceError) -> None:
        """Ends a request that the scheduler does not have."""
        self._events.append(ErrorEvent(request_id, error.code, str(error), self._clock()))
        self._drop(request_id)

    def _collect(self) -> None:
        """Takes over the scheduler's events."""
        events = self._scheduler.take_events()
        if self._constrained:
            for event in events:
                if not isinstance(event, TokenEvent):
                    self._drop(event.request_id)
        self._events += events

    # ------------------------------------------------------------ a step

    def step(self) -> list[Event]:
        """One iteration; the events it led to, in order. Returns at once where nothing can be done."""
        try:
            self._advance()
        except HeadraceError as error:
            self._die(error, error)
        except Exception as error:
            self._die(EngineError(f"{type(error).__name__} in the engine: {error}"), EngineError(STOPPED))
        self._collect()
        events, self._events = self._events, []
        return events

    def _advance(self) -> None:
        if self._error is not None:
            return
        if self._compiling:
            self._take_compiled()
        plan = self._scheduler.plan(self._clock())
        if plan is not None and self._constrained:
            plan = self._masked(plan)
        try:
            result = self._execute(plan)
        except Exception as error:
            if isinstance(error, BackendUnavailable):
                raise  # the backend's own word that the device is gone
            self._recover(error)
            return
        if result is not None:
            self._commit(result)

    def _execute(self, plan: StepPlan | None) -> StepResult | None:
        """Submits a plan, and waits for the oldest one's result if the pipeline is full or nothing can be planned."""
        if plan is not None:
            self._submitted_s.append(self._clock())
            self._backend.submit(plan)
        in_flight = self._scheduler.in_flight
        # While a fault is looked into, each plan stands alone.
        depth = 1 if self._scheduler.isolating else self._backend.depth
        return self._backend.result() if in_flight and (plan is None or in_flight >= depth) else None

    def _commit(self, result: StepResult) -> None:
        now_s = self._clock()
        # Of two plans in flight, the later one begins when the earlier one ends.
        seconds = now_s - max(self._submitted_s.popleft(), self._answered_s)
        self._answered_s = now_s
        self._lone_faults = 0
        self._cleared = True
        self._scheduler.commit(result, now_s, seconds)

    # ------------------------------------------------------------ faults

    def _recover(self, error: Exception) -> None:
        """A step raised: everything in flight is forgotten, and computed anew unless its request is at fault."""
        self._on_fault(error)
        self._submitted_s.clear()
        self._backend.reset()
        self._cleared = self._cleared and self._scheduler.isolating
        guilty = self._scheduler.recover()
        if guilty is not None:
            self._lone_faults += not self._cleared
            self._scheduler.fail(guilty, EngineError.code, FAULT, self._clock())
        # Whoever can still be tried is tried before: a step that succeeds clears the device.
        if self._lone_faults >= LONE_FAULTS and not self._scheduler.isolating:
            raise EngineError("the backend computes no request any more") from error

    def _die(self, error: HeadraceError, refusal: HeadraceError) -> None:
        """Only a dead device, or a bug, ends the engine: then every request hears of it."""
        self._error, self._refusal = error, refusal
        for request_id in self._scheduler.unfinished:
            self._scheduler.fail(request_id, refusal.code, str(refusal), self._clock())
        for request_id in list(self._compiling):
            self._refuse(request_id, refusal)

    # ------------------------------------------------------------ grammars

    def _compile(self, request: Request) -> None:
        """Raises UnsupportedParameter, or what `GrammarSource.begin` raises."""
        if self._grammars is None:
            raise UnsupportedParameter("grammar", request.grammar, "none on this engine")
        with self._coded():
            self._grammars.begin(request)
        self._compiling[request.id] = request
        self._constrained.add(request.id)

    def _take_compiled(self) -> None:
        """Requests whose grammar is ready go to the scheduler; time runs for the others too."""
        assert self._grammars is not None
        now_s = self._clock()
        for request in list(self._compiling.values()):
            try:
                with self._coded():
                    ready = self._grammars.state(request.id) == "ready"
            except HeadraceError as error:
                self._refuse(request.id, error)
                continue
            if late := overdue(request, False, 0, now_s):
                self._events.append(ErrorEvent(request.id, *late, now_s))
                self._drop(request.id)
            elif ready:
                del self._compiling[request.id]
                self._scheduler.add(request)

    def _masked(self, plan: StepPlan) -> StepPlan:
        """The plan with a mask for each row that samples and has a grammar. A row without one fails, alone."""
        assert self._grammars is not None
        rows = list(plan.rows)
        for index, step in enumerate(rows):
            sequence = self._scheduler.planned(step.row)
            request = sequence.request
            if not step.sample or not request.grammar:
                continue
            try:
                with self._coded():
                    mask = self._grammars.mask(request.id, tuple(sequence.tokens[sequence.num_prompt :]))
            except HeadraceError as error:
                self._scheduler.fail(request.id, error.code, str(error), self._clock())
            else:
                rows[index] = replace(step, mask=mask)
        return replace(plan, rows=tuple(rows))

    @contextmanager
    def _coded(self) -> Iterator[None]:
        """What a grammar raises is its request's own error; what is no HeadraceError becomes one."""
        try:
            yield
        except (HeadraceError, KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic of the grammar's library is no Exception
            self._on_fault(error)
            raise EngineError(FAULT) from error

    def _drop(self, request_id: str) -> None:
        """A request has ended: nothing is kept of its grammar, if it has one."""
        if request_id in self._constrained:
            assert self._grammars is not None
            self._constrained.remove(request_id)
            self._compiling.pop(request_id, None)
            self._grammars.drop(request_id)

    # ------------------------------------------------------------ how it is

    @property
    def has_work(self) -> bool:
        """Whether a request is unfinished, a plan uncommitted or an event not yet taken."""
        alive = self._error is None
        return bool(self._events) or (alive and (bool(self._compiling) or self._scheduler.has_work))

    @property
    def num_running(self) -> int:
        """Requests that have joined and are unfinished."""
        return self._scheduler.num_running

    @property
    def error(self) -> HeadraceError | None:
        """Why the engine is dead, or None. Its message may tell of the inside."""
        return self._error

    def sleep_s(self) -> float:
        """Seconds for which stepping is of no use unless something is submitted."""
        scheduler = self._scheduler
        if scheduler.in_flight or scheduler.num_running or scheduler.isolating:
            return 0.0
        if self._compiling and not scheduler.has_work:
            return COMPILING_POLL_S
        wake_s = scheduler.wake_s()
        if wake_s is None:
            return 0.0
        delay_s = max(0.0, wake_s - self._clock())
        return min(delay_s, COMPILING_POLL_S) if self._compiling else delay_s

    @property
    def stats(self) -> SchedulerStats:
        return self._scheduler.stats

    def engine_stats(self) -> EngineStats:
        """Totals, and how things stand now, as data."""
        stats = self._scheduler.engine_stats()
        return replace(stats, waiting=stats.waiting + len(self._compiling))

    def probe(self) -> Mapping[str, object]:
        """What the backend found on this machine."""
        return self._backend.probe()

    def memory(self) -> Mapping[str, int]:
        """The backend's bytes by use."""
        return self._backend.memory()

    def close(self) -> None:
        self._backend.close()
