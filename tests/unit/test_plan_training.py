"""plan training: ZeRO's, Megatron's and Frontier's published figures, layouts that fit, config fragments that parse."""

from __future__ import annotations

import argparse
import json
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.cli import plan_training
from headrace.core.errors import InvalidParameter
from headrace.core.flops import attention_flops, token_flops
from headrace.core.sizing import parameters
from headrace.core.sizing_work import (
    activation_bytes,
    deepspeed_estimate,
    infinity_efficiency,
    infinity_intensity,
    infinity_working_bytes,
    tensor_parallel_traffic,
    training_flops,
    zero_bytes,
    zero_traffic,
)
from headrace.core.spec import MoeSpec
from headrace.plan.devices import find_device
from headrace.plan.document import Document
from headrace.plan.fragments import deepspeed_training, json_text, toml_text, torchtitan
from headrace.plan.json import as_json
from headrace.plan.subject import read_subject
from headrace.plan.training import (
    Cluster,
    Layout,
    bubble,
    candidates,
    gpt,
    gpu_memory,
    host_traffic,
    reached,
    step_interval,
    step_time,
)
from headrace.plan.training_answer import search_document, training_document
from headrace.plan.training_published import checks_document, presets

GPT3 = gpt("GPT-3", 96, 12_288, 96)
SMALL = gpt("small", 8, 256, 8, vocab=1000)
A100 = Cluster(find_device("A100-80GB"))


def number(document: Document, name: str) -> float:
    value = next(one.value for one in document.quantities if one.name == name)
    assert isinstance(value, int | float)
    return value


# ---------------------------------------------------------------- golden


def test_zeros_example() -> None:
    """ZeRO, Figure 1: 7.5 billion parameters, 64 GPUs: 120, 31.4, 16.6, 1.9 GB."""
    totals = [sum(zero_bytes(7.5e9, 64, stage).values()) / 1e9 for stage in range(4)]
    assert [f"{total:.1f}" for total in totals] == ["120.0", "31.4", "16.6", "1.9"]


def test_deepspeeds_estimators() -> None:
    """stage_1_and_2.py, stage3.py: 2P + 18P/N; 4 · largest + 18P/N; what is offloaded, 1.5 times on each host."""
    assert deepspeed_estimate(1e9, 1e8, 8, sharded=False) == (2e9 + 18e9 / 8, 0)
    assert deepspeed_estimate(1e9, 1e8, 8, sharded=True) == (4e8 + 18e9 / 8, 0)
    assert deepspeed_estimate(1e9, 1e8, 8, True, ("optimizer", "gradients", "parameters")) == (4e8, 27e9)
    assert deepspeed_estimate(1e9, 1e8, 8, True, ("optimizer",), nodes=2) == (4e8 + 2e9 / 8, 12e9)
    assert deepspeed_estimate(1e9, 1e8, 8, False, ("optimizer",)) == (2e9, 48e9)
    assert deepspeed_estimate(1e9, 1e8, 2, False, ("optimizer",)) == (2e9, 24e9)
    # The answer hands over what lies on the host: optimizer states leave the GPU with stage 2 as well.
    layout = Layout(8, zero=2, offload="optimizer")
    estimate = number(training_document(SMALL, layout, A100, "here"), "DeepSpeed's own estimate")
    assert estimate == 2 * parameters(SMALL)


@pytest.mark.parametrize("tp", [1, 2, 8])
@pytest.mark.parametrize("micro_batch", [1, 4])
def test_megatrons_activations(tp: int, micro_batch: int) -> None:
    """Reducing Activation Recomputation, Table 2, for GPT-3's layer."""
    layer, h, a, s = GPT3.layers[0], 12_288, 96, 2048
    tokens = s * micro_batch
    whole = tokens * h
    assert activation_bytes(layer, h, tokens, s, tp) == pytest.approx(whole * (10 + 24 / tp + 5 * a * s / (h * tp)))
    assert activation_bytes(layer, h, tokens, s, tp, True) == pytest.approx(whole * (34 + 5 * a * s / h) / tp)
    assert activation_bytes(layer, h, tokens, s, tp, True, "selective") == pytest.approx(whole * 34 / tp)
    assert activation_bytes(layer, h, tokens, s, tp, recompute="full") == 2 * whole
    assert activation_bytes(layer, h, tokens, s, tp, True, "full") == 2 * whole / tp


def test_a_gated_layer_with_grouped_queries() -> None:
    """Llama-3-8B by hand: 8h of inputs; q, k, v and what o reads; gate, up, activation, product; a sum a head."""
    spec = read_subject("llama-3-8b").spec
    found = activation_bytes(spec.layers[0], 4096, 1, 2048, fused=True, dropout=False)
    assert found == 8 * 4096 + 2 * (2 * 4096 + 2 * 1024) + 2 * 4 * 14_336 + 4 * 32


def test_frontiers_figures() -> None:
    """38.38, 36.14 and 31.96 % of 191.5 TFLOPS; 14 bytes a parameter; 6 · 1e12 · 20e12 FLOPs."""
    document = checks_document()
    table = next(one for one in document.tables if one.title == "Frontier")
    assert [f"{row[2]:.1f}" for row in table.rows] == ["73.5", "69.2", "61.2"]
    assert [row[3] for row in table.rows] == [308.0, 2450.0, 14_000.0]
    assert number(document, "1T parameters on 20T tokens") == 120e6
    zero = document.tables[0]
    assert [f"{row[4]:.1f}" for row in zero.rows] == [f"{float(row[5] or 0):.1f}" for row in zero.rows]
    assert number(document, "V100-32GB that hold the states of 1T, 20 B a parameter") == 625
    assert number(document, "V100-32GB that hold the states of 1T, 16 B a parameter") == 500
    assert number(document, "ZeRO-Offload: 16-bit parameters of 13B") == 26
    infinity = next(one for one in document.tables if one.title.startswith("ZeRO-Infinity"))
    for _, _, count, published, states, shown in infinity.rows:
        assert abs(float(count or 0) - float(published or 0)) <= (0.05 if float(published or 0) > 100 else 0.005)
        assert f"{states:.2f}" == f"{shown:.2f}"


def test_published_layouts_fit_their_gpus() -> None:
    """GLM-130B: TP 4 × PP 8 × DP 24 = 768 A100-40GB; Frontier: 175B at TP 4, PP 16, 1T at TP 8, PP 64."""
    runs = presets()
    assert runs["glm-130b"].layout.dp == 24 and runs["glm-130b"].layout.global_batch == 4224
    for name, billions in (("gpt-175b", 175), ("gpt-1t", 1008), ("glm-130b", 129)):
        assert round(parameters(runs[name].spec) / 1e9) == billions
    table = checks_document().tables[-1]
    assert [row[-3] for row in table.rows] == [True, True, True]
    # Without sharding the optimizer it would not: what ZeRO-1 is for.
    glm = runs["glm-130b"]
    assert gpu_memory(glm.spec, replace(glm.layout, zero=0)).total > 40e9


def test_predicted_shares_of_the_peak_are_near_the_published_ones() -> None:
    """Frontier: 36.14 and 31.96 % over whole steps of 175B and 1T; one efficiency of compute for both."""
    rows = {row[0]: row for row in checks_document().tables[-1].rows}
    for name, published in (("gpt-175b", 36.14), ("gpt-1t", 31.96)):
        assert rows[name][-1] == published
        assert abs(float(rows[name][-2] or 0) / published - 1) < 0.1
        preset = presets()[name]
        cluster = Cluster(find_device(preset.device))
        fast, slow = step_interval(preset.spec, preset.layout, cluster)
        time = step_time(preset.spec, preset.layout, cluster)
        # The published step lies in the interval.
        step = time.expected * 100 * reached(preset.spec, preset.layout, cluster, time) / published
        assert fast < step < slow


def test_communication() -> None:
    """ZeRO, §7: 2P elements up to stage 2, 3P at stage 3, 2 bytes each; Megatron-LM: four all-reduces a layer."""
    assert [zero_traffic(1e9, stage) for stage in range(4)] == [4e9, 4e9, 4e9, 6e9]
    assert [zero_traffic(1, stage, 8) for stage in range(4)] == [4, 4, 18, 48]
    assert tensor_parallel_traffic(2048, 1024, 1, 2) == 4 * 2 * 2048 * 1024
    assert tensor_parallel_traffic(2048, 1024, 1, 1) == 0
    plus = checks_document().tables[1].rows
    assert plus[2][1] == 4 * float(plus[3][1] or 0)


def test_offloading() -> None:
    """ZeRO-Offload, §4: 4Ψ bytes a step. ZeRO-Infinity, §4: AIT · bw / (AIT · bw + peak), and its working memory."""
    layout = Layout(1, zero=2, offload="optimizer", micro_batches=4)
    assert host_traffic(1e9, layout) == 4e9
    assert host_traffic(1e9, replace(layout, zero=3, offload="all")) == 20e9
    assert infinity_intensity("parameters", 1024, 2, 8192) == 2048
    assert infinity_intensity("optimizer", 1024, 2, 8192) == 512
    assert infinity_intensity("activations", 1024, 2, 8192, between=2) == 24 * 8192 * 2
    assert infinity_efficiency(2048, 70e9, 70e12) == pytest.approx(2.048 / 3.048)
    assert infinity_working_bytes(8192, 16, 2, 1024) == (16 * 8192**2, 2 * 1024 * (16 * 8192 + 2 * 16 * 1024))


def test_the_bubble() -> None:
    """Megatron-LM, §2.2: (p − 1)/m, interleaved /v."""
    assert bubble(Layout(8, pp=8, micro_batches=14)) == 0.5
    assert bubble(Layout(8, pp=8, micro_batches=14, interleave=2)) == 0.25
    assert bubble(Layout(8, pp=1)) == 0


def test_flops_of_training() -> None:
    """Three times forward, four with full recomputation of the layers; attention causal."""
    s = 1024
    forward = token_flops(SMALL) + attention_flops(SMALL, s) / 2
    assert training_flops(SMALL, s) == pytest.approx(3 * forward)
    again = forward - 2 * SMALL.vocab_size * SMALL.hidden_size
    assert training_flops(SMALL, s, "full") == pytest.approx(3 * forward + again)


# ---------------------------------------------------------------- memory and time of a layout


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 8]), st.integers(1, 8),
    st.sampled_from(["none", "selective", "full"]), st.booleans(),
)  # fmt: skip
def test_more_sharding_never_takes_more(tp: int, pp: int, dp: int, m: int, recompute: str, parallel: bool) -> None:
    layout = Layout(
        tp * pp * dp, tp, pp, 0, micro_batches=m, sequence=128, recompute=recompute, sequence_parallel=parallel
    )  # type: ignore[arg-type]
    totals = [sum(gpu_memory(SMALL, replace(layout, zero=zero)).states.values()) for zero in range(4)]
    assert totals == sorted(totals, reverse=True)
    time = step_time(SMALL, layout, A100)
    assert 0 < time.low <= time.expected <= time.high
    whole = sum(zero_bytes(parameters(SMALL), 1, 0).values())
    assert whole / (tp * pp) * 0.9 < totals[0] <= whole


def test_activations_of_a_pipeline() -> None:
    """1F1B: the first of p stages holds p micro-batches of layers/p, so as much as one GPU with one; no more than m."""
    base = Layout(4, pp=4, zero=0, micro_batches=8, sequence=128)
    of_layers = activation_bytes(SMALL.layers[0], 256, 128, 128, fused=True, dropout=False) * 8
    assert gpu_memory(SMALL, base).activations == pytest.approx(of_layers)
    assert gpu_memory(SMALL, replace(base, micro_batches=2)).activations == pytest.approx(of_layers / 2)
    interleaved = gpu_memory(SMALL, replace(base, interleave=2)).activations
    assert interleaved == pytest.approx(of_layers * (1 + 3 / 8))


def test_offload_moves_states_to_the_host() -> None:
    kept = gpu_memory(SMALL, Layout(4, zero=3))
    away = gpu_memory(SMALL, Layout(4, zero=3, offload="all"))
    assert away.host == pytest.approx(sum(kept.states.values())) and not sum(away.states.values())
    some = gpu_memory(SMALL, Layout(4, zero=2, offload="optimizer"))
    assert some.states["parameters"] and not some.states["gradients"] + some.states["optimizer"]
    assert step_time(SMALL, Layout(4, zero=2, offload="optimizer"), A100).offload > 0
    document = training_document(SMALL, Layout(4, zero=3, offload="all"), A100, "here")
    # 2048 FLOPs a byte, four host links of 32 GB/s, 312 TFLOP/s.
    share = 2048 * 4 * 32e9 / (2048 * 4 * 32e9 + 312e12)
    assert number(document, "efficiency by the parameters' transfers") == pytest.approx(100 * share)
    assert any("leaves out the optimizer's own time" in note for note in document.notes)


@pytest.mark.parametrize(
    ("layout", "error"),
    [
        (Layout(8, tp=3), "gpus: got 8, allowed: a multiple of tp × pp = 3"),
        (Layout(48, tp=3), "tp: got 3"),
        (Layout(16, pp=16), "pp: got 16, allowed: at most the 8 layers"),
        (Layout(8, zero=4), "zero: got 4"),
        (Layout(8, interleave=2), "interleave: got 2"),
        (Layout(8, zero=0, offload="optimizer"), "offload: got 'optimizer', allowed: with --zero 1"),
        (Layout(8, zero=2, offload="all"), "offload: got 'all', allowed: with --zero 3"),
        (Layout(8, micro_batch=0), "micro_batch: got 0"),
    ],
)
def test_layouts_that_cannot_be(layout: Layout, error: str) -> None:
    with pytest.raises(InvalidParameter) as refused:
        gpu_memory(SMALL, layout)
    assert str(refused.value).startswith(error)


def test_a_search_lists_what_fits_fastest_first() -> None:
    found = list(candidates(GPT3, A100, Layout(256), 256))
    assert found and all(one.memory.total <= A100.room for one in found)
    assert all(one.layout.global_batch == 256 and one.layout.gpus == 256 for one in found)
    document = search_document(GPT3, Layout(256), A100, 256, "here")
    speeds = [float(row[-1] or 0) for row in document.tables[0].rows]
    assert speeds == sorted(speeds, reverse=True) and speeds[0] == max(one.tokens_per_s for one in found)
    with pytest.raises(InvalidParameter, match=r"gpus: got 1, allowed: more A100-80GB"):
        search_document(GPT3, Layout(1), A100, 1, "here")


def test_a_search_heeds_offloading_and_names_the_flags_of_what_it_found() -> None:
    found = ask("llama-2-7b", "--search", "--offload", "optimizer", "--sequence", "1024")
    options = next(one.note for one in found.quantities if one.name == "smallest")
    again = ask("llama-2-7b", *options.split())
    smallest = min(float(row[6] or 0) for row in found.tables[0].rows)
    assert {row[3] for row in found.tables[0].rows} <= {1, 2, 3}
    assert "--offload optimizer" in options and "--sequence-parallel" in options
    assert number(again, "memory of a GPU in all") / 1e9 <= smallest
    assert number(again, "on the host for each GPU") > 0


def test_experts_that_are_not_chosen_cost_memory_and_no_flops() -> None:
    layer = SMALL.layers[0]
    experts = MoeSpec(num_experts=8, experts_per_token=2, intermediate=1024, normalise_weights=True)
    sparse = replace(SMALL, layers=(replace(layer, mlp=replace(layer.mlp, experts=experts)),) * 8)
    dense = replace(SMALL, layers=(replace(layer, mlp=replace(layer.mlp, intermediate=2048)),) * 8)
    run = [
        number(training_document(one, Layout(8), A100, "here", tokens=1e9), "FLOPs of the run")
        for one in (sparse, dense)
    ]
    assert run[0] == pytest.approx(run[1], rel=0.01) and parameters(sparse) > 3 * parameters(dense)


def test_the_answer() -> None:
    document = training_document(SMALL, Layout(8, zero=1), A100, "here", tokens=1e9)
    step = next(one for one in document.quantities if one.name == "step")
    assert isinstance(step.value, float) and step.low is not None and step.low <= step.value
    assert step.basis == "data sheet" and step.formula and step.source
    # 6 a parameter; causal attention besides: 6 · layers · hidden · sequence.
    each = 6 * parameters(SMALL) + 6 * 8 * 256 * 2048
    assert number(document, "FLOPs of the run") == pytest.approx(each * 1e9 / 1e18, rel=0.01)
    assert number(document, "rent") == pytest.approx(3.67 * number(document, "GPU-hours"))
    assert document.notes[0].startswith("It fits")
    # Compute is taken at the published efficiency, and nothing else takes time on one GPU.
    alone = training_document(SMALL, Layout(1, zero=0), A100, "here")
    assert number(alone, "of the peak, in the model's own FLOPs") == pytest.approx(44)
    assert all(one.source for one in document.quantities)
    longer = ask("llama-2-7b", "--sequence", "8192")
    assert any("longer than the model's 4096" in note for note in longer.notes)
    large = training_document(GPT3, Layout(8), A100, "here")
    assert large.notes[0].startswith("It does not fit")


# ---------------------------------------------------------------- the command and its files


def ask(*words: str) -> Document:
    parser = argparse.ArgumentParser()
    plan_training.add_arguments(parser)
    return plan_training.document(parser.parse_args(words))


def test_deepspeed_json(tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    document = ask("llama-2-7b", "--gpus", "8", "--zero", "3", "--offload", "all", "--deepspeed", str(file))
    config = json.loads(file.read_text())
    assert config["train_batch_size"] == 8
    assert config["train_micro_batch_size_per_gpu"] * config["gradient_accumulation_steps"] * 8 == 8
    assert config["zero_optimization"]["stage"] == 3 and config["bf16"] == {"enabled": True}
    assert config["zero_optimization"]["offload_param"]["device"] == "cpu"
    assert document.notes[-1] == f"Written: {file}"
    assert "fp16" in deepspeed_training(Layout(8), "float16")
    # Megatron-DeepSpeed's own code deals out layers beside a pipeline.
    assert "tensor_parallel" not in deepspeed_training(presets()["gpt-175b"].layout)
    shared = deepspeed_training(Layout(16, tp=4, zero=2, recompute="full"))
    assert shared["tensor_parallel"] == {"autotp_size": 4} and "activation_checkpointing" in shared
    assert json.loads(json_text(shared)) == shared


def test_torchtitan_toml(tmp_path: Path) -> None:
    file = tmp_path / "titan.toml"
    ask(
        *("llama-3-8b", "--gpus", "64", "--tp", "4", "--pp", "2", "--zero", "3", "--sequence-parallel"),
        *("--global-batch", "128", "--sequence", "8192", "--recompute", "full", "--torchtitan", str(file)),
    )
    config = tomllib.loads(file.read_text())
    parallel = config["parallelism"]
    degrees = [parallel[f"{name}_degree"] for name in ("data_parallel_shard", "tensor_parallel", "pipeline_parallel")]
    assert degrees == [8, 4, 2] and parallel["data_parallel_replicate_degree"] == 1
    assert parallel["fsdp_reshard_after_forward"] == "always" and parallel["pipeline_parallel_microbatch_size"] == 1
    assert config["training"]["local_batch_size"] == 16 and config["training"]["global_batch_size"] == 128
    assert config["training"]["seq_len"] == 8192 and config["activation_checkpoint"] == {"mode": "full"}
    # torchtitan 0.2, pipeline_parallel.py: (layers + less of first + less of last) / layers a stage, a multiple of PP.
    assert parallel["pipeline_parallel_layers_per_stage"] == 16
    assert parallel["pipeline_parallel_first_stage_less_layers"] == 0
    interleaved = torchtitan(Layout(8, pp=4, zero=3, interleave=4, micro_batches=8), 32)["parallelism"]
    assert interleaved["pipeline_parallel_schedule"] == "Interleaved1F1B"
    assert interleaved["pipeline_parallel_layers_per_stage"] == 2
    replicas = tomllib.loads(toml_text(torchtitan(Layout(4, zero=0), 32)))
    assert replicas["parallelism"]["data_parallel_replicate_degree"] == 4
    kept = torchtitan(Layout(4, zero=2), 32)["parallelism"]
    assert kept["fsdp_reshard_after_forward"] == "never"


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ([], "model: got None"),
        (["llama-2-7b", "--preset", "gpt-1t"], "model: got 'model, preset'"),
        (["llama-2-7b", "--checks"], "model: got 'model, checks'"),
        (["--gpt", "12,768"], "gpt: got '12,768'"),
        (["--gpt", "12,768,7"], "gpt: got '12,768,7'"),
        (["llama-2-7b", "--gpus", "-8"], "gpus: got -8"),
        (["llama-2-7b", "--gpus", "8", "--tp", "3"], "gpus: got 8"),
        (["llama-2-7b", "--global-batch", "12"], "global_batch: got 12, allowed: a multiple of DP × micro-batch = 8"),
        (["llama-2-7b", "--efficiency", "0"], "efficiency: got 0.0"),
        (["llama-2-7b", "--network", "nan"], "network: got nan"),
        (["llama-2-7b", "--tokens", "-1"], "tokens: got -1.0"),
        (["llama-2-7b", "--device", "B1"], "device: got 'B1'"),
        (["llama-2-7b", "--zero", "1", "--torchtitan", "x"], "zero: got 1, allowed: 0 (replicas), 2 or 3"),
        (["llama-2-7b", "--pp", "2", "--zero", "0", "--torchtitan", "x"], "zero: got 0, allowed: 2 or 3 with tp or pp"),
        (["llama-2-7b", "--zero", "3", "--recompute", "selective", "--torchtitan", "x"], "recompute: got 'selective'"),
        (["llama-2-7b", "--zero", "3", "--device", "v100", "--torchtitan", "x"], "device: got 'float16'"),
        (["llama-2-7b", "--pp", "2", "--interleave", "2", "--deepspeed", "x"], "interleave: got 2, allowed: 1"),
        (["llama-2-7b", "--device", "epyc"], "device: got 'EPYC-7763', allowed: one with 16-bit arithmetic"),
        (["llama-2-7b", "--pp", "2", "--zero", "2", "--deepspeed", "x"], "zero: got 2, allowed: 0 or 1 with pp > 1"),
        (["llama-2-7b", "--search", "--deepspeed", "x"], "deepspeed: got 'x', allowed: to leave it out with --search"),
        (["llama-2-7b", "--search", "--tp", "2"], "tp: got 2, allowed: to leave it out with --search"),
        (["--checks", "--tokens", "1e12"], "tokens: got 1000000000000.0, allowed: to leave it out with --checks"),
    ],
)
def test_bad_input_is_named(words: list[str], error: str) -> None:
    with pytest.raises(InvalidParameter) as refused:
        ask(*words)
    assert str(refused.value).startswith(error) and "\n" not in str(refused.value)


def test_presets_and_checks_answer() -> None:
    assert "GLM-130B" in ask("--preset", "glm-130b").title
    assert json.loads(as_json(ask("--preset", "glm-130b")))["data"]["layout"]["tp"] == 4
    assert ask("--preset", "gpt-175b", "--gpus", "2048").title.startswith("Training 175B of Frontier on 2048")
    assert ask("--checks").tables
    assert ask("--gpt", "24,2048,16", "--search").tables
