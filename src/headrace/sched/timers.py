"""Timers: which requests have run out of time."""

from __future__ import annotations

import heapq
import math

from headrace.core.types import Request


class Timers:
    """Deadlines and queue deadlines of requests. One that has ended is forgotten when its time comes."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, str]] = []

    def add(self, request: Request, number: int) -> None:
        for time_s in (request.deadline_s, request.join_by_s):
            if time_s is not None:
                heapq.heappush(self._heap, (time_s, number, request.id))

    def next_s(self) -> float:
        """When the next one runs out; infinity: never."""
        return self._heap[0][0] if self._heap else math.inf

    def due(self, now_s: float) -> list[tuple[int, str]]:
        """Arrival number and id of those whose time has come since the last call."""
        found = []
        while self._heap and self._heap[0][0] <= now_s:
            _, number, request_id = heapq.heappop(self._heap)
            found.append((number, request_id))
        return found


def overdue(request: Request, was_admitted: bool, num_output: int, now_s: float) -> tuple[str, str] | None:
    """Code and message of the error that ends a request at this time, or None."""
    if request.deadline_s is not None and request.deadline_s <= now_s:
        return "deadline_exceeded", f"not finished by its deadline, {num_output} tokens generated"
    if request.join_by_s is not None and request.join_by_s <= now_s and not was_admitted:
        return "queue_timeout", "waited too long for a place in the running batch"
    return None
