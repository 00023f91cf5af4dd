"""Methods of `headrace compare` on a backend computed by hand, and the rounds they run in."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

import pytest

from headrace.compare.measure import run_rounds
from headrace.compare.methods import Outcome, with_base
from headrace.compare.methods.admission import play
from headrace.compare.methods.registry import check_names
from headrace.compare.workloads import Workload, WorkloadRequest, from_manifest
from headrace.core.errors import EngineError, InvalidParameter
from headrace.core.types import Capacity, EngineLimits
from headrace.engine.core import EngineCore
from headrace.sched.policy import parse_policy
from headrace.sched.prefix import PrefixCache
from headrace.sched.scheduler import Scheduler
from headrace.testing.fake import FakeBackend, answer
from tests.unit.compare_cases import OUTPUTS, PlantedMethod, outcome, workload

VOCAB = 61


def fake_core(poison: frozenset[int] = frozenset(), clock: Callable[[], float] | None = None) -> EngineCore:
    capacity = Capacity(blocks=32, block_size=4, max_rows=4, max_tokens=16)
    backend = FakeBackend(VOCAB, poison=poison)
    backend.open(capacity)
    cache = PrefixCache(capacity.blocks, capacity.block_size, "fake", enabled=False)
    scheduler = Scheduler(capacity, 64, frozenset(), parse_policy("fused"), cache)
    limits = EngineLimits(VOCAB, 64)
    return EngineCore(backend, scheduler, limits) if clock is None else EngineCore(backend, scheduler, limits, clock)


def run(name: str, core: EngineCore, asked: Workload, **more: object) -> Outcome:
    core.use_policy(parse_policy(name))
    return play(core, asked, name, **more)  # type: ignore[arg-type]


class Ticks:
    """A clock that a call moves by one, and a sleep by as much as is slept."""

    def __init__(self) -> None:
        self.now = 0.0
        self.slept: list[float] = []

    def __call__(self) -> float:
        self.now += 1.0
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


def test_names() -> None:
    assert with_base(["fused", "static:4", "fused"]) == ("serial", "fused", "static:4")
    check_names(["serial", "fused", "static:4", "window:50"])
    for wrong in ("", "nonsense", "static", "static:0", "fused:1"):
        with pytest.raises(InvalidParameter, match=r"^methods: got .*allowed: .*serial, static:B"):
            check_names(["serial", wrong])


@pytest.mark.parametrize("name", ["serial", "fused", "static:2", "window:1"])
def test_a_run_gives_the_tokens_computed_by_hand(name: str) -> None:
    asked = workload(4, max_tokens=6)
    core = fake_core()
    for _ in range(2):
        found = run(name, core, asked)
        assert found.outputs == tuple(tuple(answer(prompt, VOCAB, 6)) for prompt in asked.prompts)
        assert len(found.iterations) == {"serial": 24, "static:2": 12}.get(name, 6)
        assert found.computed_tokens == sum(len(prompt) + 5 for prompt in asked.prompts)
        assert found.computed_tokens == sum(one.tokens for one in found.iterations)
        assert {one.in_flight for one in found.iterations} == {{"serial": 1, "static:2": 2}.get(name, 4)}
        for request in found.requests:
            assert len(request.token_s) == 6 and list(request.token_s) == sorted(request.token_s)
            assert 0 <= request.ttft_s <= request.latency_s <= found.seconds
            assert request.finish_reason == "length"


def test_serial_is_a_staircase_and_fused_is_not() -> None:
    clock = Ticks()
    core = fake_core(clock=clock)
    serial = run("serial", core, workload(3), clock=clock)
    fused = run("fused", core, workload(3), clock=clock)
    for before, after in zip(serial.requests, serial.requests[1:], strict=False):
        assert after.first_token_s > before.end_s
    assert len({request.end_s for request in fused.requests}) == 1
    assert fused.seconds < serial.seconds / 2


def test_requests_come_when_they_arrive() -> None:
    """The last one long after the others have ended: nothing is computed meanwhile."""
    clock = Ticks()
    core = fake_core(clock=clock)
    planted = workload(3, max_tokens=4)
    arrivals = (0.0, 7.0, 1000.0)
    requests = tuple(replace(one, arrival_s=at) for one, at in zip(planted.requests, arrivals, strict=True))
    found = run("fused", core, replace(planted, requests=requests), clock=clock, sleep=clock.sleep)
    for request, arrival_s in zip(found.requests, arrivals, strict=True):
        assert request.arrival_s == arrival_s < request.first_token_s
    assert found.requests[1].first_token_s < found.requests[0].end_s  # it joined a batch that was running
    assert found.requests[2].ttft_s < 20 and len(clock.slept) == 1
    assert found.outputs == tuple(tuple(answer(prompt, VOCAB, 4)) for prompt in planted.prompts)


def test_a_failed_question_ends_the_run_and_leaves_the_engine_usable() -> None:
    core = fake_core(poison=frozenset({4}))
    with pytest.raises(EngineError, match=r"serial request 2 failed .nan_logits."):
        run("serial", core, workload(3))
    safe = Workload("safe", (WorkloadRequest((1, 2, 9), 1),))
    assert run("serial", core, safe).outputs == (tuple(answer((1, 2, 9), VOCAB, 1)),)


class Recorder(PlantedMethod):
    def __init__(self, name: str, order: list[tuple[str, int]], dies_in: int | None = None) -> None:
        super().__init__(name)
        self.order = order
        self.dies_in = dies_in

    def run(self, asked: Workload) -> Outcome:
        self.order.append((self.name, asked.max_tokens))
        if self.dies_in is not None and sum(name == self.name for name, _ in self.order) > self.dies_in:
            raise EngineError("its process has ended")
        return outcome(OUTPUTS, 1.0)


def test_rounds_rotate() -> None:
    order: list[tuple[str, int]] = []
    methods = [Recorder(name, order) for name in "abc"]
    runs = run_rounds(methods, workload(2, max_tokens=96), 3, lambda text: None, lambda name, error: None)
    assert order[:3] == [("a", 8), ("b", 8), ("c", 8)]
    assert "".join(name for name, _ in order[3:]) == "abcbcacab"
    assert {name: len(found) for name, found in runs.items()} == {"a": 3, "b": 3, "c": 3}


def test_a_method_that_dies_loses_its_own_row() -> None:
    order: list[tuple[str, int]] = []
    failed: list[tuple[str, str]] = []
    methods = [Recorder("a", order), Recorder("b", order, dies_in=2), Recorder("c", order, dies_in=0)]
    runs = run_rounds(methods, workload(2), 3, lambda text: None, lambda name, error: failed.append((name, str(error))))
    assert failed == [("c", "its process has ended"), ("b", "its process has ended")]
    assert {name: len(found) for name, found in runs.items()} == {"a": 3}
    assert [name for name, _ in order].count("c") == 1


def test_a_manifest_gives_the_workload_again() -> None:
    asked = Workload(
        "some", (WorkloadRequest((1, 2), 3, 0.25, "t", "x"), WorkloadRequest((4,), 5, 0.5)), True, True, 7, ("cut",)
    )
    again = from_manifest(json.loads(json.dumps(asked.manifest())))
    assert again == asked and again.sha256 == asked.sha256
    other = replace(asked, requests=(replace(asked.requests[0], arrival_s=0.5), asked.requests[1]))
    assert other.sha256 != asked.sha256
    assert replace(asked, name="other", notes=()).sha256 == asked.sha256
