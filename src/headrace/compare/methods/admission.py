"""Methods that differ in who may join the running batch: every admission policy is one."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from headrace.compare.methods import Iteration, Outcome, RequestRun
from headrace.compare.methods.bench import Bench
from headrace.compare.workloads import Workload
from headrace.core.config import ResolvedConfig
from headrace.core.errors import ConfigError, EngineError
from headrace.core.types import ErrorEvent, Event, FinishEvent, Request, TokenEvent
from headrace.engine.core import EngineCore
from headrace.sched.policy import StaticBatch, parse_policy

DESCRIPTIONS: Mapping[str, str] = {
    "serial": "one request at a time",
    "fused": "every request joins the running batch at the next iteration",
    "static": "up to {} requests start together; none joins until the last of them has ended",
    "window": "requests that arrive within {} ms start together; none joins until the last of them has ended",
}
"""Kind of a policy -> what it does; {}: its number."""


class AdmissionMethod:
    """Runs workloads on the bench's engine under one policy."""

    exact = True

    def __init__(self, name: str, policy: str, bench: Bench) -> None:
        """`name`: of the method; `policy`: as `sched.policy` has it. Raises InvalidParameter."""
        kind, _, number = policy.partition(":")
        self.name = name
        self.description = DESCRIPTIONS[kind].format(number)
        self.config: ResolvedConfig | None = bench.opened.config
        self._policy = parse_policy(policy)
        self._bench = bench

    def start(self, workload: Workload) -> float:
        """Raises ConfigError where the engine has not so many rows."""
        _, capacity = self._bench.backend
        if isinstance(self._policy, StaticBatch) and self._policy.size > capacity.max_rows:
            raise ConfigError(
                f"{self.name}: batches of {self._policy.size}, allowed: up to max_num_seqs, {capacity.max_rows}"
            )
        return self._bench.load_s

    def run(self, workload: Workload) -> Outcome:
        core = self._bench.core
        core.use_policy(self._policy)
        return play(core, workload, self.name, self._bench.clock, self._bench.sleep)

    def close(self) -> None:
        """Nothing is the method's own."""


@dataclass(slots=True)
class _Live:
    """What has come back of one request so far."""

    index: int
    token_ids: list[int] = field(default_factory=list)
    token_s: list[float] = field(default_factory=list)


def play(
    core: EngineCore,
    workload: Workload,
    name: str,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
    watch: Callable[[Event], None] = lambda event: None,
) -> Outcome:
    """One run on an engine without work: each request is submitted once it arrives. `name` begins the requests' ids;
    `clock`: the engine's; `watch` sees each event. Raises EngineError if a request fails."""
    stats = core.stats
    computed, preemptions = stats.computed_tokens, stats.preemptions
    waiting = list(enumerate(workload.requests))[::-1]
    live: dict[str, _Live] = {}
    done: dict[int, RequestRun] = {}
    iterations: list[Iteration] = []
    began_s = clock()
    try:
        while waiting or live:
            now_s = clock() - began_s
            while waiting and waiting[-1][1].arrival_s <= now_s:
                index, asked = waiting.pop()
                request_id = f"{name} request {index + 1}"
                arrival_s = began_s + asked.arrival_s
                live[request_id] = _Live(index)
                sampling = workload.sampling(index)
                core.submit(Request(request_id, asked.token_ids, sampling, asked.images, arrival_s=arrival_s))
            until_s = None if not waiting else waiting[-1][1].arrival_s
            if not core.has_work:
                if live:
                    raise EngineError(f"{name}: the engine stopped with {len(live)} requests unanswered")
                assert until_s is not None
                sleep(max(0.0, until_s - now_s))
                continue
            before = (stats.iterations, stats.computed_tokens)
            events = core.step()
            if stats.iterations > before[0]:
                in_flight = core.num_running + sum(isinstance(one, FinishEvent) for one in events)
                iterations.append(Iteration(clock() - began_s, in_flight, stats.computed_tokens - before[1]))
            elif not events and (delay_s := core.sleep_s()):
                sleep(delay_s if until_s is None else min(delay_s, max(0.0, until_s - now_s)))
            for event in events:
                watch(event)
                _take(event, live, done, workload, began_s)
    finally:
        for request_id in live:
            core.abort(request_id)
        while live and core.has_work:
            core.step()
    return Outcome(
        requests=tuple(done[index] for index in range(len(workload.requests))),
        seconds=max(one.end_s for one in done.values()),
        iterations=tuple(iterations),
        computed_tokens=stats.computed_tokens - computed,
        preemptions=stats.preemptions - preemptions,
    )


def _take(
    event: Event, live: dict[str, _Live], done: dict[int, RequestRun], workload: Workload, began_s: float
) -> None:
    found = live[event.request_id]
    elapsed_s = event.time_s - began_s
    if isinstance(event, ErrorEvent):
        raise EngineError(f"{event.request_id} failed ({event.code}): {event.message}")
    if isinstance(event, TokenEvent):
        found.token_ids += event.token_ids
        found.token_s += [elapsed_s] * len(event.token_ids)
        return
    del live[event.request_id]
    done[found.index] = RequestRun(
        token_ids=tuple(found.token_ids),
        finish_reason=str(event.reason),
        arrival_s=workload.requests[found.index].arrival_s,
        token_s=tuple(found.token_s),
        end_s=elapsed_s,
    )
