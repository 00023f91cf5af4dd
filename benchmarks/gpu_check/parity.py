"""Stage parity: on the card, the models' parity tests and the suite of every backend, run by pytest, counted by
outcome."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from benchmarks.gpu_check.bench import ROOT, Bench
from benchmarks.gpu_check.rows import Case, Figure, Target

TESTS: Mapping[str, Path] = {
    "parity tests": ROOT / "tests" / "parity" / "test_gpu.py",
    "the suite of every backend": ROOT / "tests" / "parity" / "gpu_conformance.py",
}
"""By row."""
STAND_IN = """
import pytest

def test_passes():
    pass

def test_is_skipped():
    pytest.skip("it is")
"""
"""Of a dry run, where no GPU is: what is counted is known."""
MOST_TOLD = 40
"""Names of failed tests in the row."""
RESERVE_S = 10.0
LEAVE_S = 6.0
"""For an interrupted pytest to write what it knows."""
MOST_WORKERS = 8
"""Processes of pytest, where pytest-xdist is there; each holds memory of the device."""


@dataclass(slots=True)
class Counts:
    passed: int = 0
    skipped: int = 0
    seconds: float = 0.0
    failed: dict[str, str] = field(default_factory=dict)
    """Name -> first line of what was wrong."""


def cases(bench: Bench) -> list[Case]:
    return [
        Case(
            name,
            f"{tests.relative_to(ROOT)}; value: tests that passed, ratio: of those that ran",
            partial(_figure, bench, tests),
            Target(1.0),
            20,
            judged_dry=True,
        )
        for name, tests in TESTS.items()
    ]


def _figure(bench: Bench, tests: Path) -> Figure:
    if bench.dry:
        tests = bench.out / "test_stand_in.py"
        tests.write_text(STAND_IN, encoding="utf-8")
    if not tests.exists():
        raise FileNotFoundError(f"{tests.relative_to(ROOT)} is not there")
    log, results = (bench.out / f"{tests.stem}.{kind}" for kind in ("log", "xml"))
    results.unlink(missing_ok=True)
    code = run_pytest(tests, results, log, bench.report.left_s() - RESERVE_S, bench.dry)
    if not results.exists():
        raise RuntimeError(f"pytest wrote no results (status {code}): {_tail(log)}")
    found = read_counts(results)
    ran = found.passed + len(found.failed)
    if not ran:
        raise RuntimeError(f"no test ran: {found.skipped} skipped (status {code}): {_tail(log)}")
    names = dict(list(found.failed.items())[:MOST_TOLD])
    note = f"{found.passed} passed, {len(found.failed)} failed, {found.skipped} skipped in {found.seconds:.0f} s"
    if code is None:
        note += "; its time was up before the last test (the one it was in is counted as passed)"
    if names:
        note += f"; failed: {', '.join(names)}"
    # Of tests that never ran nothing is known: without them there is no verdict but a bad one.
    ratio = None if code is None and not names else found.passed / ran
    return Figure([found.passed], "tests", ran, ratio, note, {"failed": names, "status": code})


def run_pytest(tests: Path, results: Path, log: Path, limit_s: float, dry: bool) -> int | None:
    """pytest in a process of its own, without the project's options, for its plug-ins may not be there. -> its status

    None: it was interrupted at the limit; it then still wrote what it knew, if it could.
    """
    options = ["-o", "addopts=", "-o", "filterwarnings=default", "-o", "timeout=0", "--import-mode=importlib"]
    command = [sys.executable, "-m", "pytest", str(tests), *options, "-q", "-p", "no:cacheprovider"]
    command += [f"--junit-xml={results}", "--tb=short"]
    if dry:  # it lies outside of the project
        command += ["--rootdir", str(tests.parent), "-c", os.devnull]
    elif find_spec("xdist") is not None:  # compiling is most of it
        command += ["-n", str(max(1, min(MOST_WORKERS, (os.cpu_count() or 1) // 2)))]
    with log.open("w", encoding="utf-8") as stream:
        process = subprocess.Popen(command, cwd=ROOT, env=_environment(dry), stdout=stream, stderr=subprocess.STDOUT)
        try:
            return process.wait(max(1.0, limit_s))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                process.wait(LEAVE_S)
            return None
        finally:
            process.kill()
            process.wait()


def _environment(dry: bool) -> Mapping[str, str]:
    """On the card the kernels themselves run, and not the interpreter."""
    return {**os.environ, "TRITON_INTERPRET": "1" if dry else "0"}


def read_counts(results: Path) -> Counts:
    """Of a JUnit file as pytest writes it. A test that fails in itself and while it is taken down counts once."""
    found = Counts()
    for suite in ElementTree.parse(results).getroot().iter("testsuite"):
        found.seconds += float(suite.get("time", 0))
        for test in suite.iter("testcase"):
            name = f"{test.get('classname', '')}::{test.get('name', '')}"
            faults = [*test.findall("failure"), *test.findall("error")]
            if faults:
                found.failed[name] = (faults[0].get("message") or "").partition("\n")[0][:200]
            elif test.find("skipped") is not None:
                found.skipped += 1
            else:
                found.passed += 1
    return found


def _tail(log: Path) -> str:
    return log.read_text(encoding="utf-8", errors="replace")[-500:].strip().replace("\n", " | ")
