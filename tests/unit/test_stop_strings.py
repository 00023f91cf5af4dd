"""StopStrings against a plain search of the whole text."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.text.stop import StopStrings


def plain_search(text: str, stops: list[str]) -> tuple[str, bool]:
    """Reads character by character: the first stop string that is complete cuts the text before it."""
    for end in range(1, len(text) + 1):
        lengths = [len(stop) for stop in stops if text[:end].endswith(stop)]
        if lengths:
            return text[: end - max(lengths)], True
    return text, False


def run(pieces: list[str], stops: list[str]) -> tuple[str, bool]:
    finder = StopStrings(stops)
    out, stopped = "", False
    for piece in pieces:
        safe, stopped = finder.push(piece)
        out += safe
    return out + finder.finish(), stopped


small_text = st.text("ab\n", max_size=6)


@settings(max_examples=600, deadline=None)
@given(st.lists(small_text, max_size=12), st.lists(st.text("ab\n", min_size=1, max_size=5), max_size=4))
def test_equal_to_whole_text_search_for_any_split(pieces: list[str], stops: list[str]) -> None:
    assert run(pieces, stops) == plain_search("".join(pieces), stops)


@settings(max_examples=300, deadline=None)
@given(st.lists(small_text, max_size=12), st.lists(st.text("ab\n", min_size=1, max_size=5), min_size=1, max_size=4))
def test_holds_back_only_what_could_become_a_stop_string(pieces: list[str], stops: list[str]) -> None:
    finder = StopStrings(stops)
    text, out = "", ""
    for piece in pieces:
        safe, stopped = finder.push(piece)
        text, out = text + piece, out + safe
        if stopped:
            assert finder.push("ab") == ("", True)
            assert finder.finish() == ""
            return
        held = text[len(out) :]
        assert text.startswith(out)
        assert held == "" or any(stop.startswith(held) and stop != held for stop in stops)
        longest = max((n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
        assert len(held) == longest


@pytest.mark.parametrize(
    ("stops", "pieces", "expected"),
    [
        ([], ["abc", ""], ("abc", False)),
        (["\n\n"], ["one\n", "\ntwo"], ("one", True)),
        (["\n\n"], ["one\n", "two\n"], ("one\ntwo\n", False)),
        (["aab"], ["aaa", "b"], ("a", True)),
        (["abXcd", "X"], ["ab", "Xcd"], ("ab", True)),
        (["STOP", "TOP"], ["xSTO", "P"], ("x", True)),
        (["👩‍🚀"], ["hi 👩", "\u200d", "🚀!"], ("hi ", True)),
        (["a", "a"], ["a"], ("", True)),
    ],
)
def test_examples(stops: list[str], pieces: list[str], expected: tuple[str, bool]) -> None:
    assert run(pieces, stops) == expected


def test_long_text_in_linear_time() -> None:
    rng = random.Random(7)
    text = "".join(rng.choices("ab ", k=200_000)) + "<|end|>"
    out, stopped = run(list(text), ["<|end|>", "bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb", "zzz"])
    assert stopped and out == text[:-7]
