"""What the runs of experiments 5 to 7 come to: timelines, progress, and engines from outside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from statistics import median

from headrace.compare.curves import Curve, progress_chart, token_points
from headrace.compare.flover.clock import count, iteration_workload
from headrace.compare.flover.findings import trace_checks
from headrace.compare.flover.identities import serial_ends, window_ends
from headrace.compare.flover.plan import FUSED, INSTANCES_METHOD, Scale, clock_arrivals, window_methods
from headrace.compare.flover.plots import gaps_of, iteration_chart
from headrace.compare.flover.published import EXPERIMENT_6, EXPERIMENT_7, LENGTH, SINGLE_S, SLIDE_EXAMPLE, WINDOWS
from headrace.compare.flover.results import (
    NONE,
    CellRun,
    Figure,
    Findings,
    Grid,
    label_of,
    never_slower,
    spread_text,
)
from headrace.compare.flover.trace import (
    Check,
    area,
    check_window,
    completions_csv,
    progress,
    progress_csv,
    token_iterations,
)
from headrace.compare.methods import Outcome
from headrace.sched.policy import Fused

FUSED_S, LATER_S = 26.5, 37.0
"""When fusion is done in the published figure, and where its other curves are read."""


def timeline(cells: Sequence[CellRun]) -> Findings:
    """Experiment 5: one point."""
    (cell,) = cells
    rows = []
    for name in cell.runs:
        run = cell.round(name)
        gaps = gaps_of(run)
        told = [f"{1000 * _at(gaps, share):.1f}" for share in (0.5, 0.05, 0.95)] if gaps else [NONE] * 3
        steps = str(len(run.iterations)) if run.iterations else NONE
        each = f"{run.output_tokens / len(run.iterations):.2f}" if run.iterations else NONE
        rows.append((label_of(name, {}), f"{run.seconds:.3f}", steps, each, *told))
    grid = Grid(
        "Segments: the time from a token to the next of the same request",
        ("method", "seconds", "iterations", "tokens an iteration", "gap ms, median", "5 %", "95 %"),
        tuple(rows),
        "Of each method the round nearest to its median.",
    )
    fused = cell.round(FUSED)
    sentences = [
        f"Fused gave {fused.output_tokens} tokens in {len(fused.iterations)} iterations: each segment of its one "
        "thread is one token for every request in flight.",
    ]
    if INSTANCES_METHOD in cell.runs:
        slow, fast = (median(gaps_of(cell.round(name)) or [0.0]) for name in (INSTANCES_METHOD, FUSED))
        sentences.append(
            f"Instances compete: a request waits {1000 * slow:.1f} ms for its next token, {1000 * fast:.1f} ms under "
            "fused (medians)."
        )
    figure = Figure(
        partial(iteration_chart, FUSED, token_iterations(fused)),
        "A bar a request: the iterations in which it got a token. Requests join and leave without stopping the others.",
    )
    checks = (_slide_check(), *trace_checks(cells))
    return Findings((grid,), checks, tuple(sentences), (figure,), {"timeline.csv": _timeline_csv(fused)})


def _slide_check() -> Check:
    """The three requests of the published slides, by the real scheduler in iterations of a tenth of a second."""
    arrivals, needs, ends = zip(*SLIDE_EXAMPLE, strict=True)
    asked = iteration_workload([round(10 * at) for at in arrivals], [round(10 * need) for need in needs])
    found = [one.end_s / 10 for one in count(asked, Fused()).requests]
    told = f"{', '.join(f'{end:g}' for end in found)} s"
    return Check("the slides' three requests end at 9, 6.8 and 17 s [iteration clock]", found == list(ends), told)


def _at(ordered: Sequence[float], share: float) -> float:
    return ordered[round(share * (len(ordered) - 1))]


def _timeline_csv(run: Outcome) -> str:
    """request,iteration,t: a line a token."""
    lines = [
        f"{index},{iteration},{at:.6f}"
        for index, (found, request) in enumerate(zip(token_iterations(run), run.requests, strict=True))
        for iteration, at in zip(found, request.token_s, strict=True)
    ]
    return "\n".join(["request,iteration,t", *lines]) + "\n"


def cumulative(cells: Sequence[CellRun], scale: Scale, seed: int) -> Findings:
    """Experiment 6: one point."""
    (cell,) = cells
    windows = window_methods(scale)
    middle = {name: cell.round(name) for name in cell.runs}
    until = max(max(request.end_s for request in one.requests) for one in middle.values())
    fused = middle[FUSED]
    clock = _clock_ends(cell, seed)
    times, shares = [], []
    for name, run in middle.items():
        label = label_of(name, windows)
        first_s = min(request.end_s for request in run.requests)
        ratio = spread_text(cell.ratio(name, FUSED))
        seconds = spread_text(cell.seconds(name), 3)
        times.append((label, seconds, ratio, clock.get(label, NONE), f"{first_s / scale.single_s:.2f}"))
        out = [f"{100 * _share_at(run, fused.seconds * later):.0f} %" for later in (1.0, LATER_S / FUSED_S)]
        shares.append((label, *out, _published_share(name, windows), f"{area(run, until):.3f}"))
    grids = (
        Grid(
            "All requests together",
            ("method", "all done, s", "/ fused", "/ fused, clock", "first completion, T1"),
            tuple(times),
            "T1: one request alone. Clock: iterations that do not grow with their rows; instances that take turns.",
        ),
        Grid(
            "Progress: share of all tokens that is out",
            ("method", "when fused is done", "at 1.4 times that", "published, at 37 s", "area"),
            tuple(shares),
            "Area under progress: the mean share that was out, until the slowest method is done.",
        ),
    )
    checks = [
        *_not_less_area(middle, until, windows),
        *(
            _of(check_window(middle[name], times * scale.single_s), label_of(name, windows))
            for name, times in windows.items()
            if name in middle and middle[name].iterations
        ),
        *(never_slower(cells, FUSED, name, label_of(name, windows)) for name in middle if name != FUSED),
        *trace_checks(cells),
    ]
    told = [
        f"{label_of(name, windows)} {100 * _share_at(run, fused.seconds):.0f} %"
        for name, run in middle.items()
        if name != FUSED
    ]
    sentences = (
        f"When fused is done, so much is out of the others: {', '.join(told)}.",
        "Published, at 37 s, 1.4 times fusion's 26.5 s: windows of 2, 4 and 8 s ≈ 6, 20 and 65 %, instances ≈ 13 %. "
        "One request takes about 9.5 s there, so its windows are shorter in that measure than ours; ours start with "
        "all that wait once the batch before has ended, which makes short windows lose less.",
    )
    curves = [Curve(label_of(name, windows), token_points(run)) for name, run in middle.items()]
    figure = Figure(partial(progress_chart, curves), "Tokens that were out, of each method's middle round.")
    named = {label_of(name, windows): run for name, run in middle.items()}
    files = {"progress.csv": progress_csv(named), "completions.csv": completions_csv(named)}
    return Findings(grids, tuple(checks), sentences, (figure,), files)


def _of(check: Check, label: str) -> Check:
    return Check(f"{label}: {check.name}", check.holds, check.detail)


def _published_share(name: str, windows: Mapping[str, float]) -> str:
    """Of the tokens, at LATER_S; the window of 16 s is done by then."""
    if name in windows:
        window_s = next(seconds for seconds, times in WINDOWS.items() if times == windows[name])
        share = EXPERIMENT_6["progress at 37 s"].values.get(window_s)
        return "100 %" if share is None else f"≈ {share:.0f} %"
    return "≈ 13 %" if name == INSTANCES_METHOD else "100 %"


def _share_at(run: Outcome, at_s: float) -> float:
    return max((share for when, share in progress(run) if when <= at_s), default=0.0)


def _clock_ends(cell: CellRun, seed: int) -> Mapping[str, str]:
    """Label -> total time / fused, on the iteration clock."""
    arrivals, lengths = clock_arrivals(cell.shape, seed)
    fused = max(arrival + length for arrival, length in zip(arrivals, lengths, strict=True))
    found = {label_of(FUSED, {}): 1.0, label_of(INSTANCES_METHOD, {}): serial_ends(arrivals, lengths)[-1] / fused}
    for name, times in window_methods(Scale(1.0, SINGLE_S)).items():
        found[label_of(name, {name: times})] = max(window_ends(arrivals, lengths, times * LENGTH)) / fused
    return {label: f"{ratio:.2f}" for label, ratio in found.items()}


def _not_less_area(middle: Mapping[str, Outcome], until: float, windows: Mapping[str, float]) -> list[Check]:
    ours = area(middle[FUSED], until)
    return [
        Check(
            f"area under progress: fused ≥ {label_of(name, windows)}",
            ours >= (theirs := area(run, until)),
            f"{ours:.3f} and {theirs:.3f}",
        )
        for name, run in middle.items()
        if name != FUSED
    ]


def against_engines(cells: Sequence[CellRun], outside: Sequence[str]) -> Findings:
    """Experiment 7. `outside`: the engines that were asked for; those that did not run have no column."""
    ran = [name for name in outside if any(name in cell.runs for cell in cells)]
    rows = []
    for cell in cells:
        theirs, ours = _published_pair(cell)
        told = [spread_text(cell.ratio(name, FUSED)) for name in ran]
        point = cell.shape.label.replace(" requests", "")
        rows.append((point, f"{theirs / ours:.2f}", spread_text(cell.seconds(FUSED), 3), *told))
    grid = Grid(
        "Total time of another engine / that of fused: above 1 fused is quicker",
        (
            "requests, lengths, gap",
            "published",
            "fused here, s",
            *(f"{name} / fused" for name in ran),
        ),
        tuple(rows),
        "Published: TensorRT-LLM / Flover, read off bars. Gaps are the published ones, scaled; random lengths "
        "U(128, 512), scaled.",
    )
    sentences = []
    for name in ran:
        ratios = [found.median for cell in cells if (found := cell.ratio(name, FUSED)) is not None]
        sentences.append(
            f"{name}: {min(ratios):.2f} to {max(ratios):.2f} times fused's time, slower than fused at "
            f"{sum(ratio > 1 for ratio in ratios)} of {len(ratios)} points (medians)."
        )
    if not ran:
        sentences.append("No other engine ran here: only our own half of the experiment was measured.")
    return Findings((grid,), trace_checks(cells), tuple(sentences))


def _published_pair(cell: CellRun) -> tuple[float, float]:
    """TensorRT-LLM's and Flover's milliseconds at this point."""
    gap = cell.shape.key
    group = cell.shape.label.rpartition(",")[0]
    return (EXPERIMENT_7[f"{group}, TensorRT-LLM"].values[gap], EXPERIMENT_7[f"{group}, Flover"].values[gap])
