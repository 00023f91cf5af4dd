"""`make gpu-check` where no GPU is: a dry run of every stage, and what becomes of rows that fail, hang or kill."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.gpu_check import __main__ as program
from benchmarks.gpu_check.batch import CONTINUOUS, STATIC
from benchmarks.gpu_check.bench import Bench
from benchmarks.gpu_check.engine import GROUP, LINEARS, Buffer, llama, random_tensors
from benchmarks.gpu_check.flover import EXPERIMENT_3, EXPERIMENT_7, busy_iterations, nearest_draw, one_at_a_time
from benchmarks.gpu_check.parity import read_counts, run_pytest
from benchmarks.gpu_check.rows import (
    DRY,
    ENDED,
    NO_TIME,
    WAITING,
    Case,
    DeviceLost,
    Figure,
    Report,
    Row,
    Target,
    summary,
    table,
)
from benchmarks.gpu_check.tools import EXACT, Pair, right
from benchmarks.gpu_check.trace import step_times
from benchmarks.gpu_check.vlm72b import nvlm

from headrace.compare.flover import published
from headrace.core.sizing import weight_bytes
from tests.unit.vision_cases import NVLM_D, nvlm_shapes

ROOT = Path(__file__).resolve().parents[2]
ROW = frozenset(Row.__dataclass_fields__)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "benchmarks.gpu_check", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def read(path: Path) -> Mapping[str, Any]:
    def no_constant(name: str) -> float:
        raise AssertionError(f"{name} is no JSON")

    return dict(json.loads(path.read_text(encoding="utf-8"), parse_constant=no_constant))


# ---------------------------------------------------------------- whole stages


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """Of all stages: the folder of their files, and how it went."""
    folder = tmp_path_factory.mktemp("gpu-check")
    return folder, run("--dry-run", "--out", str(folder), "--seed", "7", "--minutes", "2")


@pytest.mark.parametrize("stage", program.STAGES)
def test_dry_run_of_each_stage(stage: str, dry_run: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, done = dry_run
    found = read(folder / f"{stage}.json")
    assert (found["stage"], found["seed"], found["dry_run"]) == (stage, 7, True)
    assert found["versions"]["torch"] and found["date"] and found["card"].startswith("none")
    assert found["rows"]
    for row in found["rows"]:
        assert row.keys() == ROW
        assert row["status"] == "ok" and row["note"].startswith(DRY), row
        assert row["name"][:62] in done.stdout
        # What is right or wrong is so in a dry run, too; no time is.
        assert row["met"] is (True if row["name"].endswith(": right") or stage == "parity" else None)
    if stage == "decode":
        assert (folder / "decode_trace.json.gz").stat().st_size < 2**20
    if stage == "batch":
        names = {row["name"] for row in found["rows"]}
        assert {f"headrace over {other}, first round" for other in (CONTINUOUS, STATIC)} <= names


def test_dry_run_as_a_whole(dry_run: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    _, done = dry_run
    assert done.returncode == 0, done.stdout + done.stderr
    assert "seed 7" in done.stdout and "MISSED" not in done.stdout


def test_without_a_device_it_says_so(tmp_path: Path) -> None:
    """And nothing has been imported that a machine with a bare torch lacks."""
    code = (
        "import sys; import benchmarks.gpu_check.kernels, benchmarks.gpu_check.batch, benchmarks.gpu_check.vlm72b, "
        "benchmarks.gpu_check.flover, benchmarks.gpu_check.decode, benchmarks.gpu_check.parity; "
        "import headrace.backends.torch.gpu.backend; from benchmarks.gpu_check.__main__ import main; "
        "print([m for m in ('rich', 'pydantic', 'fastapi', 'msgspec', 'gguf', 'jinja2', 'PIL', 'llguidance') "
        "if m in sys.modules]); sys.exit(main())"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT / "src"), str(ROOT))), "TRITON_INTERPRET": "1"}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    command = [sys.executable, "-c", code, "--stage", "kernels", "--out", str(tmp_path), "--end", "9e9"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout.strip()) == (2, "[]"), done.stdout + done.stderr
    assert "no CUDA device" in done.stderr and "--dry-run" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_no_device_is_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all stages, and the exit status."""
    starts: list[Sequence[str]] = []
    monkeypatch.setattr(program, "start", lambda *given: starts.append(given[0]) or program.NO_DEVICE)
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--out", str(tmp_path / "new")])
    assert program.main() == 2
    assert starts == [("kernels",)]


@pytest.mark.parametrize("given", [["--minutes", "0"], ["--minutes", "nan"], ["--seed", "-1"], ["--stage", "speed"]])
def test_bad_arguments(given: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--out", str(tmp_path), *given])
    with pytest.raises(SystemExit) as stopped:
        program.main()
    assert stopped.value.code == 2


# ---------------------------------------------------------------- rows


def report(path: Path, left_s: float = 60.0, dry: bool = False) -> Report:
    return Report(path / "stage.json", "stage", {"card": "some"}, dry, time.time() + left_s)


def raises(error: BaseException) -> Callable[[], Figure]:
    def run() -> Figure:
        raise error

    return run


def test_a_row_that_raises_costs_itself_alone(tmp_path: Path) -> None:
    after: list[str] = []
    mine = report(tmp_path)
    cases = [
        Case("good", "", lambda: Figure([3.0, 1.0, 2.0], "ms", 1.0, 0.5), Target(0.4)),
        Case("bad", "", raises(ValueError("it is broken"))),
        Case("missed", "", lambda: Figure([1.0], "ms", ratio=0.5), Target(0.4, most=True)),
        Case("no number", "", lambda: Figure([math.nan], "ms", math.inf, math.nan), Target(0.4)),
    ]
    mine.run(cases, lambda: after.append("looked"))
    good, bad, missed, nothing = read(mine.path)["rows"]
    assert (good["median"], good["low"], good["high"], good["n"], good["met"]) == (2.0, 1.0, 3.0, 3, True)
    assert bad["status"] == "failed" and "ValueError: it is broken" in bad["error"] and "test_gpu_check" in bad["error"]
    assert missed["met"] is False and nothing["met"] is False
    assert after == ["looked"]
    shown = table(list(mine.rows.values()))
    assert "MISSED" in shown and "it is broken" in shown and "2 ms" in shown
    assert summary(list(mine.rows.values())) == "4 rows: 1 met, 2 missed, 1 failed"


def test_the_file_has_each_row_as_soon_as_it_is_there(tmp_path: Path) -> None:
    mine = report(tmp_path)
    seen: list[list[str]] = []

    def look() -> Figure:
        seen.append([row["status"] for row in read(mine.path)["rows"]])
        return Figure([1.0], "s")

    mine.run([Case("a", "", look), Case("b", "", look)])
    assert seen == [["running", WAITING], ["ok", "running"]]
    assert [path.name for path in tmp_path.iterdir()] == ["stage.json"]


def test_rows_past_the_time_say_so(tmp_path: Path) -> None:
    mine = report(tmp_path, left_s=0.3)

    def swallow() -> Figure:
        """As an engine does, which takes an exception for a fault of a request."""
        while True:
            try:
                time.sleep(0.01)
            except Exception:
                continue

    cases = [
        Case("too long", "", lambda: Figure([1.0], "s"), None, 100),
        Case("hangs", "", swallow, None, 0.1),
        Case("after", "", lambda: Figure([1.0], "s"), None, 0.1),
        Case("reads others", "", lambda: Figure(mine.samples("x") or [2.0], "s"), None, 0),
    ]
    before = signal.getsignal(signal.SIGALRM)
    mine.run(cases)
    assert [row.status for row in mine.rows.values()] == [NO_TIME, NO_TIME, NO_TIME, "ok"]
    assert signal.getsignal(signal.SIGALRM) is before


def test_a_second_process_goes_on_behind_the_row_that_ended_the_first(tmp_path: Path) -> None:
    first = report(tmp_path)
    figure = Figure([math.inf, 1.0], "s")
    names = ["a", "b", "c"]

    def lost() -> None:
        raise DeviceLost

    runs = {"a": lambda: figure, "b": raises(RuntimeError("illegal memory access")), "c": lambda: figure}
    cases = [Case(name, "", runs[name]) for name in names]
    with pytest.raises(DeviceLost):
        first.run(cases, lost)
    assert [row.status for row in first.rows.values()] == ["ok", "failed", WAITING]
    again = report(tmp_path)
    again.load()
    assert again.rows["a"].samples == [math.inf, 1.0] and again.samples("a") == [math.inf, 1.0]
    again.run(cases, lost)
    assert [row.status for row in again.rows.values()] == ["ok", "failed", "ok"]
    assert "illegal" in again.rows["b"].error


def test_a_row_in_which_the_process_died_has_failed(tmp_path: Path) -> None:
    mine = report(tmp_path)
    mine.put(Case("fatal", "", lambda: Figure([], "s")), "running")
    (row,) = program.rows_of(mine.path)
    assert (row.status, row.error) == ("failed", ENDED)
    assert program.rows_of(tmp_path / "none.json") == []


def test_a_dry_run_judges_no_figure(tmp_path: Path) -> None:
    mine = report(tmp_path, dry=True)
    figure = Figure([1.0], "ms", ratio=9.0)
    target = Target(1.0, most=True)
    mine.run([Case("fast", "", lambda: figure, target), Case("right", "", lambda: figure, target, judged_dry=True)])
    assert [row.met for row in mine.rows.values()] == [None, False]
    assert all(row.note == DRY for row in mine.rows.values())


def test_samples_of_rounds(tmp_path: Path) -> None:
    mine = report(tmp_path)
    for name, value in (("round 1: x", 1.0), ("round 2: x", 2.0), ("round 1: y", 3.0)):
        mine.run([Case(name, "", lambda value=value: Figure([value], "s"))])
    assert mine.samples("x") == [1.0, 2.0] and mine.samples("z") == []


# ---------------------------------------------------------------- processes


def arguments(tmp_path: Path, minutes: float) -> Any:
    class Given:
        out, seed, dry_run = tmp_path, 1, True

    Given.minutes = minutes
    return Given


def test_processes_are_started_until_the_stage_is_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first two die in a row each, the third ends."""
    codes = iter([-11, program.LOST, 0])

    def start(stages: Sequence[str], given: Any, end_s: float, killed_s: float) -> int:
        mine = report(tmp_path)
        mine.path = tmp_path / "kernels.json"
        mine.load()
        code = next(codes)
        mine.put(Case(f"row {code}", "", lambda: Figure([], "s")), "running" if code else "ok")
        return code

    monkeypatch.setattr(program, "start", start)
    assert program.supervise(("kernels",), arguments(tmp_path, 4)) == 1
    assert [row.status for row in program.rows_of(tmp_path / "kernels.json")] == ["failed", "failed", "ok"]
    assert "3 rows: 1 without a verdict, 2 failed" in capsys.readouterr().out


def test_a_stage_that_dies_before_its_first_row_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    starts: list[float] = []
    monkeypatch.setattr(program, "start", lambda *given: starts.append(given[2]) or 1)
    assert program.supervise(("kernels",), arguments(tmp_path, 4)) == 1
    assert len(starts) == 2


def test_a_process_past_its_time_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sleeper = tmp_path / "sleeper"
    sleeper.write_text("#!/bin/sh\nexec sleep 60\n")
    sleeper.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(sleeper))
    began = time.monotonic()
    assert program.start(("kernels",), arguments(tmp_path, 1), time.time(), time.time() + 0.1) == program.LOST
    assert time.monotonic() - began < 30


def test_compiling_ahead_takes_no_longer_than_it_may(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every process has a share of the rows and a folder of its own; one that is not through is killed."""
    told = tmp_path / "told"
    told.mkdir()
    slow = tmp_path / "slow"
    slow.write_text(f'#!/bin/sh\necho "$@" > {told}/$$\ncase "$*" in *"--share 0"*) exec sleep 60;; esac\n')
    slow.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(slow))
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    began = time.monotonic()
    program.compile_ahead(arguments(tmp_path, 1), time.time() + 1)
    assert time.monotonic() - began < 30
    lines = sorted((path.read_text().split() for path in told.iterdir()), key=lambda words: words[-2])
    assert [words[-3:] for words in lines] == [["--share", str(i), "3"] for i in range(3)]
    assert len({words[words.index("--out") + 1] for words in lines}) == 3


def test_a_pytest_past_its_time_still_tells_what_it_knows(tmp_path: Path) -> None:
    tests = tmp_path / "test_slow.py"
    tests.write_text("import time\ndef test_a(): pass\ndef test_b(): assert 0\ndef test_c(): time.sleep(60)\n")
    results = tmp_path / "x.xml"
    assert run_pytest(tests, results, tmp_path / "log", 8.0, dry=True) is None
    found = read_counts(results)
    # pytest writes the test that it was in like one that passed.
    assert found.passed == 2 and list(found.failed) == ["test_slow::test_b"]


# ---------------------------------------------------------------- parts


def test_what_is_right() -> None:
    """Relative to the tolerance of the type; NaN only where it is meant, everything where bits must agree."""
    wanted = torch.tensor([3.0, 4.0], dtype=torch.float64)
    off = torch.tensor([3.0, 4.0 + 5e-5], dtype=torch.float32)
    nan = torch.tensor([3.0, math.nan])
    assert Pair("", off, wanted).excess == pytest.approx(1e-5 / 2e-5, rel=0.02)
    assert Pair("", off, wanted, 1e-6).excess == pytest.approx(10, rel=0.02)
    assert Pair("", off, wanted, EXACT).excess == math.inf
    assert Pair("", wanted.float(), wanted, EXACT).excess == 0
    assert Pair("", nan, wanted).excess == math.inf and Pair("", off, nan).excess == math.inf
    assert Pair("", nan, nan).excess == 0
    assert Pair("", off[:1], wanted).excess == math.inf


def test_a_wrong_kernel_is_seen(tmp_path: Path) -> None:
    bench = Bench(True, 1, tmp_path, report(tmp_path, dry=True))
    good, bad = torch.ones(4), torch.tensor([1.0, 1.0, 1.0, 1.1])
    case = right(bench, "kernel", "", lambda dtype: [Pair("x", good, good), Pair("y", bad, good)])
    bench.report.run([case])
    (row,) = bench.report.rows.values()
    assert (row.status, row.met) == ("ok", False)
    assert "wrong: float32 y, float16 y" in row.note


def test_flover_is_as_published() -> None:
    three, seven = published.EXPERIMENT_3, published.EXPERIMENT_7
    for gap, (iterations, speed_up) in EXPERIMENT_3.items():
        assert three["total iterations"].values[gap] == iterations
        assert three["speed-up"].values[gap] == speed_up
    for (requests, lengths), gaps in EXPERIMENT_7.items():
        name = f"{requests} requests, {'512' if lengths == 'fixed' else 'random'}"
        for gap, (trt, flover) in gaps.items():
            assert seven[f"{name}, TensorRT-LLM"].values[gap] == trt
            assert seven[f"{name}, Flover"].values[gap] == flover


@pytest.mark.parametrize("gap", EXPERIMENT_3)
def test_draws_are_near_the_published_one(gap: int) -> None:
    iterations, speed_up = EXPERIMENT_3[gap]
    arrivals = nearest_draw(gap, iterations, 3)
    assert arrivals[0] == 0 and arrivals == sorted(arrivals) and len(arrivals) == 32
    assert busy_iterations(arrivals) == pytest.approx(iterations, rel=0.005)
    # An engine whose iterations do not get longer is as fast as that, or faster, against one request at a time.
    fused = arrivals[-1] + published.SINGLE_S * 1e3
    assert one_at_a_time(arrivals, published.SINGLE_S * 1e3) / fused > speed_up


def test_one_at_a_time() -> None:
    assert one_at_a_time([0.0, 1.0, 9.0], 3.0) == 12.0


@pytest.mark.parametrize("form", ["bf16", "fp8", "int4"])
def test_random_weights_fit_their_model(form: str) -> None:
    """Names, shapes and bytes are those of the description; no two rows of a matrix are the same."""
    model = llama(True, form)
    tensors = dict(random_tensors(model, 0))
    assert {name: one.shape for name, one in tensors.items()} == {r.target: r.shape for r in model.weight_map.rules}
    assert sum(one.nbytes for one in tensors.values()) == weight_bytes(model.spec, form)
    table_bytes = tensors["embed.weight"].nbytes
    assert model.read_bytes == weight_bytes(model.spec, form) - table_bytes
    for name, tensor in tensors.items():
        values = tensor.dequantise()
        if len(tensor.shape) == 1:
            assert (values == 1).all()
            continue
        assert tensor.scheme == (form if name.split(".")[-2] in LINEARS and name.startswith("layers") else "bf16")
        assert 0.015 < values.std() < 0.025
        assert len({row.tobytes() for row in values}) == len(values)
    assert (tensors["layers.0.attn.q.weight"].dequantise() != tensors["layers.0.attn.k.weight"].dequantise()).any()


def test_views_of_the_buffer_stay_inside() -> None:
    buffer = Buffer(1000, 0)
    for shape in [(10, 100), (7,), (1, 999)] * 20:
        assert buffer.bf16(shape).shape == shape


def test_nvlm_is_the_published_model() -> None:
    from headrace.models.registry import describe

    wanted = describe(NVLM_D, "hf", nvlm_shapes(), token_id=lambda text: 151_655)
    found = nvlm(False, "fp8")
    assert found.spec == wanted.spec and found.weight_map == wanted.weight_map
    assert all(
        rule.shape[1] % GROUP == 0
        for rule in found.weight_map.rules
        if rule.target.startswith("layers") and len(rule.shape) == 2
    )
    assert 72e9 < found.read_bytes < 75e9


def test_prefill_flops_of_llama() -> None:
    """About two for each weight that a token meets."""
    model = llama(False)
    weights = (weight_bytes(model.spec) - 2 * 2 * 32000 * 4096) / 2
    attention = 2 * 2 * 2048 * 4096 * 32 / 2
    assert model.prefill_flops(8, 2048) == pytest.approx(8 * 2048 * (2 * weights + attention), rel=0.001)


def event(name: str, cat: str, ts: float, dur: float, correlation: int) -> Mapping[str, Any]:
    return {"name": name, "cat": cat, "ts": ts, "dur": dur, "args": {"correlation": correlation}}


def test_times_of_steps_in_a_trace() -> None:
    """Four replays of 10 kernels of 10 µs; 20 µs between replays, 5 of them a copy."""
    events: list[Mapping[str, Any]] = [{"name": "no arguments"}]
    for step in range(4):
        begin = 120.0 * step
        events += [event("cudaGraphLaunch", "cuda_runtime", begin - 50, 4, step)]
        events += [event(f"k{i}", "kernel", begin + 10 * i, 10, step) for i in range(10)]
        events += [event("Memcpy", "gpu_memcpy", begin + 105, 5, 99)]
    found = step_times(events)
    assert found is not None
    assert (found.count, found.span_s, found.period_s) == (4, pytest.approx(100e-6), pytest.approx(120e-6))
    assert found.idle_s == pytest.approx(15e-6)
    assert step_times(events[:14]) is None and step_times([]) is None


def test_counts_of_a_junit_file(tmp_path: Path) -> None:
    path = tmp_path / "x.xml"
    path.write_text(
        '<testsuites><testsuite time="1.5">'
        '<testcase classname="t" name="a"/>'
        '<testcase classname="t" name="b"><failure message="wrong&#10;more"/><error message="twice"/></testcase>'
        '<testcase classname="t" name="c"><skipped/></testcase>'
        '<testcase classname="" name="t"><error message="collection failure"/></testcase>'
        "</testsuite></testsuites>",
        encoding="utf-8",
    )
    found = read_counts(path)
    assert (found.passed, found.skipped, found.seconds) == (1, 1, 1.5)
    assert found.failed == {"t::b": "wrong", "::t": "collection failure"}
