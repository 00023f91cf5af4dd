"""The native kernels' arithmetic in numpy, operation by operation: what `native/src/isa/linear.h` says it computes.

Products of rows of int8 with codes are written down twice: `linear` in the kernels' order with the kernels' roundings
(equal bit for bit), and `linear_exact` in float64 (the same terms, hardly rounded). What codes and scales a scheme has
is taken from `QTensor.dequantise`, their specification, by asking it for planes whose scales are one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from headrace.weights.qtensor import QTensor
from headrace.weights.scaled import scale_values

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
I64 = NDArray[np.int64]

GROUP = 32
NOTHING = np.float32(2.0**-100)
"""A group of activations whose peak is below it counts as zero."""


def same_bits(found: F32, expected: F32) -> bool:
    """Equal bit for bit, but that any NaN equals any other and zeros have no sign."""
    nan = np.isnan(expected)
    equal = (found == expected) | (nan & np.isnan(found))
    return found.dtype == np.float32 and found.shape == expected.shape and bool(equal.all())


# ---------------------------------------------------------------- float32


def fma(a: F32 | np.float32, b: F32 | np.float32, c: F32 | np.float32, fused: bool = True) -> F32:
    """a × b + c in float32: rounded once, or, where not `fused`, twice."""
    if not fused:
        return np.asarray(a * b + c)
    with np.errstate(all="ignore"):
        product = a.astype(np.float64) * b.astype(np.float64)  # exact
        wide_c = np.asarray(c, np.float64)
        total = product + wide_c
        # What the float64 sum lost decides a tie of the second rounding: it is kept in the last bit (round to odd).
        back = total - product
        lost = (product - (total - back)) + (wide_c - back)
        bits = total.view(np.int64)
        away = (lost > 0) == (total > 0)
        odd = np.where((lost != 0) & (bits % 2 == 0), bits + np.where(away, 1, -1), bits)
        return np.where(np.isfinite(total), odd.view(np.float64), total).astype(np.float32)


# ---------------------------------------------------------------- activations


@dataclass(frozen=True)
class Rows:
    """Rows of activations as int8, group by group: (T, K) codes, (T, K / 32) of the others."""

    codes: NDArray[np.int8]
    scales: F32
    sums: F32
    counts: F32
    halves: F32


def quantise_rows(x_TK: F32) -> Rows:
    """scale = peak / 127, code = x × (127 / peak) to nearest; zero below 2^-100; NaN scales where x is not finite."""
    groups = x_TK.reshape(len(x_TK), -1, GROUP)
    with np.errstate(all="ignore"):
        peak = np.abs(groups).max(-1, initial=0)
        finite = np.isfinite(peak)
        tiny = peak < NOTHING
        inverse = np.where(tiny, np.float32(0), np.float32(127) / peak)
        codes = np.where(finite[..., None], np.rint(groups * inverse[..., None]), np.float32(0))
        scales = np.where(finite, np.where(tiny, np.float32(0), peak / np.float32(127)), np.float32(np.nan))
        counts = codes.sum(-1, dtype=np.float32)  # whole numbers below 2^24: in any order
        halves = codes[..., : GROUP // 2].sum(-1, dtype=np.float32)
        return Rows(codes.astype(np.int8).reshape(x_TK.shape), scales, scales * counts, counts, halves)


# ---------------------------------------------------------------- weights


@dataclass(frozen=True)
class Coded:
    """A weight as a kernel reads it: scale × (code - zero) + minimum.

    codes (N, K), scales (N, K / 32) or, where each half of a group has its own, (N, K / 16), minima (N, K / 32).
    """

    codes: I64
    scales: F32
    minima: F32 | None
    zero: int

    @property
    def halves(self) -> bool:
        return bool(self.scales.shape[1] * GROUP > self.codes.shape[1])


_ZEROS = {"q4_0": 8, "q4_1": 0, "q5_0": 16, "q5_1": 0, "q8_0": 128, "q3_K": 4, "q4_K": 0, "q5_K": 0, "q6_K": 32}
_ONES = {
    # Bytes of `s` that make every scale one and every minimum zero.
    "q4_K": np.array([1, 1, 1, 1, 0, 0, 0, 0, 1, 1, 1, 1], np.uint8),
    "q5_K": np.array([1, 1, 1, 1, 0, 0, 0, 0, 1, 1, 1, 1], np.uint8),
    "q3_K": np.array([0x11] * 8 + [0xAA] * 4, np.uint8),
    "q6_K": np.ones(16, np.int8),
}


def _with(tensor: QTensor, **planes: object) -> F32:
    """The values where these planes hold one value everywhere."""
    changed = {name: np.broadcast_to(np.asarray(value), tensor.planes[name].shape) for name, value in planes.items()}
    changed = {name: value.astype(tensor.planes[name].dtype) for name, value in changed.items()}
    return replace(tensor, planes={**tensor.planes, **changed}).dequantise()


def _block_codes(tensor: QTensor) -> Coded:
    scheme, rows = tensor.scheme, tensor.shape[0]
    zero = _ZEROS[scheme]
    d = tensor.planes["d"].astype(np.float32)
    others = {name: 0 for name in ("m", "dmin") if name in tensor.planes}
    if scheme not in _ONES:
        codes = _with(tensor, d=1, **others).astype(np.int64) + zero
        return Coded(codes, d, tensor.planes["m"].astype(np.float32) if "m" in tensor.planes else None, zero)
    codes = _with(tensor, d=1, s=_ONES[scheme], **others).astype(np.int64) + zero
    # Codes of one above zero show the scales.
    ones = {
        "q4_K": {"q": 0x11},
        "q5_K": {"q": 0x11, "h": 0},
        "q3_K": {"q": 0x55, "h": 255},
        "q6_K": {"q": 0x11, "h": 0xAA},
    }
    run = 32 if zero == 0 else 16
    numbers = _with(tensor, d=1, **others, **ones[scheme]).reshape(rows, -1, run)[..., 0]
    with np.errstate(all="ignore"):
        scales = numbers * np.repeat(d, 256 // run, axis=1)
        minima = None
        if zero == 0:
            least = _with(tensor, d=0, dmin=1).reshape(rows, -1, run)[..., 0]  # already negative
            minima = least * np.repeat(tensor.planes["dmin"].astype(np.float32), 8, axis=1)
    return Coded(codes, scales, minima, zero)


def coded(tensor: QTensor) -> Coded:
    """What a packed tensor's kernel reads. GGUF's blocks, int4 and int8 (groups a multiple of 32)."""
    if tensor.scheme in _ZEROS:
        return _block_codes(tensor)
    shift = 0 if tensor.scheme.startswith("int4") else 128
    ones = {"s": 1, "z": 0} if "z" in tensor.planes else {"s": 1}
    offset = 8 if tensor.scheme == "int4" else shift
    codes = _with(replace(tensor, planes={**tensor.planes, "s": tensor.planes["s"].astype(np.float32)}), **ones)
    scales = scale_values(tensor.planes["s"])
    minima, zero = None, offset
    if "z" in tensor.planes:
        minima, zero = -(tensor.planes["z"].astype(np.float32) + np.float32(shift)) * scales, 0
    times = tensor.group // GROUP
    return Coded(
        codes.astype(np.int64) + offset,
        np.repeat(scales, times, axis=1),
        None if minima is None else np.repeat(minima, times, axis=1),
        zero,
    )


def values_of(weight: Coded) -> F32:
    """(N, K): what the codes mean, each operation rounded to float32."""
    rows, columns = weight.codes.shape
    run = columns // max(1, weight.scales.shape[1])
    with np.errstate(all="ignore"):
        values = (weight.codes - weight.zero).astype(np.float32) * np.repeat(weight.scales, run, axis=1)
        if weight.minima is not None:
            values += np.repeat(weight.minima, GROUP, axis=1)
    return values.reshape(rows, columns)


# ---------------------------------------------------------------- products


def integer_sums(rows: Rows, weight: Coded) -> I64:
    """(K / 16, T, N): the sum of code × code over each half of a group."""
    x = rows.codes.astype(np.int64).reshape(len(rows.codes), -1, 16)
    w = weight.codes.reshape(len(weight.codes), -1, 16)
    sums: I64 = np.einsum("tgk,ngk->gtn", x, w)
    return sums


def linear(rows: Rows, weight: Coded, fused: bool = True) -> F32:
    """x wᵀ, (T, N), as the kernels add it up: group after group, every step rounded to float32."""
    sums = integer_sums(rows, weight)
    total = np.zeros(sums.shape[1:], np.float32)
    minus_zero = np.float32(-weight.zero)
    with np.errstate(all="ignore"):
        for g in range(sums.shape[0] // 2):
            x_scale, count, half = (plane[:, g, None] for plane in (rows.scales, rows.counts, rows.halves))
            if weight.halves:
                for part, number in enumerate((half, count - half)):
                    centred = fma(minus_zero, number, sums[2 * g + part].astype(np.float32), fused)
                    total = fma(centred, weight.scales[:, 2 * g + part] * x_scale, total, fused)
                continue
            group = (sums[2 * g] + sums[2 * g + 1]).astype(np.float32)
            if weight.zero:
                group = fma(minus_zero, count, group, fused)
            total = fma(group, weight.scales[:, g] * x_scale, total, fused)
            if weight.minima is not None:
                total = fma(weight.minima[:, g], rows.sums[:, g, None], total, fused)
    return total


def linear_exact(rows: Rows, weight: Coded) -> tuple[F64, F64]:
    """x wᵀ and the sum of its terms' sizes, (T, N) each, in float64."""
    sums = integer_sums(rows, weight)
    total, size = np.zeros(sums.shape[1:]), np.zeros(sums.shape[1:])
    run = 1 if weight.halves else 2
    counts = np.stack([rows.halves, rows.counts - rows.halves], -1).astype(np.float64)
    scales = weight.scales.astype(np.float64)
    with np.errstate(all="ignore"):
        for g in range(0, sums.shape[0], run):
            number = counts[:, g // 2, g % 2] if run == 1 else counts[:, g // 2].sum(-1)
            centred = sums[g : g + run].sum(0) - weight.zero * number[:, None]
            terms = [scales[:, g // run] * rows.scales[:, g // 2, None] * centred]
            if weight.minima is not None:
                terms.append(weight.minima[:, g // 2].astype(np.float64) * rows.sums[:, g // 2, None])
            total += sum(terms)
            size += sum(abs(term) for term in terms)
    return total, size


def linear_numbers(x_TK: F32, w_NK: F32, fused: bool = True) -> F32:
    """x wᵀ of plain numbers, one fma a column, column after column."""
    total = np.zeros((len(x_TK), len(w_NK)), np.float32)
    with np.errstate(all="ignore"):
        for k in range(x_TK.shape[1]):
            total = fma(x_TK[:, k, None], w_NK[:, k], total, fused)
    return total


def finish(product: F32, bias: F32 | None, y: F32 | None, scale: float, fused: bool = True) -> F32:
    """product + bias, or y + scale × that."""
    with np.errstate(all="ignore"):
        value = product if bias is None else product + bias
        return value if y is None else fma(np.float32(scale), value, y, fused)
