"""Tensor names of GGUF files, and how the tensors of llama.cpp's converter differ from those of Hugging Face."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from headrace.core.spec import ModelSpec, WeightRule
from headrace.models.experts import EXPERT, ROUTER, MergedNames, take_apart

NAMES: Mapping[str, str] = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
"""Hugging Face's name, less `model.layers.N.` and `.weight`, -> GGUF's, less `blk.N.`."""

GEMMA3_NAMES: Mapping[str, str] = {
    **NAMES,
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
PHI3_NAMES: Mapping[str, str] = {**NAMES, "self_attn.qkv_proj": "attn_qkv", "mlp.gate_up_proj": "ffn_up"}
"""gate over up, in the tensor that has up alone elsewhere."""

ROTARY_TABLE = r"blk\.\d+\.attn_rot_embd(\.weight)?"
"""Inverse frequencies, which old converters stored."""


def read_rule(
    rule: WeightRule, spec: ModelSpec, names: Mapping[str, str], permuted: bool, shapes: Mapping[str, tuple[int, ...]]
) -> WeightRule:
    """A rule over Hugging Face's tensors as one over the file's. `names`: NAMES or an architecture's own."""
    expert, router = EXPERT.fullmatch(rule.target), ROUTER.fullmatch(rule.target)
    if router is not None:
        return replace(rule, sources=(f"blk.{router[1]}.ffn_gate_inp.weight",))
    if expert is not None:
        layer, number, part = expert.groups()
        old = f"blk.{layer}.ffn_{part}.{number}.weight"
        return replace(rule, sources=(old,)) if old in shapes else take_apart(rule, lambda _: _merged(layer, shapes))
    renamed = replace(rule, sources=tuple(_tensor_name(source, names) for source in rule.sources))
    part = rule.target.split(".")[2:4]
    if not permuted or part not in (["attn", "q"], ["attn", "k"]):
        return renamed
    attention = spec.layers[0].attention
    heads = attention.heads if part[1] == "q" else attention.kv_heads
    return replace(renamed, op="permute_rope", heads=heads)


def _merged(layer: str, shapes: Mapping[str, tuple[int, ...]]) -> MergedNames:
    block = f"blk.{layer}.ffn"
    both = f"{block}_gate_up_exps.weight"
    gate, up, down = (f"{block}_{part}_exps.weight" for part in ("gate", "up", "down"))
    return MergedNames(gate, up, down, both if both in shapes else None)


def _tensor_name(name: str, names: Mapping[str, str]) -> str:
    """`model.layers.3.self_attn.q_proj.weight` -> `blk.3.attn_q.weight`"""
    stem, _, suffix = name.rpartition(".")
    if not stem.startswith("model.layers."):
        return f"{names[stem]}.{suffix}"
    index, part = stem.removeprefix("model.layers.").split(".", 1)
    return f"blk.{index}.{names[part]}.{suffix}"
