"""Outside engines: the drivers' protocol with a small engine in a real process, set-up that fails, and the figures."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from benchmarks import peer_run
from benchmarks.machine_speed import Reader, canary, numpy_passes, wait_for_quiet
from benchmarks.peer_chart import chart, ticks
from benchmarks.peer_run import Bench, Row, WorkResult
from benchmarks.peer_table import as_markdown, best_peer, bound_share, ratios, table
from benchmarks.peer_work import MAKESPAN, NAMES, OUTPUT, Work, make_works, measure
from benchmarks.peers import parse

from headrace.cli import main as cli
from headrace.cli.compare import peer_cache
from headrace.compare import peer_setup
from headrace.compare.peer_setup import PeerCache
from headrace.compare.peers import (
    AVX2,
    DRIVERS,
    ENGINES,
    PeerProcess,
    PeerSpec,
    driver_command,
    driver_environment,
    parse_spec,
)
from headrace.core.errors import ConfigError, EngineError, InvalidParameter
from tests.unit.peer_cases import FAKE, LOAD, alive, task

REPO = Path(__file__).parents[2]


@pytest.fixture
def fake_script(tmp_path: Path) -> Path:
    script = tmp_path / "fake.py"
    script.write_text(FAKE)
    return script


@pytest.fixture
def peer(fake_script: Path) -> Iterator[PeerProcess]:
    process = PeerProcess("fake:1", [sys.executable, "-I", str(fake_script)], os.environ)
    yield process
    process.close()


def test_protocol(peer: PeerProcess) -> None:
    loaded = peer.ask(LOAD, 20)
    assert loaded["versions"] == {"fake": "1"}
    assert loaded["load_s"] >= 0
    assert loaded["peak_rss_bytes"] > 2**20
    answer = peer.ask(task([5], [6, 7], max_tokens=3), 20)
    assert [one["token_ids"] for one in answer["requests"]] == [[6, 7, 8], [8, 9, 10]]
    assert [one["id"] for one in answer["requests"]] == ["r0", "r1"]
    for one in answer["requests"]:
        assert 0 <= one["first_s"] <= one["last_s"] <= answer["makespan_s"]
    assert answer["peak_rss_bytes"] > 2**20
    assert answer["cpu_s"] >= 0
    assert peer.ask({"op": "close"}, 20) == {"ok": True}
    peer.close()
    assert not alive(peer.pid)


def test_requests_arrive_when_they_are_due(peer: PeerProcess) -> None:
    answer = peer.ask(task([1], [2], [3], max_tokens=2, gap_s=0.15), 20)
    first = [one["first_s"] for one in answer["requests"]]
    assert first[0] < 0.15 <= first[1] < 0.3 <= first[2] < 0.45
    assert answer["makespan_s"] == pytest.approx(answer["requests"][2]["last_s"])
    assert answer["cpu_s"] < 0.2, "it sleeps while it waits"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"op": "dance"}, "allowed: load, run, close"),
        ({"nothing": 1}, "KeyError"),
        ({"op": "run", "requests": []}, "at least one"),
        ({"op": "run", "requests": [{"id": "a", "token_ids": [], "max_tokens": 1}]}, "at least 1"),
        ({"op": "run", "requests": [{"id": "a", "token_ids": ["x"], "max_tokens": 1}]}, "ValueError"),
        (LOAD | {"model": "missing"}, "ValueError: no such model"),
        (task([55]), "request r0: 0 of 3 tokens came out"),
    ],
)
def test_a_wrong_task_is_one_line_and_the_driver_goes_on(peer: PeerProcess, wrong: Any, message: str) -> None:
    with pytest.raises(EngineError, match=r"^fake:1: ") as caught:
        peer.ask(wrong, 20)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert peer.ask(task([1], max_tokens=1), 20)["requests"][0]["token_ids"] == [2]


def test_a_driver_that_dies(peer: PeerProcess) -> None:
    with pytest.raises(EngineError, match=r"ended without an answer \(exit status .*bad luck"):
        peer.ask(task([13]), 20)
    with pytest.raises(EngineError, match="ended before it was asked"):
        peer.ask(task([1]), 20)
    peer.close()


def test_a_driver_that_hangs_is_ended(peer: PeerProcess) -> None:
    began = time.monotonic()
    with pytest.raises(EngineError, match=r"did not answer within 0\.5 s"):
        peer.ask(task([99]), 0.5)
    assert time.monotonic() - began < 5
    assert not alive(peer.pid)


def test_a_parent_that_is_killed_takes_a_busy_driver_with_it(fake_script: Path) -> None:
    code = (
        "import os, sys; from headrace.compare.peers import PeerProcess; from tests.unit.peer_cases import LOAD, task\n"
        "peer = PeerProcess('fake', [sys.executable, '-I', sys.argv[1]], os.environ); peer.ask(LOAD, 20)\n"
        "print(peer.pid, flush=True); peer.ask(task([99]), 60)"
    )
    command = [sys.executable, "-c", code, str(fake_script)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=REPO) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        time.sleep(0.5)  # it has its task then
        parent.kill()
    until_s = time.monotonic() + 10
    while alive(pid) and time.monotonic() < until_s:
        time.sleep(0.02)
    assert not alive(pid)


def run_code(code: str) -> PeerProcess:
    return PeerProcess("odd", [sys.executable, "-I", "-c", code], os.environ)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("print('hello')", "not JSON"),
        ("print('[1]')", "not a JSON object"),
        ("print('{}')", "no reason given"),
        ("import time; time.sleep(60)", "did not read its task"),
        ("import sys; sys.exit('sorry')", "sorry"),
    ],
)
def test_a_program_that_is_no_driver(code: str, message: str) -> None:
    peer = run_code(code)
    try:
        with pytest.raises(EngineError, match=message):
            # More than a pipe holds, so that who does not read is found out.
            peer.ask({"op": "load", "padding": "x" * 300_000 if "read" in message else ""}, 1)
    finally:
        peer.close()
    assert not alive(peer.pid)


def test_a_program_that_cannot_start() -> None:
    with pytest.raises(EngineError, match="cannot start"):
        PeerProcess("gone", ["/nonexistent/python"], os.environ)


@pytest.mark.parametrize("script", sorted(DRIVERS.glob("*.py")), ids=lambda path: path.name)
def test_drivers_are_python_3_10(script: Path) -> None:
    ast.parse(script.read_text(encoding="utf-8"), feature_version=(3, 10))


def test_every_engine_has_a_driver_and_an_environment() -> None:
    for engine in ENGINES.values():
        assert (DRIVERS / f"{engine.driver}.py").is_file()
        assert engine.driver in peer_setup.ENVIRONMENTS
    assert set(peer_setup.CONVERTERS.values()) <= set(peer_setup.ENVIRONMENTS)


def test_specs() -> None:
    assert parse_spec("llama.cpp:q4_0") == PeerSpec("llama.cpp:q4_0", "llama.cpp", "q4_0")
    ours = parse_spec("headrace:native,file=f32,dtype=float32,threads=3,prefix=true")
    assert (ours.ours, ours.file) == (True, "f32")
    assert ours.settings == {"backend": "native", "dtype": "float32", "threads": 3, "prefix": True}
    assert parse_spec("openvino:int8").keeps_to("avx2")
    assert not parse_spec("openvino:fp32").keeps_to("avx2")
    assert not parse_spec("onnxruntime:int4").keeps_to("avx2")
    assert parse_spec("onnxruntime:int4").keeps_to("native")
    python = Path("/p")
    assert driver_command(ours, python)[1:] == ["-m", "headrace.compare.own_driver"]
    assert driver_command(parse_spec("vllm:fp32"), python) == ["/p", "-I", str(DRIVERS / "vllm_cpu.py")]
    assert AVX2.items() <= driver_environment({"A": "b"}, "avx2", 2).items()
    assert "ONEDNN_MAX_CPU_ISA" not in driver_environment({}, "native", 2)


@pytest.mark.parametrize(
    "text", ["", "headrace", "nope:1", "llama.cpp", "llama.cpp:int4", "openvino:fp32,x", "headrace:torch,file=int4"]
)
def test_wrong_specs(text: str) -> None:
    with pytest.raises(InvalidParameter, match="allowed"):
        parse_spec(text)


def cache(folder: Path, isa: str = "native", **environment: str) -> PeerCache:
    return PeerCache(folder, environment, isa, lambda text: None)


def test_setup_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidParameter, match=r"setup: got 'nope', allowed: llama\.cpp"):
        cache(tmp_path).set_up("nope", None)
    with pytest.raises(InvalidParameter, match="isa: got 'mmx'"):
        cache(tmp_path, "mmx").set_up("openvino", None)
    with pytest.raises(EngineError, match=r"no C\+\+ compiler"):
        cache(tmp_path, PATH=str(tmp_path)).set_up("llama.cpp", None)
    with pytest.raises(ConfigError, match=r"\.gguf"):
        (tmp_path / "config.json").write_text("{}")
        cache(tmp_path).source(str(tmp_path))
    with pytest.raises(EngineError, match="setup"):
        cache(tmp_path).peer_file("llama-0.5b", parse_spec("openvino:fp32"))


def test_setup_tells_what_pip_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer_setup, "ENVIRONMENTS", {"ctranslate2": (("no-such-package-at-all==1",),)})
    environment = {"PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull, "PATH": os.environ["PATH"]}
    with pytest.raises(EngineError, match=r"pip: failed with status 1: .*no-such-package") as error:
        cache(tmp_path, **environment).set_up("ctranslate2", None)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "ctranslate2" / peer_setup.READY).exists()
    (tmp_path / "ctranslate2" / peer_setup.READY).touch()
    assert cache(tmp_path).set_up("ctranslate2", None) == tmp_path / "ctranslate2" / "bin" / "python"


def test_model_files(tmp_path: Path) -> None:
    model = tmp_path / "Tiny.Q4_1.gguf"
    model.write_bytes(b"GGUF")
    here = cache(tmp_path, "avx2")
    assert here.file(str(model), "q4_1.gguf") == model
    made = here.file(str(model), "q4_0.gguf")
    assert (made.name, made.parent.parent) == ("q4_0.gguf", tmp_path / "models")
    assert here.python("llama_cpp") == tmp_path / "llama_cpp-avx2" / "bin" / "python"
    assert here.python("openvino") == tmp_path / "openvino" / "bin" / "python"
    assert here.peer_file(str(model), parse_spec("headrace:torch")) == model
    assert here.source("llama-1.1b").name == "f16.gguf"
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    assert here.file(str(folder), "hf") == here.make_file(str(folder), "hf") == folder
    assert here.file(str(folder), "openvino-int8").parent.parent == tmp_path / "models"
    with pytest.raises(ConfigError, match=r"^model: got .*\.gguf file$"):
        here.file(str(folder), "q4_0.gguf")


def test_command_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert peer_cache("avx2").folder == tmp_path / "headrace" / "peers"
    assert cli.main(["compare", "--setup", "nope"]) == cli.USAGE_ERROR
    assert capsys.readouterr().err.startswith("headrace: error: setup: got 'nope', allowed: llama.cpp")
    with pytest.raises(SystemExit):
        cli.main(["compare"])
    assert "MODEL" in capsys.readouterr().err


def result_of(rows: dict[str, list[dict[str, float]]], work: Work, isa: str = "native") -> WorkResult:
    loaded = {"weights_bytes": 100_000_000, "scheduling": "static"}
    return WorkResult(work, isa, [Row(parse_spec(name), loaded, rounds) for name, rounds in rows.items()])


def single_round(tok_s: float) -> dict[str, float]:
    return {"decode_tok_s": tok_s, "ttft_s": 0.1, "peak_rss_mib": 5.0, "busy_cores": 2.0}


def test_tables() -> None:
    from benchmarks.machine_speed import Bandwidth

    (work,) = make_works(["single"])
    figure = work.figures[0]
    result = result_of(
        {
            "llama.cpp:q4_0": [single_round(100), single_round(110), single_round(90)],
            "onnxruntime:int4": [single_round(130)] * 3,
            "headrace:torch": [single_round(200), single_round(165), single_round(225)],
        },
        work,
        "avx2",
    )
    theirs, newer, ours = result.rows
    found = ratios(ours, theirs, figure)
    assert found is not None
    assert (found.median, found.low, found.high) == (2.0, 1.5, 2.5)
    assert best_peer(result, figure) is theirs, "the other one uses newer instructions"
    result.isa = "native"
    assert best_peer(result, figure) is newer
    assert bound_share(result, ours) is None
    result.bandwidths += [Bandwidth(100_000_000, 2, gb_s, 50.0, "test") for gb_s in (10.0, 40.0, 50.0)]
    assert bound_share(result, ours) == pytest.approx(200 / 400)
    header, *lines = table(result)
    assert header[-1] == "of bound"
    assert "headrace:torch ÷ it" in header
    assert lines[0][header.index("headrace:torch ÷ it")] == "2.00 (1.50–2.50)"
    assert lines[2][-3:] == ["100.0", "40.0", "50%"]
    theirs.error = "EngineError: it broke"
    assert ratios(ours, theirs, figure) is None
    text = as_markdown(result)
    assert "against the best peer: decode tok/s 1.54 (1.27–1.73) × onnxruntime:int4" in text
    assert "- llama.cpp:q4_0: EngineError: it broke" in text
    assert len({line.count("|") for line in text.splitlines() if line.startswith("|")}) == 1


def test_less_is_better() -> None:
    (work,) = make_works(["staggered"])
    rounds = {"makespan_s": 10.0, "mean_latency_s": 8.0, "output_tok_s": 400.0, "peak_rss_mib": 1.0, "busy_cores": 2.0}
    result = result_of({"vllm:fp32": [rounds], "headrace:torch": [rounds | {"makespan_s": 5.0}]}, work)
    theirs, ours = result.rows
    assert ratios(ours, theirs, MAKESPAN).median == 2.0  # type: ignore[union-attr]
    assert ratios(ours, theirs, OUTPUT).median == 1.0  # type: ignore[union-attr]
    assert bound_share(result, ours) is None
    assert "static batches" in as_markdown(result)


def test_chart() -> None:
    (work,) = make_works(["single"])
    result = result_of({"llama.cpp:q4_0": [single_round(90)], "headrace:torch,x=<&>": [single_round(200)]}, work)
    root = ElementTree.fromstring(chart([result], "a & b"))
    kinds = [one.get("class") for one in root.iter("{http://www.w3.org/2000/svg}rect")]
    assert kinds == [None, "peer", "ours"]
    assert ticks(0) == [0.0]
    assert ticks(100) == [0, 20, 40, 60, 80, 100]
    assert ticks(0.7) == pytest.approx([0, 0.2, 0.4, 0.6])


def test_works() -> None:
    works = {work.name: work for work in make_works(["all"], [128, 512])}
    assert set(works) == {*NAMES, "context-128", "context-512"} - {"context"}
    batch, staggered = works["batch"], works["staggered"]
    assert [len(prompt) for prompt in batch.prompts] == [50 + index % 31 for index in range(32)]
    assert make_works(["batch"])[0].prompts == batch.prompts, "the same in every run"
    assert [one["at_s"] for one in staggered.task()["requests"]] == pytest.approx([i / 10 for i in range(32)])
    assert {(one["at_s"], one["max_tokens"]) for one in staggered.warm_up_task()["requests"]} == {(0, 8)}
    assert works["sampling"].task()["sampling"]["top_p"] == 0.9
    assert works["sampling"].greedy_task() == batch.task()
    assert works["prefill"].warm_up_task()["requests"][0]["max_tokens"] == 1
    assert works["context-512"].max_len == 544
    with pytest.raises(ValueError, match="allowed"):
        make_works(["sprint"])


def test_figures_of_a_run() -> None:
    work = Work("w", "two", ((1, 2, 3, 4), (5,)), 3, (OUTPUT,), gap_s=0.5)
    answer = {
        "requests": [
            {"token_ids": [1, 2, 3], "first_s": 0.5, "last_s": 1.5},
            {"token_ids": [1, 2, 3], "first_s": 1.0, "last_s": 2.0},
        ],
        "makespan_s": 2.0,
        "cpu_s": 3.0,
        "peak_rss_bytes": 2**21,
    }
    assert measure(work, answer, 7.0) == {
        "ttft_s": 0.5,
        "prefill_tok_s": 8.0,
        "output_tok_s": 3.0,
        "makespan_s": 2.0,
        "mean_latency_s": 1.5,
        "peak_rss_mib": 2.0,
        "busy_cores": 1.5,
        "decode_tok_s": 2.0,
        "start_s": 7.0,
    }
    answer["requests"][1]["token_ids"] = [1]  # type: ignore[index]
    with pytest.raises(ValueError, match="tokens"):
        measure(work, answer)


class FakeFleet:
    """Every row is the fake engine; `starts` says in which order."""

    def __init__(self, script: Path) -> None:
        self.script = script
        self.starts: list[str] = []

    def start(self, spec: PeerSpec) -> PeerProcess:
        self.starts.append(spec.name)
        return PeerProcess(spec.name, [sys.executable, "-I", str(self.script)], os.environ)

    def path(self, spec: PeerSpec) -> Path:
        return Path("missing" if spec.precision == "int8" else "model")


def test_rounds_are_interleaved_and_who_fails_drops_out(fake_script: Path) -> None:
    names = ["openvino:fp32", "openvino:int8", "headrace:torch"]
    said: list[str] = []
    bench = Bench(FakeFleet(fake_script), "native", 1, 2, said.append)
    work = Work("w", "t", ((1, 2),), 4, make_works(["single"])[0].figures)
    reader = Reader(1)
    try:
        result = bench.run(work, [parse_spec(name) for name in names], reader)
    finally:
        reader.close()
    assert [len(row.rounds) for row in result.rows] == [2, 0, 2]
    assert result.rows[0].first_tokens == [3, 4, 5, 6]
    assert "no such model" in str(result.rows[1].error)
    rounds = [line.rpartition(": ")[2] for line in said if "round" in line]
    assert rounds == ["openvino:fp32", "headrace:torch", "headrace:torch", "openvino:fp32"]
    assert "share_of_greedy" not in result.rows[0].rounds[0]
    assert result.gb_s(1000) is not None
    assert len(result.canary_s) == 4
    json.dumps([row.rounds for row in result.rows], allow_nan=False)


def test_a_disturbed_run_is_made_again(fake_script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readings = iter([0.0, 100.0, 100.0, 100.0])  # before and after two runs: 100 s of other load, then none
    monkeypatch.setattr(peer_run, "busy_seconds", lambda: next(readings))
    monkeypatch.setattr(peer_run, "wait_for_quiet", lambda limit_cores, end_s: None)
    said: list[str] = []
    work = Work("w", "t", ((1, 2),), 4, make_works(["batch"])[0].figures)
    reader = Reader(1)
    try:
        bench = Bench(FakeFleet(fake_script), "native", 1, 1, said.append, patience_s=60)
        result = bench.run(work, [parse_spec("headrace:torch")], reader)
    finally:
        reader.close()
    assert [one["other_cores"] for one in result.rows[0].rounds] == [0.0]
    assert said[-1] == "w: headrace:torch was disturbed, once more"


def test_sampling_is_compared_with_greedy(fake_script: Path) -> None:
    work = Work("w", "t", ((1, 2),), 4, make_works(["sampling"])[0].figures, sampled=True)
    reader = Reader(1)
    try:
        bench = Bench(FakeFleet(fake_script), "native", 1, 2, lambda text: None)
        result = bench.run(work, [parse_spec("headrace:torch")], reader)
    finally:
        reader.close()
    assert all(one["share_of_greedy"] > 0 for one in result.rows[0].rounds)
    assert "nothing to compare" in as_markdown(result)


def test_a_fresh_process_for_every_start(fake_script: Path) -> None:
    fleet = FakeFleet(fake_script)
    (work,) = make_works(["start"])
    reader = Reader(1)
    try:
        result = Bench(fleet, "native", 1, 2, lambda text: None).run(work, [parse_spec("vllm:fp32")], reader)
    finally:
        reader.close()
    assert fleet.starts == ["vllm:fp32"] * 2
    assert all(one["start_s"] > one["ttft_s"] for one in result.rows[0].rounds)


def test_machine_speed() -> None:
    reader = Reader(2)
    try:
        found = reader.measure(8 * 2**20)
    finally:
        reader.close()
    assert 0.1 < found.gb_s <= found.best_gb_s < 10_000
    began = time.monotonic()
    wait_for_quiet(0.0, began + 0.5)
    assert time.monotonic() - began < 5
    assert all(0 < one < 10 for one in numpy_passes(2**20, 2, 3))
    assert 0 < canary() < 10


@pytest.mark.parametrize("wrong", [["--repeats", "0"], ["--work", "sprint"], ["--isa", "mmx"], ["--threads", "-1"]])
def test_benchmark_arguments(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(wrong)
    assert "error" in capsys.readouterr().err
