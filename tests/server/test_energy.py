"""Meters read as the kernel and the driver write them, and each request's share of what they say."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.engine.energy import WATTS_PER_CORE, LoadMeter, NvmlMeter, RaplMeter, find_meters, physical_cores
from headrace.engine.nvml import Card
from headrace.server.energy import Energy
from headrace.server.metrics import ServerMetrics


class Steps:
    """A meter that tells the next of these figures at each call; nothing at the first, as all meters."""

    source = "rapl"

    def __init__(self, figures: Sequence[float]) -> None:
        self.figures = [0.0, *figures]

    def joules(self, now: float) -> float:
        return self.figures.pop(0)


def zone(root: Path, number: str, name: str, energy_uj: int, wrap: int = 1_000_000) -> Path:
    folder = root / "sys/class/powercap" / f"intel-rapl:{number}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "name").write_text(f"{name}\n")
    (folder / "energy_uj").write_text(f"{energy_uj}\n")
    (folder / "max_energy_range_uj").write_text(f"{wrap}\n")
    return folder / "energy_uj"


def test_rapl_counts_packages_and_memory_and_goes_on_after_a_wrap(tmp_path: Path) -> None:
    package = zone(tmp_path, "0", "package-0", 900_000)
    memory = zone(tmp_path, "0:1", "dram", 0)
    core = zone(tmp_path, "0:0", "core", 0)
    meter = RaplMeter.find(tmp_path)
    assert meter is not None
    assert meter.joules(0.0) == 0
    package.write_text("950000\n")
    memory.write_text("5000\n")
    core.write_text("40000\n")
    assert meter.joules(1.0) == pytest.approx(0.055), "a core lies inside its package"
    package.write_text("20000\n")
    assert meter.joules(2.0) == pytest.approx(0.07), "50,000 to the wrap and 20,000 after it"


def test_rapl_takes_the_whole_platform_alone_where_it_is_counted(tmp_path: Path) -> None:
    package, platform = zone(tmp_path, "0", "package-0", 0), zone(tmp_path, "1", "psys", 0)
    meter = RaplMeter.find(tmp_path)
    assert meter is not None
    package.write_text("300000")
    platform.write_text("500000")
    assert meter.joules(1.0) == pytest.approx(0.5)


def test_rapl_that_is_silent_for_a_while_counts_later(tmp_path: Path) -> None:
    package = zone(tmp_path, "0", "package-0", 0)
    meter = RaplMeter.find(tmp_path)
    assert meter is not None
    package.unlink()
    assert meter.joules(1.0) == 0
    package.write_text("250000")
    assert meter.joules(2.0) == pytest.approx(0.25)


def test_no_rapl(tmp_path: Path) -> None:
    assert RaplMeter.find(tmp_path) is None
    zone(tmp_path, "0:1", "dram", 0)
    assert RaplMeter.find(tmp_path) is None, "memory alone is not the machine"
    zone(tmp_path, "0", "package-0", 0).unlink()
    assert RaplMeter.find(tmp_path) is None, "there, but not to be read"


def stat(root: Path, *lines: str) -> None:
    (root / "proc").mkdir(exist_ok=True)
    (root / "proc/stat").write_text("\n".join(("cpu  9 9 9 9 9 9 9 9 9 9", *lines, "intr 5", "")))


def test_load_is_that_of_the_cpus_that_may_be_used(tmp_path: Path) -> None:
    stat(tmp_path, "cpu0 0 0 0 0 0 0 0 0 0 0", "cpu1 0 0 0 0 0 0 0 0 0 0", "cpu10 0 0 0 0 0 0 0 0 0 0")
    meter = LoadMeter([0, 1], tmp_path, watts_per_core=10)
    assert meter.joules(5.0) == 0
    # cpu0: 60 of 100 ticks at work (idle and iowait are none); cpu1: 20 of 100; cpu10 is not ours.
    stat(tmp_path, "cpu0 40 5 10 30 10 0 0 5 7 0", "cpu1 20 0 0 80 0 0 0 0 0 0", "cpu10 500 0 0 0 0 0 0 0 0 0")
    assert meter.joules(7.0) == pytest.approx(2 * 10 * 0.4 * 2)
    assert meter.joules(8.0) == 0, "no tick has passed"
    (tmp_path / "proc/stat").unlink()
    assert meter.joules(9.0) == 0
    stat(tmp_path, "cpu0 40 5 10 30 10 0 0 5 7 0", "cpu1 20 0 0 80 0 0 0 0 0 0")
    assert meter.joules(10.0) >= 0


@pytest.mark.parametrize(
    ("siblings", "cores"),
    [({}, 2.0), ({0: "0-1", 1: "0-1"}, 1.0), ({0: "0,56", 1: "1,57"}, 1.0), ({0: "0", 1: "?"}, 2.0)],
)
def test_two_threads_are_one_core(tmp_path: Path, siblings: dict[int, str], cores: float) -> None:
    for cpu, text in siblings.items():
        folder = tmp_path / f"sys/devices/system/cpu/cpu{cpu}/topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{text}\n")
    assert physical_cores([0, 1], tmp_path) == cores


def test_full_power_of_a_core() -> None:
    assert pytest.approx(9.82, abs=0.005) == WATTS_PER_CORE


class FakeNvml(ModuleType):
    """The part of pynvml that is used: devices are lists of what they answer, energies (mJ) or powers (mW)."""

    class NVMLError(Exception):
        pass

    class NVMLError_NotSupported(NVMLError):  # noqa: N801 (the package's own name)
        pass

    def __init__(self, *devices: list[int | None], has_energy: bool = True) -> None:
        super().__init__("pynvml")
        self.devices = devices
        self.has_energy = has_energy

    def nvmlInit(self) -> None:  # noqa: N802
        if not self.devices:
            raise self.NVMLError("Driver Not Loaded")

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return len(self.devices)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> list[int | None]:  # noqa: N802
        return self.devices[index]

    def _next(self, device: list[int | None]) -> int:
        value = device.pop(0)
        if value is None:
            raise self.NVMLError("GPU is lost")
        return value

    def nvmlDeviceGetTotalEnergyConsumption(self, device: list[int | None]) -> int:  # noqa: N802
        if not self.has_energy:
            raise self.NVMLError_NotSupported("Not Supported")
        return self._next(device)

    def nvmlDeviceGetPowerUsage(self, device: list[int | None]) -> int:  # noqa: N802
        return self._next(device)


def nvml_meter(monkeypatch: pytest.MonkeyPatch, module: FakeNvml | None) -> NvmlMeter | None:
    monkeypatch.setitem(sys.modules, "pynvml", module)
    return NvmlMeter.find()


def test_nvml_adds_devices_and_survives_a_reset_and_a_lost_one(monkeypatch: pytest.MonkeyPatch) -> None:
    meter = nvml_meter(monkeypatch, FakeNvml([1000, 3000, 500, 700], [0, 4000, None, 9000]))
    assert meter is not None
    assert meter.joules(1.0) == pytest.approx(2 + 4)
    assert meter.joules(2.0) == pytest.approx(0.5), "the first began anew; the second did not answer"
    assert meter.joules(3.0) == pytest.approx(0.2 + 5)


def test_nvml_without_energy_takes_power_by_the_trapezoid_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    module = FakeNvml([100_000, 100_000, 200_000, 300_000], has_energy=False)
    meter = NvmlMeter(module, module.devices)
    assert meter.joules(10.0) == 0
    assert meter.joules(11.0) == pytest.approx(100)
    assert meter.joules(13.0) == pytest.approx(300)
    assert meter.joules(13.5) == pytest.approx(125)


@pytest.mark.parametrize("module", [None, FakeNvml(), FakeNvml([None])])
def test_no_nvml(monkeypatch: pytest.MonkeyPatch, module: FakeNvml | None) -> None:
    assert nvml_meter(monkeypatch, module) is None


def test_meters_of_a_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert [meter.source for meter in find_meters(cuda=False, root=tmp_path)] == ["estimated"]
    zone(tmp_path, "0", "package-0", 0)
    assert [meter.source for meter in find_meters(cuda=False, root=tmp_path)] == ["rapl"]
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml([0, 0]))
    assert [meter.source for meter in find_meters(cuda=False, root=tmp_path)] == ["rapl"], "the GPU does other work"
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml([0, 0]))
    meters = find_meters(cuda=True, root=tmp_path)
    assert Energy(meters).source == "nvml+rapl"


def test_this_machine_has_a_meter() -> None:
    energy = Energy(find_meters(cuda=False))
    assert energy.source in ("rapl", "estimated")
    sum(i * i for i in range(200_000))
    energy.sample()
    assert all(joules >= 0 for joules in energy.totals.values())


def test_a_request_alone_gets_all_and_two_equal_ones_halves() -> None:
    energy = Energy([Steps([10, 6, 8])])
    first = energy.begin(5)
    first.tokens += 3
    energy.sample()
    assert first.joules == pytest.approx(10)
    second = energy.begin(5)
    for share in (first, second):
        share.tokens += 7
    energy.sample()
    assert (first.joules, second.joules) == (pytest.approx(13), pytest.approx(3))
    energy.end(first)
    energy.end(second)
    energy.sample()
    assert energy.requests.count == 2
    assert energy.requests.sum == pytest.approx(16), "what passed after the last token belongs to none"


def test_a_long_prompt_pays_for_the_seconds_before_its_first_token() -> None:
    energy = Energy([Steps([5, 5, 5, 2])])
    share = energy.begin(1000)
    energy.sample()
    energy.sample()
    assert share.joules == 0
    share.tokens += 1001
    energy.sample()
    assert share.joules == pytest.approx(15)
    energy.end(share)
    energy.sample()
    assert energy.totals["rapl"] == 17


def test_tokens_of_prompt_and_answer_count_alike() -> None:
    energy = Energy([Steps([40, 0])])
    metrics = ServerMetrics("demo", 64, energy=energy)
    shares = [metrics.begin(prompt) for prompt in (25, 5)]
    for share in shares:
        metrics.first_token(0.1, share)
        metrics.tokens(1, None, share)
        metrics.tokens(4, 0.1, share)
    energy.sample()
    assert [share and share.joules for share in shares] == [pytest.approx(30), pytest.approx(10)]


def test_idle_time_belongs_to_nobody() -> None:
    energy = Energy([Steps([50, 3, 50, 1])])
    energy.sample()
    share = energy.begin(1)
    share.tokens += 1
    energy.end(share)
    energy.sample()
    assert energy.requests.sum == pytest.approx(3)
    left = energy.begin(1)
    energy.end(left)
    energy.sample()
    share = energy.begin(1)
    share.tokens += 1
    energy.end(share)
    energy.sample()
    assert energy.requests.count == 2, "one without a token is not measured"
    assert energy.requests.sum == pytest.approx(4)


@given(
    st.lists(
        st.tuples(st.floats(0, 1000), st.lists(st.tuples(st.integers(0, 5), st.integers(0, 50)), max_size=6)),
        min_size=1,
        max_size=8,
    )
)
def test_shares_add_up_to_what_was_measured(seconds: list[tuple[float, list[tuple[int, int]]]]) -> None:
    energy = Energy([Steps([joules for joules, _ in seconds])], price_per_kwh=0.5)
    shares = [energy.begin(0) for _ in range(6)]
    measured = waiting = 0.0
    for joules, tokens in seconds:
        for index, count in tokens:
            shares[index].tokens += count
        waiting += joules
        if any(count for _, count in tokens):
            measured, waiting = measured + waiting, 0.0
        energy.sample()
    assert sum(share.joules for share in shares) == pytest.approx(measured, rel=1e-9, abs=1e-6)
    assert math.fsum(energy.totals.values()) == pytest.approx(math.fsum(joules for joules, _ in seconds), abs=1e-6)
    energy._meters = ()
    for share in shares:
        energy.end(share)
    energy.sample()
    assert energy.cost == pytest.approx(measured / 3.6e6 * 0.5, abs=1e-9)


def test_of_several_gpus_the_one_that_torch_uses_is_metered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver's library says which; its name there is the UUID."""

    class Named(FakeNvml):
        def nvmlDeviceGetHandleByUUID(self, uuid: str) -> list[int | None]:  # noqa: N802
            return self.devices[int(uuid.removeprefix("GPU-"))]

    card = Card("NVIDIA H200", None, None, (9, 0), None, None, "GPU-1")
    monkeypatch.setattr("headrace.engine.energy.find_cards", lambda visible: ((card,), None))
    meter = nvml_meter(monkeypatch, Named([0, 9000], [100, 4100]))
    assert meter is not None and meter.joules(1.0) == 4.0
