"""Pieces of the page. Every text from outside is escaped here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from importlib.resources import files

from headrace.pages.chart_axes import NARROW, WIDE
from headrace.pages.plain import clean

LONG_NAME = 20
Drawing = Callable[[float], str]
"""A figure for a width in user units."""


def whole_page(command: str, title: str, kicker: Sequence[str], heading: str, sections: Sequence[str]) -> str:
    """A document in itself. `command`: what wrote it; `kicker`: what it is about, in a line of short pieces."""
    style = files("headrace.pages").joinpath("report.css").read_text(encoding="utf-8")
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{safe(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>\n"
        f'<p class="kicker">{safe(command)} · {" · ".join(map(safe, kicker))}</p>\n'
        f"<h1>{safe(heading)}</h1>\n" + "\n".join(sections) + "\n</main>\n</body>\n</html>\n"
    )


def safe(text: object) -> str:
    return escape(clean(str(text)))


def cell(text: object, kind: str = "", *below: str) -> str:
    """A cell; `below`: smaller lines under the text."""
    small = "".join(f"<small>{safe(line)}</small>" for line in below if line)
    return f'<td class="{kind}">{safe(text)}{small}</td>'


def name_cell(name: str) -> str:
    """The heading of a method's row."""
    return f'<th class="{name_kind(name)}" scope="row">{safe(name)}</th>'


def name_kind(name: str) -> str:
    """Class of a method's name: a long one may be broken anywhere."""
    return "long" if len(name) > LONG_NAME else ""


def grid(head: Sequence[tuple[str, str]], rows: Sequence[str], kind: str = "") -> str:
    """A table that scrolls by itself where it is too wide. `head`: (heading, class); `rows`: their cells."""
    cells = "".join(f'<th class="{name}" scope="col">{safe(text)}</th>' for text, name in head)
    body = "".join(f"<tr>{row}</tr>\n" for row in rows)
    table = f'<table class="{kind}">\n<thead><tr>{cells}</tr></thead>\n<tbody>\n{body}</tbody>\n</table>'
    return f'<div class="scroll" tabindex="0">{table}</div>'


def listed(points: Sequence[str]) -> str:
    return "<ul>\n" + "".join(f"<li>{safe(point)}</li>\n" for point in points) + "</ul>"


def figure(drawings: Sequence[Drawing], caption: str, keys: Sequence[tuple[str, str]] = ()) -> str:
    """Each drawing for a screen and for a phone, of which the page shows one; `keys`: (class of a swatch, meaning)."""
    drawn = "\n".join(draw(width) for draw in drawings for width in (WIDE, NARROW))
    legend = "".join(f'<span class="key"><i class="swatch {kind}"></i>{safe(told)}</span>' for kind, told in keys)
    legend = f'<p class="keys">{legend}</p>\n' if legend else ""
    return f"<figure>\n{legend}{drawn}\n<figcaption>{safe(caption)}</figcaption>\n</figure>"
