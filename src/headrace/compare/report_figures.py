"""The page's figures: which of a comparison's data each is drawn from, and what is said below it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from statistics import median

from headrace.compare import study
from headrace.compare.cells import median_round, ratio_of
from headrace.compare.charts import Measured, Quantiles, ratio_chart, seconds_chart, strip_chart
from headrace.compare.curves import (
    MOST_CURVES,
    Curve,
    Panel,
    in_flight_chart,
    progress_chart,
    shown_requests,
    timeline_chart,
    token_points,
)
from headrace.compare.figures import percentile, token_gaps
from headrace.compare.runner import Comparison, MethodResult
from headrace.pages.markup import figure, safe

MOST_PANELS = 12
"""Methods whose requests are drawn one by one."""
SHARES = (0.05, 0.25, 0.5, 0.75, 0.95, 0.99)


def figures(comparison: Comparison) -> Iterator[str]:
    """Headings and figures, in order."""
    yield "<h2>Seconds of a run</h2>"
    yield _seconds(comparison)
    if len(comparison.methods) > 1:
        yield "<h2>Times as fast as serial, beside the study</h2>"
        yield _ratios(comparison)
    yield "<h2>Output tokens over time</h2>"
    yield _progress(comparison)
    yield "<h2>Time to the first token</h2>"
    yield _first_tokens(comparison)
    yield "<h2>Time between tokens</h2>"
    yield _gaps(comparison)
    yield "<h2>Requests in flight</h2>"
    yield _in_flight(comparison)
    yield "<h2>One run, request by request</h2>"
    yield _timeline(comparison)


def _seconds(comparison: Comparison) -> str:
    measured = [
        Measured(one.name, one.figures.seconds.median, one.figures.seconds.low, one.figures.seconds.high)
        for one in comparison.methods
    ]
    caption = (
        "From the start of a run to the end of its last answer; loading is not in it. Bar: median over the rounds. "
        "Whisker: fastest to slowest round. Grey: serial."
    )
    return figure([partial(seconds_chart, measured)], caption)


def _ratios(comparison: Comparison) -> str:
    others = comparison.methods[1:]
    measured = []
    for one in others:
        ratio = ratio_of(one)
        measured.append(Measured(one.name, ratio.median, ratio.low, ratio.high))
    published = [study.nearest(comparison, one.name) for one in others]
    keys = [("dot", "here, with its interval")]
    if any(published):
        keys.append(("rhomb", "the study, of the method that is nearest"))
    caption = (
        "Right of the line at 1: faster than serial. Dashed: the batching bound of these answers, Σ lengths / longest "
        "length. The study's ratios are of another model on another machine, and vLLM's also of other kernels and "
        "tensor parallelism: see its table below."
    )
    return figure([partial(ratio_chart, measured, published, comparison.bound)], caption, keys)


def _progress(comparison: Comparison) -> str:
    curves = [Curve(result.name, token_points(median_round(result))) for result in comparison.methods]
    caption = "Of each method the round nearest to its median. A curve ends with the method's last token; its flag "
    caption += "names it. Dashes differ as colours do."
    left = [curve.name for curve in curves[MOST_CURVES:]]
    if left:
        caption += f" Left out, for want of room: {', '.join(left)}."
    return figure([partial(progress_chart, curves)], caption)


STRIP_KEYS = (
    ("wait", "5 to 95 % of them"),
    ("bar", "the middle half"),
    ("stroke", "median"),
    ("far", "99 %"),
)


def _first_tokens(comparison: Comparison) -> str:
    rows = [
        _quantiles(result, [[one.ttft_s for one in outcome.requests] for outcome in result.rounds])
        for result in comparison.methods
    ]
    count = len(comparison.workload.requests)
    caption = (
        f"From a request's arrival to its first token, queueing included; {count} "
        f"{'request' if count == 1 else 'requests'} a round, quantiles of each round and their median over the rounds. "
        "Grey: serial."
    )
    return figure([partial(strip_chart, rows, "time to first token")], caption, STRIP_KEYS)


def _gaps(comparison: Comparison) -> str:
    rows, left = [], []
    for result in comparison.methods:
        gaps = [[gap for one in outcome.requests for gap in token_gaps(one)] for outcome in result.rounds]
        if all(gaps):
            rows.append(_quantiles(result, gaps))
        else:
            left.append(result.name)
    none = (
        f"No answer of {', '.join(left)} came in more than one piece: there is nothing between its tokens to measure."
    )
    if not rows:
        return f'<p class="note">{safe(none)}</p>'
    caption = (
        "Gaps between consecutive tokens of one request, of all requests together; quantiles of each round and their "
        "median over the rounds. Grey: serial."
    )
    return figure(
        [partial(strip_chart, rows, "time between tokens")], f"{caption} {none}" if left else caption, STRIP_KEYS
    )


def _quantiles(result: MethodResult, rounds: Sequence[Sequence[float]]) -> Quantiles:
    ordered = [sorted(values) for values in rounds]
    return Quantiles(result.name, *(median(percentile(values, share) for values in ordered) for share in SHARES))


def _in_flight(comparison: Comparison) -> str:
    chosen = [(result.name, median_round(result).iterations) for result in comparison.methods]
    runs = [(name, iterations) for name, iterations in chosen if iterations]
    untold = [name for name, iterations in chosen if not iterations]
    told = f"Not told by {', '.join(untold)}." if untold else ""
    if not runs:
        return f'<p class="note">{safe(told)}</p>'
    most = max(one.in_flight for _, iterations in runs for one in iterations)
    caption = (
        "Requests that had joined and not ended at every step of the model, of the round nearest to the median. Where "
        f"steps are too many to draw, the most of neighbouring ones. {told}"
    )
    return figure([partial(in_flight_chart, runs, most)], caption.strip())


def _timeline(comparison: Comparison) -> str:
    methods = comparison.methods[:MOST_PANELS]
    rounds = [median_round(result) for result in methods]
    count = len(comparison.workload.requests)
    shown = shown_requests(count, len(methods))
    longest = max(request.end_s for outcome in rounds for request in outcome.requests)
    panels = [
        partial(timeline_chart, Panel(one.name, outcome.requests, *_drawn(index, len(methods))), shown, longest)
        for index, (one, outcome) in enumerate(zip(methods, rounds, strict=True))
    ]
    caption = "Of each method the round nearest to its median; all panels have the same time axis. Grey: serial."
    if len(shown) < count:
        caption += f" {len(shown)} of {count} requests are drawn, evenly chosen."
    left = [result.name for result in comparison.methods[MOST_PANELS:]]
    if left:
        caption += f" Left out, for want of room: {', '.join(left)}."
    keys = (
        ("wait", "from its arrival: waiting and reading the prompt"),
        ("stroke", "first token"),
        ("bar", "answering"),
    )
    return figure(panels, caption, keys)


def _drawn(index: int, count: int) -> tuple[str, bool]:
    """Class of the bars of the panel `index`, and whether it is the last."""
    return ("bar" if index else "base", index == count - 1)
