"""Short forms of what attacks a server by what it sends (tests/robustness has the long ones)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.robustness import fuzz, grammars, poison, surface, text_integrity
from tests.robustness.attack_client import FLAGS
from tests.robustness.score import Score, Target, own_server


@pytest.fixture(scope="module")
def target(demo_path: Path) -> Iterator[Target]:
    with own_server("demo", *FLAGS) as running:
        yield running


def test_bad_requests_are_refused_and_harm_nothing(target: Target) -> None:
    score = Score("fuzz")
    fuzz.attack(target, score, 300)
    assert score.passed, told(score)


def test_hostile_values_do_not_reach_other_requests(target: Target) -> None:
    score = Score("poison")
    poison.attack(target, score, 80, 20)
    assert score.passed, told(score)


def test_costly_grammars_are_bounded(target: Target) -> None:
    """Without the gaps between tokens: those of a few seconds on a busy machine say little."""
    score = Score("grammars")
    grammars.attack(target, score, 28, 20, idle_s=0)
    assert score.passed, told(score)


def test_streams_are_the_whole_answer(target: Target) -> None:
    score = Score("text integrity")
    text_integrity.attack(target, score, 40)
    assert score.passed, told(score)


def test_nobody_comes_in_without_the_key(demo_path: Path) -> None:
    score = Score("surface")
    with own_server("demo", *surface.FLAGS) as locked:
        surface.judge_sockets(score, locked, "before")
        surface.judge_keys(score, locked)
        surface.judge_sockets(score, locked, "after")
    assert score.passed, told(score)


def test_what_needs_no_server() -> None:
    """Keys are compared in constant time, nothing runs what it reads, and the engine takes no frame that is none."""
    score = Score("surface")
    surface.judge_timing(score, 20_000)
    surface.judge_source(score)
    surface.judge_frames(score, 300)
    assert score.passed, told(score)


def told(score: Score) -> str:
    """What failed, with the first cases."""
    return "\n".join([score.failures, *score.notes])
