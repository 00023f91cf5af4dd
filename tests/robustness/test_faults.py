"""Faults on the real kernels: each kind in each engine once; many with `python -m tests.robustness.faults`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.robustness import faults


@pytest.mark.demo
def test_only_the_request_at_fault_fails(demo_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert faults.main(["--steps", "9"]) == 0, capsys.readouterr().out
