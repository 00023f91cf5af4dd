"""How a conversation is steered: keys of a terminal, lines of a pipe, and signals."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from functools import partial
from types import FrameType, TracebackType
from typing import Any, Self

from headrace.cli.console import History, Style
from headrace.core.errors import InputFileError

MAX_LINE_BYTES = 2**20
FENCE = '"""'
PROMPT, MORE = "> ", ". "


class Signals:
    """Ctrl-C raises only at the prompt; elsewhere it is noted, and the step in progress ends first.

    SIGTERM and SIGHUP leave with 128 + the signal's number, through every `finally`: the terminal is given back as it
    was. A second one ends the process at once.
    """

    def __init__(self) -> None:
        self.interrupted = False
        self._ending: int | None = None
        self._busy = False
        self._before: dict[int, Any] = {}
        self._outside: Any = None
        """What SIGINT does while nothing is answered."""

    def __enter__(self) -> Self:
        for number in (signal.SIGTERM, signal.SIGHUP):
            self._before[number] = signal.signal(number, self._end)
        if sys.stdin.isatty():
            # Whoever started us may have ignored it, and that is inherited; who types Ctrl-C here means us.
            self._before[signal.SIGINT] = signal.signal(signal.SIGINT, signal.default_int_handler)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def begin_answer(self) -> None:
        self._busy = True
        self.interrupted = False
        self._outside = signal.signal(signal.SIGINT, self._note)

    def end_answer(self) -> None:
        """Raises SystemExit if the answer was ended for that."""
        signal.signal(signal.SIGINT, self._outside)
        self._busy = False
        if self._ending is not None:
            raise SystemExit(128 + self._ending)

    def stopping(self) -> bool:
        return self.interrupted or self._ending is not None

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.interrupted = True

    def _end(self, number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)
        if not self._busy:
            raise SystemExit(128 + number)
        self._ending = number


class Keys:
    """Messages typed at a terminal. With readline where Python has it: editing, history, completion of commands."""

    def __init__(self, style: Style, history: History, commands: Sequence[str]) -> None:
        """`commands` are what the tab key completes."""
        self._style = style
        self._history = history
        self._last = ""
        self._readline: Any = None
        self._edits = sys.stdout.isatty()  # else the prompt must not go where the answers go
        sys.stdin.reconfigure(errors="surrogateescape")  # type: ignore[union-attr]
        if not self._edits:
            return
        try:
            import readline
        except ImportError:
            return
        self._readline = readline
        readline.set_auto_history(False)
        for line in history.read():
            readline.add_history(line)
        readline.set_completer_delims(" ")
        readline.set_completer(partial(completed, commands))
        libedit = "libedit" in (readline.__doc__ or "")
        if libedit:  # it counts the marks of a coloured prompt as characters
            self._style = Style(colour=False)
        readline.parse_and_bind("bind ^I rl_complete" if libedit else "tab: complete")

    def read(self) -> tuple[str, bool] | None:
        """(text, whether it may be a command); None at the end. Raises KeyboardInterrupt."""
        try:
            line = self._line(PROMPT)
        except EOFError:
            return None
        try:
            if line.lstrip().startswith(FENCE):
                return self._fenced(line.lstrip()[len(FENCE) :]), False
            text = line
            while text.endswith("\\"):
                text = text[:-1] + "\n" + self._line(MORE)
            return text, True
        except EOFError:
            raise KeyboardInterrupt from None  # an unfinished message is dropped, the conversation goes on

    def _fenced(self, text: str) -> str:
        while not text.rstrip().endswith(FENCE):
            text += "\n" + self._line(MORE)
        return text.rstrip()[: -len(FENCE)].strip("\n")

    def _line(self, prompt: str) -> str:
        if self._readline is not None:
            line = input(self._style.prompt(prompt))
        else:
            stream = sys.stdout if self._edits else sys.stderr
            print(self._style.bold(prompt), end="", file=stream, flush=True)
            line = sys.stdin.readline()
            if not line:
                raise EOFError
            line = line.removesuffix("\n")
        if self._readline is not None and line.strip() and line != self._last:
            self._last = line
            self._readline.add_history(line)
            self._history.add(line)
        return line


class Pipe:
    """One line, one message; empty lines are passed over."""

    def __init__(self) -> None:
        self._number = 0

    def read(self) -> tuple[str, bool] | None:
        """(text, True); None at the end. Raises InputFileError for a line that is none; the next one can be read."""
        while raw := sys.stdin.buffer.readline(MAX_LINE_BYTES + 1):
            self._number += 1
            if len(raw) > MAX_LINE_BYTES:
                while not raw.endswith(b"\n") and (raw := sys.stdin.buffer.readline(MAX_LINE_BYTES)):
                    pass
                raise InputFileError(f"stdin, line {self._number}: longer than {MAX_LINE_BYTES} bytes")
            try:
                text = raw.decode().removesuffix("\n").removesuffix("\r")
            except UnicodeDecodeError as error:
                raise InputFileError(f"stdin, line {self._number}: not UTF-8 at byte {error.start}") from None
            if text.strip():
                return text, True
        return None


def completed(commands: Sequence[str], text: str, index: int) -> str | None:
    """What readline asks for: the index-th command that begins so."""
    found = [name for name in commands if text and name.startswith(text)]
    return found[index] if index < len(found) else None
