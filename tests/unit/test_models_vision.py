"""Models that see, described: published names all mapped, values refused by name, tiny checkpoints streamed."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from numpy.typing import NDArray

from headrace.core.errors import CheckpointError, UnsupportedModel, WeightsMismatch
from headrace.core.spec import ImagePromptSpec, TilingSpec, VisionSpec
from headrace.models.registry import Description, describe
from headrace.testing.vision_checkpoints import (
    Kind,
    OpenQwen2VLParts,
    tiny_vision_checkpoint,
    tiny_vision_model,
    token_ids,
)
from headrace.weights.checkpoint import open_checkpoint, read_image_processor
from headrace.weights.loader import stream
from tests.unit import vision_cases as cases
from tests.unit.vision_cases import Config, OnlyShapes, Shapes, changed

PUBLISHED: dict[str, tuple[Config, Shapes]] = {
    "NVLM-D-72B": (cases.NVLM_D, cases.nvlm_shapes()),
    "InternVL2-1B": (cases.INTERNVL2_1B, cases.internvl2_shapes()),
    "Open-Qwen2VL": (cases.OPEN_QWEN2VL, cases.open_qwen2vl_shapes()),
}


def token_id(text: str) -> int | None:
    return {"<|vision_pad|>": 151_654, "<IMG_CONTEXT>": 151_648}.get(text)


def described(config: Mapping[str, Any], shapes: Shapes | None = None) -> Description:
    return describe(config, "hf", shapes or {}, token_id=token_id)


def vision(config: Mapping[str, Any], shapes: Shapes | None = None) -> VisionSpec:
    found = described(config, shapes).spec.vision
    assert found is not None
    return found


# ---------------------------------------------------------------- published names


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_published_name_is_mapped_and_none_left_over(name: str) -> None:
    config, shapes = PUBLISHED[name]
    weight_map = described(config, shapes).weight_map
    stream(OnlyShapes(shapes), weight_map)  # settles names and shapes; not one byte is read
    used = {source for rule in weight_map.rules for source in rule.sources}
    assert used <= shapes.keys()
    if name != "Open-Qwen2VL":  # its last block, last norm and head are for nothing
        assert used == shapes.keys()


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize(
    "gone", ["patch_embed", "fc1.weight", "layers.1.mlp.up_proj.weight", r"(mlp1.3|projector.2).weight"]
)
def test_a_name_that_is_missing_or_too_many_is_refused(name: str, gone: str) -> None:
    config, shapes = PUBLISHED[name]
    lost = next(source for source in shapes if re.search(gone, source))
    fewer = {source: shape for source, shape in shapes.items() if source != lost}
    weight_map = described(config, fewer).weight_map
    with pytest.raises(WeightsMismatch, match=rf"1 missing \('{re.escape(lost)}'\)"):
        stream(OnlyShapes(fewer), weight_map)
    with pytest.raises(WeightsMismatch, match=r"1 left over \('mlp9.weight'\)"):
        stream(OnlyShapes({**shapes, "mlp9.weight": (1,)}), weight_map)


def test_nvlm_d_72b() -> None:
    config, shapes = PUBLISHED["NVLM-D-72B"]
    assert sum(map(math.prod, shapes.values())) == 79_379_593_344
    spec = described(config, shapes).spec
    assert (spec.name, spec.hidden_size, len(spec.layers), spec.vocab_size) == ("nvlm_d", 8192, 80, 152_064)
    attention = spec.layers[0].attention
    assert attention.qkv_bias and not attention.o_bias and attention.rope is not None and attention.rope.base == 1e6
    seeing = vision(config, shapes)
    encoder, projector = seeing.encoder, seeing.projector
    assert (encoder.layers, encoder.heads, encoder.head_dim, encoder.dummy_heads, encoder.grid) == (45, 25, 128, 7, 32)
    assert encoder.norm.kind == "rms" and not encoder.qkv_bias
    assert encoder.qk_norm is not None and encoder.qk_norm.width == 3200
    assert (projector.width, projector.intermediate, projector.bias, projector.tokens) == (12800, 29568, False, 256)
    assert projector.norm is not None and (projector.norm.kind, projector.norm.eps) == ("layer", 1e-5)
    assert projector.merge == "shuffle_v2" and projector.activation == "gelu"
    assert seeing.tiling == TilingSpec(448, 1, 6, thumbnail=True)
    assert seeing.prompt == ImagePromptSpec("<|vision_pad|>", "<Image>", "</Image>", tile_tags=True)
    assert seeing.image_token_id == 151_654


def test_internvl2_1b() -> None:
    seeing = vision(*PUBLISHED["InternVL2-1B"])
    encoder, projector = seeing.encoder, seeing.projector
    assert (encoder.layers, encoder.heads, encoder.head_dim, encoder.dummy_heads) == (24, 16, 64, 0)
    assert encoder.norm.kind == "layer" and encoder.norm.bias and encoder.qkv_bias and encoder.qk_norm is None
    assert (projector.width, projector.intermediate, projector.bias) == (4096, 896, True)
    assert seeing.tiling == TilingSpec(448, 1, 12, thumbnail=True)
    assert seeing.prompt == ImagePromptSpec("<IMG_CONTEXT>", "<img>", "</img>")


def test_open_qwen2vl() -> None:
    seeing = vision(*PUBLISHED["Open-Qwen2VL"])
    encoder, projector = seeing.encoder, seeing.projector
    assert (encoder.layers, encoder.grid, encoder.heads, encoder.head_dim) == (26, 27, 16, 72)
    assert not encoder.class_token and not encoder.layer_scale and encoder.qkv_bias
    assert (projector.merge, projector.tokens, projector.width, projector.norm) == ("average_pool", 729, 1152, None)
    assert (projector.intermediate, projector.bias) == (1536, True)
    assert seeing.tiling == TilingSpec(384, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    assert seeing.prompt == ImagePromptSpec("<|image_pad|>")
    assert vision(changed(cases.OPEN_QWEN2VL, "projector.query_num", 144)).projector.tokens == 144


# ---------------------------------------------------------------- what configs may say


@pytest.mark.parametrize(
    ("config", "path", "value", "words"),
    [
        (cases.NVLM_D, "vision_config.norm_type", "group_norm", "vision_config: norm_type is 'group_norm'"),
        (cases.NVLM_D, "ps_version", "v3", "ps_version is 'v3', allowed: one of v1, v2"),
        (cases.NVLM_D, "template", "vicuna", "template is 'vicuna', allowed: one of chatml"),
        (cases.NVLM_D, "select_layer", -46, "select_layer is -46, allowed: an integer from -45 to 45"),
        (cases.NVLM_D, "select_layer", 46, "select_layer is 46"),
        (cases.NVLM_D, "select_layer", 0, "select_layer is 0"),
        (cases.NVLM_D, "select_layer", "last", "select_layer is 'last'"),
        (cases.NVLM_D, "downsample_ratio", 0.25, "downsample_ratio is 0.25"),
        (cases.NVLM_D, "force_image_size", 450, "force_image_size is 450, allowed: a multiple of 28"),
        (cases.NVLM_D, "force_image_size", 1 << 20, "force_image_size is 1048576"),
        (cases.NVLM_D, "max_dynamic_patch", 0, "max_dynamic_patch is 0, allowed: an integer from 1"),
        (cases.NVLM_D, "max_dynamic_patch", 65, "max_dynamic_patch is 65"),
        (cases.NVLM_D, "min_dynamic_patch", 7, "max_dynamic_patch is 6, allowed: an integer from 7"),
        (cases.NVLM_D, "use_thumbnail", "yes", "use_thumbnail is 'yes', allowed: true or false"),
        (cases.NVLM_D, "use_backbone_lora", 16, "use_backbone_lora is 16"),
        (cases.NVLM_D, "use_llm_lora", 16, "use_llm_lora is 16"),
        (cases.NVLM_D, "llm_config", None, "llm_config is missing"),
        (cases.NVLM_D, "vision_config", None, "vision_config is missing"),
        (cases.NVLM_D, "llm_config.attention_bias", False, "llm_config: attention_bias is False"),
        (cases.NVLM_D, "llm_config.architectures", ["InternLM2ForCausalLM"], "llm_config: architectures is 'InternLM2"),
        (cases.NVLM_D, "vision_config.num_channels", 1, "num_channels is 1"),
        (cases.NVLM_D, "vision_config.hidden_act", "quick_gelu", "hidden_act is 'quick_gelu'"),
        (cases.NVLM_D, "vision_config.num_attention_heads", 26, "hidden_size is 3200, allowed: a multiple of"),
        (cases.NVLM_D, "vision_config.num_hidden_layers", 0, "num_hidden_layers is 0"),
        (cases.INTERNVL2_1B, "template", "chatml", "template is 'chatml', allowed: one of Hermes-2"),
        (cases.INTERNVL2_1B, "pad2square", True, "pad2square is True"),
        (cases.INTERNVL_HF, "vision_feature_layer", [-1, -2], r"vision_feature_layer is \[-1, -2\]"),
        (cases.INTERNVL_HF, "vision_feature_layer", 25, "vision_feature_layer is 25"),
        (cases.INTERNVL_HF, "vision_feature_select_strategy", "full", "vision_feature_select_strategy is 'full'"),
        (cases.INTERNVL_HF, "image_seq_length", 64, "image_seq_length is 64, allowed: absent or 256"),
        (cases.INTERNVL_HF, "image_token_id", 151_655, "image_token_id is 151655, allowed: an integer from 0"),
        (cases.INTERNVL_HF, "projector_hidden_act", "tanh", "projector_hidden_act is 'tanh'"),
        (cases.INTERNVL_HF, "vision_config.image_size", [448, 224], r"image_size is \[448, 224\]"),
        (cases.INTERNVL_HF, "vision_config.patch_size", [14, 14, 14], "patch_size is"),
        (cases.INTERNVL_HF, "vision_config.use_mean_pooling", False, "use_mean_pooling is False"),
        (cases.INTERNVL_HF, "vision_config.use_mask_token", True, "use_mask_token is True"),
        (
            cases.INTERNVL_HF,
            "vision_config.use_absolute_position_embeddings",
            False,
            "use_absolute_position_embeddings",
        ),
        (cases.INTERNVL_HF, "text_config", {"model_type": "internlm2"}, "text_config: model_type is 'internlm2'"),
        (cases.INTERNVL_HF, "text_config", 7, "text_config is 7"),
        (cases.OPEN_QWEN2VL, "projector.query_num", 145, "query_num is 145, allowed: the square of a number"),
        (cases.OPEN_QWEN2VL, "projector.query_num", 784, "query_num is 784"),
        (cases.OPEN_QWEN2VL, "projector.type", "resampler", "projector: type is 'resampler'"),
        (cases.OPEN_QWEN2VL, "projector.layers", 3, "projector: layers is 3"),
        (cases.OPEN_QWEN2VL, "projector", None, "projector is missing"),
        (cases.OPEN_QWEN2VL, "prompt_form", "chat", "prompt_form is 'chat', allowed: one of train, cli, raw"),
        (cases.OPEN_QWEN2VL, "vision_config.feature_block", 27, "feature_block is 27"),
        (cases.OPEN_QWEN2VL, "image_token_id", -200, "image_token_id is -200"),
    ],
)
def test_what_is_not_run_is_refused_by_name(config: Config, path: str, value: object, words: str) -> None:
    with pytest.raises((CheckpointError, UnsupportedModel), match=words) as caught:
        described(changed(config, path, value))
    assert "\n" not in str(caught.value)


def test_the_defaults_of_the_published_class() -> None:
    config = cases.NVLM_D
    for key in ("ps_version", "select_layer", "dynamic_image_size", "template", "downsample_ratio"):
        config = changed(config, key, None)
    seeing = vision(config)
    assert seeing.projector.merge == "shuffle_v1" and seeing.encoder.layers == 45
    assert seeing.tiling == TilingSpec(448)
    for key in ("norm_type", "qk_normalization", "qkv_bias", "hidden_act", "layer_norm_eps", "patch_size"):
        config = changed(config, f"vision_config.{key}", None)
    assert vision(config).encoder == seeing.encoder


@pytest.mark.parametrize(("value", "computed"), [(-1, 45), (-2, 44), (-45, 1), (45, 45), (1, 1)])
def test_blocks_behind_the_selected_one_are_not_computed_and_may_be_left_over(value: int, computed: int) -> None:
    made = described(changed(cases.NVLM_D, "select_layer", value), cases.nvlm_shapes())
    assert made.spec.vision is not None and made.spec.vision.encoder.layers == computed
    stream(OnlyShapes(cases.nvlm_shapes()), made.weight_map)


def test_tiles_of_another_size_than_the_stored_positions() -> None:
    config = changed(cases.INTERNVL2_1B, "force_image_size", 224)
    seeing = vision(config)
    assert (seeing.encoder.tile_size, seeing.encoder.grid, seeing.encoder.stored_grid) == (224, 16, 32)
    assert seeing.projector.tokens == 64 and seeing.tiling.tile_size == 224
    stream(OnlyShapes(cases.internvl2_shapes()), described(config).weight_map)


def test_dummy_heads_that_are_not_whole_heads_are_a_wrong_shape() -> None:
    shapes = {**cases.nvlm_shapes(), "vision_model.encoder.layers.0.attn.qkv.weight": (3 * 4100, 3200)}
    made = described(cases.NVLM_D, shapes)
    assert made.spec.vision is not None and made.spec.vision.encoder.dummy_heads == 0
    with pytest.raises(WeightsMismatch, match=r"layers\.0\.attn"):
        stream(OnlyShapes(shapes), made.weight_map)


# ---------------------------------------------------------------- the placeholder's id


def test_the_placeholder_is_the_configs_or_else_the_tokenizers() -> None:
    assert vision(cases.INTERNVL2_1B).image_token_id == 151_648
    assert vision({**cases.INTERNVL2_1B, "img_context_token_id": 7}).image_token_id == 7
    older = changed({**cases.INTERNVL_HF, "image_token_index": 9}, "image_token_id", None)
    assert vision(older).image_token_id == 9


@pytest.mark.parametrize("answer", [None, 151_655, -1])
def test_a_tokenizer_without_the_placeholder(answer: int | None) -> None:
    with pytest.raises(CheckpointError, match="<IMG_CONTEXT>"):
        describe(cases.INTERNVL2_1B, "hf", {}, token_id=lambda text: answer)
    with pytest.raises(CheckpointError, match=r"image_token_id is missing, and the tokenizer has no token '<IMG_CON"):
        describe(cases.INTERNVL2_1B, "hf", {})


def test_a_text_model_asks_no_tokenizer() -> None:
    def asked(text: str) -> int:
        raise AssertionError(text)

    made = describe(cases.QWEN2_HALF_B, "hf", {}, token_id=asked)
    assert made.spec.vision is None


# ---------------------------------------------------------------- spellings, heads, adapters


def test_models_without_architectures_go_by_their_type() -> None:
    for config, shapes in PUBLISHED.values():
        assert described({**config, "architectures": None}, shapes) == described(config, shapes)
    plain = changed(cases.INTERNVL_HF, "text_config", {**cases.QWEN2_HALF_B, "architectures": None})
    assert described({**plain, "architectures": None}) == described(cases.INTERNVL_HF)


def test_llama_and_qwen3_decoders() -> None:
    for architecture in ("LlamaForCausalLM", "Qwen3ForCausalLM"):
        llm = {**cases.QWEN2_HALF_B, "architectures": [architecture], "attention_bias": False}
        spec = described({**cases.INTERNVL2_1B, "llm_config": llm}).spec
        assert spec.vision is not None and not spec.layers[0].attention.qkv_bias


def hf_shapes(older: bool, head: bool) -> Shapes:
    """What a checkpoint in this spelling holds, out of its map; tiny checkpoints hold the older one to transformers."""
    made: Shapes = {}
    stored = describe(cases.INTERNVL_HF, "hf", {"language_model.model.x": (1,)} if older else {})
    for rule in stored.weight_map.rules:
        (source,) = rule.sources
        shape = rule.shape
        if rule.op == "reshape":
            shape = {1: (1, 1, *rule.shape), 2: (1, *rule.shape)}[len(rule.shape)]
        if rule.target == "vision.patch.weight":
            shape = (rule.shape[0], 3, 14, 14)
        if head or not source.endswith("lm_head.weight"):
            made[source] = shape
    return made


@pytest.mark.parametrize("older", [True, False])
def test_both_spellings_of_transformers(older: bool) -> None:
    shapes = hf_shapes(older, head=True)
    first = "language_model.model.embed_tokens.weight" if older else "model.language_model.embed_tokens.weight"
    tower = "vision_tower" if older else "model.vision_tower"
    assert first in shapes and f"{tower}.encoder.layer.23.lambda_2" in shapes
    made = described(cases.INTERNVL_HF, shapes)
    stream(OnlyShapes(shapes), made.weight_map)
    # Sources differ, targets do not.
    other = described(cases.INTERNVL_HF, hf_shapes(not older, head=True))
    assert [rule.target for rule in other.weight_map.rules] == [rule.target for rule in made.weight_map.rules]
    shorter = changed(cases.INTERNVL_HF, "vision_feature_layer", -3)
    stream(OnlyShapes(shapes), described(shorter, shapes).weight_map)


@pytest.mark.parametrize("older", [True, False])
@pytest.mark.parametrize(("says", "in_text"), [(None, None), (True, None), (True, False), (None, True)])
def test_a_head_is_tied_where_none_is_stored(older: bool, says: bool | None, in_text: bool | None) -> None:
    config = changed(cases.INTERNVL_HF, "tie_word_embeddings", says)
    config = changed(config, "text_config.tie_word_embeddings", in_text)
    for head in (True, False):
        shapes = hf_shapes(older, head)
        made = described(config, shapes)
        assert made.spec.embedding.tied is not head
        stream(OnlyShapes(shapes), made.weight_map)


def test_a_head_that_is_said_to_be_there_is_missed() -> None:
    shapes = hf_shapes(older=True, head=False)
    with pytest.raises(WeightsMismatch, match=r"1 missing \('language_model.lm_head.weight'\)"):
        stream(OnlyShapes(shapes), described(cases.INTERNVL_HF, shapes).weight_map)


def test_adapters_name_the_decoders_layers() -> None:
    made = described(*PUBLISHED["NVLM-D-72B"]).adapter_map
    named = {rule.sources[0]: rule.target for rule in made.rules}
    for prefix in ("model.", "language_model.model.", "model.language_model."):
        assert named[f"{prefix}layers.7.mlp.up_proj.weight"] == "layers.7.mlp.up.weight"
    assert named["lm_head.weight"] == named["language_model.lm_head.weight"] == "head.weight"
    assert not any("vision" in target or "projector" in target for target in named.values())


# ---------------------------------------------------------------- tiny checkpoints


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("vision")


Arrays = dict[str, NDArray[Any]]


def arrays(module: Any) -> Arrays:
    return {name: value.detach().numpy() for name, value in module.state_dict().items()}


def loaded(path: Path, kind: Kind) -> tuple[Description, Arrays]:
    with open_checkpoint(path) as checkpoint:
        found = describe(checkpoint.config, checkpoint.format, checkpoint.shapes(), token_id=token_ids(kind).get)
        tensors = stream(checkpoint, found.weight_map)
        return found, {name: np.array(tensor.dequantise()) for name, tensor in tensors}


def expected_tower(tower: Arrays) -> Arrays:
    """transformers' InternVL tower in headrace's names, by hand."""
    made = {
        "vision.class_token": tower["embeddings.cls_token"][0, 0],
        "vision.positions": tower["embeddings.position_embeddings"][0],
        "vision.patch.weight": tower["embeddings.patch_embeddings.projection.weight"].reshape(-1, 3 * 7 * 7),
        "vision.patch.bias": tower["embeddings.patch_embeddings.projection.bias"],
    }
    parts = {
        "attention.q_proj": "attn.q",
        "attention.k_proj": "attn.k",
        "attention.v_proj": "attn.v",
        "attention.projection_layer": "attn.o",
        "attention.q_norm": "attn.q_norm",
        "attention.k_norm": "attn.k_norm",
        "layernorm_before": "norms.pre_attn",
        "layernorm_after": "norms.pre_mlp",
        "mlp.fc1": "mlp.up",
        "mlp.fc2": "mlp.down",
    }
    for name, array in tower.items():
        found = re.fullmatch(r"encoder\.layer\.(\d+)\.(.+)", name)
        if found is None:
            continue
        index, part = found.groups()
        if part.startswith("lambda_"):
            made[f"vision.layers.{index}.scales.{'attn' if part == 'lambda_1' else 'mlp'}"] = array
        else:
            module, _, kind = part.rpartition(".")
            made[f"vision.layers.{index}.{parts[module]}.{kind}"] = array
    return made


@pytest.mark.parametrize("kind", [kind for kind in get_args(Kind) if kind != "open_qwen2vl"])
def test_a_tiny_internvl_streams_what_transformers_computes_with(folder: Path, kind: Kind) -> None:
    path = tiny_vision_checkpoint(folder / kind, kind, seed=3)
    model = tiny_vision_model(kind, seed=3)
    found, made = loaded(path, kind)
    seeing = found.spec.vision
    assert seeing is not None and seeing.image_token_id == model.config.image_token_id
    assert seeing.projector.tokens == 4 and found.dtype == "float32"
    expected = expected_tower(arrays(model.model.vision_tower))
    for theirs, ours in (("layer_norm", "norm"), ("linear_1", "up"), ("linear_2", "down")):
        for part, array in arrays(getattr(model.model.multi_modal_projector, theirs)).items():
            expected[f"projector.{ours}.{part}"] = array
    expected["embed.weight"] = arrays(model.model.language_model)["embed_tokens.weight"]
    expected["head.weight"] = arrays(model.lm_head)["weight"]
    expected["layers.1.attn.k.bias"] = arrays(model.model.language_model)["layers.1.self_attn.k_proj.bias"]
    assert {name for name in made if name.startswith(("vision", "projector"))} == {
        name for name in expected if name.startswith(("vision", "projector"))
    }
    for name, array in expected.items():
        assert np.array_equal(made[name], array), name
    assert seeing.encoder.dummy_heads == (2 if kind == "nvlm" else 0)


def test_nvlm_without_its_dummy_heads_is_the_same_model(folder: Path) -> None:
    """The 6B form of the published layout has none; what is computed with is the same."""
    path = tiny_vision_checkpoint(folder / "dummies", "nvlm", seed=5)
    found, _ = loaded(path, "nvlm")
    seeing = found.spec.vision
    assert seeing is not None and seeing.encoder.dummy_heads == 2
    plain = describe(json.loads((path / "config.json").read_text("utf-8")), "hf", {}, token_id=token_ids("nvlm").get)
    assert plain.spec.vision == replace(seeing, encoder=replace(seeing.encoder, dummy_heads=0))


def test_a_tiny_open_qwen2vl_streams_what_transformers_computes_with(folder: Path) -> None:
    path = tiny_vision_checkpoint(folder / "open", "open_qwen2vl", seed=3)
    parts = tiny_vision_model("open_qwen2vl", seed=3)
    assert isinstance(parts, OpenQwen2VLParts)
    found, made = loaded(path, "open_qwen2vl")
    seeing = found.spec.vision
    assert seeing is not None and (seeing.encoder.layers, seeing.encoder.grid, seeing.projector.tokens) == (3, 5, 4)
    assert found.spec.embedding.tied and "head.weight" not in made
    tower = {name.removeprefix("vision_model."): array for name, array in arrays(parts.vision).items()}
    for index in range(3):
        theirs, ours = f"encoder.layers.{index}", f"vision.layers.{index}"
        for name, target in {
            "self_attn.q_proj": "attn.q",
            "self_attn.k_proj": "attn.k",
            "self_attn.v_proj": "attn.v",
            "self_attn.out_proj": "attn.o",
            "mlp.fc1": "mlp.up",
            "mlp.fc2": "mlp.down",
            "layer_norm1": "norms.pre_attn",
            "layer_norm2": "norms.pre_mlp",
        }.items():
            for part in ("weight", "bias"):
                assert np.array_equal(made[f"{ours}.{target}.{part}"], tower[f"{theirs}.{name}.{part}"]), name
    assert not any(name.startswith("vision.layers.3") for name in made)
    assert np.array_equal(made["vision.positions"], tower["embeddings.position_embedding.weight"])
    assert np.array_equal(
        made["vision.patch.weight"], tower["embeddings.patch_embedding.weight"].reshape(32, 3 * 7 * 7)
    )
    projector = arrays(parts.projector)
    assert np.array_equal(made["projector.up.weight"], projector["0.weight"])
    assert np.array_equal(made["projector.down.bias"], projector["2.bias"])
    assert np.array_equal(made["layers.0.attn.q.bias"], arrays(parts.decoder)["model.layers.0.self_attn.q_proj.bias"])


def test_tiny_checkpoints_take_other_sizes(folder: Path) -> None:
    path = tiny_vision_checkpoint(
        folder / "other",
        "internvl_300m_hf",
        dtype="bfloat16",
        chat_template=False,
        text={"model_type": "llama", "num_hidden_layers": 1, "tie_word_embeddings": True},
        vision={"num_hidden_layers": 1, "image_size": 14},
        config={"image_seq_length": 1},
    )
    found, made = loaded(path, "internvl_300m_hf")
    assert found.spec.vision is not None and found.spec.vision.projector.tokens == 1
    assert (found.dtype, len(found.spec.layers), found.spec.embedding.tied) == ("bfloat16", 1, True)
    assert "head.weight" not in made and not found.spec.layers[0].attention.qkv_bias
    assert "chat_template" not in json.loads((path / "tokenizer_config.json").read_text("utf-8"))


# ---------------------------------------------------------------- image processors


def test_the_image_processor_is_read(tmp_path: Path) -> None:
    """As transformers saves it: a file of its own, or a part of the processor's."""
    path = tiny_vision_checkpoint(tmp_path / "model", "internvl_300m_hf")

    def tiling() -> TilingSpec:
        checkpoint = open_checkpoint(path)
        with checkpoint:
            found = describe(
                checkpoint.config, "hf", checkpoint.shapes(), processor=read_image_processor(checkpoint)
            ).spec.vision
        assert found is not None
        return found.tiling

    plain = tiling()
    assert (plain.min_tiles, plain.max_tiles, plain.thumbnail) == (1, 12, True)
    side = {"height": plain.tile_size, "width": plain.tile_size}
    said = {"size": side, "min_patches": 2, "max_patches": 5, "image_mean": [0.5] * 3, "image_std": [0.25] * 3}
    wanted = replace(plain, min_tiles=2, max_tiles=5, mean=(0.5,) * 3, std=(0.25,) * 3)
    whole = path / "processor_config.json"
    whole.write_text(json.dumps({"image_processor": {**said, "crop_to_patches": False, "resample": 3}}))
    assert tiling() == wanted
    own = path / "preprocessor_config.json"
    own.write_text(json.dumps({"max_patches": 7}))
    assert tiling() == replace(plain, max_tiles=7)
    for key, value in (("min_patches", 8), ("image_std", [0, 1, 1]), ("max_patches", "many")):
        own.write_text(json.dumps({"max_patches": 7, key: value}))
        with pytest.raises(CheckpointError, match=rf"^preprocessor_config\.json: (max_patches|{key}) is "):
            tiling()
    for key, other in (("resample", 2), ("do_normalize", False), ("size", {"height": 9, "width": 9})):
        own.write_text(json.dumps({key: other}))
        with pytest.raises(UnsupportedModel, match=r"^preprocessor_config\.json: "):
            tiling()
