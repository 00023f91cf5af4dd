"""What the figures were measured on. Linux; elsewhere the portable parts."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from headrace import __version__
from headrace.engine.hardware import probe_hardware

LIBRARIES = ("torch", "numpy", "tokenizers")


@dataclass(frozen=True, slots=True)
class Machine:
    cpu: str
    cores: int
    """CPUs this process may run on."""
    memory_bytes: int
    """Of the whole machine."""
    system: str
    python: str
    libraries: Mapping[str, str]
    """Name -> version, headrace's own included."""


def probe_machine() -> Machine:
    """Asks the system; starts nothing."""
    return Machine(
        cpu=_cpu_model(),
        cores=probe_hardware().cores,
        memory_bytes=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        system=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        libraries={"headrace": __version__, **{name: found for name in LIBRARIES if (found := _version(name))}},
    )


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor() or "unknown"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
