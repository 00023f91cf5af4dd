"""Stop strings in a stream of text."""

from __future__ import annotations

from collections.abc import Iterable


class StopStrings:
    """Ends the text at a stop string, and holds back only what could still become one.

    The stop string that is complete first wins; of several that end at the same character, the longest. So the answer
    depends on the text alone, not on how it came split, and is known at the character that completes the stop string.
    At most the longest stop string less one character waits; each push looks at that and the new text once.
    """

    def __init__(self, stops: Iterable[str], include: bool = False) -> None:
        """`include`: the stop string stays at the end of the text."""
        self._include = include
        self._stops = tuple(dict.fromkeys(stops))
        assert all(self._stops), "an empty stop string (SamplingParams refuses it)"
        self._held = ""
        self._stopped = False

    def push(self, delta: str) -> tuple[str, bool]:
        """The text that is safe to emit now, and whether a stop string was found; after that, always ("", True)."""
        if self._stopped:
            return "", True
        text = self._held + delta
        matches = ((at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0)
        end, found = min(matches, default=(-1, -1))
        if found >= 0:
            self._stopped = True
            self._held = ""
            return text[: end if self._include else found], True
        safe = len(text) - max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[safe:]
        return text[:safe], False

    def finish(self) -> str:
        """What was held back, when the text ends without a stop string."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that begins `stop` and is not all of it."""
    start = text.find(stop[0], max(0, len(text) - len(stop) + 1))
    while start >= 0 and not stop.startswith(text[start:]):
        start = text.find(stop[0], start + 1)
    return len(text) - start if start >= 0 else 0
