"""EngineClient: how everything above the engine talks to it; the same calls in-process or to another process."""

from __future__ import annotations

import time
from typing import Protocol

from headrace.core.types import Event, Request
from headrace.engine.core import EngineCore
from headrace.sched.scheduler import SchedulerStats


class EngineClient(Protocol):
    def submit(self, request: Request) -> None:
        """Queues a request; its events come out of `poll`, the last one a FinishEvent or an ErrorEvent."""

    def finish(self, request_id: str, num_output: int) -> None:
        """The answer is complete with its first `num_output` tokens (a stop string was found)."""

    def abort(self, request_id: str) -> None:
        """Ends a request; idempotent."""

    def poll(self) -> list[Event]:
        """Waits for the next events of any request; empty once nothing is left to wait for."""

    def health(self) -> str | None:
        """None, or why the engine can serve no more."""

    def stats(self) -> SchedulerStats:
        """Totals since the start."""

    def close(self) -> None:
        """Ends the engine and gives its memory back; idempotent."""


class InProcessClient:
    """The engine in this process and thread: polling is what makes it step."""

    def __init__(self, core: EngineCore) -> None:
        self._core = core

    def submit(self, request: Request) -> None:
        self._core.submit(request)

    def finish(self, request_id: str, num_output: int) -> None:
        self._core.finish(request_id, num_output)

    def abort(self, request_id: str) -> None:
        self._core.abort(request_id)

    def poll(self) -> list[Event]:
        while self._core.has_work:
            if events := self._core.step():
                return events
            if delay_s := self._core.sleep_s():
                time.sleep(delay_s)
        return []

    def health(self) -> str | None:
        return None if self._core.error is None else str(self._core.error)

    def stats(self) -> SchedulerStats:
        return self._core.stats

    def close(self) -> None:
        self._core.close()
