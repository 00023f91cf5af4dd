"""A plot of a plan as SVG: lines, steps, dashes and dots over linear or logarithmic axes, with a key above it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from headrace.pages.chart_axes import (
    DASHES,
    LINE,
    SERIES,
    SMALL,
    Axis,
    diamond,
    dot,
    fitted,
    line,
    round_step,
    svg,
    text,
    text_width,
    upright,
)
from headrace.plan.document import Plot, Series
from headrace.plan.numbers import number_text

HEIGHT = 270.0
"""Of the plot itself, in user units; the key is above it and the axis' labels below."""
MARGIN = 22.0
"""Right of the plot: half of its last tick's label."""
Y_ROOM = 40.0
"""Least distance between two ticks of the vertical axis."""
X_ROOM = 62.0
KEY, AFTER_KEY = 34.0, 16.0
"""Width of a key's sample with its blank; blank after its name."""
MOST_LINES = 3
"""Of a key's name."""
MOST_POINTS = 600
"""Of a series: more could not be told apart."""
DOT = 4.0
PREFIXES = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
LEAST_LONG, LEAST_PLAIN = 1e4, 1e-3
"""Ticks with labels as they are lie between them."""
NARROWEST = 1e-4
"""Share of its largest value that an axis spans at least: values that are nearly the same lie in its middle."""
LARGEST, SMALLEST = 1e100, 1e-100
"""What lies beyond is not drawn, or as 0."""
FROM_ZERO = 0.4
"""An axis starts at 0 unless its values lie closer together than this share of the largest."""

Point = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Drawn:
    """A series' points on its axes; those that cannot be drawn are left out."""

    name: str
    runs: tuple[tuple[Point, ...], ...]
    """Stretches without a point that is left out."""
    style: str
    index: int

    @property
    def points(self) -> Iterator[Point]:
        for run in self.runs:
            yield from run


def undrawn(plot: Plot) -> int:
    """How many points have no place: not finite, or not above 0 on an axis of powers."""
    return sum(not _drawable(plot, point) for series in plot.series for point in series.points)


def has_points(plot: Plot) -> bool:
    return any(_drawable(plot, point) for series in plot.series for point in series.points)


def chart(plot: Plot, width: float) -> str:
    """The figure; `has_points(plot)` holds."""
    drawn = [_drawn(plot, series, index) for index, series in enumerate(plot.series)]
    keys = [_wrapped(one.name, width - KEY - 8) for one in drawn]
    places = _places(keys, width)
    top = LINE * max(row + len(lines) for lines, (_, row) in zip(keys, places, strict=True)) + 12
    bottom = top + HEIGHT
    ys = [y for one in drawn for _, y in one.points]
    xs = [x for one in drawn for x, _ in one.points]
    y_axis = _axis(ys, bottom, top, plot.log_y, Y_ROOM)
    y_ticks = labelled(y_axis.ticks(Y_ROOM))
    start, end = 28 + max(text_width(label, SMALL) for _, label in y_ticks), width - MARGIN
    x_axis = _axis(xs, start, end, plot.log_x, X_ROOM)
    parts = []
    for value, label in y_ticks:
        y = y_axis(value)
        parts += [line(start, y, end, y, "grid"), text(start - 6, y + 4, label, "end", "value")]
    for value, label in labelled(x_axis.ticks(X_ROOM)):
        x = x_axis(value)
        middle = min(x, width - text_width(label, SMALL) / 2)
        parts += [line(x, top, x, bottom, "grid"), text(middle, bottom + LINE, label, "middle", "value")]
    if not plot.log_y and y_axis.low < 0 < y_axis.high:
        parts.append(line(start, y_axis(0), end, y_axis(0), "axis"))
    parts += _titles(plot, width, (start + end) / 2, top, bottom)
    for one in drawn:
        runs = [[(x_axis(x), y_axis(y)) for x, y in run] for run in one.runs]
        parts += _marks(one, runs)
    for one, lines, (x, row) in zip(drawn, keys, places, strict=True):
        parts += _key(one, lines, x, LINE * row + 9)
    return svg(width, bottom + 2 * LINE + 8, parts, _told(plot, drawn))


def labelled(ticks: Sequence[tuple[float, str]]) -> list[tuple[float, str]]:
    """Ticks with short labels: with a prefix (20k, 1.5M) or a power of ten where one of them has many digits."""
    sizes = [abs(value) for value, _ in ticks if value]
    long = max(sizes, default=0) >= LEAST_LONG
    if not long and min(sizes, default=1) >= LEAST_PLAIN:
        return list(ticks)
    return [(value, _short(value, PREFIXES if long else ())) for value, _ in ticks]


def _short(value: float, prefixes: Sequence[tuple[float, str]]) -> str:
    for least, prefix in prefixes:
        if abs(value) >= least:
            return f"{value / least:.6g}{prefix}"
    return number_text(value)


def _drawable(plot: Plot, point: Point) -> bool:
    return all(
        abs(value) <= LARGEST and (value >= SMALLEST or not log)
        for value, log in zip(point, (plot.log_x, plot.log_y), strict=True)
    )


def _drawn(plot: Plot, series: Series, index: int) -> Drawn:
    runs: list[list[Point]] = [[]]
    for x, y in series.points:
        if _drawable(plot, (x, y)):
            runs[-1].append((float(x), float(y)))
        elif runs[-1]:
            runs.append([])
    return Drawn(series.name, tuple(tuple(_thinned(run)) for run in runs if run), series.style, index)


def _thinned(points: Sequence[Point]) -> list[Point]:
    """At most about `MOST_POINTS` of them: of each stretch its first, lowest and highest, so that a spike stays."""
    if len(points) <= MOST_POINTS:
        return list(points)
    stride = math.ceil(3 * len(points) / MOST_POINTS)
    kept: list[int] = []
    for first in range(0, len(points), stride):
        stretch = range(first, min(first + stride, len(points)))
        ends = (min(stretch, key=lambda at: points[at][1]), max(stretch, key=lambda at: points[at][1]))
        kept += sorted({first, *ends})
    last = len(points) - 1
    return [points[at] for at in (kept if kept[-1] == last else [*kept, last])]


def _axis(values: Sequence[float], start: float, end: float, log: bool, room: float) -> Axis:
    """With round ends."""
    low, high = min(values), max(values)
    wanted = max(1, int(abs(end - start) / room))
    if log:
        return Axis(start, end, _round_power(low, up=False), _round_power(high * (1 + 1e-9), up=True), log=True)
    if low >= 0 and high - low >= FROM_ZERO * high:
        low = 0.0
    elif high <= 0 and high - low >= FROM_ZERO * -low:
        high = 0.0
    if high - low <= max(SMALLEST, NARROWEST * max(abs(low), abs(high))):
        half = abs(high) / 2 if abs(high) >= SMALLEST else 0.5
        low, high = low - half, high + half
    step = round_step((high - low) / wanted)
    return Axis(start, end, math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step)


def _round_power(value: float, up: bool) -> float:
    """1, 2 or 5 times a power of ten: the next above, or the next at or below."""
    power: float = 10.0 ** math.floor(math.log10(value))
    factors = (1, 2, 5, 10)
    if up:
        return next(power * factor for factor in factors if power * factor >= value)
    return next(power * factor for factor in reversed(factors) if power * factor <= value * (1 + 1e-9))


def _titles(plot: Plot, width: float, middle: float, top: float, bottom: float) -> list[str]:
    x = fitted(plot.x, width - 8)
    half = text_width(x, SMALL) / 2
    middle = min(max(middle, half), width - half)
    return [
        text(middle, bottom + 2 * LINE, x, "middle", "value"),
        upright(11, (top + bottom) / 2, fitted(plot.y, bottom - top)),
    ]


def _colour(index: int) -> int:
    """Of a series: the grey one comes last."""
    return (index + 1) % SERIES


def _stroke(points: Sequence[Point], one: Drawn) -> str:
    dash = "6 4" if one.style == "dashed" else DASHES[one.index // SERIES % len(DASHES)]
    dashed = f' stroke-dasharray="{dash}"' if dash else ""
    if one.style == "steps":
        d = f"M{points[0][0]:.1f} {points[0][1]:.1f}" + "".join(f"H{x:.1f}V{y:.1f}" for x, y in points[1:])
    else:
        d = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    return f'<path class="curve s{_colour(one.index)}" d="{d}"{dashed}/>'


def _mark(point: Point, one: Drawn) -> str:
    kind = f"mark s{_colour(one.index)}"
    return (dot if one.index < SERIES else diamond)(*point, kind, DOT)


def _marks(one: Drawn, runs: Sequence[Sequence[Point]]) -> list[str]:
    if one.style == "dots":
        return [_mark(point, one) for run in runs for point in run]
    parts = []
    for run in runs:
        if len(run) == 1:
            parts.append(_mark(run[0], one))
        else:
            parts.append(_stroke(run, one))
    return parts


def _wrapped(name: str, room: float) -> list[str]:
    """A series' name in lines that fit into `room`, broken between words; a longer word loses its middle."""
    lines: list[str] = []
    for word in name.split(" "):
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and len(lines) < MOST_LINES and text_width(longer) > room:
            lines.append(word)
        else:
            lines[-1:] = [longer]
    return [fitted(one, room) for one in lines]


def _places(keys: Sequence[Sequence[str]], width: float) -> list[tuple[float, int]]:
    """(x, first row) of each series' key, whose lines are `keys`; one of several lines has its rows for itself."""
    places = []
    x, row = 4.0, 0
    for lines in keys:
        wide = KEY + max(map(text_width, lines)) + AFTER_KEY
        if x > 4 and (len(lines) > 1 or x + wide - AFTER_KEY > width):
            x, row = 4.0, row + 1
        places.append((x, row))
        x, row = (x + wide, row) if len(lines) == 1 else (4.0, row + len(lines))
    return places


def _key(one: Drawn, lines: Sequence[str], x: float, y: float) -> list[str]:
    sample = [_mark((x + 14, y), one)] if one.style == "dots" else [_stroke([(x, y), (x + 28, y)], one)]
    return [*sample, *(text(x + KEY, y + 4 + LINE * index, said) for index, said in enumerate(lines))]


def _told(plot: Plot, drawn: Sequence[Drawn]) -> str:
    """For those who cannot see it: each series from its first to its last point."""
    told = []
    for one in drawn:
        points = list(one.points)
        if points:
            (x, y), (last_x, last_y) = points[0], points[-1]
            ends = f"{number_text(y)} at {number_text(x)}"
            ends += f" to {number_text(last_y)} at {number_text(last_x)}" if len(points) > 1 else ""
            told.append(f"{one.name} {ends}")
    return f"{plot.title}: {plot.y} over {plot.x}. {'; '.join(told)}"
