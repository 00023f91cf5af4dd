"""Flover's identities on the iteration clock, by the real scheduler, and its published tables."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from statistics import fmean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.compare.flover import identities, published
from headrace.compare.flover.clock import (
    VOCAB,
    CountingBackend,
    IterationClock,
    capacity_for,
    count,
    count_instances,
    engine,
    iteration_workload,
)
from headrace.compare.flover.plan import clock_arrivals, shapes
from headrace.compare.flover.published import EXPERIMENT_1, EXPERIMENT_2, EXPERIMENT_3, EXPERIMENT_4, Mark
from headrace.compare.flover.trace import (
    area,
    check_admission,
    check_busy,
    check_ends,
    check_one_token_each,
    check_overlap,
    check_window,
    completions_csv,
    fused_checks,
    mean_in_flight,
    progress,
    progress_csv,
    token_iterations,
)
from headrace.compare.methods import Outcome
from headrace.compare.methods.admission import play
from headrace.core.types import Capacity, EngineLimits, StepResult
from headrace.engine.core import EngineCore
from headrace.sched.policy import Fused, StaticBatch, TimeWindow
from headrace.sched.prefix import PrefixCache
from headrace.sched.scheduler import Scheduler
from headrace.testing.fake import FakeBackend, answer

TRACES = st.lists(st.tuples(st.integers(0, 40), st.integers(1, 12)), min_size=1, max_size=8)


def ends_of(outcome: Outcome) -> tuple[float, ...]:
    return tuple(one.end_s for one in outcome.requests)


def parted(trace: list[tuple[int, int]]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Arrivals in order, lengths."""
    return tuple(sorted(at for at, _ in trace)), tuple(length for _, length in trace)


def serial() -> StaticBatch:
    return StaticBatch("serial", 1)


def test_the_picture_of_the_demo() -> None:
    lengths = published.DEMO_LENGTHS
    arrivals = [round(published.DEMO_GAP * index) for index in range(len(lengths))]
    assert (len(lengths), sum(lengths)) == (32, 10_921)
    found = count(iteration_workload(arrivals, lengths), Fused())
    assert len(found.iterations) == published.DEMO_ITERATIONS == identities.busy_iterations(arrivals, lengths)
    assert max(one.in_flight for one in found.iterations) == published.DEMO_PEAK
    assert identities.peak_in_flight(arrivals, lengths) == published.DEMO_PEAK
    assert mean_in_flight(found) == pytest.approx(7.18, abs=0.005)
    assert identities.end_order(ends_of(found)) == tuple(published.DEMO_ORDER)
    assert all(check.holds for check in fused_checks(found))


def test_the_example_of_the_slides() -> None:
    """In iterations of a tenth of a second."""
    arrivals, needs, ends = zip(*published.SLIDE_EXAMPLE, strict=True)
    found = count(iteration_workload([round(10 * at) for at in arrivals], [round(10 * one) for one in needs]), Fused())
    assert [end / 10 for end in ends_of(found)] == pytest.approx(ends)


@given(TRACES)
def test_ends_of_every_scheduler(trace: list[tuple[int, int]]) -> None:
    arrivals, lengths = parted(trace)
    workload = iteration_workload(arrivals, lengths)
    fused = count(workload, Fused())
    assert ends_of(fused) == identities.fused_ends(arrivals, lengths)
    assert len(fused.iterations) == identities.busy_iterations(arrivals, lengths)
    assert mean_in_flight(fused) == pytest.approx(identities.mean_overlap(lengths, len(fused.iterations)))
    assert all(check.holds for check in fused_checks(fused))
    one_by_one = count(workload, serial())
    assert ends_of(one_by_one) == identities.serial_ends(arrivals, lengths)
    instances = count_instances(workload, len(lengths))
    assert max(ends_of(instances)) == one_by_one.seconds, "turns waste nothing"
    for other in (one_by_one, instances, count(workload, StaticBatch("static:3", 3))):
        assert other.outputs == fused.outputs and other.seconds >= fused.seconds


@given(TRACES, st.integers(0, 20))
def test_windows(trace: list[tuple[int, int]], window: int) -> None:
    arrivals, lengths = parted(trace)
    workload = iteration_workload(arrivals, lengths)
    found = count(workload, TimeWindow("window", window))
    assert ends_of(found) == identities.window_ends(arrivals, lengths, window)
    assert check_window(found, window).holds
    assert not check_window(found, window + 100).holds
    assert found.outputs == count(workload, Fused()).outputs


def test_a_window_that_holds_all_is_a_static_batch_after_it() -> None:
    found = count(iteration_workload((0, 3, 9), (5, 7, 2)), TimeWindow("window", 10))
    assert ends_of(found) == (15, 17, 12)
    assert {one.first_token_s for one in found.requests} == {11}


def test_instances_take_turns() -> None:
    """Two at once get a token each in two iterations; with room for one, the second waits."""
    workload = iteration_workload((0, 0), (3, 3))
    both, one = (count_instances(workload, most) for most in (2, 1))
    assert [one.token_s for one in both.requests] == [(1, 3, 5), (2, 4, 6)]
    assert [one.token_s for one in one.requests] == [(1, 2, 3), (4, 5, 6)]
    assert {one.in_flight for one in both.iterations} == {1} and len(both.iterations) == 6


@pytest.mark.parametrize("policy", [Fused, serial, lambda: TimeWindow("window", 6)])
def test_the_fake_backend_says_the_same(policy: Callable[[], Fused | StaticBatch | TimeWindow]) -> None:
    """It checks every law of a plan, and computes its tokens from what lies in the blocks."""

    class Ticking(FakeBackend):
        def result(self) -> StepResult:
            clock.tick()
            return super().result()

    workload = iteration_workload((0, 4, 5, 5, 60), (20, 7, 19, 1, 9))
    clock = IterationClock()
    backend = Ticking(VOCAB)
    backend.open(capacity_for(workload, 5))
    found = play(engine(workload, 5, policy(), backend, clock), workload, "fake", clock, clock.sleep)
    assert ends_of(found) == ends_of(count(workload, policy()))
    lengths = [one.max_tokens for one in workload.requests]
    expected = [answer(prompt, VOCAB, most) for prompt, most in zip(workload.prompts, lengths, strict=True)]
    assert [list(output) for output in found.outputs] == expected


@pytest.mark.parametrize("requests", published.COUNTS)
def test_total_time_is_one_request_and_the_arrivals(requests: int) -> None:
    """T(N) = L + gap (N - 1), on the clock: gaps of 44 iterations, 512 each."""
    arrivals = [44 * index for index in range(requests)]
    assert count(iteration_workload(arrivals, (512,) * requests), Fused()).seconds == 512 + 44 * (requests - 1)


# ------------------------------------------------------------ what a check must notice

FOUND = count(iteration_workload((0, 2, 40), (5, 9, 3)), Fused())


def test_a_trace_that_is_right() -> None:
    assert [one.holds for one in fused_checks(FOUND)] == [True] * 5
    assert token_iterations(FOUND) == (tuple(range(5)), tuple(range(2, 11)), (11, 12, 13))


def test_a_token_that_was_left_out_is_noticed() -> None:
    first = FOUND.requests[0]
    late = replace(first, token_s=(*first.token_s[:-1], first.token_s[-1] + 1))
    broken = replace(FOUND, requests=(late, *FOUND.requests[1:]))
    assert not check_ends(broken).holds and "requests 0" in check_ends(broken).detail
    assert not check_one_token_each(broken).holds


def test_an_iteration_for_nothing_is_noticed() -> None:
    broken = replace(FOUND, iterations=(*FOUND.iterations, replace(FOUND.iterations[-1], end_s=99.0)))
    assert not check_busy(broken).holds and not check_one_token_each(broken).holds


def test_a_wrong_count_of_requests_in_flight_is_noticed() -> None:
    more = tuple(replace(one, in_flight=one.in_flight + 1) for one in FOUND.iterations)
    assert not check_overlap(replace(FOUND, iterations=more)).holds
    assert not check_one_token_each(replace(FOUND, iterations=more)).holds


def test_a_request_that_was_kept_waiting_is_noticed() -> None:
    waited = replace(FOUND.requests[1], arrival_s=0.5)
    found = check_admission(replace(FOUND, requests=(FOUND.requests[0], waited, FOUND.requests[2])))
    assert not found.holds and found.detail == "most waited for: 2"


def test_progress() -> None:
    found = count(iteration_workload((0, 2), (2, 2)), Fused())
    assert progress(found) == ((1, 0.25), (2, 0.5), (3, 0.75), (4, 1.0))
    assert area(found, 4) == pytest.approx((0.25 + 0.5 + 0.75) / 4)
    late = count(iteration_workload((0, 2), (2, 2)), TimeWindow("window", 2))
    assert area(late, 6) < area(found, 6)
    assert progress_csv({"fused": found}).splitlines()[:2] == ["method,t,fraction", "fused,1.000000,0.250000"]
    assert completions_csv({"fused": found}).splitlines()[1:] == [
        "fused,0,0.000000,1.000000,2.000000,2",
        "fused,1,2.000000,3.000000,4.000000,2",
    ]


# ------------------------------------------------------------ experiment 3 by simulation


@pytest.mark.parametrize("gap_ms", published.LAMBDAS)
def test_simulated_iterations(gap_ms: int) -> None:
    gap = gap_ms / published.ITERATION_MS
    found = identities.simulate_busy(32, 512, gap, 1000, gap_ms)
    assert found.mean == pytest.approx(EXPERIMENT_3["simulated iterations, mean"].values[gap_ms], rel=0.01)
    assert found.mean == pytest.approx(identities.expected_busy(32, 512, gap), rel=0.01)
    assert found.sd == pytest.approx(EXPERIMENT_3["simulated iterations, sd"].values[gap_ms], rel=0.1, abs=1)
    assert abs(found.deviations(EXPERIMENT_3["total iterations"].values[gap_ms])) <= 2


@pytest.mark.parametrize("shape", shapes(3)[::4], ids=lambda shape: shape.label)
def test_the_simulation_is_the_scheduler(shape: object) -> None:
    for seed in range(2):
        arrivals, lengths = clock_arrivals(shape, seed)  # type: ignore[arg-type]
        found = count(iteration_workload(arrivals, lengths), Fused())
        assert len(found.iterations) == identities.busy_iterations(arrivals, lengths)
        overlap = identities.overlap_percent(mean_in_flight(found), 32)
        worked_out = identities.overlap_percent(identities.mean_overlap(lengths, len(found.iterations)), 32)
        assert overlap == pytest.approx(worked_out, abs=0.1)


# ------------------------------------------------------------ the published tables


def test_published_times_follow_the_law() -> None:
    for model, expected in zip(published.MODELS, (21.1, 24.6, 29.1, 26.3), strict=True):
        values = EXPERIMENT_1[model].values
        assert values[1] + 0.5 * 31 == pytest.approx(expected, abs=0.01)
        assert values[32] == pytest.approx(expected, rel=0.05)


def test_published_throughput_is_tokens_over_time() -> None:
    for model, expected in zip(published.MODELS, (773, 658, 541, 602), strict=True):
        rate = 32 * 512 / EXPERIMENT_1[model].values[32]
        assert rate == pytest.approx(expected, abs=0.6)
        assert EXPERIMENT_2[f"{model}, throughput"].values[32] == pytest.approx(rate, rel=0.01)


def test_published_latencies_have_the_slides_means() -> None:
    series = [EXPERIMENT_2[f"{model}, latency"].values for model in published.MODELS]
    assert fmean(one[8] for one in series) == pytest.approx(1.0275)
    assert fmean(one[32] for one in series) == pytest.approx(1.08)


def test_published_overlap_is_mean_over_32() -> None:
    for gap, percent in EXPERIMENT_3["overlap"].values.items():
        mean = EXPERIMENT_3["mean overlapped"].values[gap]
        assert identities.overlap_percent(mean, 32) == pytest.approx(percent, abs=0.25)


def test_published_gains_are_the_ratios_of_the_times() -> None:
    for model in ("LLaMA 13B", "LLaMA 65B"):
        for longest in published.LONGEST:
            tidy = EXPERIMENT_4[f"{model}, shuffle"].values[longest]
            gain = EXPERIMENT_4[f"{model}, no shuffle"].values[longest] / tidy
            over = EXPERIMENT_4[f"{model}, instances"].values[longest] / tidy
            assert EXPERIMENT_4[f"{model}, shuffle gain"].values[longest] == pytest.approx(gain, abs=0.0006)
            assert EXPERIMENT_4[f"{model}, over instances"].values[longest] == pytest.approx(over, abs=0.06)


def test_marks() -> None:
    marks = {one.mark for experiment in published.EXPERIMENTS.values() for one in experiment.series}
    assert marks == set(Mark) and {str(mark) for mark in marks} == {"read", "read ≈", "derived"}
    assert list(published.EXPERIMENTS) == [1, 2, 3, 4, 5, 6, 7]
    with pytest.raises(KeyError):
        EXPERIMENT_1["GPT-4"]


def test_the_counting_backend_computes_the_same_after_a_preemption() -> None:
    """Three requests of three blocks in five blocks."""
    workload = iteration_workload((0, 0, 0), (40, 40, 40))
    clock = IterationClock()
    capacity = Capacity(blocks=5, block_size=16, max_rows=3, max_tokens=64)
    cache = PrefixCache(capacity.blocks, capacity.block_size, "few", enabled=False)
    scheduler = Scheduler(capacity, 48, frozenset(), Fused(), cache)
    core = EngineCore(CountingBackend(clock.tick), scheduler, EngineLimits(VOCAB, 48), clock)
    found = play(core, workload, "few", clock, clock.sleep)
    assert found.preemptions > 0 and found.outputs == count(workload, serial()).outputs
