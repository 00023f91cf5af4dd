"""The engine's loop over the backend computed by hand: policies, laws, faults."""

from __future__ import annotations

import random
from collections import defaultdict

import pytest

from headrace.backends.base import Backend
from headrace.core.errors import BackendUnavailable, GrammarError
from headrace.core.types import (
    Capacity,
    EngineLimits,
    ErrorEvent,
    Event,
    FinishEvent,
    FinishReason,
    Request,
    RowError,
    RowOut,
    SamplingParams,
    StepPlan,
    StepResult,
    TokenEvent,
)
from headrace.engine.client import InProcessClient
from headrace.engine.core import FAULT, STOPPED, EngineCore
from headrace.sched.policy import parse_policy
from headrace.sched.prefix import PrefixCache
from headrace.sched.scheduler import Scheduler
from headrace.testing.fake import FakeBackend, answer

VOCAB, EOS, CONTEXT = 61, 60, 256
CAPACITY = Capacity(blocks=512, block_size=16, max_rows=64, max_tokens=512)


class Clock:
    """Stands still unless told."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def make_core(
    policy: str = "fused",
    backend: FakeBackend | None = None,
    capacity: Capacity = CAPACITY,
    clock: Clock | None = None,
    prefix_cache: bool = False,
    grammars: FakeGrammars | None = None,
) -> EngineCore:
    backend = backend or FakeBackend(VOCAB)
    backend.open(capacity)
    cache = PrefixCache(capacity.blocks, capacity.block_size, "fake", prefix_cache)
    scheduler = Scheduler(capacity, CONTEXT, frozenset({EOS}), parse_policy(policy), cache)
    limits = EngineLimits(VOCAB, CONTEXT)
    return EngineCore(backend, scheduler, limits, clock or Clock(), grammars=grammars, on_fault=raise_it)


def raise_it(error: Exception) -> None:
    """No step raises here, unless a law is broken."""
    raise error


def drain(core: EngineCore) -> list[Event]:
    events: list[Event] = []
    client = InProcessClient(core)
    while batch := client.poll():
        events += batch
    return events


def tokens_of(events: list[Event]) -> dict[str, list[int]]:
    tokens: dict[str, list[int]] = defaultdict(list)
    for event in events:
        if isinstance(event, TokenEvent):
            tokens[event.request_id] += event.token_ids
    return tokens


def random_requests(count: int = 50) -> list[Request]:
    draw = random.Random(7)
    return [
        Request(
            f"r{i}",
            tuple(draw.randrange(VOCAB - 1) for _ in range(draw.randint(1, 90))),
            SamplingParams(max_tokens=draw.randint(1, 60), ignore_eos=i % 2 == 0),
        )
        for i in range(count)
    ]


@pytest.mark.parametrize("depth", [1, 2])
def test_policies_agree_and_compute_each_token_once(depth: int) -> None:
    requests = random_requests()
    iterations = {}
    for policy in ("serial", "static:8", "window:50", "fused"):
        backend = FakeBackend(VOCAB, depth)
        clock = Clock()
        core = make_core(policy, backend, clock=clock)
        for request in requests:
            core.submit(request)
        clock.now_s = 1.0
        tokens = tokens_of(drain(core))
        needed = 0
        for request in requests:
            stop_ids = frozenset() if request.sampling.ignore_eos else frozenset({EOS})
            expected = answer(request.token_ids, VOCAB, request.sampling.max_tokens or 0, stop_ids)
            assert tokens[request.id] == expected
            needed += len(request.token_ids) + len(expected) - 1
        wasted = backend.computed_tokens - needed
        ended_by_id = sum(EOS in answer_tokens for answer_tokens in tokens.values())
        assert 0 <= wasted <= (depth - 1) * ended_by_id, "each token is computed once; only a pipeline may run past EOS"
        iterations[policy] = core.stats.iterations
    assert iterations["fused"] < min(iterations[p] for p in ("serial", "static:8")), iterations
    assert iterations["fused"] <= iterations["window:50"] < iterations["static:8"] < iterations["serial"], iterations


@pytest.mark.parametrize("policy", ["serial", "static:8", "window:0", "fused"])
@pytest.mark.parametrize("depth", [1, 2])
def test_prompts_that_begin_alike_are_computed_once(policy: str, depth: int) -> None:
    """Eight requests behind one beginning of 96 tokens, and one that has nothing to do with it."""
    backend = FakeBackend(VOCAB, depth)
    core = make_core(policy, backend, prefix_cache=True)
    shared = [i % 7 for i in range(96)]
    sampling = SamplingParams(max_tokens=4, ignore_eos=True)
    for number in range(8):
        core.submit(Request(f"r{number}", (*shared, 10 + number, 3), sampling))
    core.submit(Request("other", (9,) * 40, sampling))
    core.submit(Request("salted", (*shared, 10, 3), sampling, salt="tenant"))
    events = drain(core)
    tokens = tokens_of(events)
    for number in range(8):
        assert tokens[f"r{number}"] == answer((*shared, 10 + number, 3), VOCAB, 4)
    outputs = 10 * 3
    assert core.stats.computed_tokens == 2 * 98 + 7 * 2 + 40 + outputs, "the salted one alone computes it again"
    if policy == "fused":
        first = [event.request_id for event in events if isinstance(event, TokenEvent)][:3]
        assert sorted(first) == ["other", "r0", "salted"], "they have nothing to wait for"


def test_late_arrivals_join_at_the_next_iteration() -> None:
    core = make_core()
    core.submit(Request("long", (1, 2, 3), SamplingParams(max_tokens=50, ignore_eos=True)))
    for _ in range(10):
        core.step()
    core.submit(Request("late", (4, 5), SamplingParams(max_tokens=2, ignore_eos=True)))
    assert {e.request_id for e in core.step() if isinstance(e, TokenEvent)} == {"long", "late"}


def test_static_batch_keeps_others_waiting_until_its_longest_ends() -> None:
    core = make_core("static:2")
    for name, count in (("a", 3), ("b", 9), ("c", 2)):
        core.submit(Request(name, (1, 2), SamplingParams(max_tokens=count, ignore_eos=True)))
    order = [e.request_id for e in drain(core) if isinstance(e, TokenEvent)]
    assert order.index("c") == 12
    assert order == ["a", "b"] * 3 + ["b"] * 6 + ["c"] * 2


def test_window_opens_with_the_first_request_and_lets_all_in_together() -> None:
    clock = Clock()
    core = make_core("window:100", clock=clock)
    core.submit(Request("a", (1,), SamplingParams(max_tokens=3, ignore_eos=True), arrival_s=0.0))
    clock.now_s = 0.06
    core.submit(Request("b", (2,), SamplingParams(max_tokens=3, ignore_eos=True), arrival_s=0.06))
    assert core.step() == []
    assert core.sleep_s() == pytest.approx(0.04)
    clock.now_s = 0.1
    assert {e.request_id for e in core.step()} == {"a", "b"}
    core.submit(Request("c", (3,), SamplingParams(max_tokens=1, ignore_eos=True), arrival_s=0.1))
    clock.now_s = 5.0
    assert {e.request_id for e in core.step()} == {"a", "b"}, "nobody joins a running window"


def test_prefix_cache_saves_work_and_changes_no_token() -> None:
    prompt = tuple(range(40))
    core = make_core(prefix_cache=True)
    for name in ("first", "again"):
        core.submit(Request(name, prompt, SamplingParams(max_tokens=5, ignore_eos=True)))
        events = drain(core)
        assert tokens_of(events)[name] == answer(prompt, VOCAB, 5)
        end = events[-1]
        assert isinstance(end, FinishEvent) and end.cached_tokens == (32 if name == "again" else 0)
    core.submit(Request("salted", prompt, SamplingParams(max_tokens=5, ignore_eos=True), salt="other tenant"))
    end = drain(core)[-1]
    assert isinstance(end, FinishEvent) and end.cached_tokens == 0


def test_a_full_hit_still_computes_the_last_token() -> None:
    core = make_core(prefix_cache=True)
    prompt = tuple(range(32))
    for expected_cached in (0, 16):
        core.submit(Request("r", prompt, SamplingParams(max_tokens=1)))
        end = drain(core)[-1]
        assert isinstance(end, FinishEvent) and end.cached_tokens == expected_cached


@pytest.mark.parametrize("depth", [1, 2])
def test_a_failing_request_fails_alone(depth: int) -> None:
    core = make_core(backend=FakeBackend(VOCAB, depth, poison=frozenset({59})))
    sampling = SamplingParams(max_tokens=20, ignore_eos=True)
    prompts = {"a": (1, 2, 3), "sick": (4, 59, 5), "b": (7, 8), "empty": (), "long": (1,) * CONTEXT, "odd": (1, 99)}
    for name, prompt in prompts.items():
        core.submit(Request(name, prompt, sampling))
    events = drain(core)
    codes = {e.request_id: e.code for e in events if isinstance(e, ErrorEvent)}
    assert codes == {
        "sick": "nan_logits",
        "empty": "empty_prompt",
        "long": "context_length_exceeded",
        "odd": "invalid_parameter",
    }
    tokens = tokens_of(events)
    assert tokens["a"] == answer(prompts["a"], VOCAB, 20)
    assert tokens["b"] == answer(prompts["b"], VOCAB, 20)
    terminal = [e.request_id for e in events if not isinstance(e, TokenEvent)]
    assert sorted(terminal) == sorted(prompts)


class FlakyBackend(FakeBackend):
    """Fails the third step, once, as a passing fault of the machine would."""

    def result(self) -> StepResult:
        right = super().result()
        if right.step != 2:
            return right
        return StepResult(2, tuple(RowOut(out.row, error=RowError("nan_logits", "once")) for out in right.rows))


def test_what_a_failed_request_left_in_the_cache_is_not_found_again() -> None:
    """Chunks before the fault were published at their commits; a second try must not build on them."""
    capacity = Capacity(blocks=64, block_size=4, max_rows=2, max_tokens=8)
    core = make_core(backend=FlakyBackend(VOCAB), capacity=capacity, prefix_cache=True)
    prompt = tuple(range(30))
    core.submit(Request("sick", prompt, SamplingParams(max_tokens=3, ignore_eos=True)))
    assert isinstance(drain(core)[-1], ErrorEvent)
    core.submit(Request("again", prompt, SamplingParams(max_tokens=3, ignore_eos=True)))
    events = drain(core)
    end = events[-1]
    assert isinstance(end, FinishEvent) and end.cached_tokens == 0
    assert tokens_of(events)["again"] == answer(prompt, VOCAB, 3)


def test_deadline_ends_a_request_with_its_code() -> None:
    clock = Clock()
    core = make_core(clock=clock)
    core.submit(Request("late", (1, 2), SamplingParams(max_tokens=50, ignore_eos=True), deadline_s=1.0))
    core.submit(Request("calm", (1, 3), SamplingParams(max_tokens=3, ignore_eos=True)))
    core.step()
    clock.now_s = 1.0
    ends = {e.request_id: e for e in drain(core) if not isinstance(e, TokenEvent)}
    assert isinstance(ends["late"], ErrorEvent) and ends["late"].code == "deadline_exceeded"
    assert isinstance(ends["calm"], FinishEvent)


def test_finish_and_abort_are_terminal_once() -> None:
    core = make_core()
    for name in ("stop", "gone"):
        core.submit(Request(name, (1, 2), SamplingParams(max_tokens=50, ignore_eos=True)))
    for _ in range(3):
        core.step()
    core.finish("stop", 2)
    core.abort("gone")
    core.abort("gone")
    core.abort("never there")
    ends = [e for e in drain(core) if isinstance(e, FinishEvent)]
    assert [(e.request_id, e.reason, e.output_tokens) for e in ends] == [
        ("stop", FinishReason.STOP, 2),
        ("gone", FinishReason.ABORT, 3),
    ]


class DyingBackend(FakeBackend):
    """Its device goes away at the third plan."""

    def submit(self, plan: StepPlan) -> None:
        if plan.step == 2:
            raise BackendUnavailable("the device is gone")
        super().submit(plan)


def test_a_dead_device_ends_every_request_and_refuses_new_ones() -> None:
    core = make_core(backend=DyingBackend(VOCAB))
    for name in ("a", "b"):
        core.submit(Request(name, (1, 2), SamplingParams(max_tokens=9, ignore_eos=True)))
    ends = [e for e in drain(core) if isinstance(e, ErrorEvent)]
    assert [(e.request_id, e.code) for e in ends] == [("a", "backend_unavailable"), ("b", "backend_unavailable")]
    core.submit(Request("c", (1,), SamplingParams()))
    assert [e.request_id for e in drain(core)] == ["c"]
    assert InProcessClient(core).health() == "the device is gone"


class LyingBackend(FakeBackend):
    """Answers another plan than it was given."""

    def result(self) -> StepResult:
        right = super().result()
        return StepResult(right.step + 1, right.rows)


def test_an_answer_to_another_plan_is_noticed() -> None:
    core = make_core(backend=LyingBackend(VOCAB))
    core.submit(Request("a", (1, 2), SamplingParams(max_tokens=9)))
    ends = [e for e in drain(core) if isinstance(e, ErrorEvent)]
    assert len(ends) == 1 and ends[0].message == STOPPED
    assert "does not answer" in str(core.error), "the inside is told inside"


def test_fairness_one_long_prompt_does_not_stop_the_others() -> None:
    """A prompt of many chunks takes what is left of the budget; rows that decode go on at every step."""
    capacity = Capacity(blocks=64, block_size=4, max_rows=8, max_tokens=12)
    core = make_core(capacity=capacity)
    core.submit(Request("long", tuple(i % 60 for i in range(200)), SamplingParams(max_tokens=1)))
    core.step()
    for name in ("a", "b", "c"):
        core.submit(Request(name, (1, 2), SamplingParams(max_tokens=8, ignore_eos=True)))
    seen: dict[str, list[int]] = defaultdict(list)
    for step in range(40):
        for event in core.step():
            if isinstance(event, TokenEvent):
                seen[event.request_id].append(step)
    for name in ("a", "b", "c"):
        assert len(seen[name]) == 8
        assert max(b - a for a, b in zip(seen[name], seen[name][1:], strict=False)) == 1, seen
        assert seen[name][-1] < seen["long"][0]


def test_backend_protocol_is_what_the_fake_offers() -> None:
    backend: Backend = FakeBackend()
    assert backend.depth == 1


# ---------------------------------------------------------------- grammars


class Panic(BaseException):
    """As a library in Rust raises it."""


class FakeGrammars:
    """Tokens of an answer leave 0, 1, 2, 0, 1 … when divided by 3. Ready after `polls`."""

    def __init__(self, polls: int = 0) -> None:
        self.polls = polls
        self.live: dict[str, int] = {}
        self.asked: list[tuple[str, tuple[int, ...]]] = []

    def begin(self, request: Request) -> None:
        if request.grammar == "huge":
            raise GrammarError("grammar: too large")
        self.live[request.id] = 0

    def state(self, request_id: str) -> str:
        self.live[request_id] += 1
        if request_id.startswith("wrong"):
            raise GrammarError("grammar: no rule named start")
        return "ready" if self.live[request_id] > self.polls else "compiling"

    def mask(self, request_id: str, output_ids: tuple[int, ...]) -> bytes:
        assert request_id in self.live
        self.asked.append((request_id, output_ids))
        if request_id.startswith("costly") and len(output_ids) == 2:
            raise GrammarError("grammar: too costly to follow")
        if request_id.startswith("broken"):
            raise KeyError("a bug")
        if request_id.startswith("panic"):
            raise Panic("at src/parser.rs")
        allowed = sum(1 << token for token in range(VOCAB) if token % 3 == len(output_ids) % 3)
        return allowed.to_bytes(8, "little")

    def drop(self, request_id: str) -> None:
        del self.live[request_id]


LONG = SamplingParams(max_tokens=9, ignore_eos=True)


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("polls", [0, 5])
def test_a_grammar_says_which_tokens_may_come(depth: int, polls: int) -> None:
    """Beside requests without one, which go on meanwhile; the prompt of one is longer than a step."""
    grammars = FakeGrammars(polls)
    capacity = Capacity(blocks=64, block_size=4, max_rows=4, max_tokens=8)
    core = make_core(backend=FakeBackend(VOCAB, depth), capacity=capacity, grammars=grammars)
    prompts = {"free": (1, 2), "short": (3,), "long": tuple(range(20))}
    for name, prompt in prompts.items():
        core.submit(Request(name, prompt, LONG, grammar="" if name == "free" else "g"))
    assert core.engine_stats().waiting == 3
    events = drain(core)
    tokens = tokens_of(events)
    assert tokens["free"] == answer(prompts["free"], VOCAB, 9)
    for name in ("short", "long"):
        assert [token % 3 for token in tokens[name]] == [0, 1, 2] * 3
        assert [output for who, output in grammars.asked if who == name] == [tuple(tokens[name][:i]) for i in range(9)]
    first = next(event.request_id for event in events if isinstance(event, TokenEvent))
    assert first == "free" or not polls
    assert not grammars.live, "every grammar is dropped at its request's end"


@pytest.mark.parametrize("depth", [1, 2])
def test_what_is_wrong_with_a_grammar_is_its_requests_own_error(depth: int) -> None:
    grammars = FakeGrammars(2)
    core = make_core(backend=FakeBackend(VOCAB, depth), grammars=grammars)
    names = ("wrong", "huge", "costly", "right")
    for name in names:
        core.submit(Request(name, (1, 2), LONG, grammar="huge" if name == "huge" else "g"))
    with pytest.raises(ValueError, match="in use"):
        core.submit(Request("right", (1,)))
    core.submit(Request("free", (5,), LONG))
    events = drain(core)
    errors = {event.request_id: event.code for event in events if isinstance(event, ErrorEvent)}
    assert errors == dict.fromkeys(names[:3], "invalid_grammar")
    tokens = tokens_of(events)
    assert len(tokens["costly"]) == 2 and len(tokens["right"]) == 9
    assert tokens["free"] == answer((5,), VOCAB, 9)
    assert not grammars.live


def test_a_bug_in_the_grammars_ends_who_uses_them() -> None:
    core, heard = make_core(grammars=FakeGrammars()), []
    core._on_fault = heard.append
    for name in ("broken", "panic", "right"):
        core.submit(Request(name, (1, 2), LONG, grammar="g"))
    events = drain(core)
    ends = {event.request_id: event for event in events if not isinstance(event, TokenEvent)}
    for name in ("broken", "panic"):
        assert isinstance(end := ends[name], ErrorEvent) and (end.code, end.message) == ("engine_fault", FAULT)
    assert isinstance(ends["right"], FinishEvent) and [type(error) for error in heard] == [KeyError, Panic]


def test_without_grammars_a_request_with_one_is_refused() -> None:
    core = make_core()
    core.submit(Request("a", (1,), LONG, grammar="g"))
    (end,) = drain(core)
    assert isinstance(end, ErrorEvent) and end.code == "unsupported_parameter"


def test_whoever_waits_for_a_grammar_can_leave() -> None:
    """By itself, by its deadline, by that of the queue, and with the engine."""
    clock, grammars = Clock(), FakeGrammars(10**9)
    backend = DyingBackend(VOCAB)
    core = make_core(backend=backend, clock=clock, grammars=grammars)
    for name in ("gone", "late", "queued", "left"):
        times = {"late": {"deadline_s": 1.0}, "queued": {"join_by_s": 1.0}}.get(name, {})
        core.submit(Request(name, (1, 2), LONG, grammar="g", **times))
    assert core.step() == [] and core.has_work and 0 < core.sleep_s() < 0.1
    core.abort("gone")
    core.abort("gone")
    clock.now_s = 1.0
    ends = {event.request_id: event for event in core.step()}
    assert isinstance(gone := ends["gone"], FinishEvent) and gone.reason is FinishReason.ABORT
    codes = {name: end.code for name, end in ends.items() if isinstance(end, ErrorEvent)}
    assert codes == {"late": "deadline_exceeded", "queued": "queue_timeout"}
    assert grammars.live.keys() == {"left"}
    core.submit(Request("free", (1,), LONG))
    died = drain(core)
    assert {event.request_id for event in died if isinstance(event, ErrorEvent)} == {"left", "free"}
    assert not grammars.live and core.error is not None


# ---------------------------------------------------------------- figures


def test_the_figures_of_an_engine() -> None:
    """Two requests behind one prompt of three blocks; the clock stands, so that each step takes no time."""
    core = make_core(prefix_cache=True)
    prompt = tuple(range(50))
    for name in ("a", "b"):
        core.submit(Request(name, prompt, SamplingParams(max_tokens=4, ignore_eos=True)))
    before = core.engine_stats()
    assert (before.running, before.waiting, before.blocks_used, before.blocks_total) == (0, 2, 0, 512)
    core.step()
    core.step()
    during = core.engine_stats()
    assert (during.running, during.waiting, during.blocks_used) == (2, 0, 5)
    drain(core)
    after = core.engine_stats()
    assert (after.running, after.waiting, after.blocks_used, after.block_size) == (0, 0, 0, 16)
    assert (after.queried_tokens, after.cached_tokens) == (100, 48)
    assert after.computed_tokens == after.tokens_per_step.sum == 50 + 2 + 3 + 3
    assert after.iterations == after.step_seconds.count == after.tokens_per_step.count == 5
    assert (after.prefill_step_seconds.count, after.admitted_per_step.count, after.admitted_per_step.sum) == (2, 2, 2)
