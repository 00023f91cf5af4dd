"""What this machine has, as far as the engine's choices depend on it. Linux; elsewhere the portable parts."""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path

from headrace.core.config import Hardware

UNLIMITED = 1 << 60


def _read_int(path: str) -> int | None:
    try:
        text = Path(path).read_text(encoding="ascii").strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None


def _free_memory_bytes() -> int:
    """MemAvailable, cut to what the control group (v2 or v1) still allows."""
    free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                free = int(line.split()[1]) * 1024
    pairs = (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    )
    for limit_path, used_path in pairs:
        limit, used = _read_int(limit_path), _read_int(used_path)
        if limit is not None and used is not None and limit < UNLIMITED:
            free = min(free, max(0, limit - used))
    return free


def probe_hardware() -> Hardware:
    """CPUs this process may run on, and memory it can still take."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return Hardware(cores=cores, free_memory_bytes=_free_memory_bytes())


def peak_rss_bytes() -> int:
    """Most memory this process has had resident at one time."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
