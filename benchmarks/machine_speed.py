"""How fast this machine reads memory, at a given size with some threads; and a loop that shows other load."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

READ_C = r"""
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>

#define HUGE_PAGE ((size_t)2 << 20)

typedef struct { const uint64_t *data; size_t words; int passes; uint64_t sum; } Part;

static pthread_barrier_t gate;
static double seconds[4096];

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec * 1e-9;
}

/* Many sums, so that no add waits for the one before; the compiler makes vector loads of them. */
static uint64_t read_all(const uint64_t *data, size_t words) {
    uint64_t sums[64] = {0}, total = 0;
    for (size_t i = 0; i + 64 <= words; i += 64)
        for (int j = 0; j < 64; j++) sums[j] += data[i + j];
    for (int j = 0; j < 64; j++) total += sums[j];
    return total;
}

static void *work(void *given) {
    Part *part = given;
    for (int pass = 0; pass < part->passes; pass++) {
        int last = pthread_barrier_wait(&gate) == PTHREAD_BARRIER_SERIAL_THREAD;
        double began = now();
        part->sum += read_all(part->data, part->words);
        pthread_barrier_wait(&gate);
        if (last) seconds[pass] = now() - began;
    }
    return NULL;
}

int main(int argc, char **argv) {
    if (argc != 4) return 2;
    size_t bytes = strtoull(argv[1], NULL, 10);
    int threads = atoi(argv[2]), passes = atoi(argv[3]);
    if (threads < 1 || threads > 256 || passes < 1 || passes > 4096) return 2;
    size_t words = bytes / 8 / threads / 64 * 64;
    size_t whole = (words * 8 * threads + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
    uint64_t *data = aligned_alloc(HUGE_PAGE, whole);
    if (!data) return 3;
#ifdef MADV_HUGEPAGE
    madvise(data, whole, MADV_HUGEPAGE);
#endif
    for (size_t i = 0; i < words * threads; i++) data[i] = i * 0x9E3779B97F4A7C15u;
    pthread_barrier_init(&gate, NULL, threads);
    pthread_t ids[256];
    Part parts[256];
    for (int t = 0; t < threads; t++) {
        parts[t] = (Part){data + words * t, words, passes, 0};
        if (pthread_create(&ids[t], NULL, work, &parts[t])) return 4;
    }
    uint64_t sum = 0;
    for (int t = 0; t < threads; t++) { pthread_join(ids[t], NULL); sum += parts[t].sum; }
    fprintf(stderr, "%llu\n", (unsigned long long)sum);
    for (int pass = 0; pass < passes; pass++) printf("%.9f\n", seconds[pass]);
    return 0;
}
"""
"""Each thread reads its share of one buffer; a pass lasts until the slowest is through. Its time is taken by one
thread between two barriers."""
PASSES_BYTES, MIN_PASSES, MAX_PASSES = 4 * 2**30, 8, 200
"""How much is read in all: enough passes for a median, at any size."""
CANARY_STEPS = 1_500_000


@dataclass(frozen=True, slots=True)
class Bandwidth:
    bytes: int
    threads: int
    gb_s: float
    """Of the median pass; GB: 10^9 bytes."""
    best_gb_s: float
    how: str


class Reader:
    """Measures reading; compiles its loop once where there is a C compiler."""

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._folder = tempfile.TemporaryDirectory()
        self._program = self._compile()

    def _compile(self) -> Path | None:
        compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
        if compiler is None:
            return None
        source = Path(self._folder.name) / "read.c"
        program = source.with_suffix("")
        source.write_text(READ_C, encoding="utf-8")
        command = [compiler, "-O3", "-march=native", "-o", str(program), str(source), "-lpthread"]
        done = subprocess.run(command, capture_output=True, timeout=120, check=False)
        return program if done.returncode == 0 else None

    def measure(self, size: int) -> Bandwidth:
        passes = max(MIN_PASSES, min(MAX_PASSES, PASSES_BYTES // max(1, size)))
        if self._program is not None:
            command = [str(self._program), str(size), str(self._threads), str(passes)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
            seconds, how = [float(line) for line in done.stdout.split()], "C loop"
        else:
            seconds, how = numpy_passes(size, self._threads, passes), "numpy sum"
        # The first pass finds cold page tables.
        rates = sorted(size / 1e9 / one for one in seconds[1:])
        return Bandwidth(size, self._threads, rates[len(rates) // 2], rates[-1], how)

    def close(self) -> None:
        self._folder.cleanup()


def numpy_passes(size: int, threads: int, passes: int) -> list[float]:
    """Seconds of each pass, by numpy's sums, which run without the interpreter lock."""
    parts = [np.ones(size // 8 // threads, np.int64) for _ in range(threads)]
    seconds: list[float] = []
    for _ in range(passes):
        workers = [threading.Thread(target=part.sum) for part in parts]
        began = time.perf_counter()
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        seconds.append(time.perf_counter() - began)
    return seconds


def busy_seconds() -> float | None:
    """Processor time that everything on this machine has used so far, steal by other machines included; None where
    the system does not say."""
    try:
        words = Path("/proc/stat").read_text(encoding="utf-8").split("\n", 1)[0].split()
    except OSError:
        return None
    user, nice, system, _, _, interrupts, soft_interrupts, steal = map(int, words[1:9])
    return (user + nice + system + interrupts + soft_interrupts + steal) / os.sysconf("SC_CLK_TCK")


def wait_for_quiet(limit_cores: float, end_s: float) -> None:
    """Returns once less than this many cores were busy for a second, or at `end_s` (of time.monotonic)."""
    while time.monotonic() < end_s:
        before = busy_seconds()
        time.sleep(1.0)
        after = busy_seconds()
        if before is None or after is None or after - before < limit_cores:
            return


def canary() -> float:
    """Seconds that a fixed loop on one core takes; other load, or a slower clock, makes it longer."""
    began = time.perf_counter()
    total = 0
    for step in range(CANARY_STEPS):
        total += step & 7
    return time.perf_counter() - began
