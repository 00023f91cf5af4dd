"""Joules of the machine, from a meter where there is one and from the machine's load otherwise.

Meters, in order of trust: NVML's counter of a GPU's energy, RAPL's of CPU packages and memory, and a model of the CPU,
power at full load times load. What is modelled is always labelled `estimated`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from importlib import import_module
from pathlib import Path
from time import monotonic
from typing import Any, Protocol

from headrace.engine.nvml import find_cards, visible_devices

WATTS_PER_CORE = 1100 / 112
"""A node of two CPUs with 56 cores each takes 1.100 kW at full load, memory and fans included (the constants behind
NVIDIA's published comparison of CPU and GPU nodes): 9.8 W a core."""
JOULES_PER_KWH = 3.6e6
ROOT = Path("/")


class Meter(Protocol):
    """Something that counts joules."""

    source: str
    """nvml, rapl or estimated."""

    def joules(self, now: float) -> float:
        """Energy since the call before (the first: 0), at `now` seconds on a monotonic clock; ≥ 0."""


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return None


def _read_int(path: Path) -> int | None:
    text = _read(path)
    return int(text) if text is not None and text.isdecimal() else None


class _Counter:
    """A counter that only rises, but for a start from 0 at `wrap`, or after a reset of its device (`wrap` None)."""

    def __init__(self, wrap: int | None) -> None:
        self._wrap = wrap
        self._last: int | None = None

    def risen(self, value: int | None) -> int:
        """By how much since the last value; a value that could not be read counts with the next one."""
        if value is None:
            return 0
        last, self._last = self._last, value
        if last is None:
            return 0
        if value >= last:
            return value - last
        return value if self._wrap is None else value + max(0, self._wrap - last)


class RaplMeter:
    """Energy of the CPU packages, and of memory where that is counted apart (microjoules in /sys/class/powercap).

    Zones lie inside one another: `psys`, where it is, holds all others; else packages, without their cores and
    graphics, and `dram`, which no package holds.
    """

    source = "rapl"

    def __init__(self, zones: Sequence[Path]) -> None:
        self._zones = [(zone / "energy_uj", _Counter(_read_int(zone / "max_energy_range_uj"))) for zone in zones]
        self.joules(0.0)

    @classmethod
    def find(cls, root: Path = ROOT) -> RaplMeter | None:
        """None where there is no RAPL, or none that this process may read."""
        named: dict[str, list[Path]] = {}
        for zone in sorted((root / "sys/class/powercap").glob("intel-rapl:*")):
            name = (_read(zone / "name") or "").partition("-")[0]
            if _read_int(zone / "energy_uj") is not None:
                named.setdefault(name, []).append(zone)
        if "psys" in named:
            return cls(named["psys"])
        return cls(named["package"] + named.get("dram", [])) if "package" in named else None

    def joules(self, now: float) -> float:
        return sum(counter.risen(_read_int(path)) for path, counter in self._zones) / 1e6


def _devices(nvml: Any) -> list[Any]:
    """The GPU that torch uses, which is the first that CUDA_VISIBLE_DEVICES leaves; all, where it cannot be told."""
    cards, _ = find_cards(visible=visible_devices())
    if cards and cards[0].uuid is not None:
        return [nvml.nvmlDeviceGetHandleByUUID(cards[0].uuid)]
    return [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]


class NvmlMeter:
    """Energy of NVIDIA GPUs: their own counters (Volta and later), else power times the time between two calls."""

    source = "nvml"

    def __init__(self, nvml: Any, devices: Sequence[Any]) -> None:
        """`nvml`: the module pynvml, or what behaves as it does; already initialised."""
        self._nvml = nvml
        self._devices = [(device, _Counter(None)) for device in devices]
        self._watts: dict[int, float] = {}
        self._last_s: float | None = None
        self._told = False

    @classmethod
    def find(cls) -> NvmlMeter | None:
        """None where the package or the driver is missing, or a GPU tells neither energy nor power."""
        try:
            nvml = import_module("pynvml")
        except ImportError:
            return None
        try:
            nvml.nvmlInit()
            devices = _devices(nvml)
            meter = cls(nvml, devices)
            meter.joules(monotonic())
        except nvml.NVMLError:
            return None
        meter._told = True
        return meter if devices else None

    @property
    def by_power(self) -> bool:
        """Whether a GPU tells its power alone, so that the energy is only as good as the readings are close."""
        return bool(self._watts)

    def joules(self, now: float) -> float:
        seconds = 0.0 if self._last_s is None else now - self._last_s
        self._last_s = now
        return sum(
            self._device(index, device, counter, seconds) for index, (device, counter) in enumerate(self._devices)
        )

    def _device(self, index: int, device: Any, counter: _Counter, seconds: float) -> float:
        try:
            try:
                return counter.risen(self._nvml.nvmlDeviceGetTotalEnergyConsumption(device)) / 1e3
            except self._nvml.NVMLError_NotSupported:
                watts = self._nvml.nvmlDeviceGetPowerUsage(device) / 1e3
        except self._nvml.NVMLError:
            if not self._told:
                raise
            return 0.0  # a device that has told before and is silent now must not end the server
        mean = (self._watts.get(index, watts) + watts) / 2
        self._watts[index] = watts
        return float(mean * seconds)


def physical_cores(cpus: Iterable[int], root: Path = ROOT) -> float:
    """Cores behind these CPUs: of a core with two threads, each is a half."""
    cores = 0.0
    for cpu in cpus:
        siblings = _read(root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list") or str(cpu)
        threads = 0
        for part in siblings.split(","):
            low, _, high = part.partition("-")
            if low.isdecimal() and (high or low).isdecimal():
                threads += int(high or low) - int(low) + 1
        cores += 1 / max(1, threads)
    return cores


class LoadMeter:
    """No meter: full power of the cores that this process may use times their load (/proc/stat)."""

    source = "estimated"

    def __init__(self, cpus: Iterable[int], root: Path = ROOT, watts_per_core: float = WATTS_PER_CORE) -> None:
        """`watts_per_core`: at full load; at none the model takes 0."""
        self._cpus = frozenset(cpus)
        self._stat = root / "proc/stat"
        self._watts = watts_per_core * physical_cores(self._cpus, root)
        self._last: tuple[float, int, int] | None = None

    def joules(self, now: float) -> float:
        """Energy since the call before; 0 where /proc/stat cannot be read."""
        busy, total = self._ticks()
        last, self._last = self._last, (now, busy, total)
        if last is None or total <= last[2]:
            return 0.0
        load = min(1.0, max(0.0, (busy - last[1]) / (total - last[2])))
        return self._watts * load * max(0.0, now - last[0])

    def _ticks(self) -> tuple[int, int]:
        """(ticks at work, all ticks) of the CPUs, since the machine's start."""
        busy = total = 0
        for line in (_read(self._stat) or "").splitlines():
            name, *fields = line.split()
            if not name.startswith("cpu") or not name[3:].isdecimal() or int(name[3:]) not in self._cpus:
                continue
            # user, nice, system, idle, iowait, irq, softirq, steal; guest time is in user time
            ticks = [int(field) for field in fields[:8] if field.isdecimal()]
            total += sum(ticks)
            busy += sum(ticks) - sum(ticks[3:5])
        return busy, total


def find_meters(cuda: bool, root: Path = ROOT) -> list[Meter]:
    """One for the CPU (RAPL, else its load) and, if the model runs on CUDA, one for the GPUs, where NVML is."""
    cpus = os.sched_getaffinity(0) if sys.platform == "linux" else range(os.cpu_count() or 1)
    meters: list[Meter] = [RaplMeter.find(root) or LoadMeter(cpus, root)]
    gpus = NvmlMeter.find() if cuda else None
    return meters if gpus is None else [gpus, *meters]
