"""What every figure is drawn with: axes with round ticks, names that fit, marks as SVG. Colours are classes of
report.css, so that one drawing serves light, dark and print."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from unicodedata import east_asian_width

from headrace.pages.plain import clean

WIDE, NARROW = 760.0, 360.0
"""Widths that a figure is drawn for, in user units: a page on a screen, and a phone. A unit is about a CSS pixel there,
so that letters have the same size in both."""
LABEL, SMALL = 13.0, 12.0
"""Sizes of text in user units, as in report.css."""
LINE = 17.0
"""From one line of text to the next."""
TICK_ROOM = 62.0
"""Least distance between two ticks of a horizontal axis."""
LEAST_LENGTH = 1e-9
"""Of an axis: nothing that is measured is shorter in its unit."""
SERIES = 7
"""Colours s0 … s6 of report.css (Okabe-Ito without its yellow, which is too pale on white)."""
DASHES = ("", "7 3", "2 3", "9 3 2 3")
"""Of lines; 7 colours and 4 dashes give 28 lines that differ, neighbours in both."""


def text_width(text: str, size: float = LABEL, bold: bool = False) -> float:
    """About the width of a text in a proportional typeface, rather too wide, in user units."""
    narrow = 0.7 if bold else 0.62
    return sum(size * (1.05 if east_asian_width(letter) in "WF" else narrow) for letter in text)


def fitted(text: str, room: float, bold: bool = False) -> str:
    """`text` as a label if it fits into `room`, else its beginning and its end with an ellipsis between."""
    text = clean(text).replace("\n", " ")
    shorter, kept = text, len(text)
    while kept > 1 and text_width(shorter, LABEL, bold) > room:
        kept -= 1
        head = (kept + 1) // 2
        shorter = f"{text[:head]}…{text[len(text) - (kept - head) :]}"
    return shorter


def short_text(value: float) -> str:
    """Three digits: 0.0123, 1.23, 12.3, 123."""
    if value == 0:
        return "0"
    decimals = next((count for least, count in ((100.0, 0), (10.0, 1), (1.0, 2), (0.1, 3)) if abs(value) >= least), 4)
    return f"{value:.{decimals}f}" if abs(value) >= 1e-3 else f"{value:.1e}"


def round_step(rough: float) -> float:
    """1, 2 or 5 times a power of ten, at or above `rough`."""
    power: float = 10.0 ** math.floor(math.log10(rough))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)


@dataclass(frozen=True, slots=True)
class Axis:
    """Values `low` … `high` on the pixels `start` … `end`; either direction of pixels."""

    start: float
    end: float
    low: float
    high: float
    log: bool = False
    """Powers instead of differences; both ends are above 0 then, and what is below `low` lies on it."""
    whole: bool = False
    """Of counts: no ticks between them."""

    def __call__(self, value: float) -> float:
        value = min(max(value, self.low), self.high)
        if self.log:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self, room: float = TICK_ROOM) -> list[tuple[float, str]]:
        """Round values at least about `room` pixels apart, with their labels."""
        wanted = max(1, int(abs(self.end - self.start) / room))
        return self._powers(wanted) if self.log else self._steps(wanted)

    def _steps(self, wanted: int) -> list[tuple[float, str]]:
        step = round_step((self.high - self.low) / wanted)
        step = max(step, 1.0) if self.whole else step
        digits = max(0, -math.floor(math.log10(step) + 1e-9))
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [(step * index, f"{step * index:.{digits}f}") for index in range(first, last + 1)]

    def _powers(self, wanted: int) -> list[tuple[float, str]]:
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        for factors in ((1, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,)):
            found = [10.0**decade * factor for decade in decades for factor in factors]
            within = [value for value in found if self.low * 0.999 <= value <= self.high * 1.001]
            if len(within) <= wanted + 1:
                break
        else:
            within = within[:: math.ceil(len(within) / (wanted + 1))]
        return [(value, f"{value:g}") for value in within]


def from_zero(values: Sequence[float], start: float, end: float, whole: bool = False) -> Axis:
    """A linear axis from 0 to the largest value; 1 long where all of them are 0."""
    high = max(values, default=0.0)
    return Axis(start, end, 0.0, high if high > LEAST_LENGTH else 1.0, whole=whole)


def text(x: float, y: float, content: str, anchor: str = "start", kind: str = "label") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(clean(content))}</text>'


def upright(x: float, y: float, content: str) -> str:
    """A vertical axis' title, read upwards, its middle at (x, y)."""
    turned = f'transform="rotate(-90 {x:.1f} {y:.1f})"'
    return f'<text class="value" x="{x:.1f}" y="{y:.1f}" text-anchor="middle" {turned}>{escape(content)}</text>'


def bar(x: float, y: float, end: float, height: float, kind: str) -> str:
    """From `x` to `end`."""
    width = max(0.0, end - x)
    return f'<rect class="{kind}" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"/>'


def line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def dot(x: float, y: float, kind: str, radius: float = 4.5) -> str:
    return f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="{radius:g}"/>'


def diamond(x: float, y: float, kind: str, radius: float = 5.5) -> str:
    d = f"M{x:.1f} {y - radius:.1f}l{radius:g} {radius:g} {-radius:g} {radius:g} {-radius:g} {-radius:g}z"
    return f'<path class="{kind}" d="{d}"/>'


def whisker(low: float, high: float, y: float) -> list[str]:
    """A range on a row, in pixels, with its two ends."""
    ends = [line(x, y - 5, x, y + 5, "whisker") for x in (low, high)]
    return [line(low, y, high, y, "whisker"), *ends]


def steps(points: Sequence[tuple[float, float]], index: int) -> str:
    """A line that keeps its height until the next point, in the colour and dash of series `index`."""
    first, *others = points
    d = f"M{first[0]:.1f} {first[1]:.1f}" + "".join(f"H{x:.1f}V{y:.1f}" for x, y in others)
    dash = DASHES[index % len(DASHES)]
    dashed = f' stroke-dasharray="{dash}"' if dash else ""
    return f'<path class="curve s{index % SERIES}" d="{d}"{dashed}/>'


def horizontal(axis: Axis, top: float, bottom: float, title: str) -> list[str]:
    """Grid and labels of a horizontal axis below `bottom`; it needs 2 lines of text, without a title one."""
    parts = []
    for value, label in axis.ticks():
        x = axis(value)
        inside = max(x, text_width(label, SMALL) / 2)
        parts += [line(x, top, x, bottom, "grid"), text(inside, bottom + LINE, label, "middle", "value")]
    middle = max((axis.start + axis.end) / 2, text_width(title, SMALL) / 2)
    named = [text(middle, bottom + 2 * LINE, title, "middle", "value")] if title else []
    return [*parts, *named]


def svg(width: float, height: float, parts: Sequence[str], title: str) -> str:
    """The figure. `title`: what a reader who cannot see it is told."""
    kind = "wide" if width == WIDE else "narrow"
    box = f'class="{kind}" viewBox="0 0 {width:.0f} {height:.0f}" role="img"'
    return f"<svg {box}><title>{escape(clean(title))}</title>{''.join(parts)}</svg>"
