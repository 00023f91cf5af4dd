"""Text from outside as a reader may see it, on a terminal and on a page."""

from __future__ import annotations

from unicodedata import category

HARMLESS = "\n\t\u200c\u200d"
"""Not printable by Python's word, but text: the joiners spell Persian, Hindi and emoji."""


def clean(text: str) -> str:
    """Without the control characters that could move a cursor, recolour a terminal or hide text."""
    return "".join(
        c if c.isprintable() or c in HARMLESS or category(c) == "Zs" else "\N{REPLACEMENT CHARACTER}" for c in text
    )


def shortened(text: str, most: int) -> str:
    """At most about `most` letters of it, with a word on how many are left out."""
    left = len(text) - most
    return text if left <= 0 else f"{text[:most].rstrip()} … ({left} more characters)"
