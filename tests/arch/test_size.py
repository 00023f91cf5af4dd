"""File ≤ 500 lines (kernels 800), function ≤ 80; exceptions, with their reasons, are in pyproject.toml."""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator, Mapping

import pytest

from tests.arch.rules import FUNCTIONS, REPO

MOST_IN_FILE = 500
MOST_IN_KERNEL_FILE = 800
MOST_IN_FUNCTION = 80
FOLDERS = ("src", "tests", "benchmarks")


def functions(tree: ast.AST, outer: str = "") -> Iterator[tuple[str, int]]:
    """(qualified name, lines) of every function; a function's lines include those nested in it."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (*FUNCTIONS, ast.ClassDef)):
            name = f"{outer}{node.name}"
            if isinstance(node, FUNCTIONS):
                yield name, (node.end_lineno or node.lineno) - node.lineno + 1
            yield from functions(node, f"{name}.")
        else:
            yield from functions(node, outer)


def too_long(sources: Mapping[str, str]) -> tuple[dict[str, int], dict[str, int]]:
    """path -> text  ->  the files over their limit, and the functions ("path::name")."""
    files, long_functions = {}, {}
    for path, text in sources.items():
        lines = len(text.splitlines())
        if lines > (MOST_IN_KERNEL_FILE if "/kernels/" in path else MOST_IN_FILE):
            files[path] = lines
        for name, length in functions(ast.parse(text)):
            if length > MOST_IN_FUNCTION:
                long_functions[f"{path}::{name}"] = length
    return files, long_functions


def complaints(found: Mapping[str, int], listed: Mapping[str, str]) -> list[str]:
    unlisted = [f"{name}: {lines} lines" for name, lines in found.items() if name not in listed]
    unneeded = [f"{name}: listed in pyproject.toml, needed no longer" for name in listed if name not in found]
    unexplained = [f"{name}: listed without a reason" for name, reason in listed.items() if not reason.strip()]
    return unlisted + unneeded + unexplained


def test_sizes() -> None:
    listed = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["headrace"]["size"]
    paths = [path for folder in FOLDERS for path in sorted((REPO / folder).rglob("*.py"))]
    assert paths
    sources = {path.relative_to(REPO).as_posix(): path.read_text(encoding="utf-8") for path in paths}
    files, long_functions = too_long(sources)
    found = complaints(files, listed["files"]) + complaints(long_functions, listed["functions"])
    assert not found, "\n".join(found)


@pytest.mark.parametrize(("path", "lines", "reported"), [("a.py", 500, False), ("a.py", 501, True)])
def test_long_file_is_reported(path: str, lines: int, reported: bool) -> None:
    assert (path in too_long({path: "x = 1\n" * lines})[0]) is reported


@pytest.mark.parametrize(("lines", "reported"), [(800, False), (801, True)])
def test_kernels_may_be_longer(lines: int, reported: bool) -> None:
    path = "src/headrace/backends/torch/kernels/a.py"
    assert (path in too_long({path: "x = 1\n" * lines})[0]) is reported


@pytest.mark.parametrize(("lines", "reported"), [(80, False), (81, True)])
def test_long_function_is_reported(lines: int, reported: bool) -> None:
    text = "class A:\n    async def f(self):\n" + "        x = 1\n" * (lines - 1)
    assert ("a.py::A.f" in too_long({"a.py": text})[1]) is reported


def test_exceptions_are_needed_and_explained() -> None:
    assert complaints({"a.py": 600}, {"a.py": "one table"}) == []
    assert complaints({"a.py": 600}, {}) == ["a.py: 600 lines"]
    assert complaints({}, {"a.py": "one table"}) == ["a.py: listed in pyproject.toml, needed no longer"]
    assert complaints({"a.py": 600}, {"a.py": " "}) == ["a.py: listed without a reason"]
