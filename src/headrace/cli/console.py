"""What the commands share of a terminal: colours where they are wanted, safe text, wrapped lines, the line of history.

What a model or a file says is not trusted: `printable` takes out what a terminal would obey.
"""

from __future__ import annotations

import json
import os
import stat
import sys
import termios
import unicodedata
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from headrace.weights.checkpoint import Checkpoint

MAX_HISTORY = 1000
MAX_HISTORY_BYTES = 4 * 2**20
PIPED_WIDTH = 100
_CONTROLS: Mapping[int, None] = {
    code: None for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in ("\n", "\t")
}
_FENCE = "```"
_TAB = 8


class Style:
    """Styled text, or the same text plain."""

    def __init__(self, colour: bool) -> None:
        self.colour = colour

    def _sgr(self, code: str, text: str) -> str:
        return f"\x1b[{code}m{text}\x1b[0m" if self.colour and text else text

    def bold(self, text: str) -> str:
        return self._sgr("1", text)

    def dim(self, text: str) -> str:
        return self._sgr("2", text)

    def good(self, text: str) -> str:
        return self._sgr("32", text)

    def bad(self, text: str) -> str:
        return self._sgr("31", text)

    def warn(self, text: str) -> str:
        return self._sgr("35", text)

    def prompt(self, text: str) -> str:
        """Bold, with the marks that tell readline which characters take no room."""
        return f"\x01\x1b[1m\x02{text}\x01\x1b[0m\x02" if self.colour else text


def wants_colour(stream: TextIO, environ: Mapping[str, str]) -> bool:
    """NO_COLOR wins over FORCE_COLOR (both count if not empty), and that over what the stream is."""
    if environ.get("NO_COLOR"):
        return False
    if environ.get("FORCE_COLOR"):
        return environ["FORCE_COLOR"] != "0"
    return obeys_codes(stream, environ)


def obeys_codes(stream: TextIO, environ: Mapping[str, str]) -> bool:
    """Whether this is a terminal that knows escape sequences."""
    return stream.isatty() and environ.get("TERM", "dumb") != "dumb"


def printable(text: str) -> str:
    """Without control characters (C0, DEL, C1) other than newline and tab: nothing is left that a terminal obeys."""
    return text.translate(_CONTROLS)


def columns(stream: TextIO) -> int:
    """The terminal's width; a fixed one where nobody watches."""
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80
    except (OSError, ValueError):
        return PIPED_WIDTH


def cell_width(char: str) -> int:
    """Columns that a character takes on a terminal: 0, 1 or 2."""
    if char < "\x7f":
        return 1
    if unicodedata.category(char) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(char) in ("W", "F") else 1


class Wrapper:
    """Breaks streamed text between words, so that no word is cut at the terminal's edge.

    The last word is held back until it is known to be whole, and line ends until something follows them (many answers
    end in some). Lines between ``` fences stay as they are.
    """

    def __init__(self, width: Callable[[], int]) -> None:
        self._width = width
        self._column = 0
        self._lines = 0
        self._spaces = 0
        self._word = ""
        self._word_width = 0
        self._at_start = True
        self._fenced = False

    def push(self, text: str) -> str:
        """What can be shown now."""
        out: list[str] = []
        for char in text:
            if char in "\n \t":
                out.append(self._place())
                self._space(char)
                continue
            width = cell_width(char)
            if width == 2:  # a break is allowed around such a character
                out.append(self._place())
            self._word += char
            self._word_width += width
            if width == 2 or self._word_width >= self._width():
                out.append(self._place())
        return "".join(out)

    def finish(self) -> str:
        """The word that was held back."""
        return self._place()

    def _space(self, char: str) -> None:
        if char == "\n":
            self._lines += 1
            self._column = self._spaces = 0
            self._at_start = True
        else:
            self._spaces += 1 if char == " " else _TAB - (self._column + self._spaces) % _TAB

    def _place(self) -> str:
        if not self._word:
            return ""
        if self._at_start and self._word.startswith(_FENCE):
            self._fenced = not self._fenced
        self._at_start = False
        if not self._fenced and self._column and self._column + self._spaces + self._word_width > self._width():
            before, self._column = "\n", 0
        else:
            before = "\n" * self._lines + " " * self._spaces
            self._column += self._spaces
        word, self._column = self._word, self._column + self._word_width
        self._word, self._word_width, self._spaces, self._lines = "", 0, 0, 0
        return before + word


@contextmanager
def quiet_keys(stream: TextIO) -> Iterator[None]:
    """Keys are not echoed inside (they would mix with what is printed); what was typed is kept for the next line."""
    try:
        fd = stream.fileno()
        before = termios.tcgetattr(fd)
    except (ValueError, OSError, termios.error):
        yield
        return
    changed = [*before]
    changed[3] &= ~termios.ECHO
    try:
        termios.tcsetattr(fd, termios.TCSANOW, changed)
        yield
    finally:
        with suppress(termios.error):  # the terminal may be gone
            termios.tcsetattr(fd, termios.TCSANOW, before)


def state_folder(environ: Mapping[str, str]) -> Path | None:
    """`$XDG_STATE_HOME/headrace`, or below ~/.local/state: what commands keep. None: the user has no home."""
    state = environ.get("XDG_STATE_HOME", "")
    if not state.startswith("/"):  # the specification: a relative one is to be ignored
        try:
            state = str(Path.home() / ".local" / "state")
        except RuntimeError:
            return None
    return Path(state) / "headrace"


class History:
    """Lines typed in earlier sessions: a file of one JSON string a line, for its owner's eyes only, bounded.

    Nothing here ever fails: a history that cannot be kept is no reason to stop a conversation.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path

    @classmethod
    def of_user(cls, environ: Mapping[str, str]) -> History:
        """The file `history` of the user's state folder."""
        folder = state_folder(environ)
        return cls(None if folder is None else folder / "history")

    def read(self) -> list[str]:
        """The last lines, oldest first. A file that has grown over its bound is cut."""
        lines: list[str] = []
        if self._path is None:
            return lines
        with suppress(OSError):
            if not self._path.is_file():
                return lines
            with self._path.open("rb") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(max(0, size - MAX_HISTORY_BYTES))
                raw = file.read().splitlines()
            lines = [line for line in map(_decoded, raw) if line is not None]
            if len(raw) > MAX_HISTORY or size > MAX_HISTORY_BYTES:
                lines = lines[-MAX_HISTORY:]
                self._rewrite(self._path, lines)
        return lines

    def add(self, line: str) -> None:
        """Appends at once, so that neither a second session nor a killed one loses anything."""
        if self._path is None:
            return
        with suppress(OSError):
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._write(self._path, os.O_APPEND, [line])

    def _rewrite(self, path: Path, lines: list[str]) -> None:
        beside = path.with_name(f"{path.name}.{os.getpid()}")
        self._write(beside, os.O_TRUNC, lines)
        beside.replace(path)

    def _write(self, path: Path, flag: int, lines: list[str]) -> None:
        # Not blocking: to open a named pipe would wait for a reader.
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NONBLOCK | flag, 0o600)
        with os.fdopen(fd, "w", encoding="ascii") as file:
            if stat.S_ISREG(os.fstat(fd).st_mode):  # it may be a link to /dev/null
                os.fchmod(fd, 0o600)
            file.write("".join(json.dumps(line) + "\n" for line in lines))


def _decoded(raw: bytes) -> str | None:
    """A line of the history file; None for one that is not ours."""
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    return printable(value) if isinstance(value, str) and value else None


def print_notes(checkpoint: Checkpoint) -> None:
    """On stderr: the commit of a model from the Hub, and what the user should know of how its weights are read."""
    if checkpoint.origin != str(checkpoint.path):
        print("headrace: model", printable(checkpoint.origin), file=sys.stderr)
    for note in checkpoint.notes:
        print("headrace: note:", printable(note), file=sys.stderr)


def load_line_shown(environ: Mapping[str, str]) -> bool:
    """Whether stderr can show the line of `engine.progress.loading`."""
    return obeys_codes(sys.stderr, environ)


def import_numpy(environ: MutableMapping[str, str]) -> None:
    """Imports numpy without the threads of its matrix library, for which headrace has no product: one for each core,
    they spin for some 30 ms, on the cores that are to read the model."""
    name = "OPENBLAS_NUM_THREADS"
    if name in environ:
        return
    environ[name] = "1"
    try:
        import_module("numpy")
    finally:
        # Other programs that this one starts are to have theirs.
        del environ[name]
