"""Two figures as inline SVG: seconds per method, and when each answer came. Colours are classes of the page's style."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from headrace.compare.measure import figure
from headrace.compare.methods import Outcome
from headrace.compare.runner import Comparison, MethodResult

WIDTH, RIGHT = 760, 90
"""Of a figure, and of the room right of its plot, in user units."""
NUMBERS, LETTER = 48, 7.5
"""Room left of the plot for the questions' numbers, and for each letter of the longest name."""
ROW, BAR, TOP, AXIS = 40, 18, 10, 34
REQUEST_ROW, REQUEST_BAR, GROUP_GAP = 19, 11, 16


class _Scale:
    """Seconds to x, over the plot that begins right of the names."""

    def __init__(self, comparison: Comparison, longest_s: float) -> None:
        self.longest_s = max(longest_s, 1e-9)
        self.left = NUMBERS + LETTER * max(len(result.name) for result in comparison.methods)

    def __call__(self, seconds: float) -> float:
        return self.left + seconds / self.longest_s * (WIDTH - self.left - RIGHT)

    def ticks(self) -> list[float]:
        """About five round numbers from 0 up."""
        rough = self.longest_s / 5
        power: float = 10.0 ** math.floor(math.log10(rough))
        step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
        return [step * index for index in range(int(self.longest_s / step) + 1)]


def seconds_chart(comparison: Comparison) -> str:
    """A bar a method: median seconds of a round, with a whisker from the fastest round to the slowest."""
    results = comparison.methods
    scale = _Scale(comparison, max(result.timing.spread.high for result in results))
    height = TOP + ROW * len(results) + AXIS
    parts = _axis(scale, TOP + ROW * len(results))
    for index, result in enumerate(results):
        spread = result.timing.spread
        middle = TOP + ROW * index + ROW / 2
        bar_class = "base" if index == 0 else "bar"
        parts += [
            _text(scale.left - 10, middle + 4, result.name, "end"),
            _bar(scale(0), middle - BAR / 2, scale(spread.median) - scale(0), BAR, bar_class),
            _line(scale(spread.low), middle, scale(spread.high), middle, "whisker"),
            _line(scale(spread.low), middle - 5, scale(spread.low), middle + 5, "whisker"),
            _line(scale(spread.high), middle - 5, scale(spread.high), middle + 5, "whisker"),
            _text(scale(spread.high) + 8, middle + 4, f"{figure(spread.median)} s", "start", "value"),
        ]
    return _figure(height, parts, "Seconds per round for each method, median with range")


def timeline_chart(comparison: Comparison) -> str:
    """One round of every method, a bar a question: waiting and prompt pale, answering strong, first token marked."""
    rounds = [(result.name, median_round(result)) for result in comparison.methods]
    scale = _Scale(comparison, max(request.end_s for _, outcome in rounds for request in outcome.requests))
    parts: list[str] = []
    y: float = TOP
    for index, (name, outcome) in enumerate(rounds):
        parts.append(_text(scale.left - 42, y + REQUEST_ROW - 6, name, "end"))
        for number, request in enumerate(outcome.requests, 1):
            top = y + (REQUEST_ROW - REQUEST_BAR) / 2
            first, end = scale(request.first_token_s), scale(request.end_s)
            parts += [
                _text(scale.left - 10, y + REQUEST_ROW - 6, f"Q{number}", "end", "value"),
                _bar(scale(0), top, first - scale(0), REQUEST_BAR, "wait"),
                _bar(first, top, end - first, REQUEST_BAR, "bar" if index else "base"),
                _line(first, top - 2, first, top + REQUEST_BAR + 2, "first"),
            ]
            y += REQUEST_ROW
        y += GROUP_GAP
    y -= GROUP_GAP / 2
    return _figure(y + AXIS, _axis(scale, y) + parts, "One round of each method, a bar for each question")


def median_round(result: MethodResult) -> Outcome:
    """The round whose time is nearest to the median."""
    return min(result.rounds, key=lambda outcome: abs(outcome.seconds - result.timing.spread.median))


def _axis(scale: _Scale, bottom: float) -> list[str]:
    ticks = scale.ticks()
    digits = max(0, -math.floor(math.log10(ticks[1]))) if len(ticks) > 1 else 1
    parts = []
    for tick in ticks:
        x = scale(tick)
        parts += [_line(x, TOP, x, bottom, "grid"), _text(x, bottom + 18, f"{tick:.{digits}f}", "middle", "value")]
    parts.append(_text(WIDTH - RIGHT + 30, bottom + 18, "seconds", "start", "value"))
    return parts


def _text(x: float, y: float, text: str, anchor: str, kind: str = "label") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _bar(x: float, y: float, width: float, height: float, kind: str) -> str:
    return f'<rect class="{kind}" x="{x:.1f}" y="{y:.1f}" width="{max(0.0, width):.1f}" height="{height}" rx="2"/>'


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _figure(height: float, parts: Sequence[str], title: str) -> str:
    body = "".join(parts)
    return f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img"><title>{escape(title)}</title>{body}</svg>'
