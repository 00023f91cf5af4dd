"""The line that a terminal shows while a model loads."""

from __future__ import annotations

import io
import sys
import time

import pytest

from headrace.engine.progress import SHOWN_AFTER_S, loading


def shown_by(seconds: float, monkeypatch: pytest.MonkeyPatch) -> str:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    with loading(True) as advance:
        advance(0.3)
        time.sleep(seconds)
    return stream.getvalue()


def test_a_long_load_shows_a_line_that_is_gone_after(monkeypatch: pytest.MonkeyPatch) -> None:
    written = shown_by(SHOWN_AFTER_S + 0.4, monkeypatch)
    assert "reading weights" in written and "30" in written
    assert written.endswith("\r\x1b[2K")


def test_a_quick_load_shows_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shown_by(0.0, monkeypatch) == ""
