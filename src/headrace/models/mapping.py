"""Weight rules out of a spec: what the architectures' weight maps are made of.

Every shape and every bias comes from the ModelSpec, so a map and its spec cannot disagree. A linear layer's rows are
its outputs: q, k, v, gate and up are cut by rows, o and down by columns, whose biases every rank holds whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from headrace.core.spec import AttentionSpec, LayerNorms, MlpSpec, ModelSpec, NormSpec, Shard, WeightMap, WeightRule
from headrace.models import names

LLAMA_NORMS: Mapping[str, str] = {"pre_attn": "input_layernorm", "pre_mlp": "post_attention_layernorm"}
"""Our norm -> the checkpoint's; in Llama the second one stands before the MLP."""


@dataclass(frozen=True, slots=True)
class ExpertNames:
    """How a checkpoint calls a layer's block of experts, and an expert's three weights."""

    block: str = "mlp"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"


EXPERTS = ExpertNames()
INV_FREQ = r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq"
"""A table older versions saved, and anyone can compute."""


def linear(source: str, target: str, rows: int, cols: int, bias: bool, shard: Shard) -> Iterator[WeightRule]:
    """A weight (rows, cols) and its bias (rows,)."""
    yield WeightRule((f"{source}.weight",), f"{target}.weight", (rows, cols), shard=shard)
    if bias:
        yield WeightRule((f"{source}.bias",), f"{target}.bias", (rows,), shard="rows" if shard == "rows" else "none")


def split_linear(source: str, parts: Mapping[str, int], cols: int) -> Iterator[WeightRule]:
    """Parts (target -> rows) that a checkpoint holds one under the other in one weight; each is cut by rows."""
    start = 0
    for target, rows in parts.items():
        span = (start, start + rows)
        yield WeightRule((f"{source}.weight",), f"{target}.weight", (rows, cols), "split_rows", shard="rows", rows=span)
        start += rows


def norm(source: str, target: str, spec: NormSpec) -> Iterator[WeightRule]:
    yield WeightRule((f"{source}.weight",), f"{target}.weight", (spec.width,))
    if spec.bias:
        yield WeightRule((f"{source}.bias",), f"{target}.bias", (spec.width,))


def attention(source: str, target: str, spec: AttentionSpec, hidden: int) -> Iterator[WeightRule]:
    """q_proj, k_proj, v_proj, o_proj, and q_norm, k_norm where the spec has them."""
    for part, heads in (("q", spec.heads), ("k", spec.kv_heads), ("v", spec.kv_heads)):
        rows = heads * spec.head_dim
        yield from linear(f"{source}.{part}_proj", f"{target}.{part}", rows, hidden, spec.qkv_bias, "rows")
    yield from attention_output(f"{source}.o_proj", target, spec, hidden)
    for part, head_norm in (("q_norm", spec.q_norm), ("k_norm", spec.k_norm)):
        if head_norm is not None:
            yield from norm(f"{source}.{part}", f"{target}.{part}", head_norm)


def attention_output(source: str, target: str, spec: AttentionSpec, hidden: int) -> Iterator[WeightRule]:
    yield from linear(source, f"{target}.o", hidden, spec.heads * spec.head_dim, spec.o_bias, "cols")


def gated_mlp(
    source: str, target: str, hidden: int, intermediate: int, bias: bool = False, spelled: ExpertNames = EXPERTS
) -> Iterator[WeightRule]:
    """gate_proj, up_proj, down_proj."""
    yield from linear(f"{source}.{spelled.gate}", f"{target}.gate", intermediate, hidden, bias, "rows")
    yield from linear(f"{source}.{spelled.up}", f"{target}.up", intermediate, hidden, bias, "rows")
    yield from linear(f"{source}.{spelled.down}", f"{target}.down", hidden, intermediate, bias, "cols")


def mlp(source: str, target: str, spec: MlpSpec, hidden: int, spelled: ExpertNames = EXPERTS) -> Iterator[WeightRule]:
    """Of the layer at `source`: a gated MLP, or a router (`gate`) and `experts.E`."""
    if spec.experts is None:
        yield from gated_mlp(f"{source}.mlp", target, hidden, spec.intermediate, spec.bias)
        return
    block = f"{source}.{spelled.block}"
    yield from linear(f"{block}.gate", f"{target}.router", spec.experts.num_experts, hidden, False, "none")
    for expert in range(spec.experts.num_experts):
        part = f"experts.{expert}"
        inner = spec.experts.intermediate
        yield from gated_mlp(f"{block}.{part}", f"{target}.{part}", hidden, inner, spelled=spelled)


def norms(source: str, target: str, spec: LayerNorms, spelled: Mapping[str, str]) -> Iterator[WeightRule]:
    for ours, theirs in spelled.items():
        yield from norm(f"{source}.{theirs}", f"{target}.{ours}", getattr(spec, ours))


def ends(spec: ModelSpec, embed: str, final_norm: str, head: str) -> Iterator[WeightRule]:
    """Embedding, final norm, and the head: no weight where it is tied, but its bias if it has one."""
    size = (spec.vocab_size, spec.hidden_size)
    yield WeightRule((f"{embed}.weight",), names.EMBED, size, shard="rows")
    yield from norm(final_norm, names.FINAL_NORM, spec.final_norm)
    if not spec.embedding.tied:
        yield WeightRule((f"{head}.weight",), f"{names.HEAD}.weight", size, shard="rows")
    if spec.head.bias:
        yield WeightRule((f"{head}.bias",), f"{names.HEAD}.bias", size[:1], shard="rows")


def tied_head(spec: ModelSpec) -> tuple[str, ...]:
    """Some checkpoints store a copy of the embedding as the head."""
    return (r"lm_head\.weight",) if spec.embedding.tied else ()


def llama_like_map(
    spec: ModelSpec, spelled_norms: Mapping[str, str] = LLAMA_NORMS, spelled_experts: ExpertNames = EXPERTS
) -> WeightMap:
    """The names that Llama gave the world: `model.layers.N.self_attn.q_proj.weight` …"""
    rules = [*ends(spec, "model.embed_tokens", "model.norm", "lm_head")]
    for index, layer in enumerate(spec.layers):
        source = f"model.layers.{index}"
        rules += attention(f"{source}.self_attn", names.layer(index, "attn"), layer.attention, spec.hidden_size)
        rules += mlp(source, names.layer(index, "mlp"), layer.mlp, spec.hidden_size, spelled_experts)
        rules += norms(source, names.layer(index, "norms"), layer.norms, spelled_norms)
    return WeightMap(tuple(rules), (INV_FREQ, *tied_head(spec)))
