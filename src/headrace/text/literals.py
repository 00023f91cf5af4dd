"""Finding known strings in a text: from left to right, the longest one at each place."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator


class Literals:
    """A set of strings to look for. The cost a character is at most the number of their different lengths."""

    def __init__(self, literals: Iterable[str]) -> None:
        self._known = frozenset(literal for literal in literals if literal)
        lengths: dict[str, set[int]] = {}
        for literal in self._known:
            lengths.setdefault(literal[0], set()).add(len(literal))
        self._lengths = {first: sorted(found, reverse=True) for first, found in lengths.items()}
        self._first = re.compile(f"[{re.escape(''.join(sorted(lengths)))}]") if lengths else None

    def prefix(self, text: str, at: int) -> int:
        """The length of the longest one that stands at `at`, 0 where none does."""
        for length in self._lengths.get(text[at], ()):
            if text[at : at + length] in self._known:
                return length
        return 0

    def split(self, text: str) -> Iterator[tuple[str, bool]]:
        """The text in order, in stretches that are not empty: (stretch, whether it is one of the strings)."""
        start = at = 0
        while self._first is not None and (match := self._first.search(text, at)):
            at = match.start()
            if length := self.prefix(text, at):
                if start < at:
                    yield text[start:at], False
                yield text[at : at + length], True
                start = at = at + length
            else:
                at += 1
        if start < len(text):
            yield text[start:], False
