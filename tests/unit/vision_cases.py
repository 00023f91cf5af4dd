"""Published configs of models that see, and the names and shapes of the tensors that they were published with."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from headrace.weights.checkpoint import Checkpoint
from headrace.weights.qtensor import QTensor

Config = dict[str, Any]
Shapes = dict[str, tuple[int, ...]]

IMAGE_TOKEN = 151_000
"""Inside every vocabulary here."""

VISION_6B: Config = {
    "architectures": ["InternVisionModel"],
    "model_type": "intern_vit_6b",
    "hidden_size": 3200,
    "intermediate_size": 12800,
    "num_hidden_layers": 45,
    "num_attention_heads": 25,
    "image_size": 448,
    "patch_size": 14,
    "norm_type": "rms_norm",
    "qk_normalization": True,
    "qkv_bias": False,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
    "num_channels": 3,
    "initializer_factor": 0.1,
}
VISION_300M: Config = {
    **VISION_6B,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "norm_type": "layer_norm",
    "qk_normalization": False,
    "qkv_bias": True,
    "initializer_factor": 1.0,
}
QWEN2_72B: Config = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "llama",
    "attention_bias": True,
    "mlp_bias": False,
    "hidden_size": 8192,
    "intermediate_size": 29568,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "vocab_size": 152_064,
    "tie_word_embeddings": False,
    "sliding_window": None,
}
QWEN2_HALF_B: Config = {
    **QWEN2_72B,
    "model_type": "qwen2",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "vocab_size": 151_655,
}
NVLM_D: Config = {
    "architectures": ["NVLM_D"],
    "model_type": "NVLM_D",
    "downsample_ratio": 0.5,
    "dynamic_image_size": True,
    "force_image_size": 448,
    "select_layer": -1,
    "use_thumbnail": True,
    "min_dynamic_patch": 1,
    "max_dynamic_patch": 6,
    "ps_version": "v2",
    "template": "chatml",
    "torch_dtype": "bfloat16",
    "use_backbone_lora": 0,
    "use_llm_lora": 0,
    "llm_config": QWEN2_72B,
    "vision_config": VISION_6B,
}
INTERNVL2_1B: Config = {
    **NVLM_D,
    "architectures": ["InternVLChatModel"],
    "model_type": "internvl_chat",
    "max_dynamic_patch": 12,
    "template": "Hermes-2",
    "llm_config": QWEN2_HALF_B,
    "vision_config": VISION_300M,
}
INTERNVL_HF: Config = {
    "architectures": ["InternVLForConditionalGeneration"],
    "model_type": "internvl",
    "downsample_ratio": 0.5,
    "image_seq_length": 256,
    "image_token_id": IMAGE_TOKEN,
    "projector_hidden_act": "gelu",
    "tie_word_embeddings": False,
    "vision_feature_layer": -1,
    "vision_feature_select_strategy": "default",
    "text_config": QWEN2_HALF_B,
    "vision_config": {
        "model_type": "internvl_vision",
        "attention_bias": True,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": [448, 448],
        "patch_size": [14, 14],
        "norm_type": "layer_norm",
        "use_qk_norm": False,
        "use_mask_token": False,
        "use_absolute_position_embeddings": True,
        "use_mean_pooling": True,
        "layer_norm_eps": 1e-6,
    },
}
OPEN_QWEN2VL: Config = {
    "architectures": ["OpenQwen2VL"],
    "model_type": "open_qwen2vl",
    "vision_config": {
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "image_size": 384,
        "patch_size": 14,
        "feature_block": 25,
    },
    "projector": {"type": "avgpool", "layers": 2, "query_num": 729},
    "text_config": {
        **QWEN2_HALF_B,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "vocab_size": 151_936,
        "tie_word_embeddings": True,
    },
    "image_token_id": IMAGE_TOKEN,
    "prompt_form": "train",
}


def changed(config: Mapping[str, Any], path: str, value: object) -> Config:
    """A copy with another value at `path`, keys with dots between; None takes the key away."""
    made = copy.deepcopy(dict(config))
    *tables, key = path.split(".")
    table = made
    for name in tables:
        table = table[name]
    if value is None:
        table.pop(key)
    else:
        table[key] = value
    return made


class OnlyShapes(Checkpoint):
    """A checkpoint that has names and shapes, and not one byte."""

    format = "hf"
    path = Path("shapes")
    config: Mapping[str, object] = {}
    nbytes = 0

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._shapes = dict(shapes)

    def names(self) -> tuple[str, ...]:
        return tuple(self._shapes)

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._shapes

    def tensor(self, name: str) -> QTensor:
        raise AssertionError(f"{name} is read")

    def drop_pages(self) -> None:
        """Nothing is mapped."""

    def close(self) -> None:
        """Nothing is open."""

    def _identity(self) -> Iterator[bytes]:
        yield b"shapes"


def chat_shapes(config: Mapping[str, Any], stored_heads: int, middle: int) -> Shapes:
    """Every tensor of the published layout. `stored_heads`: dummy ones too; `middle`: width of the projector, which has
    biases where that is the decoder's width."""
    llm, tower = config["llm_config"], config["vision_config"]
    hidden, width = llm["hidden_size"], tower["hidden_size"]
    head = width // tower["num_attention_heads"]
    rows = (tower["image_size"] // tower["patch_size"]) ** 2 + 1
    made: Shapes = {
        "vision_model.embeddings.class_embedding": (1, 1, width),
        "vision_model.embeddings.patch_embedding.weight": (width, 3, tower["patch_size"], tower["patch_size"]),
        "vision_model.embeddings.patch_embedding.bias": (width,),
        "vision_model.embeddings.position_embedding": (1, rows, width),
    }
    for index in range(tower["num_hidden_layers"]):
        layer = _block(tower, width, stored_heads * head)
        made |= {f"vision_model.encoder.layers.{index}.{name}": shape for name, shape in layer.items()}
    made |= {"mlp1.0.weight": (4 * width,), "mlp1.0.bias": (4 * width,)}
    made |= {"mlp1.1.weight": (middle, 4 * width), "mlp1.3.weight": (hidden, middle)}
    if middle == hidden:
        made |= {"mlp1.1.bias": (middle,), "mlp1.3.bias": (hidden,)}
    return made | {f"language_model.{name}": shape for name, shape in decoder_shapes(llm).items()}


def _block(tower: Mapping[str, Any], width: int, stored: int) -> Shapes:
    inner = tower["intermediate_size"]
    made: Shapes = {
        "attn.qkv.weight": (3 * stored, width),
        "attn.proj.weight": (width, stored),
        "attn.proj.bias": (width,),
        "norm1.weight": (width,),
        "norm2.weight": (width,),
        "mlp.fc1.weight": (inner, width),
        "mlp.fc1.bias": (inner,),
        "mlp.fc2.weight": (width, inner),
        "mlp.fc2.bias": (width,),
        "ls1": (width,),
        "ls2": (width,),
    }
    if tower["qkv_bias"]:
        made["attn.qkv.bias"] = (3 * stored,)
    if tower["qk_normalization"]:
        made |= {"attn.q_norm.weight": (stored,), "attn.k_norm.weight": (stored,)}
    if tower["norm_type"] == "layer_norm":
        made |= {"norm1.bias": (width,), "norm2.bias": (width,)}
    return made


def decoder_shapes(llm: Mapping[str, Any]) -> Shapes:
    """Of Qwen2, in its own names."""
    hidden, inner, vocab = llm["hidden_size"], llm["intermediate_size"], llm["vocab_size"]
    keys = hidden // llm["num_attention_heads"] * llm["num_key_value_heads"]
    made: Shapes = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    if not llm["tie_word_embeddings"]:
        made["lm_head.weight"] = (vocab, hidden)
    layer: Shapes = {
        "self_attn.q_proj.weight": (hidden, hidden),
        "self_attn.q_proj.bias": (hidden,),
        "self_attn.k_proj.weight": (keys, hidden),
        "self_attn.k_proj.bias": (keys,),
        "self_attn.v_proj.weight": (keys, hidden),
        "self_attn.v_proj.bias": (keys,),
        "self_attn.o_proj.weight": (hidden, hidden),
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }
    for index in range(llm["num_hidden_layers"]):
        made |= {f"model.layers.{index}.{name}": shape for name, shape in layer.items()}
    return made


def nvlm_shapes() -> Shapes:
    """NVLM-D-72B: 32 stored heads for 25 real ones, the projector as wide as the decoder's MLP, without biases."""
    return chat_shapes(NVLM_D, stored_heads=32, middle=QWEN2_72B["intermediate_size"])


def internvl2_shapes() -> Shapes:
    return chat_shapes(INTERNVL2_1B, stored_heads=16, middle=QWEN2_HALF_B["hidden_size"])


def siglip_shapes(tower: Mapping[str, Any]) -> Shapes:
    """timm's tower with its last norm and, of its pooling head, one tensor."""
    width, inner = tower["hidden_size"], tower["intermediate_size"]
    made: Shapes = {
        "patch_embed.proj.weight": (width, 3, tower["patch_size"], tower["patch_size"]),
        "patch_embed.proj.bias": (width,),
        "pos_embed": (1, (tower["image_size"] // tower["patch_size"]) ** 2, width),
        "norm.weight": (width,),
        "norm.bias": (width,),
        "attn_pool.latent": (1, 1, width),
    }
    sizes = {"norm1": (width,), "norm2": (width,), "attn.qkv": (3 * width, width), "attn.proj": (width, width)}
    sizes |= {"mlp.fc1": (inner, width), "mlp.fc2": (width, inner)}
    for index in range(tower["num_hidden_layers"]):
        for name, shape in sizes.items():
            made |= {f"blocks.{index}.{name}.weight": shape, f"blocks.{index}.{name}.bias": shape[:1]}
    return made


def open_qwen2vl_shapes() -> Shapes:
    """After its conversion."""
    width, hidden = OPEN_QWEN2VL["vision_config"]["hidden_size"], OPEN_QWEN2VL["text_config"]["hidden_size"]
    made = {f"vision_backbone.featurizer.{name}": s for name, s in siglip_shapes(OPEN_QWEN2VL["vision_config"]).items()}
    made |= {"projector.mlp_projector.0.weight": (hidden, width), "projector.mlp_projector.0.bias": (hidden,)}
    made |= {"projector.mlp_projector.2.weight": (hidden, hidden), "projector.mlp_projector.2.bias": (hidden,)}
    return made | {f"llm_backbone.llm.{n}": s for n, s in decoder_shapes(OPEN_QWEN2VL["text_config"]).items()}
