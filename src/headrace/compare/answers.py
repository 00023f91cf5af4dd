"""The answers as a reader sees them, on a terminal and on a page."""

from __future__ import annotations

from headrace.compare.runner import Comparison


def clean(text: str) -> str:
    """Without the control characters that could move a cursor, recolour a terminal or hide text."""
    return "".join(c if c in "\n\t" or c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def shortened(text: str, most: int) -> str:
    """At most about `most` letters of it, with a word on how many are left out."""
    left = len(text) - most
    return text if left <= 0 else f"{text[:most].rstrip()} … ({left} more characters)"


def shown_answers(comparison: Comparison, question: int) -> list[tuple[str, str]]:
    """(method, text): the base's answer, then each that differs from all before it."""
    shown: set[tuple[int, ...]] = set()
    found: list[tuple[str, str]] = []
    for result in comparison.methods:
        output = result.rounds[0].outputs[question]
        if output not in shown:
            shown.add(output)
            text = clean(comparison.texts[result.name][question]).strip()
            found.append((result.name, text or "(no text)"))
    return found
