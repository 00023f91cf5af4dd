"""What `headrace doctor` asks the system. Linux's own files, read below a root that tests can choose; no probe raises.

An unknown value is None: a file that is missing or odd is no fault of the user's.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

from headrace.engine.hardware import ROOT, as_int, cpu_quota, memory_limit, read_text
from headrace.engine.nvml import LIBRARY, Card, find_cards

PACKAGES = ("numpy", "tokenizers", "jinja2", "rich", "huggingface_hub", "torch", "triton")
FEATURES: Mapping[str, frozenset[str]] = {
    "avx2": frozenset({"avx2"}),
    "avx512": frozenset({"avx512f", "avx512bw", "avx512vl"}),
    "vnni": frozenset({"avx512_vnni"}),
    "avx_vnni": frozenset({"avx_vnni"}),
    "bf16": frozenset({"avx512_bf16"}),
    "amx": frozenset({"amx_tile", "amx_int8", "amx_bf16"}),
    "neon": frozenset({"asimd"}),
    "dotprod": frozenset({"asimddp"}),
    "i8mm": frozenset({"i8mm"}),
    "sve": frozenset({"sve"}),
    "arm_bf16": frozenset({"bf16"}),
}
"""Instruction set -> the flags of /proc/cpuinfo that together mean it."""
X86 = ("avx2", "avx512", "vnni", "avx_vnni", "bf16", "amx")
ARM = ("neon", "dotprod", "i8mm", "sve", "arm_bf16")
COMPILERS = ("c++", "g++", "clang++")
MOST_FILES = 200_000


# ---------------------------------------------------------------- processor


def cpu(root: Path = ROOT) -> dict[str, object]:
    """Model, cores, instruction sets that matter, NUMA nodes, frequency governor, load."""
    fields: dict[str, str] = {}
    for line in (read_text(root / "proc/cpuinfo") or "").splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    names = ARM if platform.machine() in ("aarch64", "arm64") else X86
    nodes = list((root / "sys/devices/system/node").glob("node[0-9]*"))
    usable = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    try:
        load = round(os.getloadavg()[0], 2)
    except OSError:
        load = None
    return {
        "model": fields.get("model name") or platform.processor() or None,
        "cores_present": os.cpu_count() or 1,
        "cores_usable": usable,
        "quota_cores": cpu_quota(root),
        "instructions": {name: flags >= FEATURES[name] for name in names} if flags else {},
        "numa_nodes": len(nodes) or None,
        "governor": read_text(root / "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "load_1min": load,
    }


# ---------------------------------------------------------------- memory and disk


def memory(root: Path = ROOT) -> dict[str, int | None]:
    """Bytes: total, available, the control group's limit (None: none), swap."""
    kib: dict[str, int | None] = {}
    for line in (read_text(root / "proc/meminfo") or "").splitlines():
        name, _, value = line.partition(":")
        kib[name] = as_int(value.removesuffix("kB").strip())

    def in_bytes(name: str) -> int | None:
        value = kib.get(name)
        return None if value is None else 1024 * value

    return {
        "total_bytes": in_bytes("MemTotal"),
        "available_bytes": in_bytes("MemAvailable"),
        "limit_bytes": memory_limit(root)[0],
        "swap_total_bytes": in_bytes("SwapTotal"),
        "swap_free_bytes": in_bytes("SwapFree"),
    }


def hub_cache(environ: Mapping[str, str]) -> dict[str, object]:
    """Where Hub models lie, how many, their bytes, and the room on that disk. Counted up to a bound of files."""
    folder = environ.get("HF_HUB_CACHE")
    if not folder:
        home = environ.get("HF_HOME")
        if not home:
            cache = environ.get("XDG_CACHE_HOME") or str(Path(environ.get("HOME") or "/") / ".cache")
            home = f"{cache}/huggingface"
        folder = f"{home}/hub"
    path = Path(environ.get("HOME") or "/", folder[2:]) if folder.startswith("~/") else Path(folder)
    count, size, whole = 0, 0, True
    if path.is_dir():
        size, whole = _folder_bytes(path)
        count = sum(1 for _ in path.glob("models--*"))
    return {
        "path": str(path),
        "present": path.is_dir(),
        "models": count,
        "bytes": size,
        "counted_whole": whole,
        "disk_free_bytes": disk_free(path),
    }


def _folder_bytes(folder: Path) -> tuple[int, bool]:
    """(bytes of the files, without those that links point to; whether all of them were counted)."""
    size = seen = 0
    for where, _, names in os.walk(folder):
        for name in names:
            seen += 1
            if seen > MOST_FILES:
                return size, False
            try:
                found = (Path(where) / name).lstat()
            except OSError:
                continue
            size += found.st_size
    return size, True


def disk_free(path: Path) -> int | None:
    """Bytes free where `path` is, or would be made."""
    for place in (path, *path.parents):
        try:
            return shutil.disk_usage(place).free
        except OSError:
            continue
    return None


# ---------------------------------------------------------------- GPUs and packages


def gpus(visible: str | None = None, library: str = LIBRARY) -> tuple[list[dict[str, object]], str | None]:
    """(the NVIDIA GPUs that CUDA shows, or why there are none). `visible`: CUDA_VISIBLE_DEVICES, None: not set."""
    cards, note = find_cards(library, visible)
    return [_card(card) for card in cards], note


def _card(card: Card) -> dict[str, object]:
    return {
        "name": card.name,
        "memory_total_bytes": card.total_bytes,
        "memory_free_bytes": card.free_bytes,
        "driver": card.driver,
        "compute_capability": None if card.capability is None else f"{card.capability[0]}.{card.capability[1]}",
        "multiprocessors": card.multiprocessors,
    }


def compiler(environ: Mapping[str, str]) -> str | None:
    """The C++ compiler that an installation would take: CXX, else the first on the PATH. It is not started."""
    chosen = environ.get("CXX", "").split()
    found = (shutil.which(name, path=environ.get("PATH")) for name in (chosen[:1] or COMPILERS))
    return next((path for path in found if path), None)


def packages() -> dict[str, str | None]:
    """Package -> version, None where it is not installed. None of them is imported."""
    from importlib.metadata import PackageNotFoundError, version

    found: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found
