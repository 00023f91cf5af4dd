"""What a GPU must show, stage by stage, each in a few minutes and with its JSON written after every row:

    PYTHONPATH=src python3 -m benchmarks.gpu_check [--stage kernels] [--out FOLDER] [--minutes 4] [--seed N] [--dry-run]

    kernels   each kernel against float64 on fresh random inputs; its time beside the library's and the card's limits
              (several processes compile ahead: Triton's cache then serves the other stages as well)
    parity    tests/parity/test_gpu.py, every model on the card
    decode    Llama-2-7B's shape: tokens of one request, prompts, forms of weights, Python's share, a trace
    batch     64 requests of 512 + 512 tokens beside transformers, continuous and static
    flover    Flover's experiments 3 and 7
    vlm72b    NVLM-D-72B's shape on one card, the study's four questions

From the source tree, with torch ≥ 2.11, triton, numpy, transformers, safetensors, tokenizers and pytest; nothing is
installed. Weights are random, shapes are true. Each stage runs in processes of its own: a kernel that takes the device
down costs its row, and the next process goes on behind it. --dry-run: tiny shapes on the CPU, kernels in Triton's
interpreter: every line runs, no figure means anything.

Exit status: 0 all rows met what they must; 1 a row missed, failed or was not run; 2 no CUDA device, or bad arguments.
"""

from __future__ import annotations

import argparse
import importlib
import os
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from benchmarks.gpu_check.rows import WAITING, DeviceLost, Report, Row, summary, table

ROOT = Path(__file__).resolve().parents[2]
STAGES = ("kernels", "parity", "decode", "batch", "flover", "vlm72b")
NO_DEVICE, LOST = 2, 3
WORKING = 0.95
"""Share of a stage's time in which rows are measured; the rest is for a process to end by itself."""
COMPILED = "kernels"
"""The stage that compiles more than it measures."""
COMPILE_SHARE = 0.4
"""Of its time, at most, before anything is measured."""
MOST_COMPILERS = 8
"""Processes; each holds memory of the device."""
RESTART_S = 20.0
"""With less left no further process is started."""


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="benchmarks.gpu_check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stage", action="append", choices=STAGES, help="may be given several times; all if not")
    parser.add_argument("--out", type=Path, default=Path("gpu-check"), help="folder of the JSON files (gpu-check)")
    parser.add_argument("--minutes", type=float, default=4.0, help="most of a stage (4)")
    parser.add_argument("--seed", type=int, help="of all random inputs; drawn and printed if not given")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU: no figures")
    parser.add_argument("--end", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--share", type=int, nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not 0 < arguments.minutes < 1e6:
        parser.error(f"--minutes: got {arguments.minutes:g}, allowed: a number above 0")
    if arguments.seed is None:
        arguments.seed = secrets.randbits(31)
    elif not 0 <= arguments.seed < 2**31:
        parser.error(f"--seed: got {arguments.seed}, allowed: 0 to {2**31 - 1}")
    if arguments.end is not None:
        return child(arguments)
    arguments.out.mkdir(parents=True, exist_ok=True)
    wanted = tuple(dict.fromkeys(arguments.stage or STAGES))
    codes = []
    # Of a dry run the import of torch takes longer than most stages: one process runs them all.
    for stages in [wanted] if arguments.dry_run else [(stage,) for stage in wanted]:
        codes.append(supervise(stages, arguments))
        if codes[-1] == NO_DEVICE:
            break
    return max(codes)


# ---------------------------------------------------------------- the process that is seen


def supervise(stages: Sequence[str], arguments: argparse.Namespace) -> int:
    """Runs the stages' processes, one after the other, until all is done or their time is over. -> exit status"""
    paths = {stage: arguments.out / f"{stage}.json" for stage in stages}
    for path in paths.values():
        path.unlink(missing_ok=True)
    began, limit_s = time.time(), 60 * arguments.minutes * len(stages)
    end_s, killed_s = began + WORKING * limit_s, began + limit_s
    print(f"{', '.join(stages)}: at most {arguments.minutes:g} min each, seed {arguments.seed}", flush=True)
    code = start(stages, arguments, end_s, killed_s)
    known = -1
    while code not in (0, NO_DEVICE) and end_s - time.time() > RESTART_S:
        done = sum(row.status != WAITING for path in paths.values() for row in rows_of(path))
        if done == known:
            break  # a process ended before it came to a row
        known = done
        code = start(stages, arguments, end_s, killed_s)
    if code == NO_DEVICE:
        return code
    if code != 0:
        print(f"{', '.join(stages)}: the last process ended with status {code}", file=sys.stderr)
    good = [tell(stage, path) for stage, path in paths.items()]
    return 0 if code == 0 and all(good) else 1


def tell(stage: str, path: Path) -> bool:
    """Prints a stage's rows. -> whether all were measured and none missed what it must reach"""
    rows = rows_of(path)
    print(table(rows))
    print(f"{stage}: {summary(rows)}; {path}\n", flush=True)
    return bool(rows) and all(row.status == "ok" and row.met is not False for row in rows)


def compile_ahead(arguments: argparse.Namespace, end_s: float) -> None:
    """Several processes run a share of the kernels' rows once each, so that what they compile is in Triton's cache when
    rows are measured. Whatever goes wrong in them goes wrong again, and is told, where rows are measured."""
    count = max(1, min(MOST_COMPILERS, (os.cpu_count() or 1) // 2))
    with tempfile.TemporaryDirectory() as folder:
        started = []
        for index in range(count):
            command, environment = prepare((COMPILED,), arguments, Path(folder) / str(index), end_s)
            (Path(folder) / str(index)).mkdir()
            command += ["--share", str(index), str(count)]
            nowhere = subprocess.DEVNULL
            started.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=nowhere, stderr=nowhere))
        for process in started:
            try:
                process.wait(max(0.1, end_s - time.time()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def start(stages: Sequence[str], arguments: argparse.Namespace, end_s: float, killed_s: float) -> int:
    """One process to its end; at `killed_s` it is killed. -> its exit status"""
    command, environment = prepare(stages, arguments, arguments.out.resolve(), end_s)
    try:
        limit_s = max(1.0, killed_s - time.time())
        return subprocess.run(command, cwd=ROOT, env=environment, timeout=limit_s).returncode
    except subprocess.TimeoutExpired:
        return LOST


def prepare(
    stages: Sequence[str], arguments: argparse.Namespace, out: Path, end_s: float
) -> tuple[list[str], dict[str, str]]:
    """Command line and environment of a process that measures."""
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--out", str(out)]
    command += [word for stage in stages for word in ("--stage", stage)]
    command += ["--seed", str(arguments.seed), "--end", str(end_s), *(["--dry-run"] if arguments.dry_run else [])]
    paths = [str(ROOT / "src"), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    interpret = "1" if arguments.dry_run else "0"  # before triton is imported
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "TRITON_INTERPRET": interpret}
    environment["HF_HUB_OFFLINE"] = "1"
    return command, environment


def rows_of(path: Path) -> list[Row]:
    """What the file of a stage has by now. A row in which a process ended has failed."""
    report = Report(path, "", {}, False, 0.0)
    report.load()
    return list(report.rows.values())


# ---------------------------------------------------------------- the process that measures


def child(arguments: argparse.Namespace) -> int:
    """Stages, or what is left of them. -> 0, NO_DEVICE or LOST"""
    import torch

    if not arguments.dry_run and not torch.cuda.is_available():
        print(f"no CUDA device (torch {torch.__version__}): --dry-run runs every stage on the CPU", file=sys.stderr)
        return NO_DEVICE
    from benchmarks.gpu_check.bench import Bench, card_facts

    if arguments.dry_run:
        torch.set_num_threads(1)
    facts = card_facts(arguments.dry_run, arguments.seed)
    for stage in arguments.stage:
        torch.manual_seed(arguments.seed)
        report = Report(arguments.out / f"{stage}.json", stage, facts, arguments.dry_run, arguments.end)
        report.load()
        if stage == COMPILED and not (arguments.dry_run or arguments.share or report.rows):
            compile_ahead(arguments, time.time() + COMPILE_SHARE * report.left_s())
        report.write()
        share, shares = arguments.share or (0, 1)
        bench = Bench(arguments.dry_run, arguments.seed, arguments.out, report, arguments.share is not None)
        cases = importlib.import_module(f"benchmarks.gpu_check.{stage}").cases(bench)[share::shares]
        try:
            with _interpreter(arguments.dry_run):
                report.run(cases, bench.after_failure)
        except DeviceLost as error:
            print(f"{stage}: the device is lost to this process ({error}); another goes on", file=sys.stderr)
            return LOST
        bench.close()
    return 0


def _interpreter(dry: bool) -> AbstractContextManager[object]:
    """What Triton's interpreter needs to count loops with a new numpy."""
    if not dry:
        return nullcontext()
    from tests.triton_interpreter import loops_run

    return loops_run()


if __name__ == "__main__":
    sys.exit(main())
