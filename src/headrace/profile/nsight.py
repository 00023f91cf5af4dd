"""Nsight Systems: the command line that records one of our ranges, and a run of it.

nsys begins to record where an NVTX range of the name given opens. It looks for names that the program has registered,
and ranges from Python are not: the environment variable lets it match the others as well. Without it no report comes.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from headrace.backends.ranges import SAMPLE, VISION
from headrace.core.errors import EngineError
from headrace.profile.ranges import DECODE, PREFILL

VARIABLE, VALUE = "NSYS_NVTX_PROFILER_REGISTER_ONLY", "0"
RANGES: Mapping[str, str] = {
    DECODE: "a step that computes answers only",
    PREFILL: "a step that computes prompt tokens",
    SAMPLE: "choosing the tokens of a step",
    VISION: "encoding images: models that read images only",
}
"""What can be recorded -> what it is."""
GRACE_S = 20.0
"""Seconds that nsys gets to write its report after Ctrl-C."""


def arguments(nsys: str, name: str, file: str, command: Sequence[str]) -> list[str]:
    """Records the range `name` of a command into FILE.nsys-rep."""
    return [
        nsys,
        "profile",
        *("-t", "cuda,nvtx,osrt,cudnn,cublas"),
        "--stats=true",
        "--force-overwrite=true",
        *("--capture-range", "nvtx"),
        *("--nvtx-capture", name),
        *("-o", file),
        *command,
    ]


def line(name: str, file: str, command: Sequence[str]) -> str:
    """The same for a shell, with the variable that makes it work."""
    words = [f'"{word}"' if word == name else shlex.quote(word) for word in arguments("nsys", name, file, command)]
    return " ".join([f"{VARIABLE}={VALUE}", *words])


def lines(command: Sequence[str]) -> list[str]:
    """For each range, what it is and the command line."""
    found = []
    for name, what in RANGES.items():
        found += [f"# {name}: {what}", line(name, name.replace(".", "-"), command)]
    return found


def record(nsys: str, name: str, file: str, command: Sequence[str], environment: Mapping[str, str]) -> Path:
    """Runs nsys, which shows what it and the command print. -> its report.

    It ends the command where the range ends first, whence the report tells of success and not the status. Raises
    EngineError if there is none; on KeyboardInterrupt nsys and the command are ended too.
    """
    report = Path(f"{file}.nsys-rep")
    before = _written_ns(report)
    child = subprocess.Popen(
        arguments(nsys, name, file, command), env={**environment, VARIABLE: VALUE}, start_new_session=True
    )
    try:
        status = child.wait()
    except BaseException:
        _end(child)
        raise
    if _written_ns(report) == before:
        raise EngineError(
            f"nsys ended with status {status} and wrote no report: no range {name} was opened, unless it says "
            "otherwise above (NVTX ranges come from the torch backend where torch is built for CUDA)"
        )
    return report


def _end(child: subprocess.Popen[bytes]) -> None:
    """All that nsys has started are in its session."""
    for kind in (signal.SIGINT, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(child.pid, kind)
        with suppress(subprocess.TimeoutExpired):
            child.wait(GRACE_S)
            return


def _written_ns(path: Path) -> int | None:
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return None
