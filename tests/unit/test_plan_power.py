"""`headrace plan power`: each threshold of the controller, hysteresis, order, brake; a row that it makes safe."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.cli.plan_power import add_arguments, document
from headrace.core.errors import InvalidParameter
from headrace.plan.document import Document
from headrace.plan.power import Level, Policy, ServerModel, State, advance, brake_alone, commands
from headrace.plan.power_simulation import (
    SLOS,
    WORKS,
    Point,
    Row,
    Run,
    arrivals,
    most_extra,
    outcome,
    point,
    pools,
    simulate,
    thinned,
    uncontrolled,
)

POLICY = Policy()
FREE, LOW_T1, LOW_T2, HIGH_T2, BRAKE = Level


def plan(*words: str) -> Document:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return document(parser.parse_args(words))


def follow(shares: Sequence[float], step_s: float = 40.0, start: Level = FREE) -> list[Level]:
    """The level after each reading, `step_s` apart: by default each command has settled by the next one."""
    state, levels = State(start), []
    for index, share in enumerate(shares):
        state = advance(POLICY, state, share, index * step_s)
        levels.append(state.level)
    return levels


# ---------------------------------------------------------------- the controller (thresholds and clocks: POLCA)


def test_clocks_of_each_level() -> None:
    assert [POLICY.clocks(level) for level in Level] == [
        {"low": None, "high": None},
        {"low": 1275, "high": None},
        {"low": 1110, "high": None},
        {"low": 1110, "high": 1305},
        {"low": 288, "high": 288},
    ]


@pytest.mark.parametrize(
    ("share", "level"),
    [(0.0, FREE), (0.80, FREE), (0.801, LOW_T1), (0.89, LOW_T1), (0.891, LOW_T2), (1.0, LOW_T2), (1.001, BRAKE)],
)
def test_thresholds(share: float, level: Level) -> None:
    assert follow([share]) == [level]


def test_low_priority_first_then_high_only_if_that_does_not_suffice() -> None:
    assert follow([0.95, 0.95, 0.95]) == [LOW_T2, HIGH_T2, HIGH_T2]
    assert follow([0.85, 0.95, 0.88, 0.88]) == [LOW_T1, LOW_T2, LOW_T2, LOW_T2]


def test_high_priority_waits_until_the_command_has_settled() -> None:
    levels = follow([0.95] * 21, step_s=2.0)
    assert levels == [LOW_T2] * 20 + [HIGH_T2]
    # The second threshold does not wait for the first one's command.
    assert follow([0.85, 0.95], step_s=2.0) == [LOW_T1, LOW_T2]


@pytest.mark.parametrize(
    ("level", "holds", "gives_way", "below"),
    [(LOW_T1, 0.75, 0.749, FREE), (LOW_T2, 0.84, 0.839, LOW_T1), (HIGH_T2, 0.84, 0.839, LOW_T2)],
)
def test_hysteresis(level: Level, holds: float, gives_way: float, below: Level) -> None:
    assert follow([holds], start=level) == [level]
    assert follow([gives_way], start=level) == [below]


def test_clocks_come_back_one_level_at_a_time_high_priority_first() -> None:
    assert follow([0.5] * 4, start=HIGH_T2) == [LOW_T2, LOW_T1, FREE, FREE]
    early = advance(POLICY, State(HIGH_T2, 100.0), 0.5, 139.0)
    assert early == State(HIGH_T2, 100.0)


@pytest.mark.parametrize("level", [FREE, LOW_T1, LOW_T2, HIGH_T2])
def test_the_brake_comes_at_once_from_every_level(level: Level) -> None:
    assert advance(POLICY, State(level, 100.0), 1.01, 102.0) == State(BRAKE, 102.0)


def test_the_brake_gives_way_to_the_level_before_it() -> None:
    assert follow([0.84, 0.839], start=BRAKE) == [BRAKE, HIGH_T2]


def test_without_the_controller_there_is_only_the_brake() -> None:
    levels, state = [], State()
    for share in (0.95, 1.0, 1.01, 0.9, 0.839, 0.95):
        state = brake_alone(POLICY, state, share, 0.0)
        levels.append(state.level)
    assert levels == [FREE, FREE, BRAKE, BRAKE, FREE, FREE]


@given(st.lists(st.floats(0, 1.3), max_size=60), st.sampled_from([2.0, 20.0, 40.0]))
def test_laws_of_the_controller(shares: list[float], step_s: float) -> None:
    state = State()
    for index, share in enumerate(shares):
        now = index * step_s
        before, state = state, advance(POLICY, state, share, now)
        assert (state.level == BRAKE) == (share > 1.0 or (before.level == BRAKE and share >= 0.84))
        if state.level == HIGH_T2 and before.level < HIGH_T2:
            assert before.level == LOW_T2 and share > 0.89 and now - before.since >= 40
        if state.level < before.level:
            assert state.level == before.level - 1 and share < 0.84
            assert before.level in (BRAKE, LOW_T2, HIGH_T2) or share < 0.75
        if state == before:
            continue
        assert state.since == now


def test_an_operator_gets_the_commands_in_the_controllers_order() -> None:
    told = commands(POLICY)
    assert [words.split(":")[0] for words, _ in told][:2] == ["power > 80%", "power > 89%"]
    assert [command.rpartition("=")[2] for _, command in told if "=" in command] == [
        "210,1275",
        "210,1110",
        "210,1305",
        "210,1275",
    ]
    assert all(command.startswith("sudo nvidia-smi --") for _, command in told)


# ---------------------------------------------------------------- the server


def test_the_lowest_clock_takes_20_percent_off_a_peak_for_at_most_7_percent_of_time() -> None:
    # POLCA: locking clocks takes 20 % off the peak for ≤ 7 % performance.
    model, row = ServerModel(), Row()
    assert model.power("prefill", 1110) == pytest.approx(0.80 * model.power("prefill", None), abs=0.005)
    for work in WORKS:
        prefill_s, decode_s = row.seconds(sum(work.prompt) / 2, sum(work.answer) / 2)
        slow = prefill_s * model.slowdown("prefill", 1110) + decode_s * model.slowdown("decode", 1110)
        assert 1.03 < slow / (prefill_s + decode_s) < 1.07
    assert model.power("idle", 288) == model.idle
    assert model.power("decode", 5000) == model.decode and model.slowdown("decode", None) == 1


# ---------------------------------------------------------------- the simulator

DAY = Row(hours=6, day_s=6 * 3600)
"""A day four times as fast, so that the wave is four times as steep for the controller."""
SMALL = Row(servers=8, hours=0.5, day_s=1800)


@pytest.fixture(scope="module")
def thirty() -> Point:
    return point(DAY, POLICY, 0.30)


def test_thirty_percent_more_servers_keep_both_slos_without_a_brake(thirty: Point) -> None:
    # POLCA: +30 % servers, no brake; high priority p50 < 1 %, p99 < 5 %, low priority p50 < 5 %, p99 < 50 % longer.
    found = thirty.controlled
    assert thirty.free.servers == 52 and thirty.free.peak > 1.0
    assert found.broken() == [] and found.run.brakes == 0 and found.run.peak <= 1.0 and not found.run.tripped
    for priority, slo in SLOS.items():
        p50, p99 = found.impact[priority]
        assert p50 < slo.p50 and p99 < slo.p99
    # Low priority pays, and pays first.
    assert found.impact["low"][0] > found.impact["high"][0]
    assert min(found.run.level_s[level] for level in (FREE, LOW_T1, LOW_T2, HIGH_T2)) > 0


def test_naive_oversubscription_fails(thirty: Point) -> None:
    words = thirty.naive.broken()
    assert thirty.naive.run.brakes > 10 and "brakes" in words[0]
    assert thirty.naive.impact["high"][1] > SLOS["high"].p99
    assert any("high-priority" in word for word in words) and any("low-priority" in word for word in words)


def test_a_row_without_extra_servers_behaves_as_published() -> None:
    # POLCA: inference peaks at 79 % of what is provisioned, and rises by at most 11.8 points in 40 s.
    run = simulate(DAY, DAY.servers, POLICY, uncontrolled)
    assert run.peak == pytest.approx(0.79, abs=0.01)
    assert run.largest_rise(40) == pytest.approx(0.118, abs=0.015)


def test_power_that_is_too_much_for_too_long_opens_the_breaker() -> None:
    run = simulate(replace(SMALL, utilisation=0.65), 14, POLICY, uncontrolled)
    assert run.peak > 1 and run.tripped
    assert "UPS" in outcome(run, run).broken()[0]


def test_what_comes_in_goes_out_and_seeds_repeat() -> None:
    free, same = (simulate(SMALL, 8, POLICY, uncontrolled) for _ in range(2))
    asked = arrivals(SMALL, 8)
    assert free == same
    assert sum(map(len, free.latencies.values())) == len(asked) > 100
    assert arrivals(replace(SMALL, seed=1), 8) != asked
    assert [one.at for one in asked] == sorted(one.at for one in asked)
    # Power never leaves what the servers can take.
    assert all(0.44 - 1e-9 <= share <= 1 for share in free.shares)
    assert sum(free.level_s.values()) == free.level_s[FREE] == pytest.approx(2 * len(free.shares))


def test_the_load_follows_the_day() -> None:
    row = replace(DAY, hours=6, wave=1.0, utilisation=0.4)
    times = [one.at / 3600 for one in arrivals(row, 8)]
    night = sum(hour < 1 or hour >= 5 for hour in times)
    noon = sum(2 <= hour < 4 for hour in times)
    # Of 1 - cos: (pi/3 - sin(pi/3)) / pi and (pi/3 + sin(pi/3)) / pi of all.
    assert night / len(times) == pytest.approx((math.pi / 3 - math.sin(math.pi / 3)) / math.pi, abs=0.02)
    assert noon / len(times) == pytest.approx((math.pi / 3 + math.sin(math.pi / 3)) / math.pi, abs=0.02)


def test_a_lock_slows_by_exactly_as_much_as_the_model_says() -> None:
    # From the first reading on, which acts 40 s later: one request in a row of its own slows in the middle.
    row = replace(SMALL, model=ServerModel(exponent=0))
    policy = replace(POLICY, t1=0.1, t2=0.99, hysteresis=0.05)
    request = arrivals(row, 8)[0]
    one = replace(request, at=0.0, work=0, prefill_s=10.0, decode_s=100.0)
    run = simulate(replace(row, hours=0.01), 8, policy, requests=[one])
    # Locked at 2 + 40 s: 10 s of prefill and 32 s of decode are done.
    slow = 1 + row.model.sensitivity * (1410 / 1275 - 1)
    assert run.latencies["low"] == [pytest.approx(42 + 68 * slow)]
    assert run.level_s[FREE] == pytest.approx(42)


def test_pools_share_the_servers() -> None:
    assert pools(40) == (10, 10, 10, 10)
    assert pools(42) == (11, 11, 10, 10)
    assert sum(pools(57)) == 57


def test_largest_rise_within_a_window() -> None:
    warm = [0.0] * 300
    run = Run(1, [*warm, 0.5, 0.6, 0.55, 0.7, 0.9, 0.2, 0.3], 0, False, {}, {}, 2.0)
    assert run.largest_rise(2) == pytest.approx(0.2)
    assert run.largest_rise(4) == pytest.approx(0.35)
    assert run.largest_rise(100) == pytest.approx(0.4)
    assert replace(run, shares=warm).largest_rise(40) is None


def test_most_extra_stops_at_the_first_failure(thirty: Point) -> None:
    bad = replace(thirty, controlled=thirty.naive)
    assert most_extra([replace(thirty, extra=0.1), thirty, replace(bad, extra=0.4), replace(thirty, extra=0.5)]) == 0.3
    assert most_extra([bad]) is None


def test_thinned_keeps_the_peaks() -> None:
    values = [float(index % 97) for index in range(1000)]
    few = thinned(values, 50)
    assert len(few) == 50 and max(value for _, value in few) == 96 and few[1][0] == 20


# ---------------------------------------------------------------- the command


def test_document() -> None:
    answer = plan("--servers", "4", "--hours", "12", "--most", "20", "--step", "20", "--extra", "30", "--seed", "3")
    sweep = answer.tables[0]
    assert [row[0] for row in sweep.rows] == [0, 20, 30]
    assert all(len(row) == len(table.columns) for table in answer.tables for row in table.rows)
    assert all(one.formula and one.source for one in answer.quantities)
    given = {one.name for one in answer.quantities if one.basis == "given"}
    assert given == {"servers provisioned for"}
    assert [plot.title for plot in answer.plots] == [
        "Brakes",
        "Latency with the controller, against free clocks",
        "Power of the row with 30% extra servers",
    ]
    assert all(plot.series and all(series.points for series in plot.series) for plot in answer.plots)
    assert not any("crest" in note for note in answer.notes)
    quiet = plan("--servers", "4", "--hours", "1", "--most", "0", "--extra", "0")
    assert any("crest, after 12 h, is not in it" in note for note in quiet.notes)
    assert len(quiet.plots) == 2 and quiet.data["most_extra"] == 0
    assert "sudo nvidia-smi --lock-gpu-clocks=210,1110" in answer.notes
    assert any("changes no device" in note for table in answer.tables for note in table.notes)
    assert len(answer.data["sweep"]) == 3  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("words", "field"),
    [
        (("--servers", "3"), "servers"),
        (("--server-kw", "-1"), "server_kw"),
        (("--utilisation", "0.9"), "utilisation"),
        (("--wave", "2"), "wave"),
        (("--hours", "0"), "hours"),
        (("--hours", "0.0001"), "hours"),
        (("--hours", "8000"), "hours"),
        (("--seed", "-1"), "seed"),
        (("--t1", "0.95"), "t2"),
        (("--t2", "1"), "t2"),
        (("--t1", "nan"), "t1"),
        (("--extra", "-5"), "extra"),
        (("--step", "0"), "step"),
        (("--step", "0.1"), "step"),
        (("--most", "1000"), "most"),
    ],
)
def test_bad_input_is_one_line_that_names_the_field(words: tuple[str, ...], field: str) -> None:
    with pytest.raises(InvalidParameter) as caught:
        plan(*words)
    assert caught.value.field == field and "\n" not in str(caught.value)
