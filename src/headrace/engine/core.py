"""EngineCore: the loop that every way in shares. It knows no text and no HTTP.

step:  plan → submit → (once `depth` plans are in flight, or none can be planned) result → commit → events
"""

from __future__ import annotations

import time
from collections.abc import Callable

from headrace.backends.base import Backend
from headrace.core.errors import EngineError, HeadraceError, RequestError
from headrace.core.types import EngineLimits, ErrorEvent, Event, Request
from headrace.core.validate import validate
from headrace.sched.policy import Policy
from headrace.sched.scheduler import Scheduler, SchedulerStats


class EngineCore:
    """Drives one scheduler and one backend. Not thread-safe: one thread steps and submits."""

    def __init__(
        self,
        backend: Backend,
        scheduler: Scheduler,
        limits: EngineLimits,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._backend = backend
        self._scheduler = scheduler
        self._limits = limits
        self._clock = clock
        self._events: list[Event] = []
        self._dead: HeadraceError | None = None

    def submit(self, request: Request) -> None:
        """Queues a request. What is wrong with it comes back as its ErrorEvent, like every other ending.

        Raises ValueError if the id is in use.
        """
        try:
            if self._dead is not None:
                raise self._dead
            validate(request, self._limits)
            self._scheduler.add(request)
        except (RequestError, EngineError) as error:
            self._events.append(ErrorEvent(request.id, error.code, str(error), self._clock()))

    def use_policy(self, policy: Policy) -> None:
        """Changes who may join the running batch. Raises ValueError while a request is unfinished."""
        self._scheduler.use_policy(policy)

    def finish(self, request_id: str, num_output: int) -> None:
        """A stop string was found: the answer is its first `num_output` tokens."""
        self._scheduler.finish(request_id, num_output, self._clock())
        self._events += self._scheduler.take_events()

    def abort(self, request_id: str) -> None:
        """Ends a request wherever it is; an unknown or ended one is no error."""
        self._scheduler.abort(request_id, self._clock())
        self._events += self._scheduler.take_events()

    def step(self) -> list[Event]:
        """One iteration; the events it led to, in order. Returns at once where nothing can be done."""
        try:
            self._advance()
        except HeadraceError as error:
            self._die(error)
        except Exception as error:
            self._die(EngineError(f"{type(error).__name__} in the engine: {error}"))
        events = self._events + self._scheduler.take_events()
        self._events = []
        return events

    def _advance(self) -> None:
        if self._dead is not None:
            return
        plan = self._scheduler.plan(self._clock())
        if plan is not None:
            self._backend.submit(plan)
        in_flight = self._scheduler.in_flight
        if in_flight and (plan is None or in_flight >= self._backend.depth):
            self._scheduler.commit(self._backend.result(), self._clock())

    def _die(self, error: HeadraceError) -> None:
        """Only a dead device, or a bug, ends the engine: then every request hears of it."""
        self._dead = error
        for request_id in self._scheduler.unfinished:
            self._scheduler.fail(request_id, error.code, str(error), self._clock())

    @property
    def has_work(self) -> bool:
        """Whether a request is unfinished, a plan uncommitted or an event not yet taken."""
        return bool(self._events) or (self._dead is None and self._scheduler.has_work)

    @property
    def error(self) -> HeadraceError | None:
        """Why the engine is dead, or None."""
        return self._dead

    def sleep_s(self) -> float:
        """Seconds for which stepping is of no use unless something is submitted."""
        if self._scheduler.in_flight or self._scheduler.num_running:
            return 0.0
        wake_s = self._scheduler.wake_s()
        return 0.0 if wake_s is None else max(0.0, wake_s - self._clock())

    @property
    def stats(self) -> SchedulerStats:
        return self._scheduler.stats

    def close(self) -> None:
        self._backend.close()
