"""The iteration clock: the real scheduler and engine on a backend that counts, where a step takes one iteration.

Workloads for it have their arrivals in iterations. A request that arrives while a step runs joins the next one, and its
first token comes at the end of that step: so of a request alone, arrival + length is its end.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from headrace.backends.base import Backend, BackendOptions
from headrace.compare.methods import Iteration, Outcome, RequestRun
from headrace.compare.methods.admission import play
from headrace.compare.workloads import Workload, WorkloadRequest
from headrace.core.errors import EngineError
from headrace.core.spec import ModelSpec
from headrace.core.types import (
    Capacity,
    EngineLimits,
    ErrorEvent,
    Event,
    FinishEvent,
    Request,
    RowOut,
    StepPlan,
    StepResult,
    TokenEvent,
)
from headrace.engine.core import EngineCore
from headrace.parallel.mesh import Mesh
from headrace.sched.policy import Fused, Policy
from headrace.sched.prefix import PrefixCache
from headrace.sched.scheduler import Scheduler
from headrace.weights.lora import Adapter
from headrace.weights.qtensor import QTensor

BLOCK = 16
VOCAB = 8191


class IterationClock:
    """Virtual time. `on_tick` is called after each iteration."""

    def __init__(self, on_tick: Callable[[], None] = lambda: None) -> None:
        self.now = 0.0
        self._on_tick = on_tick

    def __call__(self) -> float:
        return self.now

    def sleep(self, iterations: float) -> None:
        self.now += iterations

    def tick(self) -> None:
        """A step was computed."""
        self.now += 1
        self._on_tick()


class CountingBackend:
    """Tokens are a running hash of their row: nothing but counting, so that thousands of iterations take a second."""

    name = "counting"
    depth = 1

    def __init__(self, tick: Callable[[], None]) -> None:
        """`tick`: a step was computed."""
        self._tick = tick
        self._states: dict[int, int] = {}
        self._answer: StepResult | None = None

    def load(
        self, spec: ModelSpec, tensors: Iterable[tuple[str, QTensor]], options: BackendOptions, mesh: Mesh
    ) -> Capacity:
        for _ in tensors:
            pass
        return Capacity(options.num_blocks, options.block_size, options.max_rows, options.max_tokens)

    def load_adapter(self, adapter: Adapter) -> None:
        raise EngineError(f"the {self.name} backend has no adapters")

    def submit(self, plan: StepPlan) -> None:
        for row in plan.release:
            del self._states[row]
        for admit in plan.admit:
            self._states[admit.row] = 0
            for token_id in admit.token_ids:
                self._take(admit.row, token_id)
        outs = [RowOut(step.row, (self._next(step.row),) if step.sample else ()) for step in plan.rows]
        self._answer = StepResult(plan.step, tuple(outs))

    def _next(self, row: int) -> int:
        token_id = self._states[row] % VOCAB
        self._take(row, token_id)
        return token_id

    def _take(self, row: int, token_id: int) -> None:
        self._states[row] = (self._states[row] * 31 + token_id * 7 + 1) % 1_000_003

    def result(self) -> StepResult:
        assert self._answer is not None
        answer, self._answer = self._answer, None
        self._tick()
        return answer

    def reset(self) -> None:
        self._states.clear()
        self._answer = None

    def probe(self) -> Mapping[str, object]:
        return {"device": "none"}

    def explain(self) -> str:
        return "counts"

    def memory(self) -> Mapping[str, int]:
        return {"weights": 0, "adapters": 0, "kv_cache": 0, "workspace": 0}

    def close(self) -> None:
        self._states.clear()


def capacity_for(workload: Workload, rows: int) -> Capacity:
    """Room for any `rows` of its requests at once, and a step for all their prompts together: nothing ever waits for
    memory or for the budget of a step."""
    longest_prompt = max(map(len, workload.prompts))
    return Capacity(
        # One more for each: who joins is to leave every running row a block.
        blocks=rows * (1 - -workload.longest // BLOCK),
        block_size=BLOCK,
        max_rows=rows,
        max_tokens=rows * longest_prompt,
    )


def engine(workload: Workload, rows: int, policy: Policy, backend: Backend, clock: Callable[[], float]) -> EngineCore:
    """The real one on that backend, whose capacity is `capacity_for(workload, rows)`."""
    capacity = capacity_for(workload, rows)
    cache = PrefixCache(capacity.blocks, capacity.block_size, "iteration clock", enabled=False)
    scheduler = Scheduler(capacity, workload.longest, frozenset(), policy, cache)
    return EngineCore(backend, scheduler, EngineLimits(VOCAB, workload.longest), clock)


def count(workload: Workload, policy: Policy) -> Outcome:
    """The workload under a policy, in iterations (a TimeWindow's too)."""
    clock = IterationClock()
    core = engine(workload, len(workload.requests), policy, CountingBackend(clock.tick), clock)
    return play(core, workload, policy.name, clock, clock.sleep)


def iteration_workload(
    arrivals: Sequence[float], lengths: Sequence[int], prompts: Sequence[tuple[int, ...]] = ()
) -> Workload:
    """Arrivals in iterations, in order. `prompts`: of each request; none: eight token ids of its own for each."""
    chosen = prompts or [tuple(range(8 * index, 8 * index + 8)) for index in range(len(arrivals))]
    requests = [
        WorkloadRequest(tuple(prompt), length, float(arrival))
        for prompt, length, arrival in zip(chosen, lengths, arrivals, strict=True)
    ]
    return Workload("iterations", tuple(requests), ignore_eos=True, notes=("Arrivals are in iterations.",))


@dataclass(slots=True)
class _Instance:
    """One model copy with its own cache, and what it is answering."""

    core: EngineCore
    index: int = -1
    token_ids: list[int] = field(default_factory=list)
    token_s: list[float] = field(default_factory=list)


def count_instances(workload: Workload, most: int) -> Outcome:
    """A model instance a request, at most `most` at once, in iterations.

    Each instance is a real engine of one row. A step of one of them reads all weights, as a step of a batch does, and
    a device that is bound by that does one at a time: so they take turns, and k instances get a token each in k
    iterations. (Flover's own baseline took between 0.75 and 1.3 times as long as this: derived from its tables.)
    """
    clock = IterationClock()
    idle = [
        _Instance(engine(workload, 1, Fused(), CountingBackend(clock.tick), clock))
        for _ in range(min(most, len(workload.requests)))
    ]
    waiting = deque(enumerate(workload.requests))
    turns: deque[_Instance] = deque()
    done: dict[int, RequestRun] = {}
    iterations: list[Iteration] = []
    while waiting or turns:
        while waiting and idle and waiting[0][1].arrival_s <= clock.now:
            index, asked = waiting.popleft()
            one = idle.pop()
            one.index, one.token_ids, one.token_s = index, [], []
            request = Request(f"instances request {index + 1}", asked.token_ids, workload.sampling(index))
            one.core.submit(request)
            turns.append(one)
        if not turns:
            clock.sleep(waiting[0][1].arrival_s - clock.now)
            continue
        one = turns.popleft()
        computed = one.core.stats.computed_tokens
        ended = [found for event in one.core.step() if (found := _hear(event, one, workload)) is not None]
        iterations.append(Iteration(clock.now, 1, one.core.stats.computed_tokens - computed))
        done.update((one.index, found) for found in ended)
        (idle if ended else turns).append(one)
    return Outcome(
        requests=tuple(done[index] for index in range(len(workload.requests))),
        seconds=max(one.end_s for one in done.values()),
        iterations=tuple(iterations),
        computed_tokens=sum(one.tokens for one in iterations),
    )


def _hear(event: Event, one: _Instance, workload: Workload) -> RequestRun | None:
    """Takes an event of an instance; its request's run, once that has ended."""
    if isinstance(event, ErrorEvent):
        raise EngineError(f"{event.request_id} failed ({event.code}): {event.message}")
    if isinstance(event, TokenEvent):
        one.token_ids += event.token_ids
        one.token_s += [event.time_s] * len(event.token_ids)
        return None
    assert isinstance(event, FinishEvent)
    asked = workload.requests[one.index]
    return RequestRun(tuple(one.token_ids), str(event.reason), asked.arrival_s, tuple(one.token_s), event.time_s)
