"""What is printed for people: on a terminal as wide as it is, piped plain and of a fixed width."""

from __future__ import annotations

import sys
from typing import TextIO

from rich.console import Console
from rich.text import Text

from headrace.pages.plain import clean

PIPED_WIDTH = 100


def console(stream: TextIO | None = None, width: int | None = None) -> Console:
    """Plain and of a fixed width where nobody watches."""
    stream = sys.stdout if stream is None else stream
    if stream.isatty():
        return Console(file=stream, width=width, highlight=False)
    return Console(file=stream, width=width or PIPED_WIDTH, highlight=False, color_system=None, force_terminal=False)


def show_written(path: str, out: Console) -> None:
    # One line whatever the width, so that it can be clicked and copied.
    out.print(Text(f"Written: {clean(path)}"), soft_wrap=True)
