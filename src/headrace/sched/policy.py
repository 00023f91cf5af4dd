"""Admission policies: which waiting requests may join the running batch now.

`fused` is the product; the others are the batching styles it is compared with (reference: the Flover and NVLM
studies): one request at a time, a static batch that runs to its longest member, and dynamic batching behind a
time window. A policy changes who runs when, never which tokens come out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from headrace.core.errors import InvalidParameter

ALLOWED = "fused, serial, static:B (B ≥ 1) or window:MS (0 ≤ MS ≤ 3600000)"


class Policy(Protocol):
    name: str

    def quota(self, waiting: int, active: int, oldest_arrival_s: float, now_s: float) -> int:
        """How many of the `waiting` new requests may join now; `active` have joined and are unfinished."""

    def joined(self) -> None:
        """One of them has joined."""

    def wake_s(self, active: int, oldest_arrival_s: float) -> float | None:
        """When `quota` may grow with nothing but time passing; None: never."""


@dataclass(slots=True)
class Fused:
    """Everyone joins at the next iteration."""

    name: str = "fused"

    def quota(self, waiting: int, active: int, oldest_arrival_s: float, now_s: float) -> int:
        return waiting

    def joined(self) -> None:
        pass

    def wake_s(self, active: int, oldest_arrival_s: float) -> float | None:
        return None


@dataclass(slots=True)
class StaticBatch:
    """Up to `size` requests start together; nobody joins until the last of them has ended."""

    name: str
    size: int
    _left: int = 0

    def quota(self, waiting: int, active: int, oldest_arrival_s: float, now_s: float) -> int:
        if active == 0:
            self._left = min(self.size, waiting)
        return self._left

    def joined(self) -> None:
        self._left -= 1

    def wake_s(self, active: int, oldest_arrival_s: float) -> float | None:
        return None


@dataclass(slots=True)
class TimeWindow:
    """A window opens with the first request that waits; when it closes, all that came start together."""

    name: str
    window_s: float
    _left: int = 0

    def quota(self, waiting: int, active: int, oldest_arrival_s: float, now_s: float) -> int:
        if active == 0:
            self._left = waiting if now_s >= oldest_arrival_s + self.window_s else 0
        return self._left

    def joined(self) -> None:
        self._left -= 1

    def wake_s(self, active: int, oldest_arrival_s: float) -> float | None:
        return oldest_arrival_s + self.window_s if active == 0 else None


def parse_policy(text: str) -> Policy:
    """`fused`, `serial`, `static:B` or `window:MS` -> a fresh policy. Raises InvalidParameter."""
    kind, colon, number = text.partition(":")
    if not colon and kind == "fused":
        return Fused()
    if not colon and kind == "serial":
        return StaticBatch("serial", 1)
    if kind == "static" and number.isdecimal() and 1 <= int(number[:10]) <= 1_000_000:
        return StaticBatch(text, int(number))
    if kind == "window" and number.replace(".", "", 1).isdecimal() and float(number) <= 3_600_000:
        return TimeWindow(text, float(number) / 1000)
    raise InvalidParameter("policy", text, ALLOWED)
