"""What the commands share of a terminal: colours, safe text, wrapping, the history file."""

from __future__ import annotations

import io
import json
import os
import pty
import stat
import termios
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.cli.console import (
    MAX_HISTORY,
    PIPED_WIDTH,
    History,
    Style,
    Wrapper,
    cell_width,
    columns,
    printable,
    quiet_keys,
    wants_colour,
)
from headrace.cli.keys import completed


class Tty(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("environ", "terminal", "piped"),
    [
        ({"TERM": "xterm"}, True, False),
        ({}, False, False),
        ({"TERM": "dumb"}, False, False),
        ({"TERM": "xterm", "NO_COLOR": "1"}, False, False),
        ({"TERM": "xterm", "NO_COLOR": ""}, True, False),
        ({"TERM": "xterm", "FORCE_COLOR": "1"}, True, True),
        ({"TERM": "dumb", "FORCE_COLOR": "1"}, True, True),
        ({"TERM": "xterm", "FORCE_COLOR": "0"}, False, False),
        ({"TERM": "xterm", "FORCE_COLOR": "1", "NO_COLOR": "1"}, False, False),
    ],
)
def test_colour_where_it_is_wanted(environ: dict[str, str], terminal: bool, piped: bool) -> None:
    assert wants_colour(Tty(), environ) is terminal
    assert wants_colour(io.StringIO(), environ) is piped


def test_style() -> None:
    assert Style(colour=True).bold("x") == "\x1b[1mx\x1b[0m" and Style(colour=True).dim("") == ""
    plain = Style(colour=False)
    assert {plain.bold("x"), plain.dim("x"), plain.good("x"), plain.bad("x"), plain.warn("x"), plain.prompt("x")} == {
        "x"
    }


def test_printable_leaves_nothing_that_a_terminal_obeys() -> None:
    every = "".join(map(chr, range(0x100)))
    kept = printable(every)
    assert not any(ord(char) < 0x20 and char not in "\n\t" for char in kept)
    assert not any(0x7F <= ord(char) < 0xA0 for char in kept)
    assert len(kept) == 256 - 30 - 33
    assert printable("a\x1b[2J\x9b31mb\r\x07\x08c 日本 🙂") == "a[2J31mbc 日本 🙂"


TEXT = st.text(st.sampled_from("ab  \n\t日é`-"), max_size=80)


@given(TEXT, st.integers(4, 12), st.lists(st.integers(0, 80), max_size=4))
def test_wrapping_moves_only_spaces_and_does_not_depend_on_the_pieces(text: str, width: int, cuts: list[int]) -> None:
    whole = Wrapper(lambda: width)
    expected = whole.push(text) + whole.finish()
    assert "".join(expected.split()) == "".join(text.split())
    pieces = Wrapper(lambda: width)
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    out = "".join(pieces.push(text[a:b]) for a, b in pairwise(edges))
    assert out + pieces.finish() == expected
    if "```" not in text:
        for line in expected.split("\n"):
            long = any(sum(map(cell_width, word)) > width for word in line.split())
            indented = line.startswith(" ")
            assert long or indented or sum(map(cell_width, line)) <= width, (line, width)


def test_wrapping_of_prose_and_code() -> None:
    text = "one two three\nfour\n\n```python\nsome long line of code\n```\nfive six seven\n\n"
    wrapper = Wrapper(lambda: 9)
    assert wrapper.push(text) + wrapper.finish() == (
        "one two\nthree\nfour\n\n```python\nsome long line of code\n```\nfive six\nseven"
    )
    wide = Wrapper(lambda: 5)
    assert wide.push("日本語です") == "日本\n語で\nす"


def test_words_appear_when_they_are_whole() -> None:
    wrapper = Wrapper(lambda: 80)
    assert [wrapper.push(piece) for piece in ("Hel", "lo", " wor", "ld.", "\n")] == ["", "", "Hello", "", " world."]
    assert wrapper.finish() == ""


def test_width_of_what_is_no_terminal() -> None:
    assert columns(io.StringIO()) == PIPED_WIDTH


def test_quiet_keys_gives_the_terminal_back() -> None:
    main, other = pty.openpty()
    try:
        with os.fdopen(other, "r") as stream:
            before = termios.tcgetattr(stream.fileno())
            with pytest.raises(RuntimeError), quiet_keys(stream):
                assert not termios.tcgetattr(stream.fileno())[3] & termios.ECHO
                raise RuntimeError
            assert termios.tcgetattr(stream.fileno()) == before
    finally:
        os.close(main)
    with quiet_keys(io.StringIO()):
        pass


def test_history_is_kept_bounded_and_private(tmp_path: Path) -> None:
    history = History.of_user({"XDG_STATE_HOME": str(tmp_path)})
    assert history.read() == []
    for line in ("one", "two\nlines", "größe \udc80"):
        history.add(line)
    path = tmp_path / "headrace" / "history"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert history.read() == ["one", "two\nlines", "größe \udc80"]

    path.chmod(0o644)
    with path.open("a") as file:
        file.write('not JSON\n5\n"esc \\u001b[2J"\n')
        file.writelines(json.dumps(f"line {i}") + "\n" for i in range(2 * MAX_HISTORY))
    assert history.read() == [f"line {i}" for i in range(MAX_HISTORY, 2 * MAX_HISTORY)]
    assert len(path.read_text().splitlines()) == MAX_HISTORY and list(path.parent.iterdir()) == [path]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_history_that_cannot_be_kept_is_no_failure(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for history in (
        History(tmp_path / "file" / "history"),
        History(tmp_path),
        History(None),
        History(Path("/dev/null")),
    ):
        history.add("one")
        assert history.read() == []
    os.mkfifo(tmp_path / "fifo")
    History(tmp_path / "fifo").add("does not wait for a reader")
    assert stat.S_IMODE(Path("/dev/null").stat().st_mode) != 0o600


def test_relative_state_folder_is_ignored(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    History.of_user({"XDG_STATE_HOME": "relative"}).add("one")
    assert (tmp_path / ".local" / "state" / "headrace" / "history").is_file()


def test_completion_of_commands() -> None:
    names = ["/help", "/set", "/save"]
    assert [completed(names, "/s", index) for index in range(3)] == ["/set", "/save", None]
    assert completed(names, "s", 0) is None and completed(names, "", 0) is None
