"""The headline figure of each work as bars with whiskers, in one SVG written by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from benchmarks.peer_run import Row, WorkResult
from benchmarks.peer_table import values

from headrace.compare.figures import Spread

WIDTH, RIGHT, LETTER = 860, 150, 7.3
"""Of the picture, of the room for figures right of the bars, and of one letter of a name, in user units."""
TITLE, ROW, BAR, AXIS, GAP, TOP = 34, 24, 14, 30, 22, 44
STYLE = """
text { font: 13px system-ui, sans-serif; fill: #1c2430; }
.head { font-weight: 600; font-size: 15px; } .note, .tick { fill: #5d6875; font-size: 12px; }
.grid { stroke: #e3e7ec; } .whisker { stroke: #1c2430; stroke-width: 1.3; }
.peer { fill: #a9b6c6; } .ours { fill: #2f6fd0; }
""".replace("\n", " ")


def chart(results: Sequence[WorkResult], subtitle: str) -> str:
    """Median as a bar, fastest and slowest round as a whisker; headrace's bars in another colour."""
    names = [row.spec.name for result in results for row in result.rows]
    left = 20 + LETTER * max(map(len, names), default=0)
    parts = [_text(16, 26, f"headrace and its peers: {subtitle}", "start", "head")]
    y: float = TOP
    for result in results:
        panel, height = _panel(result, left, y)
        parts += panel
        y += height + GAP
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y:.0f}" width="{WIDTH}" height="{y:.0f}" '
        f'role="img"><title>{escape(subtitle)}</title><style>{STYLE}</style>'
        f'<rect width="{WIDTH}" height="{y:.0f}" fill="#fff"/>{"".join(parts)}</svg>\n'
    )


def _panel(result: WorkResult, left: float, top: float) -> tuple[list[str], float]:
    """One work's elements, and how high they are."""
    figure = result.work.figures[0]
    rows: list[tuple[Row, Spread]] = [(row, Spread.of(found)) for row in result.rows if (found := values(row, figure))]
    most = max((spread.high for _, spread in rows), default=1.0)
    per_unit = (WIDTH - RIGHT - left) / max(most, 1e-9)
    bottom = top + TITLE + ROW * len(rows)
    better = "more is better" if figure.more_is_better else "less is better"
    parts = [
        _text(16, top + 18, result.work.title, "start", "head"),
        _text(WIDTH - 16, top + 18, f"{figure.title}, {better}", "end", "note"),
    ]
    for tick in ticks(most):
        x = left + tick * per_unit
        parts += [_line(x, top + TITLE - 4, x, bottom, "grid"), _text(x, bottom + 16, f"{tick:g}", "middle", "tick")]
    for index, (row, spread) in enumerate(rows):
        middle = top + TITLE + ROW * index + ROW / 2
        low, high = left + spread.low * per_unit, left + spread.high * per_unit
        kind = "ours" if row.spec.ours else "peer"
        parts += [
            _text(left - 8, middle + 4, row.spec.name, "end", "name"),
            f'<rect class="{kind}" x="{left:.1f}" y="{middle - BAR / 2:.1f}" width="{spread.median * per_unit:.1f}" '
            f'height="{BAR}" rx="2"/>',
            _line(low, middle, high, middle, "whisker"),
            _line(low, middle - 4, low, middle + 4, "whisker"),
            _line(high, middle - 4, high, middle + 4, "whisker"),
            _text(high + 8, middle + 4, f"{spread.median:.{figure.digits}f}", "start", "note"),
        ]
    return parts, bottom + AXIS - top


def ticks(most: float) -> list[float]:
    """About five round numbers from 0 up to `most`."""
    if most <= 0:
        return [0.0]
    power = 10.0 ** math.floor(math.log10(most / 5))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= most / 5 * 0.999)
    return [step * index for index in range(int(most / step * 1.0001) + 1)]


def _text(x: float, y: float, text: str, anchor: str, kind: str) -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'
