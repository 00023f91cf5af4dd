"""Where the time goes: a short fixed workload, its named ranges in a table, and a trace to look at."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from contextlib import closing
from dataclasses import fields
from typing import TYPE_CHECKING

from headrace.cli.console import print_notes, printable
from headrace.cli.flags import add_engine_flags, given
from headrace.core.config import EngineConfig
from headrace.core.errors import InvalidParameter

if TYPE_CHECKING:
    from headrace.pages.files import ReportFile
    from headrace.profile.run import Work

MAX_TOP = 10_000
NOT_TORCH = frozenset({"backend", "instruction_set"})
"""Settings that make no sense for the backend whose ranges Nsight Systems sees."""

NO_NSYS = (
    "Nsight Systems (nsys) is not on the PATH. Where it is, this records a decode step (other ranges: --nsys-command). "
    "The NVTX ranges come from the torch backend where torch is built for CUDA."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("work")
    group.add_argument(
        "--prompt-tokens", type=int, metavar="N", default=128, help="Of each prompt: random token ids. Default: 128."
    )
    group.add_argument(
        "--max-tokens", type=int, metavar="N", default=32, help="Of each answer: exactly so many. Default: 32."
    )
    group.add_argument(
        "--requests", type=int, metavar="N", default=4, help="All at once, in one running batch. Default: 4."
    )
    group = parser.add_argument_group("what is shown")
    group.add_argument(
        "--top", type=int, metavar="N", default=10, help="Single layers' slowest parts that are listed. Default: 10."
    )
    group.add_argument(
        "--trace", metavar="FILE.json", help="Write every range to FILE.json, for ui.perfetto.dev or chrome://tracing."
    )
    group.add_argument(
        "--nsys",
        metavar="FILE",
        help="Have Nsight Systems record a headrace.decode step to FILE.nsys-rep; where nsys is not installed, profile "
        "without it and print its command line. NVTX ranges come from the torch backend where torch is built for CUDA.",
    )
    group.add_argument(
        "--nsys-command", action="store_true", help="Only print the command lines of Nsight Systems, one a range."
    )
    add_engine_flags(parser, leave_out=("policy", "adapters"))


def run(arguments: argparse.Namespace) -> int:
    from headrace.profile.run import Work

    work = Work(arguments.prompt_tokens, arguments.max_tokens, arguments.requests)
    if not 0 <= arguments.top <= MAX_TOP:
        raise InvalidParameter("top", arguments.top, f"an integer from 0 to {MAX_TOP}")
    if arguments.nsys is not None and arguments.trace is not None:
        raise InvalidParameter("nsys", arguments.nsys, "no --trace beside it: nsys ends the command after one step")
    if arguments.nsys_command:
        show_commands(arguments)
        return 0
    nsys = shutil.which("nsys")
    if arguments.nsys is not None:
        file = writable("nsys", f"{arguments.nsys}.nsys-rep")
        if nsys is not None:
            return record(arguments, nsys, file.path.removesuffix(".nsys-rep"))
    return show_profile(arguments, work, nsys is None)


def show_profile(arguments: argparse.Namespace, work: Work, tell_nsys: bool) -> int:
    trace_file = None if arguments.trace is None else writable("trace", arguments.trace)
    # torch's profiler tells stderr that it begins and ends; a user who has set a level has it.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")

    from headrace.compare.progress import progress_line
    from headrace.engine.model import OpenModel
    from headrace.pages.terminal import console
    from headrace.profile.run import profile
    from headrace.profile.table import show
    from headrace.profile.trace import trace_json

    opened = OpenModel(EngineConfig(**given(arguments, EngineConfig)))
    with closing(opened), progress_line() as progress:
        print_notes(opened.checkpoint)
        found = profile(opened, work, progress)
        if trace_file is not None:
            progress("writing the trace")
            trace_file.write(trace_json(found))
    out = console()
    show(found, arguments.top, out)
    if trace_file is not None:
        print(f"\nWritten: {printable(trace_file.path)} (open it at ui.perfetto.dev or in chrome://tracing)")
    if tell_nsys:
        out.print("\n" + NO_NSYS)
        show_commands(arguments, only_first=True)
    return 0


def record(arguments: argparse.Namespace, nsys: str, file: str) -> int:
    from headrace.profile import nsight
    from headrace.profile.ranges import DECODE

    own = [sys.executable, "-m", "headrace.cli.main", *command_of(arguments)]
    report = nsight.record(nsys, DECODE, file, own, os.environ)
    print(f"Written: {printable(str(report))}")
    return 0


def show_commands(arguments: argparse.Namespace, only_first: bool = False) -> None:
    from headrace.profile import nsight

    lines = nsight.lines(["headrace", *command_of(arguments)])
    for line in lines[1:2] if only_first else lines:
        print(printable(line))


def command_of(arguments: argparse.Namespace) -> list[str]:
    """This command, as Nsight Systems is to run it: the same work, on the backend that opens NVTX ranges."""
    from headrace.engine.hardware import probe_hardware

    words = ["profile", arguments.model]
    for name in ("prompt_tokens", "max_tokens", "requests"):
        words += [flag(name), str(getattr(arguments, name))]
    set_here = given(arguments, EngineConfig)
    dropped = NOT_TORCH | {"model"}
    if set_here.get("device") == "cpu" or probe_hardware().gpu is None:
        dropped |= {"quant"}  # on a CPU torch has plain weights alone
    for item in fields(EngineConfig):
        if item.name in dropped or item.name not in set_here:
            continue
        value = set_here[item.name]
        if isinstance(value, bool):
            words.append(flag(item.name) if value else "--no-" + flag(item.name)[2:])
        else:
            words += [flag(item.name), str(value)]
    return [*words, "--backend", "torch"]


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def writable(field: str, path: str) -> ReportFile:
    """Raises InvalidParameter before the work, where the file cannot be written after it."""
    from headrace.pages.files import ReportFile

    return ReportFile(field, path)
