"""How a script that hurts a server is started, on which server, and what it says in the end."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.robustness.http_load import Address
from tests.server.conftest import serving


@dataclass(slots=True)
class Score:
    """A line for each number that must be passed."""

    title: str
    lines: list[dict[str, object]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def note(self, text: str) -> None:
        """What a reader has to know: sizes, what could not be measured."""
        self.notes.append(text)
        print(f"{self.title}: {text}", flush=True)

    def check(self, what: str, measured: object, must_be: object, passed: bool) -> None:
        self.lines.append({"what": what, "measured": measured, "must_be": must_be, "passed": passed})
        print(f"{self.title}: {'pass' if passed else 'FAIL'}  {what}: {measured} (must be {must_be})", flush=True)

    def at_most(self, what: str, value: float, bound: float, unit: str = "s") -> None:
        self.check(what, f"{value:.4g} {unit}".rstrip(), f"≤ {bound:.4g} {unit}".rstrip(), value <= bound)

    def zero(self, what: str, count: float, of: int | None = None) -> None:
        self.check(what, f"{count:g}" if of is None else f"{count:g} of {of}", "0", count == 0)

    @property
    def passed(self) -> bool:
        return bool(self.lines) and all(line["passed"] for line in self.lines)

    @property
    def failures(self) -> str:
        return "\n".join(str(line) for line in self.lines if not line["passed"]) or "nothing was measured"


@dataclass(frozen=True, slots=True)
class Target:
    """A server that is hurt."""

    url: str
    pid: int | None = None
    """Its process, where it is on this machine and ours."""
    log: Sequence[str] = ()

    @property
    def address(self) -> Address:
        host, port = self.url.removeprefix("http://").rstrip("/").rsplit(":", 1)
        return host, int(port)


@contextmanager
def own_server(model: str | Path, *flags: str) -> Iterator[Target]:
    """A server of our own on a free port."""
    with serving(model, *flags) as running:
        yield Target(running.url, running.process.pid, running.log)


Measure = Callable[[Target, Score, bool], Coroutine[Any, Any, None]]


def options(doc: str | None, black_box: bool, arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line of a script: --short, --json, --flag, and, where a server from outside will do, --url."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="a minute's part of it")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    parser.add_argument("--model", default="demo")
    parser.add_argument(
        "--flag", action="append", default=[], metavar="FLAG", help="of headrace serve, as --flag=--threads=1"
    )
    if black_box:
        parser.add_argument("--url", help="a server that runs already; what needs its process is left out")
    return parser.parse_args(arguments)


def run_script(
    title: str,
    doc: str | None,
    measure: Measure,
    flags: Callable[[bool], Sequence[str]] = lambda short: (),
    arguments: Sequence[str] | None = None,
) -> int:
    """One script on one server; `flags`: of that server, by whether the run is a short one. Returns the exit status."""
    given = options(doc, True, arguments)
    score = Score(title)
    if given.url:
        asyncio.run(measure(Target(given.url), score, given.short))
    else:
        with own_server(given.model, *flags(given.short), *given.flag) as target:
            asyncio.run(measure(target, score, given.short))
    return finish(score, given.json)


def finish(score: Score, path: Path | None) -> int:
    """Writes the results; the exit status."""
    if path is not None:
        found = {"title": score.title, "passed": score.passed, "notes": score.notes, "lines": score.lines}
        path.write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n")
    print(f"{score.title}: {'all passed' if score.passed else 'FAILED'}", file=sys.stderr)
    return 0 if score.passed else 1
