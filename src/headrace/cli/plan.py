"""Predict size, speed, power and cost before buying. Every number has a unit, a formula and a source (--explain)."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

from headrace.cli.console import state_folder
from headrace.cli.main import Parser
from headrace.core.errors import ConfigError, RequestError

if TYPE_CHECKING:
    from headrace.plan.document import Document

QUESTIONS: Mapping[str, str] = {
    "probe": "measure this machine: products, memory, disk; a profile for the others",
    "model": "size, speed and memory of a model on a device or on this machine",
    "serving": "the cheapest mix of GPUs for a load",
    "power": "how many more servers a power limit carries",
    "energy": "energy, CO2, cost, break-even",
    "overlap": "the bound of compute, memory and network, and what overlapping them gains",
    "offload": "where weights, KV cache and activations go when the GPU is too small",
    "training": "memory and time of a training run, by ZeRO stage, TP and PP",
    "gemm": "time and energy of matrix products, learned from this machine",
}
"""Name, also of its module (plan_NAME in this room) -> one line on it."""


class QuestionParser(Parser):
    """The parser of one question. Its module is imported when its arguments are to be read."""

    def __init__(self, module: str, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, **settings)
        self._module = module

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        question = import_module(self._module)
        self.description = question.__doc__
        question.add_arguments(self)
        add_output(self, argparse.SUPPRESS)
        self.set_defaults(document=question.document)
        return super().parse_known_args(args, namespace)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--accuracy",
        action="store_true",
        help="How far past predictions were from what was measured later, and how often an interval held it.",
    )
    add_output(parser, None)
    questions = parser.add_subparsers(dest="question", metavar="WHAT", parser_class=QuestionParser)
    for name, summary in QUESTIONS.items():
        questions.add_parser(name, help=summary, module=f"headrace.cli.plan_{name}")


def add_output(parser: argparse.ArgumentParser, default: str | None) -> None:
    """`default`: argparse.SUPPRESS where the flags may have been given before the question already."""
    group = parser.add_argument_group("output")
    off: bool | str = False if default is None else default
    group.add_argument("--json", action="store_true", default=off, help="Print JSON instead of text.")
    group.add_argument("--html", metavar="FILE", default=default, help="Write a page with plots to FILE.")
    group.add_argument(
        "--explain", action="store_true", default=off, help="Name the formula and the source of every number."
    )


def run(arguments: argparse.Namespace) -> int:
    from headrace.pages.files import ReportFile

    if arguments.question is None and not arguments.accuracy:
        raise RequestError(f"plan: nothing asked; one of {', '.join(QUESTIONS)}, or --accuracy (headrace plan --help)")
    if arguments.question is not None and arguments.accuracy:
        raise RequestError(f"plan: --accuracy is of all questions together; got {arguments.question} beside it")
    # Before the work, which may take a minute.
    file = None if arguments.html is None else ReportFile("html", arguments.html)
    document = accuracy() if arguments.accuracy else arguments.document(arguments)
    if arguments.json:
        from headrace.plan.json import as_json

        print(as_json(document), end="")
    else:
        show(document, arguments.explain)
    if file is not None:
        file.write(as_html(document, arguments.question))
        if not arguments.json:
            tell_written(file.path)
    return 0


def accuracy() -> Document:
    """Of the predictions that this user's runs have tested. Raises ConfigError where there is no place for them."""
    from headrace.plan.accuracy import accuracy as of_store
    from headrace.plan.calibration import Store, default_path

    folder = state_folder(os.environ)
    if folder is None:
        raise ConfigError("accuracy: no home folder; set XDG_STATE_HOME to where records are kept")
    return of_store(Store(default_path(folder)))


def show(document: Document, explain: bool) -> None:
    from headrace.pages.terminal import console
    from headrace.plan import text

    text.show(document, console(), explain)


def tell_written(path: str) -> None:
    from headrace.pages.terminal import console, show_written

    show_written(path, console())


def as_html(document: Document, question: str | None) -> str:
    from datetime import UTC, datetime

    from headrace import __version__
    from headrace.plan.page import page

    when = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return page(document, (question or "accuracy", f"headrace {__version__}", when))
