"""The demo's screen as text: what is in flight, who came, who has ended. Pure: a state and a size give lines."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from rich.text import Text

TITLE = "# of In-flight requests"
INCOMING, FINISHED = "Incoming requests", "Finished requests"
AXIS = "> iters"
EIGHTHS = " ▁▂▃▄▅▆▇█"
LABEL = 4
"""Columns of the labels of the vertical axis."""
FRAME = 8
"""Lines that are neither chart nor log: progress, two empty ones, title, axis, its labels, empty, headings."""
LEAST_WIDTH, LEAST_HEIGHT = 40, 16


@dataclass(slots=True)
class Board:
    """What is known of a run so far."""

    lengths: tuple[int, ...]
    """Tokens of each request's answer."""
    levels: list[int] = field(default_factory=list)
    """Requests in flight in each iteration so far."""
    tokens: int = 0
    incoming: list[str] = field(default_factory=list)
    finished: list[str] = field(default_factory=list)
    elapsed_s: float = 0.0

    @property
    def share(self) -> float:
        """Of all tokens that are out."""
        return self.tokens / sum(self.lengths)


def added(request: int) -> str:
    return f"request {request} added..."


def ended(request: int) -> str:
    return f"request {request} finished..."


def screen(board: Board, width: int, height: int) -> list[Text]:
    """`height` lines of at most `width` columns, of which a screen smaller than 40×16 sees a part."""
    width, height = max(width, LEAST_WIDTH), max(height, LEAST_HEIGHT)
    # Quarters of the axis on whole rows; what is over goes to the logs.
    chart = 4 * ((height - FRAME - max(4, height // 4)) // 4)
    logs = height - FRAME - chart
    lines = [_progress(board, width), Text(), Text(f"{TITLE:^{width}}".rstrip(), style="bold"), Text()]
    lines += _chart(board, width, chart)
    half = width // 2
    lines += [Text(), Text(f"{INCOMING:<{half}}{FINISHED}", style="bold")]
    came, left = board.incoming[-logs:], board.finished[-logs:]
    for row in range(logs):
        one = came[row] if row < len(came) else ""
        other = left[row] if row < len(left) else ""
        lines.append(Text(f"{one[: half - 1]:<{half}}{other[: width - half]}"))
    for line in lines:
        line.no_wrap, line.overflow = True, "crop"
    return lines


def _progress(board: Board, width: int) -> Text:
    told = f"current iters={len(board.levels)}"
    counted = f"{math.floor(100 * board.share):3d} %  {board.elapsed_s:6.1f} s"
    room = width - len(told) - len(counted) - 3
    filled = round(board.share * room)
    return Text.assemble((told, "bold"), " ", ("█" * filled, "green"), ("░" * (room - filled), "dim"), " ", counted)


def _chart(board: Board, width: int, height: int) -> list[Text]:
    """Bars over iterations, from the left; `height` rows, then the axis and its labels."""
    parts = 8 if height % 8 == 0 and height >= 16 else 4
    most = parts * math.ceil(len(board.lengths) / parts)
    columns = width - LABEL - 2 - len(AXIS)
    bars, each = columns_of(board.levels, columns)
    eighths = [round(8 * height * bar / most) for bar in bars]
    ticks = {height * part // parts: most * part // parts for part in range(1, parts + 1)}
    lines = []
    for row in range(height, 0, -1):
        label = ticks.get(row, "")
        blocks = "".join(EIGHTHS[max(0, min(8, one - 8 * (row - 1)))] for one in eighths)
        mark = "┤" if label else "│"
        lines.append(Text.assemble((f"{label:>{LABEL}} {mark}", "dim"), (blocks, "cyan")))
    lines.append(Text(f"{0:>{LABEL}} └{'─' * columns}{AXIS}", style="dim"))
    last = str(each * columns)
    labels = f"{'':{LABEL + 2}}0{last:>{columns - 1}}"
    return [*lines, Text(labels, style="dim")]


def columns_of(levels: Sequence[int], columns: int) -> tuple[list[int], int]:
    """Bars of at most `columns`, each the most of as many iterations as the second value says (1, 2, 3, 4, 6, 8, 12 …:
    seldom another, so that the picture stays put while it grows)."""
    each = 1
    while each * columns < len(levels):
        each = each * 4 // 3 if each % 3 == 0 else each * 3 // 2 if each > 1 else 2
    return [max(levels[first : first + each]) for first in range(0, len(levels), each)], each


def closing(board: Board) -> list[Text]:
    """What is told once the run has ended."""
    lengths = " ".join(map(str, board.lengths))
    return [
        Text("Random request length:", style="bold"),
        Text(lengths),
        Text(f"Time taken: {1000 * board.elapsed_s:.0f} milliseconds", style="bold"),
    ]
