"""Figures with a row a method: seconds, ratios to the base beside the study's, latencies as strips of quantiles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from headrace.pages.chart_axes import (
    LABEL,
    LINE,
    SMALL,
    Axis,
    bar,
    diamond,
    dot,
    fitted,
    from_zero,
    horizontal,
    line,
    short_text,
    svg,
    text,
    text_width,
    whisker,
)

TOP = 6.0
NAME_SHARE = 0.3
"""Names wider than this part of a figure stand above their rows instead of left of them."""
WIDE_RANGE = 30.0
"""Largest over smallest value from which an axis has powers."""
LEAST = 1e-4
"""Smallest value that such an axis shows, as a part of its largest: 0 and what is below lie on its left end."""
UNITS = ((1.0, "s", 1.0), (1e-3, "ms", 1e3), (0.0, "µs", 1e6))
"""(from so many seconds on, unit, units a second)."""


@dataclass(frozen=True, slots=True)
class Measured:
    """One method's figure, with its range or interval."""

    name: str
    median: float
    low: float
    high: float
    said: str = ""
    """A second line beside the value."""


@dataclass(frozen=True, slots=True)
class Quantiles:
    """One method's distribution."""

    name: str
    p5: float
    p25: float
    p50: float
    p75: float
    p95: float
    p99: float


class Rows:
    """Where the rows of a figure lie, their names left of the plot, or above it where they are long."""

    def __init__(self, names: Sequence[str], width: float, pitch: float, right: float, top: float = TOP) -> None:
        """`pitch`: height of a row; `right`: room right of the plot."""
        widest = max(text_width(name, bold=True) for name in names)
        beside = widest + 12 <= width * NAME_SHARE
        self.start = widest + 12 if beside else 10.0
        self.end = width - right
        self.top = top
        self._names = [fitted(name, width - 8, bold=True) for name in names]
        self._lift = 0.0 if beside else LINE
        self._pitch = pitch + self._lift
        self.bottom = top + self._pitch * len(names)

    def middle(self, index: int) -> float:
        return self.top + self._pitch * index + self._lift + (self._pitch - self._lift) / 2

    def label(self, index: int) -> str:
        if self._lift:
            return text(0, self.top + self._pitch * index + LABEL, self._names[index], "start", "label name flag")
        return text(self.start - 10, self.middle(index) + 4, self._names[index], "end", "label name")


def unit_of(largest: float) -> tuple[str, float]:
    """(unit, units a second) for times up to `largest` seconds."""
    if largest <= 0:
        return "s", 1.0
    return next((unit, factor) for least, unit, factor in UNITS if largest >= least)


def time_text(seconds: float) -> str:
    """In the unit that suits it alone."""
    unit, factor = unit_of(seconds)
    return f"{short_text(seconds * factor)} {unit}"


def seconds_chart(measured: Sequence[Measured], width: float) -> str:
    """A bar a method from 0 to its median, with a whisker over its range; the first is the base."""
    unit, factor = unit_of(max(one.high for one in measured))
    right = 16 + max(text_width(time_text(one.median), SMALL) for one in measured)
    rows = Rows([one.name for one in measured], width, 34, right)
    axis = from_zero([one.high * factor for one in measured], rows.start, rows.end)
    parts = horizontal(axis, rows.top, rows.bottom, f"{'seconds' if unit == 's' else unit} of a run")
    for index, one in enumerate(measured):
        y = rows.middle(index)
        low, high = axis(one.low * factor), axis(one.high * factor)
        parts += [
            rows.label(index),
            bar(axis(0), y - 9, axis(one.median * factor), 18, "bar" if index else "base"),
            *(whisker(low, high, y) if one.low < one.high else ()),
            text(high + 9, y + 4, time_text(one.median), "start", "value"),
        ]
    told = "; ".join(f"{one.name} {time_text(one.median)}" for one in measured)
    return svg(width, rows.bottom + 2 * LINE + 6, parts, f"Seconds of a run, median with range: {told}")


def ratio_chart(measured: Sequence[Measured], published: Sequence[Sequence[float]], bound: float, width: float) -> str:
    """How many times as fast as the base each method is, with its interval, on an logarithmic axis.

    `published`: for each row, the study's ratios that are nearest to it; `bound`: drawn as a line.
    """
    values = [1.0, bound, *(v for one in measured for v in (one.low, one.high)), *(v for row in published for v in row)]
    values = [value for value in values if value > 0]
    beside = [_ratio_text(one) for one in measured]
    right = 16 + max(text_width(told, SMALL) for told in (*beside, "study 00.00"))
    rows = Rows([one.name for one in measured], width, 38, right, top=TOP + LINE)
    axis = Axis(rows.start, rows.end, min(values) / 1.15, max(values) * 1.15, log=True)
    parts = horizontal(axis, rows.top, rows.bottom, "times as fast as serial (logarithmic axis)")
    parts.append(line(axis(1), rows.top - 4, axis(1), rows.bottom, "unity"))
    if bound > 1:
        x, told = axis(bound), f"batching bound {bound:.2f}"
        side = "end" if x + 4 + text_width(told, SMALL) > width else "start"
        parts += [
            line(x, rows.top - 4, x, rows.bottom, "bound"),
            text(x + (-4 if side == "end" else 4), TOP + SMALL - 2, told, side, "value"),
        ]
    for index, (one, theirs) in enumerate(zip(measured, published, strict=True)):
        y = rows.middle(index)
        parts += [
            rows.label(index),
            *(whisker(axis(one.low), axis(one.high), y) if one.low < one.high else ()),
            dot(axis(one.median), y, "bar"),
            *(diamond(axis(value), y, "study") for value in theirs),
            text(rows.end + 12, y + (-2 if theirs else 4), beside[index], "start", "value"),
        ]
        if theirs:
            told = "study " + ", ".join(f"{value:.2f}" if value < 10 else f"{value:.1f}" for value in theirs)
            parts.append(text(rows.end + 12, y + 13, told, "start", "value"))
    told = "; ".join(f"{one.name} {one.median:.2f}" for one in measured)
    return svg(width, rows.bottom + 2 * LINE + 6, parts, f"Times as fast as serial, with interval: {told}")


def _ratio_text(one: Measured) -> str:
    return f"{one.median:.2f}" + (f" ({one.low:.2f}–{one.high:.2f})" if one.low < one.high else "")


def strip_chart(quantiles: Sequence[Quantiles], what: str, width: float) -> str:
    """A row a method: 5 to 95 % pale, the middle half strong, the median a stroke, 99 % a dot. Values are seconds."""
    largest = max(one.p99 for one in quantiles)
    unit, factor = unit_of(largest)
    beside = [(f"p50 {time_text(one.p50)}", f"p95 {time_text(one.p95)}") for one in quantiles]
    right = 16 + max(text_width(told, SMALL) for lines in beside for told in lines)
    rows = Rows([one.name for one in quantiles], width, 40, right)
    axis, title = _latency_axis(quantiles, rows, factor)
    parts = horizontal(axis, rows.top, rows.bottom, f"{what}, {unit}{title}")
    for index, one in enumerate(quantiles):
        y = rows.middle(index)
        p5, p25, p50, p75, p95, p99 = (
            axis(value * factor) for value in (one.p5, one.p25, one.p50, one.p75, one.p95, one.p99)
        )
        parts += [
            rows.label(index),
            # At least a stroke, where all values are nearly the same.
            bar(p5 - 1, y - 7, p95 + 1, 14, "wait"),
            bar(p25 - 1, y - 7, p75 + 1, 14, "bar" if index else "base"),
            line(p50, y - 10, p50, y + 10, "first"),
            dot(p99, y, "far", 3),
            text(rows.end + 12, y - 2, beside[index][0], "start", "value"),
            text(rows.end + 12, y + 13, beside[index][1], "start", "value"),
        ]
    told = "; ".join(f"{one.name} median {time_text(one.p50)}" for one in quantiles)
    return svg(width, rows.bottom + 2 * LINE + 6, parts, f"{what}: {told}")


def _latency_axis(quantiles: Sequence[Quantiles], rows: Rows, factor: float) -> tuple[Axis, str]:
    values = [value * factor for one in quantiles for value in (one.p5, one.p25, one.p50, one.p75, one.p95, one.p99)]
    positive = [value for value in values if value > 0]
    if not positive or max(positive) < WIDE_RANGE * min(positive):
        return from_zero(values, rows.start, rows.end), ""
    low = max(min(positive), max(positive) * LEAST)
    below = "; left end: less" if min(values) < low else ""
    return Axis(rows.start, rows.end, low, max(positive), log=True), f" (log{below})"
