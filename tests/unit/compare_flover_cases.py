"""Methods on a virtual clock where an iteration grows with its rows, for tests of Flover's experiments."""

from __future__ import annotations

from dataclasses import replace

from headrace.compare.flover.clock import CountingBackend, IterationClock, count_instances, engine
from headrace.compare.methods import Outcome
from headrace.compare.methods.admission import play
from headrace.compare.workloads import Workload
from headrace.core.errors import EngineError
from headrace.core.types import StepPlan
from headrace.sched.policy import parse_policy

STEP_S, ROW_S = 0.08, 0.004
"""An iteration of b rows takes STEP_S + b · ROW_S."""


class CostedClock(IterationClock):
    rows = 0

    def tick(self) -> None:
        self.now += STEP_S + ROW_S * self.rows


class CostedBackend(CountingBackend):
    def __init__(self, clock: CostedClock) -> None:
        super().__init__(clock.tick)
        self._clock = clock

    def submit(self, plan: StepPlan) -> None:
        self._clock.rows = len(plan.rows)
        super().submit(plan)


class ClockMethod:
    """A policy; `slow`: takes that many times as long."""

    config = None
    exact = True

    def __init__(self, name: str, policy: str, slow: float = 1.0) -> None:
        self.name = name
        self.description = f"what {name} does"
        self.closed = False
        self._policy = policy
        self._slow = slow

    def start(self, workload: Workload) -> float:
        self.closed = False
        return 0.0

    def run(self, workload: Workload) -> Outcome:
        clock = CostedClock()
        core = engine(workload, len(workload.requests), parse_policy(self._policy), CostedBackend(clock), clock)
        return stretched(play(core, workload, self.name, clock, clock.sleep), self._slow)

    def close(self) -> None:
        self.closed = True


class ClockInstances(ClockMethod):
    """Instances that take turns; they do not tell their iterations, as real ones do not."""

    def __init__(self) -> None:
        super().__init__("instances", "fused")

    def run(self, workload: Workload) -> Outcome:
        step_s = STEP_S + ROW_S
        requests = tuple(replace(one, arrival_s=one.arrival_s / step_s) for one in workload.requests)
        found = count_instances(replace(workload, requests=requests), len(requests))
        return replace(stretched(found, step_s), iterations=())


class AbsentMethod(ClockMethod):
    def start(self, workload: Workload) -> float:
        raise EngineError(f"{self.name} is not set up: run the command that does it")


class DyingMethod(ClockMethod):
    def run(self, workload: Workload) -> Outcome:
        raise EngineError(f"{self.name}: its process <has> ended")


def stretched(outcome: Outcome, factor: float) -> Outcome:
    """All times times `factor`."""
    requests = tuple(
        replace(
            one,
            arrival_s=one.arrival_s * factor,
            token_s=tuple(at * factor for at in one.token_s),
            end_s=one.end_s * factor,
        )
        for one in outcome.requests
    )
    iterations = tuple(replace(one, end_s=one.end_s * factor) for one in outcome.iterations)
    return replace(outcome, requests=requests, iterations=iterations, seconds=outcome.seconds * factor)
