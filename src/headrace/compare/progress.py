"""What a comparison is doing now, on stderr: one line that is drawn anew between runs, or a log.

Nothing is drawn while a run is timed: there is no thread, and the line only changes when it is told something. So the
times it shows are those of its last change.
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

from headrace.pages.plain import clean

ROUND = re.compile(r"round (\d+) of (\d+): ")
"""How `measure.run_rounds` begins the text of a run that counts."""
ERASE = "\r\x1b[2K"
UNKNOWN_WIDTH = 80


class Estimate:
    """How long the rounds will still take, from the last whole one."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._round = 0
        self._began_s = 0.0
        self._last_s: float | None = None
        """Of the last whole round."""

    def remaining_s(self, text: str) -> float | None:
        """Seconds left once `text` begins; None: not a round, or no whole one has passed."""
        found = ROUND.match(text)
        if found is None:
            return None
        number, count = int(found[1]), int(found[2])
        now_s = self._clock()
        if number != self._round:
            if number == self._round + 1 > 1:
                self._last_s = now_s - self._began_s
            self._round, self._began_s = number, now_s
        if self._last_s is None:
            return None
        return max(0.0, self._last_s * (count - number + 1) - (now_s - self._began_s))


@contextmanager
def progress_line(
    stream: TextIO | None = None, log: bool = False, clock: Callable[[], float] = time.monotonic
) -> Iterator[Callable[[str], None]]:
    """Gives what to call with each thing that begins. On a terminal it redraws one line, which is gone at the end;
    where nobody watches it writes a line each if `log`, else nothing. `stream`: stderr."""
    stream = sys.stderr if stream is None else stream
    began_s = clock()
    estimate = Estimate(clock)

    def log_line(text: str) -> None:
        print(f"[{clock_text(clock() - began_s)}] {clean(text)}", file=stream, flush=True)

    def draw(text: str) -> None:
        left_s = estimate.remaining_s(text)
        pieces = [clean(text).replace("\n", " "), f"{clock_text(clock() - began_s)} elapsed"]
        if left_s is not None:
            pieces.append(f"about {clock_text(left_s)} left")
        print(ERASE + line_of(pieces, _width(stream) - 1), end="", file=stream, flush=True)

    if not stream.isatty():
        yield log_line if log else lambda text: None
        return
    try:
        yield draw
    finally:
        print(ERASE, end="", file=stream, flush=True)


def line_of(pieces: list[str], width: int) -> str:
    """As many of the pieces as fit into one line, the first in any case: a line that wraps could not be drawn over."""
    line = pieces[0] if len(pieces[0]) <= width else pieces[0][: max(0, width - 1)] + "…"
    for piece in pieces[1:]:
        if len(line) + 3 + len(piece) <= width:
            line += f" · {piece}"
    return line


def clock_text(seconds: float) -> str:
    """0:07, 12:34, 1:02:03."""
    whole = round(seconds)
    hours, minutes = whole // 3600, whole // 60 % 60
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"


def _width(stream: TextIO) -> int:
    try:
        return os.get_terminal_size(stream.fileno()).columns or UNKNOWN_WIDTH
    except OSError:
        return UNKNOWN_WIDTH
