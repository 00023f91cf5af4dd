"""When requests of a workload arrive, and how long synthetic ones are: the processes alone, without a model."""

from __future__ import annotations

import math
import random
from itertools import pairwise
from statistics import mean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.compare.arrivals import (
    MAX_REQUESTS,
    MAX_SECONDS,
    Arrivals,
    AtOnce,
    Bursts,
    ConstantGap,
    Poisson,
    arrive,
    generator,
    parse_arrivals,
)
from headrace.compare.synthetic import Fixed, Lengths, Uniform, parse_length
from headrace.core.errors import InvalidParameter
from tests.unit.compare_cases import workload

seeds = st.integers(0, 2**63 - 1)
gaps = st.floats(1e-6, MAX_SECONDS)
processes = st.one_of(
    st.just(AtOnce()),
    st.builds(ConstantGap, gaps),
    st.builds(Poisson, gaps),
    st.builds(Bursts, st.integers(1, 50), gaps),
)


@given(processes, st.integers(1, 60), st.integers(1, 60), seeds)
def test_times_begin_at_0_and_never_go_back(process: Arrivals, one: int, other: int, seed: int) -> None:
    times = process.times(max(one, other), generator(seed, "x"))
    assert len(times) == max(one, other) and times[0] == 0
    assert all(type(time_s) is float and math.isfinite(time_s) for time_s in times)
    assert all(before <= after for before, after in pairwise(times))
    fewer = process.times(min(one, other), generator(seed, "x"))
    assert fewer == times[: len(fewer)], "the same seed gives the same times, however many are asked for"


def test_times_by_hand() -> None:
    rng = random.Random(0)
    assert AtOnce().times(3, rng) == (0, 0, 0)
    assert ConstantGap(0.1).times(4, rng) == (0, 0.1, 0.2, 0.3)
    assert Bursts(2, 1.5).times(5, rng) == (0, 0, 1.5, 1.5, 3.0)
    assert rng.random() == random.Random(0).random(), "they draw nothing"


def test_times_are_the_same_on_every_machine_and_python() -> None:
    """Golden values: SHA-256 of "7/arrivals" seeds the Mersenne Twister, −0.5·ln(1 − u) are the gaps."""
    assert Poisson(0.5).times(5, generator(7, "arrivals")) == GOLDEN_TIMES
    assert Poisson.of_rate(2.0).times(5, generator(7, "arrivals")) == GOLDEN_TIMES
    assert Uniform(3, 6).draw(12, generator(7, "prompt lengths")) == (3, 3, 6, 3, 4, 4, 4, 6, 4, 3, 4, 6)
    assert generator(7, "arrivals").random() != generator(7, "prompt lengths").random() != generator(8, "x").random()


GOLDEN_TIMES = (0.0, 0.965388555, 2.787491698, 2.787981059, 3.124004407)


@pytest.mark.parametrize("seed", range(5))
def test_gaps_of_a_poisson_process_are_exponential(seed: int) -> None:
    """20,000 gaps: the mean within 4 standard errors (σ = mean), and as many below each quantile as there should be."""
    count, mean_gap_s = 20_001, 0.25
    times = Poisson(mean_gap_s).times(count, generator(seed, "arrivals"))
    found = [after - before for before, after in pairwise(times)]
    assert abs(mean(found) / mean_gap_s - 1) < 4 / math.sqrt(len(found))
    for share in (0.1, 0.5, 0.9, 0.99):
        below = mean(gap < -mean_gap_s * math.log(1 - share) for gap in found)
        assert abs(below - share) < 4 * math.sqrt(share * (1 - share) / len(found))


@given(st.integers(1, 5000), st.integers(0, 5000), st.integers(1, 200), seeds)
def test_uniform_lengths_stay_between_their_bounds(low: int, more: int, count: int, seed: int) -> None:
    lengths = Uniform(low, low + more)
    drawn = lengths.draw(count, generator(seed, "x"))
    assert len(drawn) == count and all(low <= one <= lengths.longest == low + more for one in drawn)
    assert lengths.draw(count + 9, generator(seed, "x"))[:count] == drawn


def test_both_bounds_are_drawn_as_often_as_the_rest() -> None:
    drawn = Uniform(8, 11).draw(20_000, generator(1, "x"))
    for length in (8, 9, 10, 11):
        assert abs(drawn.count(length) / 20_000 - 0.25) < 4 * math.sqrt(0.25 * 0.75 / 20_000)


@pytest.mark.parametrize(
    ("text", "process"),
    [
        ("at-once", AtOnce()),
        ("gap:0.5", ConstantGap(0.5)),
        ("poisson:0.5", Poisson(0.5)),
        ("rate:4", Poisson(0.25)),
        ("bursts:8:2", Bursts(8, 2.0)),
        ("recorded", None),
    ],
)
def test_processes_as_they_are_written(text: str, process: Arrivals | None) -> None:
    assert parse_arrivals(text) == process


WRONG_NUMBERS = ("0", "-1", "-0.0", "nan", "inf", "-inf", "1e400", str(MAX_SECONDS + 1))


@pytest.mark.parametrize("number", WRONG_NUMBERS)
@pytest.mark.parametrize("kind", ["gap:{}", "poisson:{}", "rate:{}", "bursts:2:{}"])
def test_a_process_needs_a_positive_finite_number(kind: str, number: str) -> None:
    text = kind.format(number)
    with pytest.raises(
        InvalidParameter, match=r"^arrivals: got .*, allowed: for (gap_s|mean_gap_s|per_second) a number"
    ):
        parse_arrivals(text)


@pytest.mark.parametrize(
    "text",
    [
        *("", "poisson", "poisson:", "poisson:x", "poisson:1:2", "at-once:1", "bursts:2", "bursts:1.5:1", "recorded:1"),
        *("nonsense:1", "gap:" + "9" * 5000, None, 5),
    ],
)
def test_what_is_no_process_is_refused(text: str) -> None:
    with pytest.raises(InvalidParameter, match=r"^arrivals: got .*allowed: ") as caught:
        parse_arrivals(text)
    assert len(str(caught.value)) < 300 and "\n" not in str(caught.value)


@given(st.text() | st.lists(st.sampled_from([*"0123456789.e-:", "gap:", "bursts:", "rate:"])).map("".join))
def test_any_text_is_a_process_or_is_refused(text: str) -> None:
    try:
        process = parse_arrivals(text)
    except InvalidParameter as error:
        assert error.field == "arrivals"
    else:
        assert process is None or process.times(3, generator(0, "x"))[0] == 0


@pytest.mark.parametrize("value", [0, -1, math.nan, math.inf, True, "1", None, 10**400])
def test_bad_numbers_are_refused_by_the_name_of_their_field(value: float) -> None:
    for field, make in (("gap_s", ConstantGap), ("mean_gap_s", Poisson), ("per_second", Poisson.of_rate)):
        with pytest.raises(InvalidParameter, match=f"^{field}: got"):
            make(value)
    with pytest.raises(InvalidParameter, match=r"^gap_s: got"):
        Bursts(1, value)
    for size in (0, -1, 1.5, True, MAX_REQUESTS + 1):
        with pytest.raises(InvalidParameter, match=r"^size: got"):
            Bursts(size, 1.0)  # type: ignore[arg-type]


@pytest.mark.parametrize("process", [AtOnce(), ConstantGap(1), Poisson(1), Bursts(2, 1)])
@pytest.mark.parametrize("count", [0, -1, 1.0, True, MAX_REQUESTS + 1])
def test_a_workload_has_at_least_one_request(process: Arrivals, count: int) -> None:
    with pytest.raises(InvalidParameter, match=r"^count: got"):
        process.times(count, random.Random(0))


@pytest.mark.parametrize("seed", [-1, 2**63, 1.0, True, None])
def test_a_seed_is_an_integer(seed: int) -> None:
    with pytest.raises(InvalidParameter, match=r"^seed: got"):
        generator(seed, "x")


def test_a_workload_is_given_its_times() -> None:
    asked = workload(3)
    late = arrive(asked, ConstantGap(2), 7)
    assert [one.arrival_s for one in late.requests] == [0, 2, 4] and not late.together
    assert late.prompts == asked.prompts and late.seed is None and late.notes == ("Requests arrive 2 s apart.",)
    drawn = arrive(asked, Poisson(2), 7)
    assert drawn.seed == 7 and drawn.notes == ("Requests arrive at random, 2 s apart on average (Poisson).",)
    assert drawn.sha256 != late.sha256
    assert arrive(late, Poisson(2), 7) == drawn, "nothing is left of the times before"
    assert arrive(late, AtOnce(), 7).sha256 == asked.sha256
    with pytest.raises(InvalidParameter, match=r"^num_requests: got 3, allowed: so many that the last arrives within"):
        arrive(asked, ConstantGap(MAX_SECONDS), 7)


def test_lengths_as_they_are_written() -> None:
    expected: dict[str, Lengths] = {"128": Fixed(128), "uniform:1:9": Uniform(1, 9), "uniform:5:5": Uniform(5, 5)}
    assert {text: parse_length(text, "output_length") for text in expected} == expected
    assert Fixed(3).draw(2, random.Random(0)) == (3, 3) and Fixed(3).longest == 3
    wrong = (
        "",
        "0",
        "-1",
        "1.5",
        "x",
        "uniform",
        "uniform:2",
        "uniform:9:1",
        "uniform:0:5",
        "uniform:1:2:3",
        "9" * 5000,
    )
    for text in (*wrong, str(2**31), None, 7):
        with pytest.raises(InvalidParameter, match=r"^output_length: got .*allowed: a number of tokens N"):
            parse_length(text, "output_length")  # type: ignore[arg-type]
    for low, high in ((0, 1), (2, 1), (True, 2), (1, 2.0)):
        with pytest.raises(InvalidParameter, match=r"^(low|high): got"):
            Uniform(low, high)  # type: ignore[arg-type]
