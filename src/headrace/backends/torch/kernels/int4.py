"""y = x Wᵀ + bias where W is codes of 4 bits with a scale for each group of columns.

What a weight is (codes q from 0 to 15; T is the type of the scales, X that of x):

    zero      (q - z) · s, rounded to T, as `weights/scaled.py` has it; then to X, which changes nothing where X is T
    minimum   q · d + m, as GGUF has it, rounded to X
    super     the same, where d = D · a and m = -(E · b) of a block of 256 columns with D and E, and a and b for each 32

That is `QTensor.dequantise` rounded to X; q · d + m is one fma, of float32 or of X, where `dequantise` rounds it to
float32 first, and m - 16 d, which may take its part in it, may have been rounded to float32.

Where such weights would have to be made in float32 and at most 8 rows of x are there to use them, the scales come after
the sum (`Int4Config.factor`): codes are exact in X, so the weights are not rounded at all, for half the instructions.

Order of the columns in memory: UNIT columns of a row are 32 words of 16 bits; the p-th nibble of word j, from the low
end, is column 32 p + j. So a nibble's plane is 32 columns that lie together, which a product meets as they are, and
groups are whole planes. Words of one unit lie row after row, so that a tile is one run of memory.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch
import triton
import triton.language as tl
from torch import Tensor

from headrace.backends.torch.kernels.matmul import Card

UNIT = 128
PLANE = 32
SUPER = 256
MOST_SPLITS = 16
LEAST_UNITS = 4
"""Of a part of K."""


@triton.constexpr_function
def _both(bits: int) -> str:
    """16 bits in both halves of a register."""
    return f"{bits * 65537:#010x}"


_UNIT = tl.constexpr(UNIT)
_PLANE = tl.constexpr(PLANE)
_UNITS_OF_SUPER = tl.constexpr(SUPER // UNIT)


@dataclass(frozen=True, slots=True, eq=False)
class Int4Planes:
    """A weight on its device.

    codes    (⌈K / UNIT⌉, N, 32) int16.
    words    (groups, N) int32: the scale in the low half, z (a number) or m in the high one; (groups, N, 2) int32
             where T is float32. super: (⌈K / SUPER⌉, N), D and E.
    six      super alone: (⌈K / 64⌉, N) int32, of two planes: a, b, a, b from the lowest byte up.
    tickets  zeros, of `new_counters`. Products that share them must follow one another, as those of one stream do.
    """

    codes: Tensor
    words: Tensor
    six: Tensor | None
    tickets: Tensor
    form: str
    group: int
    scale_type: torch.dtype
    columns: int

    @property
    def rows(self) -> int:
        return self.codes.shape[1]


@dataclass(frozen=True, slots=True)
class Int4Config:
    """How a product is cut: tiles of block_n weights' rows and block_m rows of x, K in `splits` parts."""

    block_m: int
    block_n: int
    splits: int
    warps: int
    stages: int
    factor: bool = False
    """Scales after the sums, where weights would otherwise be made in float32."""
    spread: bool = True
    """Parts in programs of their own; else one after another in one program: the same bits."""


def int4_config(num_rows: int, rows: int, columns: int, card: Card, batch_invariant: bool = False) -> Int4Config:
    """For x of `num_rows` rows and a weight (rows, columns).

    `batch_invariant`: one tile and one order of summing for every number of rows, so that a row's bits do not depend on
    it. The parts of K are those of one row; they are spread while there are few tiles, for each costs a copy of y.
    """
    if batch_invariant:
        cut = Int4Config(block_m=64, block_n=64, splits=1, warps=4, stages=4)
        splits = _splits(cut, 1, rows, columns, card)
        tiles = triton.cdiv(rows, cut.block_n) * triton.cdiv(num_rows, cut.block_m)
        return replace(cut, splits=splits, spread=splits == 1 or tiles * splits <= 8 * card.multiprocessors)
    if num_rows <= 16:
        few = num_rows <= 8
        cut = Int4Config(block_m=8 if few else 16, block_n=128, splits=1, warps=4, stages=4, factor=few)
    elif num_rows <= 64:
        cut = Int4Config(block_m=32 if num_rows <= 32 else 64, block_n=128, splits=1, warps=4, stages=4)
    elif num_rows <= 256 or card.capability < (9, 0):
        cut = Int4Config(block_m=128, block_n=128, splits=1, warps=8, stages=3)
    else:
        cut = Int4Config(block_m=256, block_n=128, splits=1, warps=8, stages=3)
    return replace(cut, splits=_splits(cut, num_rows, rows, columns, card))


def _splits(cut: Int4Config, num_rows: int, rows: int, columns: int, card: Card) -> int:
    """Enough parts for every multiprocessor to have its share of programs: four of 4 warps, one of 8."""
    wanted = card.multiprocessors * (4 if cut.warps == 4 else 1)
    tiles = triton.cdiv(rows, cut.block_n) * triton.cdiv(num_rows, cut.block_m)
    most = min(MOST_SPLITS, triton.cdiv(columns, UNIT) // LEAST_UNITS)
    splits = 1
    while 2 * splits <= most and 2 * splits * tiles <= wanted * 3 // 2:
        splits *= 2
    return splits


@triton.constexpr_function
def _digits(dtype: tl.dtype) -> int:
    """A number whose lowest bits are free for q: `_offset` + q, whatever q from 0 to 15."""
    return 0x4B000000 if dtype == tl.float32 else 0x6400 if dtype == tl.float16 else 0x4300


@triton.constexpr_function
def _offset(dtype: tl.dtype) -> float:
    return 2.0**23 if dtype == tl.float32 else 2.0**10 if dtype == tl.float16 else 2.0**7


@triton.constexpr_function
def _digits_ptx(part: int, dtype: tl.dtype) -> str:
    """t: the digits of two codes, $1. c, e: for what follows. Differences will be products with -1 or 1 and an
    addition, for sm_80 has no others of bfloat16."""
    digits = _both(_digits(dtype))
    return f"{{ .reg .b32 t, c, e; shr.u32 t, $1, {4 * part}; lop3.b32 t, t, 0x000F000F, {digits}, 0xEA;"


@triton.constexpr_function
def _numbers_ptx(part: int, dtype: tl.dtype, result: str = "$0", last: str = " }") -> str:
    name, one, less = ("bf16", 0x3F80, 0xC300) if dtype == tl.bfloat16 else ("f16", 0x3C00, 0xE400)
    asm = f"{_digits_ptx(part, dtype)} mov.b32 c, {_both(one)}; mov.b32 e, {_both(less)};"
    return f"{asm} fma.rn.{name}x2 {result}, t, c, e;{last}"


@triton.constexpr_function
def _exact_ptx(form: str, part: int, dtype: tl.dtype) -> str:
    """$2: scales, $3: z, with the digits, or m. Adding -0 changes no bit."""
    name, less_one = ("bf16", 0xBF80) if dtype == tl.bfloat16 else ("f16", 0xBC00)
    asm: str
    if form == "zero":
        asm = f"{_digits_ptx(part, dtype)} mov.b32 c, {_both(less_one)}; mov.b32 e, {_both(0x8000)};"
        return f"{asm} fma.rn.{name}x2 t, $3, c, t; fma.rn.{name}x2 $0, t, $2, e; }}"
    asm = _numbers_ptx(part, dtype, "t", f" fma.rn.{name}x2 $0, t, $2, $3; }}")
    return asm


@triton.constexpr_function
def _float_ptx(part: int, dtype: tl.dtype) -> str:
    """$1: two codes, $2 and $3: 16 d of each, $4 and $5: m - 16 d of each."""
    name = "bf16x2" if dtype == tl.bfloat16 else "f16x2"
    asm = "{ .reg .b32 t, u; .reg .f32 a, b;"
    for register, place in (("t", 4 * part), ("u", 16 + 4 * part)):
        shift = 19 - place
        asm += f" {'shl.b32' if shift > 0 else 'shr.u32'} {register}, $1, {abs(shift)};"
        asm += f" lop3.b32 {register}, {register}, 0x00780000, 0x3F800000, 0xEA;"
    asm += " mov.b32 a, t; mov.b32 b, u; fma.rn.f32 a, a, $2, $4; fma.rn.f32 b, b, $3, $5;"
    return asm + f" cvt.rn.{name}.f32 $0, b, a; }}"


@triton.jit
def _half(bits: tl.tensor, scale_type: tl.constexpr) -> tl.tensor:
    """The low 16 bits of int32, a float of `scale_type`, as float32. bfloat16 is the upper half of a float32."""
    if scale_type == tl.bfloat16:
        value = (bits << 16).to(tl.float32, bitcast=True)
    else:
        value = bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return value


@triton.jit
def _high(word: tl.tensor) -> tl.tensor:
    return (word >> 16) & 0xFFFF


@triton.jit
def _super_scales(word: tl.tensor, six: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """(BLOCK_N,) float32 each: d and m of a plane, from D and E and from a and b in the lowest bytes."""
    scale = _half(word, tl.float16) * (six & 0xFF).to(tl.float32)
    return scale, -(_half(_high(word), tl.float16) * ((six >> 8) & 0xFF).to(tl.float32))


@triton.jit
def _scales(
    words: tl.tensor, place: tl.tensor, n: tl.tensor, FORM: tl.constexpr, scale_type: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """(BLOCK_N,) float32 each: the scale, and z or m, of the group whose words begin at `place`."""
    if scale_type == tl.float32:
        scale = tl.load(words + (place + n) * 2).to(tl.float32, bitcast=True)
        high = tl.load(words + (place + n) * 2 + 1)
        second = high.to(tl.float32) if FORM == "zero" else high.to(tl.float32, bitcast=True)
    else:
        word = tl.load(words + place + n)
        scale = _half(word, scale_type)
        second = _high(word).to(tl.float32) if FORM == "zero" else _half(_high(word), scale_type)
    return scale, second


@triton.jit
def _exact_scales(
    words: tl.tensor, place: tl.tensor, n: tl.tensor, FORM: tl.constexpr, X: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """(BLOCK_N,) of X each: the scale, and m, or z as `_digits` has numbers. X is the type of the scales."""
    word = tl.load(words + place + n)
    high = _high(word) | _digits(X) if FORM == "zero" else _high(word)
    return word.to(tl.int16).to(X, bitcast=True), high.to(tl.int16).to(X, bitcast=True)


@triton.jit
def _numbers(codes: tl.tensor, part: tl.constexpr, X: tl.constexpr, ASM: tl.constexpr) -> tl.tensor:
    """Nibble `part` of each code, in X."""
    if ASM:
        q = tl.inline_asm_elementwise(_numbers_ptx(part, X), "=r,r", [codes], dtype=X.value, is_pure=True, pack=2)
    else:
        digits = (((codes >> (4 * part)) & 15) | _digits(X)).to(X, bitcast=True)
        q = digits - tl.full(codes.shape, _offset(X), X)
    return q


@triton.jit
def _exact_weights(
    codes: tl.tensor, part: tl.constexpr, scale: tl.tensor, second: tl.tensor, FORM: tl.constexpr, X: tl.constexpr,
    ASM: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Weights of nibble `part` in X, from what `_exact_scales` gives. zero: (q - z) · s, minimum: q · d + m; q - z is
    exact, and one rounding follows."""
    if ASM:
        weights = tl.inline_asm_elementwise(
            _exact_ptx(FORM, part, X), "=r,r,r,r", [codes, scale[:, None], second[:, None]],
            dtype=X.value, is_pure=True, pack=2,
        )  # fmt: skip
    else:
        if FORM == "zero":
            digits = (((codes >> (4 * part)) & 15) | _digits(X)).to(X, bitcast=True)
            weights = (digits - second[:, None]) * scale[:, None]
        else:
            q = _numbers(codes, part, X, False).to(tl.float32)
            weights = (q * scale.to(tl.float32)[:, None] + second.to(tl.float32)[:, None]).to(X)
    return weights


@triton.jit
def _float_weights(
    codes: tl.tensor, part: tl.constexpr, scale: tl.tensor, second: tl.tensor, FORM: tl.constexpr,
    scale_type: tl.constexpr, X: tl.constexpr, ASM: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """The same in float32, from what `_scales` gives, then rounded to X."""
    if ASM and FORM != "zero":
        # 1 + q / 16 has q in bits that need no subtraction: (1 + q / 16) · 16 d + (m - 16 d).
        wide = scale * 16.0
        weights = tl.inline_asm_elementwise(
            _float_ptx(part, X), "=r,r,r,r,r,r", [codes, wide[:, None], (second - wide)[:, None]],
            dtype=X.value, is_pure=True, pack=2,
        )  # fmt: skip
    else:
        digits = ((codes.to(tl.int32) >> (4 * part)) & 15) | _digits(tl.float32)
        q = digits.to(tl.float32, bitcast=True) - _offset(tl.float32)
        if FORM == "zero":
            weights = _rounded((q - second[:, None]) * scale[:, None], scale_type).to(X)
        else:
            weights = (q * scale[:, None] + second[:, None]).to(X)
    return weights


@triton.jit
def _rounded(values: tl.tensor, scale_type: tl.constexpr) -> tl.tensor:
    """float32 values that `scale_type` holds: to nearest, ties to even."""
    if scale_type == tl.float16:
        values = values.to(tl.float16).to(tl.float32)
    elif scale_type == tl.bfloat16:
        bits = values.to(tl.int32, bitcast=True)
        cut = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        values = tl.where(values == values, cut.to(tl.float32, bitcast=True), values)
    return values


@triton.jit
def _bias_and_store(
    sums: tl.tensor, bias: tl.tensor, y: tl.tensor, n: tl.tensor, m: tl.tensor, N: tl.tensor, M: tl.tensor,
    HAS_BIAS: tl.constexpr,
) -> None:  # fmt: skip
    """(BLOCK_N, BLOCK_M) float32 sums -> y (M, N) in its type."""
    if HAS_BIAS:
        sums += tl.load(bias + n, mask=n < N, other=0).to(tl.float32)[:, None]
    places = m.to(tl.int64)[None, :] * N + n[:, None]
    tl.store(y + places, sums.to(y.dtype.element_ty), mask=(n < N)[:, None] & (m < M)[None, :])


@triton.jit
def _sum_units(
    x_tile: tl.tensor, codes: tl.tensor, words: tl.tensor, six: tl.tensor, code_tile: tl.tensor, n_read: tl.tensor,
    start: tl.tensor, stop: tl.tensor, N: tl.tensor, K: tl.tensor, X: tl.constexpr,
    FORM: tl.constexpr, scale_type: tl.constexpr, EXACT: tl.constexpr, FACTOR: tl.constexpr, GROUP: tl.constexpr,
    SPAN: tl.constexpr, EVEN: tl.constexpr, ASM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """(BLOCK_N, BLOCK_M) float32: a tile of yᵀ over the units [start, stop)."""
    k = tl.arange(0, _PLANE)
    last = (K - 1) // _PLANE
    wide_N = tl.cast(N, tl.int64)
    sums = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for unit in tl.range(start, stop, num_stages=STAGES):
        packed = tl.load(codes + unit * wide_N * _PLANE + code_tile)
        if FORM == "super":
            super_word = tl.load(words + (unit // _UNITS_OF_SUPER) * wide_N + n_read)
        for run in tl.static_range(0, 4, SPAN):
            plane = unit * 4 + run
            # Planes beyond the last column meet zeros of x.
            index = plane * _PLANE // GROUP if EVEN else min(plane, last) * _PLANE // GROUP
            if FORM == "super":
                pair = tl.load(six + (plane // 2) * wide_N + n_read)
                scale, second = _super_scales(super_word, pair >> 16 if run % 2 else pair)
            elif EXACT:
                scale, second = _exact_scales(words, index * wide_N, n_read, FORM, X)
            else:
                scale, second = _scales(words, index * wide_N, n_read, FORM, scale_type)
            for part in tl.static_range(run, run + SPAN):
                column = unit * _UNIT + part * _PLANE
                if EVEN:
                    x_KM = tl.load(x_tile + column)
                else:
                    x_KM = tl.load(x_tile + column, mask=(column + k < K)[:, None], other=0)
                if FACTOR:
                    counted = tl.dot(_numbers(packed, part, X, ASM), x_KM)
                    # The sum of x, where the sums of products with the codes lie.
                    total = tl.dot(tl.full((BLOCK_N, _PLANE), 1.0, X), x_KM)
                    sums += counted * scale[:, None]
                    sums += total * second[:, None]
                elif EXACT:
                    weights = _exact_weights(packed, part, scale, second, FORM, X, ASM)
                    sums = tl.dot(weights, x_KM, sums)
                else:
                    weights = _float_weights(packed, part, scale, second, FORM, scale_type, X, ASM)
                    sums = tl.dot(weights, x_KM, sums, input_precision="ieee")
    return sums


@triton.jit(do_not_specialize=["M"])
def _int4_linear_kernel(
    x: tl.tensor, codes: tl.tensor, words: tl.tensor, six: tl.tensor, bias: tl.tensor, y: tl.tensor,
    partial: tl.tensor, tickets: tl.tensor, M: tl.tensor, N: tl.tensor, K: tl.tensor, x_stride: tl.tensor,
    FORM: tl.constexpr, scale_type: tl.constexpr, EXACT: tl.constexpr, FACTOR: tl.constexpr, GROUP: tl.constexpr,
    SPAN: tl.constexpr, EVEN: tl.constexpr, HAS_BIAS: tl.constexpr, ASM: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, SPLITS: tl.constexpr, SPREAD: tl.constexpr, STAGES: tl.constexpr,
) -> None:  # fmt: skip
    """A tile of yᵀ, or its part of K. EXACT: weights are computed in X, the type of the scales. FACTOR: scales come
    after the sums.

    SPAN: planes of a unit that share one of the scales of GROUP columns. EVEN: K is whole units. SPREAD: parts of K are
    programs of their own, else one after another: the same bits.
    """
    X: tl.constexpr = x.dtype.element_ty
    tile = tl.program_id(0)
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    # Programs that run at the same time share rows of x and of the weight: bands of eight tiles of the weight's rows.
    band = tile // (8 * tiles_m)
    height = min(tiles_n - 8 * band, 8)
    within = tile % (8 * tiles_m)
    n = (8 * band + within % height) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = (within // height) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.arange(0, _PLANE)
    # Rows beyond the last are read as the last, and not written.
    n_read = tl.minimum(n, N - 1)
    x_tile = x + tl.minimum(m, M - 1).to(tl.int64)[None, :] * x_stride + k[:, None]
    code_tile = n_read[:, None] * _PLANE + k[None, :]

    units = tl.cdiv(K, _UNIT)
    each = tl.cdiv(units, SPLITS)
    if SPREAD:
        start = tl.program_id(1) * each
        sums = _sum_units(
            x_tile, codes, words, six, code_tile, n_read, start, min(start + each, units), N, K, X,
            FORM, scale_type, EXACT, FACTOR, GROUP, SPAN, EVEN, ASM, BLOCK_M, BLOCK_N, STAGES,
        )  # fmt: skip
    else:
        sums = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        for part in range(SPLITS):
            start = part * each
            sums += _sum_units(
                x_tile, codes, words, six, code_tile, n_read, start, min(start + each, units), N, K, X,
                FORM, scale_type, EXACT, FACTOR, GROUP, SPAN, EVEN, ASM, BLOCK_M, BLOCK_N, STAGES,
            )  # fmt: skip

    if SPLITS == 1 or not SPREAD:
        _bias_and_store(sums, bias, y, n, m, N, M, HAS_BIAS)
    else:
        # Whoever comes last adds up all parts, in order: which program that is changes no bits.
        mask = (n < N)[:, None] & (m < M)[None, :]
        places = m.to(tl.int64)[None, :] * N + n[:, None]
        size = tl.cast(N, tl.int64) * M
        tl.store(partial + tl.program_id(1) * size + places, sums, mask=mask)
        tl.debug_barrier()  # all of the tile is written before it is counted
        if tl.atomic_add(tickets + tile, 1, sem="acq_rel") == SPLITS - 1:
            sums = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
            for part in range(SPLITS):
                sums += tl.load(partial + part * size + places, mask=mask, other=0, cache_modifier=".cg")
            _bias_and_store(sums, bias, y, n, m, N, M, HAS_BIAS)
            tl.store(tickets + tile, 0)  # ready for the next product


_TRITON_TYPES: Mapping[torch.dtype, tl.dtype] = MappingProxyType(
    {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
)


def int4_linear(
    x_MK: Tensor,
    weight: Int4Planes,
    bias_N: Tensor | None,
    card: Card,
    batch_invariant: bool = False,
    config: Int4Config | None = None,
) -> Tensor:
    """y = x Wᵀ + bias, (M, N) in x's type, which is float32, float16 or bfloat16; the sums are float32.

    x: (M, K), its rows may lie apart. `config`: instead of what `int4_config` chooses. Raises ValueError where x does
    not fit the weight.
    """
    M, K = x_MK.shape
    N = weight.rows
    if weight.columns != K or (bias_N is not None and bias_N.shape != (N,)):
        raise ValueError(f"x {tuple(x_MK.shape)} does not fit a weight of {N} rows and {weight.columns} columns")
    y = torch.empty(M, N, dtype=x_MK.dtype, device=x_MK.device)
    if M == 0 or N == 0:
        return y
    x = x_MK if x_MK.stride(1) == 1 else x_MK.contiguous()
    cut = int4_config(M, N, K, card, batch_invariant) if config is None else config
    single = x.dtype == torch.float32
    exact = weight.form != "super" and weight.scale_type == x.dtype and not single
    spread = cut.spread or cut.splits == 1
    partial = torch.empty(cut.splits, M, N, dtype=torch.float32, device=x.device) if spread and cut.splits > 1 else y
    grid = (triton.cdiv(N, cut.block_n) * triton.cdiv(M, cut.block_m), cut.splits if spread else 1)
    _int4_linear_kernel[grid](
        x,
        weight.codes,
        weight.words,
        weight.words if weight.six is None else weight.six,
        y if bias_N is None else bias_N,
        y,
        partial,
        weight.tickets,
        M,
        N,
        K,
        x.stride(0),
        FORM=weight.form,
        scale_type=_TRITON_TYPES[weight.scale_type],
        EXACT=exact,
        FACTOR=cut.factor and weight.form != "zero" and not exact and not single,
        GROUP=weight.group,
        SPAN=math.gcd(weight.group, UNIT) // PLANE,
        EVEN=K % UNIT == 0,
        HAS_BIAS=bias_N is not None,
        ASM=x.is_cuda and not single,
        BLOCK_M=cut.block_m,
        BLOCK_N=cut.block_n,
        SPLITS=cut.splits,
        SPREAD=spread,
        STAGES=cut.stages,
        num_warps=cut.warps,
    )
    return y
