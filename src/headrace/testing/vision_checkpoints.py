"""Tiny random checkpoints of models that see, made with transformers' own modules. Needs transformers.

`tiny_vision_model` gives the model that transformers runs, `tiny_vision_checkpoint` writes the same weights as the kind
is published: in the order and under the names of its checkpoints.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from headrace.testing.checkpoints import TINY
from headrace.testing.tiny_tokenizer import write_tiny_tokenizer

Kind = Literal["internvl_300m_hf", "internvl_6b_hf", "internvl_chat", "nvlm", "open_qwen2vl"]
Arrays = dict[str, NDArray[Any]]

VOCAB = 384
"""Some rows more than there are tokens, as in Qwen2."""
TILE = 28
"""Pixels on a side of a tile; with patches of 7, sixteen patches and four rows of the decoder."""
PATCH = 7
SIGLIP_TILE = 38
"""Five patches of 7, and three pixels that belong to none; 384 pixels are 27 patches of 14."""
QUERIES = 4
DUMMY_HEADS = 2
_CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_INTERNVL = (*_CHATML, "<img>", "</img>", "<IMG_CONTEXT>")
SPECIAL: Mapping[Kind, tuple[str, ...]] = {
    "internvl_300m_hf": _INTERNVL,
    "internvl_6b_hf": _INTERNVL,
    "internvl_chat": _INTERNVL,
    "nvlm": (*_CHATML, "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"),
    "open_qwen2vl": (*_CHATML, "<|image_pad|>", "<|endofchunk|>", "<s>"),
}
"""The added tokens of a kind, in the order of their ids; the last of InternVL's and NVLM's is the placeholder."""


@dataclass(frozen=True, slots=True)
class OpenQwen2VLParts:
    """What transformers has of Open-Qwen2VL: its three parts, each a torch module."""

    vision: Any
    """SiglipVisionModel; the features are `hidden_states[feature_block + 1]`, without the last norm."""
    projector: Any
    """Linear, GELU, Linear, after the average pool."""
    decoder: Any
    """Qwen2ForCausalLM."""


def tiny_vision_checkpoint(
    path: Path,
    kind: Kind,
    *,
    seed: int = 0,
    dtype: str = "float32",
    chat_template: bool = True,
    max_shard_size: str = "1GB",
    text: Mapping[str, object] | None = None,
    vision: Mapping[str, object] | None = None,
    config: Mapping[str, object] | None = None,
) -> Path:
    """Writes config.json, safetensors and a tokenizer (`SPECIAL`), and returns `path`.

    `dtype`: float32, float16 or bfloat16, of the `_hf` kinds. `text` and `vision` override the sizes of the decoder and
    the vision tower in transformers' names, `config` the keys of the top level of config.json as it is written.
    Weights are those of `tiny_vision_model` with the same arguments.
    """
    ids = write_tiny_tokenizer(path, SPECIAL[kind], chat_template)
    if kind == "open_qwen2vl":
        parts = _open_qwen2vl_parts(seed, text, vision)
        _write(path, _open_qwen2vl_tensors(parts), _open_qwen2vl_config(parts, ids))
    else:
        model = _internvl(kind, seed, ids, text, vision)
        if kind in ("internvl_300m_hf", "internvl_6b_hf"):
            stored = {"float32": model.float, "bfloat16": model.bfloat16, "float16": model.half}[dtype]()
            stored.save_pretrained(path, max_shard_size=max_shard_size)
            _settle_hf(path, ids)
        elif kind == "nvlm":
            _write(path, _chat_tensors(model, dummy_heads=DUMMY_HEADS, seed=seed), _nvlm_config(model))
        else:
            _write(path, _chat_tensors(model, dummy_heads=0, seed=seed), _chat_config(model))
    if config:
        file = path / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text("utf-8")), **config}, indent=2), encoding="utf-8")
    return path


def tiny_vision_model(
    kind: Kind,
    *,
    seed: int = 0,
    text: Mapping[str, object] | None = None,
    vision: Mapping[str, object] | None = None,
) -> Any:
    """The transformers model in float32: InternVLForConditionalGeneration with the kind's projector, its image token
    that of the checkpoint's tokenizer; for open_qwen2vl, its `OpenQwen2VLParts`."""
    if kind == "open_qwen2vl":
        return _open_qwen2vl_parts(seed, text, vision)
    return _internvl(kind, seed, token_ids(kind), text, vision)


def token_ids(kind: Kind) -> dict[str, int]:
    """Ids of the added tokens of a kind: they follow the 256 bytes and the 96 merges."""
    return {text: 352 + place for place, text in enumerate(SPECIAL[kind])}


# ---------------------------------------------------------------- the transformers models


def _transformers() -> Any:
    """Its classes take whatever their configs name; no type says so."""
    import transformers

    return transformers


def _text_config(ids: Mapping[str, int], own: Mapping[str, object] | None) -> dict[str, object]:
    sizes = {**TINY, "vocab_size": VOCAB, "max_position_embeddings": 1024}
    ends = {"bos_token_id": ids["<|endoftext|>"], "eos_token_id": ids["<|im_end|>"]}
    return {**sizes, **ends, **(own or {})}


def _internvl(
    kind: Kind,
    seed: int,
    ids: Mapping[str, int],
    text: Mapping[str, object] | None,
    vision: Mapping[str, object] | None,
) -> Any:
    transformers = _transformers()
    large = kind in ("internvl_6b_hf", "nvlm")
    forms = {
        "norm_type": "rms_norm" if large else "layer_norm",
        "attention_bias": not large,
        "use_qk_norm": large,
        # 25 heads in the original: a number that no cut divides.
        "hidden_size": 40 if large else 32,
        "num_attention_heads": 5 if large else 4,
        "intermediate_size": 56,
        "num_hidden_layers": 3,
        "image_size": TILE,
        "patch_size": PATCH,
    }
    pad = "<|vision_pad|>" if kind == "nvlm" else "<IMG_CONTEXT>"
    own = {"model_type": "qwen2", **_text_config(ids, text)}
    transformers.set_seed(seed)
    model = transformers.InternVLForConditionalGeneration(
        transformers.InternVLConfig(
            vision_config={**forms, **(vision or {})},
            text_config=own,
            image_token_id=ids[pad],
            image_seq_length=4,
            tie_word_embeddings=own["tie_word_embeddings"],
        )
    )
    if kind == "nvlm":
        projector, hidden = model.model.multi_modal_projector, model.config.text_config.hidden_size
        linear, inner = type(projector.linear_1), model.config.text_config.intermediate_size
        projector.linear_1 = linear(projector.linear_1.in_features, inner, bias=False)
        projector.linear_2 = linear(inner, hidden, bias=False)
    _randomise(model)
    return model.float().eval()


def _open_qwen2vl_parts(
    seed: int, text: Mapping[str, object] | None, vision: Mapping[str, object] | None
) -> OpenQwen2VLParts:
    transformers = _transformers()
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 44,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": SIGLIP_TILE,
        "patch_size": PATCH,
    }
    transformers.set_seed(seed)
    tower = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**{**sizes, **(vision or {})}))
    own = _text_config(token_ids("open_qwen2vl"), {"tie_word_embeddings": True, **(text or {})})
    decoder = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**own))
    # A projector of the same form; torch itself is not imported here.
    borrowed = transformers.InternVLForConditionalGeneration(
        transformers.InternVLConfig(
            vision_config={"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8},
            text_config={"model_type": "qwen2", **own},
        )
    ).model.multi_modal_projector
    linear, hidden = type(borrowed.linear_1), decoder.config.hidden_size
    projector = type(decoder.model.layers)(
        [linear(tower.config.hidden_size, hidden), borrowed.act, linear(hidden, hidden)]
    )
    parts = OpenQwen2VLParts(tower, projector, decoder)
    for part in (tower, projector, decoder):
        _randomise(part)
        part.float().eval()
    return parts


def _randomise(model: Any) -> None:
    """Biases, norms, layer scales, positions and the class token too, so that none of them can be forgotten unseen."""
    for name, parameter in model.named_parameters():
        if "lambda_" in name or (name.endswith("weight") and "norm" in name):
            parameter.data.uniform_(0.5, 1.5)
        elif name.endswith("bias") or "position_embedding" in name or "cls_token" in name:
            parameter.data.normal_(0.0, 0.3)
        elif "language_model" not in name and "lm_head" not in name and "embed_tokens" not in name:
            parameter.data.normal_(0.0, parameter.shape[-1] ** -0.5)


# ---------------------------------------------------------------- published names


def _arrays(module: Any) -> Arrays:
    return {name: value.detach().numpy() for name, value in module.state_dict().items()}


def _chat_tensors(model: Any, dummy_heads: int, seed: int) -> Arrays:
    """InternVLChatModel's and NVLM-D's names, of transformers' tensors."""
    made: Arrays = {}
    tower = _arrays(model.model.vision_tower)
    for theirs, ours in (
        ("cls_token", "class_embedding"),
        ("patch_embeddings.projection.weight", "patch_embedding.weight"),
        ("patch_embeddings.projection.bias", "patch_embedding.bias"),
        ("position_embeddings", "position_embedding"),
    ):
        made[f"vision_model.embeddings.{ours}"] = tower[f"embeddings.{theirs}"]
    for index in range(model.config.vision_config.num_hidden_layers):
        prefix = f"encoder.layer.{index}."
        layer = {name.removeprefix(prefix): array for name, array in tower.items() if name.startswith(prefix)}
        stored = _chat_layer(layer, dummy_heads, model.config.vision_config.num_attention_heads, seed + index)
        made |= {f"vision_model.encoder.layers.{index}.{name}": array for name, array in stored.items()}
    for theirs, place in (("layer_norm", 0), ("linear_1", 1), ("linear_2", 3)):
        for name, array in _arrays(getattr(model.model.multi_modal_projector, theirs)).items():
            made[f"mlp1.{place}.{name}"] = array
    made |= {f"language_model.model.{name}": array for name, array in _arrays(model.model.language_model).items()}
    if not model.config.text_config.tie_word_embeddings:
        made["language_model.lm_head.weight"] = _arrays(model.lm_head)["weight"]
    return made


def _chat_layer(layer: Arrays, dummy_heads: int, heads: int, seed: int) -> Arrays:
    """One block, q, k and v in one tensor. `dummy_heads` follow the real ones, with numbers that would be seen."""
    width = layer["attention.q_proj.weight"].shape[0]
    extra = dummy_heads * (width // heads)
    random = np.random.default_rng(seed)

    def padded(array: NDArray[Any], axis: int = 0) -> NDArray[Any]:
        shape = list(array.shape)
        shape[axis] = extra
        return np.concatenate([array, random.standard_normal(shape).astype(array.dtype)], axis)

    made: Arrays = {}
    for part in ("weight", "bias"):
        names = [f"attention.{which}_proj.{part}" for which in "qkv"]
        if names[0] in layer:
            made[f"attn.qkv.{part}"] = np.concatenate([padded(layer[name]) for name in names])
    for which in "qk":
        if f"attention.{which}_norm.weight" in layer:
            made[f"attn.{which}_norm.weight"] = padded(layer[f"attention.{which}_norm.weight"])
    made["attn.proj.weight"] = padded(layer["attention.projection_layer.weight"], axis=1)
    made["attn.proj.bias"] = layer["attention.projection_layer.bias"]
    for theirs, ours in (("layernorm_before", "norm1"), ("layernorm_after", "norm2")):
        for part in ("weight", "bias"):
            if f"{theirs}.{part}" in layer:
                made[f"{ours}.{part}"] = layer[f"{theirs}.{part}"]
    made |= {name: layer[name] for name in layer if name.startswith("mlp.")}
    made["ls1"], made["ls2"] = layer["lambda_1"], layer["lambda_2"]
    return made


def _open_qwen2vl_tensors(parts: OpenQwen2VLParts) -> Arrays:
    """timm's names of the tower; its head and last norm are there, though nothing uses them."""
    tower = {name.removeprefix("vision_model."): array for name, array in _arrays(parts.vision).items()}
    vision: Arrays = {
        "patch_embed.proj.weight": tower["embeddings.patch_embedding.weight"],
        "patch_embed.proj.bias": tower["embeddings.patch_embedding.bias"],
        "pos_embed": tower["embeddings.position_embedding.weight"][None],
    }
    for index in range(parts.vision.config.num_hidden_layers):
        for part in ("weight", "bias"):
            source, target = f"encoder.layers.{index}", f"blocks.{index}"
            joined = [tower[f"{source}.self_attn.{which}_proj.{part}"] for which in "qkv"]
            vision[f"{target}.attn.qkv.{part}"] = np.concatenate(joined)
            vision[f"{target}.attn.proj.{part}"] = tower[f"{source}.self_attn.out_proj.{part}"]
            for theirs, ours in (("layer_norm1", "norm1"), ("layer_norm2", "norm2")):
                vision[f"{target}.{ours}.{part}"] = tower[f"{source}.{theirs}.{part}"]
            for layer in ("mlp.fc1", "mlp.fc2"):
                vision[f"{target}.{layer}.{part}"] = tower[f"{source}.{layer}.{part}"]
    vision["norm.weight"], vision["norm.bias"] = tower["post_layernorm.weight"], tower["post_layernorm.bias"]
    vision["attn_pool.latent"] = tower["head.probe"]
    made = {f"vision_backbone.featurizer.{name}": array for name, array in vision.items()}
    made |= {f"projector.mlp_projector.{name}": array for name, array in _arrays(parts.projector).items()}
    decoder = _arrays(parts.decoder)
    if parts.decoder.config.tie_word_embeddings:
        decoder.pop("lm_head.weight")
    return made | {f"llm_backbone.llm.{name}": array for name, array in decoder.items()}


# ---------------------------------------------------------------- config.json


def _vision_config(model: Any) -> dict[str, object]:
    own = model.config.vision_config
    return {
        "architectures": ["InternVisionModel"],
        "model_type": "intern_vit_6b",
        "hidden_size": own.hidden_size,
        "intermediate_size": own.intermediate_size,
        "num_hidden_layers": own.num_hidden_layers,
        "num_attention_heads": own.num_attention_heads,
        "num_channels": 3,
        "image_size": own.image_size[0],
        "patch_size": own.patch_size[0],
        "norm_type": own.norm_type,
        "qk_normalization": own.use_qk_norm,
        "qkv_bias": own.attention_bias,
        "hidden_act": own.hidden_act,
        "layer_norm_eps": own.layer_norm_eps,
        "initializer_factor": 0.1,
        "use_flash_attn": True,
    }


def _llm_config(model: Any) -> dict[str, object]:
    """As the older configs of these models write it: `rope_theta` outside of any table."""
    config: dict[str, object] = model.config.text_config.to_dict()
    rope = model.config.text_config.rope_parameters
    config.pop("rope_parameters")
    architecture = "LlamaForCausalLM" if config["model_type"] == "llama" else "Qwen2ForCausalLM"
    return {**config, "rope_theta": rope["rope_theta"], "architectures": [architecture]}


def _chat_config(model: Any) -> dict[str, object]:
    return {
        "architectures": ["InternVLChatModel"],
        "model_type": "internvl_chat",
        "downsample_ratio": 0.5,
        "dynamic_image_size": True,
        "force_image_size": model.config.vision_config.image_size[0],
        "select_layer": -1,
        "use_thumbnail": True,
        "min_dynamic_patch": 1,
        "max_dynamic_patch": 12,
        "ps_version": "v2",
        "template": "Hermes-2",
        "torch_dtype": "float32",
        "use_backbone_lora": 0,
        "use_llm_lora": 0,
        "llm_config": _llm_config(model),
        "vision_config": _vision_config(model),
    }


def _nvlm_config(model: Any) -> dict[str, object]:
    own = {"architectures": ["NVLM_D"], "model_type": "NVLM_D", "max_dynamic_patch": 6, "template": "chatml"}
    # The misleading word of the published file.
    llm = {**_llm_config(model), "model_type": "llama", "attention_bias": True, "mlp_bias": False}
    return {**_chat_config(model), **own, "llm_config": llm}


def _open_qwen2vl_config(parts: OpenQwen2VLParts, ids: Mapping[str, int]) -> dict[str, object]:
    tower = parts.vision.config
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size")
    return {
        "architectures": ["OpenQwen2VL"],
        "model_type": "open_qwen2vl",
        "vision_config": {
            **{key: getattr(tower, key) for key in sizes},
            "hidden_act": tower.hidden_act,
            "layer_norm_eps": tower.layer_norm_eps,
            "feature_block": tower.num_hidden_layers - 2,
        },
        "projector": {"type": "avgpool", "layers": 2, "query_num": QUERIES},
        "text_config": {**parts.decoder.config.to_dict(), "architectures": ["Qwen2ForCausalLM"]},
        "image_token_id": ids["<|image_pad|>"],
        "bos_token_id": ids["<s>"],
        "eos_token_id": ids["<|im_end|>"],
        "prompt_form": "train",
        "dtype": "float32",
    }


def _write(path: Path, tensors: Arrays, config: Mapping[str, object]) -> None:
    from safetensors.numpy import save_file

    save_file({name: np.ascontiguousarray(array) for name, array in tensors.items()}, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


def _settle_hf(path: Path, ids: Mapping[str, int]) -> None:
    """transformers writes a generation_config.json of its own: the end of an answer belongs there."""
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": ids["<|im_end|>"]}), encoding="utf-8")
