"""Scheduler, block pool and prefix cache against a backend computed by hand: random walks on a tiny pool.

Eight blocks make every rare thing common: preemption, eviction, hits, rows standing still. After every call the
structures are checked, and every finished request's tokens are compared with those computed by hand.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from headrace.core.types import Capacity, ErrorEvent, FinishEvent, FinishReason, Request, SamplingParams, TokenEvent
from headrace.sched.policy import parse_policy
from headrace.sched.prefix import PrefixCache
from headrace.sched.scheduler import Scheduler
from headrace.testing.fake import FakeBackend, answer, prompt_score
from headrace.weights.lora import Adapter

BLOCKS, BLOCK_SIZE, ROWS, BUDGET = 8, 4, 4, 9
CONTEXT = BLOCKS * BLOCK_SIZE
VOCAB, EOS, POISON = 13, 3, 12
PATIENCE = 400
"""Plans within which every request must have ended: far above what the whole pool needs for all that can wait."""


@dataclass
class Asked:
    request: Request
    tokens: list[int] = field(default_factory=list)
    since: int = 0
    aborted: bool = False
    cut: int | None = None
    """A client's finish(): how many tokens it wants."""


class World:
    """One scheduler and one fake backend, with every promise checked as time goes on."""

    def __init__(self, depth: int, policy: str, prefix_cache: bool = True, step_seconds: float | None = None) -> None:
        capacity = Capacity(BLOCKS, BLOCK_SIZE, ROWS, BUDGET)
        self.backend = FakeBackend(VOCAB, depth, poison=frozenset({POISON}))
        self.backend.open(capacity)
        self.backend.load_adapter(Adapter("style", {}, ""))
        cache = PrefixCache(BLOCKS, BLOCK_SIZE, "fake/int", enabled=prefix_cache)
        self.scheduler = Scheduler(capacity, CONTEXT, frozenset({EOS}), parse_policy(policy), cache, step_seconds)
        self.depth = depth
        self.policy = policy
        self.now = 0.0
        self.plans = 0
        self.asked: dict[str, Asked] = {}
        self.seen: Counter[str] = Counter()
        self.admitted: list[str] = []

    def add(self, prompt: list[int], sampling: SamplingParams, **fields: Any) -> str:
        request_id = f"r{self.seen['added']}"
        self.seen["added"] += 1
        request = Request(request_id, tuple(prompt), sampling, arrival_s=self.now, **fields)
        self.asked[request_id] = Asked(request, since=self.plans)
        self.scheduler.add(request)
        self.check()
        return request_id

    def abort(self, request_id: str) -> None:
        self.asked[request_id].aborted = True
        self.scheduler.abort(request_id, self.now)
        self.scheduler.abort(request_id, self.now)
        self.take_events()

    def finish(self, request_id: str) -> None:
        asked = self.asked[request_id]
        asked.cut = len(asked.tokens)
        self.scheduler.finish(request_id, asked.cut, self.now)
        self.take_events()

    def crash(self) -> None:
        """A step has raised, and does so no more: nobody is to notice."""
        self.seen["faults"] += 1
        self.backend.reset()
        assert self.scheduler.recover() is None
        assert self.scheduler.in_flight == self.scheduler.num_running == 0
        self.check()

    def step(self, seconds: float = 0.0) -> bool:
        """Plans and, where the pipeline is full or nothing can be planned, commits. False: nothing happened."""
        self.now += 0.01
        plan = self.scheduler.plan(self.now)
        self.take_events()
        for waiting in self.scheduler._waiting:
            assert waiting.was_admitted or self.now < (waiting.request.join_by_s or math.inf)
        if plan is not None:
            self.plans += 1
            hits = sum(row.start for row in plan.rows for admit in plan.admit if admit.row == row.row)
            self.seen["prefix hits"] += hits > 0
            self.seen["mixed plans"] += len({row.length > 1 for row in plan.rows}) == 2
            self.seen["full budget"] += sum(row.length for row in plan.rows) == BUDGET
            self.seen["release and admit"] += bool({a.row for a in plan.admit} & set(plan.release))
            self.backend.submit(plan)
        depth = 1 if self.scheduler.isolating else self.depth
        if self.scheduler.in_flight and (plan is None or self.scheduler.in_flight >= depth):
            self.scheduler.commit(self.backend.result(), self.now, seconds)
            self.take_events()
            return True
        return plan is not None

    def take_events(self) -> None:
        for event in self.scheduler.take_events():
            asked = self.asked[event.request_id]
            if isinstance(event, TokenEvent):
                self.check_scores(asked, event)
                asked.tokens.extend(event.token_ids)
                continue
            del self.asked[event.request_id]
            self.check_end(asked, event)
        self.check()

    def check_scores(self, asked: Asked, event: TokenEvent) -> None:
        """With the first tokens, and only then, comes the score of every prompt token but the first."""
        prompt = asked.request.token_ids
        wanted = asked.request.sampling.prompt_logprobs is not None and not asked.tokens
        adapter = asked.request.adapter
        expected = [prompt_score(prompt[:count], adapter) for count in range(1, len(prompt))] if wanted else []
        assert list(event.prompt_logprobs) == expected
        self.seen["scored prompts"] += len(expected) > BUDGET

    def check_end(self, asked: Asked, event: FinishEvent | ErrorEvent) -> None:
        sampling, prompt = asked.request.sampling, asked.request.token_ids
        stop_ids = frozenset(sampling.stop_token_ids) | (frozenset() if sampling.ignore_eos else {EOS})
        room = CONTEXT - len(prompt)
        wanted = room if sampling.max_tokens is None else min(sampling.max_tokens, room)
        expected = answer(prompt, VOCAB, wanted, stop_ids, sampling.min_tokens, asked.request.adapter)
        sick = [i for i, token in enumerate([*prompt, *expected[:-1]]) if token == POISON]
        if sick:
            good = max(0, sick[0] - len(prompt) + 1)
            assert asked.tokens == expected[: len(asked.tokens)] and len(asked.tokens) <= good
        if isinstance(event, ErrorEvent):
            late = event.time_s >= (asked.request.join_by_s or math.inf) and not asked.tokens
            assert (event.code == "nan_logits" and sick) or (event.code == "queue_timeout" and late)
            self.seen["errors" if sick else "late"] += 1
            return
        self.seen[event.reason] += 1
        assert event.prompt_tokens == len(prompt)
        assert event.cached_tokens < len(prompt)
        if event.reason is FinishReason.ABORT:
            assert asked.aborted and asked.tokens == expected[: len(asked.tokens)]
        elif asked.cut is not None:
            assert event.reason is FinishReason.STOP and event.output_tokens == asked.cut
            assert asked.tokens[: asked.cut] == expected[: asked.cut]
        else:
            assert not sick and asked.tokens == expected, (asked, expected)
            assert event.output_tokens == len(expected)
            ended_by_id = expected[-1] in stop_ids and len(expected) >= sampling.min_tokens
            assert event.reason is (FinishReason.STOP if ended_by_id else FinishReason.LENGTH)
            assert event.stop_id == (expected[-1] if ended_by_id else None)

    def check(self) -> None:
        self.scheduler.check_integrity()
        assert set(self.scheduler.unfinished) == self.asked.keys()
        if self.policy in ("fused", "serial", "static:2"):
            for asked in self.asked.values():
                assert self.plans - asked.since < PATIENCE, f"{asked.request.id} starves"
        if self.policy == "serial":
            assert self.scheduler.num_running <= 1

    def drain(self) -> None:
        """Runs until nothing is left; afterwards every block and every row must be back."""
        for _ in range(20 * PATIENCE):
            if not self.asked and not self.scheduler.in_flight:
                break
            if not self.step():
                wake = self.scheduler.wake_s()
                assert wake is not None, "nothing in flight, nothing planned, requests left"
                self.now = max(self.now, wake)
        assert not self.asked
        assert self.scheduler._pool.available == BLOCKS
        assert len(self.scheduler._free_rows) == ROWS
        assert self.scheduler.stats.leaks == 0
        if not self.seen["faults"]:
            assert self.backend.computed_tokens == self.scheduler.stats.computed_tokens
        assert self.scheduler.stats.tokens_per_step.state().count <= self.scheduler.stats.iterations


def random_sampling(draw: random.Random) -> SamplingParams:
    max_tokens = draw.choice([1, 2, 3, 5, 8, 13, 30, None])
    return SamplingParams(
        max_tokens=max_tokens,
        min_tokens=draw.choice([0, 0, 0, min(4, max_tokens or 4)]),
        ignore_eos=draw.random() < 0.3,
        stop_token_ids=draw.choice([(), (), (5,), (5, 7)]),
        prompt_logprobs=draw.choice([None, None, None, 0]),
    )


def random_prompt(draw: random.Random) -> list[int]:
    """Often a beginning that others share, so that the prefix cache has something to find."""
    shared = [1, 2, 4, 5, 6, 7, 8, 9, 10, 11, 1, 2, 4, 5, 6, 7]
    kept = shared[: draw.choice([0, 0, 4, 8, 12, 16])]
    length = draw.choice([1, 2, 3, 4, 5, 7, 8, 9, 15])
    token_ids = [draw.randrange(VOCAB - 1) for _ in range(length)]
    if draw.random() < 0.05:
        token_ids[draw.randrange(length)] = POISON
    return (kept + token_ids)[: CONTEXT - 1]


def random_walk(world: World, draw: random.Random, steps: int) -> None:
    """`steps` engine steps, with everything a client can do in between."""
    for _ in range(steps):
        roll = draw.random()
        if roll < 0.25 and len(world.asked) < 10:
            salt, priority = draw.choice(["", "", "", "tenant"]), draw.choice([0, 0, 0, 0, 1])
            adapter = draw.choice(["", "", "style"])
            join_by_s = draw.choice([None, None, world.now + draw.choice([0.05, 0.5])])
            fields = {"salt": salt, "priority": priority, "adapter": adapter, "join_by_s": join_by_s}
            world.add(random_prompt(draw), random_sampling(draw), **fields)
        elif roll < 0.27 and world.asked:
            world.abort(draw.choice(list(world.asked)))
        elif roll < 0.29 and (running := [i for i, a in world.asked.items() if a.tokens]):
            world.finish(draw.choice(running))
        elif roll < 0.30 and not world.scheduler.isolating:
            world.crash()
        world.step(draw.choice([0.0, 0.001, 0.01, 0.1]))
    world.drain()


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("policy", ["fused", "serial", "static:2", "window:30"])
def test_random_walks(depth: int, policy: str) -> None:
    """126,000 steps in all. Each rare situation must really have been reached, or the walk proves nothing."""
    total: Counter[str] = Counter()
    steps = 45_000 if policy == "fused" else 6_000
    for seed in range(10):
        world = World(depth, policy, seed % 5 != 4, step_seconds=None if seed % 2 else 0.01)
        random_walk(world, random.Random(f"{policy}/{depth}/{seed}"), steps // 10)
        total += world.seen
        total["preemptions"] += world.scheduler.stats.preemptions
        total["cached tokens"] += world.scheduler.stats.cached_tokens
    reached = ["errors", "stop", "length", "abort", "full budget", "prefix hits", "cached tokens", "release and admit"]
    reached += ["scored prompts", "late"]
    assert total["faults"] > steps // 200
    if policy == "fused":
        reached += ["preemptions", "mixed plans"]
    assert all(total[what] >= steps // 2000 for what in reached), total


def healthy_prompts() -> list[list[int]]:
    """Of eight tokens; twenty more bring no poison."""
    prompts = ([i % 11, i // 11, 6, 7, 8, 9, 10, 11] for i in range(121))
    return [prompt for prompt in prompts if POISON not in answer(prompt, VOCAB, 20)]


def test_who_was_preempted_comes_back_whatever_the_policy_says() -> None:
    """Behind a request of a higher priority that may not join the batch."""
    world = World(1, "static:2")
    for priority, prompt in enumerate(healthy_prompts()[:2]):
        world.add(prompt, SamplingParams(max_tokens=20, ignore_eos=True), priority=priority)
    world.step()
    world.add([4, 4, 4], SamplingParams(max_tokens=20))
    world.drain()
    assert world.scheduler.stats.preemptions > 0


def test_who_was_preempted_keeps_its_place() -> None:
    """Before everyone who came later, whether they ran meanwhile or not."""
    world = World(1, "fused")
    for prompt in healthy_prompts()[:2]:
        world.add(prompt, SamplingParams(max_tokens=20, ignore_eos=True))
    world.step()
    world.add([4] * 20, SamplingParams(max_tokens=4))
    while not world.scheduler.stats.preemptions:
        world.step()
    assert [sequence.request.id for sequence in world.scheduler._waiting] == ["r1", "r2"]
    world.drain()


def test_nobody_waits_for_a_block_that_was_published_and_is_gone() -> None:
    world = World(1, "fused")
    prompt = [i % 11 for i in range(9)]
    world.add(prompt, SamplingParams(max_tokens=8, ignore_eos=True))
    world.step()
    world.step()
    (first,) = world.scheduler._running
    assert len(first.keys) == 2
    world.scheduler._cache.withdraw(first.blocks)
    world.add(prompt, SamplingParams(max_tokens=2))
    world.step()
    assert world.scheduler.num_running == 2
    world.drain()


@pytest.mark.parametrize("depth", [1, 2])
def test_a_prompt_preempted_half_scored_is_scored_once(depth: int) -> None:
    """The walks hardly reach this: a prompt is let in only where it fits."""
    world = World(depth, "fused")
    world.add([i % 11 for i in range(25)], SamplingParams(max_tokens=3, prompt_logprobs=0))
    world.step()
    world.step()
    (sequence,) = world.scheduler._running
    assert 0 < sequence.num_planned < 24
    world.scheduler._preempt(sequence)
    world.drain()
    assert world.seen["scored prompts"] == 1


class SchedulerMachine(RuleBasedStateMachine):
    """The same world, driven by hypothesis, which shrinks what it finds."""

    @initialize(depth=st.sampled_from([1, 2]), policy=st.sampled_from(["fused", "serial", "static:2", "window:30"]))
    def start(self, depth: int, policy: str) -> None:
        self.world = World(depth, policy)

    @rule(seed=st.integers(0, 10_000))
    def arrive(self, seed: int) -> None:
        if len(self.world.asked) < 10:
            draw = random.Random(seed)
            self.world.add(random_prompt(draw), random_sampling(draw))

    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        if self.world.asked:
            self.world.abort(data.draw(st.sampled_from(sorted(self.world.asked))))

    @rule()
    def crash(self) -> None:
        if not self.world.scheduler.isolating:
            self.world.crash()

    @rule(count=st.integers(1, 6))
    def run(self, count: int) -> None:
        for _ in range(count):
            self.world.step()

    @invariant()
    def sound(self) -> None:
        if hasattr(self, "world"):
            self.world.check()

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.world.drain()


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
