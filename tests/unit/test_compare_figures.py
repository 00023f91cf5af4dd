"""Figures of runs computed by hand: latencies, rates, goodput, overlap, energy, cost."""

from __future__ import annotations

import math
from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.compare.figures import (
    TOO_SHORT,
    Prices,
    Slo,
    Spread,
    figures_of,
    percentile,
    run_joules,
    time_per_token,
    token_gaps,
)
from headrace.compare.methods import Iteration, Outcome, RequestRun
from headrace.core.errors import InvalidParameter


def request(arrival_s: float, *token_s: float, end_s: float | None = None) -> RequestRun:
    end_s = (token_s[-1] if token_s else arrival_s) if end_s is None else end_s
    return RequestRun(tuple(range(len(token_s))), "length", arrival_s, token_s, end_s)


RUN = Outcome(
    requests=(request(1.0, 2.0, 2.5, 3.5), request(2.0, 2.5, 4.5), request(3.0, 5.0)),
    seconds=5.0,
    iterations=tuple(Iteration(float(index), count, 3) for index, count in enumerate((1, 2, 3, 2))),
)
"""TTFT 1, 0.5, 2; gaps 0.5, 1, 2; TPOT 0.75, 2, none; E2E 2.5, 2.5, 2. Six tokens; served from 1 s to 5 s."""
SAME_AGAIN = replace(RUN, seconds=4.0)


def known(values: object) -> Spread:
    assert isinstance(values, Spread)
    return values


class TestLatency:
    def test_by_hand(self) -> None:
        found = figures_of([RUN], None, Prices())
        assert found.ttft.mean.median == pytest.approx(3.5 / 3)
        assert (found.ttft.p50.median, found.ttft.p95.median) == pytest.approx((1.0, 1.9))
        assert found.itl is not None and found.tpot is not None
        assert found.itl.p50.median == 1.0 and found.itl.mean.median == pytest.approx(3.5 / 3)
        assert found.tpot.p50.median == pytest.approx(1.375), "an answer of one token has none"
        assert (found.e2e.p50.median, found.e2e.mean.median) == pytest.approx((2.5, 7 / 3))
        assert found.itl.p99.median == pytest.approx(1.98)

    def test_percentiles_are_of_each_round_and_then_the_median_over_rounds(self) -> None:
        slower = replace(RUN, requests=tuple(request(0.0, first) for first in (4.0, 4.0, 4.0)))
        quicker = replace(RUN, requests=tuple(request(0.0, first) for first in (1.0, 1.0, 7.0)))
        found = figures_of([slower, quicker, slower], None, Prices()).ttft
        assert found.p50 == Spread(4.0, 1.0, 4.0)
        assert found.p99.high == pytest.approx(6.88), "pooled over rounds it would be another figure"

    def test_tokens_of_one_event_have_no_gap_between_them(self) -> None:
        together = request(0.0, 1.0, 1.0, 1.0, 3.0)
        assert token_gaps(together) == [2.0]
        assert time_per_token(together) == pytest.approx(2 / 3)

    def test_an_answer_in_one_piece_has_no_time_per_token(self) -> None:
        piece = Outcome((request(0.0, 2.0, 2.0, 2.0), request(0.0, 2.0)), 2.0)
        found = figures_of([piece], Slo(2.0, 0.001), Prices())
        assert found.itl is None and found.tpot is None
        assert known(found.goodput_per_s).median == 1.0, "no gap is too long where there is none"

    def test_an_answer_without_tokens_counts_up_to_its_end(self) -> None:
        found = figures_of([Outcome((request(1.0, end_s=4.0),), 4.0)], None, Prices(1.0))
        assert found.ttft.p50.median == found.e2e.p50.median == 3.0
        assert found.output_tokens_per_s.median == 0 and found.cost_per_million_tokens is None

    @given(st.lists(st.floats(0, 1e6), min_size=1, max_size=50), st.floats(0, 1))
    def test_percentiles_are_numpys(self, values: list[float], share: float) -> None:
        expected = float(np.quantile(values, share, method="linear"))
        assert percentile(sorted(values), share) == pytest.approx(expected, rel=1e-9, abs=1e-9)


class TestRates:
    def test_by_hand(self) -> None:
        found = figures_of([RUN, SAME_AGAIN], None, Prices())
        assert found.seconds == Spread(4.5, 4.0, 5.0)
        assert found.output_tokens_per_s == Spread(pytest.approx(1.35), pytest.approx(1.2), pytest.approx(1.5))
        assert found.requests_per_min.median == pytest.approx(45), "of the 4 s from the first arrival on"
        assert found.goodput_per_s is None

    def test_goodput_needs_both_limits(self) -> None:
        for slo, met in (
            (Slo(1.0, None), 2),
            (Slo(1.0, 1.0), 1),
            (Slo(None, 0.75), 2),
            (Slo(None, 0.7), 1),
            (Slo(0.1, None), 0),
        ):
            assert known(figures_of([RUN], slo, Prices()).goodput_per_s).median == pytest.approx(met / 4)
        assert figures_of([RUN], Slo(), Prices()).goodput_per_s is None, "nothing was asked for"

    def test_iterations_and_overlap(self) -> None:
        found = figures_of([RUN, RUN], None, Prices())
        assert known(found.iterations).median == 4 and known(found.mean_in_flight).median == 2
        assert known(found.overlap).median == pytest.approx(2 / 3)
        silent = figures_of([RUN, replace(RUN, iterations=())], None, Prices())
        assert silent.iterations is None and silent.mean_in_flight is None and silent.overlap is None

    def test_a_clock_that_did_not_move(self) -> None:
        found = figures_of([Outcome((request(0.0, 0.0),), 0.0)], None, Prices())
        assert math.isfinite(found.output_tokens_per_s.median) and math.isfinite(found.requests_per_min.median)


class TestResources:
    def test_only_what_every_round_tells(self) -> None:
        whole = replace(RUN, cpu_s=2.0, peak_rss_bytes=100)
        found = figures_of([whole, replace(whole, cpu_s=4.0, peak_rss_bytes=300)], None, Prices())
        assert found.cpu_s == Spread(3.0, 2.0, 4.0) and found.peak_rss_bytes == 300
        part = figures_of([whole, RUN], None, Prices())
        assert part.cpu_s is None and part.peak_rss_bytes is None and part.joules is None and part.energy_source == ""

    def test_sources_are_added_and_named(self) -> None:
        rounds = [replace(RUN, joules={"nvml": 30.0, "rapl": 6.0}), replace(RUN, joules={"nvml": 34.0, "rapl": 6.0})]
        found = figures_of(rounds, None, Prices())
        assert found.joules == Spread(38.0, 36.0, 40.0) and found.energy_source == "nvml+rapl"

    def test_a_run_too_short_for_the_meter_is_not_measured_and_not_free(self) -> None:
        rounds = [replace(RUN, joules={"estimated": 3.0}), replace(RUN, joules={"estimated" + TOO_SHORT: 1.0})]
        found = figures_of(rounds, None, Prices(None, 0.3, 400.0))
        assert found.joules is None and found.energy_source == "estimated: run too short to measure"
        assert found.cost_per_request is None and found.gco2 is None
        assert run_joules(rounds[1]) is None and run_joules(RUN) is None


class TestCost:
    JOULES = (replace(RUN, joules={"rapl": 3.6e6}),)
    """1 kWh, 5 s, 3 requests, 6 tokens."""

    def test_by_hand(self) -> None:
        found = figures_of(self.JOULES, None, Prices(7.2, 0.3, 400.0))
        assert found.cost_per_request == pytest.approx((7.2 * 5 / 3600 + 0.3) / 3)
        assert found.cost_per_million_tokens == pytest.approx((7.2 * 5 / 3600 + 0.3) / 6 * 1e6)
        assert found.gco2 == pytest.approx(400.0)
        assert figures_of(self.JOULES, None, Prices(7.2)).cost_per_request == pytest.approx(0.01 / 3)

    def test_no_price_is_invented(self) -> None:
        found = figures_of(self.JOULES, None, Prices())
        assert found.cost_per_request is None and found.cost_per_million_tokens is None and found.gco2 is None
        assert figures_of([RUN], None, Prices(7.2, 0.3)).cost_per_request is None, "the energy is part of it"
        assert figures_of([RUN], None, Prices(7.2)).cost_per_request is not None
        assert figures_of(self.JOULES, None, Prices(0.0)).cost_per_request == 0

    @pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
    def test_odd_prices_and_limits_are_refused(self, value: float) -> None:
        for kind, allowed in ((Prices, "a number ≥ 0"), (Slo, "seconds > 0")):
            for field in fields(kind):
                with pytest.raises(InvalidParameter, match=f"^{field.name}: got .*, allowed: {allowed}"):
                    kind(**{field.name: value})
        with pytest.raises(InvalidParameter, match="ttft_s"):
            Slo(0.0)


@given(
    st.lists(
        st.lists(st.lists(st.floats(0, 100), min_size=1, max_size=6), min_size=1, max_size=5), min_size=1, max_size=4
    )
)
def test_figures_of_any_run_are_in_order(rounds: list[list[list[float]]]) -> None:
    outcomes = []
    for answers in rounds:
        requests = tuple(request(0.0, *sorted(times)) for times in answers)
        outcomes.append(Outcome(requests, max(one.end_s for one in requests)))
    found = figures_of(outcomes, Slo(50.0, 1.0), Prices(1.0))
    for latency in (found.ttft, found.itl, found.tpot, found.e2e):
        if latency is not None:
            assert latency.p50.median <= latency.p95.median + 1e-9 and latency.p95.median <= latency.p99.median + 1e-9
            for spread in (latency.mean, latency.p50, latency.p95, latency.p99):
                assert 0 <= spread.low <= spread.median <= spread.high
    assert found.ttft.mean.high <= found.e2e.mean.high + 1e-9
