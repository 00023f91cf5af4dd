"""The catalogue of devices, and profiles of probes as files and as devices."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from headrace.core.errors import InputFileError, InvalidParameter
from headrace.core.sizing import DTYPE_BYTES
from headrace.plan.devices import DEVICES, find_device
from headrace.plan.profile import (
    Figure,
    Machine,
    Profile,
    check_writable,
    default_path,
    read_profile,
    write_profile,
)

MACHINE = Machine(
    cpu="Some CPU",
    cores=8,
    threads=8,
    instruction_set="avx2",
    memory_bytes=64 * 10**9,
    caches={"L1": 32768, "L3": 2**25},
    system="Linux x86_64",
    python="3.11.7",
    libraries={"headrace": "0.1.0", "numpy": "2.0"},
    date="2026-01-02T03:04:05+00:00",
    load_average=0.1,
    busy_cores=0.05,
)


def gemm(weights: str, rows: int, n: int, *rounds: float, set_bytes: int = 2**27) -> Figure:
    return Figure("gemm", {"weights": weights, "rows": rows, "n": n, "k": n, "set_bytes": set_bytes}, "FLOP/s", rounds)


FIGURES = (
    gemm("float32", 1, 2048, 10e9, 10.1e9, 10.2e9),
    gemm("float32", 100, 2048, 1000e9, 1000e9, 1000e9),
    gemm("float32", 1, 640, 5e9, 5e9, 5e9),
    gemm("float32", 1, 640, 20e9, 20e9, 20e9, set_bytes=2**25),
    gemm("int8", 256, 2048, 3000e9, 3000e9, 3000e9),
    gemm("int4", 256, 2048, 3100e9, 3100e9, 3100e9),
    Figure("read", {"bytes": 2**20}, "bytes/s", (400e9, 400e9, 400e9)),
    Figure("read", {"bytes": 2**28}, "bytes/s", (100e9, 100e9, 100e9)),
    Figure("stream", {"kind": "triad"}, "bytes/s", (90e9, 91e9, 92e9)),
    Figure("attend", {"dtype": "int8"}, "bytes/s", (50e9, 50e9, 50e9)),
    Figure("step", {"rows": 1}, "s", (20e-6, 20e-6, 20e-6)),
    Figure("step", {"rows": 32}, "s", (51e-6, 51e-6, 51e-6)),
    Figure("host_link", {"to": "device"}, "bytes/s", (), "not there: no CUDA driver"),
)
PROFILE = Profile(MACHINE, FIGURES, 40.0)


# ---------------------------------------------------------------- devices

# planning.md §2: dense TFLOPS of 16-bit types, of fp8 or int8, memory GB, GB/s, W, $/h.
TABLE = {
    "L4": (121, ("fp8", 242), 24, 300, 72, 0.70),
    "A10G": (125, ("int8", 250), 24, 600, 300, 1.01),
    "A100-40GB": (312, ("int8", 624), 40, 1555, 400, None),
    "A100-80GB": (312, ("int8", 624), 80, 2039, 400, 3.67),
    "H100": (989, ("fp8", 1979), 80, 3350, 700, 7.516),
    "H200": (989, ("fp8", 1979), 141, 4800, 700, None),
    "T4": (65, ("int8", 130), 16, 320, 70, None),
    "V100": (125, None, 32, 900, 300, None),
    "RTX-4090": (165, ("fp8", 330), 24, 1008, 450, None),
    "MI250X": (191.5, None, 64, 1638, 280, None),
}


@pytest.mark.parametrize("name", TABLE)
def test_the_catalogue_is_the_published_table(name: str) -> None:
    half, eight, memory, bandwidth, watts, price = TABLE[name]
    device = find_device(name)
    assert device.flops["float16"] == pytest.approx(half * 1e12)
    if eight is not None:
        assert device.flops[eight[0]] == pytest.approx(eight[1] * 1e12)
    assert (device.memory_bytes, device.bandwidth) == (memory * 10**9, bandwidth * 10**9)
    assert (device.watts, device.price_per_hour) == (watts, price)


def test_a_device_has_a_source_and_knows_only_types_that_are_known() -> None:
    for name, device in DEVICES.items():
        assert device.name == name and device.source
        assert device.flops and device.flops.keys() <= DTYPE_BYTES.keys()
        assert min(device.flops.values()) > 0 and device.memory_bytes > 0 and device.bandwidth > 0
        assert device.basis == ("published" if device.kind == "pim" else "data sheet")
    assert {device.kind for device in DEVICES.values()} == {"gpu", "cpu", "pim"}
    assert "bfloat16" not in DEVICES["T4"].flops and "bfloat16" not in DEVICES["V100"].flops


@pytest.mark.parametrize(
    ("said", "name"),
    [
        ("a100", "A100-80GB"),
        ("NVIDIA A100 80GB", "A100-80GB"),
        ("a100_40", "A100-40GB"),
        ("NVIDIA H200", "H200"),
        ("rtx 4090", "RTX-4090"),
        ("8480C", "Dual-SPR-8480C"),
        ("pim-gpt", "PIM-GPT-v2"),
    ],
)
def test_a_device_is_found_however_it_is_written(said: str, name: str) -> None:
    assert find_device(said) is DEVICES[name]


@pytest.mark.parametrize("said", ["", "a200", "gb", "H100" * 100])
def test_an_unknown_device_lists_the_known(said: str) -> None:
    with pytest.raises(InvalidParameter) as caught:
        find_device(said)
    assert all(name in str(caught.value) for name in DEVICES)
    assert len(str(caught.value)) < 400


def test_the_pim_entry_says_which_version_and_that_it_was_simulated() -> None:
    source = DEVICES["PIM-GPT-v2"].source
    assert "version 2" in source and "simulated" in source


# ---------------------------------------------------------------- profiles


def test_rates_lie_between_what_was_measured() -> None:
    assert PROFILE.gemm_rate("float32", 1) == pytest.approx(10.1e9)
    assert PROFILE.gemm_rate("float32", 10) == pytest.approx((10.1e9 * 1000e9) ** 0.5)
    assert PROFILE.gemm_rate("float32", 1000) == PROFILE.gemm_rate("float32", 100) == pytest.approx(1000e9)
    assert PROFILE.gemm_rate("float32", 64, n=576) == pytest.approx(5e9)
    assert PROFILE.gemm_rate("float32", 1, n=(640 * 2048) ** 0.5) == pytest.approx((5e9 * 10.1e9) ** 0.5)
    # Weights of 64 MiB, between sets of 32 and of 128; smaller and larger ones as at the nearest.
    assert PROFILE.gemm_rate("float32", 1, 576, 2**26) == pytest.approx(10e9)
    assert PROFILE.gemm_rate("float32", 1, 576, 2**20) == pytest.approx(20e9)
    assert PROFILE.gemm_rate("float32", 1, 576, 2**40) == pytest.approx(5e9)
    assert PROFILE.read_bandwidth() == pytest.approx(100e9)
    assert PROFILE.step_seconds(1) == pytest.approx(20e-6)
    assert PROFILE.step_seconds(63) == pytest.approx(82e-6)
    assert PROFILE.kv_bandwidth("int8") == pytest.approx(50e9)


def test_what_was_not_measured_is_refused() -> None:
    for ask in (
        lambda: PROFILE.value("gemm", weights="fp8"),
        lambda: PROFILE.gemm_rate("fp8", 1),
        lambda: PROFILE.kv_bandwidth("fp8"),
        lambda: PROFILE.value("host_link", to="device"),
        lambda: replace(PROFILE, figures=()).read_bandwidth(),
        lambda: replace(PROFILE, figures=()).step_seconds(),
    ):
        with pytest.raises(InvalidParameter, match="a probe that measured"):
            ask()


def test_a_profile_is_a_device() -> None:
    device = PROFILE.device()
    assert (device.kind, device.name, device.basis) == ("cpu", "Some CPU", "measured")
    assert device.flops == {"float32": 1000e9, "int8": 3100e9}
    assert (device.bandwidth, device.memory_bytes, device.host_link) == (100e9, 64 * 10**9, None)
    assert "2026-01-02" in device.source


def test_a_steady_quiet_probe_is_repeatable() -> None:
    assert PROFILE.repeatable and PROFILE.verdict.startswith("repeatable")
    assert PROFILE.worst_spread == pytest.approx(2 / 91)


def test_a_noisy_probe_says_so_and_keeps_its_spread() -> None:
    noisy = replace(PROFILE, figures=(*FIGURES, gemm("int8", 1, 2048, 80e9, 100e9, 112e9)))
    assert not noisy.repeatable
    assert noisy.verdict.startswith("too noisy, spread 32%: 1 of 11 figures vary by more than 5%")
    assert noisy.figures[-1].verdict == "too noisy, spread 32%"
    # A disk and the times of steps are judged by themselves.
    assert replace(PROFILE, figures=(*FIGURES, Figure("disk", {}, "bytes/s", (1e9, 2e9, 3e9)))).repeatable


def test_a_probe_of_a_busy_machine_is_not_called_repeatable() -> None:
    # A tenth of the cores is the most: what others take, figures of all cores lose.
    busy = replace(PROFILE, machine=replace(MACHINE, busy_cores=0.9))
    assert not busy.repeatable
    assert "other programs used 0.9 of 8 cores" in busy.verdict
    assert replace(PROFILE, machine=replace(MACHINE, busy_cores=0.8)).repeatable


def test_fewer_than_three_rounds_are_not_called_repeatable() -> None:
    once = replace(PROFILE, figures=[replace(one, rounds=one.rounds[:1]) for one in FIGURES])
    assert not once.repeatable and "1 of 3 rounds" in once.verdict
    assert once.figures[0].verdict == "1 of 3 rounds" and FIGURES[0].verdict == "repeatable"
    empty = replace(PROFILE, figures=())
    assert not empty.repeatable and "0 of 3 rounds" in empty.verdict


def test_a_profile_comes_back_from_its_file(tmp_path: Path) -> None:
    path = default_path(tmp_path / "state")
    write_profile(PROFILE, path)
    again = read_profile(path)
    assert again == PROFILE and again.path == str(path)
    written = json.loads(path.read_text())
    assert written["repeatable"] is True and written["verdict"] == PROFILE.verdict
    assert written["figures"][0]["spread"] == pytest.approx(0.2 / 10.1)
    assert [file.name for file in path.parent.iterdir()] == ["probe.json"]


def spoil(change: dict[str, object]) -> str:
    return json.dumps(PROFILE.as_json() | change)


FIGURE = PROFILE.as_json()["figures"][0]  # type: ignore[index]
MACHINE_JSON = PROFILE.as_json()["machine"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        "[" * 100_000,
        '{"format": "headrace-probe-0"}',
        spoil({"machine": {}}),
        spoil({"machine": None}),
        spoil({"machine": {**MACHINE_JSON, "cores": 0}}),  # type: ignore[dict-item]
        spoil({"machine": {**MACHINE_JSON, "busy_cores": "few"}}),  # type: ignore[dict-item]
        spoil({"machine": {**MACHINE_JSON, "caches": [1]}}),  # type: ignore[dict-item]
        spoil({"machine": {**MACHINE_JSON, "cpu": None}}),  # type: ignore[dict-item]
        spoil({"seconds": "long"}),
        spoil({"figures": 5}),
        spoil({"figures": [5]}),
        spoil({"figures": [FIGURE | {"rounds": [1.0, -1.0]}]}),
        spoil({"figures": [FIGURE | {"rounds": 1}]}),
        spoil({"figures": [FIGURE | {"name": 1}]}),
        spoil({"figures": [FIGURE | {"of": {"weights": "int8"}}]}),
        spoil({"figures": [FIGURE | {"of": {"rows": []}}]}),
        spoil({"figures": [FIGURE | {"name": "card", "of": {"memory_bytes": 1}}]}),
        '{"format": "headrace-probe-1", "seconds": NaN}',
    ],
)
def test_what_is_no_profile_is_refused_in_a_line(text: str, tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    path.write_text(text)
    with pytest.raises(InputFileError, match="not a probe's profile") as caught:
        read_profile(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400 + len(str(path))


def test_files_that_cannot_be_read_or_written(tmp_path: Path) -> None:
    with pytest.raises(InputFileError, match="headrace plan probe"):
        read_profile(tmp_path / "none.json")
    with pytest.raises(InputFileError):
        read_profile(tmp_path)
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file" / "p.json", tmp_path):
        with pytest.raises(InvalidParameter):
            check_writable(path)
        with pytest.raises(InvalidParameter):
            write_profile(PROFILE, path)
    assert [one.name for one in tmp_path.iterdir()] == ["file"]
