"""Every operation of the decoder in plain torch, and nothing else: read this file to know what is computed.
(What only images go through is in `vision/`, but for `full_attention`.)

Batch invariance: a row's bits depend on that row alone. Reductions (norms, softmax) work row by row. A matrix product
picks its kernel by its shape: `row_multiple` says how many rows it must be given, and whoever calls `linear` pads.
Elementwise operations that are not rounded exactly go through `activate`.
T: tokens, H: heads, N: batch of a product, M: query rows, L: keys, D: head dim, C: keys of a chunk, E: experts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional

from headrace.core.spec import NormSpec

KEY_CHUNK = 64
"""Keys in one product of probabilities and values; contexts are padded to a multiple of it."""

PACK_ROWS = 32
"""Rows of x that a packed weight is laid out for."""

QUERY_MULTIPLE = 4
"""Query rows of attention are padded to a multiple of it."""

THREAD_SHARE = 32768
"""torch gives each thread at least so many elements of most elementwise operations (its GRAIN_SIZE)."""

LANES = 64
"""Elements that a vector kernel of torch takes at a time, at most: two registers of 512 bits, two bytes an element."""

VALUE_MULTIPLE = 8
"""Columns of values are padded to a multiple of it: with heads of 6 or 10 a row's bits showed its place."""


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


def scale(x: Tensor, factor: float) -> Tensor:
    """x × factor in place, the factor rounded to x's type first: in bfloat16 Gemma's √3072 is 55.5."""
    return x.mul_(torch.tensor(factor, dtype=x.dtype))


def norm(x: Tensor, weight: Tensor, bias: Tensor | None, spec: NormSpec) -> Tensor:
    """RMSNorm (arXiv 1910.07467) or LayerNorm over the last dimension; the statistics are float32.

    Where the spec has a unit offset, `weight` is float32 and holds 1 + the checkpoint's, and nothing is rounded before
    it has been multiplied.
    """
    if spec.kind == "rms":
        normed = functional.rms_norm(x.float(), (spec.width,), None, spec.eps)
        return (normed * weight).to(x.dtype) if spec.unit_offset else normed.to(x.dtype) * weight
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


def silu(x_TN: Tensor) -> Tensor:
    """torch's own, cut so that each thread's share begins with a row; see `activate`."""
    rows, width = x_TN.shape
    threads = min(torch.get_num_threads(), -(-rows * width // THREAD_SHARE))
    if rows % threads == 0:
        return functional.silu(x_TN)
    return torch.cat([functional.silu(part) for part in x_TN.split(THREAD_SHARE // width)])


ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "silu": silu,
    "gelu": functional.gelu,  # shares evenly among all threads, and rows are a multiple of these
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": functional.relu,
}


def activate(x_TN: Tensor, activation: str) -> Tensor:
    """The activation of a product's rows, whose number is a multiple of `row_multiple`.

    torch computes what is left over at the end of a thread's share, or of a row where rows lie apart, with another
    formula than whole vectors (silu and gelu then differ in the last bit). So each share must begin with a row, and
    rows that lie together must be whole vectors.
    """
    width = x_TN.shape[1]
    if x_TN.is_contiguous() and width % LANES:
        return ACTIVATIONS[activation](functional.pad(x_TN, (0, -width % LANES)))[:, :width]
    return ACTIVATIONS[activation](x_TN)


def gated(gate_up: Tensor, activation: str) -> Tensor:
    """act(gate) × up, where the last dimension holds the gate and then the up projection."""
    gate, up = gate_up.chunk(2, dim=-1)
    return activate(gate, activation) * up


def route(scores_TE: Tensor, count: int, normalise: bool) -> tuple[Tensor, Tensor]:
    """Each token's `count` likeliest experts, and what their answers are multiplied with (sum 1 if `normalise`)."""
    weights, experts = torch.softmax(scores_TE, dim=-1, dtype=torch.float32).topk(count, dim=-1)
    if normalise:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return weights, experts


def softcap(x: Tensor, cap: float) -> Tensor:
    """cap × tanh(x / cap), in float32."""
    return x.float().div(cap).tanh_().mul_(cap)


# ---------------------------------------------------------------- attention


def attention(
    q_NMD: Tensor, k_NLD: Tensor, v_NLD: Tensor, hidden_RML: Tensor, scale: float, cap: float | None = None
) -> Tensor:
    """softmax(q kᵀ scale) v -> (N, M, D), in float32 where it counts; `cap`: of the scores (Gemma 2).

    N = rows × KV heads; `hidden_RML` is True where a row's query does not see a key. Each query's bits depend on its
    visible keys alone if M is a multiple of QUERY_MULTIPLE, N is at least `batch_minimum`, L is a multiple of KEY_CHUNK
    and no hidden key or value is NaN or infinite: hidden keys add exact zeros, and v is met chunk by chunk, for a
    product's order of summing depends on its length.
    """
    N, M, D = q_NMD.shape
    R, _, L = hidden_RML.shape
    scores_NML = torch.bmm(q_NMD, k_NLD.transpose(1, 2)).mul_(scale)
    if cap is not None:
        scores_NML = softcap(scores_NML, cap)
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


def full_attention(q_SHD: Tensor, k_SHD: Tensor, v_SHD: Tensor) -> Tensor:
    """softmax(q kᵀ ÷ √D) v -> (S, H, D): every query sees every key. torch's own, which holds no matrix of scores.

    The bits are those of this S, H and D; nothing is promised between different ones.
    """
    q, k, v = (x.transpose(0, 1).contiguous()[None] for x in (q_SHD, k_SHD, v_SHD))
    return functional.scaled_dot_product_attention(q, k, v)[0].transpose(0, 1)
