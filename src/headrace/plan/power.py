"""More servers than a row's power is provisioned for: the two-threshold controller that makes it safe, and its model.

POLCA (Patel et al., POLCA: Power Oversubscription in LLM Cloud Providers, 2023): servers seldom peak together, so a row
can hold more of them than the sum of their peaks allows, if clocks are lowered in time when they do: low priority
first, high priority only if that does not suffice, and above the limit everything at once (the brake). Nothing here
touches a device: `commands` are printed for an operator.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Literal

from headrace.core.errors import InvalidParameter
from headrace.plan.cost import check_number

Priority = Literal["low", "high"]
PRIORITIES: Sequence[Priority] = ("low", "high")
Phase = Literal["idle", "prefill", "decode"]


class Level(IntEnum):
    """How far clocks are lowered; each takes in those before it."""

    FREE = 0
    LOW_T1 = 1
    """Low priority, a little."""
    LOW_T2 = 2
    """Low priority, further."""
    HIGH_T2 = 3
    """High priority too."""
    BRAKE = 4
    """Everything, at once, as far as it goes."""


@dataclass(frozen=True, slots=True)
class Policy:
    """Thresholds as shares of the row's provisioned power, clocks in MHz. Raises InvalidParameter."""

    t1: float = 0.80
    t2: float = 0.89
    limit: float = 1.0
    hysteresis: float = 0.05
    """A threshold's clocks are given back so far below it."""
    low_t1_mhz: int = 1275
    low_t2_mhz: int = 1110
    high_t2_mhz: int = 1305
    brake_mhz: int = 288
    settle_s: float = 40.0
    """A command shows in the telemetry only after so long: until then it is not known whether it sufficed."""

    def __post_init__(self) -> None:
        for name in ("t1", "t2", "limit"):
            check_number(name, getattr(self, name), 0, 2, above=True)
        if not self.t1 < self.t2 < self.limit:
            raise InvalidParameter("t2", self.t2, f"more than t1 ({self.t1:g}) and less than {self.limit:g}")
        check_number("hysteresis", self.hysteresis, 0, self.t1)
        check_number("settle_s", self.settle_s)
        for name in ("low_t1_mhz", "low_t2_mhz", "high_t2_mhz", "brake_mhz"):
            check_number(name, getattr(self, name), above=True)

    def clocks(self, level: Level) -> Mapping[Priority, int | None]:
        """MHz that each priority's SM clock is locked to; None: it is free."""
        if level == Level.BRAKE:
            return {"low": self.brake_mhz, "high": self.brake_mhz}
        low = {Level.FREE: None, Level.LOW_T1: self.low_t1_mhz}.get(level, self.low_t2_mhz)
        return {"low": low, "high": self.high_t2_mhz if level == Level.HIGH_T2 else None}


@dataclass(frozen=True, slots=True)
class State:
    """Of the controller: what it has commanded last."""

    level: Level = Level.FREE
    since: float = -math.inf
    """Seconds on the telemetry's clock at which it did."""


def advance(policy: Policy, state: State, share: float, now: float) -> State:
    """The controller's answer to one reading of the telemetry: `share` of the provisioned power at `now` seconds.

    Above the limit: brake, whatever was before. Above T2: low priority's second clock; if that has settled and power is
    still above, high priority's too. Above T1: low priority's first clock. Back one level at a time, high priority
    first, once a level has settled and power is `hysteresis` below the threshold that it came from. The brake gives
    way to the level before it, so that what comes back stays below the limit.
    """
    settled = now - state.since >= policy.settle_s
    level = state.level
    if share > policy.limit:
        level = Level.BRAKE
    elif level == Level.BRAKE:
        if share < policy.t2 - policy.hysteresis:
            level = Level.HIGH_T2
    elif share > policy.t2:
        if level < Level.LOW_T2:
            level = Level.LOW_T2
        elif settled:
            level = Level.HIGH_T2
    elif share > policy.t1:
        level = max(level, Level.LOW_T1)
    if level == state.level and settled and Level.FREE < level < Level.BRAKE:
        came_from = policy.t1 if level == Level.LOW_T1 else policy.t2
        if share < came_from - policy.hysteresis:
            level = Level(level - 1)
    return state if level == state.level else State(level, now)


def brake_alone(policy: Policy, state: State, share: float, now: float) -> State:
    """Without the controller: only the brake, which power distribution has by itself."""
    if share > policy.limit:
        level = Level.BRAKE
    elif share < policy.t2 - policy.hysteresis:
        level = Level.FREE
    else:
        level = state.level
    return state if level == state.level else State(level, now)


# ---------------------------------------------------------------- what a clock does to power and time


@dataclass(frozen=True, slots=True)
class ServerModel:
    """One server with all of its GPUs. Powers are shares of what is provisioned for it. Raises InvalidParameter.

    P(f) = idle + (P - idle) (f / f_max)^exponent; a prefill is bound by arithmetic and takes f_max / f times as long, a
    decode by memory and takes 1 + sensitivity (f_max / f - 1).

    The defaults are fitted to POLCA's figures: a row without extra servers peaks at 79 % and rises by up to 11.8 points
    in 40 s (idle, decode); the lowest clock takes 20 % off a peak (exponent) and makes no work take more than 7 %
    longer (sensitivity). 1410 MHz is the A100's highest clock.
    """

    idle: float = 0.44
    prefill: float = 1.0
    decode: float = 0.78
    clock_mhz: float = 1410.0
    exponent: float = 1.85
    sensitivity: float = 0.18

    def __post_init__(self) -> None:
        for name in ("idle", "prefill", "decode"):
            check_number(name, getattr(self, name), 0, 1)
        if not self.idle <= self.decode <= self.prefill:
            raise InvalidParameter("decode", self.decode, f"from idle ({self.idle:g}) to prefill ({self.prefill:g})")
        check_number("clock_mhz", self.clock_mhz, above=True)
        check_number("exponent", self.exponent)
        check_number("sensitivity", self.sensitivity)

    def power(self, phase: Phase, mhz: float | None) -> float:
        """Share of the provisioned power at a clock; None: a free one."""
        full = {"idle": self.idle, "prefill": self.prefill, "decode": self.decode}[phase]
        return self.idle + (full - self.idle) * math.pow(self._ratio(mhz), self.exponent)

    def slowdown(self, phase: Phase, mhz: float | None) -> float:
        """Time of a phase at a clock / at the free one."""
        longer = 1 / self._ratio(mhz)
        return longer if phase == "prefill" else 1 + self.sensitivity * (longer - 1)

    def _ratio(self, mhz: float | None) -> float:
        return 1.0 if mhz is None else min(1.0, mhz / self.clock_mhz)


# ---------------------------------------------------------------- for the operator


LOWEST_MHZ = 210
"""Of an A100's SM clock (nvidia-smi -q -d SUPPORTED_CLOCKS): an idle GPU may go down to it."""


def commands(policy: Policy) -> Sequence[tuple[str, str]]:
    """(when, what an operator runs on the servers concerned), in the controller's order. Needs root."""
    t1, t2, back = policy.t1, policy.t2, policy.hysteresis
    settle = f"{policy.settle_s:g} s after that"
    return (
        (f"power > {t1:.0%}: low-priority servers", _lock(policy.low_t1_mhz)),
        (f"power > {t2:.0%}: low-priority servers", _lock(policy.low_t2_mhz)),
        (f"power > {t2:.0%} still, {settle}: high-priority servers", _lock(policy.high_t2_mhz)),
        (f"power < {t2 - back:.0%}: high-priority servers", _RESET),
        (f"power < {t2 - back:.0%} still, {settle}: low-priority servers", _lock(policy.low_t1_mhz)),
        (f"power < {t1 - back:.0%}: low-priority servers", _RESET),
    )


_RESET = "sudo nvidia-smi --reset-gpu-clocks"


def _lock(mhz: int) -> str:
    return f"sudo nvidia-smi --lock-gpu-clocks={LOWEST_MHZ},{mhz}"
