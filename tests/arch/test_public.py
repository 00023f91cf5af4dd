"""The public names are the documented ones, and asking for them, or for help, is quick and pulls in nothing heavy."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

import headrace
from tests.arch.rules import PACKAGE, REPO

HEAVY = frozenset({"numpy", "torch", "transformers", "tokenizers", "jinja2", "rich", "safetensors"})
COMMAND = str(Path(sys.executable).with_name("headrace"))


def documented_names(readme: str) -> set[str]:
    """The names in the first column of the table under `## Public names`."""
    section = readme.split("## Public names", 1)[1].split("\n## ", 1)[0]
    return set(re.findall(r"^\| `(\w+)` \|", section, flags=re.MULTILINE))


def test_all_is_what_the_readme_lists() -> None:
    assert len(headrace.__all__) == len(set(headrace.__all__))
    assert set(headrace.__all__) == documented_names((REPO / "README.md").read_text(encoding="utf-8"))


def test_documented_names_reads_one_section() -> None:
    readme = "| `A` | no |\n## Public names\n| `B` | yes |\n| `C` | yes |\n## Other\n| `D` | no |\n"
    assert documented_names(readme) == {"B", "C"}


def test_readme_commands_parse() -> None:
    """Every `headrace ...` line in a shell block of the README names a command and flags that exist."""
    from headrace.cli.main import build_parser

    blocks = re.findall(r"```sh\n(.*?)```", (REPO / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    lines = re.findall(r"^headrace (.+)$", "".join(blocks), flags=re.MULTILINE)
    assert lines
    for line in lines:
        assert build_parser().parse_args(shlex.split(line, comments=True)).run
    with pytest.raises(SystemExit):
        build_parser().parse_args(["generate", "demo", "--no-such-flag"])


def missing_paths(page: str) -> list[str]:
    """What the page names as a file or a folder of the package (`a/b.py`, `a/`) and is not there."""
    named = re.findall(r"`([a-z_]+(?:/[a-z_]+)*/(?:[a-z_]+\.py)?)`", page)
    assert named
    return [path for path in named if not (PACKAGE / path).exists() and not (REPO / path).exists()]


def test_map_names_what_exists() -> None:
    page = (REPO / "docs" / "MAP.md").read_text(encoding="utf-8")
    assert missing_paths(page) == []
    rooms = {folder.name for folder in PACKAGE.iterdir() if (folder / "__init__.py").exists()}
    assert set(re.findall(r"^\| `(\w+)/` \|", page, flags=re.MULTILINE)) == rooms


def test_missing_path_is_noticed() -> None:
    assert missing_paths("`core/types.py`, `core/`, `core/attic.py` and `attic/`") == ["core/attic.py", "attic/"]


@pytest.mark.parametrize("name", headrace.__all__)
def test_public_name_resolves(name: str) -> None:
    assert getattr(headrace, name) is not None
    assert name in dir(headrace)


def test_unknown_name() -> None:
    with pytest.raises(AttributeError, match="module 'headrace' has no attribute 'LMM'"):
        headrace.LMM  # noqa: B018
    with pytest.raises(ImportError):
        from headrace import LMM  # noqa: F401


def test_version_is_the_installed_one() -> None:
    from importlib.metadata import version

    assert version("headrace") == headrace.__version__


def modules_of(arguments: Sequence[str]) -> set[str]:
    """Top-level modules that a Python process imports."""
    done = subprocess.run([sys.executable, "-X", "importtime", *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    return {line.rsplit("|", 1)[1].strip().split(".")[0] for line in done.stderr.splitlines() if "|" in line}


def seconds(command: Sequence[str]) -> float:
    """The shortest of five runs: what the command takes where nothing else disturbs it."""
    times = []
    for _ in range(5):
        start = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True, timeout=60)
        times.append(time.perf_counter() - start)
    return min(times)


@pytest.mark.parametrize("arguments", [("-c", "import headrace"), (COMMAND, "--help")], ids=["import", "help"])
def test_start_pulls_in_nothing_heavy(arguments: Sequence[str]) -> None:
    found = modules_of(arguments)
    assert "headrace" in found
    assert not found & HEAVY


def test_heavy_module_is_noticed() -> None:
    assert "numpy" in modules_of(("-c", "import numpy"))


def test_import_is_quick() -> None:
    bare = seconds((sys.executable, "-c", "pass"))
    assert seconds((sys.executable, "-c", "import headrace")) - bare < 0.15


def test_help_is_quick() -> None:
    assert seconds((COMMAND, "--help")) < 0.3
