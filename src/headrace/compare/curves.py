"""Figures over time: output tokens so far, requests in flight, and when each request was answered."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from headrace.compare.charts import time_text, unit_of
from headrace.compare.methods import Iteration, Outcome, RequestRun
from headrace.pages.chart_axes import (
    DASHES,
    LABEL,
    LINE,
    SERIES,
    SMALL,
    Axis,
    bar,
    fitted,
    from_zero,
    horizontal,
    line,
    steps,
    svg,
    text,
    text_width,
    upright,
)

MOST_CURVES = 14
MOST_POINTS = 300
"""Of a curve: more could not be told apart at this width."""
MOST_ROWS = 400
"""Bars of requests in all panels of a timeline together."""
FEW_ROWS = 12
"""Up to so many requests a panel has tall bars with a number each."""
PLOT = 250.0
"""Height of the plot of the curves."""
AREA = 38.0
"""Height of one method's requests in flight."""


@dataclass(frozen=True, slots=True)
class Curve:
    """One method's output tokens so far."""

    name: str
    points: tuple[tuple[float, int], ...]
    """(seconds from the start of the run, tokens that had come by then), in order; at least one."""


def token_points(outcome: Outcome) -> tuple[tuple[float, int], ...]:
    """(seconds, tokens so far) at every instant at which tokens came; an outcome without tokens: 0 at its end."""
    times = sorted(at for request in outcome.requests for at in request.token_s)
    points: dict[float, int] = {at: count for count, at in enumerate(times, 1)}
    return tuple(points.items()) or ((outcome.seconds, 0),)


def thinned(points: Sequence[tuple[float, int]], most: int = MOST_POINTS) -> list[tuple[float, int]]:
    """At most about `most` of them, evenly chosen, the first and the last among them."""
    stride = math.ceil(len(points) / most)
    kept = list(points[::stride])
    return kept if kept[-1] == points[-1] else [*kept, points[-1]]


def progress_chart(curves: Sequence[Curve], width: float) -> str:
    """A curve a method (at most `MOST_CURVES`), each with its name on a flag above its end."""
    curves = curves[:MOST_CURVES]
    unit, factor = unit_of(max(curve.points[-1][0] for curve in curves))
    highest = max(curve.points[-1][1] for curve in curves)
    start, end = 28 + text_width(str(highest), SMALL), width - 24
    x_axis = from_zero([curve.points[-1][0] * factor for curve in curves], start, end)
    flags = _flags([(curve.name, x_axis(curve.points[-1][0] * factor)) for curve in curves], width)
    top = LINE * (1 + max(flag.row for flag in flags)) + 8
    y_axis = from_zero([highest], top + PLOT, top, whole=True)
    parts = horizontal(x_axis, top, top + PLOT, f"{'seconds' if unit == 's' else unit} from the start of the run")
    for value, label in y_axis.ticks(40):
        y = y_axis(value)
        parts += [line(start, y, end, y, "grid"), text(start - 6, y + 4, label, "end", "value")]
    parts.append(upright(11, top + PLOT / 2, "output tokens so far"))
    for index, (curve, flag) in enumerate(zip(curves, flags, strict=True)):
        drawn = [(x_axis(0), y_axis(0))]
        drawn += [(x_axis(at * factor), y_axis(count)) for at, count in thinned(curve.points)]
        parts += [_leader(flag, top - LINE * flag.row - 12, drawn[-1][1], index), steps(drawn, index)]
    # Names last: where a leader of another flag passes behind one, the name stays legible.
    for flag in flags:
        x = flag.x + (5 if flag.side == "start" else -5)
        parts.append(text(x, top - LINE * flag.row - 8, flag.name, flag.side, "label flag"))
    told = "; ".join(f"{one.name} {one.points[-1][1]} tokens by {one.points[-1][0]:.3g} s" for one in curves)
    return svg(width, top + PLOT + 2 * LINE + 6, parts, f"Output tokens over time: {told}")


def _leader(flag: _Flag, top: float, bottom: float, index: int) -> str:
    """From the end of its curve up to the name, in the curve's line."""
    dash = DASHES[index % len(DASHES)]
    dashed = f' stroke-dasharray="{dash}"' if dash else ""
    return f'<path class="leader s{index % SERIES}" d="M{flag.x:.1f} {bottom:.1f}V{top:.1f}"{dashed}/>'


@dataclass(frozen=True, slots=True)
class _Flag:
    """A name above a plot, beside the leader that goes down from it."""

    name: str
    x: float
    side: str
    """The text's anchor: end where it lies left of its leader."""
    row: int
    """From the plot up."""

    @property
    def reach(self) -> tuple[float, float]:
        """Left and right end, leader and some room included."""
        width = text_width(self.name) + 10
        return (self.x - width, self.x + 4) if self.side == "end" else (self.x - 4, self.x + width)


def _flags(ends: Sequence[tuple[str, float]], width: float) -> list[_Flag]:
    """For (name, x of its end): flags in the order given, in as few rows as no two overlap in."""
    rows: list[list[_Flag]] = []
    placed: dict[int, _Flag] = {}
    for index in sorted(range(len(ends)), key=lambda index: ends[index][1]):
        name, x = ends[index]
        room = max(x, width - x) - 12
        name = fitted(name, room)
        side = "end" if text_width(name) <= x - 12 else "start"
        for row in range(len(ends)):
            flag = _Flag(name, x, side, row)
            if row == len(rows):
                rows.append([])
            if all(flag.reach[0] > other.reach[1] or flag.reach[1] < other.reach[0] for other in rows[row]):
                rows[row].append(flag)
                placed[index] = flag
                break
    return [placed[index] for index in range(len(ends))]


def in_flight_chart(runs: Sequence[tuple[str, Sequence[Iteration]]], most: int, width: float) -> str:
    """An area a method: requests in the running batch at each iteration, on one axis of iterations.

    `most`: height of an area, in requests.
    """
    longest = max(len(iterations) for _, iterations in runs)
    start, end = 14 + text_width(str(most), SMALL), width - 24
    x_axis = from_zero([longest], start, end, whole=True)
    told = [_in_flight_text([one.in_flight for one in iterations]) for _, iterations in runs]
    names = [text_width(name, bold=True) + 6 for name, _ in runs]
    # What is told stands beside the names, or where one of them is too long for that, below them.
    below = any(start + name + text_width(said, SMALL) > width for name, said in zip(names, told, strict=True))
    lines = 2 * LINE if below else LINE
    pitch = lines + AREA + 14
    bottom = pitch * len(runs)
    parts = horizontal(x_axis, lines, bottom - 8, "iterations (steps of the model)")
    for index, (name, iterations) in enumerate(runs):
        top = pitch * index
        base = top + lines + 4 + AREA
        y_axis = Axis(base, base - AREA, 0, most)
        said_x, said_y = (start, top + LABEL + LINE) if below else (start + names[index], top + LABEL)
        parts += [
            text(start, top + LABEL, fitted(name, width - start, bold=True), "start", "label name flag"),
            text(said_x, said_y, told[index], "start", "value flag"),
            text(start - 6, base - AREA + 8, str(most), "end", "value"),
            text(start - 6, base + 4, "0", "end", "value"),
            line(start, base, end, base, "axis"),
            _area([one.in_flight for one in iterations], x_axis, y_axis, "area" if index else "area base"),
        ]
    title = "; ".join(f"{name} {said}" for (name, _), said in zip(runs, told, strict=True))
    return svg(width, bottom + 2 * LINE, parts, f"Requests in flight over iterations: {title}")


def _in_flight_text(in_flight: Sequence[int]) -> str:
    count = len(in_flight)
    mean = sum(in_flight) / count
    return f"{count} {'iteration' if count == 1 else 'iterations'}, mean {mean:.1f}, peak {max(in_flight)}"


def _area(in_flight: Sequence[int], x_axis: Axis, y_axis: Axis, kind: str) -> str:
    """The most of each of at most `MOST_POINTS` stretches, as steps down to the axis."""
    stride = math.ceil(len(in_flight) / MOST_POINTS)
    d = f"M{x_axis(0):.1f} {y_axis(0):.1f}"
    for first in range(0, len(in_flight), stride):
        after = min(first + stride, len(in_flight))
        d += f"V{y_axis(max(in_flight[first:after])):.1f}H{x_axis(after):.1f}"
    return f'<path class="{kind}" d="{d}V{y_axis(0):.1f}z"/>'


def shown_requests(count: int, methods: int) -> list[int]:
    """Indices of the requests that a timeline has a bar for, evenly chosen where there are too many."""
    most = max(FEW_ROWS, MOST_ROWS // methods)
    if count <= most:
        return list(range(count))
    return [round(index * (count - 1) / (most - 1)) for index in range(most)]


@dataclass(frozen=True, slots=True)
class Panel:
    """One run of a method, to be drawn request by request."""

    name: str
    requests: tuple[RequestRun, ...]
    kind: str
    """Class of the bars of answering: bar, or base."""
    last: bool
    """Of its figure: it has the axis' title."""


def timeline_chart(panel: Panel, shown: Sequence[int], longest_s: float, width: float) -> str:
    """A bar a request: from its arrival to its first token pale, answering strong.

    `shown`: the requests that have a bar; `longest_s`: of the axis, so that all panels have the same.
    """
    requests = panel.requests
    unit, factor = unit_of(longest_s)
    few = len(shown) <= FEW_ROWS
    pitch, height = (18.0, 11.0) if few else (6.0, 4.0)
    start, end = 32 + text_width(str(len(requests)), SMALL), width - 24
    axis = from_zero([longest_s * factor], start, end)
    top = LINE + 6
    bottom = top + pitch * len(shown) + 2
    parts = [text(start, LABEL, fitted(panel.name, end - start, bold=True), "start", "label name")]
    title = f"{'seconds' if unit == 's' else unit} from the start of the run"
    parts += horizontal(axis, top, bottom, title if panel.last else "")
    every = 1 if few else 4
    for row, index in enumerate(shown):
        request = requests[index]
        y = top + pitch * row + (pitch - height) / 2 + 1
        arrival, first, done = (axis(at * factor) for at in (request.arrival_s, request.first_token_s, request.end_s))
        parts += [
            bar(arrival, y, first, height, "wait"),
            bar(first, y, done, height, panel.kind),
            line(arrival, y, arrival, y + height, "arrival"),
            line(first, y - 1, first, y + height + 1, "first" if few else "first thin"),
        ]
        if row % every == 0:
            parts.append(text(start - 8, y + height / 2 + 4, str(index + 1), "end", "value"))
    parts.append(upright(11, (top + bottom) / 2, "request"))
    told = (
        f"{panel.name}: {len(requests)} requests, the last one ends after {time_text(max(r.end_s for r in requests))}"
    )
    return svg(width, bottom + (2 if panel.last else 1) * LINE + 8, parts, told)
