"""Stage flover: experiments 3 and 7 of Flover (arXiv 2305.13484 and its slides) on Llama-7B's shape, bf16.

Experiment 3 scales the published gaps by service time (gap × T1 ÷ 5800 ms), so that speed-ups compare. Of many draws of
Poisson arrivals the one is taken whose busy iterations are nearest to the published count: that is what was published,
one draw. One-at-a-time is computed: each request starts when it has come and the one before has ended, and takes T1.
Experiment 7 is in published seconds: the gaps are as they were. Rows go from the shortest to the longest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np
from benchmarks.gpu_check.bench import Bench
from benchmarks.gpu_check.engine import Engine, llama, prompts
from benchmarks.gpu_check.rows import Case, Figure, Target
from numpy.typing import NDArray

PROMPT, LENGTH = 8, 512
"""Input tokens, and tokens of prompt and answer: 504 are generated."""
SINGLE_MS = 5800.0
"""One request alone as published: 512 iterations."""
REQUESTS = 32
SHORTEST = 128
DRAWS = 2000
EXPERIMENT_3 = {20: (557, 11.2), 200: (911, 9.1), 1000: (2621, 4.2), 5000: (10694, 1.1)}
"""Mean gap in ms -> busy iterations, speed-up."""
EXPERIMENT_7 = {
    (32, "fixed"): {0: (10_800, 7_700), 100: (10_500, 10_300), 500: (21_500, 22_200)},
    (32, "random"): {0: (6_800, 7_000), 100: (9_200, 9_300), 500: (20_400, 20_900)},
    (64, "fixed"): {0: (15_300, 9_200), 100: (18_500, 13_900), 500: (37_500, 38_000)},
    (64, "random"): {0: (12_000, 8_700), 100: (13_300, 13_300), 500: (35_700, 37_200)},
}
"""(requests, lengths) -> gap in ms -> ms of TensorRT-LLM and of Flover, read off bars."""
SINGLE = "one request alone, 8 + 504"
GUESS_S = 2.0
"""Of one request alone, before it has been measured: for what rows may need."""
LOAD_S = 25.0


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of a true run, or of a dry one."""

    length: int = LENGTH
    shortest: int = SHORTEST
    rounds: int = 3
    gap_scale: float = 1.0


def cases(bench: Bench) -> list[Case]:
    rows = [
        *(_experiment_3(bench, gap) for gap in EXPERIMENT_3),
        *(_experiment_7(bench, *key, gap) for key, gaps in EXPERIMENT_7.items() for gap in gaps),
    ]
    rows.sort(key=lambda case: case.needs_s)
    what = "its time: what gaps of experiment 3 are scaled by (published: 5800 ms)"
    return [Case(SINGLE, what, lambda: _single(bench), None, LOAD_S + 5 * GUESS_S), *rows]


def sizes(bench: Bench) -> Sizes:
    return Sizes(20, 12, 1, 1e-3) if bench.dry else Sizes()


def _engine(bench: Bench) -> Engine:
    def make() -> Engine:
        loaded = Engine(llama(bench.dry), bench.dry, rows=64, tokens=2048, longest=LENGTH, seed=bench.seed)
        asked = prompts(2 if bench.dry else loaded.capacity.max_rows, PROMPT, loaded.model.spec.vocab_size, bench.seed)
        # One leaves after the other: whatever is made on first use for a number of rows is there then.
        loaded.run(asked, range(3, 3 + len(asked)))
        return loaded

    return bench.engine("flover", make)


def _single(bench: Bench) -> Figure:
    given = sizes(bench)
    running = _engine(bench)
    asked = prompts(given.rounds, PROMPT, running.model.spec.vocab_size, bench.seed)
    seconds = [running.run([one], [given.length - PROMPT]).seconds for one in asked]
    return Figure([1e3 * one for one in seconds], "ms", SINGLE_MS)


def _single_s(bench: Bench) -> float:
    found = bench.report.samples(SINGLE)
    if not found:
        raise RuntimeError(f"no time of {SINGLE!r}")
    return median(found) / 1e3


# ---------------------------------------------------------------- experiment 3


def _experiment_3(bench: Bench, gap_ms: int) -> Case:
    iterations, speed_up = EXPERIMENT_3[gap_ms]
    return Case(
        f"experiment 3, gaps of {gap_ms} ms on average",
        f"32 requests, scaled by service time; ratio: speed-up over one at a time ÷ the published {speed_up}",
        lambda: _poisson(bench, gap_ms, iterations, speed_up),
        Target(1.0),
        GUESS_S * (1.5 + REQUESTS * gap_ms / SINGLE_MS),
    )


def _poisson(bench: Bench, gap_ms: int, iterations: int, published: float) -> Figure:
    given, single_s = sizes(bench), _single_s(bench)
    running = _engine(bench)
    arrivals_ms = nearest_draw(gap_ms, iterations, bench.seed)
    arrivals = [one / SINGLE_MS * single_s for one in arrivals_ms]
    asked = prompts(REQUESTS, PROMPT, running.model.spec.vocab_size, bench.seed)
    seconds = running.run(asked, [given.length - PROMPT] * REQUESTS, arrivals).seconds
    serial = one_at_a_time(arrivals, single_s)
    return Figure(
        [serial / seconds],
        "×",
        published,
        serial / seconds / published,
        f"{seconds:.2f} s against {serial:.2f} s one at a time; the draw has {busy_iterations(arrivals_ms)} busy "
        f"iterations, published {iterations}",
        {"arrivals_s": [round(one, 5) for one in arrivals], "seconds": seconds, "serial_seconds": serial},
    )


def nearest_draw(gap_ms: float, iterations: int, seed: int) -> list[float]:
    """Arrivals in ms from the first one: of DRAWS draws the one whose busy iterations are nearest to the published."""
    random = np.random.default_rng(seed)
    gaps = random.exponential(gap_ms, (DRAWS, REQUESTS - 1))
    draws: NDArray[np.float64] = np.concatenate((np.zeros((DRAWS, 1)), np.cumsum(gaps, axis=1)), axis=1)
    best = min(draws, key=lambda draw: abs(busy_iterations(draw) - iterations))
    return [float(one) for one in best]


def busy_iterations(arrivals_ms: Sequence[float] | NDArray[np.float64]) -> int:
    """Length of the union of [a, a + 512) in iterations, without a limit on who joins."""
    starts = np.asarray(arrivals_ms) * LENGTH / SINGLE_MS
    return round(float(np.minimum(np.diff(starts), LENGTH).sum()) + LENGTH)


def one_at_a_time(arrivals: Sequence[float], single: float) -> float:
    """From the first arrival to the last end where each waits for the one before."""
    end = arrivals[0]
    for arrival in arrivals:
        end = max(end, arrival) + single
    return end - arrivals[0]


# ---------------------------------------------------------------- experiment 7


def _experiment_7(bench: Bench, requests: int, lengths: str, gap_ms: int) -> Case:
    trt_ms, flover_ms = EXPERIMENT_7[requests, lengths][gap_ms]
    shape = "512" if lengths == "fixed" else "U(128, 512)"
    return Case(
        f"experiment 7, {requests} requests of {shape}, gaps of {gap_ms} ms",
        f"published: TensorRT-LLM {trt_ms} ms, Flover {flover_ms} ms (A100 80 GB); ratio: ours ÷ the lesser",
        lambda: _engines(bench, requests, lengths, gap_ms),
        Target(1.0, most=True),
        GUESS_S * (2 if requests == REQUESTS else 3) + requests * gap_ms / 1e3,
    )


def _engines(bench: Bench, requests: int, lengths: str, gap_ms: int) -> Figure:
    given = sizes(bench)
    running = _engine(bench)
    least_ms = min(EXPERIMENT_7[requests, lengths][gap_ms])
    totals = np.full(requests, given.length)
    if lengths == "random":
        totals = np.random.default_rng(bench.seed).integers(given.shortest, given.length + 1, requests)
    asked = prompts(requests, PROMPT, running.model.spec.vocab_size, bench.seed)
    arrivals = [given.gap_scale * gap_ms / 1e3 * i for i in range(requests)]
    seconds = running.run(asked, [int(one) - PROMPT for one in totals], arrivals).seconds
    tokens = int(totals.sum()) - PROMPT * requests
    note = f"{tokens / seconds:.0f} tokens/s"
    return Figure([1e3 * seconds], "ms", least_ms, 1e3 * seconds / least_ms, note)
