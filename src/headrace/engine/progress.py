"""What a terminal shows while a model loads and while offline answers are made."""

from __future__ import annotations

import itertools
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TextIO

from headrace.engine.answer import Completion

SHOWN_AFTER_S = 0.5
"""What is quicker shows nothing: a line that flashes by only disturbs."""
_FRAME_S = 0.1
_FRAMES = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"
_PLAIN_FRAMES = "|/-\\"
_ERASE = "\r\x1b[2K"


@contextmanager
def loading(shown: bool) -> Iterator[Callable[[float], None]]:
    """A line on stderr that says what a load is doing; yields what to call with the share of the weights read.

    A thread draws it: what takes long (importing torch, unpacking one large tensor) does not come back to ask.
    """
    if not shown:
        yield lambda share: None
        return
    line = _LoadLine(sys.stderr)
    thread = threading.Thread(target=line.draw_until_done, name="headrace-loading", daemon=True)
    thread.start()
    try:
        yield line.advance
    finally:
        line.done.set()
        thread.join()


class _LoadLine:
    def __init__(self, stream: TextIO) -> None:
        self.done = threading.Event()
        self._stream = stream
        self._share: float | None = None
        spelled = (stream.encoding or "ascii").lower().replace("-", "") == "utf8"
        self._frames = _FRAMES if spelled else _PLAIN_FRAMES

    def advance(self, share: float) -> None:
        self._share = share

    def draw_until_done(self) -> None:
        if self.done.wait(SHOWN_AFTER_S):
            return
        # The terminal may be gone; the load does not care.
        with suppress(OSError, ValueError):
            for frame in itertools.cycle(self._frames):
                self._stream.write(f"{_ERASE}{frame} {self.text()}")
                self._stream.flush()
                if self.done.wait(_FRAME_S):
                    break
            self._stream.write(_ERASE)
            self._stream.flush()

    def text(self) -> str:
        if self._share is None:
            return "starting the backend"
        if self._share < 1:
            return f"reading weights {self._share:.0%}"
        return "preparing the KV cache"


@contextmanager
def rate_bar(label: str, total: int, shown: bool) -> Iterator[Callable[[int, int, str], None]]:
    """How many of `total` are done, and output tokens a second, on stderr; yields what to call with the number done,
    the tokens so far and a remark."""
    if not shown:
        yield lambda done, num_tokens, remark: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    began_s = time.monotonic()
    columns = (TextColumn(label), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    rate_column = TextColumn("{task.fields[rate]}")
    with Progress(*columns, rate_column, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=total, rate="")

        def update(done: int, num_tokens: int, remark: str) -> None:
            rate = num_tokens / max(1e-9, time.monotonic() - began_s)
            progress.update(task, completed=done, rate=f"{rate:.0f} tokens/s{remark}")

        yield update


@contextmanager
def progress_bar(total: int, shown: bool) -> Iterator[Callable[[Completion], None]]:
    """Requests done and output tokens a second; yields what to call with each completion."""
    done = num_tokens = 0
    with rate_bar("requests", total, shown) as update:

        def advance(completion: Completion) -> None:
            nonlocal done, num_tokens
            done += 1
            num_tokens += len(completion.token_ids)
            update(done, num_tokens, "")

        yield advance
