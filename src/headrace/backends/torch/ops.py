"""Every operation of the decoder in plain torch, and nothing else: read this file to know what is computed.

Batch invariance: a row's bits depend on that row alone. Reductions (norms, softmax) work row by row. A matrix product
picks its kernel by its shape: `row_multiple` says how many rows it must be given, and whoever calls `linear` pads.
T: tokens, H: heads, N: batch of a product, M: query rows, L: keys, D: head dim, C: keys of a chunk.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional

from headrace.core.errors import UnsupportedModel
from headrace.core.spec import NormSpec, RopeSpec

KEY_CHUNK = 64
"""Keys in one product of probabilities and values; contexts are padded to a multiple of it."""

PACK_ROWS = 32
"""Rows of x that a packed weight is laid out for."""

QUERY_MULTIPLE = 4
"""Query rows of attention are padded to a multiple of it."""

VALUE_MULTIPLE = 8
"""Columns of values are padded to a multiple of it: with heads of 6 or 10 a row's bits showed its place."""

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": functional.relu,
}

ROPE_SCALINGS = frozenset({"linear", "llama3"})


def row_multiple(threads: int) -> int:
    """A product with this many rows, or a multiple, gives each row the same bits whatever their number.

    Measured with float32 on x86 (MKL, oneDNN), 1 to 4 threads: a thread that gets 1, 2 or 3 rows takes another kernel,
    from 4 up all agree.
    Holds above 16³ multiplications: torch gives smaller products in bfloat16 to another kernel.
    """
    return 4 * threads


def batch_minimum(head_dim: int) -> int:
    """Fewest N in `attention`: a lone matrix takes another kernel, and so do 16³ multiplications or fewer."""
    return max(2, 16**3 // (QUERY_MULTIPLE * KEY_CHUNK * head_dim) + 1)


def embed(token_ids_T: Tensor, weight_VH: Tensor) -> Tensor:
    return functional.embedding(token_ids_T, weight_VH)


def norm(x: Tensor, weight: Tensor, bias: Tensor | None, spec: NormSpec) -> Tensor:
    """RMSNorm (arXiv 1910.07467) or LayerNorm over the last dimension; the statistics are float32."""
    if spec.kind == "rms":
        normed = functional.rms_norm(x.float(), (spec.width,), None, spec.eps).to(x.dtype)
        return normed * weight
    normed = functional.layer_norm(x.float(), (spec.width,), None, None, spec.eps)
    return (normed * weight + (0.0 if bias is None else bias)).to(x.dtype)


def pack(weight_NK: Tensor) -> Tensor:
    """The weight in oneDNN's own layout where torch has it for the type, else as it came.

    In float32 a product of 32 rows then takes less than half the time (measured on an AVX-512 machine, torch 2.13).
    torch.compile's frozen linears use the same two operations.
    """
    if weight_NK.dtype != torch.float32 or not torch.backends.mkldnn.is_available():
        return weight_NK
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight_NK, PACK_ROWS)
    return packed


def linear(x_TK: Tensor, weight_NK: Tensor, bias_N: Tensor | None) -> Tensor:
    """`weight_NK` plain or packed."""
    if weight_NK.is_mkldnn:
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x_TK, weight_NK, bias_N, "none", [], "")
        return product
    return functional.linear(x_TK, weight_NK, bias_N)


def gated_mlp(gate_up: Tensor, activation: str) -> Tensor:
    """act(gate) × up, where the last dimension holds the gate and then the up projection."""
    gate, up = gate_up.chunk(2, dim=-1)
    return ACTIVATIONS[activation](gate) * up


# ---------------------------------------------------------------- rotary embedding


def rope_frequencies(spec: RopeSpec) -> Tensor:
    """Angle per position of each of the dim / 2 pairs, float32 (arXiv 2104.09864, §3.4.2; scaled as `spec` says)."""
    exponents = torch.arange(0, spec.dim, 2, dtype=torch.int64).float() / spec.dim
    inverse = 1.0 / spec.base**exponents
    scaling = spec.scaling
    if scaling is None:
        return inverse
    if scaling.kind not in ROPE_SCALINGS:
        raise UnsupportedModel(f"rope.scaling: {scaling.kind}, this backend runs {', '.join(sorted(ROPE_SCALINGS))}")
    factor = scaling.numbers["factor"]
    if scaling.kind == "linear":
        return inverse / factor
    # Llama 3.1: long waves are stretched by `factor`, short ones stay, those between are mixed.
    context = scaling.numbers["original_context"]
    low, high = scaling.numbers["low_freq_factor"], scaling.numbers["high_freq_factor"]
    if high == low:  # no waves between
        return torch.where(2 * math.pi / inverse > context / low, inverse / factor, inverse)
    share = ((context * inverse / (2 * math.pi) - low) / (high - low)).clamp(0.0, 1.0)
    return (1 - share) * inverse / factor + share * inverse


def rope_table(spec: RopeSpec, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of every position, (length, dim) each; sin carries the minus sign of each pair's first half."""
    angles = torch.outer(torch.arange(length, dtype=torch.float32), rope_frequencies(spec))
    cos, sin = angles.cos(), angles.sin()
    if spec.interleaved:
        return cos.repeat_interleave(2, dim=-1).to(dtype), torch.stack((-sin, sin), dim=-1).flatten(-2).to(dtype)
    return torch.cat((cos, cos), dim=-1).to(dtype), torch.cat((-sin, sin), dim=-1).to(dtype)


def apply_rope(x_THD: Tensor, cos_TD: Tensor, sin_TD: Tensor, interleaved: bool) -> Tensor:
    """Rotates the first dimensions of each head, as many as the table has; the others pass."""
    dim = cos_TD.shape[-1]
    turned = x_THD[..., :dim]
    if interleaved:
        swapped = turned.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    else:
        swapped = torch.cat((turned[..., dim // 2 :], turned[..., : dim // 2]), dim=-1)
    rotated = turned * cos_TD[:, None] + swapped * sin_TD[:, None]
    return rotated if dim == x_THD.shape[-1] else torch.cat((rotated, x_THD[..., dim:]), dim=-1)


# ---------------------------------------------------------------- attention


def attention(q_NMD: Tensor, k_NLD: Tensor, v_NLD: Tensor, hidden_RML: Tensor, scale: float) -> Tensor:
    """softmax(q kᵀ scale) v -> (N, M, D), in float32 where it counts.

    N = rows × KV heads; `hidden_RML` is True where a row's query does not see a key. Each query's bits depend on its
    visible keys alone if M is a multiple of QUERY_MULTIPLE, N is at least `batch_minimum`, L is a multiple of KEY_CHUNK
    and no hidden key or value is NaN or infinite: hidden keys add exact zeros, and v is met chunk by chunk, for a
    product's order of summing depends on its length.
    """
    N, M, D = q_NMD.shape
    R, _, L = hidden_RML.shape
    scores_NML = torch.bmm(q_NMD, k_NLD.transpose(1, 2)).mul_(scale)
    scores_NML.view(R, -1, M, L).masked_fill_(hidden_RML[:, None], -torch.inf)
    weights_NML = torch.softmax(scores_NML, dim=-1, dtype=torch.float32).to(v_NLD.dtype)
    width = D + -D % VALUE_MULTIPLE
    if width > D:
        v_NLD = functional.pad(v_NLD, (0, width - D))
    chunks = L // KEY_CHUNK
    if chunks == 1:
        return torch.bmm(weights_NML, v_NLD)[..., :D]
    weights = weights_NML.view(N, M, chunks, KEY_CHUNK).transpose(1, 2).reshape(N * chunks, M, KEY_CHUNK)
    partial = torch.bmm(weights, v_NLD.reshape(N * chunks, KEY_CHUNK, width)).view(N, chunks, M, width)
    return partial.sum(1, dtype=torch.float32).to(v_NLD.dtype)[..., :D]
