"""The break-even rate of two methods, on simulated servers whose crossing is known."""

from __future__ import annotations

import math
import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.compare.break_even import BreakEven, Measure, break_even, isotonic
from headrace.core.errors import EngineError, InvalidParameter

PLAIN_S, WINDOW_S, HALF_WINDOW_S = 0.05, 0.03, 0.06
METHODS = ("plain", "window")
LOW, HIGH = 1.0, 19.0


def latency(method: str, rate: float) -> float:
    """Mean latency of a server with one queue: a window makes every request wait, but serves it in less time."""
    if method == "plain":
        return PLAIN_S / (1 - rate * PLAIN_S)
    return HALF_WINDOW_S + WINDOW_S / (1 - rate * WINDOW_S)


def crossing() -> float:
    """Where both are equal, by bisection."""
    low, high = LOW, HIGH
    while high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (middle, high) if latency("plain", middle) < latency("window", middle) else (low, middle)
    return low


def noisy(seed: int, sigma: float) -> Measure:
    rng = random.Random(seed)
    return lambda method, rate: latency(method, rate) * rng.lognormvariate(0, sigma)


def flat(seed: int, plain_s: float, window_s: float, sigma: float = 0.05) -> Measure:
    rng = random.Random(seed)
    return lambda method, rate: (plain_s if method == "plain" else window_s) * rng.lognormvariate(0, sigma)


@pytest.mark.parametrize(("sigma", "most_ratio"), [(0.02, 1.15), (0.05, 1.25)])
def test_the_interval_contains_the_known_crossing(sigma: float, most_ratio: float) -> None:
    true = crossing()
    hits, widths = 0, []
    for seed in range(200):
        found = break_even(noisy(seed, sigma), METHODS, LOW, HIGH)
        assert found.winner == "window" and found.crossing is not None and found.interval is not None
        assert found.interval[0] <= found.crossing <= found.interval[1]
        hits += found.interval[0] <= true <= found.interval[1]
        widths.append(found.interval[1] / found.interval[0])
    assert hits >= 180
    assert float(np.median(widths)) <= most_ratio


def test_the_order_of_the_methods_does_not_matter() -> None:
    found = break_even(noisy(1, 0.02), ("window", "plain"), LOW, HIGH)
    assert found.winner == "window" and found.crossing == pytest.approx(crossing(), rel=0.1)
    assert str(found).startswith("window is better from 1") and "plain below" in str(found)


def test_a_fine_clock_finds_it_exactly() -> None:
    found = break_even(latency, METHODS, LOW, HIGH, points=7)
    assert found.finished and found.crossing == pytest.approx(crossing(), rel=0.02)


def test_a_method_that_is_always_better_wins_everywhere() -> None:
    for seed in range(20):
        found = break_even(flat(seed, 0.05, 0.06), METHODS, LOW, HIGH)
        assert (found.winner, found.crossing, found.interval, found.finished) == ("plain", None, None, True)
        assert str(found) == "plain wins everywhere in 1–19 requests/s"
    assert break_even(flat(0, 0.06, 0.05), METHODS, LOW, HIGH).winner == "window"


def test_equal_methods_have_no_crossing() -> None:
    said = Counter(str(break_even(flat(seed, 0.05, 0.05), METHODS, LOW, HIGH)) for seed in range(40))
    assert said["plain and window: no measurable difference in 1–19 requests/s"] >= 37


def test_methods_are_measured_in_turn_and_the_budget_is_kept() -> None:
    calls: list[tuple[str, float]] = []

    def measure(method: str, rate: float) -> float:
        calls.append((method, rate))
        return latency(method, rate) * (1.1 if len(calls) % 3 else 0.9)

    found = break_even(measure, METHODS, LOW, HIGH, most_pairs=25)
    assert len(calls) == 2 * sum(map(len, found.measured.values())) <= 50
    assert [method for method, _ in calls[:4]] == ["plain", "window", "window", "plain"]
    assert len({round(rate, 6) for _, rate in calls[:12]}) == 6
    assert min(found.measured) == pytest.approx(LOW) and max(found.measured) == pytest.approx(HIGH)


def test_what_was_measured_has_to_do_once_the_time_is_over() -> None:
    asked = 0

    def go_on() -> bool:
        nonlocal asked
        asked += 1
        return False

    found = break_even(noisy(3, 0.05), METHODS, LOW, HIGH, go_on=go_on)
    assert sum(map(len, found.measured.values())) == 12 and asked > 0
    assert not found.finished and "measuring ended before this was settled" in str(found)


def test_a_crossing_near_the_end_is_cut_to_the_range() -> None:
    for seed in range(10):
        found = break_even(noisy(seed, 0.05), METHODS, 9.0, 19.0)
        assert found.winner == "window"
        if found.interval is not None:
            assert 9.0 <= found.interval[0] <= found.interval[1] <= 19.0


def test_a_failing_method_fails_the_search() -> None:
    def measure(method: str, rate: float) -> float:
        raise EngineError("its process has ended")

    with pytest.raises(EngineError, match="its process has ended"):
        break_even(measure, METHODS, LOW, HIGH)


@pytest.mark.parametrize(
    ("field", "more"),
    [
        ("methods", {"methods": ("a", "a")}),
        ("low", {"low": 0.0}),
        ("low", {"low": math.nan}),
        ("high", {"high": 1.0}),
        ("high", {"high": math.inf}),
        ("points", {"points": 4}),
        ("points", {"points": 8}),
        ("repeats", {"repeats": 1}),
        ("most_pairs", {"most_pairs": 17}),
    ],
)
def test_odd_ranges_are_refused(field: str, more: dict[str, object]) -> None:
    asked: dict[str, object] = {"methods": METHODS, "low": LOW, "high": HIGH, **more}
    with pytest.raises(InvalidParameter, match=f"^{field}: got .*, allowed: "):
        break_even(latency, **asked)  # type: ignore[arg-type]


def test_a_result_reads_as_a_sentence() -> None:
    found = BreakEven(METHODS, 0.1, 8.0, {}, 1.25, (1.1, 1.4), "window", True)
    assert str(found) == "window is better from 1.25 requests/s on (90 % interval 1.1–1.4), plain below"


@given(
    st.lists(st.tuples(st.floats(-5, 5), st.integers(1, 9)), min_size=1, max_size=8),
    st.lists(st.floats(-5, 5), min_size=8, max_size=8),
)
def test_isotonic_is_the_nearest_rising_curve(points: list[tuple[float, int]], other: list[float]) -> None:
    values = np.array([[value for value, _ in points]])
    weights = np.array([float(weight) for _, weight in points])
    fitted = isotonic(values, weights)
    assert np.all(np.diff(fitted[0]) >= -1e-9)
    rival = np.sort(np.array(other[: len(points)]))
    errors = [float(np.sum(weights * (values[0] - curve) ** 2)) for curve in (fitted[0], rival)]
    assert errors[0] <= errors[1] + 1e-6
    assert float(np.sum(weights * fitted[0])) == pytest.approx(float(np.sum(weights * values[0])), abs=1e-6)
