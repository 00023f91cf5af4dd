"""Calibration of plans: factors, intervals, and a file that two processes, a kill and damage may meet."""

from __future__ import annotations

import math
import os
import sqlite3
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from random import Random
from time import monotonic, sleep

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.core.errors import ConfigError, InvalidParameter
from headrace.plan.accuracy import accuracy
from headrace.plan.calibration import (
    ENOUGH,
    LEVEL,
    RIDGE,
    WINDOW,
    Calibration,
    Context,
    Store,
    calibrate,
    conformal_quantile,
    default_path,
    machine_key,
    record_run,
    ridge,
)
from headrace.plan.document import Quantity

HERE = Context("a CPU, 2 threads", "demo", "test", "1.0", "2026-01-01T00:00:00+00:00")
ITL = Quantity("ITL", 0.01, "s", basis="data sheet")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(default_path(tmp_path / "state" / "headrace"))


def past(logs: list[float], model: str = "demo") -> Calibration:
    return Calibration.of([(log, model) for log in logs])


# ---------------------------------------------------------------- factors and intervals


def test_the_factor_is_drawn_towards_one() -> None:
    assert math.isclose(ridge([1.0] * 4, strength=4.0), 0.5)
    assert math.isclose(past([math.log(2)]).factor, 2 ** (1 / (1 + RIDGE)))
    assert 1.95 < past([math.log(2)] * 19 * 20).factor < 2


@settings(max_examples=30)
@given(st.lists(st.floats(-3, 3), min_size=1, max_size=40))
def test_the_factor_is_the_minimum_it_says_it_is(logs: list[float]) -> None:
    def loss(b: float) -> float:
        return math.fsum((log - b) ** 2 for log in logs) + RIDGE * b * b

    best = ridge(logs)
    assert loss(best) <= loss(best + 1e-3) and loss(best) <= loss(best - 1e-3)


def test_conformal_quantile_by_hand() -> None:
    """Split-conformal (Lei et al. 2018, algorithm 2): of 9 errors the ⌈10 · 0.8⌉ = 8th, of 4 the 4th."""
    assert conformal_quantile([9, 8, 7, 6, 5, 4, 3, 2, 1], 0.8) == 8
    assert conformal_quantile([1, 2, 3, 4], 0.8) == 4
    with pytest.raises(ValueError, match="do not tell"):
        conformal_quantile([1, 2, 3], 0.8)


def test_intervals_by_how_much_is_known() -> None:
    assert (past([]).label, past([]).spread, past([]).factor) == ("unmeasured", 2.0, 1.0)
    few = past([0.1] * (ENOUGH - 1))
    assert (few.label, few.spread) == ("uncalibrated", 2.0)
    enough = past([0.1] * ENOUGH)
    assert enough.label == "calibrated"
    # Ten of the twenty fit the factor; the others are all off by the same.
    assert math.isclose(enough.factor, math.exp(10 * 0.1 / (10 + RIDGE)))
    assert math.isclose(enough.factor * enough.spread, math.exp(0.1))


@settings(max_examples=10)
@given(st.integers(0, 2**32), st.floats(-1, 1), st.floats(0.05, 0.5))
def test_intervals_cover_what_they_promise(seed: int, bias: float, noise: float) -> None:
    """75 to 90 % are wanted of 80 % intervals; here 200 draws, so five standard deviations more are allowed."""
    random = Random(seed)
    covered = 0
    for _ in range(200):
        *logs, following = [random.gauss(bias, noise) for _ in range(41)]
        found = past(logs)
        covered += abs(following - math.log(found.factor)) <= math.log(found.spread)
    assert 0.75 - 0.14 < covered / 200 < 0.9 + 0.08


def test_a_prediction_says_what_its_interval_rests_on() -> None:
    unmeasured = calibrate(ITL, past([]), "demo")
    assert (unmeasured.value, unmeasured.low, unmeasured.high) == (0.01, 0.005, 0.02)
    assert unmeasured.basis == "data sheet" and unmeasured.note == "from data sheet, never measured here: ×/÷ 2"
    probed = calibrate(replace(ITL, basis="measured", note="one row"), past([]), "demo")
    assert probed.note == "one row; from the probe, never measured here: ×/÷ 2"
    few = calibrate(ITL, past([0.0] * 3), "demo")
    assert few.basis == "data sheet" and few.note.startswith(
        "uncalibrated (3 past runs on this machine, 20 are needed)"
    )
    enough = calibrate(ITL, past([math.log(2)] * 40, "other"), "demo")
    assert enough.basis == "calibrated" and isinstance(enough.value, float) and 0.017 < enough.value < 0.02
    assert enough.low is not None and enough.high is not None and enough.low < enough.value < enough.high
    assert "80% of 40 past runs on this machine of 1 models" in enough.note
    assert enough.note.endswith("none of them of this model")


@pytest.mark.parametrize("value", [None, "a lot", 0, -1.0, math.nan, math.inf])
def test_what_has_no_logarithm_is_left_as_it_is(value: float | str | None) -> None:
    quantity = replace(ITL, value=value)
    assert calibrate(quantity, past([0.1] * 30), "demo") is quantity


# ---------------------------------------------------------------- the store


def test_what_is_in_both_is_stored(store: Store) -> None:
    assert store.pairs() == [] and not store.path.exists()
    assert record_run(store, {"itl_s": 0.01, "only_predicted": 1}, {"itl_s": 0.02, "only_measured": 1}, HERE) == 1
    assert record_run(store, {"itl_s": 0.01}, {}, HERE) == 0
    (pair,) = store.pairs()
    assert (pair.quantity, pair.machine, pair.model, pair.version) == ("itl_s", HERE.machine, "demo", "1.0")
    assert (pair.predicted, pair.corrected, pair.measured, pair.label) == (0.01, 0.01, 0.02, "unmeasured")
    assert (pair.error, pair.covered) == (0.5, True)
    assert store.path.stat().st_mode & 0o077 == 0
    assert store.calibration("itl_s", HERE.machine).pairs == 1
    assert store.calibration("itl_s", "another machine").label == "unmeasured"
    assert store.calibration("ttft_s", HERE.machine).label == "unmeasured"


def test_a_prediction_is_stored_as_it_was_before_its_outcome(store: Store) -> None:
    for index in range(ENOUGH + 1):
        before = store.calibration("itl_s", HERE.machine)
        store.record({"itl_s": 1.0}, {"itl_s": 1.5}, HERE)
        pair = store.pairs()[-1]
        assert pair.label == before.label and pair.corrected == before.factor
        assert math.isclose(pair.high, before.factor * before.spread) and before.pairs == index
    assert pair.label == "calibrated" and pair.error < 0.15 and pair.raw_error == pytest.approx(1 / 3)


def test_only_the_newest_count(store: Store) -> None:
    store.record({"a": 1.0}, {"a": 1.0}, HERE)
    with sqlite3.connect(store.path) as connection:
        for log in [*[0.0] * 10, *[1.0] * WINDOW]:
            connection.execute(
                "INSERT INTO pair (run, quantity, predicted, corrected, low, high, label, measured) "
                "VALUES (1, 'a', 1, 1, 0.5, 2, 'uncalibrated', ?)",
                (math.exp(log),),
            )
    connection.close()
    assert store.calibration("a", HERE.machine) == past([1.0] * WINDOW)


@pytest.mark.parametrize("bad", [0, -1.0, math.nan, math.inf, True, "1", None, 1e-40])
@pytest.mark.parametrize("side", ["predicted", "measured"])
def test_a_bad_number_stores_nothing(store: Store, bad: float, side: str) -> None:
    given_numbers = {"predicted": {"good": 1.0, "bad": 1.0}, "measured": {"good": 1.0, "bad": 1.0}}
    given_numbers[side]["bad"] = bad
    with pytest.raises(InvalidParameter, match=rf"{side}\.bad: got .*allowed: a number from"):
        store.record(given_numbers["predicted"], given_numbers["measured"], HERE)
    assert store.pairs() == []


def test_bad_texts_are_refused(store: Store) -> None:
    for field in ("machine", "model", "version", "measured_at", "origin"):
        with pytest.raises(InvalidParameter, match=f"{field}: got"):
            store.record({"a": 1}, {"a": 1}, replace(HERE, **{field: "\n"}))
    with pytest.raises(InvalidParameter, match="quantity: got"):
        store.record({"": 1}, {"": 1}, HERE)


def test_names() -> None:
    assert machine_key("EPYC", 2) == "EPYC, 2 threads" and machine_key("H200") == "H200"


# ---------------------------------------------------------------- several processes


WRITER = """
import sys
from pathlib import Path
from headrace.plan.calibration import Context, Store

path, name, runs = sys.argv[1:]
store = Store(Path(path))
predicted, measured = dict.fromkeys((name, "b", "c"), 1.0), dict.fromkeys((name, "b", "c"), 2.0)
for _ in range(int(runs)):
    store.record(predicted, measured, Context("m", "demo", "test"))
"""


def start(path: Path, name: str, runs: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", WRITER, str(path), name, str(runs)])


@pytest.mark.parametrize("damaged", [False, True])
def test_two_processes_write(store: Store, damaged: bool) -> None:
    """Where both find the file damaged, it is moved aside once."""
    if damaged:
        store.path.parent.mkdir(parents=True)
        store.path.write_bytes(b"not a database" * 1000)
    processes = [start(store.path, name, 10) for name in ("x", "y")]
    for process in processes:
        assert process.wait(60) == 0
    counts = {name: sum(pair.quantity == name for pair in store.pairs()) for name in ("x", "y", "b", "c")}
    assert counts == {"x": 10, "y": 10, "b": 20, "c": 20}
    assert len(list(store.path.parent.glob("*.damaged-*"))) == damaged


def test_a_writer_is_killed(store: Store) -> None:
    process = start(store.path, "x", 100_000)
    end = monotonic() + 60
    while len(store.pairs()) < 30 and monotonic() < end:
        sleep(0.01)
    process.kill()
    process.wait(60)
    found = store.pairs()
    assert len(found) >= 30 and len(found) % 3 == 0 and store.notes == []
    store.record({"x": 1.0}, {"x": 1.0}, HERE)
    assert len(store.pairs()) == len(found) + 1


# ---------------------------------------------------------------- files that are not as they should be


def damaged(path: Path, how: str) -> bytes:
    data = bytearray(path.read_bytes())
    if how == "truncated":
        data = data[: len(data) // 2]
    elif how == "overwritten":
        data[4096:] = os.urandom(len(data) - 4096)
    else:
        data = bytearray(b"\x00garbage" * 500)
    path.write_bytes(data)
    return bytes(data)


@pytest.mark.parametrize("how", ["truncated", "overwritten", "garbage"])
@pytest.mark.parametrize("reading", [True, False])
def test_a_damaged_file_is_moved_aside(store: Store, how: str, reading: bool) -> None:
    neighbour = store.path.with_name("history")
    store.record({"a": 1.0}, {"a": 1.0}, HERE)
    neighbour.write_text("kept")
    data = damaged(store.path, how)
    if reading:
        assert store.pairs() == []
    assert store.record({"a": 1.0}, {"a": 2.0}, HERE) == 1
    (note,) = store.notes
    (aside,) = store.path.parent.glob("*.damaged-*")
    assert "was damaged" in note and str(aside) in note and "\n" not in note
    assert aside.read_bytes() == data and neighbour.read_text() == "kept"
    assert [pair.measured for pair in store.pairs()] == [2.0]
    assert note in accuracy(store).notes


def test_damage_twice_in_a_second_keeps_both(store: Store) -> None:
    for _ in range(2):
        store.record({"a": 1.0}, {"a": 1.0}, HERE)
        damaged(store.path, "garbage")
    store.record({"a": 1.0}, {"a": 1.0}, HERE)
    assert len(list(store.path.parent.glob("*.damaged-*"))) == len(store.notes) == 2


def test_files_of_others_are_left_alone(store: Store) -> None:
    store.record({"a": 1.0}, {"a": 1.0}, HERE)
    changes = {"application_id = 7": "another program", "user_version = 2": "has version 2, this headrace knows 1"}
    for pragma, message in changes.items():
        other = store.path.with_name(pragma.partition(" ")[0])
        other.write_bytes(store.path.read_bytes())
        connection = sqlite3.connect(other)
        connection.execute(f"PRAGMA {pragma}")
        connection.close()
        before = other.read_bytes()
        with pytest.raises(ConfigError, match=message):
            Store(other).pairs()
        with pytest.raises(ConfigError, match=message):
            Store(other).record({"a": 1.0}, {"a": 1.0}, HERE)
        assert other.read_bytes() == before


def test_where_nothing_can_be_written(tmp_path: Path) -> None:
    folder = tmp_path / "calibration.sqlite3"
    folder.mkdir()
    with pytest.raises(ConfigError, match="cannot be written"):
        Store(folder).record({"a": 1.0}, {"a": 1.0}, HERE)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        Store(tmp_path / "file" / "below").record({"a": 1.0}, {"a": 1.0}, HERE)
    assert Store(tmp_path / "nowhere" / "at all").pairs() == []


def test_an_empty_file_is_an_empty_store(store: Store) -> None:
    store.path.parent.mkdir(parents=True)
    store.path.touch()
    assert store.pairs() == [] and store.record({"a": 1.0}, {"a": 1.0}, HERE) == 1 and store.notes == []


# ---------------------------------------------------------------- what is shown of it


def test_accuracy_of_an_empty_store_says_what_fills_it(store: Store) -> None:
    document = accuracy(store)
    assert not document.tables and any("headrace compare" in note for note in document.notes)


def test_accuracy_by_quantity(store: Store) -> None:
    random = Random(1)
    for _ in range(40):
        store.record({"itl_s": 0.01, "rare": 4.0}, {"itl_s": 0.01 * math.exp(random.gauss(0.4, 0.1))}, HERE)
    store.record({"rare": 4.0}, {"rare": 5.0}, replace(HERE, model="another"))
    document = accuracy(store)
    (table,) = document.tables
    rows = {row[0]: dict(zip([column.name for column in table.columns], row, strict=True)) for row in table.rows}
    assert set(rows) == {"ITL", "rare"}
    rare = rows["rare"]
    assert rare["error"] == pytest.approx(20) and rare["within factor 2"] == 100
    assert rare["in the 80% interval"] is None and rare["pairs with one"] == 0
    itl = rows["ITL"]
    assert itl["pairs"] == 40 and itl["pairs with one"] == 20
    assert isinstance(itl["in the 80% interval"], float) and itl["in the 80% interval"] >= 55
    assert isinstance(itl["error"], float) and isinstance(itl["error of the formula"], float)
    assert itl["error"] < 0.6 * itl["error of the formula"]
    assert isinstance(itl["factor now"], float) and abs(math.log(itl["factor now"]) - 0.4) < 0.15
    for quantity in document.quantities:
        assert quantity.formula and quantity.source and quantity.basis == "measured"
    assert all(column.formula and column.source for column in table.columns[2:])
    assert len(document.plots[0].series) == 3
    assert LEVEL == 0.8 and document.data["pairs"] == 41
