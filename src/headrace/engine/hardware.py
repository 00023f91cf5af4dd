"""What this machine has, as far as the engine's choices depend on it. Linux; elsewhere the portable parts.

Linux's own files are read below a root that tests can choose; a file that is missing or odd sets no limit.
"""

from __future__ import annotations

import math
import os
import re
import resource
import sys
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path

from headrace.core.config import Gpu, Hardware
from headrace.engine.nvml import LIBRARY, find_cards, visible_devices

ROOT = Path("/")
UNLIMITED = 1 << 60
NEEDS: Mapping[str, str] = {"native": "headrace.backends.native._kernels", "torch": "torch"}
"""Backend -> the module without which it cannot run; the best on a CPU first."""


def installed_backends() -> tuple[str, ...]:
    """What `auto` may choose from. Imports none of them."""
    return tuple(name for name, module in NEEDS.items() if find_spec(module) is not None)


def torch_version_file() -> Path | None:
    """Where the installed torch says how it was built; None: it is not installed. torch is not imported."""
    spec = find_spec("torch")
    return None if spec is None or spec.origin is None else Path(spec.origin).with_name("version.py")


def built_without_cuda(version_file: Path | None) -> str | None:
    """Why this torch cannot use an NVIDIA GPU; None: it is a CUDA build."""
    if version_file is None:
        return "torch is not installed"
    text = read_text(version_file) or ""
    if re.search(r"""^cuda\b[^=\n]*=\s*['"]""", text, re.MULTILINE):
        return None
    version = re.search(r"""^__version__\b[^=\n]*=\s*['"]([^'"\n]{1,40})['"]""", text, re.MULTILINE)
    return f"the installed torch{f' {version[1]}' if version else ''} is built without CUDA"


def probe_gpu(version_file: Path | None, library: str = LIBRARY) -> tuple[Gpu | None, str]:
    """(the first GPU that CUDA shows this process, why there is none). Where the installed torch is not a CUDA build,
    the driver is not even asked.

    With cards of several kinds the first is CUDA's own only if CUDA_DEVICE_ORDER is PCI_BUS_ID.
    """
    missing = built_without_cuda(version_file)
    if missing is not None:
        return None, missing
    cards, note = find_cards(library, visible_devices())
    if not cards:
        return None, f"GPU: {note}"
    card = cards[0]
    if card.total_bytes is None or card.free_bytes is None or card.capability is None:
        return None, f"the driver does not tell the memory or the compute capability of {card.name}"
    sizes = (card.total_bytes, card.free_bytes)
    return Gpu(card.name, *sizes, card.capability, card.multiprocessors, len(cards)), ""


def read_text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None


def processor_name(root: Path = ROOT) -> str:
    """Model of the processor, as Linux tells it."""
    import platform  # only here: every start reads this module

    for line in (read_text(root / "proc/cpuinfo") or "").splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.processor() or "unknown"


def as_int(text: str | None) -> int | None:
    try:
        return int(text or "")
    except ValueError:
        return None


def control_groups(controller: str, root: Path = ROOT) -> Iterator[Path]:
    """The folders of this process's control group and of those around it, version 2 or 1; outermost last."""
    base = root / "sys/fs/cgroup"
    for line in (read_text(root / "proc/self/cgroup") or "0::/").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            top = base
        elif controller in controllers.split(","):
            top = base / controller
        else:
            continue
        parts = [part for part in path.split("/") if part not in ("", ".", "..")]
        for depth in range(len(parts), -1, -1):
            yield top.joinpath(*parts[:depth])


def cpu_quota(root: Path = ROOT) -> float | None:
    """CPUs' worth of time that the control groups allow; None: no limit."""
    quotas = []
    for folder in control_groups("cpu", root):
        quota, _, period = (read_text(folder / "cpu.max") or "").partition(" ")
        if not quota:
            quota = read_text(folder / "cpu.cfs_quota_us") or ""
            period = read_text(folder / "cpu.cfs_period_us") or ""
        share, length = as_int(quota), as_int(period)
        if share is not None and length is not None and share > 0 and length > 0:
            quotas.append(share / length)
    return min(quotas, default=None)


def memory_limit(root: Path = ROOT) -> tuple[int | None, int | None]:
    """(the smallest limit of the control groups, the least that one of them still allows), bytes; None: no limit."""
    limits, left = [], []
    for folder in control_groups("memory", root):
        for limit_name, used_name in (
            ("memory.max", "memory.current"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ):
            limit, used = as_int(read_text(folder / limit_name)), as_int(read_text(folder / used_name))
            if limit is not None and limit < UNLIMITED:
                limits.append(limit)
                left.append(max(0, limit - (used or 0)))
    return min(limits, default=None), min(left, default=None)


def _free_memory_bytes(root: Path) -> int:
    """MemAvailable, cut to what the control groups still allow."""
    free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for line in (read_text(root / "proc/meminfo") or "").splitlines():
        if line.startswith("MemAvailable:"):
            free = 1024 * (as_int(line.split()[1]) or 0)
    _, left = memory_limit(root)
    return free if left is None else min(free, left)


def probe_hardware(root: Path = ROOT) -> Hardware:
    """CPUs this process may run on, or be given the time of, memory it can still take, and the GPU torch would use."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    quota = cpu_quota(root)
    if quota is not None:
        # More threads than the quota pays for make each of them wait for the others.
        cores = min(cores, max(1, math.floor(quota)))
    gpu, no_gpu = probe_gpu(torch_version_file())
    return Hardware(cores, _free_memory_bytes(root), installed_backends(), gpu, no_gpu)


def peak_rss_bytes(root: Path = ROOT) -> int:
    """Most memory this process has had resident at one time."""
    # getrusage also counts what the process that started this one had.
    for line in (read_text(root / "proc/self/status") or "").splitlines():
        if line.startswith("VmHWM:"):
            return 1024 * (as_int(line.split()[1]) or 0)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
