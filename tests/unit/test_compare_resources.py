"""What a run takes of the machine: filled in where the method does not tell, from meters read around the run."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from headrace.compare import resources
from headrace.compare.figures import TOO_SHORT, run_joules
from headrace.compare.measure import run_rounds
from headrace.compare.methods import Outcome
from headrace.compare.resources import counting, cpu_seconds, idle_floor, reset_peak_rss, run_measured
from headrace.compare.workloads import Workload
from headrace.core.config import ResolvedConfig
from headrace.core.errors import EngineError, HeadraceError, InvalidParameter
from headrace.engine.energy import NvmlMeter, find_meters
from headrace.engine.hardware import peak_rss_bytes
from tests.unit.compare_cases import OUTPUTS, PlantedMethod, comparison, outcome, workload

MIB = 2**20
CONFIG = comparison({"serial": (outcome(OUTPUTS, 1.0),)}).config


class Steady:
    """A meter of constant power, on the machine's clock."""

    def __init__(self, watts: float, source: str = "rapl") -> None:
        self.watts = watts
        self.source = source
        self.last: float | None = None
        self.reads = 0

    def joules(self, now: float) -> float:
        self.reads += 1
        last, self.last = self.last, now
        return 0.0 if last is None else self.watts * (now - last)


class Working(PlantedMethod):
    """Runs a function, and answers with a planted outcome."""

    def __init__(
        self, name: str, work: Callable[[], object], found: Outcome, config: ResolvedConfig | None = CONFIG
    ) -> None:
        super().__init__(name)
        self.work, self.found, self.config = work, found, config  # type: ignore[assignment]

    def run(self, asked: Workload) -> Outcome:
        self.work()
        return self.found


def burn() -> None:
    """A twentieth of a second of this process's time, however long that takes. The user's part of it alone is an
    estimate by ticks, which may stand still for a second in a process that has run for long."""
    began = cpu_seconds()
    while cpu_seconds() - began < 0.05:
        sum(range(1000))


def pause() -> None:
    """Enough for a meter to move."""
    time.sleep(0.001)


def measured(method: PlantedMethod, meters: Sequence[Steady] = ()) -> Outcome:
    return run_measured(method, workload(2), meters)


class TestRunMeasured:
    def test_fills_in_what_the_method_left_open(self) -> None:
        meter = Steady(50.0)
        began = time.monotonic()
        found = measured(Working("fused", burn, outcome(OUTPUTS, 2.0)), [meter])
        took_s = time.monotonic() - began
        assert found.cpu_s is not None and 0.05 <= found.cpu_s <= took_s * 64
        assert 0 < found.joules["rapl"] <= 50.0 * took_s
        assert replace(found, cpu_s=None, peak_rss_bytes=None, joules={}) == outcome(OUTPUTS, 2.0)

    def test_keeps_what_the_method_told(self) -> None:
        told = replace(outcome(OUTPUTS, 2.0), cpu_s=7.0, peak_rss_bytes=5, joules={"nvml": 3.0})
        assert measured(Working("instances", burn, told), [Steady(50.0)]) == told

    def test_this_process_is_not_an_outside_engine(self) -> None:
        found = measured(Working("llama.cpp", burn, outcome(OUTPUTS, 2.0), None), [Steady(50.0)])
        assert found.cpu_s is None and found.peak_rss_bytes is None and found.joules["rapl"] > 0

    def test_this_machine_is_not_a_server_elsewhere(self) -> None:
        found = measured(Working("url:http://192.0.2.1", burn, outcome(OUTPUTS, 2.0), None), [Steady(50.0)])
        assert found == outcome(OUTPUTS, 2.0)

    def test_a_run_too_short_for_the_meter_is_labelled(self) -> None:
        for source, shortest in resources.SHORTEST_S.items():
            short = measured(Working("fused", pause, outcome(OUTPUTS, shortest * 0.9)), [Steady(5.0, source)])
            assert list(short.joules) == [source + TOO_SHORT] and run_joules(short) is None
            long = measured(Working("fused", pause, outcome(OUTPUTS, shortest)), [Steady(5.0, source)])
            assert list(long.joules) == [source]

    def test_a_meter_that_stands_still_has_not_measured_nothing(self) -> None:
        assert measured(Working("fused", burn, outcome(OUTPUTS, 2.0)), [Steady(0.0)]).joules == {}

    def test_peak_memory_is_of_the_run(self) -> None:
        if not reset_peak_rss():
            pytest.skip("this system does not let the peak be reset")
        held = bytearray(64 * MIB)
        held[:: 2**12] = b"\1" * len(held[:: 2**12])
        with_it = measured(Working("a", lambda: None, outcome(OUTPUTS, 2.0))).peak_rss_bytes
        del held
        without = measured(Working("b", lambda: None, outcome(OUTPUTS, 2.0))).peak_rss_bytes
        assert with_it is not None and without is not None
        assert with_it - without >= 48 * MIB
        assert peak_rss_bytes() < with_it, "the peak of the run before is forgotten"

    def test_where_the_peak_cannot_be_reset_it_is_not_told(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        assert not reset_peak_rss(tmp_path)
        monkeypatch.setattr(resources, "reset_peak_rss", lambda: False)
        assert measured(Working("fused", burn, outcome(OUTPUTS, 2.0))).peak_rss_bytes is None

    def test_rounds_are_measured_with_the_meters(self) -> None:
        def fail(name: str, error: HeadraceError) -> None:
            raise error

        methods = [Working(name, burn, outcome(OUTPUTS, 1.0)) for name in ("serial", "fused")]
        runs = run_rounds(methods, workload(2), 2, lambda said: None, fail, [Steady(50.0)])
        for outcomes in runs.values():
            assert len(outcomes) == 2
            assert all(one.joules["rapl"] > 0 and one.cpu_s is not None for one in outcomes)

    def test_a_failing_run_leaves_no_thread_behind(self) -> None:
        def fail() -> None:
            raise EngineError("its process has ended")

        meter = Steady(5.0)
        with pytest.raises(EngineError, match="its process has ended"):
            measured(Working("fused", fail, outcome(OUTPUTS, 1.0)), [meter])
        reads = meter.reads
        time.sleep(0.1)
        assert meter.reads == reads == 2


class PowerOnly:
    """The part of pynvml that a GPU without an energy counter answers: 100 W, then 300 W."""

    NVMLError_NotSupported = NVMLError = type("NVMLError", (Exception,), {})

    def __init__(self) -> None:
        self.milliwatts = 100_000

    def nvmlDeviceGetTotalEnergyConsumption(self, device: object) -> int:  # noqa: N802
        raise self.NVMLError

    def nvmlDeviceGetPowerUsage(self, device: object) -> int:  # noqa: N802
        return self.milliwatts


def test_a_meter_of_power_alone_is_read_all_the_while() -> None:
    """Two readings would miss what happened between them."""
    nvml = PowerOnly()
    meter = NvmlMeter(nvml, [object()])
    meter.joules(time.monotonic())
    assert meter.by_power
    with counting([meter]) as found:
        nvml.milliwatts = 300_000
        time.sleep(0.4)
        nvml.milliwatts = 100_000
    assert found["nvml"] >= 300 * 0.4 * 0.7, "the trapezoid of the two ends alone would give 100 W"


class TestIdleFloor:
    def test_power_without_work(self) -> None:
        floor = idle_floor([Steady(20.0), Steady(30.0, "nvml")], 2.0, lambda seconds: time.sleep(0.05))
        assert floor.watts == pytest.approx(50.0, rel=0.3) and floor.source == "rapl+nvml"
        assert str(replace(floor, watts=50.0)).startswith("idle floor 50.0 W (rapl+nvml, measured for ")

    def test_above_it(self) -> None:
        floor = resources.IdleFloor(10.0, 10.0, "rapl")
        run = replace(outcome(OUTPUTS, 2.0), joules={"rapl": 50.0})
        assert floor.above(run) == 30.0
        assert floor.above(replace(run, joules={"rapl": 5.0})) == 0.0
        assert floor.above(replace(run, joules={})) is None
        assert floor.above(replace(run, joules={"estimated": 50.0})) is None, "never mixed with measured ones"

    @pytest.mark.parametrize("seconds", [0.0, -1.0, 0.05, math.nan, math.inf])
    def test_odd_times_are_refused(self, seconds: float) -> None:
        with pytest.raises(InvalidParameter, match=r"^idle: got .*, allowed: seconds > 0, at least 0.1"):
            idle_floor([Steady(5.0)], seconds)

    def test_no_meter_that_moves(self) -> None:
        for meters in ([], [Steady(0.0)]):
            with pytest.raises(EngineError, match="no meter"):
                idle_floor(meters, 1.0, lambda seconds: None)


def test_this_machines_meters_count_a_run() -> None:
    found = measured(Working("fused", lambda: (burn(), time.sleep(0.05)), outcome(OUTPUTS, 60.0)), find_meters(False))  # type: ignore[arg-type]
    assert set(found.joules) <= {"rapl", "estimated"} and all(value > 0 for value in found.joules.values())
