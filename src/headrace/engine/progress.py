"""A progress bar for offline answers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from headrace.engine.answer import Completion


@contextmanager
def progress_bar(total: int, shown: bool) -> Iterator[Callable[[Completion], None]]:
    """Requests done and output tokens a second, on stderr; yields what to call with each completion."""
    if not shown:
        yield lambda completion: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    began_s = time.monotonic()
    num_tokens = 0
    columns = (TextColumn("requests"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    rate_column = TextColumn("{task.fields[rate]}")
    with Progress(*columns, rate_column, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=total, rate="")

        def advance(completion: Completion) -> None:
            nonlocal num_tokens
            num_tokens += len(completion.token_ids)
            rate = num_tokens / max(1e-9, time.monotonic() - began_s)
            progress.update(task, advance=1, rate=f"{rate:.0f} tokens/s")

        yield advance
