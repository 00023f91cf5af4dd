"""What the cases of one stage share: the clock, the ceilings of this card, and one loaded model at a time."""

from __future__ import annotations

import platform
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib import metadata
from pathlib import Path
from statistics import median

import torch
from benchmarks.gpu_check.clock import Clock, matmul_rate, read_bandwidth
from benchmarks.gpu_check.engine import Engine
from benchmarks.gpu_check.rows import DeviceLost, Report

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("torch", "triton", "numpy", "transformers", "flash_attn", "flashinfer-python")


@dataclass(slots=True)
class _Held:
    key: str
    engine: Engine


@dataclass(eq=False)
class Bench:
    """`dry`: tiny shapes on a CPU, where no figure means anything. `once`: see `Clock`."""

    dry: bool
    seed: int
    out: Path
    report: Report
    once: bool = False
    clock: Clock = field(init=False)
    _held: _Held | None = None

    def __post_init__(self) -> None:
        self.clock = Clock(self.dry, self.once)

    @cached_property
    def read_Bps(self) -> float:  # noqa: N802 - bytes, not bits
        """Bytes a second."""
        return median(read_bandwidth(self.clock))

    @cached_property
    def matmul_flops(self) -> float:
        """Of bfloat16, a second."""
        return median(matmul_rate(self.clock, torch.bfloat16))

    def engine(self, key: str, make: Callable[[], Engine]) -> Engine:
        """The engine of that name; another one that is there is closed first, for the memory."""
        if self._held is None or self._held.key != key:
            self.close()
            self.clock.free()
            self._held = _Held(key, make())
        return self._held.engine

    def close(self) -> None:
        held, self._held = self._held, None
        if held is not None:
            held.engine.close()

    def after_failure(self) -> None:
        """Raises DeviceLost where the device answers nothing any more; else frees what the failed row held."""
        if self.dry:
            self.close()
            return
        try:
            self.close()
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.zeros(1, device="cuda").item()
        except RuntimeError as error:
            raise DeviceLost(str(error)) from error


def card_facts(dry: bool, seed: int) -> Mapping[str, object]:
    """What the figures were measured on, and with."""
    facts: dict[str, object] = {
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "seed": seed,
        "dry_run": dry,
        "commit": _said("git", "-C", str(ROOT), "rev-parse", "HEAD"),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
    }
    if dry:
        return {**facts, "card": "none: CPU and Triton's interpreter"}
    found = torch.cuda.get_device_properties(0)
    return {
        **facts,
        "card": found.name,
        "capability": f"{found.major}.{found.minor}",
        "multiprocessors": found.multi_processor_count,
        "memory_GiB": round(found.total_memory / 2**30, 1),
        "l2_MiB": round(found.L2_cache_size / 2**20, 1),
        "driver": (_said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") or "").split("\n")[0],
        "cuda": torch.version.cuda,
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _said(*command: str) -> str | None:
    """What a program prints; None where it cannot be asked."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
