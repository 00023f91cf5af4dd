"""Methods that differ in who may join the running batch: every admission policy is one."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from headrace.compare.methods import Outcome, RequestRun
from headrace.compare.workloads import Workload
from headrace.core.errors import EngineError, InvalidParameter
from headrace.core.types import ErrorEvent, FinishEvent, Request, TokenEvent
from headrace.engine.client import InProcessClient
from headrace.engine.core import EngineCore
from headrace.sched.policy import ALLOWED, parse_policy


def check_names(names: Sequence[str]) -> None:
    """Raises InvalidParameter unless every name is a method."""
    for name in names:
        try:
            parse_policy(name)
        except InvalidParameter as error:
            raise InvalidParameter("methods", name, f"a comma-separated list of {ALLOWED}") from error


@dataclass(slots=True)
class _Progress:
    """What has come back of one request so far."""

    token_ids: list[int]
    first_token_s: float | None = None


class AdmissionMethod:
    """Runs workloads on `core` under one policy. `clock` must be the engine's."""

    def __init__(self, name: str, core: EngineCore, clock: Callable[[], float] = time.monotonic) -> None:
        self._core = core
        self._clock = clock
        self.name = name
        self.description = describe(name)

    def run(self, workload: Workload) -> Outcome:
        core = self._core
        core.use_policy(parse_policy(self.name))
        client = InProcessClient(core)
        stats = core.stats
        before = (stats.iterations, stats.computed_tokens, stats.preemptions)
        ids = [f"{self.name} question {number}" for number in range(1, len(workload.prompts) + 1)]
        live = {request_id: _Progress([]) for request_id in ids}
        done: dict[str, RequestRun] = {}
        began_s = self._clock()
        try:
            for request_id, prompt in zip(ids, workload.prompts, strict=True):
                client.submit(Request(request_id, prompt, workload.sampling, arrival_s=began_s))
            while live:
                events = client.poll()
                if not events:
                    raise EngineError(f"{self.name}: the engine stopped with {len(live)} questions unanswered")
                for event in events:
                    self._take(event, live, done, began_s)
        finally:
            for request_id in live:
                client.abort(request_id)
            while live and client.poll():
                pass
        return Outcome(
            requests=tuple(done[request_id] for request_id in ids),
            seconds=self._clock() - began_s,
            iterations=stats.iterations - before[0],
            computed_tokens=stats.computed_tokens - before[1],
            preemptions=stats.preemptions - before[2],
        )

    def _take(
        self,
        event: TokenEvent | FinishEvent | ErrorEvent,
        live: dict[str, _Progress],
        done: dict[str, RequestRun],
        began_s: float,
    ) -> None:
        progress = live[event.request_id]
        elapsed_s = event.time_s - began_s
        if isinstance(event, ErrorEvent):
            raise EngineError(f"{event.request_id} failed ({event.code}): {event.message}")
        if isinstance(event, TokenEvent):
            progress.token_ids += event.token_ids
            if progress.first_token_s is None:
                progress.first_token_s = elapsed_s
            return
        del live[event.request_id]
        first_s = elapsed_s if progress.first_token_s is None else progress.first_token_s
        done[event.request_id] = RequestRun(tuple(progress.token_ids), str(event.reason), first_s, elapsed_s)


def describe(name: str) -> str:
    kind, _, number = name.partition(":")
    if kind == "static":
        return f"up to {number} requests start together; none joins until the last of them has ended"
    if kind == "window":
        return f"requests that arrive within {number} ms start together; none joins until the last of them has ended"
    if kind == "serial":
        return "one request at a time"
    return "every request joins the running batch at the next iteration"
