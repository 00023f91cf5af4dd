"""The real command, killed: a few times here; many times with `python -m tests.robustness.batch_kill`."""

from __future__ import annotations

import random
import signal
from collections.abc import Iterator

import pytest

from tests.robustness import batch_kill
from tests.robustness.batch_kill import Case


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    yield Case(tmp_path_factory.mktemp("batch"), 200, random.Random(18))


def test_killed_at_random_points(case: Case) -> None:
    batch_kill.kill_randomly(case, 4)


def test_killed_inside_a_write(case: Case) -> None:
    batch_kill.tear_writes(case, 2)


def test_a_full_disk(case: Case) -> None:
    batch_kill.limit_file_size(case, len(case.expected[0]) // 3)


def test_another_input_and_other_settings_are_refused(case: Case) -> None:
    batch_kill.change_input(case)


def test_two_at_once(case: Case) -> None:
    batch_kill.run_two(case)


def test_stopped(case: Case) -> None:
    batch_kill.interrupt(case, signal.SIGTERM)
