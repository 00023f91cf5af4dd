"""Run the same questions under every method on one loaded model: are the tokens the same, how long does each take?"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headrace.cli.console import print_notes
from headrace.cli.flags import add_engine_flags, given
from headrace.core.config import EngineConfig
from headrace.core.errors import InvalidParameter
from headrace.core.types import SamplingParams

if TYPE_CHECKING:
    from headrace.compare.peer_setup import PeerCache
    from headrace.compare.runner import Comparison

MAX_REPEATS = 1000


class Setup(argparse.Action):
    """--setup NAME does without MODEL."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, *_: Any) -> None:
        setattr(namespace, self.dest, values)
        for action in parser._actions:
            if action.dest == "model":
                action.required = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_engine_flags(parser, leave_out=("policy", "prefix_cache", "adapters"))
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
    group = parser.add_argument_group("outside engines")
    group.add_argument(
        "--setup",
        metavar="NAME",
        action=Setup,
        help="Instead of comparing: make the environment of an outside engine, and MODEL's files for it if MODEL is "
        "given (demo, llama-0.5b, llama-1.1b or a .gguf file). NAME: llama.cpp, openvino, onnxruntime, ctranslate2, "
        "transformers or vllm. benchmarks/peers.py runs them.",
    )
    group.add_argument(
        "--isa",
        metavar="NAME",
        default="native",
        help="With --setup llama.cpp: compile it for this machine (native) or for AVX2 without anything newer (avx2). "
        "Default: native.",
    )


def run(arguments: argparse.Namespace) -> int:
    if arguments.setup is not None:
        return set_up(arguments)
    from headrace.compare.files import ReportFile
    from headrace.compare.methods import with_base
    from headrace.compare.methods.registry import check_names

    names = [name.strip() for name in arguments.methods.split(",")]
    check_names(names)
    SamplingParams(max_tokens=arguments.max_tokens)
    if not 1 <= arguments.repeats <= MAX_REPEATS:
        raise InvalidParameter("repeats", arguments.repeats, f"an integer from 1 to {MAX_REPEATS}")
    if arguments.json is not None and arguments.html is not None and same_file(arguments.json, arguments.html):
        raise InvalidParameter("html", arguments.html, "another file than --json")
    paths = {"json": arguments.json, "html": arguments.html}
    files = {kind: ReportFile(kind, path) for kind, path in paths.items() if path is not None}

    from headrace.compare.questions import text4
    from headrace.compare.runner import compare
    from headrace.compare.table import console, show, show_written
    from headrace.engine.model import OpenModel

    opened = OpenModel(EngineConfig(**given(arguments, EngineConfig), prefix_cache=False))
    print_notes(opened.checkpoint)
    with closing(opened), progress_line() as progress:
        workload = text4(opened, arguments.max_tokens)
        comparison = compare(opened, workload, with_base(names), arguments.repeats, progress)
    out = console()
    show(comparison, out)
    for kind, file in files.items():
        file.write(as_json(comparison) if kind == "json" else as_html(comparison))
        show_written(file.path, out)
    return 0


def set_up(arguments: argparse.Namespace) -> int:
    python = peer_cache(arguments.isa).set_up(arguments.setup, arguments.model)
    print(f"{arguments.setup} is ready: {python}")
    return 0


def peer_cache(isa: str) -> PeerCache:
    """The user's cache folder for outside engines; what is made there is told on stderr."""
    from headrace.compare.peer_setup import PeerCache

    base = os.environ.get("XDG_CACHE_HOME", "")
    folder = Path(base) if Path(base).is_absolute() else Path.home() / ".cache"
    environment = {**os.environ, "PYTHONNOUSERSITE": "1"}
    return PeerCache(folder / "headrace" / "peers", environment, isa, lambda text: print(text, file=sys.stderr))


def as_json(comparison: Comparison) -> str:
    from headrace.compare.document import document

    return json.dumps(document(comparison), allow_nan=False) + "\n"


def as_html(comparison: Comparison) -> str:
    from headrace.compare.report import page

    return page(comparison)


def same_file(one: str, other: str) -> bool:
    return os.path.realpath(one) == os.path.realpath(other)


@contextmanager
def progress_line() -> Iterator[Callable[[str], None]]:
    """What is being done now, on one line of stderr, if that is a terminal.

    No spinner: a thread that draws would run beside what is being timed.
    """
    if not sys.stderr.isatty():
        yield lambda text: None
        return
    erase = "\r\x1b[2K"
    try:
        yield lambda text: print(erase + text, end="", file=sys.stderr, flush=True)
    finally:
        print(erase, end="", file=sys.stderr, flush=True)
