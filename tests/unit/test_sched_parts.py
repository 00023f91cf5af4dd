"""Block pool, prefix cache, policies and preemption order, each alone."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.core.errors import InvalidParameter
from headrace.core.types import Capacity, ImageSpan, Request, RowOut, SamplingParams, StepPlan, StepResult
from headrace.sched.blocks import BlockPool
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


def commit(scheduler: Scheduler, plan: StepPlan, token: int = 1) -> None:
    outs = tuple(RowOut(row.row, (token,) if row.sample else ()) for row in plan.rows)
    scheduler.commit(StepResult(plan.step, outs), 0.0)


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
