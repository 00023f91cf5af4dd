"""plan offload: FlexGen's cost model to the digit, the bound of streaming against published runs, placements that hold
what they promise."""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.cli import plan_offload
from headrace.core.errors import BackendUnavailable, ConfigError, InputFileError, InvalidParameter
from headrace.core.sizing import weight_bytes
from headrace.core.sizing_work import LayerLoad, infinity_parameters, infinity_state_bytes
from headrace.plan import placement
from headrace.plan.devices import find_device
from headrace.plan.document import Document
from headrace.plan.fragments import deepspeed_inference, inference_notes
from headrace.plan.json import as_json
from headrace.plan.offload import (
    TIERS,
    Block,
    Policy,
    Task,
    bound,
    copied_layers,
    memory,
    plain_rates,
    step_seconds,
    times,
)
from headrace.plan.offload_answer import checks_document, example_document, placement_document
from headrace.plan.offload_machine import (
    BMINF_BYTES,
    BMINF_GPUS,
    BMINF_KEPT,
    BMINF_LAYERS,
    BMINF_SECONDS,
    EXAMPLES,
    FLEXGEN_T4,
    Disk,
    machine_of,
    task_of,
)
from headrace.plan.profile import Figure, Machine, Profile, default_path, write_profile
from headrace.plan.subject import read_subject

GB = 10**9
DEVICE, HOST, DISK = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))


def number(document: Document, name: str) -> float:
    value = next(one.value for one in document.quantities if one.name == name)
    assert isinstance(value, int | float)
    return value


# ---------------------------------------------------------------- golden


def test_flexgen_opt_30b_to_the_digit() -> None:
    """FlexGen, experimental/cost_model.py: 48 × 3 sequences, weights 20/80, cache and activations on the host."""
    run = EXAMPLES["opt-30b"]
    found = times(run.task, run.machine.rates, run.block, run.policy)
    assert f"{found.prefill.seconds:.3f} {found.decode.seconds:.4f}" == "4.389 0.2924"
    assert f"{found.total:.2f} {found.throughput:.3f}" == "645.76 7.136"
    assert f"{100 * (found.throughput / run.published - 1):.1f}" == "-2.5"
    assert found.decode.binding == "compute"


def test_flexgen_opt_175b_is_marked_as_not_reproducible() -> None:
    """The same constants give 0.154 of the published 0.69 tokens/s."""
    run = EXAMPLES["opt-175b"]
    assert f"{times(run.task, run.machine.rates, run.block, run.policy).throughput:.3f}" == "0.154"
    document = example_document(run)
    assert any("not reproducible with the default constants" in note for note in document.notes)
    assert number(document, "published throughput") == 0.69


def test_the_bound_against_published_runs() -> None:
    """DeepNVMe's blog: Llama-3-70B, batch 96; GLM-130B's notes on BMInf."""
    table = checks_document().tables[0]
    shown = {str(row[0]): (f"{row[1]:.1f}", row[2], round(float(row[3] or 0))) for row in table.rows}
    disk = "DeepNVMe, Llama-3-70B, batch 96, {} GB/s"
    assert shown[disk.format(10)] == ("6.8", 7, -3)
    assert shown[disk.format(27)] == ("18.4", 17, 8)
    assert shown[disk.format(48)] == ("32.7", 26, 26)
    layer = BMINF_BYTES / BMINF_LAYERS / BMINF_GPUS
    assert f"{layer / BMINF_SECONDS / 1e9:.2f}" == "6.19"
    assert copied_layers(BMINF_LAYERS, layer, BMINF_KEPT) == 13
    assert copied_layers(BMINF_LAYERS, layer, BMINF_LAYERS * layer + 1) == 0


@pytest.mark.parametrize(
    ("layers", "hidden", "parameters", "states"),
    [
        (80, 10_240, "0.10", "1.83"),
        (100, 20_480, "0.50", "9.16"),
        (128, 25_600, "1.01", "18.31"),
        (195, 65_536, "10.05", "182.81"),
        (315, 163_840, "101.5", "1845.70"),
    ],
)
def test_zero_infinitys_table(layers: int, hidden: int, parameters: str, states: str) -> None:
    """ZeRO-Infinity, Table 1: 12 nl hd² parameters (10¹²), 240 nl hd² bytes (TiB)."""
    digits = len(parameters.partition(".")[2])
    assert f"{infinity_parameters(layers, hidden) / 1e12:.{digits}f}" == parameters
    assert f"{infinity_state_bytes(layers, hidden) / 2**40:.2f}" == states


def test_prefetch_takes_the_longer_and_no_prefetch_the_sum() -> None:
    assert step_seconds(100, 10, 4) == 10
    assert step_seconds(100, 10, 40) == 40
    assert step_seconds(100, 10, 4, prefetch=False) == 14
    assert bound(140 * GB, 10 * GB, 96) == pytest.approx(96 * 10 / 140)


# ---------------------------------------------------------------- time and memory of a policy

SMALL = LayerLoad(
    hidden_size=512, cache_parts=4, weights=6e6, linear=6e6, attention=2048, kv=2048, hidden=1024, inner=20_000
)
TASK = Task(8, SMALL, 64, 16, resident=1e6)
RATES = plain_rates(link=8e9, read=1e9, write=0.5e9, flops=5e12, bandwidth=100e9, host_flops=1e11, host_bandwidth=2e10)


def test_weights_on_disk_take_what_the_disk_takes() -> None:
    found = times(TASK, RATES, Block(4), Policy(DISK, DEVICE, DEVICE))
    assert found.decode.seconds == pytest.approx(SMALL.weights / 1e9)
    assert found.decode.binding == "read"
    assert found.throughput <= bound(SMALL.weights * TASK.layers, 1e9, 4)


def test_without_prefetch_a_layer_takes_the_sum() -> None:
    policy = Policy(DISK, HOST, DEVICE)
    busy = times(TASK, RATES, Block(4), policy).decode.busy
    alone = times(TASK, replace(RATES, overlap="none"), Block(4), policy).decode.seconds
    assert alone == pytest.approx(sum(busy.values())) and alone > max(busy.values())


def test_the_head_takes_its_part_of_every_token() -> None:
    """A head of 32 MB at 100 GB/s for each of two batches; with many rows its FLOPs instead: 2 · 8 · 16e9 / 5e12."""
    policy, block = Policy(DEVICE, DEVICE, DEVICE), Block(8, 2)
    without = times(TASK, RATES, block, policy)
    with_head = times(replace(TASK, head_flops=32e6, head_bytes=32e6), RATES, block, policy)
    assert with_head.head == pytest.approx(2 * 32e6 / 100e9)
    assert with_head.total - without.total == pytest.approx(16 * with_head.head)
    assert times(replace(TASK, head_flops=16e9), RATES, block, policy).head == pytest.approx(2 * 8 * 16e9 / 5e12)
    assert task_of(read_subject("llama-2-7b").spec, "bf16", "bfloat16", 8, 8).head_bytes == 2 * 32_000 * 4096


def test_everything_on_the_device_moves_nothing() -> None:
    found = times(TASK, RATES, Block(2, 2), Policy(DEVICE, DEVICE, DEVICE))
    assert {name for name, seconds in found.decode.busy.items() if seconds} == {"compute"}
    assert not any(memory(TASK, Block(2, 2), Policy(DEVICE, DEVICE, DEVICE).shares)["host"].values())


def test_memory_of_a_policy() -> None:
    """Weights and cache are whole where they are kept; two layers' buffers where they are streamed."""
    block = Block(2, 3)
    held = memory(TASK, block, Policy(HOST, DISK, HOST).shares)
    cache = SMALL.kv * (64 + 16) * 6 * TASK.layers
    assert held["disk"] == {"prefill": cache}
    assert held["host"]["prefill"] == pytest.approx(8 * 6e6 + 6e6 + 1024 * 64 * (6 + 2))
    assert held["device"]["prefill"] == pytest.approx(2 * 6e6 + 1e6 + 1024 * 64 * 2 + 2 * 64 * 20_000)


def test_a_model_of_a_config() -> None:
    spec = read_subject("llama-2-70b").spec
    task = task_of(spec, "bf16", "bfloat16", 512, 32)
    assert task.layers * task.load.weights + task.resident == weight_bytes(spec)
    assert task.load.kv * task.layers == 327_680
    assert task.load.linear * task.layers == 2 * 80 * (2 * 8192 * 8192 + 2 * 8192 * 1024 + 3 * 8192 * 28_672)
    packed = task_of(spec, "int4", "int8", 512, 32)
    assert packed.load.weights == pytest.approx(task.load.weights * 4.125 / 16, rel=1e-3)
    assert packed.load.kv == task.load.kv / 2


# ---------------------------------------------------------------- search


def machine(device: float, host: float, disk: float) -> placement.Machine:
    return replace(FLEXGEN_T4, name="small", memory=(device, host, disk), rates=RATES, share=1.0)


def test_the_programme_finds_no_worse_than_flexgens_own_policy() -> None:
    run = EXAMPLES["opt-30b"]
    best = placement.search(run.task, run.machine).best
    assert placement.fits(run.task, run.machine, best.block, best.policy)
    assert run.published <= best.times.throughput <= best.bound * (1 + 1e-6)


WHOLE = Task(4, replace(SMALL, cache_parts=2), 64, 16)


def deals(count: int) -> list[tuple[float, float, float]]:
    return [
        (first / count, second / count, (count - first - second) / count)
        for first in range(count + 1)
        for second in range(count + 1 - first)
    ]


@settings(max_examples=12, deadline=None)
@given(st.floats(0.3, 1.4), st.floats(0.0, 1.2), st.sampled_from([2, 4]))
def test_wholes_equal_brute_force(device: float, host: float, sequences: int) -> None:
    """Every deal of 4 layers, the heads and the batches over three tiers, against the integer programme."""
    size = WHOLE.layers * SMALL.weights
    where = machine(device * size, host * size, 10 * size)
    best = 0.0
    for block in placement.blocks(sequences):
        layers, heads, batches = placement.units(WHOLE, block)
        hidden = [deal for deal in deals(batches) if deal[2] == 0]
        for deal in itertools.product(deals(layers), deals(heads), hidden):
            policy = Policy(*deal)
            if placement.fits(WHOLE, where, block, policy):
                best = max(best, times(WHOLE, RATES, block, policy).throughput)
    if not best:
        with pytest.raises(InvalidParameter, match="at least"):
            placement.search(WHOLE, where, sequences)
        return
    found = placement.search(WHOLE, where, sequences).best
    assert placement.fits(WHOLE, where, found.block, found.policy)
    assert found.times.throughput == pytest.approx(best, rel=2e-4)


def test_more_memory_is_worth_something_where_it_binds() -> None:
    size = TASK.layers * SMALL.weights
    where = machine(0.5 * size, 0.0, 10 * size)
    found = placement.search(TASK, where, 4)
    gains = placement.value_of_more(TASK, where, found, more=0.3 * size)
    assert set(gains) == {"device", "disk"}
    assert gains["device"] > 0.1 * found.best.times.throughput and gains["disk"] == 0.0


def test_nothing_fits_and_the_error_names_the_tier_and_what_is_enough() -> None:
    size = TASK.layers * SMALL.weights
    where = machine(0.4 * size, 0.2 * size, 0.1 * size)
    with pytest.raises(
        InvalidParameter, match=r"^disk_memory: got .*, allowed: at least [\d.]+ GB for 2 sequences"
    ) as it:
        placement.search(TASK, where, 2)
    enough = float(str(it.value).partition("at least ")[2].partition(" GB")[0])
    assert placement.search(TASK, machine(0.4 * size, 0.2 * size, enough * GB), 2)
    with pytest.raises(InvalidParameter, match=r"^device_memory"):
        placement.search(TASK, machine(1e5, size, 10 * size), 2)


def test_the_answer_for_a_real_machine() -> None:
    spec = read_subject("llama-2-70b").spec
    host = replace(find_device("epyc"), memory_bytes=100 * GB)
    where = machine_of(find_device("4090"), host, Disk(1e12, 5e9, 5e9, "measured here", "measured"))
    document = placement_document("llama", task_of(spec, "bf16", "bfloat16", 512, 32), where, 64)
    reached = number(document, "throughput")
    assert reached <= number(document, "at most, by the disk")
    assert reached <= number(document, "throughput of shares of any size") * (1 + 1e-6)
    sentence = document.notes[0]
    assert sentence.startswith("At most ") and "because the disk gives 5 GB/s (measured)" in sentence
    assert number(document, "1 GB more of host memory adds") > 0
    assert all(one.basis == "data sheet" for one in document.quantities if one.name == "throughput")
    rows = {row[0]: row for row in document.tables[0].rows}
    assert sum(float(x or 0) for x in rows["weights"][5:8]) == pytest.approx(80)
    assert all(float(x or 0).is_integer() for x in rows["weights"][5:8])
    assert all(0 < float(row[3] or 0) <= 100.0001 for row in document.tables[2].rows)
    best, chosen, *bounds = document.plots[0].series
    assert (best.style, chosen.style) == ("line", "dots") and [one.style for one in bounds] == ["dashed"] * 2
    for one in bounds:
        assert all(reached <= most for (_, reached), (_, most) in zip(best.points, one.points, strict=True))
    assert len(document.tables[2].rows) == len(TIERS)
    assert json.loads(as_json(document))["data"]["block"]["rows"] >= 1


def test_a_cpu_alone_has_two_tiers() -> None:
    spec = read_subject("llama-2-7b").spec
    where = machine_of(replace(find_device("epyc"), memory_bytes=8 * GB), None, Disk(1e12, 1e9, 1e9, "disk", "given"))
    document = placement_document("llama", task_of(spec, "bf16", "bfloat16", 64, 8), where, 1)
    weights = document.tables[0].rows[0]
    assert weights[3] == 0 and float(weights[4] or 0) > 0
    with pytest.raises(InvalidParameter, match="a link to a host"):
        machine_of(find_device("epyc"), find_device("epyc"), None)


# ---------------------------------------------------------------- the command


def ask(*words: str) -> Document:
    parser = argparse.ArgumentParser()
    plan_offload.add_arguments(parser)
    return plan_offload.document(parser.parse_args(words))


def test_the_command_writes_zero_inference(tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    words = ["--device", "4090", "--host", "epyc", "--host-memory", "64", "--disk-read", "3", "--disk-memory", "500"]
    document = ask("llama-2-70b", *words, "--sequences", "8", "--deepspeed", str(file))
    config = json.loads(file.read_text())
    assert config["train_micro_batch_size_per_gpu"] == 8
    offload = config["zero_optimization"]["offload_param"]
    assert offload["device"] == "nvme" and offload["buffer_size"] == 8192 * 32_000
    policy = document.data["policy"]
    assert isinstance(policy, Policy) and math.isclose(offload["max_in_cpu"], policy.weights[1] * 68_976_648_192)
    assert document.notes[-1] == f"Written: {file}"


def test_zero_inference_without_a_disk_and_without_offloading() -> None:
    host = deepspeed_inference(Block(4), Policy(HOST, DEVICE, DEVICE), 10, 10)
    assert host["zero_optimization"] == {"stage": 3, "offload_param": {"device": "cpu", "pin_memory": True}}
    assert inference_notes(Policy(HOST, DEVICE, DEVICE)) == []
    half = inference_notes(Policy((0.5, 0.5, 0.0), HOST, DEVICE))
    assert "the 50 % that the placement keeps" in half[0] and "KV cache" in half[1]
    kept = deepspeed_inference(Block(4), Policy(DEVICE, DEVICE, DEVICE), 10, 10)
    assert kept["zero_optimization"] == {"stage": 0}


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ([], "model: got None"),
        (["llama-2-7b", "--checks"], "model: got 'model, checks'"),
        (
            ["llama-2-7b", "--device", "epyc", "--link", "8"],
            "link: got 8.0, allowed: to leave it out, or --device NAME",
        ),
        (["llama-2-7b", "--device", "epyc", "--deepspeed", "x"], "deepspeed: got 'x', allowed: beside --device NAME"),
        (
            ["llama-2-7b", "--device", "t4", "--host", "epyc", "--form", "int4", "--deepspeed", "x"],
            "form: got 'int4', allowed: bf16 with --deepspeed",
        ),
        (["llama-2-7b", "--device", "4090", "--host", "H100"], "host: got 'H100', allowed: a CPU"),
        (["llama-2-7b", "--device", "RTX-1"], "device: got 'RTX-1', allowed: A100"),
        (
            ["llama-2-7b", "--device", "t4", "--host", "epyc", "--prompt", "4090"],
            "prompt: got 4090, allowed: at most 4064",
        ),
        (["llama-2-7b", "--device", "t4", "--host", "epyc", "--output", "0"], "output: got 0"),
        (["llama-2-7b", "--device", "t4", "--host", "epyc", "--sequences", "-1"], "sequences: got -1"),
        (["llama-2-7b", "--device", "t4", "--host", "epyc", "--share", "1.5"], "share: got 1.5"),
        (["llama-2-7b", "--device", "t4", "--host", "epyc", "--disk-read", "nan"], "disk_read: got nan"),
        (["llama-2-7b", "--device", "t4", "--host", "epyc", "--disk-memory", "5"], "disk_read: got None"),
        (
            ["--preset", "opt-30b", "--deepspeed", "x.json"],
            "deepspeed: got 'x.json', allowed: to leave it out with --p",
        ),
        (["--preset", "opt-30b", "--prompt", "64"], "prompt: got 64, allowed: to leave it out with --preset"),
        (["--checks", "--device", "H100"], "device: got 'H100', allowed: to leave it out with --checks"),
    ],
)
def test_bad_input_is_named(words: list[str], error: str) -> None:
    with pytest.raises(InvalidParameter) as refused:
        ask(*words)
    assert str(refused.value).startswith(error) and "\n" not in str(refused.value)


def probed(folder: Path) -> str:
    """A machine of 16 GB with a GPU's link, as a probe would write it."""
    machine = Machine(
        *("a CPU", 4, 4, "avx2", 16 * GB, {"L3": 2**25}, "Linux", "3.11", {}, "2030-01-01T00:00:00", 0.0, 0.0),
    )
    figures = [
        Figure(
            "gemm",
            {"weights": "float32", "rows": 256, "n": 4096, "k": 4096, "set_bytes": 2**28},
            "FLOP/s",
            (3e11, 3.1e11),
        ),
        Figure("read", {"bytes": 2**30}, "bytes/s", (4e10,)),
        Figure("disk", {"where": "here", "bytes": 2**27}, "bytes/s", (2e9, 2.2e9, 2.1e9), "in /home (ext4)"),
        Figure("host_link", {"to": "device"}, "bytes/s", (2.5e10,), "pinned host memory"),
    ]
    write_profile(Profile(machine, figures, 30.0), folder / "probe.json")
    return str(folder / "probe.json")


def test_a_probed_machine_alone_and_as_a_host(tmp_path: Path) -> None:
    """Bandwidths come from the probe: of the disk for a CPU alone, of disk and link where it has a GPU."""
    profile = probed(tmp_path)
    alone = ask("llama-2-70b", "--profile", profile, "--device-memory", "64", "--sequences", "4")
    assert "because the disk gives 2.1 GB/s (measured)" in alone.notes[0]
    assert {one.basis for one in alone.quantities} == {"measured"}
    assert not any("data sheets" in note for note in alone.notes)
    assert "in /home (ext4)" in alone.quantities[1].source
    host = ask("llama-2-7b", "--profile", profile, "--device", "t4", "--device-memory", "8", "--sequences", "4")
    link = next(one for one in host.quantities if one.name == "at most, by the host link")
    assert link.basis == "measured" and "at 25.00 GB/s" in link.note
    assert any("data sheets" in note for note in host.notes)
    with pytest.raises(InvalidParameter, match=r"host_memory: got 8.0, .*--device NAME of a GPU"):
        ask("llama-2-7b", "--profile", profile, "--host-memory", "8")


def test_the_host_of_a_device_is_the_machine_that_was_probed_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    words = ["llama-2-7b", "--device", "t4", "--device-memory", "8", "--sequences", "4"]
    with pytest.raises(ConfigError, match=r"not probed yet .*--device NAME and --host NAME"):
        ask(*words)
    folder = default_path(tmp_path / "headrace").parent
    folder.mkdir(parents=True, exist_ok=True)
    Path(probed(folder)).rename(default_path(tmp_path / "headrace"))
    assert "a CPU" in ask(*words).title


def test_without_scipy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(BackendUnavailable, match=r"pip install 'headrace\[plan\]'"):
        ask("--preset", "opt-30b")
    assert ask("--checks").tables


def test_a_profile_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputFileError, match="headrace plan probe"):
        ask("llama-2-7b", "--profile", str(tmp_path / "none.json"))
