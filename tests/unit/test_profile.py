"""`headrace profile`: ranges inside ranges, their sums, the trace, the table, Nsight's command line, both backends."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.backends.base import BackendOptions
from headrace.backends.ranges import ATTENTION, HEAD, LAYER, MLP, SAMPLE, Profiled, Range
from headrace.cli.main import main
from headrace.core.config import EngineConfig
from headrace.core.errors import ContextLengthExceeded, EngineError, InvalidParameter
from headrace.core.types import Capacity, Request, SamplingParams
from headrace.engine.model import OpenModel
from headrace.pages.terminal import console
from headrace.profile import nsight
from headrace.profile.ranges import DECODE, PREFILL, Row, layer_rows, nest, summarise, walk
from headrace.profile.run import Profile, Work, profile
from headrace.profile.table import show
from headrace.profile.trace import trace, trace_json
from headrace.testing.checkpoints import tiny_checkpoint
from headrace.testing.fake import FakeBackend

WORK = Work(prompt_tokens=9, max_tokens=4, requests=3)
SMALL = {"max_model_len": 64, "max_num_seqs": 4, "threads": 1}


def run(path: Path, backend: str, work: Work = WORK, **settings: Any) -> Profile:
    with closing(OpenModel(EngineConfig(str(path), backend=backend, **{**SMALL, **settings}))) as opened:
        return profile(opened, work, lambda text: None)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "llama")


@pytest.fixture(scope="module")
def native(tiny: Path) -> Profile:
    return run(tiny, "native")


# ---------------------------------------------------------------- one inside another

PLANTED = (
    Range(LAYER, 10, 50, 0),
    Range(ATTENTION, 10, 40, 0),
    Range("qkv", 10, 30, 0, weight_bytes=40, multiply_adds=60),
    Range("aten::mm", 12, 20, is_detail=True),
    Range(LAYER, 50, 80, 1),
    Range(ATTENTION, 50, 60, 1),
    Range("qkv", 50, 60, 1, weight_bytes=40, multiply_adds=60),
    Range(PREFILL, 0, 100),
    Range("detokenise", 100, 104),
    Range(DECODE, 104, 110),
)


def test_totals_and_selves_by_hand() -> None:
    rows = {"/".join(row.path): row for row in summarise(nest(PLANTED))}
    assert list(rows) == [
        PREFILL, f"{PREFILL}/layers", f"{PREFILL}/layers/attention", f"{PREFILL}/layers/attention/qkv", DECODE,
        "detokenise",
    ]  # fmt: skip
    layers = rows[f"{PREFILL}/layers"]
    assert (layers.calls, layers.total_ns, layers.self_ns) == (2, 70, 30)
    assert (rows[PREFILL].total_ns, rows[PREFILL].self_ns) == (100, 30)
    product = rows[f"{PREFILL}/layers/attention/qkv"]
    assert (product.calls, product.total_ns, product.self_ns) == (2, 30, 30), "an operator is no range of ours"
    assert product.gigabytes_per_s == pytest.approx(80 / 30) and product.gigaflops == pytest.approx(2 * 120 / 30)
    assert rows[DECODE].gigaflops is None and Row(("x",), weight_bytes=1).gigabytes_per_s is None

    slow, fast = layer_rows(nest(PLANTED))
    assert (slow.phase, slow.layer, slow.part, slow.calls, slow.total_ns) == (PREFILL, 0, ATTENTION, 1, 30)
    assert (fast.layer, fast.of_median) == (1, 10 / 20)


def test_what_hangs_over_is_cut() -> None:
    outer, inner = Range("outer", 0, 100), Range("inner", 90, 103)
    (root,) = nest([inner, outer])
    assert root.inside[0].range.end_ns == 100 and root.self_ns == 90
    assert [node.range.name for node in nest([Range("a", 0, 5), Range("b", 5, 9)])] == ["a", "b"]


Tree = st.recursive(
    st.integers(0, 5).map(lambda ns: (ns, [])), lambda inner: st.tuples(st.integers(0, 5), st.lists(inner, max_size=4))
)


@given(st.lists(Tree, min_size=1, max_size=4), st.randoms())
def test_nothing_is_lost_or_counted_twice(trees: list[Any], shuffle: Any) -> None:
    """A tree is (nanoseconds of its own, trees inside): ranges made of it come back as it was."""
    made: list[Range] = []

    def lay(tree: Any, begin: int, depth: int) -> int:
        own, inside = tree
        end = begin + own + 1
        for one in inside:
            end = lay(one, end, depth + 1)
        made.append(Range(f"depth {depth}", begin, end))
        return end

    end = 0
    for tree in trees:
        end = lay(tree, end, 0)
    depths = Counter(one.name for one in made)
    shuffle.shuffle(made)
    roots = nest(made)
    assert sum(node.self_ns for node in walk(roots)) == sum(root.total_ns for root in roots) == end
    rows = summarise(roots)
    assert sum(row.self_ns for row in rows) == end
    assert Counter({row.path[-1]: row.calls for row in rows}) == depths
    assert all(row.path == tuple(f"depth {i}" for i in range(len(row.path))) for row in rows)


# ---------------------------------------------------------------- the work

FAMILIES = ("llama", "gptj", "gemma3", "mixtral")


@pytest.mark.parametrize("architecture", FAMILIES)
@pytest.mark.parametrize("backend", ["native", "torch"])
def test_every_range_is_there_and_counted(backend: str, architecture: str, tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path / "tiny", architecture)
    found = run(path, backend)
    layers = 3 if architecture == "gemma3" else 2
    assert [step.phase for step in found.steps] == [PREFILL, *[DECODE] * 3]
    assert [step.tokens for step in found.steps] == [27, 3, 3, 3] and found.steps[0].rows == 3
    assert [step.phase for step in found.plain_steps] == [step.phase for step in found.steps]

    rows = {row.path: row for row in summarise(found.roots)}
    for phase, steps in ((PREFILL, 1), (DECODE, 3)):
        assert rows[(phase,)].calls == steps
        for name, calls in {"schedule": 1, "gather": 3, "embed": 1, "layers": layers, HEAD: 1, SAMPLE: 1}.items():
            assert rows[phase, name].calls == calls * steps, name
        for part in (ATTENTION, MLP):
            assert rows[phase, "layers", part].calls == layers * steps
    assert all(0 <= row.self_ns <= row.total_ns and row.calls for row in rows.values())
    assert {(row.phase, row.layer, row.part) for row in layer_rows(found.roots)} == {
        (phase, layer, part) for phase in (PREFILL, DECODE) for layer in range(layers) for part in (ATTENTION, MLP)
    }
    whole = found.end_ns - found.begin_ns
    named = sum(row.total_ns for path, row in rows.items() if len(path) == 1)
    assert 0.5 * whole < named <= whole, "steps and detokenising are nearly all that a run does"
    inside = sum(row.total_ns for path, row in rows.items() if path[0] == DECODE and len(path) == 2)
    assert inside <= rows[(DECODE,)].total_ns


def test_work_of_products_by_hand(native: Profile, tiny: Path) -> None:
    """Tiny llama: hidden 48, 6 heads of 8 and 2 of keys, 80 inner, 97 tokens; float32 or bfloat16 by the config."""
    rows = {row.path[1:]: row for row in summarise(native.roots) if row.path[0] == DECODE}
    size = 4 if native.config.dtype == "float32" else 2
    inner = {"qkv": 48 * (48 + 16 + 16), "o": 48 * 48}
    for name, numbers in inner.items():
        row = rows["layers", ATTENTION, name]
        assert row.multiply_adds == 2 * 3 * 3 * numbers, "layers × steps × rows"
        assert row.weight_bytes >= 2 * 3 * size * numbers and (row.gigaflops or 0) > 0, "padded to whole panels"
    assert rows["layers", MLP, "gate, up, silu"].multiply_adds == 2 * 3 * 3 * 2 * 48 * 80
    assert rows["layers", MLP, "down"].multiply_adds == 2 * 3 * 3 * 48 * 80
    assert rows[HEAD, "head"].multiply_adds == 3 * 3 * 97 * 48
    assert rows["layers", ATTENTION, "attend"].multiply_adds == 0

    torch_rows = {row.path[1:]: row for row in summarise(run(tiny, "torch").roots) if row.path[0] == DECODE}
    assert torch_rows["layers", ATTENTION, "o"].multiply_adds == 2 * 3 * 4 * 48 * 48, "4 rows, one of padding"


def test_a_prompt_in_chunks_and_one_request(tiny: Path) -> None:
    found = run(tiny, "native", Work(40, 1, 1), max_num_batched_tokens=16, threads=2)
    assert [(step.phase, step.tokens) for step in found.steps] == [(PREFILL, 16), (PREFILL, 16), (PREFILL, 8)]
    assert summarise(found.roots)[0].calls == 3
    for layer in (node for node in walk(found.roots) if node.range.name == LAYER):
        leaves = [node.range for node in walk(layer.inside) if not node.inside]
        assert len(leaves) == 8 and all(one.layer == layer.range.layer for one in leaves)
        ends = [layer.range.begin_ns, *(one.end_ns for one in leaves)]
        assert [one.begin_ns for one in leaves] == ends[:-1] and ends[-1] == layer.range.end_ns, "no gap, whoever leads"


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_off_means_off(backend: str, tiny: Path) -> None:
    """No range is kept before and after; answers are the same before, while and after somebody profiles."""
    with closing(OpenModel(EngineConfig(str(tiny), backend=backend, prefix_cache=False, **SMALL))) as opened:
        loaded, capacity = opened.load_backend(backend, opened.options())
        assert isinstance(loaded, Profiled)
        core = opened.engine(loaded, capacity)
        answers, kept = [], []
        for number, on in enumerate((False, True, False)):
            loaded.profile(on)
            loaded.profile(on)  # again is as once
            core.submit(Request(str(number), (5, 6, 7), SamplingParams(max_tokens=5, ignore_eos=True)))
            events = []
            while core.has_work:
                events += core.step()
            answers.append([event.token_ids for event in events if hasattr(event, "token_ids")])
            loaded.profile(False)
            kept.append(loaded.take_ranges())
        assert answers[0] == answers[1] == answers[2] and len(answers[0]) == 5
        assert kept[0] == kept[2] == [] and kept[1]
        loaded.profile(True)
        loaded.close()
        with pytest.raises(EngineError, match="closed"):
            loaded.profile(True)


def test_torch_is_as_it_was_built(tiny: Path) -> None:
    with closing(OpenModel(EngineConfig(str(tiny), backend="torch", **SMALL))) as opened:
        backend, _ = opened.load_backend("torch", opened.options())
        decoder = backend._loaded.decoder  # type: ignore[attr-defined]
        layer = decoder._layers[0]
        before = [decoder._head, decoder._final_norm, layer, layer.attention, layer.attention.qkv, layer.mlp.down]
        backend.profile(True)  # type: ignore[attr-defined]
        assert decoder._layers[0] is not layer and layer.attention is not before[3]
        backend.profile(False)  # type: ignore[attr-defined]
        layer = decoder._layers[0]
        after = [decoder._head, decoder._final_norm, layer, layer.attention, layer.attention.qkv, layer.mlp.down]
        assert all(one is other for one, other in zip(before, after, strict=True))
        backend.close()


def test_nvtx_ranges_while_profiling_only(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a build of torch for CUDA has them: every range is opened and closed, in order, and only under watch."""
    import torch

    calls: list[str] = []
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", calls.append)
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: calls.append(""))
    run(tiny, "torch", Work(4, 2, 1))
    assert calls[:2] == ["headrace", ""], "whether there is NVTX"
    depth, opened, top = 0, Counter[str](), []
    for call in calls[2:]:
        depth += 1 if call else -1
        opened[call] += 1
        assert depth >= 0
        if call and depth == 1:
            top.append(call)
    assert depth == 0 and top == [PREFILL, DECODE]
    assert opened[SAMPLE] == 2 and opened[LAYER] == opened[ATTENTION] == opened[MLP] == 2 * 2


@pytest.mark.parametrize("depth", [1, 2])
def test_a_backend_that_keeps_no_ranges(depth: int, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: the engine's ranges are there, each step counts as the one that it answers."""

    def load(opened: OpenModel, name: str, options: BackendOptions) -> tuple[FakeBackend, Capacity]:
        backend = FakeBackend(opened.spec.vocab_size, depth=depth)
        return backend, backend.open(Capacity(options.num_blocks, options.block_size, 4, options.max_tokens))

    monkeypatch.setattr(OpenModel, "load_backend", load)
    found = run(tiny, "native")
    assert [(step.phase, step.rows, step.tokens) for step in found.steps] == [(PREFILL, 3, 27), *[(DECODE, 3, 3)] * 3]
    assert len(found.plain_steps) == 4
    names = Counter(node.range.name for node in walk(found.roots))
    assert names[PREFILL] + names[DECODE] == 3 + depth and (names["wait"] == 4) == (depth > 1)
    assert names["schedule"] >= 4 and names["commit"] == 4
    stream = StringIO()
    show(replace(found, config=replace(found.config, device="cuda")), 5, console(stream))
    text = stream.getvalue()
    assert "Two plans are in flight" in text and "slowest parts of single layers" not in text and "weights" not in text
    check_trace(trace(found)["traceEvents"])


def test_bad_work(tiny: Path) -> None:
    for name, value in (("prompt_tokens", 0), ("max_tokens", 1025), ("requests", -1)):
        with pytest.raises(InvalidParameter, match=f"{name}: got {value}, allowed: an integer from 1 to"):
            Work(**{name: value})
    with pytest.raises(ContextLengthExceeded, match="64"):
        run(tiny, "native", Work(64, 1, 1))
    with pytest.raises(InvalidParameter, match="max_tokens: got 3, allowed: up to 2"):
        run(tiny, "native", Work(62, 3, 1))
    with pytest.raises(InvalidParameter, match="requests: got 256, allowed: up to 204: 4 run together, for 2048 steps"):
        run(tiny, "native", Work(20, 40, 256))


# ---------------------------------------------------------------- trace


def check_trace(events: Sequence[Any]) -> None:
    """Trace Event Format: metadata and complete events, which lie inside one another or apart."""
    names = {event["name"]: event["args"]["name"] for event in events if event["ph"] == "M"}
    assert set(names) == {"process_name", "thread_name"} and all(names.values())
    spans = []
    for event in events:
        assert event["ph"] in ("M", "X") and isinstance(event["pid"], int) and isinstance(event["tid"], int)
        assert isinstance(event["name"], str) and event["name"] and isinstance(event["args"], dict)
        if event["ph"] == "X":
            assert isinstance(event["cat"], str) and event["ts"] >= 0 and event["dur"] >= 0
            begin = round(1000 * event["ts"])
            spans.append((begin, begin + round(1000 * event["dur"])))
    open_until: list[int] = []
    for begin, end in sorted(spans, key=lambda span: (span[0], -span[1])):
        while open_until and begin >= open_until[-1]:
            open_until.pop()
        assert not open_until or end <= open_until[-1], "overlaps"
        open_until.append(end)


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_trace(backend: str, native: Profile, tiny: Path) -> None:
    found = native if backend == "native" else run(tiny, "torch")
    parsed = json.loads(trace_json(found), parse_constant=lambda text: pytest.fail(f"{text} in the trace"))
    assert parsed == trace(found) and parsed["displayTimeUnit"] == "ms"
    events = parsed["traceEvents"]
    check_trace(events)
    counts = Counter(event["name"] for event in events)
    assert counts["load"] == counts[PREFILL] == 1 and counts[DECODE] == 3 and counts["layer 1"] == 4
    decode = next(event for event in events if event["name"] == DECODE)
    assert decode["args"] == {"rows": 3, "tokens": 3}
    product = next(event for event in events if event["name"] == "qkv")
    assert product["args"]["layer"] == 0 and product["args"]["floating_point_operations"] >= 2 * 27 * 48 * 80
    categories = {event["cat"] for event in events if event["ph"] == "X"}
    assert categories == ({"headrace"} if backend == "native" else {"headrace", "operator"})
    first = [event["name"] for event in events if event["ph"] == "X"][:4]
    assert first == ["load", "warm-up", "run without the profile", PREFILL]
    load = next(event for event in events if event["name"] == "load")
    assert load["ts"] == 0 and all(event["ts"] >= load["dur"] for event in events if event["name"] == PREFILL)


# ---------------------------------------------------------------- table


def test_table_fits_a_terminal(native: Profile) -> None:
    stream = StringIO()
    show(native, 3, console(stream, width=80))
    lines = stream.getvalue().splitlines()
    assert max(map(len, lines)) <= 80 and "\x1b" not in stream.getvalue() and "…" not in stream.getvalue()
    text = "\n".join(lines)
    parts = ("load", PREFILL, "  schedule", "  gather", "    attention", "      attend", "  headrace.sample", DECODE)
    at = [text.index("\n" + part) for part in parts]
    assert at == sorted(at) and "detokenise" in text and "between them" in text
    row = next(line for line in lines if line.startswith("      qkv")).split()
    assert row[1] == "2" and float(row[-1]) > 0, "two layers, one step of prefill; GFLOP/s"
    calls, total_ms, _, _, mean = next(line for line in lines if line.startswith(DECODE + " ")).split()[1:6]
    assert calls == "3" and float(mean) == pytest.approx(1000 * float(total_ms) / 3, abs=5)
    assert any(line.startswith(f"  {DECODE}: 3 steps, 9 tokens; a step ") for line in lines)
    shares = [float(line.split("%")[0].split()[-1]) for line in lines if line.startswith((PREFILL + " ", DECODE + " "))]
    assert 50 < sum(shares[:2]) <= 100.2
    assert "no tokenizer" in text and "× median" in text
    stream = StringIO()
    show(native, 0, console(stream, width=80))
    assert "slowest" not in stream.getvalue()


# ---------------------------------------------------------------- Nsight Systems


def test_the_command_line_is_that_of_the_study() -> None:
    assert nsight.line("headrace.decode", "FILE", ["CMD", "a b"]) == (
        "NSYS_NVTX_PROFILER_REGISTER_ONLY=0 nsys profile -t cuda,nvtx,osrt,cudnn,cublas --stats=true "
        "--force-overwrite=true --capture-range nvtx --nvtx-capture \"headrace.decode\" -o FILE CMD 'a b'"
    )
    lines = nsight.lines(["CMD"])
    names = [line.split('"')[1] for line in lines[1::2]]
    assert sorted(names) == ["headrace.decode", "headrace.prefill", "headrace.sample", "headrace.vision"]
    assert all(line.startswith("# headrace.") for line in lines[::2])


def fake_nsys(folder: Path, body: str) -> Path:
    """Does what the real one would with its arguments, as far as `body` goes."""
    path = folder / "nsys"
    path.write_text(f"#!{sys.executable}\nimport json, os, subprocess, sys\nargs = sys.argv[1:]\n{body}\n")
    path.chmod(0o755)
    return path


REPORT = """
file = args[args.index("-o") + 1]
command = args[args.index("-o") + 2:]
open(file + ".nsys-rep", "w").write(json.dumps([args, os.environ["NSYS_NVTX_PROFILER_REGISTER_ONLY"]]))
sys.exit(143)
"""


def test_nsys_is_judged_by_its_report(tmp_path: Path) -> None:
    path = tmp_path / "out"
    nsys = str(fake_nsys(tmp_path, REPORT))
    report = nsight.record(nsys, DECODE, str(path), ["command", "--x"], {"PATH": os.environ["PATH"]})
    assert report == tmp_path / "out.nsys-rep"
    assert json.loads(report.read_text()) == [
        [*nsight.arguments("nsys", DECODE, str(path), ["command", "--x"])[1:]],
        "0",
    ]
    silent = str(fake_nsys(tmp_path, "sys.exit(0)"))
    with pytest.raises(EngineError, match="nsys ended with status 0 and wrote no report: no range"):
        nsight.record(silent, DECODE, str(path), ["command"], {})


def test_command_with_and_without_nsys(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    flags = ("--requests", "2", "--max-tokens", "2", "--prompt-tokens", "3", "--threads", "1", "--backend", "native")
    assert main(["profile", str(tiny), *flags, "--nsys", str(tmp_path / "n"), "--no-prefix-cache"]) == 0
    out, err = capsys.readouterr()
    assert err == "" and "nsys) is not on the PATH" in out and DECODE in out
    command = f"headrace profile {tiny} --prompt-tokens 3 --max-tokens 2 --requests 2 --threads 1 --no-prefix-cache"
    assert out.splitlines()[-1] == nsight.line(DECODE, "headrace-decode", [*command.split(), "--backend", "torch"])

    assert main(["profile", "no/such/model", "--nsys-command", "--quant", "int8"]) == 0
    out = capsys.readouterr().out
    assert out.count("NSYS_NVTX_PROFILER_REGISTER_ONLY=0 nsys profile") == 4 and "int8" not in out

    monkeypatch.setattr(shutil, "which", lambda name: str(fake_nsys(tmp_path, REPORT)))
    assert main(["profile", str(tiny), *flags, "--nsys", str(tmp_path / "n")]) == 0
    (args, variable) = json.loads((tmp_path / "n.nsys-rep").read_text())
    assert variable == "0" and args[-2:] == ["--backend", "torch"] and sys.executable in args
    assert str(tmp_path / "n.nsys-rep") in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--requests", "0"], "requests: got 0, allowed: an integer from 1 to 256"),
        (["--max-tokens", "9999"], "max_tokens: got 9999, allowed"),
        (["--top", "-1"], "top: got -1, allowed: an integer from 0 to"),
        (["--trace", "/nowhere/t.json"], "trace: got '/nowhere/t.json', allowed: a file in a folder"),
        (["--nsys", "/nowhere/n"], "nsys: got '/nowhere/n.nsys-rep', allowed: a file in a folder"),
        (["--nsys", "n", "--trace", "t.json"], "nsys: got 'n', allowed: no --trace beside it"),
        (["--prompt-tokens", "300"], "maximum context length is 256"),
        (["--requests", "x"], "invalid int value: 'x'"),
    ],
)
def test_bad_input_is_one_line(
    flags: list[str], complaint: str, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status = main(["profile", str(tiny), *flags])
    except SystemExit as error:
        status = int(error.code or 0)
    err = capsys.readouterr().err
    assert status == 2 and complaint in err and err.count("\n") == 1
