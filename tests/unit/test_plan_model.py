"""plan model: sizes, rooflines and fits against published and derived figures; predictions against sums by hand."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from headrace.core import flops
from headrace.core.errors import InvalidParameter
from headrace.core.sizing import kv_bytes_per_token, parameters, tensor_parallel_bytes, weight_bytes
from headrace.core.spec import ModelSpec
from headrace.models.registry import describe
from headrace.plan.calibration import Calibration
from headrace.plan.devices import DEVICES
from headrace.plan.document import Document, Quantity
from headrace.plan.long_context import LENGTHS, PUBLISHED, four_costs, place_of, published_table, values, yi_34b
from headrace.plan.model import (
    Question,
    document,
    ladder,
    predict,
    ridge_rows,
    weights_by_precision,
    what_fits,
    with_long_context,
)
from headrace.plan.room import device_room, fewest
from headrace.plan.speed import Precision, SheetSpeed, decode_work, prefill_work
from headrace.plan.subject import KNOWN, read_subject

A100, H100 = DEVICES["A100-80GB"], DEVICES["H100"]
LLAMA = read_subject("llama-2-7b")
BF16 = Precision()


def named(answer: Document, name: str) -> Quantity:
    return next(one for one in answer.quantities if one.name.startswith(name))


def value(answer: Document, name: str) -> float:
    found = named(answer, name).value
    assert isinstance(found, int | float)
    return found


# ---------------------------------------------------------------- sizes: planning §1


@pytest.mark.parametrize(
    ("model", "count"),
    [
        ("smollm2-135m", 134_515_008),
        ("qwen2.5-1.5b", 1_543_714_304),
        ("qwen2-72b", 72_706_203_648),
        ("nvlm-d-72b", 79_379_593_344),
    ],
)
def test_parameters_as_published(model: str, count: int) -> None:
    assert parameters(read_subject(model).spec) == count


@pytest.mark.parametrize(
    ("model", "size"), [("yi-34b-200k", 245_760), ("nvlm-d-72b", 327_680), ("qwen2.5-1.5b", 28_672)]
)
def test_kv_cache_per_token(model: str, size: int) -> None:
    answer = document(read_subject(model), DEVICES["Dual-SPR-8480C"], BF16, Question())
    assert value(answer, "KV cache per token") == size


def test_flops_of_prompts_and_steps() -> None:
    # Planning §1: 2 P_active a token, the embedding left out; causal prefill 2 n h D L² + 2 P L.
    spec = LLAMA.spec
    active = parameters(spec) - 32_000 * 4096 - (2 * 32 + 1) * 4096
    assert flops.token_flops(spec) == 2 * active
    assert flops.attention_flops(spec, 1000) == 4 * 32 * 32 * 128 * 1000
    assert flops.causal_flops(spec, 1000) == 2 * 32 * 32 * 128 * 1000**2
    head = 2 * 32_000 * 4096
    assert flops.prefill_flops(spec, 1000) == 1000 * (2 * active - head) + head + flops.causal_flops(spec, 1000)


def test_a_window_counts_what_it_sees() -> None:
    spec = LLAMA.spec
    layers = tuple(replace(one, attention=replace(one.attention, window=100)) for one in spec.layers)
    cut = replace(spec, layers=layers)
    assert flops.attention_flops(cut, 1000) == flops.attention_flops(spec, 100)
    # 100 tokens that see all before them, and 900 that see 100.
    assert flops.causal_flops(cut, 1000) == flops.causal_flops(spec, 100) + 900 * flops.attention_flops(spec, 100)


def test_rows_from_which_decode_is_compute_bound() -> None:
    # Planning §1: fp16 on an A100, 312e12 / 2.0e12 · 2 / 2.
    assert ridge_rows(312e12, 2.0e12, 2) == 156


def test_experts_are_read_as_they_are_chosen() -> None:
    config = {
        **json.loads(json.dumps(KNOWN["smollm2-135m"])),
        "architectures": ["MixtralForCausalLM"],
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    }
    spec = described(config)
    dense = described(dict(KNOWN["smollm2-135m"]))
    mlp = 3 * 576 * 1536 * 30
    assert flops.layer_flops(spec) == flops.layer_flops(dense) + 2 * (mlp + 30 * 8 * 576)
    assert flops.read_bytes(spec, "bf16", 1) == flops.read_bytes(dense, "bf16", 1) + 2 * (mlp + 30 * 8 * 576)
    assert flops.read_bytes(spec, "bf16", 500) == weight_bytes(spec)


def described(config: dict[str, object]) -> ModelSpec:
    return describe(config, "hf", {}).spec


# ---------------------------------------------------------------- long contexts: planning §3


def test_the_published_example_of_long_contexts() -> None:
    # Planning §3, derived: KV 0.94 and 11.4 GiB, 12-13 and 1.0 users, decode 8.6 and 9.9 s, switch 0.09 and 1.14 s.
    short, long = (four_costs(yi_34b(), one) for one in (4096, 50_000))
    assert (round(short.kv / 2**30, 2), round(long.kv / 2**30, 1)) == (0.94, 11.4)
    assert 12 <= short.users <= 13 and round(long.users, 1) == 1.0
    assert (round(short.decode_s, 1), round(long.decode_s, 1)) == (8.6, 9.9)
    assert short.switch_s is not None and long.switch_s is not None
    assert (round(short.switch_s, 2), round(long.switch_s, 2)) == (0.09, 1.14)
    # Prefill of a width of 4096, which the paper's figures fit, and of 56 heads of 128.
    narrow = [round(four_costs(yi_34b(4096), one).prefill_s, 2) for one in (4096, 50_000)]
    assert narrow == [0.92, 14.84]
    assert [round(one.prefill_s, 2) for one in (short, long)] == [0.94, 17.79]


def test_the_example_stands_beside_what_was_published() -> None:
    rows = {row[0]: row for row in published_table().rows}
    assert [row[3] for row in rows.values()] == [0.91, None, 0.89, 0.89, 8.5, 0.1]
    assert rows["context switch"][5] == 1.1 and rows["decode of 250 tokens"][5] == 9.8
    assert len(PUBLISHED) == 5 and LENGTHS[1] == 50_000
    for name, _, said in PUBLISHED:
        for at, figure in enumerate(said):
            # The paper rounds; its prefill is of the narrower width.
            index = next(i for i, one in enumerate(PUBLISHED) if one[0] == name)
            if figure is not None:
                assert values(four_costs(yi_34b(4096), LENGTHS[at]))[index] == pytest.approx(figure, rel=0.07)


def test_long_context_of_a_model_on_a_device() -> None:
    yi, question = read_subject("yi-34b-200k"), Question(prompt=1000, output=100)
    plain = document(yi, A100, BF16, question)
    answer = with_long_context(plain, yi, A100, BF16, question)
    table = answer.tables[-2]
    assert [one.name for one in table.columns[2:-1]] == [f"{n:,} tokens" for n in (4096, 50_000, 100_000, 200_000)]
    by_name = {row[0]: row for row in table.rows}
    assert by_name["KV cache of a user"][3] == pytest.approx(245_760 * 50_000 / 2**30)
    # Exact P and width: 2 P L + 2 n h D L² over 312e12.
    exact = (flops.token_flops(yi.spec) * 50_000 + 2 * 60 * 7168 * 50_000**2) / 312e12
    assert by_name["prefill"][3] == pytest.approx(exact)
    # Two devices halve prefill and decode, and leave more room.
    double = with_long_context(plain, yi, A100, BF16, replace(question, tp=2)).tables[-2]
    assert double.rows[2][3] == pytest.approx(exact / 2)
    assert double.rows[1][3] > 2 * by_name["users at the same time"][3]
    assert {one.name for one in answer.plots[-1].series} >= {"prefill, s", "context switch, s"}


def test_no_link_no_switch() -> None:
    place = place_of(LLAMA.spec, DEVICES["EPYC-7763"], BF16, 1, 100.0, 1)
    assert four_costs(place, 10).switch_s is None
    with pytest.raises(InvalidParameter, match="context: got 0"):
        four_costs(place, 0)


# ---------------------------------------------------------------- rooflines


def test_decode_reads_everything_once() -> None:
    spec = LLAMA.spec
    speed = SheetSpeed(spec, A100, BF16)
    read = weight_bytes(spec) - 2 * 32_000 * 4096 + 2 * 4096 + 500 * kv_bytes_per_token(spec, "bfloat16")
    assert speed.step_s(decode_work(spec, 1, 500, "bfloat16")) == pytest.approx(read / 2039e9)
    # 500 rows without a context meet the peak: linear layers and head.
    flops_s = 500 * flops.token_flops(spec) / 312e12
    assert speed.step_s(decode_work(spec, 500, 0, "bfloat16")) == pytest.approx(flops_s)
    assert speed.step_s(prefill_work(spec, 1, 2048, "bfloat16")) == pytest.approx(
        flops.prefill_flops(spec, 2048) / 312e12
    )


def test_all_reduces_of_tensor_parallelism() -> None:
    # Planning §4: T_net = 4 (N − 1) B d e n / (N · bandwidth of the network).
    spec = read_subject("llama-2-70b").spec
    rows = 2048
    alone, shared = (SheetSpeed(spec, A100, BF16, tp).step_s(prefill_work(spec, rows, 1, "bfloat16")) for tp in (1, 8))
    net = 4 * 7 * rows * 8192 * 2 * 80 / (8 * 300e9)
    assert shared == pytest.approx(alone / 8 + net)


def test_pipeline_stages_are_busy_with_micro_batches() -> None:
    spec = LLAMA.spec
    whole, split = SheetSpeed(spec, A100, BF16), SheetSpeed(spec, A100, BF16, 1, 4)
    # One request is in one stage at a time; eight keep all four busy, and each stage reads its part for each of them.
    one = decode_work(spec, 1, 10, "bfloat16")
    assert split.step_s(one) == pytest.approx(whole.step_s(one))
    many = decode_work(spec, 8, 2000, "bfloat16")
    assert split.step_s(many) == pytest.approx(whole.step_s(replace(many, kv_bytes=many.kv_bytes // 4)), rel=1e-4)


def test_what_types_a_device_computes_in() -> None:
    assert Precision(quant="fp8").compute_type(H100) == "fp8"
    assert Precision(quant="fp8").compute_type(A100) == "bfloat16"
    assert Precision(quant="int8").compute_type(A100) == "int8"
    assert Precision(quant="int4").compute_type(A100) == "bfloat16"
    assert Precision().compute_type(DEVICES["T4"]) == "float16"
    assert Precision(dtype="float32").factor == 2 and Precision(dtype="float32", quant="int4").factor == 1


# ---------------------------------------------------------------- memory


@pytest.mark.parametrize("model", ["llama-2-70b", "nvlm-d-72b", "qwen2.5-1.5b"])
def test_stages_hold_the_whole_model(model: str) -> None:
    spec = read_subject(model).spec
    assert flops.rank_bytes(spec, "bf16", 1, 1) == (weight_bytes(spec),)
    assert flops.rank_bytes(spec, "bf16", 2, 1) == (tensor_parallel_bytes(spec, "bf16", 2),)
    stages = flops.rank_bytes(spec, "bf16", 1, 4)
    assert stages is not None and len(stages) == 4
    tied = 2 * spec.vocab_size * spec.hidden_size if spec.embedding.tied else 0
    assert sum(stages) == weight_bytes(spec) + tied
    assert flops.rank_bytes(spec, "bf16", 5, 4) is None


def test_layers_of_stages() -> None:
    assert flops.stages(10, 4) == (3, 3, 2, 2)
    spec = LLAMA.spec
    assert flops.rank_kv_bytes(spec, "bfloat16", 4, 3) == 11 * 2 * 32 * 128 * 2 // 4


def test_room_and_concurrency() -> None:
    room = device_room(LLAMA.spec, A100, BF16, 1, 1, 4, 1000)
    assert room is not None
    left = int(0.9 * 80e9) - weight_bytes(LLAMA.spec) - room.step
    assert room.requests(1000) == left // (1008 * 524_288)
    assert room.used(4, 1000) == weight_bytes(LLAMA.spec) + room.step + 4 * 1008 * 524_288


def test_the_fewest_devices() -> None:
    qwen = read_subject("qwen2-72b").spec
    found = fewest(qwen, A100, BF16, 1, 640)
    assert found is not None and found[:2] == (4, 1)
    found = fewest(qwen, DEVICES["H200"], Precision(quant="int4"), 1, 640)
    assert found is not None and found[:2] == (1, 1)
    assert fewest(qwen, DEVICES["PIM-GPT-v2"], BF16, 1, 640) is None


def test_what_fits_names_every_device() -> None:
    table = what_fits(read_subject("llama-3-8b"), BF16, Question(requests=4))
    rows = {row[0]: row for row in table.rows}
    assert list(rows) == list(DEVICES)
    assert rows["A100-80GB"][2:4] == [1, 1] and rows["T4"][2:4] == [2, 1]
    assert rows["PIM-GPT-v2"][2] is None
    assert rows["H100"][9] is not None and rows["H200"][9] is None


def test_weights_by_precision() -> None:
    rows = {(row[0], row[1]): row for row in weights_by_precision(read_subject("nvlm-d-72b").spec).rows}
    assert rows["bf16", 1][2] == pytest.approx(2 * 79_379_593_344 / 2**30)
    assert rows["bf16", 6][3] is None and rows["int4", 8][3] is not None


# ---------------------------------------------------------------- the answer


def test_throughput_grows_with_concurrency() -> None:
    answer = document(LLAMA, A100, BF16, Question(512, 128, 8))
    curve = [rate for _, rate in answer.plots[0].series[0].points]
    assert curve == sorted(curve) and len(curve) > 5
    ttft, itl = value(answer, "TTFT"), value(answer, "ITL")
    found = predict(SheetSpeed(LLAMA.spec, A100, BF16), LLAMA.spec, "bfloat16", 8, 512, 128)
    assert (found.ttft_s, found.itl_s) == (ttft, itl)
    assert found.total_s == pytest.approx(found.all_ttft_s + 127 * itl)
    assert value(answer, "throughput") == pytest.approx(8 * 128 / found.total_s)
    # Planning §10: $/h · 1e6 / (3600 · tokens/s)
    assert value(answer, "cost") == pytest.approx(3.67e6 / (3600 * value(answer, "throughput")))
    assert all(one.formula for one in answer.quantities)
    assert named(answer, "ITL").basis == "data sheet"


def test_replicas_share_requests_and_multiply_throughput() -> None:
    one = document(LLAMA, A100, BF16, Question(512, 128, 4))
    three = document(LLAMA, A100, BF16, Question(512, 128, 12, replicas=3))
    assert value(three, "throughput") == pytest.approx(3 * value(one, "throughput"))
    assert value(three, "concurrent requests") == 3 * value(one, "concurrent requests")
    assert value(three, "cost") == pytest.approx(value(one, "cost"))


def test_what_does_not_fit_is_said() -> None:
    answer = document(read_subject("qwen2-72b"), DEVICES["L4"], BF16, Question())
    assert "does not fit" in answer.notes[-1]
    answer = document(LLAMA, DEVICES["L4"], BF16, Question(512, 128, 500))
    assert "the others wait" in answer.notes[-1]


def test_images_count() -> None:
    answer = document(read_subject("nvlm-d-72b"), A100, BF16, Question(tp=8))
    assert value(answer, "tokens of an image's tile") == 256
    # 2 P over 1025 patches of the tower that is computed, and attention over them.
    assert 11.3e12 < value(answer, "FLOPs of an image's tile") < 12.5e12


def test_counts_of_the_curve() -> None:
    assert ladder(1) == [1] and ladder(8) == [1, 2, 4, 8] and ladder(9) == [1, 2, 4, 8, 9]


def test_past_errors_make_an_interval() -> None:
    past = {"itl_s": Calibration.of([(0.1, "llama-2-7b")] * 4)}
    answer = document(LLAMA, A100, BF16, Question(), past)
    found = named(answer, "ITL")
    assert found.low is not None and found.high is not None and found.low < found.high and "past runs" in found.note
    assert named(answer, "TTFT").low is None
