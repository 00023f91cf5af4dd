"""Between the product for q, k and v and attention, in one pass: norms of heads, rotation, and K and V into the cache.

A head's vector is held as pairs, `a` and `b`: the members of those that turn, and whatever else there is in any two
halves. Each element is read and written by one thread, so that q and k can be turned in place.
T: tokens, N: (heads + 2 × KV heads) × D, D: head dim. dim: the part of a head that turns.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from headrace.backends.rope import rope_angles
from headrace.backends.torch.parameters import Norm
from headrace.core.errors import EngineError
from headrace.core.spec import AttentionSpec, RopeSpec

TILE = 1024
"""Elements of a program's heads."""

FLOAT8 = torch.float8_e4m3fn


@dataclass(frozen=True, slots=True, eq=False)
class Rotary:
    """A rotary embedding's angles on the device."""

    cos: Tensor
    """(positions, dim ÷ 2) float32, as `sin`."""
    sin: Tensor
    dim: int
    interleaved: bool


def rotary(spec: RopeSpec, max_model_len: int, device: torch.device | str) -> Rotary:
    """The angles of positions 0 … max_model_len - 1, `backends/rope.py`'s."""
    cos, sin = (torch.from_numpy(one).to(device) for one in rope_angles(spec, max_model_len))
    return Rotary(cos, sin, spec.dim, spec.interleaved)


def can_fuse(spec: AttentionSpec) -> bool:
    """Whether `rope_and_store` carries this out: norms are of one head's width, whole pairs turn, no ALiBi."""
    norms = (one for one in (spec.q_norm, spec.k_norm) if one is not None)
    dim = 0 if spec.rope is None else spec.rope.dim
    return all(one.width == spec.head_dim for one in norms) and dim % 2 == 0 <= dim <= spec.head_dim and not spec.alibi


# ---------------------------------------------------------------- E4M3


@triton.jit
def e4m3_code(x: tl.tensor) -> tl.tensor:
    """float32 within ± 448 -> its E4M3 code (uint8), rounded to nearest, ties to even; what is not finite: NaN.

    In integers: Triton has the type from sm_89 on only, and its interpreter does not round.
    """
    bits = x.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    # 20 of 23 bits of the mantissa go; the exponent's bias falls from 127 to 7.
    code = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)
    # Below 2⁻⁶ codes are multiples of 2⁻⁹, which is the distance of floats at 2¹⁴.
    small = (tl.abs(x) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    code = tl.where(size < 0x3C800000, small, code)
    code = tl.where(size < 0x7F800000, tl.minimum(code, 0x7E), 0x7F)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def _peak(x: tl.tensor) -> tl.tensor:
    """The largest |x| of each row as bits, which are in order; inf and NaN come out on top of all numbers."""
    return tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)


@triton.jit
def _scale_of_peak(peak: tl.tensor) -> tl.tensor:
    """What codes are multiplied with: peak ÷ 448 (E4M3's largest: arXiv 2209.05433, table 1), 1 if all are zero, NaN
    if one is not finite."""
    largest = peak.to(tl.float32, bitcast=True)
    scale = tl.maximum(tl.math.div_rn(largest, 448.0), 1.1754943508222875e-38)  # a smaller one loses its digits
    scale = tl.where(peak == 0, 1.0, scale)
    return tl.where(peak < 0x7F800000, scale, float("nan"))


# ---------------------------------------------------------------- heads


@triton.jit
def _columns(
    pair: tl.tensor, WIDTH: tl.constexpr, DIM: tl.constexpr, INTERLEAVED: tl.constexpr, VECTOR: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Where the members of each pair lie in a head."""
    if INTERLEAVED:
        a = 2 * pair
        b = a + 1
    elif DIM % WIDTH == 0:  # all turn, or none
        a = pair
        b = pair + (WIDTH + 1) // 2
    else:
        a = tl.where(pair < DIM // 2, pair, pair + DIM // 2)
        b = a + tl.where(pair < DIM // 2, DIM // 2, (WIDTH - DIM + 1) // 2)
        # What the compiler cannot see: runs of VECTOR columns, from a multiple of it on.
        a = tl.max_contiguous(tl.multiple_of(a, (1, VECTOR)), (1, VECTOR))
        b = tl.max_contiguous(tl.multiple_of(b, (1, VECTOR)), (1, VECTOR))
    return a, b


@triton.jit
def _load_pairs(
    head: tl.tensor,
    a: tl.tensor,
    b: tl.tensor,
    known: tl.tensor,
    WIDTH: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HALF: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Elements at columns `a` and `b` in float32; zeros past the head's end and for heads that are none."""
    if INTERLEAVED:
        column = tl.arange(0, 2 * HALF)[None, :]
        both = tl.load(head + column, mask=known & (column < WIDTH), other=0.0)
        x, y = tl.split(tl.reshape(both, (both.shape[0], HALF, 2)))
    else:
        # (WIDTH + 1) // 2 of the columns are a's.
        x = tl.load(head + a, mask=known & (tl.arange(0, HALF)[None, :] < (WIDTH + 1) // 2), other=0.0)
        y = tl.load(head + b, mask=known & (b < WIDTH), other=0.0)
    return x.to(tl.float32), y.to(tl.float32)


@triton.jit
def _store_pairs(
    head: tl.tensor,
    a: tl.tensor,
    b: tl.tensor,
    x: tl.tensor,
    y: tl.tensor,
    scale: tl.tensor,
    known: tl.tensor,
    WIDTH: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HALF: tl.constexpr,
) -> None:
    """x and y to columns `a` and `b`, in the type of what is there, or as E4M3 codes of `scale`."""
    if scale is not None:
        x, y = e4m3_code(tl.math.div_rn(x, scale)), e4m3_code(tl.math.div_rn(y, scale))
    else:
        x, y = x.to(head.dtype.element_ty), y.to(head.dtype.element_ty)
    if INTERLEAVED:
        column = tl.arange(0, 2 * HALF)[None, :]
        both = tl.reshape(tl.join(x, y), (x.shape[0], 2 * HALF))
        tl.store(head + column, both, mask=known & (column < WIDTH))
    else:
        tl.store(head + a, x, mask=known & (tl.arange(0, HALF)[None, :] < (WIDTH + 1) // 2))
        tl.store(head + b, y, mask=known & (b < WIDTH))


@triton.jit
def _affine(
    x: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    column: tl.tensor,
    dtype: tl.constexpr,
    WIDTH: tl.constexpr,
    ROUND_FIRST: tl.constexpr,
) -> tl.tensor:
    """The end of a norm, with the roundings of `ops.norm`."""
    if ROUND_FIRST:
        x = x.to(dtype).to(tl.float32)
    x *= tl.load(weight + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    if bias is not None:
        x += tl.load(bias + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    return x.to(dtype).to(tl.float32)


@triton.jit
def _head_norm(
    x: tl.tensor,
    y: tl.tensor,
    a: tl.tensor,
    b: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    eps: tl.tensor,
    dtype: tl.constexpr,
    WIDTH: tl.constexpr,
    HALF: tl.constexpr,
    LAYER: tl.constexpr,
    ROUND_FIRST: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """`ops.norm` of each head, rounded to the type. Elements outside are zero before and after."""
    if LAYER:
        mean = tl.sum(x + y, axis=1, keep_dims=True) / WIDTH
        x = tl.where(tl.arange(0, HALF)[None, :] < (WIDTH + 1) // 2, x - mean, 0.0)
        y = tl.where(b < WIDTH, y - mean, 0.0)
    deviation = tl.math.rsqrt(tl.sum(x * x + y * y, axis=1, keep_dims=True) / WIDTH + eps)
    x = _affine(x * deviation, weight, bias, a, dtype, WIDTH, ROUND_FIRST)
    return x, _affine(y * deviation, weight, bias, b, dtype, WIDTH, ROUND_FIRST)


@triton.jit
def _heads(
    qkv: tl.tensor,
    first: tl.tensor,
    cache: tl.tensor,
    scales: tl.tensor,
    place: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    turn: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    eps: tl.tensor,
    COUNT: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    LAYER: tl.constexpr,
    ROUND_FIRST: tl.constexpr,
    HALF: tl.constexpr,
    VECTOR: tl.constexpr,
) -> None:
    """Heads [first, first + HEADS) of COUNT: norm if there is a weight, rotation, and the cache if there is one.

    qkv: head 0 of the token; place: the token's in head 0 of its block; turn: its position's in cos and sin.
    """
    dtype: tl.constexpr = qkv.dtype.element_ty
    head = first + tl.arange(0, HEADS)[:, None]
    known = head < COUNT
    pair = tl.arange(0, HALF)[None, :]
    a, b = _columns(pair, WIDTH, DIM, INTERLEAVED, VECTOR)
    x, y = _load_pairs(qkv + head * WIDTH, a, b, known, WIDTH, INTERLEAVED, HALF)
    if DIM > 0:  # read before the norm's sums, so that they are on their way meanwhile
        cosine = tl.load(cos + turn + pair, mask=pair < DIM // 2, other=0.0)
        sine = tl.load(sin + turn + pair, mask=pair < DIM // 2, other=0.0)
    if weight is not None:
        x, y = _head_norm(x, y, a, b, weight, bias, eps, dtype, WIDTH, HALF, LAYER, ROUND_FIRST)
    if DIM > 0:
        turned_x, turned_y = x * cosine - y * sine, y * cosine + x * sine
        if DIM < WIDTH:
            turned_x, turned_y = tl.where(pair < DIM // 2, turned_x, x), tl.where(pair < DIM // 2, turned_y, y)
        x, y = turned_x.to(dtype).to(tl.float32), turned_y.to(dtype).to(tl.float32)
    if DIM > 0 or weight is not None:
        _store_pairs(qkv + head * WIDTH, a, b, x, y, None, known, WIDTH, INTERLEAVED, HALF)
    if cache is not None:
        place += head * BLOCK_SIZE
        scale = None
        if scales is not None:
            scale = _scale_of_peak(tl.maximum(_peak(x), _peak(y)))[:, None]
            tl.store(scales + place, scale, mask=known)
        _store_pairs(cache + place * WIDTH, a, b, x, y, scale, known, WIDTH, INTERLEAVED, HALF)


@triton.jit
def _rope_kernel(
    qkv: tl.tensor,
    positions: tl.tensor,
    slots: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    q_weight: tl.tensor,
    q_bias: tl.tensor,
    k_weight: tl.tensor,
    k_bias: tl.tensor,
    k_cache: tl.tensor,
    v_cache: tl.tensor,
    k_scales: tl.tensor,
    v_scales: tl.tensor,
    qkv_stride: tl.tensor,
    q_eps: tl.tensor,
    k_eps: tl.tensor,
    Q_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    Q_LAYER: tl.constexpr,
    Q_ROUND_FIRST: tl.constexpr,
    K_LAYER: tl.constexpr,
    K_ROUND_FIRST: tl.constexpr,
    HALF: tl.constexpr,
    VECTOR: tl.constexpr,
) -> None:
    """A program a token and HEADS heads, all of q, of k or of v."""
    token = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    q_tiles: tl.constexpr = (Q_HEADS + HEADS - 1) // HEADS
    kv_tiles: tl.constexpr = (KV_HEADS + HEADS - 1) // HEADS
    slot = tl.load(slots + token).to(tl.int64)
    if slot >= 0:
        row = qkv + token * qkv_stride
        place = slot // BLOCK_SIZE * (KV_HEADS * BLOCK_SIZE) + slot % BLOCK_SIZE
        turn = 0
        if DIM > 0:
            turn = tl.load(positions + token).to(tl.int64) * (DIM // 2)
        if tile < q_tiles:
            if DIM > 0 or q_weight is not None:
                _heads(
                    row, tile * HEADS, None, None, place, cos, sin, turn, q_weight, q_bias, q_eps,
                    Q_HEADS, HEADS, BLOCK_SIZE, WIDTH, DIM, INTERLEAVED, Q_LAYER, Q_ROUND_FIRST, HALF, VECTOR,
                )  # fmt: skip
        elif tile < q_tiles + kv_tiles:
            _heads(
                row + Q_HEADS * WIDTH, (tile - q_tiles) * HEADS, k_cache, k_scales, place, cos, sin, turn, k_weight,
                k_bias, k_eps, KV_HEADS, HEADS, BLOCK_SIZE, WIDTH, DIM, INTERLEAVED, K_LAYER, K_ROUND_FIRST,
                HALF, VECTOR,
            )  # fmt: skip
        else:
            _heads(
                row + (Q_HEADS + KV_HEADS) * WIDTH, (tile - q_tiles - kv_tiles) * HEADS, v_cache, v_scales, place,
                None, None, 0, None, None, 0.0, KV_HEADS, HEADS, BLOCK_SIZE, WIDTH, 0, False, False, False, HALF, 1,
            )  # fmt: skip


def rope_and_store(
    qkv_TN: Tensor,
    positions_T: Tensor,
    slots_T: Tensor,
    rotary: Rotary | None,
    spec: AttentionSpec,
    q_norm: Norm | None,
    k_norm: Norm | None,
    k_cache: Tensor,
    v_cache: Tensor,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> None:
    """q and k of each token: norm, rotation, in place in qkv_TN; then k and v into the cache at the token's slot.

    qkv_TN: (T, N), rows may lie apart. positions_T, slots_T: int32; slot = block × block size + offset, -1: a row of
    padding, of which nothing is read or written. Caches (blocks, KV heads, block size, D), contiguous, of qkv's type,
    or float8_e4m3fn with scales (blocks, KV heads, block size) float32: a head's vector is code × scale, scale its
    largest |x| ÷ 448 (1 for zeros), and all NaN where one element is not finite.

    Rounded to the type where `ops.norm` does, and once after the rotation: cos, sin and products are float32, where
    `apply_rope` rounds each to the type. Raises EngineError where `can_fuse` says no, and for another shape.
    """
    _, kv_heads, block_size, width = k_cache.shape
    tokens, stride = qkv_TN.shape[0], qkv_TN.stride(0)
    _check(qkv_TN, positions_T, slots_T, rotary, spec, (k_cache, v_cache), (k_scales, v_scales))
    if not tokens:
        return
    half = triton.next_power_of_2(max(1, (width + 1) // 2))
    heads = max(1, min(TILE // (2 * half), triton.next_power_of_2(spec.heads)))
    tiles = triton.cdiv(spec.heads, heads) + 2 * triton.cdiv(kv_heads, heads)
    dim = 0 if rotary is None else rotary.dim
    turns = (None, None) if rotary is None else (rotary.cos, rotary.sin)
    codes = [one.view(torch.uint8) if one.dtype == FLOAT8 else one for one in (k_cache, v_cache)]
    (*q, q_eps), q_kind = _norm_arguments(q_norm)
    (*k, k_eps), k_kind = _norm_arguments(k_norm)
    sizes = (spec.heads, kv_heads, heads, block_size, width, dim, rotary is not None and rotary.interleaved)
    vector = math.gcd(dim // 2, (width - dim + 1) // 2, 8)
    _rope_kernel[(tokens, tiles)](
        qkv_TN, positions_T, slots_T, *turns, *q, *k, *codes, k_scales, v_scales,
        stride, q_eps, k_eps, *sizes, *q_kind, *k_kind, half, vector, num_warps=max(1, heads * half // 256),
    )  # fmt: skip


def _norm_arguments(norm: Norm | None) -> tuple[tuple[Tensor | None, Tensor | None, float], tuple[bool, bool]]:
    """Weight, bias and eps; whether it is a LayerNorm, and whether it rounds before it multiplies."""
    if norm is None:
        return (None, None, 0.0), (False, False)
    layer = norm.spec.kind == "layer"
    return (norm.weight, norm.bias if layer else None, norm.spec.eps), (layer, not layer and not norm.spec.unit_offset)


def _check(
    qkv: Tensor,
    positions: Tensor,
    slots: Tensor,
    rotary: Rotary | None,
    spec: AttentionSpec,
    caches: tuple[Tensor, Tensor],
    scales: tuple[Tensor | None, Tensor | None],
) -> None:
    if not can_fuse(spec):
        raise EngineError(f"rope_and_store does not carry out {spec}")
    if (rotary is None) != (spec.rope is None):
        raise EngineError("rope_and_store: a rotary embedding where the layer has one, and only there")
    tokens, width = qkv.shape
    if positions.shape != (tokens,) or slots.shape != (tokens,) or qkv.stride(1) != 1:
        raise EngineError(f"rope_and_store: {tuple(qkv.shape)} qkv, {len(positions)} positions, {len(slots)} slots")
    if width != (spec.heads + 2 * spec.kv_heads) * spec.head_dim:
        raise EngineError(f"rope_and_store: qkv of {width} columns for {spec.heads} and 2 × {spec.kv_heads} heads")
    for cache, scale in zip(caches, scales, strict=True):
        fits = cache.shape == caches[0].shape and cache.shape[1::2] == (spec.kv_heads, spec.head_dim)
        if not fits or not cache.is_contiguous():
            raise EngineError(f"rope_and_store: cache {tuple(cache.shape)}, strides {cache.stride()}, not the layer's")
        if cache.dtype != (qkv.dtype if scale is None else FLOAT8):
            raise EngineError(f"rope_and_store: {cache.dtype} cache, {qkv.dtype} values, scales {scale is not None}")
        if scale is not None and scale.shape != cache.shape[:3]:
            raise EngineError(f"rope_and_store: scales {tuple(scale.shape)} of a cache {tuple(cache.shape)}")
