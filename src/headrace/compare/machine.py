"""What the figures were measured on. Linux; elsewhere the portable parts."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from headrace import __version__
from headrace.core.config import ResolvedConfig
from headrace.engine.hardware import probe_hardware, processor_name

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
    gpu: str | None = None
    """What the backend torch would run on, as its driver calls it; None: on the CPU."""

    def device(self, config: ResolvedConfig) -> str:
        """The name of what an engine with these settings computes on."""
        return self.cpu if config.device == "cpu" else self.gpu or "an unknown GPU"


def probe_machine() -> Machine:
    """Asks the system; starts nothing."""
    hardware = probe_hardware()
    return Machine(
        cpu=processor_name(),
        cores=hardware.cores,
        memory_bytes=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        system=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        libraries={"headrace": __version__, **{name: found for name in LIBRARIES if (found := _version(name))}},
        gpu=None if hardware.gpu is None else hardware.gpu.name,
    )


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
