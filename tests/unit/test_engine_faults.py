"""Steps that raise: whose fault it was is found out, and nobody else notices. With the backend computed by hand."""

from __future__ import annotations

import random
from collections import Counter
from math import ceil, log2

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.core.errors import BackendUnavailable
from headrace.core.types import (
    Capacity,
    EngineLimits,
    ErrorEvent,
    Event,
    FinishEvent,
    FinishReason,
    Request,
    SamplingParams,
    StepPlan,
    StepResult,
    TokenEvent,
)
from headrace.engine.core import FAULT, LONE_FAULTS, EngineCore
from headrace.sched.policy import parse_policy
from headrace.sched.prefix import PrefixCache
from headrace.sched.scheduler import Scheduler
from headrace.testing.fake import FakeBackend, answer, prompt_score
from headrace.testing.faulty import PLACES, Fault, FaultyBackend, Injected

VOCAB = 61
ROOMY = Capacity(blocks=64, block_size=4, max_rows=16, max_tokens=64)
NO_STOP = SamplingParams(max_tokens=12, ignore_eos=True)


class Watch:
    """A clock that goes on by itself, so that steps take time."""

    def __init__(self, tick_s: float = 0.001) -> None:
        self.now_s = 0.0
        self.tick_s = tick_s

    def __call__(self) -> float:
        self.now_s += self.tick_s
        return self.now_s


class Engine:
    """A core over a backend with faults; every structure is checked after every step."""

    def __init__(
        self,
        *faults: Fault,
        depth: int = 1,
        capacity: Capacity = ROOMY,
        policy: str = "fused",
        prefix_cache: bool = True,
        step_seconds: float | None = None,
        fake: FakeBackend | None = None,
    ) -> None:
        fake = fake or FakeBackend(VOCAB, depth)
        fake.open(capacity)
        self.backend = FaultyBackend(fake, faults)
        self.cache = PrefixCache(capacity.blocks, capacity.block_size, "fake", prefix_cache)
        context = capacity.blocks * capacity.block_size
        self.scheduler = Scheduler(capacity, context, frozenset(), parse_policy(policy), self.cache, step_seconds)
        self.heard: list[Exception] = []
        self.watch = Watch()
        self.core = EngineCore(
            self.backend, self.scheduler, EngineLimits(VOCAB, context), self.watch, on_fault=self.heard.append
        )
        self.tokens: dict[str, list[int]] = {}
        self.ends: dict[str, FinishEvent | ErrorEvent] = {}
        self.steps = 0

    def ask(self, name: str, prompt: tuple[int, ...], sampling: SamplingParams = NO_STOP) -> None:
        self.tokens[name] = []
        self.core.submit(Request(name, prompt, sampling))

    def step(self) -> list[Event]:
        events = self.core.step()
        self.steps += 1
        self.scheduler.check_integrity()
        for event in events:
            if isinstance(event, TokenEvent):
                assert event.request_id not in self.ends
                self.tokens[event.request_id] += event.token_ids
            else:
                assert event.request_id not in self.ends, "one terminal event a request"
                self.ends[event.request_id] = event
        return events

    def drain(self, most: int = 2000) -> None:
        for _ in range(most):
            if not self.core.has_work:
                break
            self.step()
        assert not self.core.has_work, "it never ends"
        assert all(isinstance(error, Injected | MemoryError) for error in self.heard), self.heard
        if self.core.error is None:
            assert self.scheduler._pool.available == self.scheduler._pool.num_blocks
            assert self.core.stats.leaks == 0

    def right(self, name: str, prompt: tuple[int, ...], count: int = 12) -> bool:
        """Whether the request ended with exactly its answer."""
        return isinstance(self.ends[name], FinishEvent) and self.tokens[name] == answer(prompt, VOCAB, count)


def prompts(count: int) -> list[tuple[int, ...]]:
    """Some begin alike, some are longer than a step."""
    shared = (7, 8, 9, 10, 11, 12, 13, 14)
    return [(*(shared if i % 3 == 0 else ()), i, 2 * i, 5, *range(i % 5 * 4)) for i in range(count)]


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", ["exception", "memory"])
@pytest.mark.parametrize("prefix_cache", [True, False])
def test_only_the_request_at_fault_fails(depth: int, place: str, kind: str, prefix_cache: bool) -> None:
    """Whoever it is, and whether its prompt or a later token of it makes the step fail."""
    asked = prompts(8)
    for index, prompt in enumerate(asked):
        own = 8 if index % 3 == 0 else 0  # what it shares, another may have computed
        position = (own, len(prompt) - 1, len(prompt) + 5)[(index + PLACES.index(place)) % 3]
        engine = Engine(Fault(prompt, position, kind, place), depth=depth, prefix_cache=prefix_cache)
        for number, one in enumerate(asked):
            engine.ask(f"r{number}", one)
        engine.drain()
        bad = engine.ends.pop(f"r{index}")
        assert isinstance(bad, ErrorEvent) and (bad.code, bad.message) == ("engine_fault", FAULT)
        assert engine.tokens[f"r{index}"] == answer(prompt, VOCAB, max(0, position - len(prompt) + 1))
        assert all(number == index or engine.right(f"r{number}", one) for number, one in enumerate(asked))
        assert engine.backend.resets <= ceil(log2(8)) + 2, "the fault, its half, its quarter, alone, alone again"
        engine.backend.faults.clear()
        engine.ask("again", prompt)
        engine.drain()
        assert engine.right("again", prompt)


def test_what_the_request_at_fault_left_in_the_cache_is_not_found_again() -> None:
    """Its earlier chunks were published at their commits, and may be the cause."""
    prompt = tuple(range(30))
    engine = Engine(Fault(prompt, 33), capacity=Capacity(blocks=64, block_size=4, max_rows=4, max_tokens=8))
    for name in ("bad", "again"):
        engine.ask(name, prompt)
        engine.drain()
        engine.backend.faults.clear()
    end = engine.ends["again"]
    assert engine.right("again", prompt) and isinstance(end, FinishEvent) and end.cached_tokens == 0


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("place", PLACES)
def test_a_fault_that_does_not_come_again_is_nobodys(depth: int, place: str) -> None:
    for count in (1, 2, 7):
        asked = prompts(count)
        engine = Engine(Fault(asked[-1], len(asked[-1]) + 2, "exception", place, times=1), depth=depth)
        for number, prompt in enumerate(asked):
            engine.ask(f"r{number}", prompt)
        engine.drain()
        assert all(engine.right(f"r{number}", prompt) for number, prompt in enumerate(asked))
        assert engine.backend.resets == engine.core.stats.faults == len(engine.heard) == 1


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("count", [2, 5, 16])
def test_a_fault_costs_few_steps(depth: int, count: int) -> None:
    """Every trial is one step here: half the suspects, twice at each halving, and one more for who is at fault."""
    asked = [(i, 3, 4) for i in range(count)]
    for index in range(count):
        engine = Engine(Fault(asked[index], 8), depth=depth)
        for number, prompt in enumerate(asked):
            engine.ask(f"r{number}", prompt)
        while not engine.heard:
            engine.step()
        before = engine.steps
        while engine.scheduler.isolating:
            engine.step()
        # At depth 2 the place of the fault may be two steps on.
        assert engine.steps - before <= depth * (2 * ceil(log2(count)) + 2)
        engine.drain()


@pytest.mark.parametrize("index", range(4))
def test_who_has_passed_makes_room_for_the_next_trial(index: int) -> None:
    """The pool holds these four, but not two of them and what two others would need to join."""
    asked = [(i, *range(6)) for i in range(4)]
    engine = Engine(Fault(asked[index], 8), capacity=Capacity(12, 4, 4, 64), prefix_cache=False)
    for number, prompt in enumerate(asked):
        engine.ask(f"r{number}", prompt, SamplingParams(max_tokens=25, ignore_eos=True))
    while not engine.heard:
        engine.step()
    before = engine.steps
    while engine.scheduler.isolating:
        engine.step()
    assert engine.steps - before <= 2 * 2 + 2
    engine.drain()
    assert all(number == index or engine.right(f"r{number}", prompt, 25) for number, prompt in enumerate(asked))


def test_each_fault_stands_for_itself() -> None:
    """Two that come once each, at different tokens of one request, do not add up."""
    engine = Engine(Fault((1, 2), 3, times=1), Fault((1, 2), 7, times=1))
    engine.ask("a", (1, 2))
    engine.drain()
    assert engine.right("a", (1, 2)) and engine.backend.resets == 2


@pytest.mark.parametrize("depth", [1, 2])
def test_a_fault_that_comes_once_is_nobodys_even_in_a_trial(depth: int) -> None:
    """The second fault comes when its request is tried alone, because of another's."""
    for times in (None, 1):
        engine = Engine(Fault((9, 9), 4, times=times), depth=depth)
        engine.ask("bad", (9, 9))
        engine.ask("unlucky", (3, 4))
        while engine.scheduler._isolation._trial != {engine.scheduler._sequences["unlucky"]}:
            engine.step()
            engine.scheduler._isolation.proceed()
        engine.backend.faults.append(Fault((3, 4), 1, times=1))
        engine.drain()
        assert engine.right("unlucky", (3, 4))
        assert isinstance(engine.ends["bad"], ErrorEvent if times is None else FinishEvent)


def test_nobody_new_joins_while_a_fault_is_looked_into() -> None:
    engine = Engine(Fault((9, 9), 4))
    for name, prompt in (("a", (1, 2)), ("bad", (9, 9)), ("b", (3, 4))):
        engine.ask(name, prompt)
    while not engine.heard:
        engine.step()
    engine.ask("late", (5, 6))
    while engine.scheduler.isolating:
        assert engine.scheduler.num_running <= 2
        engine.step()
        assert not engine.tokens["late"]
    engine.drain()
    assert engine.right("late", (5, 6)) and engine.right("a", (1, 2)) and engine.right("b", (3, 4))


def test_many_at_fault_do_not_end_the_engine_while_one_is_well() -> None:
    """Fifteen of sixteen: each fails alone, the one before it too; the step that the sound one made counts."""
    for sound in range(16):
        asked = [(i, 3, 4) for i in range(16)]
        engine = Engine(*(Fault(prompt, 2) for number, prompt in enumerate(asked) if number != sound))
        for number, prompt in enumerate(asked):
            engine.ask(f"r{number}", prompt)
        engine.drain()
        assert engine.core.error is None
        assert [name for name, end in engine.ends.items() if isinstance(end, FinishEvent)] == [f"r{sound}"]
        assert engine.right(f"r{sound}", asked[sound])


class DeadBackend(FakeBackend):
    """No step succeeds after the third."""

    def result(self) -> StepResult:
        result = super().result()
        if result.step >= 3:
            raise Injected("CUDA error: unspecified launch failure")
        return result


@pytest.mark.parametrize("depth", [1, 2])
def test_when_nobody_can_be_computed_it_is_the_device(depth: int) -> None:
    engine = Engine(fake=DeadBackend(VOCAB, depth))
    for name in "abcdef":
        engine.ask(name, (ord(name) % VOCAB, 2))
    engine.drain()
    assert engine.core.error is not None and "computes no request" in str(engine.core.error)
    assert all(isinstance(end, ErrorEvent) and end.code == "engine_fault" for end in engine.ends.values())
    assert not any("CUDA" in end.message for end in engine.ends.values() if isinstance(end, ErrorEvent))
    engine.ask("late", (1,))
    engine.drain()
    assert isinstance(engine.ends["late"], ErrorEvent)


def test_one_after_the_other_too() -> None:
    """With pauses between them; the last one below the limit is forgiven by a step that succeeds."""
    bad = [(i, 3) for i in range(2 * LONE_FAULTS)]
    engine = Engine(*(Fault(prompt, 1) for prompt in bad))
    for number, prompt in enumerate(bad[: LONE_FAULTS - 1]):
        engine.ask(f"bad{number}", prompt)
        engine.drain()
    engine.ask("sound", (50,))
    engine.drain()
    assert engine.right("sound", (50,))
    for number, prompt in enumerate(bad[LONE_FAULTS:]):
        assert engine.core.error is None
        engine.ask(f"more{number}", prompt)
        engine.drain()
    assert engine.core.error is not None


class Reluctant(FakeBackend):
    def reset(self) -> None:
        raise RuntimeError("no")


class Gone(FakeBackend):
    def submit(self, plan: StepPlan) -> None:
        raise BackendUnavailable("the device is gone")


@pytest.mark.parametrize("fake", [Reluctant(VOCAB), Gone(VOCAB)])
def test_a_backend_that_cannot_go_on_ends_the_engine(fake: FakeBackend) -> None:
    engine = Engine(Fault((1, 2), 1, times=1), fake=fake)
    engine.ask("a", (1, 2))
    engine.ask("b", (3, 4))
    engine.drain()
    assert engine.core.error is not None
    assert all(isinstance(end, ErrorEvent) for end in engine.ends.values())


@pytest.mark.parametrize("depth", [1, 2])
def test_clients_may_leave_at_any_time_of_it(depth: int) -> None:
    """Aborted, finished or out of time while their trial is due; the one at fault too."""
    for after in range(9):
        for leaver in range(6):
            asked = [(i, 3, 4) for i in range(6)]
            engine = Engine(Fault(asked[2], 6), depth=depth)
            for number, prompt in enumerate(asked):
                engine.ask(f"r{number}", prompt)
            while not engine.heard:
                engine.step()
            for _ in range(after):
                engine.step()
            engine.core.abort(f"r{leaver}")
            engine.drain()
            for number, prompt in enumerate(asked):
                assert number in (2, leaver) or engine.right(f"r{number}", prompt)
            end = engine.ends["r2"]
            aborted = isinstance(end, FinishEvent) and end.reason is FinishReason.ABORT and leaver == 2
            assert isinstance(end, ErrorEvent) or aborted


# ---------------------------------------------------------------- at random, on a tiny pool

TINY = Capacity(blocks=8, block_size=4, max_rows=4, max_tokens=9)
CONTEXT = TINY.blocks * TINY.block_size
WITNESS = (1, 1, 1)


def random_engine(draw: random.Random, depth: int) -> Engine:
    return Engine(
        depth=depth,
        capacity=TINY,
        policy=draw.choice(["fused", "fused", "serial", "static:2", "window:5"]),
        prefix_cache=draw.random() < 0.7,
        step_seconds=draw.choice([None, 0.002]),
    )


def random_fault(draw: random.Random, prompt: tuple[int, ...]) -> Fault:
    kind = draw.choice(["exception", "memory", "nan"])
    times = None if kind == "nan" else draw.choice([None, 1])
    return Fault(prompt, draw.randrange(len(prompt) + 6), kind, draw.choice(PLACES), times)


def walk(engine: Engine, draw: random.Random, steps: int) -> Counter[str]:
    """Random requests, a quarter of them with a fault, and a sound one whenever there is none, so that the device is
    blamed only where faulty ones happen to be alone."""
    seen: Counter[str] = Counter()
    asked: dict[str, tuple[tuple[int, ...], SamplingParams]] = {}

    def ask(name: str, prompt: tuple[int, ...], sampling: SamplingParams) -> None:
        asked[name] = prompt, sampling
        engine.ask(name, prompt, sampling)

    for number in range(steps):
        live = [name for name in asked if name not in engine.ends]
        if not any(name.startswith("witness") for name in live):
            ask(f"witness{number}", WITNESS, SamplingParams(max_tokens=20))
        if draw.random() < 0.25 and len(live) < 8:
            shared = tuple(range(2, 14))[: draw.choice([0, 0, 4, 8, 12])]
            prompt = (*shared, *(draw.randrange(14, VOCAB) for _ in range(draw.randint(1, 9))))
            sampling = SamplingParams(draw.choice([1, 3, 8]), prompt_logprobs=draw.choice([None, None, 0]))
            ask(f"r{number}", prompt, sampling)
            if draw.random() < 0.25:
                engine.backend.faults.append(random_fault(draw, prompt))
        elif draw.random() < 0.03 and live:
            engine.core.abort(draw.choice(live))
        for event in engine.step():
            if isinstance(event, TokenEvent) and event.prompt_logprobs:
                prompt = asked[event.request_id][0]
                scores = [prompt_score(prompt[:count]) for count in range(1, len(prompt))]
                assert list(event.prompt_logprobs) == scores
    engine.drain()
    if engine.core.error is not None:
        assert "computes no request" in str(engine.core.error) and engine.ends.keys() == asked.keys()
        return Counter(dead=1)
    for name, (prompt, sampling) in asked.items():
        mine = [fault for fault in engine.backend.faults if fault.prompt == prompt]
        end, count = engine.ends[name], min(sampling.max_tokens or 0, CONTEXT - len(prompt))
        expected = answer(prompt, VOCAB, count)
        assert engine.tokens[name] == expected[: len(engine.tokens[name])]
        if isinstance(end, ErrorEvent):
            kinds = {fault.kind for fault in mine if fault.fired and fault.times is None}
            assert ("nan" in kinds) if end.code == "nan_logits" else kinds - {"nan"}, (name, end)
            seen[end.code] += 1
        elif end.reason is not FinishReason.ABORT:
            assert engine.tokens[name] == expected
            seen["whole"] += 1
            seen["forgiven"] += any(fault.fired for fault in mine)
    seen["preemptions"] = engine.core.stats.preemptions
    seen["faults"] = engine.core.stats.faults
    return seen


@pytest.mark.parametrize("depth", [1, 2])
def test_random_faults(depth: int) -> None:
    total: Counter[str] = Counter()
    for seed in range(40):
        draw = random.Random(f"{depth}/{seed}")
        total += walk(random_engine(draw, depth), draw, 120)
    for what, least in (("whole", 400), ("engine_fault", 30), ("nan_logits", 30), ("forgiven", 20), ("faults", 120)):
        assert total[what] >= least, total
    assert total["dead"] <= 5, total


@settings(max_examples=40, deadline=None)
@given(st.randoms(use_true_random=False), st.sampled_from([1, 2]), st.integers(1, 60))
def test_any_faults(draw: random.Random, depth: int, steps: int) -> None:
    """The same, driven by hypothesis, which shrinks what it finds."""
    walk(random_engine(draw, depth), draw, steps)
