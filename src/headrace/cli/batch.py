"""Answer a file of OpenAI batch lines, whatever happens in between: after a kill, a full disk or a Ctrl-C the same
command goes on where it was. Each line {"custom_id", "method": "POST", "url": "/v1/chat/completions" or
"/v1/completions", "body"} gives one line, in the order of the input: answers go to OUT.jsonl; what is wrong with a line
goes to OUT.errors.jsonl, which is only there if a line failed (the exit status is still 0: the batch is done). Until
then everything finished is in OUT.jsonl.journal. Lines that draw without a seed get one made from the line, ids are
hashes, and `created` is when the input was last changed: so a run that was interrupted, and one that was not, give the
same bytes. Where MODEL is the URL of an OpenAI-compatible server (http://127.0.0.1:8000), it is sent each line's body
as it stands, with the same promises but one: ids, times, what its cache held and what is drawn without a seed are the
server's, and differ from run to run. After a kill only the lines in flight are sent again. 429, 408, 5xx and broken
connections are tried again, 8 times in all, with Retry-After honoured up to 120 s; another error is the line's outcome.
Where the server is gone, the run ends with nothing lost, and the same command goes on later."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import fields
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from headrace.cli.console import print_notes
from headrace.cli.flags import add_engine_flags, given
from headrace.core.config import EngineConfig
from headrace.core.errors import ConfigError

if TYPE_CHECKING:
    from headrace.batch.ledger import OnProgress, Report
    from headrace.batch.lines import InputFile

    Answer = Callable[[InputFile, Path, Callable[[], bool], OnProgress], Report]

KEY_VARIABLE = "HEADRACE_API_KEY"
SERVER_FLAGS = ("api_key", "concurrency", "timeout")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_engine_flags(parser)
    parser.add_argument("input", metavar="IN.jsonl", help="The lines: at most 50,000, and 200 MiB in all, in UTF-8.")
    parser.add_argument("output", metavar="OUT.jsonl", help="Where the answers go; must not exist yet.")
    group = parser.add_argument_group("server (where MODEL is a URL)")
    group.add_argument("--api-key", metavar="KEY", help=f"Key that the server wants. Otherwise that of {KEY_VARIABLE}.")
    group.add_argument("--concurrency", type=int, metavar="N", help="Most lines in flight. Default: 64.")
    group.add_argument("--timeout", type=float, metavar="X", help="Most seconds for one answer. Default: 600.")


def run(arguments: argparse.Namespace) -> int:
    from headrace.batch.lines import scan

    source, out = scan(Path(arguments.input)), Path(arguments.output)
    with ExitStack() as stack:
        is_url = arguments.model.lower().startswith(("http://", "https://"))
        answer = by_server(arguments) if is_url else by_model(arguments, stack)
        signals = stack.enter_context(Signals())
        on_progress = stack.enter_context(progress_bar(source.num_lines, sys.stderr.isatty()))
        report = answer(source, out, lambda: signals.caught is not None, on_progress)
    for line in summary(report, out):
        print(line, file=sys.stderr)
    return 128 + (signals.caught or signal.SIGINT) if report.interrupted else 0


def by_model(arguments: argparse.Namespace, stack: ExitStack) -> Answer:
    """Opens the model until the stack ends. Raises ConfigError for a flag of servers."""
    from headrace.batch.run import run_batch
    from headrace.engine.model import OpenModel

    for name in SERVER_FLAGS:
        if getattr(arguments, name) is not None:
            raise ConfigError(f"--{name.replace('_', '-')}: MODEL is no URL, allowed: to leave it out")
    opened = stack.enter_context(closing(OpenModel(EngineConfig(**given(arguments, EngineConfig)))))
    print_notes(opened.checkpoint)
    return partial(run_batch, opened)


def by_server(arguments: argparse.Namespace) -> Answer:
    """Finds the server. Raises ConfigError, also for a flag of models, or BackendUnavailable."""
    from headrace.batch.endpoint import Server
    from headrace.batch.remote import CONCURRENCY, TIMEOUT_S, find_model, run_remote

    for item in fields(EngineConfig):
        if item.name != "model" and hasattr(arguments, item.name):
            flag = item.metadata.get("flag", item.name if item.default is not True else f"no-{item.name}")
            raise ConfigError(f"--{flag.replace('_', '-')}: MODEL is a URL, allowed: to leave it out")
    key = os.environ.get(KEY_VARIABLE, "") if arguments.api_key is None else arguments.api_key
    server = Server(arguments.model, key)
    concurrency = CONCURRENCY if arguments.concurrency is None else arguments.concurrency
    timeout_s = TIMEOUT_S if arguments.timeout is None else arguments.timeout
    return partial(run_remote, server, find_model(server), concurrency=concurrency, timeout_s=timeout_s)


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
    where = (
        f"after {report.load_s:.1f} s of loading" if report.retries is None else f"{report.retries} lines sent again"
    )
    yield (
        f"this run: {report.prompt_tokens} prompt tokens, {report.output_tokens} answer tokens in {report.run_s:.1f} s "
        f"({rate:.0f} tokens/s), {where}"
    )
    if len(report.systems) > 1:
        yield f"the answers are of {len(report.systems)} systems: {', '.join(report.systems[:8])}"
    if report.interrupted:
        yield f"interrupted with {report.num_lines - report.done} lines to go; the same command goes on from here"
