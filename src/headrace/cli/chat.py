"""Talk with a model in a terminal: answers appear as they are made. With a pipe as input, one line is one message."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import fields
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING

from headrace.cli.console import (
    History,
    Style,
    Wrapper,
    columns,
    import_numpy,
    load_line_shown,
    printable,
    quiet_keys,
    wants_colour,
)
from headrace.cli.flags import add_engine_flags, add_sampling_flags, given
from headrace.cli.keys import FENCE, Keys, Pipe, Signals
from headrace.core.config import EngineConfig
from headrace.core.errors import (
    ContextLengthExceeded,
    EngineError,
    HeadraceError,
    InputFileError,
    InvalidParameter,
    RequestError,
    shorten,
)
from headrace.core.types import SamplingParams

if TYPE_CHECKING:
    from headrace.cli.conversation import Attached, Conversation, Turn

DEFAULT_MAX_TOKENS = 1024
NOT_SHOWN = frozenset({"n", "logprobs", "prompt_logprobs"})
"""Sampling fields that a conversation has no place for: they are neither flags nor settings."""
COMMANDS: Mapping[str, tuple[str, str]] = {
    "help": ("", "this list"),
    "new": ("", "forget the conversation"),
    "retry": ("", "answer the last message again"),
    "undo": ("", "take back the last message and its answer"),
    "system": ("[TEXT]", "show or set the system message (none: take it away)"),
    "set": ("[NAME VALUE]", "show or change how tokens are chosen"),
    "image": ("FILE", "a picture that goes with the next message"),
    "stats": ("", "tokens, times, and how much of the context is used"),
    "save": ("FILE", "write the messages to a new JSON file"),
    "quit": ("", "leave; Ctrl-D does the same"),
}
HINTS = (
    "Ctrl-C stops an answer; at the prompt it clears the line.",
    f"{FENCE} begins and ends a message of several lines; a \\ at the end of a line continues it.",
    "// at the start sends a message that starts with /.",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_engine_flags(parser, leave_out=("policy", "max_num_seqs", "allow_image_urls", "image_folder"))
    add_sampling_flags(parser, leave_out=("max_tokens", *NOT_SHOWN))
    parser.add_argument(
        "--max-tokens",
        type=int,
        metavar="N",
        default=DEFAULT_MAX_TOKENS,
        help=f"Most tokens of an answer, ≥ 1. Default: {DEFAULT_MAX_TOKENS}.",
    )
    parser.add_argument("--system", metavar="TEXT", help="The system message: how the model is to answer.")
    parser.add_argument(
        "--image", action="append", default=[], metavar="FILE", help="A picture for the first message. Repeatable."
    )
    parser.epilog = (
        "Lines typed at a terminal are kept in $XDG_STATE_HOME/headrace/history (or below ~/.local/state), readable by "
        "you alone."
    )


def run(arguments: argparse.Namespace) -> int:
    sampling = SamplingParams(**given(arguments, SamplingParams))
    if sys.stdin is None:
        raise InputFileError("stdin is closed, allowed: a terminal or a pipe")

    import_numpy(os.environ)
    from headrace.cli.conversation import Conversation, attach, check_can_talk
    from headrace.engine.model import OpenModel
    from headrace.engine.progress import loading

    with Signals() as signals:
        # Nobody else will join the batch: the KV cache needs to hold one conversation.
        opened = OpenModel(EngineConfig(**given(arguments, EngineConfig), max_num_seqs=1))
        with closing(opened):
            opened.begin()
            check_can_talk(opened, arguments.system)
            images = [attach(opened, name, "--image") for name in arguments.image]
            with loading(load_line_shown(os.environ)) as on_progress:
                core, _ = opened.start(on_progress)
            try:
                conversation = Conversation(opened, core, sampling, arguments.system)
                return Chat(conversation, signals, images).run()
            finally:
                core.close()


class Chat:
    """The loop: read a message, answer it or obey it."""

    def __init__(self, conversation: Conversation, signals: Signals, images: Sequence[Attached] = ()) -> None:
        """`images`: of the first message."""
        self._conversation = conversation
        self._signals = signals
        self._interactive = sys.stdin.isatty()
        self._decorated = self._interactive and sys.stdout.isatty()
        self._style = Style(self._decorated and wants_colour(sys.stdout, os.environ))
        history, names = History.of_user(os.environ), [f"/{name}" for name in COMMANDS]
        self._reader: Keys | Pipe = Keys(self._style, history, names) if self._interactive else Pipe()
        self._status = 0
        self._images = list(images)
        """Of the next message."""
        self._unanswered: tuple[str, tuple[Attached, ...]] | None = None

    def run(self) -> int:
        if self._interactive:
            self._greet()
        interrupts = 0
        while True:
            try:
                message = self._reader.read()
                if message is None or not self._handle(*message):
                    break
                interrupts = 0
            except KeyboardInterrupt:
                if not self._interactive:
                    raise
                interrupts += 1
                self._note("" if interrupts == 1 else self._style.dim("\nCtrl-D or /quit leaves."))
            except (RequestError, EngineError) as error:
                if self._conversation.core.error is not None:
                    raise
                self._complain(error)
        if self._interactive and message is None:
            self._note("")  # the prompt's line
        return self._status

    def _greet(self) -> None:
        from headrace.core.resolve import precision_text

        opened = self._conversation.opened
        config, path = opened.config, opened.checkpoint.path.resolve()
        origin = opened.checkpoint.origin
        from_hub = origin != str(opened.checkpoint.path)
        name = printable(origin if from_hub else path.name if path.is_dir() else path.stem)
        threads = f"{config.threads} thread" + ("s" if config.threads > 1 else "")
        how = (config.backend, precision_text(config), threads, f"context of {config.max_model_len} tokens")
        self._note(
            f"{self._style.bold(name)}\n"
            + self._style.dim(", ".join(how))
            + "\n"
            + "".join(self._style.dim(f"with the adapter {adapter}") + "\n" for adapter in opened.adapters)
            + "".join(self._style.dim(printable(note)) + "\n" for note in opened.checkpoint.notes)
            + self._style.dim("/help lists the commands, Ctrl-D leaves.")
            + "\n"
        )

    def _handle(self, text: str, may_be_command: bool) -> bool:
        """Whether to go on."""
        if not text.strip():
            return True
        if not may_be_command or not text.startswith("/") or text.startswith("//"):
            self._ask(text.removeprefix("/") if may_be_command else text)
            return True
        name, _, argument = text[1:].strip().partition(" ")
        if name == "quit":
            return False
        if name not in COMMANDS:
            from difflib import get_close_matches

            close = get_close_matches(name, COMMANDS, 1)
            hint = f"did you mean /{close[0]}?" if close else "/help lists them"
            raise RequestError(f"unknown command {shorten('/' + name)}: {hint} (// begins a plain message)")
        usage = COMMANDS[name][0]
        argument = argument.strip()
        if argument and not usage:
            raise RequestError(f"/{name} takes nothing more, got {shorten(argument)}")
        if not argument and usage and not usage.startswith("["):
            raise RequestError(f"/{name} needs {usage}")
        getattr(self, f"_{name}")(*([argument] if usage else []))
        return True

    # ------------------------------------------------------------ answers

    def _ask(self, text: str, images: Sequence[Attached] = ()) -> None:
        self._unanswered = message = text, (*images, *self._images)
        self._images.clear()
        if (turn := self._answer(message)) is not None:
            self._unanswered = None
            self._after(turn)

    def _answer(self, message: tuple[str, tuple[Attached, ...]] | None) -> Turn | None:
        """The next answer, shown as it comes; None: the last message's again."""
        talk, stopping, printer = self._conversation, self._signals.stopping, Printer()
        self._signals.begin_answer()
        try:
            if self._decorated:
                print(flush=True)
            with quiet_keys(sys.stdin):
                if message is None:
                    turn = talk.retry(printer.show, stopping)
                else:
                    turn = talk.ask(message[0], printer.show, stopping, message[1])
            printer.finish()
        finally:
            if printer.shown:
                printer.finish()
            self._signals.end_answer()
        if self._signals.interrupted and not self._interactive:
            raise KeyboardInterrupt
        if turn is None:
            kept = (
                "the message was taken back (/retry sends it again)" if message is not None else "the old answer stays"
            )
            self._remark(f"stopped before the first word; {kept}")
            if self._decorated:
                print()
        return turn

    def _after(self, turn: Turn) -> None:
        """What a reader should know of the answer's end."""
        used, most = turn.num_tokens, self._conversation.opened.limits.max_model_len
        if turn.stopped:
            self._remark("stopped")
        elif turn.completion.finish_reason == "length" and used >= most:
            self._remark(f"the context of {most} tokens is full: /undo takes back the last exchange, /new starts over")
        elif turn.completion.finish_reason == "length":
            self._remark(f"cut at {len(turn.completion.token_ids)} tokens: /set max_tokens N allows more")
        if self._decorated:
            print()

    # ------------------------------------------------------------ commands

    def _help(self) -> None:
        rows = [(f"/{name} {usage}".rstrip(), text) for name, (usage, text) in COMMANDS.items()]
        self._note(aligned(rows, self._style) + "\n\n" + self._style.dim("\n".join(HINTS)) + self._end)

    def _new(self) -> None:
        self._conversation.turns.clear()
        self._unanswered = None
        self._images.clear()
        self._note(f"The conversation is forgotten.{self._end}")

    def _retry(self) -> None:
        if self._unanswered is not None:
            self._ask(*self._unanswered)
            return
        if not self._conversation.turns:
            raise RequestError("there is nothing to answer again")
        if self._conversation.sampling.temperature == 0:
            self._remark("temperature is 0, so the answer stays the same: /set temperature 0.7 varies it")
        if (turn := self._answer(None)) is not None:
            self._after(turn)

    def _undo(self) -> None:
        turn = self._conversation.undo()
        self._note(f"Taken back: {printable(shorten(turn.user))}{self._end}")

    def _system(self, text: str) -> None:
        if text:
            self._conversation.set_system(None if text.lower() == "none" else text)
            self._note(f"It holds from the next answer on.{self._end}")
        else:
            self._note(printable(self._conversation.system or "No system message is set.") + self._end)

    def _set(self, argument: str) -> None:
        from headrace.cli.conversation import parse_setting

        talk = self._conversation
        names = [item.name for item in fields(SamplingParams) if item.name not in NOT_SHOWN]
        name, _, text = argument.partition(" ")
        name = name.replace("-", "_")
        if name and name not in names:
            raise InvalidParameter("field", name, ", ".join(names))
        if text.strip():
            talk.set_sampling(name, parse_setting(name, text.strip()))
        rows = [(each, spelled(getattr(talk.sampling, each))) for each in names if not name or each == name]
        self._note(aligned(rows, self._style) + self._end)

    def _image(self, name: str) -> None:
        from headrace.cli.conversation import attach

        opened = self._conversation.opened
        found = attach(opened, name, "/image")
        self._images.append(found)
        assert opened.limits.images is not None
        tokens = found.prepared.tiles * opened.limits.images.tokens_per_tile
        self._note(f"{printable(name)}, of {tokens} tokens, goes with the next message.{self._end}")

    def _stats(self) -> None:
        talk = self._conversation
        rows = []
        if talk.turns:
            last = talk.turns[-1].completion
            prompt, cached = len(last.prompt_token_ids), last.cached_tokens
            rate, ttft = last.decode_tokens_per_s, last.ttft_s
            rows = [
                ("prompt", f"{prompt} tokens, {cached} of them from the prefix cache"),
                ("answer", f"{len(last.token_ids)} tokens" + ("" if rate is None else f", {rate:.1f} tokens/s")),
                ("first token", "–" if ttft is None else f"after {ttft:.2f} s"),
            ]
        most = talk.opened.limits.max_model_len
        totals = talk.core.stats
        rows += [
            ("context", f"{talk.num_tokens} of {most} tokens used ({talk.num_tokens / most:.0%})"),
            ("session", f"{totals.computed_tokens} tokens computed, {totals.cached_tokens} reused"),
        ]
        self._note(aligned(rows, self._style) + self._end)

    def _save(self, name: str) -> None:
        from headrace.cli.conversation import messages_of

        talk = self._conversation
        messages = messages_of(talk.system, talk.turns, None, to_save=True)
        for message, turn in zip((each for each in messages if each["role"] == "assistant"), talk.turns, strict=True):
            if turn.stopped:
                message["stopped"] = True
        try:
            with Path(name).expanduser().open("x", encoding="utf-8") as file:
                file.write(json.dumps(messages, ensure_ascii=False, indent=2) + "\n")
        except (OSError, ValueError, RuntimeError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise RequestError(f"/save {shorten(name)}: {reason}") from error
        self._note(f"Written: {printable(name)}{self._end}")

    # ------------------------------------------------------------ what is said beside the answers

    @property
    def _end(self) -> str:
        return "\n" if self._decorated else ""

    def _note(self, text: str) -> None:
        """Answers alone go to a stdout that is no terminal."""
        sys.stdout.flush()
        print(text, file=sys.stdout if sys.stdout.isatty() else sys.stderr, flush=True)

    def _remark(self, text: str) -> None:
        lines = wrap(f"[{text}]", columns(sys.stdout)) if self._decorated else [f"[{text}]"]
        self._note("\n".join(self._style.dim(line) for line in lines))

    def _complain(self, error: HeadraceError) -> None:
        self._status = 0 if self._interactive else 1
        text = " ".join(str(error).split())
        if isinstance(error, ContextLengthExceeded):
            text = f"the context is full: {text}. Nothing is lost: /undo takes back the last exchange, /new starts over"
        if self._decorated:
            lines = wrap(printable(text), columns(sys.stdout))
            self._note("\n".join(self._style.bad(line) for line in lines) + "\n")
        else:
            sys.stdout.flush()
            print(f"headrace: error: {text}", file=sys.stderr, flush=True)


class Printer:
    """An answer on its way to stdout: a terminal gets it safe and wrapped, anything else as it is."""

    def __init__(self) -> None:
        self.shown = False
        self._finished = False
        self._wrapper = Wrapper(lambda: columns(sys.stdout)) if sys.stdout.isatty() else None

    def show(self, text: str) -> None:
        self.shown = True
        sys.stdout.write(text if self._wrapper is None else self._wrapper.push(printable(text)))
        sys.stdout.flush()

    def finish(self) -> None:
        """Ends the line, once."""
        if not self._finished:
            self._finished = True
            sys.stdout.write(("" if self._wrapper is None else self._wrapper.finish()) + "\n")
            sys.stdout.flush()


def aligned(rows: Sequence[tuple[str, str]], style: Style) -> str:
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{style.bold(name)}{' ' * (width - len(name))}  {text}" for name, text in rows)


def spelled(value: object) -> str:
    """As /set takes it."""
    return "none" if value is None else json.dumps(value, ensure_ascii=False)
