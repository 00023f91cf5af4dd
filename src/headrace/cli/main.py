"""The `headrace` command. Parsing needs the standard library alone; each command imports what it uses."""

from __future__ import annotations

import argparse
import gc
import io
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from typing import Any, NoReturn

from headrace import __version__
from headrace.core.errors import ConfigError, HeadraceError, ModelError, RequestError

USAGE_ERROR, FAILED, INTERRUPTED = 2, 1, 130
COMMANDS: Mapping[str, str] = {
    "generate": "answer prompts offline",
    "chat": "talk with a model in the terminal",
    "serve": "serve a model over the OpenAI and TGI HTTP APIs",
    "batch": "answer a file of OpenAI batch lines, durably",
    "compare": "run the same questions under every method, with proof and times",
    "plan": "predict size, speed, power and cost before buying",
    "convert": "make a folder of a checkpoint that torch saved (Open-Qwen2VL)",
    "profile": "where the time goes: named ranges, a table and a trace",
    "doctor": "what this machine has, and what headrace will use",
}
"""Name, also of its module in this room -> one line on it."""
COLLECT_EVERY = 100_000
"""New objects between two searches for garbage. A start makes as many, and they stay: to search them every 700, as
Python does by itself, takes a tenth of it."""


class Parser(argparse.ArgumentParser):
    """argparse, but an error is one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(USAGE_ERROR, f"{self.prog}: error: {message}\n")


class CommandParser(Parser):
    """The parser of one command. The command's module is imported when its arguments are to be read."""

    def __init__(self, module: str, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, **settings)
        self._module = module

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        command = import_module(self._module)
        self.description = command.__doc__
        command.add_arguments(self)
        self.set_defaults(run=command.run)
        return super().parse_known_args(args, namespace)


def build_parser() -> argparse.ArgumentParser:
    """A parser for one command line."""
    parser = Parser(prog="headrace", description="Run decoder language models fast, and prove that the answers stay.")
    parser.add_argument("--version", action="version", version=f"headrace {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=CommandParser)
    for name, summary in COMMANDS.items():
        commands.add_parser(name, help=summary, module=f"headrace.cli.{name}")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status. What the user did wrong is one line on stderr, without traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # An answer, or a file name in an error, may hold any character; the encoding of a pipe may not.
            stream.reconfigure(errors="replace")
    arguments = build_parser().parse_args(argv)
    try:
        status: int = arguments.run(arguments)
        sys.stdout.flush()
        return status
    except HeadraceError as error:
        kind = USAGE_ERROR if isinstance(error, RequestError | ModelError | ConfigError) else FAILED
        return complain(str(error), kind)
    except BrokenPipeError:
        # Whoever read us has gone (`| head`); keep the interpreter's own last flush from failing loudly.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except OSError as error:
        return complain(f"{error.filename or 'input or output'}: {error.strerror or error}", USAGE_ERROR)
    except KeyboardInterrupt:
        return complain("interrupted", INTERRUPTED)


def complain(message: str, status: int) -> int:
    """One line on stderr, whatever is in the message."""
    print("headrace: error:", " ".join(message.split()), file=sys.stderr)
    return status


def run() -> NoReturn:
    """The command: a process of its own, which ends at once. To take the interpreter apart would take 20 ms more."""
    gc.set_threshold(COLLECT_EVERY)
    status = main()
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            with suppress(OSError, ValueError):
                stream.flush()
    os._exit(status)


if __name__ == "__main__":
    run()
