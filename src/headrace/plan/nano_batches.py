"""A discrete simulator of nano-batches: operations that wait for different resources of a device run at one time.

NanoFlow (arXiv 2408.12757) cuts the batch of an iteration into nano-batches. The operations of one follow each other,
those of two do not wait for each other: attention of one (memory) runs while another multiplies (compute) and a third
is reduced across GPUs (network).
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

from headrace.core.errors import InvalidParameter

Resource = Literal["compute", "memory", "network"]
RESOURCES: tuple[Resource, ...] = ("compute", "memory", "network")
ROUNDING = 1e-12
"""Of a share of a resource, and of an operation: less is nothing."""


@dataclass(frozen=True, slots=True)
class Op:
    """One operation, by the seconds for which it would keep each resource busy if it had all of it. Raises
    InvalidParameter unless they are finite and ≥ 0."""

    name: str
    compute: float = 0.0
    memory: float = 0.0
    network: float = 0.0
    fixed: float = 0.0
    """Part of `memory` that every nano-batch spends anew: the weights are read again."""

    def __post_init__(self) -> None:
        for field in (*RESOURCES, "fixed"):
            seconds = getattr(self, field)
            if not (math.isfinite(seconds) and seconds >= 0):
                raise InvalidParameter(f"{self.name}.{field}", seconds, "seconds ≥ 0")
        if self.fixed > self.memory:
            raise InvalidParameter(f"{self.name}.fixed", self.fixed, f"up to memory's {self.memory:g} s")

    @property
    def busy(self) -> tuple[float, float, float]:
        """Seconds by resource."""
        return self.compute, self.memory, self.network

    @property
    def seconds(self) -> float:
        """Alone on the device: as long as the resource that it needs most takes."""
        return max(self.busy)

    @property
    def bottleneck(self) -> int:
        """Index in RESOURCES."""
        return self.busy.index(self.seconds)

    def part(self, share: float) -> Op:
        """The same for a nano-batch of `share` of the rows."""
        memory = self.fixed + (self.memory - self.fixed) * share
        return replace(self, compute=self.compute * share, memory=memory, network=self.network * share)


@dataclass(frozen=True, slots=True)
class Span:
    """When one operation of one nano-batch ran. Seconds from the start of the iteration."""

    chain: int
    name: str
    start: float
    end: float


@dataclass(frozen=True, slots=True)
class Timeline:
    makespan: float
    """Seconds of the iteration."""
    serial: float
    """The same operations one after the other."""
    busy: Mapping[Resource, float]
    """Seconds of each resource that they need; the makespan is never less than the largest."""
    spans: Sequence[Span]
    use: Sequence[tuple[float, tuple[float, float, float]]]
    """From when on which share (0 to 1) of each resource is in use; the last entry, all 0, is the end."""

    @property
    def share(self) -> Mapping[Resource, float]:
        """Of the makespan, for which each resource is busy."""
        return {name: busy / self.makespan if self.makespan else 0.0 for name, busy in self.busy.items()}


@dataclass(slots=True)
class _Running:
    chain: int
    op: Op
    start: float
    left: float = 1.0
    """Share of the operation that is still to do."""

    @property
    def pull(self) -> tuple[float, ...]:
        """Share of each resource that it takes at full speed."""
        return tuple(busy / self.op.seconds for busy in self.op.busy)


def split(ops: Sequence[Op], nano: int) -> list[list[Op]]:
    """The operations of each of `nano` equal nano-batches."""
    if nano < 1:
        raise InvalidParameter("nano", nano, "an integer ≥ 1")
    return [[op.part(1 / nano) for op in ops] for _ in range(nano)]


def simulate(chains: Sequence[Sequence[Op]]) -> Timeline:
    """Runs the operations of each nano-batch in order, those of different ones at the same time where they can.

    Every resource has one queue, of the operations that need it most: the one that is least far in its nano-batch goes
    first (of equals the first nano-batch), and it runs to its end. So at most three run at a time. They share a
    resource evenly: all go at the same share of their own full speed until a resource is used up; what does not need
    that one goes on faster. Hence max over resources ≤ makespan ≤ serial sum. That kernels on the same device disturb
    each other in other ways (caches, clock) is not modelled: a real device is slower.
    """
    queues: list[list[tuple[int, int]]] = [[] for _ in RESOURCES]
    running: dict[int, _Running] = {}
    spans: list[Span] = []
    use: list[tuple[float, tuple[float, float, float]]] = []
    now = 0.0

    def join(chain: int, index: int) -> None:
        """The next operation of a nano-batch that takes any time."""
        ops = chains[chain]
        while index < len(ops) and ops[index].seconds == 0:
            spans.append(Span(chain, ops[index].name, now, now))
            index += 1
        if index < len(ops):
            heapq.heappush(queues[ops[index].bottleneck], (index, chain))

    place: dict[int, int] = {}
    for chain in range(len(chains)):
        join(chain, 0)
    while running or any(queues):
        for resource, queue in enumerate(queues):
            if queue and resource not in running:
                index, chain = heapq.heappop(queue)
                place[chain] = index
                running[resource] = _Running(chain, chains[chain][index], now)
        active = list(running.items())
        pulls = [one.pull for _, one in active]
        speeds = shares(pulls)
        use.append((now, _used(pulls, speeds)))
        step = min(one.left * one.op.seconds / speed for (_, one), speed in zip(active, speeds, strict=True))
        now += step
        for (resource, one), speed in zip(active, speeds, strict=True):
            one.left -= speed * step / one.op.seconds
            if one.left <= ROUNDING:
                del running[resource]
                spans.append(Span(one.chain, one.op.name, one.start, now))
                join(one.chain, place[one.chain] + 1)
    use.append((now, (0.0, 0.0, 0.0)))
    every = [op for ops in chains for op in ops]
    busy = {name: math.fsum(getattr(op, name) for op in every) for name in RESOURCES}
    return Timeline(now, math.fsum(op.seconds for op in every), busy, spans, use)


def shares(pulls: Sequence[Sequence[float]]) -> list[float]:
    """Speeds (0 to 1 of its own full speed) at which operations run together, where each takes `pulls` of the resources
    at full speed: all rise together; when a resource is used up, those that need it stay as they are."""
    speeds = [0.0] * len(pulls)
    rising = set(range(len(pulls)))
    while rising:
        step = min(1 - speeds[index] for index in rising)
        for resource in range(len(RESOURCES)):
            wanted = sum(pulls[index][resource] for index in rising if pulls[index][resource] > ROUNDING)
            if wanted:
                room = 1 - sum(pull[resource] * speed for pull, speed in zip(pulls, speeds, strict=True))
                step = min(step, max(room, 0.0) / wanted)
        for index in rising:
            speeds[index] += step
        room_left = [1 - used for used in _used(pulls, speeds)]
        full = {resource for resource, room in enumerate(room_left) if room <= ROUNDING}
        rising = {
            index
            for index in rising
            if speeds[index] < 1 - ROUNDING and not any(pulls[index][resource] > ROUNDING for resource in full)
        }
    return speeds


def _used(pulls: Sequence[Sequence[float]], speeds: Sequence[float]) -> tuple[float, float, float]:
    compute, memory, network = (
        min(sum(pull[resource] * speed for pull, speed in zip(pulls, speeds, strict=True)), 1.0)
        for resource in range(len(RESOURCES))
    )
    return compute, memory, network


# ---------------------------------------------------------------- the end of a row, known late


@dataclass(frozen=True, slots=True)
class Retired:
    """Rows decoded to their ends."""

    steps: int
    computed: int
    """Tokens, of all rows."""
    wasted: int
    """Of them behind a row's end."""


def retire(lengths: Sequence[int], slots: int, lag: int) -> Retired:
    """Decodes rows of `lengths` tokens (the last one is the end of sequence), `slots` at a time, first come first
    served, where step i + 1 + `lag` is the first that knows what step i sampled.

    0: the scheduler waits for the tokens of a step. 1, NanoFlow's: step i + 1 is launched before they are known, a row
    that ended in step i is in it once more and leaves with step i + 2. A row that ends because it has all the tokens
    that it may have is known before, and wastes nothing: here every row ends by itself.
    """
    for name, value, least in (("slots", slots, 1), ("lag", lag, 0), ("lengths", min(lengths, default=1), 1)):
        if value < least:
            raise InvalidParameter(name, value, f"integers ≥ {least}")
    waiting = list(reversed(lengths))
    rows: list[tuple[int, int]] = []
    steps = computed = wasted = 0
    while waiting or rows:
        while waiting and len(rows) < slots:
            rows.append((0, waiting.pop()))
        # Up to the step after which the next row leaves: until then each does the same again and again.
        ahead = min(length + lag - done for done, length in rows)
        steps += ahead
        computed += ahead * len(rows)
        wasted += sum(max(0, done + ahead - max(done, length)) for done, length in rows)
        rows = [(done + ahead, length) for done, length in rows if done + ahead < length + lag]
    return Retired(steps, computed, wasted)


def staircase(timeline: Timeline, resource: Resource, until: float) -> list[tuple[float, float]]:
    """(seconds, share in use) up to `until`, a point where it changes."""
    index = RESOURCES.index(resource)
    points = [(start, used[index]) for start, used in timeline.use if start < until]
    changes = [points[0], *(later for earlier, later in pairwise(points) if later[1] != earlier[1])]
    return [*changes, (min(until, timeline.makespan), changes[-1][1])]
