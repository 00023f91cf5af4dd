"""How many numbers a model has and how many bytes of them lie on each GPU: from the spec alone, against what is
published and against the weight map."""

from __future__ import annotations

import math
from typing import Any

import pytest

from headrace.core import sizing
from headrace.core.spec import ModelSpec
from headrace.models.registry import describe
from tests.unit import vision_cases as cases

MIB = 2**20


def nvlm() -> ModelSpec:
    shapes = cases.nvlm_shapes()
    return describe(cases.NVLM_D, "hf", shapes, token_id=lambda text: 151_654).spec


def of(*matrices: sizing.Matrix) -> int:
    return sum(matrix.numbers for matrix in matrices)


def test_the_parameters_of_nvlm_d_72b_and_its_parts() -> None:
    spec = nvlm()
    assert sizing.parameters(spec) == 79_379_593_344
    assert spec.vision is not None and spec.vision.encoder.dummy_heads == 7
    layer = of(*sizing.layer_weights(spec.layers[0], spec.hidden_size))
    assert layer == 877_684_736
    assert 80 * layer + of(*sizing.end_weights(spec)) == 72_706_203_648
    assert of(*sizing.encoder_weights(spec.vision.encoder)) == 6_052_672_640
    assert of(*sizing.encoder_weights(spec.vision.encoder, stored=False)) == 5_536_496_000
    assert of(*sizing.projector_weights(spec.vision.projector, spec.hidden_size)) == 620_717_056
    assert sizing.parameters(spec, stored=False) == 79_379_593_344 - 6_052_672_640 + 5_536_496_000


def test_the_parts_of_open_qwen2vl() -> None:
    config = cases.changed(cases.OPEN_QWEN2VL, "vision_config.feature_block", 26)
    spec = describe(config, "hf", cases.open_qwen2vl_shapes()).spec
    assert spec.vision is not None
    assert of(*sizing.encoder_weights(spec.vision.encoder)) == 412_984_944
    assert of(*sizing.projector_weights(spec.vision.projector, spec.hidden_size)) == 4_131_840
    assert sizing.parameters(spec) == 1_543_714_304 + 412_984_944 + 4_131_840


def test_the_parameters_of_internvl2_1b() -> None:
    assert sizing.parameters(describe(cases.INTERNVL2_1B, "hf", {}, token_id=lambda text: 1).spec) == 938_158_976


DECODERS: list[dict[str, Any]] = [
    {"architectures": ["LlamaForCausalLM"], "attention_bias": True, "mlp_bias": True},
    {"architectures": ["Qwen2ForCausalLM"], "tie_word_embeddings": True},
    {"architectures": ["Qwen3ForCausalLM"], "head_dim": 10},
    {"architectures": ["Gemma3ForCausalLM"], "head_dim": 8},
    {"architectures": ["Phi3ForCausalLM"]},
    {"architectures": ["GPTJForCausalLM"], "rotary_dim": 4},
    {"architectures": ["Qwen3MoeForCausalLM"], "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12},
]


@pytest.mark.parametrize("own", DECODERS, ids=lambda own: str(own["architectures"][0]))
def test_the_formula_counts_what_the_weight_map_makes(own: dict[str, Any]) -> None:
    sizes = {"vocab_size": 37, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    made = describe({**sizes, **heads, **own}, "hf", {})
    assert sizing.parameters(made.spec) == sum(math.prod(rule.shape) for rule in made.weight_map.rules)


@pytest.mark.parametrize("config", [cases.INTERNVL2_1B, cases.INTERNVL_HF, cases.OPEN_QWEN2VL, cases.NVLM_D])
def test_the_same_of_models_that_see(config: dict[str, Any]) -> None:
    made = describe(config, "hf", {}, token_id=lambda text: cases.IMAGE_TOKEN)
    assert sizing.parameters(made.spec) == sum(math.prod(rule.shape) for rule in made.weight_map.rules)


# ---------------------------------------------------------------- bytes


@pytest.mark.parametrize(
    ("gpus", "published"),
    [
        (2, (27, 54)),
        (3, (16, 32, 32)),
        (4, (12, 23, 23, 23)),
        (5, (9, 18, 18, 18, 18)),
        (6, (8, 15, 15, 15, 15, 15)),
        (7, (7, 13, 13, 13, 13, 13, 13)),
        (8, (6, 11, 11, 11, 11, 11, 11, 11)),
    ],
)
def test_placement_is_the_published_table(gpus: int, published: tuple[int, ...]) -> None:
    """That deals out names up to the last GPU's share; the last layer it takes back to the first."""
    devices = sizing.layer_devices(80, gpus)
    names = [gpu for gpu, count in enumerate(published) for _ in range(count)][:80]
    assert devices == (*names[:79], 0)
    assert sizing.placement(80, gpus) == tuple(devices.count(gpu) for gpu in range(gpus))


def test_placement_of_few_layers_or_one_gpu() -> None:
    assert sizing.placement(80, 1) == (80,)
    for layers in range(1, 40):
        for gpus in range(1, 12):
            found = sizing.placement(layers, gpus)
            assert sum(found) == layers and len(found) == gpus and min(found) >= 0


def test_split_bytes_are_what_six_gpus_of_the_study_held() -> None:
    held = [round(size / MIB) for size in sizing.split_bytes(nvlm(), "bf16", 6)]
    assert held == [32_547, 25_111, 25_111, 25_111, 25_111, 18_415]


def test_every_way_of_placing_holds_the_whole_model() -> None:
    spec = nvlm()
    for form in sizing.WEIGHT_FORMS:
        whole = sizing.weight_bytes(spec, form)
        assert sizing.split_bytes(spec, form, 1) == (whole,)
        assert sizing.tensor_parallel_bytes(spec, form, 1) == whole
        assert all(sum(sizing.split_bytes(spec, form, gpus)) == whole for gpus in (4, 6, 8))
        for gpus in (2, 4, 8):
            each = sizing.tensor_parallel_bytes(spec, form, gpus)
            # Norms, biases of what is added up, and positions are on each of them.
            assert each is not None and whole / gpus < each < 1.005 * whole / gpus
    assert sizing.weight_bytes(spec, "bf16") == 2 * 79_379_593_344
    assert sizing.tensor_parallel_bytes(spec, "bf16", 6) is None


def test_a_tower_whose_heads_cannot_be_dealt_out_is_whole_on_each_gpu() -> None:
    plain = describe(cases.NVLM_D, "hf", {}, token_id=lambda text: 1).spec
    assert plain.vision is not None and plain.vision.encoder.dummy_heads == 0
    each = sizing.tensor_parallel_bytes(plain, "bf16", 8)
    assert each is not None and each > 2 * 5_536_496_000 + 2 * 72_706_203_648 // 8


def test_packed_forms_by_hand() -> None:
    matrix = sizing.Matrix(6, 200, "cols", linear=True, count=2)
    assert matrix.numbers == 2400
    assert matrix.nbytes("bf16") == 4800
    assert matrix.nbytes("fp8") == 2 * (1200 + 4 * 6)
    assert matrix.nbytes("int4") == 2 * (600 + 2 * 6 * 2)
    assert matrix.nbytes("int4", gpus=3) == 2 * (6 * 67 // 2 + 2 * 6)
    assert sizing.Matrix(6, 200, "rows").nbytes("int4", gpus=4) == 2 * 2 * 200


def test_the_table_says_all_of_it() -> None:
    text = sizing.weights_table(nvlm())
    assert text.startswith("nvlm_d: 79,379,593,344 parameters; weights on each GPU in MiB\n")
    assert "bf16      6     heads uneven  32,547 / 25,111 x4 / 18,415\n" in text
    assert "bf16      1          151,405  151,405\n" in text
    assert len(text.splitlines()) == 1 + 3 + 1 + 12
    assert "int4" not in sizing.weights_table(nvlm(), gpus=(2,), forms=("fp8",))
