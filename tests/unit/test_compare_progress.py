"""The line that says what `headrace compare` is doing: drawn only when it is told something, and gone at the end."""

from __future__ import annotations

import io
import threading

import pytest

from headrace.compare.progress import ERASE, Estimate, clock_text, line_of, progress_line


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_terminal_has_one_line_that_is_gone_at_the_end() -> None:
    stream, clock = Terminal(), Clock()
    threads = threading.active_count()
    with progress_line(stream, clock=clock) as progress:
        progress("loading: serial")
        clock.now += 65
        progress("round 1 of 3: fused\x1b[31m\nmore")
        assert threading.active_count() == threads
    first, second, last = stream.getvalue().split(ERASE)[1:]
    assert first == "loading: serial · 0:00 elapsed"
    assert second == "round 1 of 3: fused\N{REPLACEMENT CHARACTER}[31m more · 1:05 elapsed"
    assert last == "" and stream.getvalue().endswith(ERASE)


def test_the_line_goes_also_where_the_work_breaks_off() -> None:
    stream = Terminal()
    with pytest.raises(ValueError), progress_line(stream) as progress:
        progress("loading: serial")
        raise ValueError
    assert stream.getvalue().endswith(ERASE)


def test_where_nobody_watches_it_is_silent_or_a_log() -> None:
    clock = Clock()
    silent, log = io.StringIO(), io.StringIO()
    with progress_line(silent, clock=clock) as progress:
        progress("warm-up: serial")
    with progress_line(log, log=True, clock=clock) as progress:
        progress("warm-up: serial")
        clock.now += 3700
        progress("scoring the answers")
    assert silent.getvalue() == ""
    assert log.getvalue() == "[0:00] warm-up: serial\n[1:01:40] scoring the answers\n"


def test_what_is_left_follows_the_last_whole_round() -> None:
    clock = Clock()
    estimate = Estimate(clock)
    told = []
    for number in (1, 2, 3):
        for name, seconds in (("serial", 6.0), ("fused", 2.0 * number), ("serial", 6.0)):
            told.append(estimate.remaining_s(f"round {number} of 3: {name}"))
            clock.now += seconds
    # The first round took 14 s, the second 16 s.
    assert told == [None, None, None, 28.0, 22.0, 18.0, 16.0, 10.0, 4.0]
    clock.now += 100
    assert estimate.remaining_s("round 3 of 3: serial") == 0.0
    assert estimate.remaining_s("scoring the answers") is None


def test_a_line_never_wraps() -> None:
    pieces = ["round 1 of 3: fused", "0:07 elapsed", "about 1:00 left"]
    assert line_of(pieces, 80) == "round 1 of 3: fused · 0:07 elapsed · about 1:00 left"
    assert line_of(pieces, 40) == "round 1 of 3: fused · 0:07 elapsed"
    assert line_of(pieces, 10) == "round 1 o…"
    assert all(len(line_of(pieces, width)) <= width for width in range(1, 80))


def test_clock() -> None:
    assert [clock_text(seconds) for seconds in (0.4, 59.6, 3599, 3600, 36061)] == [
        "0:00",
        "1:00",
        "59:59",
        "1:00:00",
        "10:01:01",
    ]
