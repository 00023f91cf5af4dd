"""The answers as a reader sees them, on a terminal and on a page."""

from __future__ import annotations

from headrace.compare.runner import Comparison
from headrace.pages.plain import clean


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
