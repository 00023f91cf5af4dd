"""Short forms of the scripts that hurt a running server; their full forms are `make robustness`."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest

from tests.robustness import deadlines, disconnects, drain, engine_kills, overload, slow_clients

SCRIPTS = (disconnects, slow_clients, overload, deadlines, engine_kills, drain)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__.rpartition(".")[2])
def test_short_form(script: ModuleType, demo_path: Path) -> None:
    """What failed is in the lines that it printed."""
    assert script.main(["--short", "--flag=--threads=1"]) == 0
