"""A row of servers under requests that come as they do in a day, with or without the power controller.

A server has a few slots, each of which answers one request at a time: a prefill, a spike of power that is as long as
the prompt, then a decode, a lower plateau. The slots of a workload's servers share one queue, first come first served.
Telemetry is read every 2 s; a lock of clocks acts 40 s after its command, the brake after 5 s (out of band, as cloud
providers have it).
"""

from __future__ import annotations

import heapq
import math
import random
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from headrace.core.errors import InvalidParameter
from headrace.plan.cost import check_number
from headrace.plan.power import PRIORITIES, Level, Phase, Policy, Priority, ServerModel, State, advance, brake_alone

DAY_S = 86_400.0
BLOOM = 176e9
"""Parameters."""
QUANTILES = (0.50, 0.99)
MOST_REQUESTS = 4_000_000
WARM_UP_S = 600.0
"""The row starts empty: its first minutes say nothing of how power rises."""


@dataclass(frozen=True, slots=True)
class Work:
    """A kind of requests. Lengths in tokens are drawn evenly between both ends."""

    name: str
    priority: Priority
    share: float
    """Of the servers."""
    prompt: tuple[int, int]
    answer: tuple[int, int]


WORKS: Sequence[Work] = (
    Work("summarise", "low", 0.25, (2048, 8192), (256, 512)),
    Work("search", "high", 0.25, (512, 2048), (1024, 2048)),
    Work("chat, low priority", "low", 0.25, (2048, 4096), (128, 2048)),
    Work("chat, high priority", "high", 0.25, (2048, 4096), (128, 2048)),
)


@dataclass(frozen=True, slots=True)
class Row:
    """What is simulated. Raises InvalidParameter."""

    servers: int = 40
    """That the power is provisioned for."""
    server_kw: float = 6.5
    slots: int = 4
    """Requests that a server answers at once; each takes an even part of the power between idle and busy."""
    utilisation: float = 0.55
    """Mean share of time that a slot is busy, at free clocks."""
    wave: float = 0.5
    """Rate of arrivals: mean x (1 - wave cos(2 pi t / day)): lowest at the start of a day, highest at its middle."""
    hours: float = 24.0
    day_s: float = DAY_S
    seed: int = 0
    prefill_token_s: float = 2 * BLOOM / (8 * 312e12 * 0.5)
    """BLOOM-176B on 8 A100: 2 FLOP a parameter at half of the peak."""
    decode_token_s: float = 2 * BLOOM / (8 * 2.039e12 * 0.6)
    """2 bytes a parameter at 60 % of the bandwidth."""
    telemetry_s: float = 2.0
    capping_s: float = 40.0
    braking_s: float = 5.0
    ups_s: float = 10.0
    """So long the UPS carries power above the limit; then the breaker opens."""
    model: ServerModel = field(default_factory=ServerModel)

    def __post_init__(self) -> None:
        if isinstance(self.servers, bool) or not isinstance(self.servers, int) or not 4 <= self.servers <= 10_000:
            raise InvalidParameter("servers", self.servers, "an integer from 4 to 10000, some for each kind of work")
        check_number("server_kw", self.server_kw, above=True)
        if isinstance(self.slots, bool) or not isinstance(self.slots, int) or not 1 <= self.slots <= 1024:
            raise InvalidParameter("slots", self.slots, "an integer from 1 to 1024")
        check_number("utilisation", self.utilisation, 0, 1, above=True)
        check_number("wave", self.wave, 0, 1)
        if self.utilisation * (1 + self.wave) >= 1:
            allowed = f"less than {1 / (1 + self.wave):.3g}: at the wave's crest servers would be asked for more"
            raise InvalidParameter("utilisation", self.utilisation, allowed)
        check_number("hours", self.hours, 0, 24 * 366, above=True)
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            raise InvalidParameter("seed", self.seed, "an integer ≥ 0")
        for name in ("day_s", "prefill_token_s", "decode_token_s", "telemetry_s"):
            check_number(name, getattr(self, name), above=True)
        check_number("ups_s", self.ups_s)
        check_number("capping_s", self.capping_s)
        check_number("braking_s", self.braking_s, 0, self.capping_s)

    def with_extra(self, extra: float) -> int:
        """Servers with a share `extra` more, rounded."""
        check_number("extra", extra, 0, 10)
        return round(self.servers * (1 + extra))

    def seconds(self, prompt: float, answer: float) -> tuple[float, float]:
        """Of prefill and decode at free clocks, from lengths in tokens."""
        return prompt * self.prefill_token_s, answer * self.decode_token_s

    def rate(self, work: Work, servers: int) -> float:
        """Mean arrivals a second at so many servers of one kind of work."""
        busy = sum(self.seconds(sum(work.prompt) / 2, sum(work.answer) / 2))
        return self.utilisation * servers * self.slots / busy


@dataclass(frozen=True, slots=True)
class Arrival:
    at: float
    work: int
    """Index in WORKS."""
    prefill_s: float
    decode_s: float


def arrivals(row: Row, servers: int) -> list[Arrival]:
    """Poisson arrivals of each kind of work, by thinning, in order of time; the same for the same arguments. Every
    server has the same mean load, however many there are. Raises InvalidParameter."""
    kinds = list(zip(WORKS, pools(servers), strict=True))
    expected = row.hours * 3600 * sum(row.rate(work, count) for work, count in kinds)
    if expected > MOST_REQUESTS:
        allowed = f"{row.hours * MOST_REQUESTS / expected:.3g} with {servers} servers, or fewer of both"
        raise InvalidParameter("hours", row.hours, f"up to {allowed}: {MOST_REQUESTS:,} requests are simulated")
    made = []
    for index, (work, count) in enumerate(kinds):
        rng = random.Random(f"{row.seed} {index}")
        crest, now, end = row.rate(work, count) * (1 + row.wave), 0.0, row.hours * 3600
        while True:
            now += rng.expovariate(crest)
            if now >= end:
                break
            if rng.random() * (1 + row.wave) > 1 - row.wave * math.cos(2 * math.pi * now / row.day_s):
                continue
            prefill_s, decode_s = row.seconds(rng.uniform(*work.prompt), rng.uniform(*work.answer))
            made.append(Arrival(now, index, prefill_s, decode_s))
    made.sort(key=lambda one: one.at)
    return made


def pools(servers: int) -> tuple[int, ...]:
    """Servers of each kind of work: by its share, the rest one by one in order."""
    counts = [math.floor(work.share * servers) for work in WORKS]
    for index in range(servers - sum(counts)):
        counts[index % len(counts)] += 1
    return tuple(counts)


@dataclass(frozen=True, slots=True)
class Run:
    """What happened."""

    servers: int
    shares: Sequence[float]
    """Of the provisioned power, at each reading of the telemetry."""
    brakes: int
    tripped: bool
    """Whether power was above the limit for longer than the UPS carries it."""
    latencies: Mapping[Priority, Sequence[float]]
    """Seconds from arrival to the last token, sorted."""
    level_s: Mapping[Level, float]
    """How long each level was in force."""
    telemetry_s: float

    @property
    def peak(self) -> float:
        return max(self.shares)

    def latency(self, priority: Priority, quantile: float) -> float:
        """Seconds; the value below which that share of the requests lies. There is at least one."""
        values = self.latencies[priority]
        return values[min(len(values) - 1, int(quantile * len(values)))]

    def largest_rise(self, seconds: float) -> float | None:
        """Largest rise of power within so many seconds, as a share of what is provisioned; after `WARM_UP_S`. None: the
        run ended before."""
        span = max(1, round(seconds / self.telemetry_s))
        shares = self.shares[round(WARM_UP_S / self.telemetry_s) :]
        if not shares:
            return None
        lowest: deque[int] = deque()
        """Indices whose shares rise, the first the lowest of the last `span`."""
        most = 0.0
        for index, share in enumerate(shares):
            while lowest and lowest[0] < index - span:
                lowest.popleft()
            while lowest and shares[lowest[-1]] >= share:
                lowest.pop()
            lowest.append(index)
            most = max(most, share - shares[lowest[0]])
        return most


class _Slot:
    """`remaining_s`: of its phase, at free clocks, as it was at `since`."""

    __slots__ = ("arrived", "decode_s", "phase", "remaining_s", "since", "version")

    def __init__(self) -> None:
        self.phase: Phase = "idle"
        self.remaining_s = self.decode_s = self.arrived = self.since = 0.0
        self.version = 0
        """Counts the changes of its next event: events of an older one are void."""


class _Simulation:
    """One run, event by event between readings of the telemetry."""

    def __init__(self, row: Row, servers: int, policy: Policy) -> None:
        self.row, self.policy = row, policy
        self.pools = pools(servers)
        self.works = [index for index, count in enumerate(self.pools) for _ in range(count * row.slots)]
        """Of each slot."""
        self.slots = [_Slot() for _ in self.works]
        self.priorities = [WORKS[work].priority for work in self.works]
        self.idle: list[list[int]] = [[] for _ in WORKS]
        for number, work in enumerate(self.works):
            self.idle[work].append(number)
        self.queues: list[deque[Arrival]] = [deque() for _ in WORKS]
        self.events: list[tuple[float, int, int]] = []
        """(time, slot, version): the end of its phase."""
        self.counts: dict[tuple[Priority, Phase], int] = {
            (priority, phase): 0 for priority in PRIORITIES for phase in ("idle", "prefill", "decode")
        }
        for priority in self.priorities:
            self.counts[priority, "idle"] += 1
        self.latencies: dict[Priority, list[float]] = {priority: [] for priority in PRIORITIES}
        self.level = Level.FREE
        """In force."""
        self.watts: dict[tuple[Priority, Phase], float] = {}
        self.slow: dict[tuple[Priority, Phase], float] = {}
        self._set_clocks()

    def _set_clocks(self) -> None:
        mhz, model = self.policy.clocks(self.level), self.row.model
        for priority, phase in self.counts:
            self.watts[priority, phase] = model.power(phase, mhz[priority]) / (self.row.servers * self.row.slots)
            self.slow[priority, phase] = model.slowdown(phase, mhz[priority])

    def share(self) -> float:
        """Of the provisioned power, now."""
        return sum(count * self.watts[key] for key, count in self.counts.items())

    def change(self, level: Level, now: float) -> None:
        """Other clocks from now on: what is left of every phase takes longer, or less long."""
        before = dict(self.slow)
        self.level = level
        self._set_clocks()
        for number, slot in enumerate(self.slots):
            key = (self.priorities[number], slot.phase)
            if slot.phase != "idle" and self.slow[key] != before[key]:
                slot.remaining_s -= (now - slot.since) / before[key]
                self._schedule(number, slot, now)

    def _schedule(self, number: int, slot: _Slot, now: float) -> None:
        slot.since = now
        slot.version += 1
        end = now + slot.remaining_s * self.slow[self.priorities[number], slot.phase]
        heapq.heappush(self.events, (end, number, slot.version))

    def _enter(self, number: int, phase: Phase, seconds: float, now: float) -> None:
        slot, priority = self.slots[number], self.priorities[number]
        self.counts[priority, slot.phase] -= 1
        self.counts[priority, phase] += 1
        slot.phase, slot.remaining_s = phase, seconds
        if phase != "idle":
            self._schedule(number, slot, now)

    def arrive(self, request: Arrival) -> None:
        free = self.idle[request.work]
        if free:
            self._begin(free.pop(), request, request.at)
        else:
            self.queues[request.work].append(request)

    def _begin(self, number: int, request: Arrival, now: float) -> None:
        slot = self.slots[number]
        slot.arrived, slot.decode_s = request.at, request.decode_s
        self._enter(number, "prefill", request.prefill_s, now)

    def end_phase(self, number: int, now: float) -> None:
        slot = self.slots[number]
        if slot.phase == "prefill":
            self._enter(number, "decode", slot.decode_s, now)
            return
        self.latencies[self.priorities[number]].append(now - slot.arrived)
        queue = self.queues[self.works[number]]
        if queue:
            self._begin(number, queue.popleft(), now)
        else:
            self._enter(number, "idle", 0.0, now)
            self.idle[self.works[number]].append(number)

    def until(self, end: float, waiting: Iterator[Arrival], first: Arrival | None) -> Arrival | None:
        """Everything before `end`; `first`: the next arrival. Returns the next arrival then, None: there is none."""
        events = self.events
        while True:
            arrives = first.at if first is not None else math.inf
            if events and events[0][0] <= arrives:
                if events[0][0] > end:
                    return first
                now, number, version = heapq.heappop(events)
                if version == self.slots[number].version:
                    self.end_phase(number, now)
            elif first is not None and arrives <= end:
                self.arrive(first)
                first = next(waiting, None)
            else:
                return first


Control = Callable[[Policy, State, float, float], State]
"""(policy, state, share of the provisioned power, seconds) -> state, at each reading of the telemetry."""


def uncontrolled(policy: Policy, state: State, share: float, now: float) -> State:
    """Whatever power is: the run that others are held against."""
    return state


def simulate(
    row: Row, servers: int, policy: Policy, control: Control = advance, requests: Sequence[Arrival] | None = None
) -> Run:
    """One run of `servers` servers on the row's power, to the last answer. `requests`: None: `arrivals`'s."""
    simulation = _Simulation(row, servers, policy)
    waiting = iter(arrivals(row, servers) if requests is None else requests)
    following = next(waiting, None)
    state, pending = State(), deque[tuple[float, Level]]()
    shares: list[float] = []
    level_s = dict.fromkeys(Level, 0.0)
    brakes, above, tripped, now = 0, 0.0, False, 0.0
    end = row.hours * 3600
    while now < end or following is not None or simulation.events:
        tick = now + row.telemetry_s
        while pending and pending[0][0] <= tick:
            at, level = pending.popleft()
            following = simulation.until(at, waiting, following)
            level_s[simulation.level] += at - now
            now = at
            simulation.change(level, at)
        following = simulation.until(tick, waiting, following)
        level_s[simulation.level] += tick - now
        now = tick
        share = simulation.share()
        shares.append(share)
        above = above + row.telemetry_s if share > policy.limit else 0.0
        tripped = tripped or above > row.ups_s
        reacted = control(policy, state, share, now)
        if reacted.level != state.level:
            if reacted.level == Level.BRAKE:
                brakes += 1
                # What was on its way is overtaken.
                pending = deque([(now + row.braking_s, Level.BRAKE)])
            else:
                pending.append((now + row.capping_s, reacted.level))
        state = reacted
    latencies = {priority: sorted(values) for priority, values in simulation.latencies.items()}
    return Run(servers, shares, brakes, tripped, latencies, level_s, row.telemetry_s)


# ---------------------------------------------------------------- SLOs, and the sweep


@dataclass(frozen=True, slots=True)
class Slo:
    """How much longer requests of one priority may take than without any control, as shares."""

    p50: float
    p99: float


SLOS: Mapping[Priority, Slo] = {"high": Slo(0.01, 0.05), "low": Slo(0.05, 0.50)}


@dataclass(frozen=True, slots=True)
class Outcome:
    """A run held against the same requests at free clocks."""

    run: Run
    impact: Mapping[Priority, tuple[float, float]]
    """p50 and p99 of the latency, as shares longer."""

    def broken(self) -> list[str]:
        """What it breaks, in words; empty: it keeps everything."""
        words = []
        if self.run.brakes:
            words.append(f"{self.run.brakes} brakes" if self.run.brakes > 1 else "1 brake")
        if self.run.tripped:
            words.append("power above the limit for longer than the UPS carries it")
        for priority, slo in SLOS.items():
            for name, found, most in zip(("p50", "p99"), self.impact[priority], (slo.p50, slo.p99), strict=True):
                if not found < most:
                    words.append(f"{priority}-priority {name} +{found:.1%}")
        return words


@dataclass(frozen=True, slots=True)
class Point:
    """One number of extra servers."""

    extra: float
    free: Run
    """Nothing is done: what power the servers would take."""
    naive: Outcome
    """No controller, only the brake."""
    controlled: Outcome


def outcome(run: Run, free: Run) -> Outcome:
    impact: dict[Priority, tuple[float, float]] = {}
    for priority in PRIORITIES:
        p50, p99 = (run.latency(priority, q) / free.latency(priority, q) - 1 for q in QUANTILES)
        impact[priority] = (p50, p99)
    return Outcome(run, impact)


def point(row: Row, policy: Policy, extra: float) -> Point:
    """The same requests on `extra` more servers: at free clocks, with the brake alone, with the controller.

    Raises InvalidParameter.
    """
    servers = row.with_extra(extra)
    requests = arrivals(row, servers)
    free = simulate(row, servers, policy, uncontrolled, requests)
    for priority in PRIORITIES:
        if not free.latencies[priority]:
            raise InvalidParameter("hours", row.hours, f"more: no request of {priority} priority came")
    naive = controlled = free
    # Where power never comes to where something would be done, nothing is different.
    if free.peak > policy.limit:
        naive = simulate(row, servers, policy, brake_alone, requests)
    if free.peak > policy.t1:
        controlled = simulate(row, servers, policy, advance, requests)
    return Point(extra, free, outcome(naive, free), outcome(controlled, free))


def most_extra(points: Sequence[Point]) -> float | None:
    """Largest share of extra servers up to which every point keeps all; None: not even the first does."""
    broken = [bool(one.controlled.broken()) for one in points]
    good = broken.index(True) if True in broken else len(points)
    return points[good - 1].extra if good else None


def thinned(values: Sequence[float], width: int) -> list[tuple[int, float]]:
    """(index, largest) of at most `width` equal spans: what a plot of a long trace shows without losing a peak."""
    step = max(1, math.ceil(len(values) / width))
    return [(start, max(values[start : start + step])) for start in range(0, len(values), step)]
