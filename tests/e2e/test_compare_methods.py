"""Methods of `headrace compare` on real models: the same token ids, and nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from headrace.compare.methods import Outcome
from headrace.compare.methods.bench import Bench
from headrace.compare.methods.instances import InstancesMethod
from headrace.compare.methods.registry import make_method
from headrace.compare.workloads import Workload, WorkloadRequest
from headrace.core.config import EngineConfig
from headrace.core.errors import ConfigError, EngineError, HeadraceError
from headrace.engine.model import OpenModel
from headrace.testing.checkpoints import tiny_checkpoint

EXACT = ("fused", "static:2", "dataloader", "dataloader:2", "threads", "threads:2", "no-kv-cache", "instances:2")


@contextmanager
def bench_of(model: object, **settings: object) -> Iterator[Bench]:
    config = EngineConfig(str(model), threads=1, prefix_cache=False, max_num_seqs=4, **settings)  # type: ignore[arg-type]
    with closing(OpenModel(config)) as opened, closing(Bench(opened)) as bench:
        yield bench


def run(name: str, bench: Bench, asked: Workload) -> Outcome:
    with closing(make_method(name, bench)) as method:
        method.start(asked)
        return method.run(asked)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("models") / "tiny", eos_token_id=[61, 77])


def random_requests(count: int, vocab_size: int, longest: int, max_tokens: int) -> Workload:
    rng = np.random.default_rng(7)
    lengths = rng.integers(1, longest, count)
    prompts = [tuple(rng.integers(3, vocab_size, length).tolist()) for length in lengths]
    return Workload("random", tuple(WorkloadRequest(one, int(rng.integers(1, max_tokens))) for one in prompts))


def gone(pid: int) -> bool:
    """Ended; whether anybody has asked for its status does not matter."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except (FileNotFoundError, ProcessLookupError):
        return True
    return status.rpartition(")")[2].split()[0] in ("Z", "X")


def pids(method: InstancesMethod) -> list[int]:
    return [instance.pid for instance in method._instances]


@pytest.mark.demo
def test_on_the_demo_model_every_exact_method_gives_the_tokens_of_serial(demo_path: Path) -> None:
    texts = ("The capital of France is", "One, two, three,", "Water boils at", "Once upon a time")
    with bench_of("demo", max_model_len=512) as bench:
        encode = bench.opened.encode
        lengths = (7, 3, 5, 4)
        pairs = zip(texts, lengths, (0.0, 0.0, 0.0, 0.2), strict=True)
        requests = tuple(WorkloadRequest(encode(text), length, at) for text, length, at in pairs)
        asked = Workload("four", requests)
        serial = run("serial", bench, asked)
        assert tuple(map(len, serial.outputs)) == lengths
        for name in EXACT:
            found = run(name, bench, asked)
            assert found.outputs == serial.outputs, name
            assert [one.finish_reason for one in found.requests] == ["length"] * 4
            for request in found.requests:
                assert request.arrival_s <= request.first_token_s <= request.end_s <= found.seconds
            assert found.computed_tokens is not None and serial.computed_tokens is not None
            expected = {"no-kv-cache": ">", "dataloader": ">", "dataloader:2": ">"}.get(name, "=")
            assert (found.computed_tokens > serial.computed_tokens) == (expected == ">"), name


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_random_requests_have_the_tokens_of_serial_their_natural_ends_included(backend: str, tiny: Path) -> None:
    asked = random_requests(12, 97, 80, 24)
    with bench_of(tiny, backend=backend, max_num_batched_tokens=32) as bench:
        serial = run("serial", bench, asked)
        assert {one.finish_reason for one in serial.requests} == {"stop", "length"}
        for name in ("dataloader:3", "threads:3", "no-kv-cache"):
            found = run(name, bench, asked)
            assert found.outputs == serial.outputs, name
            assert [one.finish_reason for one in found.requests] == [one.finish_reason for one in serial.requests]


def test_plain_attention_holds_all_scores_and_gives_the_same_answers(tiny: Path) -> None:
    from headrace.backends.torch import attention

    longest: list[int] = []
    original = attention.ops.attention
    asked = random_requests(3, 97, 200, 8)
    with bench_of(tiny, backend="torch") as bench, pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention.ops, "attention", lambda q, *more: longest.append(q.shape[1]) or original(q, *more))
        serial = run("serial", bench, asked)
        tiled, longest[:] = max(longest), []
        found = run("plain-attention", bench, asked)
        per_head, unit = 3, 4
        assert tiled == attention.TILE * per_head
        whole = max(map(len, asked.prompts)) * per_head
        assert max(longest) == -(-whole // unit) * unit > tiled
        assert found.outputs == serial.outputs, "in float32, on weights whose logits are far apart"
        longest[:] = []
        assert run("serial", bench, asked).outputs == serial.outputs
        assert max(longest) == tiled, "serial is tiled again"


def test_methods_that_cannot_run_say_why(tiny: Path) -> None:
    asked = random_requests(2, 97, 9, 3)
    with bench_of(tiny, backend="native", quant="int8") as bench:
        with pytest.raises(ConfigError, match=r"^plain-attention: the native backend .*compare with --backend torch"):
            run("plain-attention", bench, asked)
        with pytest.raises(ConfigError, match=r"^fused-int8: the base's weights are rounded to int8 already"):
            run("fused-int8", bench, asked)
    with bench_of(tiny, backend="torch") as bench, pytest.raises(HeadraceError, match=r"^quant: got 'int8', allowed:"):
        run("fused-int8", bench, asked)


@pytest.mark.demo
def test_packed_weights_are_not_rounded_again(demo_path: Path) -> None:
    wanted = r"^fused-int4: this checkpoint's weights are packed, and stay "
    with bench_of("demo", max_model_len=64) as bench, pytest.raises(ConfigError, match=wanted):
        make_method("fused-int4", bench).start(random_requests(1, 97, 9, 3))


@pytest.mark.parametrize(("name", "quant"), [("fused-int8", "int8"), ("fused-int4", "int4")])
def test_rounded_weights_are_an_engine_of_its_own(name: str, quant: str, tiny: Path) -> None:
    asked = random_requests(5, 97, 30, 9)
    with bench_of(tiny, backend="native", dtype="bfloat16") as bench:
        serial = run("serial", bench, asked)
        method = make_method(name, bench)
        assert not method.exact and method.config is None
        with closing(method):
            assert method.start(asked) > 0
            assert method.config is not None
            changed = {"quant": quant, "reasons": method.config.reasons}
            assert method.config == replace(bench.opened.config, **changed)  # type: ignore[arg-type]
            found = method.run(asked)
        method.close()
        assert len(found.outputs) == len(serial.outputs)
        assert max(one.in_flight for one in found.iterations) == 4
        assert run("serial", bench, asked).outputs == serial.outputs
    with bench_of(tiny, backend="native", quant=quant) as own:
        assert run("serial", own, asked).outputs == found.outputs, "the answers of that quantisation"


@pytest.fixture
def instances(demo_path: Path) -> Iterator[tuple[InstancesMethod, Workload]]:
    """Three processes of a small model's engine, started."""
    with bench_of("demo", max_model_len=256) as bench:
        asked = random_requests(3, 1000, 8, 4)
        method = make_method("instances", bench)
        assert isinstance(method, InstancesMethod)
        with closing(method):
            assert method.start(asked) > 0
            yield method, asked


@pytest.mark.demo
def test_instances_are_processes_that_end_with_their_method(instances: tuple[InstancesMethod, Workload]) -> None:
    method, asked = instances
    assert method.description.startswith("3 processes, each with its own copy of the model")
    assert "wanted" not in method.description
    running = pids(method)
    assert len(running) == 3 and not any(map(gone, running))
    for _ in range(2):
        found = method.run(asked)
        assert found.cpu_s is not None and found.cpu_s > 0
        assert found.peak_rss_bytes is not None and found.peak_rss_bytes > 3 * 50e6
        assert found.seconds == max(one.end_s for one in found.requests)
    method.close()
    method.close()
    assert all(map(gone, running))
    with pytest.raises(EngineError, match=r"^instances: its processes have ended$"):
        method.run(asked)


@pytest.mark.demo
@pytest.mark.parametrize("idle", [False, True])
def test_an_instance_that_is_killed_ends_the_run_and_the_others(
    idle: bool, instances: tuple[InstancesMethod, Workload]
) -> None:
    """`idle`: while all wait for a request that is an hour away; else in the middle of a long answer."""
    method, _ = instances
    running = pids(method)
    requests = (WorkloadRequest((1, 2, 3), 1 if idle else 250), WorkloadRequest((4,), 1, 3600.0))
    killer = threading.Timer(0.5, os.kill, (running[0], signal.SIGKILL))
    killer.start()
    began = time.monotonic()
    wanted = rf"^instances: instance 1 \(process {running[0]}\) was ended by signal 9$"
    with pytest.raises(EngineError, match=wanted):
        method.run(Workload("long", requests, ignore_eos=True))
    killer.join()
    assert time.monotonic() - began < 600
    assert all(map(gone, running))


@pytest.mark.demo
def test_an_instance_that_cannot_load_ends_those_before_it(
    demo_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "copy.gguf"
    copy.symlink_to(demo_path)
    with bench_of(copy, max_model_len=64) as bench:
        method = make_method("instances:3", bench)
        assert isinstance(method, InstancesMethod)
        _ = bench.backend
        add, started = method._add, list[int]()

        def add_once(settings: EngineConfig) -> None:
            add(settings)
            started.extend(pids(method))
            copy.unlink()

        monkeypatch.setattr(method, "_add", add_once)
        with pytest.raises(EngineError, match=r"^instances:3: instance 2: "):
            method.start(random_requests(1, 97, 9, 3))
        assert started and all(map(gone, started)) and pids(method) == []


ORPHANS = """
import sys, time
from tests.e2e.test_compare_methods import bench_of, make_method, pids, random_requests
with bench_of("demo", max_model_len=64) as bench:
    method = make_method("instances:2", bench)
    method.start(random_requests(1, 97, 9, 3))
    print(*pids(method), flush=True)
    time.sleep(3600)
"""


@pytest.mark.demo
def test_instances_do_not_outlive_a_process_that_is_killed(demo_path: Path) -> None:
    root = Path(__file__).parents[2]
    with subprocess.Popen([sys.executable, "-c", ORPHANS], cwd=root, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        started = [int(pid) for pid in parent.stdout.readline().split()]
        parent.kill()
    assert len(started) == 2
    for _ in range(400):
        if all(map(gone, started)):
            break
        time.sleep(0.05)
    assert all(map(gone, started))


@pytest.mark.demo
def test_fewer_instances_than_asked_for_where_memory_is_short(demo_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from headrace.compare.methods import instances as module

    with bench_of("demo", max_model_len=64) as bench:
        _ = bench.backend
        hardware = replace(module.probe_hardware(), free_memory_bytes=300_000_000)
        monkeypatch.setattr(module, "probe_hardware", lambda: hardware)
        with closing(make_method("instances:32", bench)) as method:
            method.start(random_requests(1, 97, 9, 3))
            assert isinstance(method, InstancesMethod)
            assert len(pids(method)) == int(method.description.split()[0]) < 8
            assert "; 32 were wanted, one takes " in method.description
            assert method.description.endswith(" MB and 300 MB were free")
