"""What Flover published (slides of GTC 2024; arXiv 2305.13484; the released code's picture), as data with its marks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

INSTANCES = "FasterTransformer, concurrent instances"


class Mark(StrEnum):
    """How sure a figure is."""

    READ = "read"
    """Printed as a number in the source."""
    ABOUT = "read ≈"
    """Read off a bar or a curve."""
    DERIVED = "derived"
    """Computed from figures that were read."""


@dataclass(frozen=True, slots=True)
class Series:
    """One row of a published table."""

    name: str
    unit: str
    mark: Mark
    values: Mapping[float, float]
    """Value of the table's variable -> figure."""


@dataclass(frozen=True, slots=True)
class Published:
    """What one experiment published."""

    number: int
    title: str
    variable: str
    """What the keys of every series are."""
    series: tuple[Series, ...]
    remarks: tuple[str, ...] = ()

    def __getitem__(self, name: str) -> Series:
        """The series of that name. Raises KeyError."""
        for one in self.series:
            if one.name == name:
                return one
        raise KeyError(name)


def _series(name: str, unit: str, mark: Mark, keys: Sequence[float], values: Sequence[float]) -> Series:
    return Series(name, unit, mark, dict(zip(keys, values, strict=True)))


SINGLE_S = 5.8
"""One request alone, 512 iterations: what gaps are scaled by. (read)"""
LENGTH = 512
"""Iterations of a request where lengths are equal. (read)"""
PROMPT = 8
"""Input tokens of a request. (read)"""
REQUESTS = 32
GAP_S = 0.5
"""Between arrivals, where nothing else is said. (read)"""
ITERATION_MS = 1000 * SINGLE_S / LENGTH
MODELS: Sequence[str] = ("GPT-J 6B", "LLaMA 13B", "LLaMA 33B", "LLaMA 65B")
WINDOWS: Mapping[float, float] = {2.0: 0.35, 8.0: 1.4, 16.0: 2.8}
"""Seconds of the windows of experiment 6 -> that in times of one request (SINGLE_S), which is how long ours are."""

COUNTS: Sequence[int] = (1, 2, 4, 8, 16, 32)
LAMBDAS: Sequence[int] = (20, 50, 100, 150, 200, 300, 400, 500, 750, 1000, 2000, 3000, 4000, 5000)
LONGEST: Sequence[int] = (512, 1024, 1536, 2048)
SHORTEST = 128
"""Random lengths are uniform from here. (read)"""
GAPS_MS: Sequence[int] = (0, 100, 500)

EXPERIMENT_1 = Published(
    1,
    "overall time, a request every 500 ms",
    "requests",
    (
        _series("GPT-J 6B", "s", Mark.READ, COUNTS, (5.6, 6.1, 7.1, 9.2, 13.2, 21.2)),
        _series("LLaMA 13B", "s", Mark.READ, COUNTS, (9.1, 9.6, 10.6, 12.7, 16.9, 24.9)),
        _series("LLaMA 33B", "s", Mark.READ, COUNTS, (13.6, 14.1, 15.6, 17.7, 21.9, 30.3)),
        _series("LLaMA 65B", "s", Mark.READ, COUNTS, (10.8, 11.4, 12.5, 14.4, 18.7, 27.2)),
        _series("GPT-J 6B, speed-up", "×", Mark.READ, COUNTS, (1.0, 1.8, 2.4, 3.5, 5.9, 10.9)),
        _series("LLaMA 13B, speed-up", "×", Mark.READ, COUNTS, (1.0, 1.6, 2.5, 3.5, 6.0, 11.7)),
        _series("LLaMA 33B, speed-up", "×", Mark.READ, COUNTS, (1.0, 1.8, 2.7, 3.5, 6.5, 13.4)),
        _series("LLaMA 65B, speed-up", "×", Mark.READ, COUNTS, (1.0, 1.9, 3.0, 3.9, 7.5, 16.7)),
    ),
    (
        f"Speed-up: over {INSTANCES}. One GPU for 6B and 13B, two for 33B, four for 65B (A100 80 GB).",
        "T(N) ≈ T(1) + 0.5 s · (N - 1) gives 21.1, 24.6, 29.1 and 26.3 s at 32: arrivals dominate (derived).",
    ),
)
EXPERIMENT_2 = Published(
    2,
    "throughput and latency, a request every 500 ms",
    "requests",
    (
        _series("GPT-J 6B, latency", "× single", Mark.READ, (8, 16, 32), (1.03, 1.04, 1.05)),
        _series("LLaMA 13B, latency", "× single", Mark.READ, (8, 16, 32), (1.02, 1.04, 1.05)),
        _series("LLaMA 33B, latency", "× single", Mark.READ, (8, 16, 32), (1.05, 1.07, 1.09)),
        _series("LLaMA 65B, latency", "× single", Mark.READ, (8, 16, 32), (1.01, 1.05, 1.13)),
        _series("GPT-J 6B, throughput", "tokens/s", Mark.ABOUT, (32,), (770,)),
        _series("LLaMA 13B, throughput", "tokens/s", Mark.ABOUT, (32,), (655,)),
        _series("LLaMA 33B, throughput", "tokens/s", Mark.ABOUT, (32,), (540,)),
        _series("LLaMA 65B, throughput", "tokens/s", Mark.ABOUT, (32,), (605,)),
    ),
    (
        "Throughput is tokens over total time: 32 · 512 / T = 773, 658, 541 and 602 tokens/s (derived).",
        f"{INSTANCES}: ≈ 70, 57, 40 and 37 tokens/s at 32 (read ≈).",
        "Mean latency over a single request: 1.03 at 8 and 1.08 at 32 (read; the means of the four models, derived).",
    ),
)
EXPERIMENT_3 = Published(
    3,
    "Poisson arrivals, 32 requests of 512 iterations",
    "mean gap in ms",
    (
        _series(
            "total iterations",
            "iterations",
            Mark.READ,
            LAMBDAS,
            (557, 616, 748, 888, 911, 1174, 1366, 1537, 2239, 2621, 5483, 7738, 8902, 10694),
        ),
        _series(
            "overlap",
            "%",
            Mark.READ,
            LAMBDAS,
            (91.3, 81.8, 67.3, 62.1, 60.3, 45.2, 36.7, 31.0, 23.2, 20.0, 9.3, 6.7, 5.7, 4.8),
        ),
        _series(
            "speed-up",
            "×",
            Mark.READ,
            LAMBDAS,
            (11.2, 11.1, 10.2, 9.3, 9.1, 7.9, 7.1, 6.5, 4.5, 4.2, 2.1, 1.3, 1.3, 1.1),
        ),
        _series(
            "mean overlapped",
            "requests",
            Mark.ABOUT,
            LAMBDAS,
            (29.2, 26.2, 21.5, 19.9, 19.3, 14.5, 11.7, 9.9, 7.4, 6.4, 3.0, 2.1, 1.8, 1.5),
        ),
        _series(
            "simulated iterations, mean",
            "iterations",
            Mark.DERIVED,
            LAMBDAS,
            (567, 649, 786, 922, 1061, 1336, 1610, 1877, 2555, 3245, 5667, 7541, 8873, 9875),
        ),
        _series(
            "simulated iterations, sd",
            "iterations",
            Mark.DERIVED,
            LAMBDAS,
            (10, 25, 48, 74, 100, 148, 199, 247, 365, 489, 817, 975, 1023, 1015),
        ),
    ),
    (
        "Published iterations are busy iterations of one draw each; all lie within 1.6 standard deviations of the "
        "simulated mean (derived).",
        "The published mean overlap differs from Σ lengths / iterations by up to 9.6 % (derived): the identity is "
        "tested on our own runs, not on the table.",
        f"{INSTANCES}: about 140 s up to 3000 ms, which is 0.75 of 32 requests one after the other (derived).",
    ),
)
EXPERIMENT_4 = Published(
    4,
    "random lengths U(128, b), 32 requests",
    "longest length b",
    (
        _series("LLaMA 13B, instances", "s", Mark.READ, LONGEST, (172.8, 366.8, 472.1, 589.3)),
        _series("LLaMA 13B, no shuffle", "s", Mark.READ, LONGEST, (24.8, 34.6, 44.6, 54.6)),
        _series("LLaMA 13B, shuffle", "s", Mark.READ, LONGEST, (21.5, 29.0, 37.0, 44.3)),
        _series("LLaMA 65B, instances", "s", Mark.READ, LONGEST, (253.8, 627.0, 883.4, 1265.9)),
        _series("LLaMA 65B, no shuffle", "s", Mark.READ, LONGEST, (27.2, 40.2, 53.4, 66.5)),
        _series("LLaMA 65B, shuffle", "s", Mark.READ, LONGEST, (23.9, 33.4, 44.0, 54.1)),
        _series("LLaMA 13B, shuffle gain", "×", Mark.DERIVED, LONGEST, (1.153, 1.193, 1.205, 1.233)),
        _series("LLaMA 65B, shuffle gain", "×", Mark.DERIVED, LONGEST, (1.138, 1.204, 1.214, 1.229)),
        _series("LLaMA 13B, over instances", "×", Mark.DERIVED, LONGEST, (8.0, 12.6, 12.8, 13.3)),
        _series("LLaMA 65B, over instances", "×", Mark.DERIVED, LONGEST, (10.6, 18.8, 20.1, 23.4)),
    ),
)
EXPERIMENT_5 = Published(
    5,
    "timeline: who gets a token in which iteration",
    "",
    (),
    (
        "Nsight timelines (read): the baseline's instances compete for the device; fusion shows one thread and equal "
        "segments, each of them one token for all requests.",
    ),
)
EXPERIMENT_6 = Published(
    6,
    "cumulative progress, 32 requests",
    "window in s",
    (_series("progress at 37 s", "%", Mark.ABOUT, (2, 4, 8), (6, 20, 65)),),
    (
        "Fusion ends at 26.5 s, its first completion at about 9.5 s, then one about every 0.5 s (read ≈).",
        "A window of 16 s ends all at about 32 s, three times the latency for the early ones (read ≈).",
        "Concurrent instances are at about 13 % at 37 s (read ≈): a short window is worse than instances, and only one "
        "that holds all requests comes close (derived).",
    ),
)


def _bars(requests: int, lengths: str, trt_ms: Sequence[float], flover_ms: Sequence[float]) -> tuple[Series, ...]:
    name = f"{requests} requests, {lengths}"
    return (
        _series(f"{name}, TensorRT-LLM", "ms", Mark.ABOUT, GAPS_MS, trt_ms),
        _series(f"{name}, Flover", "ms", Mark.ABOUT, GAPS_MS, flover_ms),
    )


EXPERIMENT_7 = Published(
    7,
    "against another engine with in-flight batching (LLaMA 7B, TensorRT-LLM d8ebeee)",
    "gap between requests in ms",
    (
        *_bars(32, "512", (10_800, 10_500, 21_500), (7_700, 10_300, 22_200)),
        *_bars(32, "random", (6_800, 9_200, 20_400), (7_000, 9_300, 20_900)),
        *_bars(64, "512", (15_300, 18_500, 37_500), (9_200, 13_900, 38_000)),
        *_bars(64, "random", (12_000, 13_300, 35_700), (8_700, 13_300, 37_200)),
    ),
    ("GPU memory at 32 and 64 requests: TensorRT-LLM 36 and 36 GB, Flover 20 and 23 GB (read ≈).",),
)
EXPERIMENTS: Mapping[int, Published] = {
    one.number: one
    for one in (EXPERIMENT_1, EXPERIMENT_2, EXPERIMENT_3, EXPERIMENT_4, EXPERIMENT_5, EXPERIMENT_6, EXPERIMENT_7)
}

SLIDE_EXAMPLE: Sequence[tuple[float, float, float]] = ((1.0, 8.0, 9.0), (2.8, 4.0, 6.8), (6.0, 11.0, 17.0))
"""(arrival, needs, ends under fusion), s: the three requests of the slides. Arrivals and needs read, ends derived."""

DEMO_LENGTHS: Sequence[int] = (
    *(482, 480, 162, 338, 468, 260, 303, 346, 400, 382, 259, 191, 443, 490, 229, 486),
    *(417, 346, 337, 465, 291, 215, 243, 187, 443, 483, 312, 343, 428, 186, 174, 332),
)
"""Of the terminal demo's picture. (read)"""
DEMO_GAP = 38.35
"""Iterations between its arrivals: 31 gaps and the last length are its 1,521 iterations. (derived)"""
DEMO_ITERATIONS = 1521
"""(read)"""
DEMO_PEAK = 12
"""Most in flight, as drawn. (read)"""
DEMO_MILLISECONDS = 38_537
"""(read)"""
DEMO_ORDER: Sequence[int] = (
    *(2, 5, 3, 0, 1, 6, 11, 7, 4, 10, 8, 9, 14, 12, 13, 17),
    *(21, 18, 16, 20, 15, 23, 22, 19, 29, 26, 30, 24, 27, 25, 28, 31),
)
"""In which its requests finish; ties by number. (derived; the picture's own is the same up to two exchanges of
neighbours)"""
