"""Comparisons on a GPU, with one made by hand: what verdicts allow, what is said of roundings, who gets its memory."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from headrace.backends.base import Backend, BackendOptions
from headrace.cli.main import main
from headrace.cli.serve import add_arguments
from headrace.compare import machine, score
from headrace.compare.advice import Advice, advise, measured_text, model_text, serve_command
from headrace.compare.arithmetic import order_text, rounded_activations, rounding_text
from headrace.compare.document import document
from headrace.compare.flover.plan import shapes
from headrace.compare.flover.results import CellRun, same_tokens
from headrace.compare.measure import run_rounds
from headrace.compare.methods import Method, Outcome, instances, quantised
from headrace.compare.methods.bench import Bench, share_card
from headrace.compare.methods.instances import instances_beside
from headrace.compare.methods.registry import make_method
from headrace.compare.report import page
from headrace.compare.runner import Comparison, MethodResult
from headrace.compare.score import measure_epsilon, reference_here, reference_of
from headrace.compare.verdict import Verdict, divergences
from headrace.compare.workloads import Workload, WorkloadRequest
from headrace.core.config import EngineConfig, Gpu, Hardware, ResolvedConfig
from headrace.core.errors import ConfigError, InvalidParameter, OutOfMemory
from headrace.core.sizing import blocks_for
from headrace.core.types import Capacity
from headrace.engine import model
from headrace.engine.identity import identify_model
from headrace.engine.model import OpenModel
from headrace.testing.checkpoints import tiny_checkpoint
from headrace.testing.fake import FakeBackend
from tests.unit.compare_cases import CONFIG, OUTPUTS, PlantedMethod, comparison, outcome

GIB = 2**30
H200 = Gpu("NVIDIA H200", 140 * GIB, 139 * GIB, (9, 0), 132)
A100 = Gpu("NVIDIA A100", 40 * GIB, 39 * GIB, (8, 0), 108)
ON_GPU = replace(CONFIG, device="cuda", batch_invariant=False)
NEAR = ((5, 6, 7, 8), (9, 10, 12))
ASKED = Workload("asked", (WorkloadRequest((5, 6, 7), 6), WorkloadRequest((9,), 3)), ignore_eos=True)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("models") / "tiny", max_position_embeddings=4096)


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts a GPU into this machine; None takes it out again."""

    def put(gpu: Gpu | None, memory: int = 64 * GIB) -> None:
        found = Hardware(2, memory, ("native", "torch"), gpu, "no GPU")
        for module in (model, score, instances, quantised, machine):
            monkeypatch.setattr(module, "probe_hardware", lambda: found)

    return put


@contextmanager
def opened_on_gpu(path: Path, **settings: Any) -> Iterator[OpenModel]:
    with closing(OpenModel(EngineConfig(str(path), **{"prefix_cache": False} | settings))) as opened:
        yield opened


@pytest.fixture
def fake_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of whatever a model is loaded into."""

    def load(opened: OpenModel, name: str, options: BackendOptions, *_: object) -> tuple[Backend, Capacity]:
        capacity = Capacity(options.num_blocks, options.block_size, options.max_rows, options.max_tokens)
        backend = FakeBackend(opened.spec.vocab_size)
        backend.open(capacity)
        return backend, capacity

    monkeypatch.setattr(OpenModel, "load_backend", load)


# ---------------------------------------------------------------- verdicts


def judged(config: ResolvedConfig, epsilon: float) -> Comparison:
    """serial, and a fused three times as fast whose second answer leaves serial's where serial's margin is 0.25."""
    slow, fast = (tuple(outcome(OUTPUTS, at) for at in (3.0, 3.1, 3.2)), tuple(outcome(NEAR, 1.0) for _ in range(3)))
    planted = comparison({"serial": slow, "fused": fast})
    expected = slow[0].outputs

    def again(one: MethodResult) -> MethodResult:
        found = divergences(expected, one.rounds[0].outputs, planted.margins, epsilon)
        return replace(one, config=config, divergences=found)

    return replace(planted, methods=tuple(map(again, planted.methods)), config=config)


def advice_on(config: ResolvedConfig, epsilon: float = 1.0) -> Advice:
    found = judged(config, epsilon)
    return advise(found.methods, found.bound)


def test_a_near_tie_breaks_no_promise_where_the_order_follows_the_batch() -> None:
    fused = judged(ON_GPU, 1.0).methods[1]
    assert (fused.verdict.kind, fused.identical, fused.kept) == (Verdict.NEAR_TIE, False, True)
    assert not replace(fused, exact=False).kept and not replace(fused, config=None).kept
    found = advice_on(ON_GPU)
    assert found.method == "fused" and found.headline.endswith("with identical tokens but for 1 near-tie")
    assert not any("is out" in line for line in found.sentences)


@pytest.mark.parametrize(
    ("config", "epsilon"),
    [(ON_GPU, 0.25), (replace(ON_GPU, batch_invariant=True), 1.0), (replace(CONFIG, batch_invariant=True), 1.0)],
    ids=["different", "batch-invariant", "cpu"],
)
def test_anything_else_does(config: ResolvedConfig, epsilon: float) -> None:
    found = advice_on(config, epsilon)
    assert found.method == "serial" and any(line.startswith("fused is out") for line in found.sentences)


def test_a_study_on_a_gpu_says_what_a_difference_may_be() -> None:
    runs = {"fused": (outcome(OUTPUTS, 1.0),), "serial": (outcome(NEAR, 1.0),)}
    shape, both = shapes(1)[0], frozenset(runs)
    on_cpu, on_gpu = (same_tokens([CellRun(shape, ASKED, runs, both, free)], "fused") for free in (False, True))
    assert not on_cpu.holds and not on_gpu.holds
    assert "near-ties" not in on_cpu.detail and "--batch-invariant leaves none" in on_gpu.detail


def test_the_command_for_a_server_says_the_mode() -> None:
    reasons = {"device": "as set", "batch_invariant": "as set", "quant": "none: plain"}
    command = serve_command("m", "fused-fp8", replace(ON_GPU, batch_invariant=True, reasons=reasons))
    assert command == "headrace serve m --policy fused --device cuda --batch-invariant --quant fp8"
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    given = parser.parse_args(command.split()[2:])
    assert given.batch_invariant is True and (given.device, given.quant) == ("cuda", "fp8")


# ---------------------------------------------------------------- words


@pytest.mark.parametrize(
    ("quant", "on_cpu", "on_gpu"),
    [
        ("none", "", ""),
        ("stored", "8 bits where they meet packed weights: that", "packed in 8 bits, and nowhere else"),
        ("int8", "are rounded to 8 bits too", "are rounded to 8 bits too"),
        ("int4", "are rounded to 8 bits, where", "are not rounded: they stay bfloat16."),
        ("fp8", None, "are rounded to fp8 too"),
    ],
)
def test_what_is_rounded(quant: str, on_cpu: str | None, on_gpu: str) -> None:
    if on_cpu is not None:
        assert on_cpu in rounding_text(replace(CONFIG, quant=quant))
        wanted = quant != "none"
        assert bool(rounded_activations(replace(CONFIG, quant=quant), is_packed=quant == "stored")) == wanted
    config = replace(ON_GPU, quant=quant)
    assert on_gpu in rounding_text(config)
    assert bool(rounded_activations(config, is_packed=quant == "stored")) == (quant in ("stored", "int8", "fp8"))
    assert rounded_activations(replace(config, quant="stored"), is_packed=False) == ""


def test_reports_name_the_gpu_and_where_the_reference_ran() -> None:
    found = judged(ON_GPU, 1.0)
    found = replace(found, machine=replace(found.machine, gpu="NVIDIA H200"))
    assert "torch backend on NVIDIA H200, bfloat16" in measured_text(found)
    assert "after a warm-up of one run;" in measured_text(found)
    assert document(found, advice_on(ON_GPU))["warm_up"] == {"runs": 1, "max_requests": 2, "max_tokens": 4}
    html = page(found, advice_on(ON_GPU))
    assert "NVIDIA H200" in html and "of the whole workload (kernels are compiled" in html
    assert "an answer that leaves serial’s at a near-tie" in html.replace("&#x27;", "’").replace("'", "’")
    assert "float32 KV cache; on the CPU, for the GPU has no room for it)" in model_text(found)
    beside = replace(found, reference=replace(found.reference, device="cuda"))
    assert "on the CPU" not in model_text(beside)
    assert "--batch-invariant none may differ" in order_text(ON_GPU)
    assert order_text(CONFIG) == order_text(replace(ON_GPU, batch_invariant=True)) == ""


def test_settings_that_shape_answers(tiny: Path, on: Callable[..., None]) -> None:
    on(H200)

    def settings(**chosen: Any) -> Mapping[str, Any]:
        with opened_on_gpu(tiny, **chosen) as opened:
            return identify_model(opened).settings

    assert (settings()["device"], settings()["batch_invariant"]) == ("cuda", False)
    assert settings(batch_invariant=True)["batch_invariant"]
    assert not settings(device="cpu").keys() & {"device", "batch_invariant"}


def test_the_command_takes_the_flags(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["compare", "--help"])
    told = capsys.readouterr().out
    assert all(flag in told for flag in ("--device", "--batch-invariant", "fused-fp8"))


# ---------------------------------------------------------------- memory


def test_the_base_leaves_room_for_others(tiny: Path, on: Callable[..., None]) -> None:
    on(H200)
    with opened_on_gpu(tiny, max_model_len=64) as opened:
        before = opened.config
        share_card(opened, ASKED)
        # Two requests of 3 + 6 tokens, a block more each.
        assert opened.config.num_blocks == 4 < before.num_blocks
        assert opened.config.reasons["num_blocks"].startswith("4: what this workload fills")
        reasons = {**opened.config.reasons, "num_blocks": before.reasons["num_blocks"]}
        assert replace(opened.config, num_blocks=before.num_blocks, reasons=reasons) == before
        assert opened.options().num_blocks == 4
    for settings in ({"kv_cache_mib": 8}, {"device": "cpu"}, {"max_num_seqs": 1}):
        with opened_on_gpu(tiny, **settings) as opened:
            before = opened.config
            share_card(opened, ASKED)
            least = blocks_for(before.max_model_len, before.block_size)
            assert opened.config == before and before.num_blocks >= least


def started(name: str, opened: OpenModel) -> Method:
    method = make_method(name, Bench(opened))
    try:
        method.start(ASKED)
    finally:
        method.close()
    return method


@pytest.mark.usefixtures("fake_backends")
@pytest.mark.parametrize("quant", ["int8", "int4", "fp8"])
def test_rounded_weights_beside_the_base(quant: str, tiny: Path, on: Callable[..., None]) -> None:
    on(H200)
    with opened_on_gpu(tiny, batch_invariant=True) as opened:
        share_card(opened, ASKED)
        config = started(f"fused-{quant}", opened).config
        assert config is not None and (config.device, config.quant) == ("cuda", quant)
        assert config.num_blocks >= opened.config.num_blocks and config.max_model_len == opened.config.max_model_len
        assert config.batch_invariant
        # The host's memory does not matter: weights pass through it.
        on(H200, memory=1)
        started(f"fused-{quant}", opened)
        on(replace(H200, free_bytes=14 * GIB))
        wanted = rf"^fused-{quant}: beside the base's engine, the model does not fit NVIDIA H200: .*below 4096 makes"
        with pytest.raises(OutOfMemory, match=wanted):
            started(f"fused-{quant}", opened)


@pytest.mark.usefixtures("fake_backends")
def test_what_cannot_be_on_this_device(tiny: Path, on: Callable[..., None]) -> None:
    on(A100)
    with opened_on_gpu(tiny) as opened:
        with pytest.raises(InvalidParameter, match=r"quant: got 'fp8', allowed: .*fp8 needs 8.9"):
            started("fused-fp8", opened)
        with pytest.raises(ConfigError, match=r"^plain-attention: on a GPU .*--backend torch --device cpu$"):
            started("plain-attention", opened)
    on(None)
    with opened_on_gpu(tiny) as opened, pytest.raises(ConfigError, match=r"^fused-fp8: products in fp8 need an"):
        started("fused-fp8", opened)


def test_how_many_instances() -> None:
    assert instances_beside(free=10, asked=4, each=3) == 3
    assert instances_beside(free=4, asked=4, each=3) == 1
    assert instances_beside(free=3, asked=4, each=3) == 0


@pytest.mark.usefixtures("fake_backends")
def test_an_instance_needs_room_on_the_gpu(tiny: Path, on: Callable[..., None]) -> None:
    on(H200)
    with opened_on_gpu(tiny) as opened:
        on(replace(H200, free_bytes=14 * GIB + 2**28), memory=10**15)
        wanted = r"^instances: another copy of the model takes \d+ MB, 268 MB are free; a --max-model-len below 4096"
        with pytest.raises(OutOfMemory, match=wanted):
            started("instances", opened)


def test_the_reference_is_where_it_has_room(tiny: Path, on: Callable[..., None]) -> None:
    on(H200)
    with opened_on_gpu(tiny) as opened:
        assert reference_here(opened, 100) == reference_of(opened.config)
        on(replace(H200, free_bytes=14 * GIB + 2**28))
        found = reference_here(opened, 100)
        assert (found.device, found.dtype, found.quant, found.backend) == ("cpu", "float32", "none", "torch")
        on(replace(H200, free_bytes=14 * GIB), memory=1000)
        with pytest.raises(OutOfMemory, match=r"needs the model in float32, .* NVIDIA H200 has 0.0 GiB for it"):
            reference_here(opened, 100)
    on(None)
    with opened_on_gpu(tiny) as opened:
        assert reference_here(opened, 100) == reference_of(opened.config)


def test_a_method_of_ours_is_warmed_up_by_a_whole_run() -> None:
    seen: dict[str, list[int]] = {"ours": [], "another": []}

    class Seeing(PlantedMethod):
        def run(self, workload: Workload) -> Outcome:
            seen[self.name].append(workload.max_tokens)
            return super().run(workload)

    ours, another = Seeing("ours"), Seeing("another")
    ours.config = ON_GPU
    long = replace(ASKED, requests=tuple(replace(one, max_tokens=60) for one in ASKED.requests))
    run_rounds([ours, another], long, 1, lambda text: None, lambda name, error: None, whole_warm_up=True)
    assert seen == {"ours": [60, 60], "another": [8, 60]}


# ---------------------------------------------------------------- kernels, interpreted


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("invariant", [False, True])
def test_epsilon_is_measured_between_the_two_modes(
    invariant: bool, tiny: Path, on: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    from headrace.backends.torch.gpu.backend import GpuBackend

    made: list[bool] = []

    class Interpreted(GpuBackend):
        def load(self, *arguments: Any) -> Capacity:
            made.append(arguments[2].batch_invariant)
            return super().load(*arguments)

    on(H200)
    monkeypatch.setattr(model, "create_backend", lambda *_: Interpreted("cpu"))
    with opened_on_gpu(tiny, dtype="float32", batch_invariant=invariant) as opened:
        found = measure_epsilon(opened, opened.config, [((5, 6), (7,))])
    assert made == [invariant, not invariant]
    assert found.positions == 1 and 0 <= found.value < 1e-4
    assert found.source == "the batch-invariant kernels against the quickest ones, a token at a time"
