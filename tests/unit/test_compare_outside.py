"""Outside engines as methods of a comparison: set up, started, asked, ended; and how an answer ends in the drivers."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.compare.drivers.serve import Asked, Run, parse_run
from headrace.compare.measure import run_rounds
from headrace.compare.methods.admission import play
from headrace.compare.methods.bench import Bench
from headrace.compare.methods.outside import OutsideMethod, make_outside, stored_as
from headrace.compare.own_driver import Engine
from headrace.compare.peer_setup import READY, PeerCache
from headrace.compare.peers import ENGINES, PeerProcess, parse_spec
from headrace.compare.workloads import Workload, WorkloadRequest
from headrace.core.config import EngineConfig
from headrace.core.errors import ConfigError, EngineError, HeadraceError, InvalidParameter
from headrace.engine.model import OpenModel
from headrace.weights.checkpoint import open_checkpoint
from tests.unit.batch_cases import tiny_model
from tests.unit.compare_cases import PlantedMethod
from tests.unit.peer_cases import FAKE, LOAD, alive, task

EOS = 2
"""Of the demo model."""


@pytest.fixture(scope="module")
def bench(demo_path: Path) -> Iterator[Bench]:
    """Of the demo model, whose weights nobody loads here."""
    opened = OpenModel(EngineConfig("demo", threads=1, max_num_seqs=4, max_model_len=64, prefix_cache=False))
    yield Bench(opened)
    opened.close()


def cache(folder: Path, *names: str, script: str = FAKE) -> PeerCache:
    """A folder in which these environments are set up: their interpreter runs `script`, whatever it is told to run."""
    (folder / "engine.py").write_text(script)
    made = PeerCache(folder, {**os.environ, "MARK": "yes"}, "native", lambda text: None)
    for name in names:
        python = made.python(name)
        python.parent.mkdir(parents=True)
        python.write_text(f"#!/bin/sh\nexec {sys.executable} -I {folder / 'engine.py'}\n")
        python.chmod(0o755)
        (python.parent.parent / READY).touch()
    return made


def asked(*prompts: Sequence[int], max_tokens: int = 3, gap_s: float = 0.0, ignore_eos: bool = False) -> Workload:
    requests = [WorkloadRequest(tuple(ids), max_tokens, i * gap_s) for i, ids in enumerate(prompts)]
    return Workload("asked", tuple(requests), ignore_eos)


def pid_of(method: OutsideMethod) -> int:
    assert method._process is not None
    return method._process.pid


def test_a_run(bench: Bench, tmp_path: Path) -> None:
    method = make_outside("llama.cpp", bench, cache(tmp_path, "llama_cpp"))
    assert (method.config, method.exact) == (None, False)
    assert method.description == "llama.cpp, an outside engine; weights: q4_1"
    work = asked([7, 0], [5], [8], gap_s=0.1)
    try:
        assert 0 < method.start(work) < 60
        found = method.run(work)
        assert found.outputs == ((1, EOS), (6, 7, 8), (9, 10, 11))
        assert [one.finish_reason for one in found.requests] == ["stop", "length", "length"]
        for index, one in enumerate(found.requests):
            assert one.arrival_s == index * 0.1 <= one.token_s[0]
            assert len(one.token_s) == len(one.token_ids) and one.token_s[-1] == one.end_s <= found.seconds
        assert found.cpu_s is not None and found.peak_rss_bytes is not None and found.peak_rss_bytes > 2**20
        assert (found.iterations, found.computed_tokens) == ((), None)
        ignored = method.run(replace(work, ignore_eos=True))
        assert ignored.outputs[0] == (1, EOS, 3) and ignored.requests[0].finish_reason == "length"
        assert method.run(work.warm_up(1, 2)).outputs == ((1,), (6,))
        for part in ("llama.cpp (fake 1)", "weights: q4_1", "threads: 1", "continuous", "compiled for this machine"):
            assert part in method.description
    finally:
        method.close()
    method.close()


def test_it_is_told_what_the_base_is(bench: Bench, tmp_path: Path) -> None:
    """What the driver is asked to load is written down by it."""
    told, load = tmp_path / "told", "    def load(self, task):\n"
    facts = "(task, os.environ['MARK'], os.environ['OMP_NUM_THREADS'])"
    script = FAKE.replace(load, f"{load}        Path({str(told)!r}).write_text(repr({facts}))\n")
    method = make_outside("llama.cpp:q4_1,kv_unified=false", bench, cache(tmp_path, "llama_cpp", script=script))
    try:
        method.start(asked(*[[1, 2, 3]] * 6, max_tokens=100))
    finally:
        method.close()
    expected = {
        "op": "load",
        "model": str(bench.opened.checkpoint.path),
        "precision": "q4_1",
        "threads": 1,
        "max_len": 64,  # the context
        "padded_len": 64,
        "max_requests": 4,  # the base's rows
        "settings": {"kv_unified": False},
    }
    assert told.read_text() == repr((expected, "yes", "1"))


def test_the_process_ends(bench: Bench, tmp_path: Path) -> None:
    method = make_outside("llama.cpp", bench, cache(tmp_path, "llama_cpp"))
    method.start(asked([1]))
    first = pid_of(method)
    method.start(asked([1]))
    second = pid_of(method)
    assert not alive(first) and alive(second)
    method.close()
    assert not alive(second)


def test_one_that_dies_loses_its_own_row(bench: Bench, tmp_path: Path) -> None:
    method = make_outside("llama.cpp", bench, cache(tmp_path, "llama_cpp"))
    work = asked([1], [5, 13])
    failed: list[tuple[str, str]] = []
    try:
        method.start(work)
        pid = pid_of(method)

        def fail(name: str, error: HeadraceError) -> None:
            failed.append((name, str(error)))

        runs = run_rounds([PlantedMethod("serial"), method], work, 2, lambda text: None, fail)
        assert list(runs) == ["serial"]
        (name, reason) = failed[0]
        assert name == "llama.cpp" and len(failed) == 1
        assert "ended without an answer (exit status 3); its last words: 'bad luck'" in reason
        assert not alive(pid)
        with pytest.raises(EngineError, match="ended before it was asked"):
            method.run(work)
    finally:
        method.close()


def test_what_is_not_set_up_says_how_to(bench: Bench, tmp_path: Path) -> None:
    nowhere = make_outside("openvino", bench)
    with pytest.raises(EngineError, match="no folder for outside engines"):
        nowhere.start(asked([1]))
    bare = cache(tmp_path)
    with pytest.raises(EngineError, match=r"openvino is not set up here; run: headrace compare --setup openvino demo$"):
        make_outside("openvino", bench, bare).start(asked([1]))
    half = make_outside("transformers-compiled", bench, cache(tmp_path, "transformers"))
    with pytest.raises(EngineError, match="hf is not there; make it: headrace compare demo --setup transformers"):
        half.start(asked([1]))
    half.close()


def test_a_folder_is_no_model_for_them(bench: Bench, tmp_path: Path) -> None:
    opened = OpenModel(EngineConfig(str(tiny_model(tmp_path / "tiny")), prefix_cache=False))
    with closing(opened), pytest.raises(ConfigError, match=r"or a \.gguf file"):
        make_outside("openvino", Bench(opened), cache(tmp_path, "openvino")).start(asked([1]))


def test_one_that_does_not_load(bench: Bench, tmp_path: Path) -> None:
    script = FAKE.replace('task["model"] == "missing"', "True")
    method = make_outside("llama.cpp", bench, cache(tmp_path, "llama_cpp", script=script))
    with pytest.raises(EngineError, match=r"^llama.cpp: ValueError: no such model$"):
        method.start(asked([1]))
    assert method._process is None


@pytest.mark.parametrize("said", ['{"ok": true}', '{"ok": true, "requests": [{"token_ids": [], "token_s": []}]}'])
def test_an_answer_that_is_none(bench: Bench, tmp_path: Path, said: str) -> None:
    load = '{"ok": true, "versions": {}, "scheduling": "static"}'
    script = f"import sys\nsays = [{load!r}, {said!r}]\nfor line in sys.stdin: print(says.pop(0), flush=True)"
    method = make_outside("llama.cpp", bench, cache(tmp_path, "llama_cpp", script=script))
    try:
        method.start(asked([1]))
        assert "static batches" in method.description
        with pytest.raises(EngineError, match=r"^llama.cpp: its driver's answer cannot be read"):
            method.run(asked([1]))
    finally:
        method.close()


def test_names(bench: Bench, demo_path: Path) -> None:
    with open_checkpoint(demo_path) as checkpoint:
        assert stored_as(checkpoint) == "q4_1"
    for wrong in ("llama.cpp:int4", "llama.cpp:", "openvino,x", "transformers-eager"):
        with pytest.raises(InvalidParameter, match=r"^methods: got .*allowed: "):
            make_outside(wrong, bench)
    assert parse_spec("transformers-continuous:fp32").settings == {"continuous": True}
    assert parse_spec("transformers-compiled,compile=false", "q4_1").settings == {"compile": False}
    nearest = {name: [engine.nearest(kind) for kind in ("q4_1", "f16", "q6_k")] for name, engine in ENGINES.items()}
    assert nearest["llama.cpp"] == ["q4_1", "f16", "f32"]
    assert nearest["ctranslate2"] == ["float32"] * 3
    assert nearest["onnxruntime"] == nearest["vllm"] == nearest["transformers-compiled"] == ["fp32"] * 3


def test_where_an_answer_ends(tmp_path: Path) -> None:
    (tmp_path / "fake.py").write_text(FAKE)
    process = PeerProcess("fake", [sys.executable, "-I", str(tmp_path / "fake.py")], os.environ)
    try:
        process.ask(LOAD, 60)
        natural = process.ask(task([5], [8], max_tokens=4) | {"ignore_eos": False, "eos_token_ids": [7, 90]}, 60)
        assert [one["token_ids"] for one in natural["requests"]] == [[6, 7], [9, 10, 11, 12]]
        for one in natural["requests"]:
            assert len(one["token_s"]) == len(one["token_ids"])
            assert (one["first_s"], one["last_s"]) == (one["token_s"][0], one["token_s"][-1])
        ignored = process.ask(task([5], max_tokens=4) | {"ignore_eos": True, "eos_token_ids": [7]}, 60)
        assert ignored["requests"][0]["token_ids"] == [6, 7, 8, 9]
        for wrong in ({"ignore_eos": False}, {"ignore_eos": "no"}, {"ignore_eos": False, "eos_token_ids": []}):
            with pytest.raises(EngineError, match="ignore_eos: true, or false with eos_token_ids"):
                process.ask(task([5]) | wrong, 60)
    finally:
        process.close()


@given(
    st.lists(st.lists(st.integers(0, 9), max_size=4), max_size=8),
    st.integers(1, 12),
    st.frozensets(st.integers(0, 9), max_size=3),
)
def test_what_comes_after_the_end_is_dropped(pieces: list[list[int]], most: int, ends: frozenset[int]) -> None:
    one = Asked("a", [1], most, 0.0, ends)
    run = Run([one], {}, ends)
    for piece in pieces:
        run.take(one, piece)
    expected: list[int] = []
    for token in (token for piece in pieces for token in piece):
        expected.append(token)
        if token in ends or len(expected) == most:
            break
    assert one.output == expected and len(one.token_s) == len(expected)
    assert one.done == (len(expected) == most or (bool(expected) and expected[-1] in ends))


def test_no_more_at_once_than_an_engine_takes() -> None:
    run = parse_run(task([1], [2], [3]))
    assert [one.id for one in run.wait(2)] == ["r0", "r1"]
    assert [one.id for one in run.arrived(2)] == ["r2"]
    assert run.wait(2) == [] and not run.waiting and run.next_s == float("inf")
    later = parse_run(task([1], [2], gap_s=3600.0))
    assert [one.id for one in later.wait(5)] == ["r0"] and later.arrived() == []
    assert 3000 < later.next_s <= 3600


def test_our_own_driver_ends_answers_as_the_engine_does(bench: Bench) -> None:
    """On the demo model: the same tokens as in process."""
    ids = bench.opened.encode([{"role": "user", "content": "What is 2+2? Answer with one number."}])
    work = Workload("w", (WorkloadRequest(ids, 12),))
    core, _ = bench.opened.start()
    natural, ignored = (play(core, one, "own") for one in (work, replace(work, ignore_eos=True)))
    assert natural.requests[0].finish_reason == "stop" and len(ignored.outputs[0]) == 12
    engine = Engine()
    engine.load(LOAD | {"model": "demo", "max_len": 64, "settings": {"max_num_seqs": 4}})
    for expected, more in ((natural, {"ignore_eos": False, "eos_token_ids": [EOS]}), (ignored, {})):
        run = parse_run(task(list(ids), max_tokens=12) | more)
        engine.run(run)
        assert tuple(run.report()["requests"][0]["token_ids"]) == expected.outputs[0]
