"""`plan overlap`: NanoFlow's bound and published table, the simulator of nano-batches, ends of rows known late."""

from __future__ import annotations

import argparse
import math
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.cli import plan_overlap
from headrace.core.errors import InvalidParameter, ModelNotFound
from headrace.core.flops import all_reduce_bytes, token_flops
from headrace.core.sizing import parameters, weight_bytes
from headrace.models.registry import describe
from headrace.plan import overlap
from headrace.plan.devices import DEVICES, find_device
from headrace.plan.document import Document, Quantity, Table
from headrace.plan.nano_batches import RESOURCES, Op, retire, shares, simulate, split, staircase
from headrace.plan.subject import read_subject

LLAMA = read_subject("llama-2-70b")
EXAMPLES = 50
SECONDS = st.floats(0, 10, allow_subnormal=False)
CHAINS = st.lists(st.lists(st.builds(Op, st.just("op"), SECONDS, SECONDS, SECONDS), max_size=6), max_size=5)


def run(*words: str) -> Document:
    parser = argparse.ArgumentParser()
    plan_overlap.add_arguments(parser)
    return plan_overlap.document(parser.parse_args(words))


def quantity(found: Document, name: str) -> Quantity:
    (one,) = [one for one in found.quantities if one.name == name]
    return one


def table(found: Document, start: str) -> Table:
    (one,) = [one for one in found.tables if one.title.startswith(start)]
    return one


# ---------------------------------------------------------------- NanoFlow's numbers


def test_optimal_throughput_of_the_repository_is_1857_tokens_per_second_and_gpu() -> None:
    """NanoFlow, arXiv 2408.12757, optimal throughput; its repository's constant."""
    assert int(overlap.optimum(260e12, 70e9)) == 1857


def test_cost_analysis_of_llama_2_70b() -> None:
    """NanoFlow, cost analysis: LLaMA-2-70B, 8 x A100, B = 2048: 40 ms / 137.8 ms = 0.29."""
    found = overlap.iteration(LLAMA.spec, overlap.NANOFLOW_NODE, 2048, 70e9)
    assert round(1e3 * found.memory, 1) == 40.0
    assert round(1e3 * found.compute, 1) == 137.8
    assert round(found.memory_ratio, 2) == 0.29
    # 4 (N − 1) B d e n / (N · link), a link of 300 GB/s one way.
    assert found.network == pytest.approx(4 * 7 * 2048 * 8192 * 2 * 80 / (8 * 300e9))
    assert found.bottleneck == "compute"


def test_published_shares_of_1857() -> None:
    """NanoFlow, throughput on 8 x A100, shares of the bound; "1.91x" is the mean of the three traces."""
    share = [round(float(row[-2] or 0), 1) for row in overlap.published().rows]
    assert share == [69.3, 68.0, 65.3, 67.8, 67.2, 68.5]
    ratios = overlap.speed_ups()
    assert [round(one, 3) for one in ratios[3:]] == [1.515, 2.227, 1.991]
    assert round(math.fsum(ratios[3:]) / 3, 3) == 1.911
    assert round(ratios[2], 3) == 1.906
    assert round(math.fsum(ratios) / 6, 2) == 1.82
    assert round(max(ratios), 2) == 2.23
    assert "1.911" in overlap.published().notes[0]


def test_the_command_alone_is_the_published_case() -> None:
    found = run("--nano", "2,4")
    assert int(float(quantity(found, "optimal throughput").value or 0)) == 1857
    assert round(float(quantity(found, "T_R").value or 0), 2) == 0.29
    assert quantity(found, "T_R").basis == "published"
    assert quantity(found, "tokens wasted for each finished row").value == 1
    serial = float(quantity(found, "throughput, one operation after the other").value or 0)
    rows = table(found, "One iteration").rows
    assert rows[0][:1] == [1] and rows[0][3] == pytest.approx(serial)
    # Measured engines are slower than the simulation of their order of work, and it than the bound.
    assert overlap.MEASURED["TensorRT-LLM"][0] < serial < 1857
    assert all(overlap.MEASURED["NanoFlow"][0] < float(row[3] or 0) < 1890 for row in rows[1:])
    assert all(one.formula and one.source for one in found.quantities)


def test_the_devices_own_figures_and_an_own_model() -> None:
    found = run("llama-3-8b", "--device", "h100", "--gpus", "1", "--gemm-efficiency", "1")
    spec = read_subject("llama-3-8b").spec
    best = quantity(found, "optimal throughput")
    assert best.value == pytest.approx(DEVICES["H100"].flops["bfloat16"] / token_flops(spec))
    assert "H100 data sheet" in best.source and best.basis == "data sheet"
    assert quantity(found, "network (T_net)").value == 0
    assert not any("reduce" in str(row[0]) for row in table(found, "Operations").rows)


def test_operations_add_up_to_the_model() -> None:
    node, traffic = overlap.NANOFLOW_NODE, overlap.Traffic(2048, 512, 512)
    ops = overlap.operations(LLAMA.spec, node, traffic)
    products = [op for op in ops if op.fixed]
    assert sum(op.fixed for op in products) * node.gpus * node.bandwidth == pytest.approx(
        2 * (parameters(LLAMA.spec) - 32000 * 8192 - 161 * 8192)  # without embedding and norms
    )
    layers = sum(op.compute for op in products if op.name != "head") * node.gpus * node.compute
    assert layers == pytest.approx(2048 * (token_flops(LLAMA.spec) - 2 * 32000 * 8192))
    read = sum(op.memory for op in ops if op.name == "decode attention") * node.gpus * node.bandwidth
    assert read == pytest.approx(1024 * 768 * 327_680)
    reduced = sum(op.network for op in ops) * 300e9
    assert reduced == pytest.approx(2048 * all_reduce_bytes(LLAMA.spec, 2, 8))


def test_experts_are_all_read_and_some_computed_with() -> None:
    config = {
        "architectures": ["MixtralForCausalLM"],
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 128,
        "vocab_size": 256,
        "max_position_embeddings": 512,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
    }
    spec = describe(config, "hf", {}).spec
    node = overlap.Node(1, 1.0, 1e12, 1.0, None)
    ops = overlap.operations(spec, node, overlap.Traffic(16, 8, 8))
    expert = 64 * 128
    up = next(op for op in ops if op.name == "up")
    assert up.compute == 16 * 2 * (2 * 2 * expert + 8 * 64)
    assert up.fixed == 2 * (8 * 2 * expert + 8 * 64)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--gpus", "0"), "gpus"),
        (("--gpus", "8", "--device", "EPYC-7763"), "no link"),
        (("--batch", "-1"), "batch"),
        (("--output", "0"), "output"),
        (("--nano", "1,two"), "nano"),
        (("--nano", "0"), "nano"),
        (("--gemm-efficiency", "1.5"), "gemm_efficiency"),
        (("--gemm-efficiency", "nan"), "gemm_efficiency"),
        (("--device", "B300"), "H100"),
    ],
)
def test_bad_input(words: tuple[str, ...], said: str) -> None:
    with pytest.raises(InvalidParameter, match=said) as raised:
        run(*words)
    assert "\n" not in str(raised.value)


def test_an_unknown_model_names_the_known_ones() -> None:
    with pytest.raises(ModelNotFound, match="llama-2-70b"):
        run("no-such-model")


def test_says_where_a_batch_does_not_fit() -> None:
    assert "there is room" in run("--nano", "1").notes[0]
    assert "no such batch" in run("--nano", "1", "--batch", "8192").notes[0]
    assert "evenly to 7 GPUs" in run("--nano", "1", "--gpus", "7").notes[1]
    found = run("--nano", "1", "--device", "L4", "--gpus", "4").notes[0]
    assert f"{weight_bytes(LLAMA.spec) / 1e9:,.1f} GB, do not fit" in found


def test_a_measured_device_needs_no_efficiency() -> None:
    device = find_device("A100-80GB")
    assert overlap.node_of(device, 1).compute == pytest.approx(260e12)
    assert overlap.node_of(replace(device, basis="measured"), 1).compute == 312e12


# ---------------------------------------------------------------- simulator


@settings(max_examples=EXAMPLES)
@given(CHAINS)
def test_makespan_lies_between_the_busiest_resource_and_the_serial_sum(chains: list[list[Op]]) -> None:
    found = simulate(chains)
    allowed = 1e-9 * (1 + found.serial)
    assert found.makespan >= max(found.busy.values()) - allowed
    assert found.makespan >= max((sum(op.seconds for op in ops) for ops in chains), default=0) - allowed
    assert found.makespan <= found.serial + allowed
    assert len(found.spans) == sum(map(len, chains))
    assert all(0 <= share <= 1 for _, used in found.use for share in used)
    # What was in use over time is what the operations needed.
    for index, name in enumerate(RESOURCES):
        spent = sum(used[index] * (later - at) for (at, used), (later, _) in pairwise(found.use))
        assert spent == pytest.approx(found.busy[name], abs=10 * allowed)


@settings(max_examples=EXAMPLES)
@given(CHAINS)
def test_operations_of_a_nano_batch_follow_each_other(chains: list[list[Op]]) -> None:
    found = simulate(chains)
    for chain, ops in enumerate(chains):
        spans = [span for span in found.spans if span.chain == chain]
        assert [span.name for span in spans] == [op.name for op in ops]
        assert all(one.end <= two.start + 1e-12 for one, two in pairwise(spans))


@settings(max_examples=EXAMPLES)
@given(st.lists(st.tuples(SECONDS, SECONDS, SECONDS).filter(lambda one: max(one) > 1e-6), min_size=1, max_size=4))
def test_shares_use_up_no_more_than_there_is_and_leave_nobody_idle(needs: list[tuple[float, float, float]]) -> None:
    pulls = [[value / max(one) for value in one] for one in needs]
    speeds = shares(pulls)
    used = [sum(pull[index] * speed for pull, speed in zip(pulls, speeds, strict=True)) for index in range(3)]
    assert all(one <= 1 + 1e-9 for one in used)
    assert all(0 < speed <= 1 + 1e-9 for speed in speeds)
    assert sum(speeds) >= 1 - 1e-9
    # Whoever is not at full speed needs something that is used up.
    for pull, speed in zip(pulls, speeds, strict=True):
        assert speed > 1 - 1e-9 or any(pull[index] > 0 and used[index] > 1 - 1e-9 for index in range(3))


def test_two_nano_batches_alternate() -> None:
    ops = [Op("multiply", compute=2.0), Op("attend", memory=2.0)] * 5
    alone, two = simulate(split(ops, 1)), simulate(split(ops, 2))
    assert alone.makespan == alone.serial == 20
    # Ten halves of each kind, one second each, and one more second in which the second nano-batch is a step behind.
    assert two.makespan == 11
    assert two.share["compute"] == pytest.approx(10 / 11)
    assert staircase(two, "memory", 3)[:2] == [(0.0, 0.0), (1.0, 1.0)]


def test_weights_are_read_again_by_every_nano_batch() -> None:
    ops = [Op("multiply", compute=4.0, memory=2.0, fixed=2.0)]
    assert [simulate(split(ops, count)).busy["memory"] for count in (1, 2, 4)] == [2, 4, 8]
    assert [simulate(split(ops, count)).makespan for count in (1, 2, 4)] == [4, 4, 8]


def test_what_uses_a_little_of_the_same_slows_both_a_little() -> None:
    multiply, attend = Op("multiply", compute=1.0), Op("attend", compute=0.25, memory=1.0)
    found = simulate([[multiply], [attend]])
    assert found.makespan == pytest.approx(1.25)


def test_nothing_to_do_takes_no_time() -> None:
    assert simulate([]).makespan == simulate([[], [Op("nothing")]]).makespan == 0
    assert simulate([]).share == dict.fromkeys(RESOURCES, 0.0)


@pytest.mark.parametrize("seconds", [-1.0, math.nan, math.inf])
def test_operations_have_seconds(seconds: float) -> None:
    with pytest.raises(InvalidParameter, match="seconds"):
        Op("op", compute=seconds)


def test_fixed_is_part_of_memory() -> None:
    with pytest.raises(InvalidParameter, match="fixed"):
        Op("op", memory=1.0, fixed=2.0)
    with pytest.raises(InvalidParameter, match="nano"):
        split([], 0)


# ---------------------------------------------------------------- ends of rows


@settings(max_examples=EXAMPLES)
@given(st.lists(st.integers(1, 30), max_size=20), st.integers(1, 6), st.integers(0, 3))
def test_each_finished_row_wastes_exactly_the_lag(lengths: list[int], slots: int, lag: int) -> None:
    """NanoFlow: a row that ended in step i is in step i + 1 once more, and retired at i + 2."""
    found = retire(lengths, slots, lag)
    assert found.wasted == lag * len(lengths)
    assert found.computed == sum(lengths) + found.wasted
    assert found.steps >= max((length + lag for length in lengths), default=0)
    assert found.computed <= found.steps * slots


def test_rows_that_end_late_are_counted_at_once() -> None:
    """Two slots, lengths 3, 5, 2, one late: 4 steps of two rows, 2 of the second and third, 1 of the third alone."""
    found = retire([3, 5, 2], 2, 1)
    assert (found.steps, found.computed, found.wasted) == (7, 13, 3)
    assert retire([10**7] * 64, 16, 1).steps == 4 * (10**7 + 1)


def test_a_need_too_small_to_count_holds_up_nobody() -> None:
    trickle = 0.7e-12
    assert shares([[0.0, 0.0, 1.0], [1.0, 0.0, trickle], [0.0, 1.0, trickle]]) == pytest.approx([1, 1, 1])


@pytest.mark.parametrize(("lengths", "slots", "lag"), [([0], 1, 1), ([1], 0, 1), ([1], 1, -1)])
def test_rows_have_tokens_and_slots(lengths: list[int], slots: int, lag: int) -> None:
    with pytest.raises(InvalidParameter):
        retire(lengths, slots, lag)
