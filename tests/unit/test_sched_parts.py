"""Block pool, prefix cache, policies and preemption order, each alone."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.core.errors import InvalidParameter
from headrace.core.types import Capacity, ErrorEvent, ImageSpan, Request, RowOut, SamplingParams, StepPlan, StepResult
from headrace.sched.blocks import BlockPool
from headrace.sched.pace import Pace
from headrace.sched.policy import parse_policy
from headrace.sched.prefix import PrefixCache
from headrace.sched.scheduler import Scheduler

SIZE = 4


def publish(cache: PrefixCache, token_ids: list[int], salt: str = "", images: tuple[ImageSpan, ...] = ()) -> list[int]:
    """Fills and publishes the full blocks of a prompt, then lets go of them; they stay findable."""
    parent = cache.root(salt)
    blocks = cache.pool.allocate(len(token_ids) // SIZE)
    for index, block in enumerate(blocks):
        ids = token_ids[index * SIZE : (index + 1) * SIZE]
        parent = cache.insert(parent, ids, index * SIZE, images, block)
    cache.pool.release(blocks)
    return blocks


def test_blocks_are_found_by_everything_before_them() -> None:
    cache = PrefixCache(16, SIZE, "model")
    first, second, same = [1, 2, 3, 4], [5, 6, 7, 8], [9, 9, 9, 9]
    a = publish(cache, first + same)
    b = publish(cache, second + same)
    assert cache.match(cache.root(""), [*first, *same, 0]) == a
    assert cache.match(cache.root(""), [*second, *same, 0]) == b
    assert cache.match(cache.root(""), [*same, 0]) == []


def test_salt_identity_and_images_keep_requests_apart() -> None:
    cache = PrefixCache(16, SIZE, "model/a")
    ids = [1, 2, 3, 4, 5]
    publish(cache, ids, salt="x")
    assert cache.match(cache.root("x"), ids) != []
    assert cache.match(cache.root(""), ids) == []
    assert cache.root("x") != PrefixCache(16, SIZE, "model/b").root("x")
    assert PrefixCache(1, SIZE, "m").root("nx") != PrefixCache(1, SIZE, "mn").root("x")
    cat, dog = ImageSpan(1, 3, "cat"), ImageSpan(1, 3, "dog")
    publish(cache, [7, 8, 8, 8], images=(cat,))
    assert cache.match(cache.root(""), [7, 8, 8, 8, 1], (cat,)) != []
    assert cache.match(cache.root(""), [7, 8, 8, 8, 1], (dog,)) == []
    assert cache.match(cache.root(""), [7, 8, 8, 8, 1], ()) == []


def test_a_later_part_of_an_image_is_another_block() -> None:
    cache = PrefixCache(16, SIZE, "m")
    whole = (ImageSpan(0, 12, "cat"),)
    keys = {cache.child(b"p", [8] * SIZE, start, whole) for start in (0, 4, 8)}
    assert len(keys) == 3


def test_the_last_token_is_never_part_of_a_hit() -> None:
    cache = PrefixCache(16, SIZE, "m")
    ids = [1, 2, 3, 4, 5, 6, 7, 8]
    blocks = publish(cache, ids)
    assert cache.match(cache.root(""), ids) == blocks[:1]
    assert cache.match(cache.root(""), [*ids, 9]) == blocks


def test_a_colliding_key_with_other_tokens_is_no_hit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Were SHA-256 broken, the comparison of ids would still keep requests apart."""
    cache = PrefixCache(16, SIZE, "m")
    monkeypatch.setattr(cache, "child", lambda parent, ids, start, images=(): b"always the same")
    publish(cache, [1, 2, 3, 4])
    assert cache.match(cache.root(""), [1, 2, 3, 4, 5]) != []
    assert cache.match(cache.root(""), [1, 2, 3, 9, 5]) == []
    assert cache.match(cache.root("other tenant"), [1, 2, 3, 4, 5]) == []


def test_eviction_takes_the_longest_unused_tail_first() -> None:
    cache = PrefixCache(4, SIZE, "m")
    old = publish(cache, [1, 2, 3, 4, 5, 6, 7, 8])
    publish(cache, [9, 9, 9, 9])
    cache.pool.allocate(2)
    assert cache.match(cache.root(""), [1, 2, 3, 4, 5, 6, 7, 8, 0]) == old[:1], "the tail of the oldest went"
    assert cache.match(cache.root(""), [9, 9, 9, 9, 0]) != []


def test_a_disabled_cache_finds_and_keeps_nothing() -> None:
    cache = PrefixCache(4, SIZE, "m", enabled=False)
    publish(cache, [1, 2, 3, 4])
    assert cache.match(cache.root(""), [1, 2, 3, 4, 5]) == []


@given(st.lists(st.integers(0, 4), max_size=60), st.integers(1, 6))
def test_pool_counts_holders(choices: list[int], size: int) -> None:
    pool = BlockPool(size)
    tables: list[list[int]] = []
    for choice in choices:
        if choice == 0 and pool.available:
            tables.append(pool.allocate(1 + choice % pool.available))
        elif choice == 1 and tables:
            pool.share(tables[-1][0])
            tables.append([tables[-1][0]])
        elif choice == 2 and tables:
            pool.keep(tables[0][0])
        elif choice >= 3 and tables:
            pool.release(tables.pop(choice % len(tables)))
        pool.check_integrity(tables)
    for table in tables:
        pool.release(table)
    assert pool.available == size
    with pytest.raises(ValueError, match="available"):
        pool.allocate(size + 1)


NO_POLICIES = (
    *("", "fuse", "fused:", "serial:1", "static", "static:0", "static:x", "static:-1", "static:" + "9" * 5000),
    *("window:", "window:-5", "window:1e9", "window:nan"),
)


@pytest.mark.parametrize("text", NO_POLICIES)
def test_policies_that_do_not_exist_are_refused(text: str) -> None:
    with pytest.raises(InvalidParameter, match=r"policy: got .*allowed: fused, serial, static:B"):
        parse_policy(text)


def commit(scheduler: Scheduler, plan: StepPlan, token: int = 1, seconds: float = 0.0) -> None:
    outs = tuple(RowOut(row.row, (token,) if row.sample else ()) for row in plan.rows)
    scheduler.commit(StepResult(plan.step, outs), 0.0, seconds)


def test_the_youngest_gives_way_and_the_oldest_never_waits() -> None:
    capacity = Capacity(blocks=6, block_size=4, max_rows=3, max_tokens=30)
    scheduler = Scheduler(capacity, 24, frozenset(), parse_policy("fused"), PrefixCache(6, 4, "m", enabled=False))
    for name in ("old", "middle", "young"):
        scheduler.add(Request(name, (1, 2, 3), SamplingParams(max_tokens=20)))
    served: list[list[int]] = []
    while scheduler.stats.preemptions < 2:
        plan = scheduler.plan(0.0)
        assert plan is not None
        served.append(sorted(row.row for row in plan.rows))
        scheduler.check_integrity()
        commit(scheduler, plan)
    first_row = served[0][0]
    assert all(first_row in rows for rows in served), "the oldest computes at every step"
    assert len(served[-1]) == 1
    preempted_first = next(rows for rows in served if len(rows) == 2)
    assert preempted_first == served[0][:2], "of three, the youngest went first"


def test_a_policy_changes_only_while_nothing_runs() -> None:
    capacity = Capacity(blocks=6, block_size=4, max_rows=3, max_tokens=30)
    scheduler = Scheduler(capacity, 24, frozenset(), parse_policy("fused"), PrefixCache(6, 4, "m"))
    scheduler.use_policy(parse_policy("serial"))
    scheduler.add(Request("a", (1,), SamplingParams(max_tokens=1)))
    with pytest.raises(ValueError, match="nothing runs"):
        scheduler.use_policy(parse_policy("fused"))
    with pytest.raises(ValueError, match="in use"):
        scheduler.add(Request("a", (1,), SamplingParams()))


def test_a_scheduler_that_could_stand_still_for_ever_is_refused() -> None:
    cache = PrefixCache(2, 4, "m")
    with pytest.raises(ValueError, match="max_rows"):
        Scheduler(Capacity(2, 4, 8, 7), 8, frozenset(), parse_policy("fused"), cache)
    with pytest.raises(ValueError, match="max_model_len"):
        Scheduler(Capacity(2, 4, 8, 8), 9, frozenset(), parse_policy("fused"), cache)


# ---------------------------------------------------------------- pace

WANTED_S = 0.1


@given(
    fixed_s=st.floats(0.0, 0.09),
    each_s=st.floats(1e-6, 2e-3),
    decoding=st.integers(0, 15),
    noise=st.lists(st.floats(0.5, 1.5), max_size=30),
)
def test_steps_come_to_take_the_wanted_time(fixed_s: float, each_s: float, decoding: int, noise: list[float]) -> None:
    """Whatever the machine, and whatever disturbed it before, when one prompt is computed beside rows that decode."""
    pace = Pace(WANTED_S, most=512, chunk=16)
    for factor in noise:
        tokens = pace.budget(1 + decoding)
        pace.measured(tokens, (fixed_s + each_s * tokens) * factor)
    # Where nearly all of a step is fixed, each step may only be a little larger than the one before.
    for _ in range(40):
        tokens = pace.budget(1 + decoding)
        assert 1 + decoding < tokens <= 512
        seconds = fixed_s + each_s * tokens
        pace.measured(tokens, seconds)
    least = 1 + decoding + 16
    assert tokens == least or seconds <= 1.25 * WANTED_S
    best = min(512, (WANTED_S - fixed_s) / each_s)
    assert tokens >= min(max(least, 0.7 * best), 512) - 1, "no smaller than need be"


def test_a_short_or_a_slow_step_does_not_spoil_the_pace() -> None:
    pace = Pace(WANTED_S, most=512, chunk=16)
    pace.measured(256, 0.1)
    pace.measured(4, 0.02)  # mostly the reading of weights: says nothing of large steps
    assert pace.budget(4) == 256
    pace.measured(4, 3.0)  # the machine was stopped
    assert pace.budget(4) == 20
    pace.measured(20, 0.03)
    pace.measured(66, 0.04)
    assert pace.budget(4) > 128
    pace.measured(100, 0.0)
    with pytest.raises(ValueError, match="step_seconds"):
        Pace(0.0, 512, 16)


def test_a_small_budget_still_serves_every_row() -> None:
    """A machine on which no step is as short as wanted: everyone decodes at every step, and the prompt gets on."""
    capacity = Capacity(blocks=64, block_size=4, max_rows=8, max_tokens=64)
    cache = PrefixCache(64, 4, "m", enabled=False)
    scheduler = Scheduler(capacity, 128, frozenset(), parse_policy("fused"), cache, step_seconds=0.001)
    for name in "abcdef":
        scheduler.add(Request(name, (1, 2), SamplingParams(max_tokens=40)))
    scheduler.add(Request("long", tuple(range(1, 101)), SamplingParams(max_tokens=1)))
    steps = 0
    while "long" in scheduler:
        plan = scheduler.plan(0.0)
        assert plan is not None
        scheduler.check_integrity()
        assert steps == 0 or sum(row.length for row in plan.rows) <= 7 + 8
        assert len(plan.rows) == 7
        commit(scheduler, plan, seconds=0.5)
        steps += 1
    assert steps <= 1 + 100 // 9


# ---------------------------------------------------------------- time in the queue


@pytest.mark.parametrize("again", [False, True])
def test_who_waits_too_long_for_a_place_ends(again: bool) -> None:
    """The clock counts until the first time it joins; preempted later, it may wait."""
    capacity = Capacity(blocks=6, block_size=4, max_rows=3, max_tokens=30)
    scheduler = Scheduler(capacity, 24, frozenset(), parse_policy("serial"), PrefixCache(6, 4, "m"))
    scheduler.add(Request("first", (1, 2, 3), SamplingParams(max_tokens=9), join_by_s=5.0))
    scheduler.add(Request("second", (1, 2, 3), SamplingParams(max_tokens=2), join_by_s=5.0, deadline_s=50.0))
    for now_s in (0.0, 4.9):
        plan = scheduler.plan(now_s)
        assert plan is not None
        commit(scheduler, plan)
    if again:
        scheduler.recover()
    assert {event.request_id for event in scheduler.take_events()} == {"first"}
    plan = scheduler.plan(5.0)
    assert plan is not None
    commit(scheduler, plan)
    (event, *_) = scheduler.take_events()
    assert isinstance(event, ErrorEvent) and (event.request_id, event.code) == ("second", "queue_timeout")
    assert scheduler.unfinished == ("first",)
    scheduler.check_integrity()


def test_a_window_is_left_in_time_to_end_who_waits_too_long() -> None:
    scheduler = Scheduler(Capacity(6, 4, 3, 30), 24, frozenset(), parse_policy("window:900"), PrefixCache(6, 4, "m"))
    scheduler.add(Request("a", (1,), SamplingParams(), join_by_s=0.5))
    assert scheduler.wake_s() == 0.5
    scheduler.plan(0.5)
    assert [type(event) for event in scheduler.take_events()] == [ErrorEvent]
    assert scheduler.wake_s() is None


# ---------------------------------------------------------------- a leak


def test_blocks_that_got_lost_are_found_when_nobody_holds_any() -> None:
    """A bug would cost blocks until a restart, or, with a check that raises, the engine."""
    cache = PrefixCache(8, 4, "m")
    scheduler = Scheduler(Capacity(8, 4, 3, 30), 32, frozenset(), parse_policy("fused"), cache)
    lost = cache.pool.allocate(2)
    for name in ("a", "b"):
        scheduler.add(Request(name, (1, 2, 3, 4, 5), SamplingParams(max_tokens=2)))
    while scheduler.has_work:
        plan = scheduler.plan(0.0)
        assert plan is not None
        if scheduler.num_running == 2:
            assert scheduler.stats.leaks == 0
        commit(scheduler, plan)
    assert lost and scheduler.stats.leaks == 1
    assert cache.pool.available == 8 and cache.pool.num_held == 0
    scheduler.check_integrity()
    assert cache.match(cache.root(""), [1, 2, 3, 4, 5]) == [], "nothing is trusted that was there"
