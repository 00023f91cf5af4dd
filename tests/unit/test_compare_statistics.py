"""When a method may be called faster: intervals, p-values and the noise floor, on planted times."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.compare.measure import (
    Claim,
    batching_bound,
    energy_difference,
    judge,
    passes_for,
    passes_of,
    time_method,
    typical,
)
from headrace.compare.methods import Outcome
from headrace.compare.statistics import (
    claim_level,
    few_agree,
    log_ratios,
    noise_floor,
    sign_flip_p,
    weigh,
)
from tests.unit.compare_cases import OUTPUTS, outcome


def rounds(seconds: Sequence[float]) -> tuple[Outcome, ...]:
    return tuple(outcome(OUTPUTS, value) for value in seconds)


class TestFewRounds:
    def test_clear_differences_are_claimed(self) -> None:
        assert judge([3.0, 3.1, 3.0], [1.0, 1.1, 1.0]) is Claim.FASTER
        assert judge([1.0, 1.1, 1.0], [3.0, 3.1, 3.0]) is Claim.SLOWER
        # Every pair says faster; with three rounds the times must not overlap either, with five the pairs are enough.
        assert judge([1.0, 2.0, 3.0], [0.9, 1.9, 2.9]) is Claim.SAME
        assert judge([1.0, 2.0, 3.0, 4.0, 5.0], [0.9, 1.9, 2.9, 3.9, 4.9]) is Claim.FASTER

    @pytest.mark.parametrize("repeats", [3, 5, 7])
    def test_one_round_against_is_enough_to_claim_nothing(self, repeats: int) -> None:
        assert judge([3.0] * (repeats - 1) + [1.0], [1.0] * (repeats - 1) + [1.01]) is Claim.SAME

    def test_few_rounds_tell_nothing(self) -> None:
        assert judge([9.0], [1.0]) is Claim.TOO_FEW
        assert judge([9.0, 9.0], [1.0, 1.0]) is Claim.TOO_FEW

    def test_the_level_is_the_best_that_so_many_rounds_can_reach(self) -> None:
        levels = [claim_level(count) for count in range(1, 16)]
        assert levels == [None, None, *[0.05] * 5, *[0.01] * 8]
        clear = np.full(7, 0.5)
        assert sign_flip_p(clear) > 0.01 >= sign_flip_p(np.full(8, 0.5))


class TestJudge:
    def test_equal_times_are_no_difference(self) -> None:
        for count in (5, 12):
            assert judge([1.0] * count, [1.0] * count) is Claim.SAME
            assert judge([0.0] * count, [0.0] * count) is Claim.SAME

    def test_clear_differences_are_claimed_both_ways(self) -> None:
        base = [1.0, 1.01, 0.99, 1.02, 1.0, 1.01, 0.98, 1.0, 1.01, 0.99]
        slow = [value * 1.1 for value in base]
        assert judge(base, slow) is Claim.SLOWER and judge(slow, base) is Claim.FASTER

    def test_a_difference_below_the_noise_floor_is_none(self) -> None:
        """Every pair says 2 %, but the base's own rounds go up and down by 30 %: p is small, the floor is not."""
        base = [1.0, 1.3] * 6
        other = [value * 0.98 for value in base]
        evidence = weigh(base, other)
        assert evidence.p_value <= 0.01 and evidence.interval[0] > 1
        assert evidence.floor > 1.2 and judge(base, other) is Claim.SAME
        steady = [1.0, 1.001] * 6
        assert judge(steady, [value * 0.98 for value in steady]) is Claim.FASTER

    def test_a_slow_drift_is_not_noise(self) -> None:
        base = [1.0 + 0.05 * index for index in range(12)]
        assert noise_floor(base) < 1.06
        assert judge(base, [value * 0.8 for value in base]) is Claim.FASTER

    def test_half_of_the_rounds_against_is_no_difference(self) -> None:
        assert judge([1.0] * 10, [1.2, 0.8] * 5) is Claim.SAME

    @pytest.mark.parametrize("repeats", [3, 4, 5, 8, 10])
    def test_a_method_against_itself_is_called_faster_no_oftener_than_its_level(self, repeats: int) -> None:
        rng = random.Random(7)
        trials = 4000
        times = lambda: [rng.lognormvariate(0, 0.05) for _ in range(repeats)]  # noqa: E731
        claims = sum(judge(times(), times()) is Claim.FASTER for _ in range(trials))
        assert claims / trials <= {0.05: 0.06, 0.01: 0.01}[claim_level(repeats) or 0.0]

    def test_figures(self) -> None:
        base, other = rounds([4.0, 6.0, 5.0]), rounds([2.0, 2.0, 1.0])
        timing = time_method(other, base)
        assert timing.ratios == (2.0, 3.0, 5.0)
        assert (timing.ratio.median, timing.ratio.low, timing.ratio.high) == (3.0, 2.0, 5.0)
        assert timing.output_tokens_per_s == 7 / 2
        assert timing.evidence is not None and timing.evidence.ratio == pytest.approx(3.0)
        assert timing.evidence.interval == pytest.approx((2.0, 5.0)) and timing.evidence.level == 0.05
        alone = time_method(base, base)
        assert alone.claim is Claim.BASE and alone.evidence is None
        assert batching_bound([10, 10, 10, 10]) == 4
        assert batching_bound([20, 10]) == 1.5


def heavy(rng: random.Random) -> float:
    """A run of 1 s on a machine that others use: one in ten is disturbed, some of them much."""
    disturbed = rng.expovariate(1 / 0.3) if rng.random() < 0.1 else 0.0
    return rng.lognormvariate(0, 0.02) + disturbed


def drifting(rng: random.Random, index: int) -> float:
    """The machine becomes slower and quicker in waves of 20 %, each within 20 rounds."""
    return heavy(rng) * (1.25 + 0.25 * math.sin(index / 30))


def trial(rng: random.Random, slowed: float, time: Callable[[int], float], passes: int = 3, pairs: int = 10) -> Claim:
    """A comparison as `run_rounds` makes it, on a simulated clock: rounds of short runs, there and back."""
    rounds: dict[str, list[list[float]]] = {"base": [], "other": []}
    count = itertools.count()
    for index in range(pairs):
        order = ("base", "other") if index % 2 == 0 else ("other", "base")
        found: dict[str, list[float]] = {"base": [], "other": []}
        for _ in range(passes):
            for name in order:
                found[name].append(time(next(count)) * (slowed if name == "other" else 1.0))
            order = order[::-1]
        for name, runs in found.items():
            rounds[name].append(runs)
    base, other = ([sorted(runs)[passes // 2] for runs in rounds[name]] for name in ("base", "other"))
    return judge(base, other, rounds["base"])


class TestOnASimulatedClock:
    """100 trials of 10 pairs, as `tests.robustness.statistics` does it with real runs."""

    @pytest.mark.parametrize("noise", ["heavy", "drifting", "jumping"])
    def test_false_alarms_and_finds(self, noise: str) -> None:
        rng = random.Random(11)
        time = {
            "heavy": lambda index: heavy(rng),
            "drifting": lambda index: drifting(rng, index),
            "jumping": lambda index: heavy(rng) * (1.0, 2.2, 1.3, 3.0)[index // 10 % 4],
        }[noise]
        alarms = sum(trial(rng, 1.0, time, 5) is not Claim.SAME for _ in range(100))
        assert alarms <= 3
        for slowed, least in ((1.1, 95), (1.05, 90)):
            found = sum(trial(rng, slowed, time, 5) is Claim.SLOWER for _ in range(100))
            assert found >= least

    def test_a_single_disturbed_run_in_each_round_does_no_harm(self) -> None:
        rng = random.Random(5)
        time = lambda index: rng.lognormvariate(0, 0.01) + (3.0 if index % 6 == 1 else 0.0)  # noqa: E731
        assert trial(rng, 1.1, time) is Claim.SLOWER


class TestSignFlip:
    def test_by_hand(self) -> None:
        # Ranks 1 to 8. All on one side: that pattern and its opposite, of 256.
        assert sign_flip_p(np.arange(1.0, 9.0)) == 2 / 256
        # The smallest on the other side: 34 of 36 points; all 8, or all but the smallest, either way: 4 patterns.
        assert sign_flip_p(np.array([-1.0, *range(2, 9)])) == 4 / 256
        assert sign_flip_p(np.zeros(9)) == 1.0
        assert sign_flip_p(np.array([1.0, -1.0])) == 1.0

    def test_one_gross_outlier_costs_no_more_than_its_rank(self) -> None:
        d = np.array([0.1 + 0.01 * index for index in range(15)] + [-0.5])
        far = np.array([*d[:15], -9.0])
        assert sign_flip_p(d) == sign_flip_p(far) <= 0.01

    @given(st.lists(st.floats(-1, 1), min_size=1, max_size=9))
    def test_exact_against_every_pattern(self, values: list[float]) -> None:
        d = np.round(np.array(values), 3)
        sizes = np.abs(d)
        ranks = [0.0 if one == 0 else (np.sum(sizes < one) + np.sum(sizes <= one) + 1) / 2 for one in sizes]
        found = abs(sum(rank * np.sign(one) for rank, one in zip(ranks, d, strict=True)))
        patterns = list(itertools.product((-1, 1), repeat=len(d)))
        sums = [abs(sum(rank * sign for rank, sign in zip(ranks, signs, strict=True))) for signs in patterns]
        assert sign_flip_p(d) == sum(one >= found - 1e-9 for one in sums) / len(patterns)

    def test_drawn_patterns_agree_with_the_normal_approximation(self) -> None:
        rng = np.random.default_rng(3)
        d = rng.normal(0.4, 1.0, 40)
        order = np.argsort(np.argsort(np.abs(d))) + 1.0
        z = abs(float(np.sum(order * np.sign(d)))) / math.sqrt(float(np.sum(order**2)))
        assert sign_flip_p(d) == pytest.approx(math.erfc(z / math.sqrt(2)), abs=0.01)
        assert sign_flip_p(np.full(20, 1.0)) == pytest.approx(1 / 20001, rel=3)


class TestInterval:
    def test_covers_the_true_ratio(self) -> None:
        rng = random.Random(1)
        covered = wide = 0
        for _ in range(300):
            base = [rng.lognormvariate(0.0, 0.05) for _ in range(12)]
            other = [rng.lognormvariate(-0.2, 0.05) for _ in range(12)]
            found = weigh(base, other)
            covered += found.interval[0] <= math.exp(0.2) <= found.interval[1]
            wide += found.interval_99[0] <= math.exp(0.2) <= found.interval_99[1]
            assert found.interval_99[0] <= found.interval[0] <= found.ratio <= found.interval[1] <= found.interval_99[1]
        assert covered / 300 >= 0.92 and wide / 300 >= 0.97

    @given(st.lists(st.tuples(st.floats(1e-6, 1e3), st.floats(1e-6, 1e3)), min_size=1, max_size=20))
    def test_the_other_way_round_is_the_inverse(self, pairs: list[tuple[float, float]]) -> None:
        base, other = zip(*pairs, strict=True)
        there, back = weigh(base, other), weigh(other, base)
        assert there.p_value == back.p_value
        assert there.ratio == pytest.approx(1 / back.ratio)
        assert there.interval == pytest.approx((1 / back.interval[1], 1 / back.interval[0]), rel=1e-6)
        assert there.floor >= 1

    def test_the_same_seconds_always_say_the_same(self) -> None:
        base, other = [1.0, 1.2, 1.1, 0.9], [0.9, 1.0, 1.2, 0.8]
        assert weigh(base, other) == weigh(base, other)

    def test_no_time_at_all_is_a_tick(self) -> None:
        assert np.all(log_ratios([0.0, 0.0], [0.0, 0.0]) == 0)
        assert weigh([1.0], [0.5]).floor == 1.0

    def test_where_rounds_have_several_runs_the_floor_is_that_of_a_round(self) -> None:
        """The machine jumps between rounds, and is steady within them."""
        speeds = [1.0, 2.0] * 5
        passes = [[speed * (1.0 + 0.01 * index) for index in (0, 1, 0, 1, 0)] for speed in speeds]
        base = [sorted(one)[2] for one in passes]
        assert noise_floor(base) > 1.5 and 1 < noise_floor(base, passes) < 1.02
        other = [one * 0.95 for one in base]
        assert judge(base, other) is Claim.SAME and judge(base, other, passes) is Claim.FASTER

    def test_floor_is_that_of_the_base_against_itself(self) -> None:
        rng = random.Random(9)
        inside = 0
        for _ in range(200):
            base, again = ([rng.lognormvariate(0, 0.04) for _ in range(10)] for _ in range(2))
            inside += abs(math.log(weigh(base, again).ratio)) <= math.log(noise_floor(base))
        assert inside / 200 >= 0.9


class TestRoundsOfShortRuns:
    def test_passes(self) -> None:
        assert [passes_for([seconds]) for seconds in (9.0, 0.25, 0.24, 0.1, 0.05, 0.03, 1e-6)] == [1, 1, 3, 3, 5, 9, 9]
        assert passes_for([9.0, 0.1]) == 3 and passes_for([]) == 1

    def test_the_typical_run_is_the_median_one(self) -> None:
        runs = rounds([3.0, 1.0, 2.0, 9.0, 1.5])
        found = typical(runs, runs[0])
        assert found.seconds == 2.0 and found.requests == runs[2].requests
        assert passes_of([found]) == ((3.0, 1.0, 2.0, 9.0, 1.5),) and passes_of([found, runs[0]]) == ()
        assert typical(runs[:1], runs[0]) is runs[0]

    def test_a_run_with_other_tokens_is_never_dropped(self) -> None:
        wrong = outcome(((5, 6, 7, 8), (9, 10, 12)), 9.0)
        found = typical((*rounds([1.0, 2.0]), wrong), rounds([1.0])[0])
        assert found.outputs == wrong.outputs and found.seconds == 9.0


class TestEnergy:
    def with_joules(self, values: Sequence[float], source: str = "rapl") -> list[Outcome]:
        one = outcome(OUTPUTS, 1.0)
        return [Outcome(one.requests, one.seconds, joules={source: value}) for value in values]

    def test_a_difference_is_told_with_its_numbers(self) -> None:
        base = self.with_joules([10.0, 10.1, 9.9, 10.0, 10.2, 9.8, 10.0, 10.1])
        less = self.with_joules([8.0, 8.1, 7.9, 8.0, 8.2, 7.8, 8.0, 8.1])
        found = energy_difference(base, less)
        assert found is not None and found.claim is Claim.FASTER
        assert found.mean == pytest.approx(-2.0) and found.deviation == pytest.approx(0.0, abs=1e-9)
        assert "less energy" in str(found) and "n = 8" in str(found) and "1% level" in str(found)
        other_way = energy_difference(less, base)
        assert other_way is not None and "more energy" in str(other_way)

    def test_no_measurable_difference_is_an_answer(self) -> None:
        found = energy_difference(self.with_joules([10.0, 11.0, 9.0]), self.with_joules([10.5, 10.0, 9.5]))
        assert found is not None and str(found).startswith("no measurable difference (n = 3, mean difference +0 J")
        few = energy_difference(self.with_joules([10.0]), self.with_joules([5.0]))
        assert few is not None and "too few" in str(few)

    def test_unknown_joules_have_no_difference(self) -> None:
        short = "estimated: run too short to measure"
        assert energy_difference(self.with_joules([1.0]), self.with_joules([1.0], short)) is None
        assert energy_difference(self.with_joules([1.0]), rounds([1.0])) is None

    def test_a_method_against_itself_has_none(self) -> None:
        rng = random.Random(2)
        draw = lambda: self.with_joules([rng.lognormvariate(2, 0.1) for _ in range(10)])  # noqa: E731
        found = [energy_difference(draw(), draw()) for _ in range(200)]
        assert sum(one is not None and one.claim is Claim.SAME for one in found) >= 180


@given(st.lists(st.floats(0.5, 2.0), min_size=3, max_size=7))
def test_few_agree_is_symmetric(values: list[float]) -> None:
    ones = [1.0] * len(values)
    assert few_agree(ones, values) == few_agree(values, ones)
