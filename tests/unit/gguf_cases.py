"""GGUF files of tiny transformers models, by the rules of llama.cpp's converter (`conversion/*.py` of llama.cpp).

Written with the `gguf` package: its writer, its names of keys and its map of tensor names.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import MODEL_ARCH

from tests.unit.models_cases import Tensors

Config = dict[str, Any]

ARCHITECTURES = {
    "llama": MODEL_ARCH.LLAMA,
    "mistral": MODEL_ARCH.LLAMA,
    "mixtral": MODEL_ARCH.LLAMA,
    "qwen2": MODEL_ARCH.QWEN2,
    "qwen3": MODEL_ARCH.QWEN3,
    "qwen3_moe": MODEL_ARCH.QWEN3MOE,
    "gemma3_text": MODEL_ARCH.GEMMA3,
    "phi3": MODEL_ARCH.PHI3,
}
EXPERT = re.compile(r"model\.layers\.(\d+)\.\w+\.experts\.(\d+)\.(\w+)\.weight")
EXPERT_PARTS = {"w1": "gate", "w3": "up", "w2": "down", "gate_proj": "gate", "up_proj": "up", "down_proj": "down"}


def write_gguf(
    path: Path,
    config: Config,
    tensors: Tensors,
    *,
    experts: str = "merged",
    quantised: gguf.GGMLQuantizationType | None = None,
    **changed_keys: Any,
) -> None:
    """`experts`: "merged" as today, "single" as before 2024, "fused" for gate and up in one tensor.

    `quantised`: the type of all matrices, which stay float32 otherwise. `changed_keys`: metadata written last, less the
    architecture's prefix and with `__` for a dot.
    """
    architecture = ARCHITECTURES[config["model_type"]]
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[architecture])
    _write_keys(writer, config, architecture)
    for key, value in changed_keys.items():
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        add[type(value)](f"{writer.arch}.{key.replace('__', '.')}", value)
    for name, tensor in _converted(config, tensors, architecture, experts):
        data = tensor.float().numpy()
        if quantised is None or data.ndim == 1 or "norm" in name or "ffn_gate_inp" in name:
            writer.add_tensor(name, data)
        else:
            writer.add_tensor(name, gguf.quants.quantize(data, quantised), raw_dtype=quantised)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_keys(writer: gguf.GGUFWriter, config: Config, architecture: MODEL_ARCH) -> None:
    rope = config["rope_parameters"]
    full = rope.get("full_attention", rope)
    head_dim = config.get("head_dim")
    whole = head_dim or config["hidden_size"] // config["num_attention_heads"]
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(full["rope_theta"])
    writer.add_file_type(0)
    if head_dim:
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    if architecture == MODEL_ARCH.PHI3:
        writer.add_rope_dimension_count(int(full.get("partial_rotary_factor", 1.0) * whole))
        writer.add_sliding_window(config["sliding_window"] or 0)
        original = config.get("original_max_position_embeddings") or config["max_position_embeddings"]
        writer.add_rope_scaling_orig_ctx_len(original)
        if full["rope_type"] == "longrope":
            scale = config["max_position_embeddings"] / original
            writer.add_rope_scaling_attn_factors(math.sqrt(1 + math.log(scale) / math.log(original)))
        return
    if full["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(full["rope_type"]))
        writer.add_rope_scaling_factor(full["factor"])
    if full["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(full["original_max_position_embeddings"])
    for key, add in (
        ("num_local_experts", writer.add_expert_count),
        ("num_experts", writer.add_expert_count),
        ("num_experts_per_tok", writer.add_expert_used_count),
        ("moe_intermediate_size", writer.add_expert_feed_forward_length),
    ):
        if key in config:
            add(config[key])
    if architecture == MODEL_ARCH.LLAMA:
        writer.add_vocab_size(config["vocab_size"])
        writer.add_rope_dimension_count(whole)
    if architecture == MODEL_ARCH.GEMMA3:
        writer.add_rope_freq_base_swa(rope["sliding_attention"]["rope_theta"])
        writer.add_sliding_window(config["sliding_window"])
        if config["final_logit_softcapping"]:
            writer.add_final_logit_softcapping(config["final_logit_softcapping"])


def _converted(
    config: Config, tensors: Tensors, architecture: MODEL_ARCH, experts: str
) -> Iterator[tuple[str, torch.Tensor]]:
    names = gguf.get_tensor_name_map(architecture, config["num_hidden_layers"])

    def renamed(name: str) -> str:
        found = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert found is not None, name
        return found

    yield from _divisors(config)
    parts: dict[tuple[str, str], dict[int, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        expert = EXPERT.fullmatch(name)
        if expert is not None:
            layer, number, part = expert.groups()
            parts.setdefault((layer, EXPERT_PARTS[part]), {})[int(number)] = tensor
            continue
        owner = name.split(".")[-2]
        if architecture == MODEL_ARCH.LLAMA and owner in ("q_proj", "k_proj"):
            heads = config["num_attention_heads" if owner == "q_proj" else "num_key_value_heads"]
            halves = tensor.reshape(heads, 2, -1, *tensor.shape[1:])
            tensor = halves.transpose(1, 2).reshape(tensor.shape)
        if architecture == MODEL_ARCH.GEMMA3 and name.endswith("norm.weight"):
            tensor = tensor + 1
        yield renamed(name), tensor
    stacked = {key: torch.stack([held[number] for number in sorted(held)]) for key, held in parts.items()}
    for (layer, part), tensor in stacked.items():
        if experts == "single":
            for number, matrix in enumerate(tensor):
                yield f"blk.{layer}.ffn_{part}.{number}.weight", matrix
        elif experts == "merged" or part == "down":
            yield renamed(f"model.layers.{layer}.mlp.experts.{part}_proj") + ".weight", tensor
        elif part == "gate":
            yield f"blk.{layer}.ffn_gate_up_exps.weight", torch.cat((tensor, stacked[layer, "up"]), dim=1)


def _divisors(config: Config) -> Iterator[tuple[str, torch.Tensor]]:
    """What the converter makes of Llama 3.1's rule, and LongRoPE's lists."""
    rope = config["rope_parameters"]
    if rope.get("rope_type") == "longrope":
        yield "rope_factors_long.weight", torch.tensor(rope["long_factor"])
        yield "rope_factors_short.weight", torch.tensor(rope["short_factor"])
    if rope.get("rope_type") != "llama3":
        return
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    original, low, high = (
        rope[key] for key in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
    )
    divisors = []
    for frequency in 1.0 / rope["rope_theta"] ** (np.arange(0, head_dim, 2) / head_dim):
        length = 2 * math.pi / frequency
        if length < original / high:
            divisors.append(1.0)
        elif length > original / low:
            divisors.append(rope["factor"])
        else:
            smooth = (original / length - low) / (high - low)
            divisors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    yield "rope_freqs.weight", torch.tensor(divisors)
