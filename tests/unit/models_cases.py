"""Tiny transformers models of every architecture, and a plain reading of a spec in torch to hold against them.

The reading is written from the docstrings of core/spec.py alone: where it agrees with transformers, the spec says all.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from torch.nn import functional

from headrace.core.spec import AttentionSpec, LayerSpec, MlpSpec, ModelSpec, NormSpec, RopeSpec, WeightMap, WeightRule
from headrace.weights.loader import rope_order

Tensors = dict[str, torch.Tensor]

SIZES: dict[str, Any] = {
    "vocab_size": 37,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
RAMP = {**YARN, "rope_theta": 100.0, "original_max_position_embeddings": 48, "beta_fast": 2, "beta_slow": 0.3}
"""Of 16 frequencies, some lie before the ramp, some on it, some past it."""
LONG = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0, 1.25, 1.5],
    "long_factor": [2.0, 3.0, 5.5],
}
MOE = {"head_dim": 10, "moe_intermediate_size": 12, "num_experts": 4, "num_experts_per_tok": 2}
WIDE = {"hidden_size": 64, "head_dim": 16, "intermediate_size": 32}
"""Whole groups of the packed schemes."""
MIXTRAL = {"num_local_experts": 4, "num_experts_per_tok": 2}


def _rope(**numbers: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, **numbers}}


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-mha-tied": ("Llama", {"num_key_value_heads": 4, "tie_word_embeddings": True, "rms_norm_eps": 1e-5}),
    "llama-one-kv-head": ("Llama", {"num_key_value_heads": 1, **_rope(rope_theta=1e5)}),
    "llama-head-dim": ("Llama", {"head_dim": 10, "hidden_act": "gelu_pytorch_tanh"}),
    "llama-biases": ("Llama", {"attention_bias": True, "mlp_bias": True, "hidden_act": "gelu"}),
    "llama-linear": ("Llama", _rope(rope_type="linear", factor=2.5)),
    "llama-dynamic": ("Llama", {"max_position_embeddings": 8, **_rope(rope_type="dynamic", factor=3.0)}),
    "llama-llama3": ("Llama", {"rope_parameters": LLAMA3}),
    "llama-yarn": ("Llama", {"rope_parameters": YARN}),
    "llama-yarn-numbers": (
        "Llama",
        {"head_dim": 32, "rope_parameters": {**RAMP, "mscale": 0.7, "mscale_all_dim": 1.1}},
    ),
    "llama-yarn-whole": (
        "Llama",
        {"head_dim": 32, "rope_parameters": {**RAMP, "truncate": False, "attention_factor": 0.9}},
    ),
    "llama-longrope": ("Llama", {"rope_parameters": {**LONG, "factor": 4.0, "original_max_position_embeddings": 8}}),
    "qwen2": ("Qwen2", {}),
    "qwen2-tied": ("Qwen2", {"tie_word_embeddings": True, **_rope(rope_theta=1e6)}),
    "qwen2-windows": ("Qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen2-layer-types": (
        "Qwen2",
        {
            "use_sliding_window": True,
            "sliding_window": 3,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "qwen2-head-dim-yarn": ("Qwen2", {"head_dim": 8, "rope_parameters": YARN}),
    "gemma3": ("Gemma3", {"head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 17}),
    "gemma3-pattern": (
        "Gemma3",
        {
            "head_dim": 8,
            "sliding_window": 4,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "final_logit_softcapping": 5.0,
            "attention_bias": True,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
            },
        },
    ),
    "gemma3-seven-layers": (
        "Gemma3",
        {
            "head_dim": 8,
            "num_hidden_layers": 7,
            "sliding_window": 4,
            "query_pre_attn_scalar": 8,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
    "gemma3-untied": ("Gemma3", {"head_dim": 6, "num_key_value_heads": 1, "tie_word_embeddings": False}),
    "phi3": ("Phi3", {"sliding_window": 5, "num_key_value_heads": 4}),
    "phi3-longrope": ("Phi3", {"rope_parameters": LONG, "original_max_position_embeddings": 8}),
    "phi3-partial-tied": (
        "Phi3",
        {"hidden_size": 64, "tie_word_embeddings": True, **_rope(partial_rotary_factor=0.75)},
    ),
    "gptj": ("GPTJ", {"rotary_dim": 4}),
    "gptj-whole-head": ("GPTJ", {"rotary_dim": 6, "n_inner": 10, "activation_function": "relu"}),
    "gptj-tied": ("GPTJ", {"rotary_dim": 2, "tie_word_embeddings": True}),
    "qwen3-moe": ("Qwen3Moe", MOE),
    "qwen3-moe-normalised": ("Qwen3Moe", {**MOE, "norm_topk_prob": True, "attention_bias": True}),
    "qwen3-moe-wide": ("Qwen3Moe", {**MOE, **WIDE, "moe_intermediate_size": 32, "norm_topk_prob": True}),
    "qwen3-moe-steps": ("Qwen3Moe", {**MOE, "decoder_sparse_step": 2, "tie_word_embeddings": True}),
    "qwen3-moe-dense": (
        "Qwen3Moe",
        {**MOE, "mlp_only_layers": [0, 2], "use_sliding_window": True, "sliding_window": 4},
    ),
    "qwen3-moe-none": ("Qwen3Moe", {**MOE, "num_experts": 0}),
    "qwen3": ("Qwen3", {"head_dim": 10}),
    "qwen3-tied": ("Qwen3", {"head_dim": 6, "tie_word_embeddings": True, **_rope(rope_theta=1e6)}),
    "qwen3-windows": (
        "Qwen3",
        {"head_dim": 8, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "qwen3-layer-types": (
        "Qwen3",
        {
            "head_dim": 8,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 3,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": YARN,
        },
    ),
    "mistral": ("Mistral", {"sliding_window": 5}),
    "mistral-no-window": ("Mistral", {"sliding_window": None, "head_dim": 10, **_rope(rope_theta=1e6)}),
    "mistral-tied": ("Mistral", {"sliding_window": None, "tie_word_embeddings": True, "rms_norm_eps": 1e-5}),
    "mixtral": ("Mixtral", MIXTRAL),
    "mixtral-window-tied": (
        "Mixtral",
        {**MIXTRAL, "sliding_window": 4, "head_dim": 10, "num_experts_per_tok": 3, "tie_word_embeddings": True},
    ),
    "mixtral-wide": ("Mixtral", {**MIXTRAL, **WIDE}),
    "mixtral-one-of-one": ("Mixtral", {"num_local_experts": 1, "num_experts_per_tok": 1}),
}

GPTJ_NAMES = {
    "hidden_size": "n_embd",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
    "max_position_embeddings": "n_positions",
}


def build(case: str, seed: int = 0) -> transformers.PreTrainedModel:
    """A model on the CPU in float32, in which no weight is a constant."""
    family, changes = CASES[case]
    values = {**SIZES, **changes}
    if family == "GPTJ":
        values = {GPTJ_NAMES.get(key, key): value for key, value in values.items()}
        values = {
            key: value for key, value in values.items() if key not in ("intermediate_size", "num_key_value_heads")
        }
    config_class = getattr(transformers, f"{family}TextConfig" if family == "Gemma3" else f"{family}Config")
    torch.manual_seed(seed)
    # The configuration of a rope is changed in place: each model gets its own copy.
    config = config_class(**json.loads(json.dumps(values)), attn_implementation="eager")
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def save(model: transformers.PreTrainedModel, folder: Path) -> tuple[dict[str, Any], Tensors]:
    """(config.json, tensors on disk)"""
    model.save_pretrained(folder)
    return json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")


def old_spelling(config: dict[str, Any]) -> dict[str, Any]:
    """A config as transformers 4 wrote it."""
    old = {key: value for key, value in config.items() if key not in ("rope_parameters", "dtype", "layer_types")}
    old["torch_dtype"] = config["dtype"]
    rope = config.get("rope_parameters")
    if rope is None:
        return old
    if "full_attention" in rope:
        old["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
        kinds = config["layer_types"]
        old["sliding_window_pattern"] = kinds.index("full_attention") + 1 if "full_attention" in kinds else 6
    elif "layer_types" in config:
        old["layer_types"] = config["layer_types"]
    old["rope_theta"] = rope["rope_theta"]
    if "partial_rotary_factor" in rope:
        old["partial_rotary_factor"] = rope["partial_rotary_factor"]
    scaling = {k: v for k, v in rope.items() if k not in ("rope_theta", "rope_type", "partial_rotary_factor")}
    old["rope_scaling"] = {"type": rope["rope_type"], **scaling} if rope["rope_type"] != "default" else None
    return old


# ---------------------------------------------------------------- a plain reading of a spec


def apply_rule(rule: WeightRule, tensors: Tensors) -> torch.Tensor:
    (source,) = rule.sources
    tensor = tensors[source]
    if rule.op == "split_rows":
        assert rule.rows is not None
        return tensor[rule.rows[0] : rule.rows[1]]
    if rule.op == "take":
        return tensor[rule.index] if rule.rows is None else tensor[rule.index, rule.rows[0] : rule.rows[1]]
    if rule.op == "permute_rope":
        return tensor[torch.from_numpy(rope_order(tensor.shape[0], rule.heads))]
    assert rule.op == "same"
    return tensor


def apply_map(weights: WeightMap, tensors: Tensors) -> Tensors:
    return {rule.target: apply_rule(rule, tensors) for rule in weights.rules}


def frequencies(rope: RopeSpec, length: int) -> tuple[torch.Tensor, float]:
    """(inverse frequencies (dim / 2,), factor of cos and sin) for a sequence of `length`."""
    exponents = torch.arange(0, rope.dim, 2).float() / rope.dim
    inv_freq = 1.0 / rope.base**exponents
    if rope.scaling is None:
        return inv_freq, 1.0
    numbers, kind = rope.scaling.numbers, rope.scaling.kind
    factor, original = numbers["factor"], numbers.get("original_context", 0.0)
    if kind == "linear":
        return inv_freq / factor, 1.0
    if kind == "dynamic":
        stretch = factor * max(length, original) / original - (factor - 1)
        return 1.0 / (rope.base * stretch ** (rope.dim / (rope.dim - 2))) ** exponents, 1.0
    if kind == "llama3":
        low, high = numbers["low_freq_factor"], numbers["high_freq_factor"]
        turns = original * inv_freq / (2 * math.pi)
        smooth = ((turns - low) / (high - low)).clamp(0, 1)
        return inv_freq * (smooth + (1 - smooth) / factor), 1.0
    if kind == "yarn":
        ends = [
            rope.dim * math.log(original / (numbers[key] * 2 * math.pi)) / (2 * math.log(rope.base))
            for key in ("beta_fast", "beta_slow")
        ]
        if numbers["truncate"]:
            ends = [math.floor(ends[0]), math.ceil(ends[1])]
        low, high = max(ends[0], 0), min(ends[1], rope.dim - 1)
        high = high + 0.001 if low == high else high
        ramp = ((torch.arange(rope.dim // 2).float() - low) / (high - low)).clamp(0, 1)
        return inv_freq / factor * ramp + inv_freq * (1 - ramp), numbers["attention_factor"]
    factors = rope.scaling.long_factors if length > original else rope.scaling.short_factors
    return inv_freq / torch.tensor(factors), numbers["attention_factor"]


def rotate(x_THD: torch.Tensor, rope: RopeSpec) -> torch.Tensor:
    inv_freq, scale = frequencies(rope, x_THD.shape[0])
    angles_TF = torch.arange(x_THD.shape[0]).float()[:, None] * inv_freq
    cos, sin = (scale * angles_TF.cos())[:, None], (scale * angles_TF.sin())[:, None]
    turned, rest = x_THD[..., : rope.dim], x_THD[..., rope.dim :]
    if rope.interleaved:
        a, b = turned[..., ::2], turned[..., 1::2]
        turned = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
    else:
        a, b = turned.chunk(2, dim=-1)
        turned = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
    return torch.cat((turned, rest), dim=-1)


def normalise(x: torch.Tensor, spec: NormSpec | None, weights: Tensors, name: str) -> torch.Tensor:
    if spec is None:
        return x
    weight = weights[f"{name}.weight"] + (1.0 if spec.unit_offset else 0.0)
    if spec.kind == "layer":
        return functional.layer_norm(x, (spec.width,), weight, weights[f"{name}.bias"], spec.eps)
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + spec.eps) * weight


def project(x: torch.Tensor, weights: Tensors, name: str) -> torch.Tensor:
    return functional.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))


def attend(x_TH: torch.Tensor, spec: AttentionSpec, weights: Tensors, name: str) -> torch.Tensor:
    length = x_TH.shape[0]
    q, k, v = (project(x_TH, weights, f"{name}.{part}").view(length, -1, spec.head_dim) for part in "qkv")
    assert f"{name}.q.bias" in weights or not spec.qkv_bias
    q = normalise(q, spec.q_norm, weights, f"{name}.q_norm")
    k = normalise(k, spec.k_norm, weights, f"{name}.k_norm")
    if spec.rope is not None:
        q, k = rotate(q, spec.rope), rotate(k, spec.rope)
    k, v = (part.repeat_interleave(spec.heads // spec.kv_heads, dim=1) for part in (k, v))
    scores_HTT = torch.einsum("thd,shd->hts", q, k) * spec.scale
    if spec.softcap is not None:
        scores_HTT = spec.softcap * torch.tanh(scores_HTT / spec.softcap)
    distance = torch.arange(length)[:, None] - torch.arange(length)
    seen = distance >= 0 if spec.window is None else (distance >= 0) & (distance < spec.window)
    shares_HTT = scores_HTT.masked_fill(~seen, -math.inf).softmax(-1)
    return project(torch.einsum("hts,shd->thd", shares_HTT, v).flatten(1), weights, f"{name}.o")


ACTIVATIONS = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": functional.relu,
}


def transform(x: torch.Tensor, spec: MlpSpec, weights: Tensors, name: str) -> torch.Tensor:
    activate = ACTIVATIONS[spec.activation]
    if spec.experts is not None:
        chances = project(x, weights, f"{name}.router").softmax(-1)
        best, which = chances.topk(spec.experts.experts_per_token, dim=-1)
        if spec.experts.normalise_weights:
            best = best / best.sum(-1, keepdim=True)
        share_TE = torch.zeros_like(chances).scatter(-1, which, best)
        plain = MlpSpec(spec.gated, spec.activation, spec.experts.intermediate)
        outputs = [
            transform(x, plain, weights, f"{name}.experts.{expert}") for expert in range(spec.experts.num_experts)
        ]
        return sum(share_TE[:, e, None] * output for e, output in enumerate(outputs))  # type: ignore[return-value]
    up = project(x, weights, f"{name}.up")
    inner = activate(project(x, weights, f"{name}.gate")) * up if spec.gated else activate(up)
    return project(inner, weights, f"{name}.down")


def run_layer(x: torch.Tensor, spec: LayerSpec, weights: Tensors, name: str) -> torch.Tensor:
    norms = f"{name}.norms"
    read = normalise(x, spec.norms.pre_attn, weights, f"{norms}.pre_attn")
    attended = attend(read, spec.attention, weights, f"{name}.attn")
    attended = normalise(attended, spec.norms.post_attn, weights, f"{norms}.post_attn") * spec.residual_scale
    if spec.parallel:
        return x + attended + transform(read, spec.mlp, weights, f"{name}.mlp") * spec.residual_scale
    x = x + attended
    changed = transform(normalise(x, spec.norms.pre_mlp, weights, f"{norms}.pre_mlp"), spec.mlp, weights, f"{name}.mlp")
    return x + normalise(changed, spec.norms.post_mlp, weights, f"{norms}.post_mlp") * spec.residual_scale


def run_spec(spec: ModelSpec, weights: Tensors, token_ids: torch.Tensor) -> torch.Tensor:
    """(T,) token ids -> (T, V) logits."""
    x = weights["embed.weight"][token_ids] * spec.embedding.scale
    for index, layer in enumerate(spec.layers):
        x = run_layer(x, layer, weights, f"layers.{index}")
    x = normalise(x, spec.final_norm, weights, "final_norm")
    matrix = weights["embed.weight" if spec.embedding.tied else "head.weight"]
    logits = functional.linear(x, matrix, weights.get("head.bias")) * spec.head.scale
    return logits if spec.head.softcap is None else spec.head.softcap * torch.tanh(logits / spec.head.softcap)
