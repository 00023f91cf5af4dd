"""The `headrace` command. Parsing needs the standard library alone; each command imports what it uses."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from headrace import __version__
from headrace.cli import batch, chat, compare, doctor, generate
from headrace.core.errors import ConfigError, HeadraceError, ModelError, RequestError

USAGE_ERROR, FAILED, INTERRUPTED = 2, 1, 130


class Parser(argparse.ArgumentParser):
    """argparse, but an error is one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(USAGE_ERROR, f"{self.prog}: error: {message}\n")


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="headrace", description="Run decoder language models fast, and prove that the answers stay.")
    parser.add_argument("--version", action="version", version=f"headrace {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=Parser)
    for name, module, summary in (
        ("generate", generate, "answer prompts offline"),
        ("chat", chat, "talk with a model in the terminal"),
        ("batch", batch, "answer a file of OpenAI batch lines, durably"),
        ("compare", compare, "run the same questions under every method, with proof and times"),
        ("doctor", doctor, "what this machine has, and what headrace will use"),
    ):
        command = commands.add_parser(name, help=summary, description=module.__doc__, allow_abbrev=False)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
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


if __name__ == "__main__":
    sys.exit(main())
