"""What the native attention kernels compute, in float64, and a KV cache in numpy laid out as theirs.

T: tokens, H: query heads, G: KV heads, D: head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from headrace.backends.native import _kernels as kernels

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
KvType = Literal["f32", "bf16", "i8"]
ELEMENT: dict[str, Any] = {"f32": np.float32, "bf16": np.uint16, "i8": np.int8}
TINIEST = np.float32(2.0**-126)
NO_ANGLES = np.zeros((1, 0), np.float32)


def padded(n: int) -> int:
    return -(-n // 16) * 16


# ---------------------------------------------------------------- bits, rounding


def same_bits(a: F32, b: F32) -> bool:
    """A NaN equals any other."""
    a, b = (np.where(np.isnan(x), np.float32(np.nan), x) for x in (a, b))
    return bool((a.view(np.uint32) == b.view(np.uint32)).all())


def to_bf16(x: F32) -> NDArray[np.uint16]:
    """To the nearest, ties to even; NaN stays NaN."""
    bits = x.view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(x), bits >> 16 | 0x40, rounded).astype(np.uint16)


def from_bf16(bits: NDArray[np.uint16]) -> F32:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_i8(x_ND: F32) -> tuple[NDArray[np.int8], F32]:
    """Codes and, a row, the scale: largest |x| / 127; NaN where a number is not finite, 0 where that is not normal."""
    finite = np.isfinite(x_ND).all(-1)
    clean_ND = np.where(finite[:, None], x_ND, np.float32(0))
    scale = np.abs(clean_ND).max(-1) / np.float32(127)
    scale = np.where(scale < TINIEST, np.float32(0), scale)
    codes_ND = np.rint(clean_ND / np.where(scale == 0, np.float32(1), scale)[:, None])
    codes_ND = np.where((scale == 0)[:, None], 0, codes_ND)
    return codes_ND.astype(np.int8), np.where(finite, scale, np.float32(np.nan))


# ---------------------------------------------------------------- the cache


@dataclass(eq=False)
class Cache:
    """Full of NaN (int8: of scales that are NaN) wherever nothing has been stored."""

    type: KvType
    kv_heads: int
    head_dim: int
    block_size: int
    num_blocks: int
    keys: NDArray[np.uint8] = field(init=False)
    values: NDArray[np.uint8] = field(init=False)
    key_scales: F32 = field(init=False)
    value_scales: F32 = field(init=False)

    def __post_init__(self) -> None:
        element = np.dtype(ELEMENT[self.type]).itemsize
        runs = self.num_blocks * self.kv_heads * padded(self.block_size)
        self.keys = np.full(runs * self.head_dim * element, 255, np.uint8)
        self.values = np.full(runs * padded(self.head_dim) * element, 255, np.uint8)
        scales = runs if self.type == "i8" else 0
        self.key_scales, self.value_scales = np.full((2, scales), np.nan, np.float32)

    @property
    def native(self) -> kernels.KvArrays:
        sizes = (self.kv_heads, self.head_dim, self.block_size, self.num_blocks)
        return kernels.KvArrays(self.type, *sizes, self.keys, self.values, self.key_scales, self.value_scales)

    def stored(self, slot: int) -> tuple[NDArray[Any], NDArray[Any], F32, F32]:
        """Keys (G, D), values (G, padded D) as they are stored, and their scales (G,)."""
        block, offset = divmod(slot, self.block_size)
        runs = (self.num_blocks, self.kv_heads)
        length, element = padded(self.block_size), ELEMENT[self.type]
        keys = self.keys.view(element).reshape(*runs, self.head_dim, length)[block, :, :, offset]
        values = self.values.view(element).reshape(*runs, length, padded(self.head_dim))[block, :, offset]
        if self.type != "i8":
            ones = np.ones(self.kv_heads, np.float32)
            return keys, values, ones, ones
        scales = [scale.reshape(*runs, length)[block, :, offset] for scale in (self.key_scales, self.value_scales)]
        return keys, values, scales[0], scales[1]

    def read(self, slot: int) -> tuple[F64, F64]:
        """Key and value (G, D) of a token, as numbers."""
        keys, values, key_scales, value_scales = self.stored(slot)
        if self.type == "bf16":
            keys, values = from_bf16(keys), from_bf16(values)
        numbers = (
            part[:, : self.head_dim].astype(np.float64) * scale[:, None]
            for part, scale in ((keys, key_scales), (values, value_scales))
        )
        key, value = numbers
        return key, value

    def write(self, isa: str, slots_T: Sequence[int], k_TGD: F32, v_TGD: F32) -> None:
        """Stores keys and values as they are: no norm, no rotation."""
        tokens = len(slots_T)
        kernels.rotate_and_store(
            isa, self.native, np.zeros((tokens, 0), np.float32), k_TGD.reshape(tokens, -1).copy(),
            v_TGD.reshape(tokens, -1).copy(), 0, None, None, NO_ANGLES, NO_ANGLES, False,
            np.zeros(tokens, np.int32), np.array(slots_T, np.int64),
        )  # fmt: skip


@dataclass(frozen=True)
class Norm:
    weight: F32
    bias: F32 | None
    eps: float
    layer: bool

    @property
    def native(self) -> tuple[F32, F32 | None, float, bool]:
        return self.weight, self.bias, self.eps, self.layer


# ---------------------------------------------------------------- float64


def normed(x_THD: F32 | F64, norm: Norm | None) -> F64:
    """RMSNorm (arXiv 1910.07467) or LayerNorm (arXiv 1607.06450) of each head."""
    x = x_THD.astype(np.float64)
    if norm is None:
        return x
    if norm.layer:
        x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + norm.eps) * norm.weight
    return x if norm.bias is None else x + norm.bias


def rotated(x_THD: F64, cos_TP: F32, sin_TP: F32, interleaved: bool) -> F64:
    """Rotary embedding (arXiv 2104.09864) of the first 2 P dimensions."""
    pairs = cos_TP.shape[1]
    firsts = np.arange(pairs) * (2 if interleaved else 1)
    seconds = firsts + (1 if interleaved else pairs)
    a, b = x_THD[..., firsts], x_THD[..., seconds]
    cos, sin = cos_TP[:, None].astype(np.float64), sin_TP[:, None].astype(np.float64)
    out = x_THD.copy()
    out[..., firsts], out[..., seconds] = a * cos - b * sin, b * cos + a * sin
    return out


def attention(q_HD: F32, keys_LGD: F64, values_LGD: F64, scale: float, softcap: float) -> F64:
    """One token's queries and all that they see -> (H, D)."""
    per_head = len(q_HD) // keys_LGD.shape[1]
    q_GMD = q_HD.astype(np.float64).reshape(keys_LGD.shape[1], per_head, -1)
    scores_GML = np.einsum("gmd,lgd->gml", q_GMD, keys_LGD) * scale
    if softcap:
        scores_GML = softcap * np.tanh(scores_GML / softcap)
    weights_GML = np.exp(scores_GML - scores_GML.max(-1, keepdims=True))
    weights_GML /= weights_GML.sum(-1, keepdims=True)
    return np.einsum("gml,lgd->gmd", weights_GML, values_LGD).reshape(q_HD.shape)
