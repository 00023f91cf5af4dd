"""The probe of this machine: small versions of each measurement, and that what they compute is what they say."""

from __future__ import annotations

import argparse
import ctypes
import json
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from headrace.cli import plan_probe
from headrace.core.errors import BackendUnavailable, ConfigError, InvalidParameter
from headrace.engine.hardware import ROOT
from headrace.plan import probe, probe_applications, probe_disk, probe_native
from headrace.plan.probe import run_probe
from headrace.plan.probe_applications import Applications, conjugate_gradients
from headrace.plan.probe_card import Card
from headrace.plan.probe_disk import Disk, file_system
from headrace.plan.probe_document import describe
from headrace.plan.probe_link import HostLink
from headrace.plan.probe_memory import STREAM_WORDS, Gather, Read, Stream, triad, triad_in_blocks
from headrace.plan.probe_tools import Bench, Watch, find_caches, last_cache, share, usable_cpus
from headrace.plan.profile import Figure, Machine, Profile, default_path, read_profile, write_profile
from headrace.plan.roofline import attainable, product_intensity, roofline

COMPILER = shutil.which("cc")
MACHINE = Machine("Some CPU", 2, 2, None, 2**33, {}, "Linux", "3.11", {}, "2026-01-02", 0.0, 0.0)


def small(threads: int = 2) -> Bench:
    return Bench(threads, cache_bytes=1 << 16, memory_bytes=1 << 18, seconds=0.001)


# ---------------------------------------------------------------- tools


def test_caches_are_read_from_the_system(tmp_path: Path) -> None:
    """Two processors that share nothing but their second-level cache."""
    kinds = [("1", "Data", "32K", "{}"), ("1", "Instruction", "64K", "{}"), ("2", "Unified", "512K", "0-1")]
    for cpu in (0, 1, 2):
        for index, (level, kind, size, shared) in enumerate([*kinds, ("3", "Unified", "32M", "{}")]):
            folder = tmp_path / f"sys/devices/system/cpu/cpu{cpu}/cache/index{index}"
            folder.mkdir(parents=True)
            for name, text in (("level", level), ("type", kind), ("size", size), ("shared_cpu_list", shared)):
                (folder / name).write_text(text.format(cpu) + "\n")
    caches = find_caches([0, 1], tmp_path)
    assert caches == {"L1": (2**15, 2), "L2": (2**19, 1), "L3": (2**25, 2)}
    assert last_cache(caches) == 2**26
    assert find_caches([0], tmp_path / "none") == {} and last_cache({}) > 0


def test_shares_are_everything_once() -> None:
    parts = [range(10)[share(10, thread, 3)] for thread in range(3)]
    assert [index for part in parts for index in part] == list(range(10))


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_pass_together(threads: int) -> None:
    seen: set[int] = set()

    def make(thread: int) -> Any:
        seen.add(threading.get_ident())
        return lambda: time.sleep(0.002)

    assert 0.002 <= small(threads).together(make) < 0.2
    assert len(seen) == threads


@pytest.mark.parametrize("broken", [0, 1])
def test_a_thread_that_fails_ends_all(broken: int) -> None:
    def make(thread: int) -> Any:
        def work() -> None:
            if thread == broken:
                raise MemoryError("none left")

        return work

    before = threading.active_count()
    with pytest.raises(MemoryError, match="none left"):
        small(2).together(make)
    assert threading.active_count() == before


# ---------------------------------------------------------------- memory


def test_stream_does_what_its_loops_say() -> None:
    stream = Stream(small(2))
    a, b, c = stream._arrays
    assert (a[0], b[0], c[0]) == (1, 2, 3) and a.nbytes == 1 << 18
    measured = {what.of["kind"]: rate for what, rate in stream.round()}
    assert measured.keys() == STREAM_WORDS.keys() and min(measured.values()) > 0
    # copy: c = 1; scale: b = 3; add: c = 4; triad: a = 3 + 3 · 4
    assert (b == 3).all() and (c == 4).all() and (a == 15).all()


@pytest.mark.parametrize("make", [triad, triad_in_blocks])
def test_triad_is_exact(make: Any) -> None:
    random = np.random.default_rng(1)
    a, b, c = (random.standard_normal(200_003) for _ in range(3))
    make(a, b, c)()
    assert np.array_equal(a, b + 3.0 * c)


def test_reading_goes_from_the_first_cache_to_memory() -> None:
    bench = small(2)
    found = [(what.of["bytes"], rate) for what, rate in Read(bench).round()]
    assert [size for size, _ in found] == [42 << 10, 168 << 10, bench.large]
    assert min(rate for _, rate in found) > 0


def test_a_gather_moves_every_piece() -> None:
    gather = Gather(small(2))
    gather._pool[:] = np.arange(len(gather._pool))
    assert [what.of["piece_bytes"] for what, _ in gather.round()] == [1 << 10, 1 << 14]
    pieces = gather._out.reshape(-1, 1 << 12)
    assert sorted(pieces[:, 0]) == gather._pool[:: 1 << 12].tolist()
    assert (np.diff(pieces, axis=1) == 1).all()


# ---------------------------------------------------------------- applications


def test_applications_have_an_intensity() -> None:
    pytest.importorskip("scipy")
    found = {what.of["kernel"]: (what.of["intensity"], rate) for what, rate in Applications(small()).round()}
    # FLOPs a byte: 2 n² of 4 n² bytes, 4 of 16, and of CSR about 10 of 80.
    assert found["GEMV"][0] == pytest.approx(0.5, rel=0.02) and found["Jacobi"][0] == 0.25
    assert found["SpMV"][0] == pytest.approx(1 / 8, rel=0.05)
    assert found["CG"][0] < found["SpMV"][0] and min(rate for _, rate in found.values()) > 0


def test_conjugate_gradients_solve() -> None:
    random = np.random.default_rng(2)
    root = random.standard_normal((12, 12))
    matrix, b = root @ root.T + np.eye(12), random.standard_normal(12)
    x, residual = conjugate_gradients(matrix, b, 14)
    assert np.allclose(matrix @ x, b, atol=1e-6) and residual < 1e-10


def test_without_scipy_two_are_left_out_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe_applications, "find_spec", lambda name: None)
    bench = small()
    assert [what.of["kernel"] for what, _ in Applications(bench).round()] == ["GEMV", "Jacobi"]
    assert [one.of["kernel"] for one in bench.skipped] == ["SpMV", "CG"]
    assert all("pip install 'headrace[plan]'" in one.note for one in bench.skipped)


# ---------------------------------------------------------------- disk and link


def test_a_disk_is_read_and_left_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe_disk, "FILE_BYTES", 2 * probe_disk.CHUNK)
    folder, bench = tmp_path / "new" / "folder", small()
    disk = Disk(bench, folder)
    (what, rate), *more = disk.round()
    assert not more and rate > 0 and str(folder) in what.note
    # However long a disk takes, what was read until then is its rate.
    monkeypatch.setattr(probe_disk, "MOST_S", 0.0)
    assert [rate > 0 for _, rate in disk.round()] == [True]
    # It has no name, so that nothing is left of it however a probe ends.
    assert not bench.skipped and not list(folder.iterdir())
    disk.close()
    assert not list(disk.round())


def test_a_disk_that_cannot_be_written_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    for folder, most, why in ((tmp_path / "file", 1, "exists"), (tmp_path, 1 << 60, "MiB are free")):
        monkeypatch.setattr(probe_disk, "FILE_BYTES", most)
        bench = small()
        disk = Disk(bench, folder)
        assert not list(disk.round()) and why in bench.skipped[0].note
        disk.close()


def test_the_mount_that_holds_a_folder_is_found(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/mounts").write_text("a / ext4 rw 0 0\nb /data/fast xfs rw 0 0\nc /data tmpfs rw 0 0\nodd\n")
    for folder, kind in (("/data/fast/x", "xfs"), ("/data/fastest", "tmpfs"), ("/home", "ext4")):
        assert file_system(Path(folder), tmp_path) == kind
    assert file_system(Path("/home"), tmp_path / "none") == "file system unknown"


CUDA = r"""
#include <string.h>
static int held = 0;
int cuInit(unsigned flags) { return NO_DRIVER ? 100 : 0; }
int cuDeviceGetCount(int *count) { *count = CARDS; return 0; }
int cuDeviceGet(int *device, int index) { *device = 7; return 0; }
int cuDevicePrimaryCtxRetain(void **context, int device) { *context = &held; held++; return device != 7; }
int cuCtxSetCurrent(void *context) { return context != &held; }
int cuMemHostAlloc(void **host, unsigned long size, unsigned flags) { *host = (void *)0x500000000; held++; return 0; }
int cuMemAlloc_v2(unsigned long long *device, unsigned long size) {
  if (FULL) return 2;
  *device = 0x700000000;
  held++;
  return 0;
}
int cuMemcpyHtoD_v2(unsigned long long to, void *from, unsigned long size) {
  if (LOST) return 999;
  return !(to == 0x700000000 && from == (void *)0x500000000 && size == 1ul << 28);
}
int cuMemcpyDtoH_v2(void *to, unsigned long long from, unsigned long size) { return cuMemcpyHtoD_v2(from, to, size); }
int cuMemFree_v2(unsigned long long device) { held--; return 0; }
int cuMemFreeHost(void *host) { held--; return 0; }
int cuDevicePrimaryCtxRelease_v2(int device) { held -= device == 7; return 0; }
int left(void) { return held; }
"""


def driver(folder: Path, **settings: int) -> str:
    source, library = folder / "cuda.c", folder / "libcuda.so"
    source.write_text(CUDA)
    given = {"NO_DRIVER": 0, "CARDS": 1, "FULL": 0, "LOST": 0, **settings}
    flags = [f"-D{name}={value}" for name, value in given.items()]
    subprocess.run([str(COMPILER), *flags, "-shared", "-fPIC", "-o", library, source], check=True)
    return str(library)


@pytest.mark.skipif(COMPILER is None, reason="no C compiler")
def test_the_link_is_measured_both_ways(tmp_path: Path) -> None:
    library, bench = driver(tmp_path), small()
    link = HostLink(bench, library)
    assert {what.of["to"]: rate > 0 for what, rate in link.round()} == {"device": True, "host": True}
    link.close()
    assert not bench.skipped and ctypes.CDLL(library).left() == 0


@pytest.mark.skipif(COMPILER is None, reason="no C compiler")
@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"NO_DRIVER": 1}, "cuInit says 100"),
        ({"CARDS": 0}, "no GPU"),
        ({"FULL": 1}, "cuMemAlloc_v2 says 2"),
        ({"LOST": 1}, "cuMemcpyHtoD_v2 says 999"),
    ],
)
def test_a_link_that_cannot_be_measured_is_left_out(settings: dict[str, int], why: str, tmp_path: Path) -> None:
    library, bench = driver(tmp_path, **settings), small()
    link = HostLink(bench, library)
    assert not list(link.round())
    assert [one.of["to"] for one in bench.skipped] == ["device", "host"]
    assert all(why in one.note for one in bench.skipped)
    link.close()
    assert ctypes.CDLL(library).left() == 0


def test_without_a_driver_the_link_is_not_there() -> None:
    bench = small()
    assert not list(HostLink(bench, "libnone-such.so").round())
    assert bench.skipped[0].note == "not there: no CUDA driver"


REPORT = {
    "name": "NVIDIA H200",
    "memory_bytes": 141 * 10**9,
    "read_GBps": 4200.0,
    "copy_GBps": 4000.0,
    "matmul_TFLOPs": {"bfloat16": 700.0, "fp8": None},
}


def test_a_gpu_is_a_device_as_its_backend_reports_it() -> None:
    bench = small()
    card = Card(bench, "", lambda: REPORT)
    figures = [Figure(what.name, what.of, what.unit, (rate,) * 3) for what, rate in card.round()]
    assert not bench.skipped and len(figures) == 3
    profile = Profile(MACHINE, (*figures, Figure("host_link", {"to": "device"}, "bytes/s", (50e9,))), 1.0)
    device = profile.card()
    assert device is not None and (device.name, device.kind, device.basis) == ("NVIDIA H200", "gpu", "measured")
    assert (device.bandwidth, device.memory_bytes, device.host_link) == (4200e9, 141 * 10**9, 50e9)
    assert device.flops == {"bfloat16": 700e12}
    assert Profile(MACHINE, (), 1.0).card() is None


def test_a_gpu_that_is_not_there_or_fails_is_left_out() -> None:
    def fail() -> dict[str, object]:
        raise RuntimeError("CUDA error:\n out of memory")

    bench = small()
    assert not list(Card(bench, "no driver", lambda: REPORT).round()) and not list(Card(bench, "", fail).round())
    assert [one.note for one in bench.skipped] == ["not there: no driver", "CUDA error: out of memory"]


# ---------------------------------------------------------------- the native backend


@pytest.fixture
def native() -> None:
    pytest.importorskip("headrace.backends.native._kernels")


@pytest.mark.usefixtures("native")
def test_every_product_attention_and_step_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe_native, "SHAPES", ((64, 96),))
    monkeypatch.setattr(probe_native, "ROW_TOKENS", 64)
    monkeypatch.setattr(probe_native, "PREFILL", 32)
    bench = small(2)
    products = list(probe_native.Products(bench).round())
    # 64 · 96 numbers of 32, 16, 8.5 and 5 bits; half of the cache, 1.5 times it, and as much as memory allows.
    copies = {24576: (3, 4, 11), 12288: (3, 8, 21), 6528: (5, 15, 40), 3840: (9, 26, 68)}
    assert [(what.of["weight_bytes"], what.of["set_bytes"], what.of["rows"]) for what, _ in products] == [
        (size, size * count, rows)
        for size, counts in copies.items()
        for count in counts
        for rows in ((1, 4, 16, 64, 256) if count == counts[1] else (1, 4))
    ]
    assert [what.of["weights"] for what, _ in products[::9]] == ["float32", "bfloat16", "int8", "int4"]
    found = [*probe_native.Attention(bench).round(), *probe_native.Operations(bench).round()]
    found += probe_native.Steps(bench).round()
    names = [what.name for what, _ in found]
    assert names == ["attend", "attention", "attention"] * 3 + ["operation", "rows", "step", "step"]
    assert min(value for _, value in [*products, *found]) > 0
    one, many = (value for what, value in found if what.name == "step")
    assert 1e-6 < one < many < 0.1


# ---------------------------------------------------------------- all of it


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[partial[Profile]]:
    """A probe of a tenth of a second."""
    monkeypatch.setattr(probe_disk, "FILE_BYTES", probe_disk.CHUNK)
    monkeypatch.setattr(probe_native, "SHAPES", ((64, 64),))
    monkeypatch.setattr(probe_native, "ROW_TOKENS", 64)
    monkeypatch.setattr(probe_native, "PREFILL", 32)
    yield partial(run_probe, pass_seconds=0.0005, cache_bytes=1 << 15)


def test_a_probe_measures_everything_five_times(quick: partial[Profile], tmp_path: Path) -> None:
    told: list[str] = []
    profile = quick(2, tmp_path, on_progress=told.append)
    assert told[0] == "preparing" and any(text.startswith("round 5 of 5") for text in told)
    assert all(len(one.rounds) == 5 or (not one.rounds and one.note) for one in profile.figures)
    assert {"stream", "read", "gather", "application", "disk", "host_link", "gemm"} <= {
        one.name for one in profile.figures
    }
    few = [one.of["set_bytes"] for one in profile.figures if one.name == "gemm" and one.of["rows"] == 1]
    assert len(set(few)) > len({one.of["weights"] for one in profile.figures if one.name == "gemm"}), (
        "more sets than one"
    )
    machine = profile.machine
    assert machine.threads == 2 and machine.cpu and machine.libraries.keys() >= {"headrace", "numpy"}
    assert machine.date.endswith("+00:00") and 0 < profile.seconds < 60
    assert profile.device().bandwidth > 0
    plot = roofline(profile)
    assert plot is not None and plot.log_x and plot.log_y
    kernels = {"GEMV", "Jacobi"}
    assert kernels <= {series.name for series in plot.series} and plot.series[0].style == "line"
    document = describe(profile)
    assert document.notes[0] == profile.verdict
    assert sum(len(table.rows) for table in document.tables) == len(profile.figures)
    assert all(len(row) == len(table.columns) for table in document.tables for row in table.rows)
    assert all("{" not in str(cell) for table in document.tables for row in table.rows for cell in row)
    assert all(one.source for one in document.quantities)
    json.dumps(document.data, allow_nan=False)


def test_without_native_kernels_the_rest_is_measured(
    quick: partial[Profile], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise BackendUnavailable("its kernels are not built")

    monkeypatch.setattr("headrace.engine.model.create_backend", refuse)
    profile = quick(1, tmp_path)
    assert profile.machine.instruction_set is None
    missing = [one for one in profile.figures if one.name == "gemm"]
    assert [one.note for one in missing] == ["its kernels are not built"]
    assert roofline(profile) is None and profile.find("stream", kind="triad") is not None
    describe(profile)
    write_profile(profile, tmp_path / "p.json")
    assert read_profile(tmp_path / "p.json") == profile


def test_a_probe_that_has_no_time_left_begins_no_round(
    quick: partial[Profile], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "LIMIT_S", 0.0)
    monkeypatch.setattr(Watch, "busy_cores", lambda self: 0.0)
    profile = quick(1, tmp_path)
    assert {len(one.rounds) for one in profile.figures} == {0, 1}
    assert not profile.repeatable and profile.verdict == "not called repeatable: 1 of 3 rounds were measured"


def test_too_little_memory_for_large_arrays_is_said() -> None:
    bench = Bench(1, cache_bytes=2**20, memory_bytes=2**21, seconds=0.001)
    assert bench.large == 2**21 and "arrays of 2 MiB instead of 4 MiB" in bench.note
    notes = {what.of["bytes"]: what.note for what, _ in Read(bench).round()}
    assert notes.pop(2**21) == bench.note and set(notes.values()) == {""}
    assert replace(bench, memory_bytes=2**22).note == ""


@pytest.mark.parametrize("threads", [-1, 0, 1025, 10**6])
def test_odd_threads_are_refused_before_anything_is_measured(threads: int, tmp_path: Path) -> None:
    with pytest.raises(InvalidParameter, match=f"threads: got {threads}, allowed: a whole number from 1 to 1024"):
        run_probe(threads, tmp_path)
    assert not list(tmp_path.iterdir())


def test_others_are_watched(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    stat = tmp_path / "proc/stat"
    line = "cpu{} {} 0 50 900 10 0 0 {} 0 0\n"
    stat.write_text(line.format("", 9, 9) + line.format(0, 100, 0) + line.format(1, 100, 0))
    watch, both = Watch([1], tmp_path), Watch([0, 1], tmp_path)
    time.sleep(0.05)
    # Of the second one 1 s of programs and 1 s stolen.
    stat.write_text(line.format("", 9, 9) + line.format(0, 100, 0) + line.format(1, 200, 100))
    for one in (watch, both):
        busy = one.busy_cores()
        assert busy is not None and 2 / 0.5 < busy <= 2 / 0.05
    stat.write_text("odd\n")
    assert watch.busy_cores() is None and Watch([0], tmp_path / "none").busy_cores() is None
    if (ROOT / "proc/stat").exists():
        assert (Watch(usable_cpus()).busy_cores() or 0.0) >= 0.0


def test_the_command_writes_the_profile_that_the_others_read(
    quick: partial[Profile], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "run_probe", quick)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    parser = argparse.ArgumentParser()
    plan_probe.add_arguments(parser)
    document = plan_probe.document(parser.parse_args(["--threads", "1"]))
    path = default_path(tmp_path / "state" / "headrace")
    profile = read_profile(path)
    assert profile.machine.threads == 1 and any(str(path) in note for note in document.notes)
    named = tmp_path / "other.json"
    plan_probe.document(parser.parse_args(["--profile", str(named), "--folder", str(tmp_path / "state")]))
    assert str(tmp_path / "state") in str(read_profile(named).find("disk"))
    assert [file.name for file in tmp_path.iterdir() if file.name.startswith(".")] == []


def test_a_command_that_could_not_write_measures_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("measured in vain")

    monkeypatch.setattr(probe, "run_probe", never)
    parser = argparse.ArgumentParser()
    plan_probe.add_arguments(parser)
    with pytest.raises(InvalidParameter, match="can be written"):
        plan_probe.document(parser.parse_args(["--profile", str(tmp_path)]))
    with pytest.raises(ConfigError, match="is no folder"):
        plan_probe.document(parser.parse_args(["--profile", str(tmp_path / "p"), "--folder", str(tmp_path / "none")]))


# ---------------------------------------------------------------- the roofline


def test_the_roof_has_its_ridge_where_both_bounds_meet() -> None:
    # A100, fp16: 312 TFLOP/s and 2 TB/s meet at 156 FLOPs a byte (planning.md §1).
    assert attainable(312e12, 2e12, 156) == 312e12
    assert attainable(312e12, 2e12, 78) == 156e12 and attainable(312e12, 2e12, 1000) == 312e12


def test_a_product_is_as_intense_as_its_bytes_say() -> None:
    one = Figure("gemm", {"weights": "int8", "rows": 2, "n": 10, "k": 20, "weight_bytes": 212}, "FLOP/s", (1.0,))
    # 2 · 2 · 10 · 20 FLOPs; 212 bytes of weight, 4 · 2 · (10 + 20) of activations
    assert product_intensity(one) == pytest.approx(800 / (212 + 240))
