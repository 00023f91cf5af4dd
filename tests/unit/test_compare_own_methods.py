"""Methods of ours that plan by themselves, on a backend computed by hand; and how methods are named."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.compare.methods import Outcome, instances
from headrace.compare.methods.bench import Bench
from headrace.compare.methods.registry import KINDS, check_names, known, make_method
from headrace.compare.workloads import Workload, WorkloadRequest
from headrace.core.config import ResolvedConfig
from headrace.core.errors import ConfigError, EngineError, InvalidParameter, OutOfMemory
from headrace.core.types import Capacity, EngineLimits, StepPlan
from headrace.engine.core import EngineCore
from headrace.engine.model import OpenModel
from headrace.sched.policy import parse_policy
from headrace.sched.prefix import PrefixCache
from headrace.sched.scheduler import Scheduler
from headrace.testing.fake import FakeBackend, answer
from tests.unit.test_compare_methods import Ticks

VOCAB = 61
CONTEXT = 64
CAPACITY = Capacity(blocks=48, block_size=4, max_rows=4, max_tokens=8)
EXACT = ("serial", "dataloader", "dataloader:2", "threads", "threads:2", "no-kv-cache")


class HandBackend(FakeBackend):
    """Counts what it is asked, and may break down."""

    def __init__(
        self, poison: frozenset[int] = frozenset(), breaks_at: int | None = None, threads: int | None = None
    ) -> None:
        """`threads`: so many have to be there before the first step; each step then takes a moment."""
        super().__init__(VOCAB, poison=poison)
        self.threads = threads
        self.open(CAPACITY)
        self.plans: list[StepPlan] = []
        self.breaks_at = breaks_at
        self.closed = 0

    def submit(self, plan: StepPlan) -> None:
        self.plans.append(plan)
        if len(self.plans) == self.breaks_at:
            raise RuntimeError("on purpose")
        while self.threads is not None and threading.active_count() < self.threads:
            time.sleep(0.001)
        if self.threads is not None:
            time.sleep(0.02 if self.threads else 0.001)
            self.threads = 0
        super().submit(plan)

    def reset(self) -> None:
        """Whoever comes next numbers steps from 0 again."""
        super().reset()
        self._last_step = -1

    @property
    def rows(self) -> int:
        return len(self._rows)

    def close(self) -> None:
        self.closed += 1
        super().close()


class HandModel:
    """What a bench needs of an open model."""

    def __init__(self, backend: HandBackend, eos_ids: frozenset[int]) -> None:
        self.backend = backend
        self.eos_token_ids = eos_ids
        self.limits = EngineLimits(VOCAB, CONTEXT)
        numbers = (2, "fused", CAPACITY.block_size, CAPACITY.blocks, CONTEXT, CAPACITY.max_rows, CAPACITY.max_tokens)
        self.config = ResolvedConfig("fake", "float32", "none", "float32", "auto", *numbers, False, {})

    def options(self) -> None:
        return None

    def load_backend(self, name: str, options: object) -> tuple[HandBackend, Capacity]:
        return self.backend, CAPACITY

    def engine(self, backend: HandBackend, capacity: Capacity, **more: Any) -> EngineCore:
        cache = PrefixCache(capacity.blocks, capacity.block_size, "fake", enabled=False)
        scheduler = Scheduler(capacity, CONTEXT, self.eos_token_ids, parse_policy("fused"), cache)
        return EngineCore(backend, scheduler, self.limits, **more)


@contextmanager
def hand_bench(
    eos_ids: frozenset[int] = frozenset(), clock: Ticks | None = None, **planted: Any
) -> Iterator[tuple[Bench, HandBackend]]:
    backend = HandBackend(**planted)
    opened = cast("OpenModel", HandModel(backend, eos_ids))
    bench = Bench(opened) if clock is None else Bench(opened, clock, clock.sleep)
    yield bench, backend
    bench.close()


def run(name: str, bench: Bench, asked: Workload) -> Outcome:
    method = make_method(name, bench)
    method.start(asked)
    try:
        return method.run(asked)
    finally:
        method.close()


def workload(*asked: tuple[tuple[int, ...], int, float], ignore_eos: bool = False) -> Workload:
    """Prompts, lengths and arrivals."""
    return Workload("by hand", tuple(WorkloadRequest(*one) for one in asked), ignore_eos)


UNEQUAL = workload(((1, 2, 3), 9, 0.0), ((4,), 2, 0.0), (tuple(range(1, 20)), 5, 0.0), ((7, 7), 6, 0.0))
"""One of its prompts takes three steps."""


def by_hand(asked: Workload, eos_ids: frozenset[int] = frozenset()) -> tuple[tuple[int, ...], ...]:
    stop_ids = frozenset() if asked.ignore_eos else eos_ids
    limits = [min(one.max_tokens, CONTEXT - len(one.token_ids)) for one in asked.requests]
    pairs = zip(asked.prompts, limits, strict=True)
    return tuple(tuple(answer(prompt, VOCAB, limit, stop_ids)) for prompt, limit in pairs)


def test_every_method_gives_the_tokens_computed_by_hand_on_one_bench() -> None:
    """One after the other, in two rounds: none leaves a row or a block behind."""
    with hand_bench() as (bench, backend):
        for name in (*EXACT, *reversed(EXACT)):
            found = run(name, bench, UNEQUAL)
            assert found.outputs == by_hand(UNEQUAL), name
            assert {one.finish_reason for one in found.requests} == {"length"}
            assert found.computed_tokens == sum(one.tokens for one in found.iterations)
            assert all(max(len(plan.rows), 1) <= CAPACITY.max_rows for plan in backend.plans)
            for request in found.requests:
                assert list(request.token_s) == sorted(request.token_s) and len(request.token_s) == len(
                    request.token_ids
                )
                assert 0 <= request.ttft_s <= request.latency_s <= found.seconds
            if name != "serial":
                assert backend.rows == 0
    assert backend.closed == 1


def test_what_each_of_them_computes() -> None:
    prompts = [len(prompt) for prompt in UNEQUAL.prompts]
    lengths = [one.max_tokens for one in UNEQUAL.requests]
    once = sum(prompts) + sum(lengths) - len(lengths)
    found = {}
    for name in EXACT:
        threads = {"threads": 4, "threads:2": 2}.get(name)
        with hand_bench(threads=threads and threads + threading.active_count()) as (bench, _):
            found[name] = run(name, bench, UNEQUAL)
    computed = {name: one.computed_tokens for name, one in found.items()}
    assert computed["serial"] == computed["threads"] == computed["threads:2"] == once
    assert computed["dataloader"] == sum(prompts) + 4 * (max(lengths) - 1)
    assert computed["dataloader:2"] == sum(prompts) + 2 * (9 - 1) + 2 * (6 - 1)
    assert computed["no-kv-cache"] == sum(
        count * length + length * (length - 1) // 2 for count, length in zip(prompts, lengths, strict=True)
    )
    assert {one.in_flight for one in found["no-kv-cache"].iterations} == {1}
    assert max(one.in_flight for one in found["threads"].iterations) == 4
    assert max(one.in_flight for one in found["threads:2"].iterations) == 2
    decoding = [one.in_flight for one in found["dataloader"].iterations][-8:]
    assert decoding == [4, 3, 3, 3, 2, 1, 1, 1], "who has ended is computed, and is not in flight"


requests = st.tuples(
    st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=30).map(tuple),
    st.integers(1, 40),
    st.sampled_from([0.0, 0.0, 3.0, 40.0, 500.0]),
)


@given(
    asked=st.lists(requests, min_size=1, max_size=7),
    eos_ids=st.frozensets(st.integers(0, VOCAB - 1), max_size=8),
    ignore_eos=st.booleans(),
    name=st.sampled_from(["dataloader", "dataloader:3", "threads:3", "no-kv-cache"]),
)
def test_any_workload_is_answered_exactly_and_in_time(
    asked: list[tuple[tuple[int, ...], int, float]], eos_ids: frozenset[int], ignore_eos: bool, name: str
) -> None:
    clock = Ticks()
    planned = workload(*sorted(asked, key=lambda one: one[2]), ignore_eos=ignore_eos)
    with hand_bench(eos_ids, clock) as (bench, backend):
        found = run(name, bench, planned)
        assert found.outputs == by_hand(planned, eos_ids)
        assert backend.rows == 0
        serial = run("serial", bench, planned)
    for one, base, wanted in zip(found.requests, serial.requests, planned.requests, strict=True):
        assert one.finish_reason == base.finish_reason
        assert one.arrival_s == wanted.arrival_s < one.first_token_s
    assert found.computed_tokens is not None and serial.computed_tokens is not None
    assert found.computed_tokens >= serial.computed_tokens


def test_a_late_request_waits_for_the_whole_batch() -> None:
    clock = Ticks()
    asked = workload(((1, 2), 20, 0.0), ((3, 4), 2, 0.0), ((5, 6), 2, 6.0), ((7, 8), 2, 2000.0))
    with hand_bench(clock=clock) as (bench, _):
        found = run("dataloader", bench, asked)
    first, second, third, last = found.requests
    assert second.token_s[-1] < first.token_s[-1] and second.end_s == first.end_s, "handed over together"
    assert third.first_token_s > first.end_s
    assert last.first_token_s > 2000 and last.ttft_s < 20 and len(clock.slept) == 1


def test_a_batch_is_no_larger_than_the_kv_cache_and_a_full_row_is_left_out() -> None:
    """48 blocks of 4: a row that may grow to the context of 64 takes 16 of them, so that three fit."""
    asked = workload(*(((1, 2, 3 + number), 100, 0.0) for number in range(4)), ((9,) * 50, 100, 0.0))
    with hand_bench() as (bench, _):
        found = run("dataloader", bench, asked)
    assert found.outputs == by_hand(asked)
    assert [len(output) for output in found.outputs] == [61, 61, 61, 61, 14]
    assert max(one.in_flight for one in found.iterations) == 3
    assert found.computed_tokens == 4 * 63 + 63, "the long prompt's row is full after 14 tokens, and stands still"


def test_threads_take_turns() -> None:
    asked = workload(*(((1, 2, number), 12, 0.0) for number in range(6)))
    with hand_bench(clock=Ticks(), threads=threading.active_count() + 3) as (bench, backend):
        found = run("threads:3", bench, asked)
        assert all(len(plan.rows) == 1 for plan in backend.plans)
        named = {block for plan in backend.plans for step in plan.rows for block in step.new_blocks if step.row == 1}
        assert named <= set(range(16, 32)), "a third of the blocks each"
    first, second, third, fourth = found.requests[:4]
    assert second.first_token_s < first.end_s and third.first_token_s < first.end_s
    assert fourth.first_token_s > min(first.end_s, second.end_s, third.end_s)
    ends = sorted(request.end_s for request in found.requests)
    assert ends[2] - ends[0] < first.latency_s / 2, "who comes together is answered in about the same time"


@pytest.mark.parametrize("name", EXACT)
def test_a_failed_request_is_named_and_leaves_nothing_behind(name: str) -> None:
    asked = workload(((1, 2), 9, 0.0), ((3, 50), 9, 0.0), ((5, 6), 9, 0.0))
    safe = workload(((1, 2), 9, 0.0))
    before = threading.active_count()
    with hand_bench(poison=frozenset({50})) as (bench, _):
        for _ in range(2):
            with pytest.raises(EngineError, match=rf"^{name} request 2 failed \(nan_logits\)"):
                run(name, bench, asked)
            assert threading.active_count() == before
            assert run("fused", bench, safe).outputs == by_hand(safe)
            assert run(name, bench, safe).outputs == by_hand(safe)


@pytest.mark.parametrize("name", ["dataloader", "threads", "no-kv-cache"])
def test_a_backend_that_breaks_down_once_is_the_next_methods_again(name: str) -> None:
    with hand_bench(breaks_at=4) as (bench, backend):
        with pytest.raises(EngineError, match=r"^RuntimeError in the backend: on purpose$"):
            run(name, bench, UNEQUAL)
        assert backend.rows == 0
        for again in (name, "fused"):
            assert run(again, bench, UNEQUAL).outputs == by_hand(UNEQUAL)


@pytest.mark.parametrize("name", ["dataloader", "threads", "no-kv-cache"])
def test_a_prompt_that_does_not_fit_is_refused_before_anything_runs(name: str) -> None:
    with hand_bench() as (bench, backend):
        with pytest.raises(EngineError, match=rf"^{name} request 1 failed \(context_length_exceeded\): .*has 64"):
            run(name, bench, workload(((1,) * 64, 3, 0.0)))
        assert backend.plans == []


def test_ctrl_c_ends_the_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Ticks()
    before = threading.active_count()

    def interrupted(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(clock, "sleep", interrupted)
    with hand_bench(clock=clock) as (bench, backend):
        with pytest.raises(KeyboardInterrupt):
            run("threads", bench, workload(((1, 2), 40, 0.0), ((3, 4), 40, 1e6)))
        assert (threading.active_count(), backend.rows) == (before, 0)


def test_a_number_that_the_engine_has_no_room_for_is_refused_with_its_reason() -> None:
    long = workload(((1, 2), 62, 0.0), ((3, 4), 62, 0.0))
    with hand_bench() as (bench, _):
        for name in ("dataloader:5", "static:5"):
            with pytest.raises(ConfigError, match=rf"^{name}: batches of 5, allowed: up to max_num_seqs, 4$"):
                make_method(name, bench).start(long)
        with pytest.raises(ConfigError, match=r"^threads:4: 4 threads, allowed: up to 3 .*holds 3 requests of 64 tok"):
            make_method("threads:4", bench).start(long)
        many = make_method("threads", bench)
        many.start(workload(*(((1, 2), 62, 0.0) for _ in range(7))))
        assert many.description.startswith("a pool of 3 Python threads") and "no more: the KV cache" in many.description


def test_instances_need_room_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(instances, "kv_bytes", lambda opened, blocks: 2**40)
    wanted = r"^instances: another copy of the model takes 1099512 MB, \d+ MB are free$"
    with hand_bench() as (bench, _), pytest.raises(OutOfMemory, match=wanted):
        make_method("instances", bench).start(UNEQUAL)


def test_an_engine_that_died_is_replaced() -> None:
    with hand_bench() as (bench, backend):
        assert run("fused", bench, UNEQUAL).outputs == by_hand(UNEQUAL)
        dead = bench.core
        dead._die(EngineError("on purpose"), EngineError("on purpose"))
        assert run("fused", bench, UNEQUAL).outputs == by_hand(UNEQUAL) and bench.core is not dead
        bench.close()
        bench.close()
        assert backend.closed == 1


def test_names_and_their_numbers() -> None:
    check_names(["fused", "dataloader", "dataloader:4", "threads:1", "instances:32", "no-kv-cache", "fused-int4"])
    check_names(["llama.cpp:q4_1", "transformers", "vllm:fp32,x=1", "url:http://127.0.0.1:8000/v1"])
    wrong: Mapping[str, str] = {
        "threads:": r"threads\[:K\] \(1 ≤ K ≤ 4096\)",
        "threads:0": r"threads\[:K\] \(1 ≤ K ≤ 4096\)",
        "threads:two": r"threads\[:K\]",
        "threads:٣": r"threads\[:K\]",
        "instances:33": r"instances\[:K\] \(1 ≤ K ≤ 32\)",
        "dataloader:99999999999999999999": r"dataloader\[:B\]",
        "no-kv-cache:2": "no-kv-cache, without a number",
        "vllm:q4_1": "vllm:fp32",
        "vllmx": "a comma-separated list of fused, ",
        "url:": "a comma-separated list of fused, serial, .*llama.cpp",
        "Threads": r"a comma-separated list of fused, serial, static:B .*, dataloader\[:B\], threads\[:K\]",
    }
    for name, allowed in wrong.items():
        with pytest.raises(InvalidParameter, match=f"^methods: got .*, allowed: {allowed}"):
            check_names(["serial", name])


def test_every_method_is_told_in_a_line() -> None:
    lines = known()
    names = [line.split(":")[0].partition("[")[0] for line in lines]
    assert names == ["serial", "fused", "static", "window", *KINDS, "ENGINE", "url"]
    assert all("\n" not in line and "{" not in line for line in lines)
    assert "static:B: up to B requests start together" in lines[2]
