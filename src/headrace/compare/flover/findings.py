"""What the runs of experiments 1 to 3 come to, the published tables beside: ratios, no seconds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial

from headrace.compare.figures import Spread
from headrace.compare.flover.clock import count, iteration_workload
from headrace.compare.flover.identities import (
    Simulated,
    expected_busy,
    overlap_percent,
    serial_ends,
    simulate_busy,
)
from headrace.compare.flover.plan import FUSED, INSTANCES_METHOD, Measured, Scale, clock_arrivals, window_methods
from headrace.compare.flover.plots import Line, line_chart
from headrace.compare.flover.published import (
    EXPERIMENT_1,
    EXPERIMENT_2,
    EXPERIMENT_3,
    GAP_S,
    ITERATION_MS,
    LENGTH,
    MODELS,
    REQUESTS,
    SINGLE_S,
)
from headrace.compare.flover.results import (
    CellRun,
    Figure,
    Findings,
    Grid,
    label_of,
    never_slower,
    number_text,
    spread_text,
    together,
    window_label,
)
from headrace.compare.flover.trace import Check, fused_checks, mean_in_flight
from headrace.compare.methods import Outcome
from headrace.sched.policy import Fused

DRAWS = 1000
"""Of the simulation behind experiment 3."""
TIMES = 3.0
"""What fused has to gain over instances at 32 requests, where a step of a batch costs little more than one of a row."""


def trace_checks(cells: Sequence[CellRun]) -> tuple[Check, ...]:
    """The identities on our own traces, of every point's middle round."""
    found = [(cell.shape.label, fused_checks(cell.round(FUSED))) for cell in cells]
    return tuple(together([(label, checks[index]) for label, checks in found]) for index in range(len(found[0][1])))


def constant_law(cells: Sequence[CellRun]) -> Check:
    """T(N) = L + gap (N - 1) on the iteration clock, by the real scheduler."""
    broken = []
    for cell in cells:
        arrivals, lengths = clock_arrivals(cell.shape, 0)
        found = count(iteration_workload(arrivals, lengths), Fused()).seconds
        law = LENGTH + math.ceil(GAP_S * LENGTH / SINGLE_S * (cell.shape.requests - 1) - 1e-6)
        if found != law:
            broken.append(f"{cell.shape.label}: {found:g} iterations, the law says {law}")
    name = "T(N) = T(1) + gap · (N - 1), on the iteration clock"
    return Check(name, not broken, "; ".join(broken) or f"at all {len(cells)} points, by the real scheduler")


def _law_s(scale: Scale, requests: int, single_s: float) -> float:
    return single_s + GAP_S * scale.time * (requests - 1)


def three_times(cells: Sequence[CellRun], measured: Measured) -> tuple[Check, ...]:
    """The throughput of fused and of instances at the last point, where a batch is nearly free."""
    gain = cells[-1].ratio(INSTANCES_METHOD, FUSED)
    if gain is None:
        return ()
    name = f"fused ≥ {TIMES:g} × instances at {cells[-1].shape.requests}, where decoding is bound by weights"
    if measured.batch_gain < TIMES:
        return (Check(name, True, f"it is not: a batch gains at most {measured.batch_gain:.1f} times here"),)
    return (Check(name, gain.median >= TIMES, f"{spread_text(gain)} times"),)


def overall_time(cells: Sequence[CellRun], scale: Scale, measured: Measured) -> Findings:
    """Experiment 1. The first cell is one request."""
    alone = cells[0].seconds(FUSED)
    assert alone is not None
    times, gains, raw = [], [], []
    for cell in cells:
        number = cell.shape.requests
        ours = cell.seconds(FUSED)
        assert ours is not None
        theirs = [EXPERIMENT_1[model].values for model in MODELS]
        gained = [EXPERIMENT_1[f"{model}, speed-up"].values[number] for model in MODELS]
        law = _law_s(scale, number, alone.median)
        ratios = [f"{values[number] / values[1]:.2f}" for values in theirs]
        times.append((str(number), f"{ours.median / alone.median:.2f}", f"{law / alone.median:.2f}", *ratios))
        told = spread_text(cell.ratio(INSTANCES_METHOD, FUSED))
        gains.append((str(number), told, *(f"{one:.1f}" for one in gained)))
        raw.append((str(number), spread_text(ours, 3), spread_text(cell.seconds(INSTANCES_METHOD), 3), f"{law:.3f}"))
    grids = (
        Grid(
            "Total time over that of one request, T(N) / T(1)",
            ("N", "fused here", "law here", *MODELS),
            tuple(times),
            "Law: T(1) + gap · (N - 1), arrivals alone. Models: published.",
        ),
        Grid("Speed-up over concurrent instances", ("N", "here", *MODELS), tuple(gains), "Models: published."),
        Grid(
            "Seconds here", ("N", "fused", "instances", "law"), tuple(raw), "Median of the rounds, range in brackets."
        ),
    )
    last = cells[-1]
    ours = last.seconds(FUSED)
    assert ours is not None
    above = ours.median / _law_s(scale, last.shape.requests, alone.median)
    sentences = [
        f"At {last.shape.requests} requests fused takes {above:.2f} times what arrivals alone allow; published: "
        f"{_published_law():.2f} (GPT-J 6B). What lies above 1 is the growth of an iteration with its rows.",
        *gain_sentence(last, "10.9 to 16.7"),
    ]
    checks = (
        constant_law(cells),
        *trace_checks(cells),
        *three_times(cells, measured),
        *not_slower(cells, (INSTANCES_METHOD,), {}),
    )
    figure = Figure(partial(_times_chart, tuple(cells), alone.median), "Fused here and the four published models.")
    return Findings(grids, checks, tuple(sentences), (figure,))


def _published_law() -> float:
    values = EXPERIMENT_1["GPT-J 6B"].values
    return values[32] / (values[1] + GAP_S * 31)


def gain_sentence(cell: CellRun, published: str) -> list[str]:
    gain = cell.ratio(INSTANCES_METHOD, FUSED)
    if gain is None:
        return []
    return [
        f"{cell.shape.label}: fused is {spread_text(gain)} times as fast as instances here; published: {published}."
    ]


def not_slower(cells: Sequence[CellRun], others: Sequence[str], windows: Mapping[str, float]) -> list[Check]:
    """Where there is more than one request: one alone is the same under every method."""
    cells = [cell for cell in cells if cell.shape.requests > 1]
    return [
        never_slower(cells, FUSED, other, label_of(other, windows))
        for other in others
        if any(other in cell.runs for cell in cells)
    ]


def _times_chart(cells: Sequence[CellRun], alone_s: float, width: float) -> str:
    ours = [(cell.shape.key, cell.round(FUSED).seconds / alone_s) for cell in cells]
    lines = [Line("fused here", tuple(ours), True)]
    for model in MODELS:
        values = EXPERIMENT_1[model].values
        lines.append(Line(model, tuple((key, one / values[1]) for key, one in values.items()), False))
    return line_chart(lines, "requests, one every 500 ms (scaled)", "total time / that of one request", False, width)


def throughput(cells: Sequence[CellRun], measured: Measured) -> Findings:
    """Experiment 2. The first cell is one request."""
    alone = cells[0].latency(FUSED)
    assert alone is not None
    rates, waits = [], []
    first_rate = _rate(cells[0], FUSED)
    assert first_rate is not None
    for cell in cells:
        number = cell.shape.requests
        rate, other = _rate(cell, FUSED), _rate(cell, INSTANCES_METHOD)
        latency = cell.latency(FUSED)
        assert rate is not None and latency is not None
        gained = [_times_single(model, number) for model in MODELS]
        rates.append((str(number), number_text(rate), number_text(other), f"{rate / first_rate:.2f}", *gained))
        theirs = [EXPERIMENT_2[f"{model}, latency"].values.get(number) for model in MODELS]
        waits.append((str(number), _latency(latency, alone), *(number_text(one, 2) for one in theirs)))
    grids = (
        Grid(
            "Throughput: tokens over total time",
            ("N", "tokens/s fused", "instances", "fused, × N = 1", *MODELS),
            tuple(rates),
            "Models: N · T(1) / T(N), derived from the published times of experiment 1.",
        ),
        Grid(
            "Mean latency over that of one request",
            ("N", "fused here", *MODELS),
            tuple(waits),
            "Models: published. With range over the rounds.",
        ),
    )
    eight = next(cell for cell in cells if cell.shape.requests == 8).latency(FUSED)
    last = cells[-1].latency(FUSED)
    assert eight is not None and last is not None
    sentences = [
        f"Latency is {_latency(eight, alone)} times that of one request at 8 and {_latency(last, alone)} times at "
        f"{cells[-1].shape.requests}, range over the rounds in brackets; published: 1.03 and 1.08 "
        "(means of four models on A100 GPUs, where an iteration hardly grows with its rows).",
        *gain_sentence(cells[-1], "10.9 to 16.7"),
    ]
    checks = (
        _tokens_over_time(cells),
        *trace_checks(cells),
        *three_times(cells, measured),
        *not_slower(cells, (INSTANCES_METHOD,), {}),
    )
    return Findings(grids, checks, tuple(sentences))


def _latency(found: Spread, alone: Spread) -> str:
    """Over the median of one request."""
    return spread_text(Spread.of([one / alone.median for one in (found.low, found.median, found.high)]), 3)


def _tokens_over_time(cells: Sequence[CellRun]) -> Check:
    """Throughput is N · L / T: every answer has exactly its length."""
    broken = [
        cell.shape.label
        for cell in cells
        if any(
            len(run.token_ids) != asked.max_tokens
            for rounds in cell.runs.values()
            for one in rounds
            for run, asked in zip(one.requests, cell.workload.requests, strict=True)
        )
    ]
    return Check("tokens/s = N · L / T (every answer has its length)", not broken, "; ".join(broken) or "in all runs")


def _rate(cell: CellRun, name: str) -> float | None:
    seconds = cell.seconds(name)
    return None if seconds is None else cell.round(name).output_tokens / max(seconds.median, 1e-9)


def _times_single(model: str, requests: int) -> str:
    values = EXPERIMENT_1[model].values
    return f"{requests * values[1] / values[requests]:.2f}"


def poisson(cells: Sequence[CellRun], scale: Scale, seed: int) -> Findings:
    """Experiment 3: on the iteration clock at full length, and in seconds."""
    windows = window_methods(scale)
    simulated = {cell.shape.key: _simulate(cell.shape.key) for cell in cells}
    on_clock = [count(iteration_workload(*clock_arrivals(cell.shape, seed)), Fused()) for cell in cells]
    checked = [(cell.shape.label, fused_checks(run)) for cell, run in zip(cells, on_clock, strict=True)]
    checks = (
        _simulation_check(simulated),
        _closed_form_check(simulated),
        _published_check(simulated),
        *(_renamed(together([(label, found[i]) for label, found in checked])) for i in range(len(checked[0][1]))),
        *trace_checks(cells),
        *not_slower(cells, (*windows, INSTANCES_METHOD), windows),
    )
    published = EXPERIMENT_3["speed-up"].values
    sentences = (
        *gain_sentence(cells[0], f"{published[cells[0].shape.key]:.1f}"),
        *gain_sentence(cells[-1], f"{published[cells[-1].shape.key]:.1f}"),
        *_window_sentences(cells, windows),
    )
    figure = Figure(
        partial(_speed_chart, tuple(cells), windows),
        "Total time of each method / that of fused, median over the rounds; published: over concurrent instances.",
    )
    grids = (_clock_grid(cells, scale, simulated, on_clock), _speed_grid(cells, windows, seed))
    return Findings(grids, checks, sentences, (figure,))


def _clock_grid(
    cells: Sequence[CellRun], scale: Scale, simulated: Mapping[float, Simulated], on_clock: Sequence[Outcome]
) -> Grid:
    rows = []
    for cell, run in zip(cells, on_clock, strict=True):
        gap = cell.shape.key
        ours, one = cell.round(FUSED), simulated[gap]
        iterations = EXPERIMENT_3["total iterations"].values[gap]
        rows.append(
            (
                *(f"{gap:g}", f"{iterations:.0f}", f"{one.mean:.0f} ± {one.sd:.0f}"),
                *(f"{one.deviations(iterations):+.1f}", str(len(run.iterations))),
                f"{len(ours.iterations) / scale.length:.0f}",
                *(f"{EXPERIMENT_3['overlap'].values[gap]:.1f}", f"{_overlap(run):.1f}", f"{_overlap(ours):.1f}"),
            )
        )
    return Grid(
        "Busy iterations and overlap",
        (
            *("λ ms", "published iterations", f"simulated, {DRAWS} draws", "published, in sd", "clock", "here"),
            *("published overlap %", "clock %", "here %"),
        ),
        tuple(rows),
        "Clock: our scheduler on an iteration clock, full length, one draw. Here: the same draw on the model, its "
        "iterations scaled to full length; an iteration that grows with its rows lets more requests meet.",
    )


def _speed_grid(cells: Sequence[CellRun], windows: Mapping[str, float], seed: int) -> Grid:
    others = (INSTANCES_METHOD, *windows)
    rows = []
    for cell in cells:
        gap = cell.shape.key
        ratios = [spread_text(cell.ratio(other, FUSED)) for other in others]
        published = EXPERIMENT_3["speed-up"].values[gap]
        rows.append((f"{gap:g}", f"{published:.1f}", f"{_ideal_gain(cell, seed):.1f}", *ratios))
    return Grid(
        "How much faster fused is",
        (
            *("λ ms", "published, over instances", "clock, over instances"),
            *(f"here, over {label_of(other, windows)}" for other in others),
        ),
        tuple(rows),
        "Ratio of total times. Published beside: FasterTransformer, one instance a request. Clock: instances that take "
        "turns, and iterations that do not grow with their rows.",
    )


def _simulate(gap_ms: float) -> Simulated:
    return simulate_busy(REQUESTS, LENGTH, gap_ms / ITERATION_MS, DRAWS, round(gap_ms))


def _renamed(check: Check) -> Check:
    return Check(f"{check.name} [iteration clock]", check.holds, check.detail)


def _overlap(run: Outcome) -> float:
    return overlap_percent(mean_in_flight(run), len(run.requests))


def _ideal_gain(cell: CellRun, seed: int) -> float:
    """Instances that share the machine evenly over fused, on the iteration clock: total times."""
    arrivals, lengths = clock_arrivals(cell.shape, seed)
    ends = [arrival + length for arrival, length in zip(arrivals, lengths, strict=True)]
    return serial_ends(arrivals, lengths)[-1] / max(ends)


def _simulation_check(simulated: Mapping[float, Simulated]) -> Check:
    means = EXPERIMENT_3["simulated iterations, mean"].values
    worst = max(abs(one.mean / means[gap] - 1) for gap, one in simulated.items())
    told = f"{DRAWS} draws for each λ, farthest off: {100 * worst:.1f} %"
    return Check("simulated iterations are the reference's means within 1 %", worst <= 0.01, told)


def _closed_form_check(simulated: Mapping[float, Simulated]) -> Check:
    worst = max(
        abs(one.mean / expected_busy(REQUESTS, LENGTH, gap / ITERATION_MS) - 1) for gap, one in simulated.items()
    )
    name = "simulated iterations = L + (N - 1) g (1 - e^(-L/g)) within 1 %"
    return Check(name, worst <= 0.01, f"farthest off: {100 * worst:.1f} %")


def _published_check(simulated: Mapping[float, Simulated]) -> Check:
    found = EXPERIMENT_3["total iterations"].values
    worst = max(abs(one.deviations(found[gap])) for gap, one in simulated.items())
    return Check("published iterations lie within 2 sd of the simulation", worst <= 2, f"farthest off: {worst:.1f} sd")


def _window_sentences(cells: Sequence[CellRun], windows: Mapping[str, float]) -> list[str]:
    told = []
    for name, service_times in windows.items():
        ratios = [found.median for cell in cells if (found := cell.ratio(name, FUSED)) is not None]
        if ratios:
            told.append(
                f"A {window_label(service_times)} takes {min(ratios):.2f} to {max(ratios):.2f} times as long as fused, "
                "depending on λ."
            )
    return told


def _speed_chart(cells: Sequence[CellRun], windows: Mapping[str, float], width: float) -> str:
    lines = []
    for other in (INSTANCES_METHOD, *windows):
        found = [(cell.shape.key, cell.ratio(other, FUSED)) for cell in cells]
        points = tuple((key, one.median) for key, one in found if one is not None)
        if points:
            lines.append(Line(f"{label_of(other, windows)} / fused", points, True))
    lines.append(Line("published, instances / fused", tuple(EXPERIMENT_3["speed-up"].values.items()), False))
    return line_chart(lines, "mean gap λ, published ms (scaled)", "total time / that of fused", True, width)
