"""The work of one layer and of training: bytes it keeps and moves, FLOPs. Beside sizing.py, which the runtime uses too.

Symbols as in the papers: s tokens of a sequence, b sequences of a micro-batch, h hidden size, a heads, t GPUs of a
tensor-parallel group, N GPUs that share one copy of the model's states.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal

from headrace.core.flops import attention_flops, causal_flops, head_flops, layer_flops
from headrace.core.sizing import DTYPE_BYTES, kv_values_per_token, layer_weights, layer_width
from headrace.core.spec import LayerSpec, ModelSpec

Recompute = Literal["none", "selective", "full"]
"""Activations that backward computes again: none, those of attention's scores, all but a layer's input."""
Kept = Literal["parameters", "optimizer", "activations"]
"""What may lie away from the device: parameters and gradients; optimizer states; activation checkpoints."""
STATE_BYTES: Mapping[str, int] = {"parameters": 2, "gradients": 2, "optimizer": 12}
"""A parameter's, trained with Adam in mixed precision: 16-bit weight and gradient; 32-bit weight, momentum, variance
(ZeRO, §3.1)."""
SHARDED: Mapping[int, tuple[str, ...]] = {
    0: (),
    1: ("optimizer",),
    2: ("optimizer", "gradients"),
    3: ("optimizer", "gradients", "parameters"),
}
"""ZeRO stage -> states that are dealt out over the data-parallel GPUs."""


# ---------------------------------------------------------------- one layer


@dataclass(frozen=True, slots=True)
class LayerLoad:
    """What a mean layer asks of a machine. Bytes and FLOPs are floats: means, and packed weights."""

    hidden_size: int
    cache_parts: int
    """Into which the cache of one sequence can be dealt out: KV heads."""
    weights: float
    """Bytes."""
    linear: float
    """FLOPs for a token."""
    attention: float
    """FLOPs for a token and a key it sees."""
    kv: float
    """Bytes of a cached token."""
    hidden: float
    """Bytes of a token between two layers."""
    inner: float
    """Bytes of a token's intermediate results."""
    scores: float = 0
    """Bytes of a token and a key; 0 where attention is fused."""


def layer_load(spec: ModelSpec, form: str, dtype: str, kv_dtype: str) -> LayerLoad:
    """Mean over the decoder's layers. `form`: of WEIGHT_FORMS."""
    count, hidden, size = len(spec.layers), spec.hidden_size, DTYPE_BYTES[dtype]
    weights = sum(matrix.nbytes(form) for layer in spec.layers for matrix in layer_weights(layer, hidden))
    return LayerLoad(
        hidden_size=hidden,
        cache_parts=min(layer.attention.kv_heads for layer in spec.layers),
        weights=weights / count,
        linear=layer_flops(spec) / count,
        attention=attention_flops(spec, 1) / count,
        kv=kv_values_per_token(spec) * DTYPE_BYTES[kv_dtype] / count,
        hidden=hidden * size,
        inner=size * max(layer_width(layer, hidden) for layer in spec.layers),
    )


def opt_load(hidden: int, inner: int, heads: int) -> LayerLoad:
    """A layer of OPT in float16 as FlexGen's cost model counts it: matrices alone, scores written out."""
    matrices = 4 * hidden * hidden + 2 * hidden * inner
    return LayerLoad(
        hidden_size=hidden,
        cache_parts=heads,
        weights=2 * matrices,
        linear=2 * matrices,
        attention=4 * hidden,
        kv=4 * hidden,
        hidden=2 * hidden,
        inner=18 * hidden + 2 * inner,
        scores=2 * heads,
    )


# ---------------------------------------------------------------- training


def zero_bytes(parameters: float, ways: int, stage: int) -> dict[str, float]:
    """Bytes of each of the model's states on one of `ways` data-parallel GPUs (ZeRO, §5)."""
    return {state: parameters * each / (ways if state in SHARDED[stage] else 1) for state, each in STATE_BYTES.items()}


def activation_bytes(
    layer: LayerSpec,
    hidden: int,
    tokens: int,
    sequence: int,
    tp: int = 1,
    sequence_parallel: bool = False,
    recompute: Recompute = "none",
    fused: bool = False,
    dropout: bool = True,
) -> float:
    """What one layer keeps for backward of `tokens` (s·b) tokens, in 16 bits, on one of `tp` GPUs.

    Reducing Activation Recomputation in Large Transformer Models, §4: for GPT's layer
    sbh(10 + 24/t + 5·a·s/(h·t)), everything /t with sequence parallelism, 2sbh with full recomputation. Here counted by
    tensor, so that grouped queries, gated MLPs and fused attention have their own number. `fused`: scores are never
    kept; `dropout`: masks of one byte, as GPT has them.
    """
    attention, mlp = layer.attention, layer.mlp
    if recompute == "full":
        return 2 * tokens * hidden / (tp if sequence_parallel else 1)
    whole = 2 * hidden * 4 + 2 * hidden * dropout  # inputs of two norms, of attention and of MLP; two masks
    queries, keys = attention.heads * attention.head_dim, attention.kv_heads * attention.head_dim
    if mlp.experts is None:
        inner = mlp.intermediate
    else:
        inner = mlp.experts.experts_per_token * mlp.experts.intermediate + (mlp.experts.shared_intermediate or 0)
    # q, what the output projection reads, k, v; the MLP's values before and after its activation (and gate and product)
    dealt = 2 * (2 * queries + 2 * keys) + 2 * (4 if mlp.gated else 2) * inner
    seen = min(sequence, attention.window or sequence)
    if fused:
        scores = 4 * attention.heads  # one float32 a row
    elif recompute == "selective":
        scores = 0
    else:
        scores = (5 if dropout else 2) * attention.heads * seen
    return tokens * (whole / (tp if sequence_parallel else 1) + (dealt + scores) / tp)


def training_flops(spec: ModelSpec, sequence: int, recompute: Recompute = "none") -> float:
    """For one token of a sequence: forward, and twice as much backward; full recomputation is one more forward of the
    layers, selective one of attention's scores. The head counts, every token is a target; attention is causal."""
    linear, attention = layer_flops(spec), causal_flops(spec, sequence) / sequence
    again = {"none": 0.0, "selective": attention, "full": linear + attention}[recompute]
    return 3 * (linear + attention + head_flops(spec)) + again


def zero_traffic(parameters: float, stage: int, micro_batches: int = 1) -> float:
    """Bytes that one GPU sends in a step, at 2 bytes an element (ZeRO, §7): gradients are reduced and what comes of
    them gathered, 2P elements; stage 2 reduces, and stage 3 also gathers twice, for every micro-batch: 3P with one."""
    elements = {0: 2, 1: 2, 2: micro_batches + 1, 3: 3 * micro_batches}[stage]
    return 2.0 * parameters * elements


def tensor_parallel_traffic(tokens: int, hidden: int, layers: int, tp: int, recompute: Recompute = "none") -> float:
    """Bytes that one GPU sends for one micro-batch: two all-reduces of 2·s·b·h bytes forward and two backward in each
    layer (Megatron-LM, §3), as rings; full recomputation repeats the forward ones."""
    reduces = 6 if recompute == "full" else 4
    return reduces * layers * 2.0 * tokens * hidden * 2 * (tp - 1) / tp


def infinity_parameters(layers: int, hidden: int) -> int:
    """12 nl hd² (ZeRO-Infinity, §3): of a GPT, embedding and norms left out."""
    return 12 * layers * hidden * hidden


def infinity_state_bytes(layers: int, hidden: int) -> int:
    """240 nl hd²: 20 bytes a parameter; gradients are kept in 32 bits too, and so is the parameter."""
    return 240 * layers * hidden * hidden


def infinity_working_bytes(
    hidden: int, heads: int, micro_batch: int, sequence: int, between: int = 1
) -> tuple[int, int]:
    """(MSWM, AWM) of ZeRO-Infinity, §3: weight and gradient of the largest matrix, 4 · hd · 4hd; what one block of
    `between` (ci) layers keeps between two activation checkpoints."""
    activations = micro_batch * sequence * between * (16 * hidden + 2 * heads * sequence)
    return 4 * hidden * 4 * hidden, activations


def infinity_intensity(kind: Kept, sequence: int, micro_batch: int, hidden: int, between: int = 1) -> float:
    """FLOPs for each byte that moves (ZeRO-Infinity, §4): parameters and gradients seq · bsz, optimizer states a
    quarter of it, activation checkpoints 24 · hd · ci."""
    if kind == "activations":
        return 24.0 * hidden * between
    return sequence * micro_batch / (1 if kind == "parameters" else 4)


def infinity_efficiency(intensity: float, bandwidth: float, peak: float) -> float:
    """AIT · bw / (AIT · bw + peak): share of the peak where nothing overlaps (ZeRO-Infinity, §4)."""
    return intensity * bandwidth / (intensity * bandwidth + peak)


def deepspeed_estimate(
    parameters: float, largest_layer: float, gpus: int, sharded: bool, offloaded: Collection[str] = (), nodes: int = 1
) -> tuple[float, float]:
    """(bytes on each GPU, bytes on each host) by DeepSpeed's own estimators, estimate_zero2_… and
    estimate_zero3_model_states_mem_needs. `sharded`: stage 3. `offloaded`: of STATE_BYTES.

    Stage 2: 2P + 18P/N, with the optimizer on the host 2P and there 1.5 · P · max(4N, 16). Stage 3: 4 · largest layer
    + 18P/N, with the optimizer on hosts 2P/N instead and 1.5 · 16P between them, with the parameters too 0 and 1.5 ·
    18P.
    """
    buffers = 1.5
    held = 4.0 * largest_layer if sharded else 2.0 * parameters
    if not offloaded:
        return held + 18.0 * parameters / gpus, 0.0
    if not sharded:
        return held, buffers * parameters * max(4 * gpus, 16)
    if "parameters" in offloaded:
        return held, buffers * 18.0 * parameters / nodes
    return held + 2.0 * parameters / gpus, buffers * 16.0 * parameters / nodes
