"""STREAM's triad as `headrace plan probe` measures it, beside a plain C loop on the same arrays, by turns.

    python -m benchmarks.triad [--rounds 25] [--threads 2] [--json FILE]

The C loop is compiled here by `cc -O3`, with OpenMP where there is more than one thread. The two must lie within 10 %
of each other. GB/s as STREAM counts them: 24 bytes an element.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

import numpy as np
from numpy.typing import NDArray

from headrace.plan.probe_memory import native_triad, triad
from headrace.plan.probe_tools import share

SOURCE = """void triad(double *restrict a, const double *restrict b, const double *restrict c, long n) {
#pragma omp parallel for
  for (long i = 0; i < n; i++) a[i] = b[i] + 3.0 * c[i];
}
"""
ELEMENTS = 1 << 24
"""Of each array: 128 MiB, several times any cache of a small machine."""
BYTES = 24
LIMIT = 0.10
Work = Callable[[], object]
F64 = NDArray[np.float64]


def c_loop(folder: Path, threads: int, arrays: Sequence[F64]) -> Work:
    """Raises CalledProcessError, FileNotFoundError without a compiler."""
    source, library = folder / "triad.c", folder / "triad.so"
    source.write_text(SOURCE)
    flags = ["-fopenmp"] if threads > 1 else []
    subprocess.run(["cc", "-O3", *flags, "-shared", "-fPIC", "-o", str(library), str(source)], check=True)
    os.environ["OMP_WAIT_POLICY"] = "passive"  # its threads would spin on, on the cores that the probe's turn needs
    loop = ctypes.CDLL(str(library)).triad
    pointers = [ctypes.c_void_p(one.ctypes.data) for one in arrays]
    return lambda: loop(*pointers, ctypes.c_long(ELEMENTS))


def ours(pool: ThreadPoolExecutor, threads: int, arrays: Sequence[F64]) -> Work:
    parts = [triad(*(one[share(ELEMENTS, thread, threads)] for one in arrays)) for thread in range(threads)]
    return lambda: [done.result() for done in [pool.submit(part) for part in parts]]


def measure(works: Mapping[str, Work], rounds: int) -> dict[str, list[float]]:
    """GB/s of each round; the first, which finds cold memory, is not counted."""
    rates: dict[str, list[float]] = {name: [] for name in works}
    for number in range(rounds + 1):
        for name, work in works.items():
            began = time.perf_counter()
            work()
            if number:
                rates[name].append(BYTES * ELEMENTS / (time.perf_counter() - began) / 1e9)
    return rates


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    threads = arguments.threads
    arrays = [np.full(ELEMENTS, value) for value in (1.0, 2.0, 3.0)]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(threads) as pool:
        works = {"probe": ours(pool, threads, arrays), "C": c_loop(Path(folder), threads, arrays)}
        rates = measure(works, arguments.rounds)
    ratios = [one / other for one, other in zip(rates["probe"], rates["C"], strict=True)]
    found = median(ratios)
    kernel = "native kernels" if native_triad() is not None else "numpy, in blocks"
    for name, each in rates.items():
        print(f"{name:<5} {median(each):6.1f} GB/s ({min(each):.1f}–{max(each):.1f})")
    verdict = "within" if abs(found - 1) <= LIMIT else "NOT within"
    spread = f"{min(ratios):.3f}–{max(ratios):.3f}"
    print(f"probe / C: {found:.3f} ({spread}), {verdict} {LIMIT:.0%}; {threads} threads, {kernel}")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({"threads": threads, "rates": rates, "ratios": ratios}) + "\n")
    return 0 if abs(found - 1) <= LIMIT else 1


if __name__ == "__main__":
    raise SystemExit(main())
