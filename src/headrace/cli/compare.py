"""Run the same questions under every method on one loaded model: are the tokens the same, how long does each take?"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from headrace.cli.flags import add_engine_flags, given
from headrace.core.config import EngineConfig
from headrace.core.errors import InvalidParameter
from headrace.core.types import SamplingParams

MAX_REPEATS = 1000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_engine_flags(parser, leave_out=("policy", "prefix_cache"))
    parser.add_argument(
        "--methods",
        metavar="LIST",
        default="serial,fused",
        help="Comma-separated: fused, serial, static:B (batches of B), window:MS (batches of what comes in MS "
        "milliseconds). serial is always part of it: the others are held against it. Default: serial,fused.",
    )
    parser.add_argument(
        "--max-tokens", type=int, metavar="N", default=96, help="Most tokens of an answer, ≥ 1. Default: 96."
    )
    parser.add_argument(
        "--repeats",
        type=int,
        metavar="R",
        default=3,
        help="Rounds; each runs every method once. Fewer than 3 cannot tell methods apart. Default: 3.",
    )
    parser.add_argument("--json", metavar="FILE", help="Write every figure and token id to FILE.")
    parser.add_argument("--html", metavar="FILE", help="Write a report for people to FILE, one page in itself.")


def run(arguments: argparse.Namespace) -> int:
    from headrace.compare.files import ReportFile
    from headrace.compare.methods import with_base
    from headrace.compare.methods.admission import check_names

    names = [name.strip() for name in arguments.methods.split(",")]
    check_names(names)
    SamplingParams(max_tokens=arguments.max_tokens)
    if not 1 <= arguments.repeats <= MAX_REPEATS:
        raise InvalidParameter("repeats", arguments.repeats, f"an integer from 1 to {MAX_REPEATS}")
    if arguments.json is not None and arguments.html is not None and same_file(arguments.json, arguments.html):
        raise InvalidParameter("html", arguments.html, "another file than --json")
    with ExitStack() as stack:
        files = {
            kind: stack.enter_context(ReportFile(kind, path))
            for kind, path in (("json", arguments.json), ("html", arguments.html))
            if path is not None
        }
        from headrace.compare.runner import compare
        from headrace.compare.table import console, show
        from headrace.compare.workloads import text4
        from headrace.engine.model import OpenModel

        opened = OpenModel(EngineConfig(**given(arguments, EngineConfig), prefix_cache=False))
        workload = text4(opened, arguments.max_tokens)
        with opened.checkpoint, progress_line() as progress:
            comparison = compare(opened, workload, with_base(names), arguments.repeats, progress)
        if "json" in files:
            from headrace.compare.document import document

            files["json"].write(json.dumps(document(comparison), allow_nan=False, ensure_ascii=False) + "\n")
        if "html" in files:
            from headrace.compare.report import page

            files["html"].write(page(comparison))
        show(comparison, [file.path for file in files.values()], console())
    return 0


def same_file(one: str, other: str) -> bool:
    return os.path.realpath(one) == os.path.realpath(other)


@contextmanager
def progress_line() -> Iterator[Callable[[str], None]]:
    """What is being done now, on stderr, if that is a terminal."""
    if not sys.stderr.isatty():
        yield lambda text: None
        return
    from rich.console import Console

    with Console(stderr=True).status("opening the model") as status:
        yield status.update
