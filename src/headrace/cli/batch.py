"""Answer a file of OpenAI batch lines, whatever happens in between: after a kill, a full disk or a Ctrl-C the same
command goes on where it was. Each line {"custom_id", "method": "POST", "url": "/v1/chat/completions" or
"/v1/completions", "body"} gives one line, in the order of the input: answers go to OUT.jsonl; what is wrong with a line
goes to OUT.errors.jsonl, which is only there if a line failed (the exit status is still 0: the batch is done). Until
then everything finished is in OUT.jsonl.journal. Lines that draw without a seed get one made from the line, ids are
hashes, and `created` is when the input was last changed: so a run that was interrupted, and one that was not, give the
same bytes."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from headrace.cli.console import print_notes
from headrace.cli.flags import add_engine_flags, given
from headrace.core.config import EngineConfig

if TYPE_CHECKING:
    from headrace.batch.run import OnProgress, Report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_engine_flags(parser)
    parser.add_argument("input", metavar="IN.jsonl", help="The lines: at most 50,000, and 200 MiB in all, in UTF-8.")
    parser.add_argument("output", metavar="OUT.jsonl", help="Where the answers go; must not exist yet.")


def run(arguments: argparse.Namespace) -> int:
    from headrace.batch.lines import scan
    from headrace.batch.run import run_batch
    from headrace.engine.model import OpenModel

    source, out = scan(Path(arguments.input)), Path(arguments.output)
    opened = OpenModel(EngineConfig(**given(arguments, EngineConfig)))
    print_notes(opened.checkpoint)
    with closing(opened), Signals() as signals, progress_bar(source.num_lines, sys.stderr.isatty()) as on_progress:
        report = run_batch(opened, source, out, lambda: signals.caught is not None, on_progress)
    for line in summary(report, out):
        print(line, file=sys.stderr)
    return 128 + (signals.caught or signal.SIGINT) if report.interrupted else 0


class Signals:
    """Remembers the first SIGINT or SIGTERM, so that the run ends between two steps; the second one acts at once."""

    def __init__(self) -> None:
        self.caught: int | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> Signals:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._catch)
        return self

    def _catch(self, number: int, frame: FrameType | None) -> None:
        self.caught = number
        self.__exit__()

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]


@contextmanager
def progress_bar(total: int, shown: bool) -> Iterator[OnProgress]:
    """Lines done, failed, and tokens a second, on stderr."""
    from headrace.engine.progress import rate_bar

    with rate_bar("lines", total, shown) as update:

        def on_progress(report: Report) -> None:
            update(report.done, report.output_tokens, f" · {report.failed} failed" if report.failed else "")

        yield on_progress


def summary(report: Report, out: Path) -> Iterator[str]:
    """What the command says at its end."""
    if report.already:
        yield f"{out}: already complete ({report.num_lines} lines)"
        return
    if report.started_over:
        yield f"the journal could not be read from its beginning on ({report.cut_bytes} bytes): started over"
    elif report.cut_bytes:
        yield f"the journal's last {report.cut_bytes} bytes were not whole: cut, what they held was computed again"
    rate = report.output_tokens / report.run_s if report.run_s > 0 else 0.0
    resumed = f", {report.done_before} of them by earlier runs" if report.done_before else ""
    twice = f", {report.again} begun more than once" if report.again else ""
    yield f"{report.num_lines} lines: {report.ok} ok, {report.failed} failed{resumed}{twice}"
    yield (
        f"this run: {report.prompt_tokens} prompt tokens, {report.output_tokens} answer tokens in {report.run_s:.1f} s "
        f"({rate:.0f} tokens/s), after {report.load_s:.1f} s of loading"
    )
    if report.interrupted:
        yield f"interrupted with {report.num_lines - report.done} lines to go; the same command goes on from here"
