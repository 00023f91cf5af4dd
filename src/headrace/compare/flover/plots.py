"""Figures of the experiments: our ratios beside the published ones, and who gets a token in which iteration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from headrace.compare.methods import Outcome
from headrace.pages.chart_axes import (
    DASHES,
    LABEL,
    LINE,
    SERIES,
    SMALL,
    Axis,
    dot,
    from_zero,
    horizontal,
    line,
    svg,
    text,
    text_width,
    upright,
)

PLOT = 240.0
"""Height of a plot, in user units."""
TRACK = 8.0
"""Height of a request's line."""


@dataclass(frozen=True, slots=True)
class Line:
    """Points (x, y) joined by straight lines; at least one."""

    name: str
    points: tuple[tuple[float, float], ...]
    ours: bool
    """With a ring at each point."""


def line_chart(lines: Sequence[Line], x_title: str, y_title: str, log: bool, width: float) -> str:
    """Lines over one variable, with their names above; `log`: the variable in powers."""
    top = LINE * _key_rows(lines, width) + 10
    bottom = top + PLOT
    highest = max(y for one in lines for _, y in one.points)
    y_axis = from_zero([highest], bottom, top)
    ticks = y_axis.ticks(40)
    start = 26 + max(text_width(label, SMALL) for _, label in ticks)
    xs = [x for one in lines for x, _ in one.points]
    end = width - 24
    x_axis = Axis(start, end, min(xs), max(xs), log=True) if log else from_zero(xs, start, end)
    parts = horizontal(x_axis, top, bottom, x_title)
    for value, label in ticks:
        parts += [line(start, y_axis(value), end, y_axis(value), "grid")]
        parts += [text(start - 6, y_axis(value) + 4, label, "end", "value")]
    parts.append(upright(11, (top + bottom) / 2, y_title))
    for index, one in enumerate(lines):
        drawn = [(x_axis(x), y_axis(y)) for x, y in one.points]
        parts.append(_stroke(drawn, index))
        parts += [dot(x, y, f"curve s{index % SERIES}", 3.5) for x, y in drawn] if one.ours else []
    parts += _keys(lines, width)
    told = "; ".join(f"{one.name}: {', '.join(f'{y:.3g}' for _, y in one.points)}" for one in lines)
    return svg(width, bottom + 2 * LINE + 6, parts, f"{y_title} over {x_title}. {told}")


def _stroke(points: Sequence[tuple[float, float]], index: int) -> str:
    d = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    dash = DASHES[index % len(DASHES)]
    dashed = f' stroke-dasharray="{dash}"' if dash else ""
    return f'<path class="curve s{index % SERIES}" d="{d}"{dashed}/>'


def _places(lines: Sequence[Line], width: float) -> list[tuple[float, int]]:
    """(x, row) of each name's key."""
    places = []
    x, row = 4.0, 0
    for one in lines:
        wide = 34 + text_width(one.name) + 14
        if x > 4 and x + wide > width:
            x, row = 4.0, row + 1
        places.append((x, row))
        x += wide
    return places


def _key_rows(lines: Sequence[Line], width: float) -> int:
    return 1 + max(row for _, row in _places(lines, width))


def _keys(lines: Sequence[Line], width: float) -> list[str]:
    parts = []
    for index, (one, (x, row)) in enumerate(zip(lines, _places(lines, width), strict=True)):
        y = LINE * row + 9
        parts.append(_stroke([(x, y), (x + 28, y)], index))
        parts += [dot(x + 14, y, f"curve s{index % SERIES}", 3.5)] if one.ours else []
        parts.append(text(x + 34, y + 4, one.name))
    return parts


def iteration_chart(name: str, tokens: Sequence[Sequence[int]], width: float) -> str:
    """A line a request: from the iteration of its first token to that of its last; `tokens`: of each request, the
    iterations (from 0) in which it got one."""
    start, end = 24 + text_width(str(len(tokens)), SMALL), width - 24
    count = 1 + max(one[-1] for one in tokens)
    axis = from_zero([count], start, end)
    top = LINE + 4
    bottom = top + TRACK * len(tokens) + 4
    parts = [text(start, LABEL, name, "start", "label name")]
    parts += horizontal(axis, top, bottom, "iterations")
    for number, found in enumerate(tokens):
        y = top + TRACK * (number + 0.5) + 2
        for first, last in _runs(found):
            x, width_ = axis(first), axis(last + 1) - axis(first)
            parts.append(f'<rect class="bar" x="{x:.1f}" y="{y - 2.5:.1f}" width="{width_:.1f}" height="5"/>')
        if number % 4 == 0:
            parts.append(text(start - 8, y + 4, str(number), "end", "value"))
    parts.append(upright(11, (top + bottom) / 2, "request"))
    return svg(width, bottom + 2 * LINE + 6, parts, f"{name}: {len(tokens)} requests over {count} iterations")


def _runs(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """Stretches (first, last) without a gap."""
    found: list[tuple[int, int]] = []
    for one in numbers:
        if found and one == found[-1][1] + 1:
            found[-1] = (found[-1][0], one)
        else:
            found.append((one, one))
    return found


def gaps_of(outcome: Outcome) -> list[float]:
    """Seconds between neighbouring tokens of a request, of all requests, ascending."""
    return sorted(
        later - earlier
        for request in outcome.requests
        for earlier, later in zip(request.token_s, request.token_s[1:], strict=False)
    )
