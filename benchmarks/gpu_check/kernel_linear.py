"""Rows of products with weights: plain, batch-invariant, fp8, int8 and int4, few tokens and many.

A time is that of a layer's four products (qkv, o, gate·up, down) one after the other, at one number of tokens M.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from benchmarks.gpu_check.bench import Bench
from benchmarks.gpu_check.clock import Run
from benchmarks.gpu_check.engine import PERIOD
from benchmarks.gpu_check.rows import Case
from benchmarks.gpu_check.tools import EXACT, TOLERANCES, Pair, elements, fast, few, randn, right
from torch import Tensor
from torch.nn import functional

from headrace.weights.qtensor import QTensor

Shapes = Sequence[tuple[int, int]]

LLAMA_7B: Shapes = ((12288, 4096), (4096, 4096), (22016, 4096), (4096, 11008))
QWEN2_72B: Shapes = ((10240, 8192), (8192, 8192), (59136, 8192), (8192, 29568))
"""(rows, columns) of a layer's products."""
TINY: Shapes = ((48, 64), (32, 128))
ODD: Shapes = ((70, 96), (33, 160))
TOKENS = (1, 3, 16, 17, 70)

MANY = 2048
BITS: Mapping[str, float] = {"plain": 16, "invariant": 16, "fp8": 8, "int8": 8, "int4": 4 + 16 / 128}
"""A number of a weight takes; scales a row left out."""


def cases(bench: Bench) -> list[Case]:
    found = [
        right(bench, "gemv", "1 to 4 tokens; gate·up in one", partial(_gemv, bench)),
        right(bench, "matmul", "tiles by shape, and one for every M: the same bits", partial(_matmul, bench)),
        right(bench, "quantise", "fp8 and int8 codes of tokens", partial(_quantise, bench)),
    ]
    for form in ("plain", "fp8", "int8", "int4"):
        what = "against its own numbers in float64; odd sizes, bias"
        found.append(right(bench, f"weight {form}", what, partial(_weights, bench, form)))
    return [*found, *_fast(bench)]


# ---------------------------------------------------------------- right


def _shapes(bench: Bench, dtype: torch.dtype) -> Shapes:
    if bench.dry:
        return ((22, 96),)
    return ODD if few(bench, dtype) else (*ODD, LLAMA_7B[3])


def _gemv(bench: Bench, dtype: torch.dtype) -> Iterator[Pair]:
    from headrace.backends.torch.kernels.gemv import gated_gemv, gemv

    for rows, columns in _shapes(bench, dtype):
        weight = randn(bench, rows, columns, dtype=dtype, scale=columns**-0.5)
        bias = randn(bench, rows, dtype=dtype)
        for tokens in (3,) if bench.dry else (1, 2, 3, 4):
            x = randn(bench, tokens, columns, dtype=dtype)
            wanted = x.double() @ weight.double().T + bias.double()
            yield Pair(f"{tokens}×{rows}×{columns}", gemv(x, weight, bias), wanted)
            if rows % 2 == 0:
                gate, up = wanted.chunk(2, dim=-1)
                mixed = functional.silu(gate) * up
                yield Pair(f"gated {tokens}×{rows}×{columns}", gated_gemv(x, weight, bias, "silu"), mixed)


def _matmul(bench: Bench, dtype: torch.dtype) -> Iterator[Pair]:
    from headrace.backends.torch.kernels.matmul import invariant_tile, matmul, new_counters, tile_of

    card = card_of(bench)
    for rows, columns in _shapes(bench, dtype):
        weight = randn(bench, rows, columns, dtype=dtype, scale=columns**-0.5)
        bias = randn(bench, rows, dtype=dtype)
        counters = new_counters(card, bench.clock.device)
        x = randn(bench, 5 if bench.dry else max(TOKENS), columns, dtype=dtype)
        wanted = x.double() @ weight.double().T + bias.double()
        for choose in (tile_of, invariant_tile):
            for tokens in (1, len(x)) if bench.dry or few(bench, dtype) else TOKENS:
                tile = choose(tokens, rows, columns, dtype, card)
                out = matmul(x[:tokens], weight, bias, tile, counters)
                yield Pair(f"{choose.__name__} {tokens}×{rows}×{columns}", out, wanted[:tokens])
        whole = matmul(x, weight, bias, invariant_tile(len(x), rows, columns, dtype, card), counters)
        one = matmul(x[2:3], weight, bias, invariant_tile(1, rows, columns, dtype, card), counters)
        yield Pair(f"bits alone and in company {rows}×{columns}", one, whole[2:3], EXACT)


def _quantise(bench: Bench, dtype: torch.dtype) -> Iterator[Pair]:
    from headrace.backends.torch.kernels.quantise import quantise_fp8, quantise_int8

    for rows, columns in [(3, 37)] if bench.dry else [(5, 4096), (3, 97), (2, 29568)]:
        x = randn(bench, rows, columns, dtype=dtype)
        x[0] = 0
        for quantise, most in ((quantise_fp8, 448.0), (quantise_int8, 127.0)):
            codes, scales = quantise(x)
            wanted = quantised(x, most)
            yield Pair(f"{quantise.__name__} {rows}×{columns}", codes.double() * scales.double(), wanted, 1e-4)


def quantised(x: Tensor, most: float) -> Tensor:
    """What a token's numbers become in E4M3 (most 448) or int8 (127), a scale a row, in float64."""
    scale = x.float().abs().amax(-1, keepdim=True) / most
    scale = torch.where(scale == 0, 1.0, scale)
    codes = x.float() / scale
    codes = codes.to(torch.float8_e4m3fn).float() if most > 127 else codes.round()
    return codes.double() * scale.double()


def _weights(bench: Bench, form: str, dtype: torch.dtype) -> Iterator[Pair]:
    shapes = _weight_shapes(bench, form)
    for rows, columns in shapes[:1] if few(bench, dtype) else shapes:
        weight = loaded(bench, form, [_random(bench, form, rows, columns), _random(bench, form, rows, columns)], dtype)
        numbers = weight.dequantise().double()
        bias = randn(bench, 2 * rows, dtype=dtype)
        for tokens in (1, 5) if bench.dry or few(bench, dtype) else TOKENS:
            x = randn(bench, tokens, columns, dtype=dtype)
            met = quantised(x, 448.0 if form == "fp8" else 127.0) if form in ("fp8", "int8") else x.double()
            wanted = met @ numbers.T + bias.double()
            label = f"{tokens}×{2 * rows}×{columns}"
            yield Pair(label, weight(x, bias), wanted, 2 * TOLERANCES[dtype])


def _weight_shapes(bench: Bench, form: str) -> Shapes:
    """int4's rows are whole groups of 128."""
    if form == "int4":
        return ((34, 128),) if bench.dry else ((35, 384), (4096, 4096))
    return ((32, 96),) if bench.dry else ((35, 96), (4096, 4096))


def _random(bench: Bench, form: str, rows: int, columns: int) -> QTensor:
    """Rows as a checkpoint holds them: packed for int4 and fp8, plain else."""
    numbers = np.random.default_rng(bench.seed + rows + columns)
    if form == "int4":
        codes = np.resize(numbers.integers(0, 256, PERIOD, np.uint8), (rows, columns // 2))
        scales = (numbers.random((rows, columns // 128)) * columns**-0.5 / 2).astype(np.float16)
        return QTensor("int4", (rows, columns), {"q": codes, "s": scales})
    if form == "fp8":
        codes = np.resize(numbers.integers(0, 256, PERIOD, np.uint8) & np.uint8(0xBF), (rows, columns))
        scales = ((0.5 + numbers.random((rows, 1))) * columns**-0.5).astype(np.float32)
        return QTensor("fp8", (rows, columns), {"q": codes, "s": scales})
    values = (numbers.standard_normal(PERIOD) * columns**-0.5).astype(np.float32)
    plane = (values.view(np.uint32) >> np.uint32(16)).astype(np.uint16)
    return QTensor.from_array(np.resize(plane, (rows, columns)))


def loaded(bench: Bench, form: str, tensors: Sequence[QTensor], dtype: torch.dtype) -> Any:
    """A weight object with these rows under one another."""
    rows, columns = sum(one.shape[0] for one in tensors), tensors[0].shape[1]
    weight = _new(bench, form, rows, columns, dtype)
    start = 0
    for tensor in tensors:
        weight.put(start, tensor)
        start += tensor.shape[0]
    weight.finish()
    return weight


def _new(bench: Bench, form: str, rows: int, columns: int, dtype: torch.dtype) -> Any:
    device = bench.clock.device
    if form == "int4":
        from headrace.backends.torch.packed.int4 import Int4Weight

        return Int4Weight(rows, columns, dtype, device, 128, "zero", card_of(bench))
    if form == "fp8":
        from headrace.backends.torch.packed.fp8 import Fp8Weight

        return Fp8Weight(rows, columns, dtype, device, card_of(bench))
    if form == "int8":
        from headrace.backends.torch.packed.int8 import Int8Weight

        return Int8Weight(rows, columns, dtype, device, card_of(bench))
    from headrace.backends.torch.packed.plain import PlainWeight

    return PlainWeight(rows, columns, dtype, device, card_of(bench))


def card_of(bench: Bench) -> Any:
    """What configurations are chosen by."""
    from headrace.backends.torch.kernels.matmul import Card

    if bench.dry:
        return Card()
    found = torch.cuda.get_device_properties(0)
    return Card((found.major, found.minor), found.multi_processor_count)


# ---------------------------------------------------------------- fast


def _fast(bench: Bench) -> list[Case]:
    if bench.dry:
        return [_time(bench, form, "tiny", TINY, 2, 0.5) for form in BITS if form != "int4"]
    return [
        _time(bench, "plain", "7B", LLAMA_7B, 1, 0.85),
        _time(bench, "fp8", "7B", LLAMA_7B, 1, 0.75),
        _time(bench, "int4", "7B", LLAMA_7B, 1, 0.75),
        _time(bench, "int8", "7B", LLAMA_7B, 1, 0.75),
        _time(bench, "fp8", "72B", QWEN2_72B, 4, 0.75),
        _time(bench, "int4", "72B", QWEN2_72B, 4, 0.75),
        _time(bench, "int4", "7B", LLAMA_7B, 16, 0.75),
        _time(bench, "fp8", "7B", LLAMA_7B, 16, 0.75),
        _time(bench, "invariant", "7B", LLAMA_7B, 1, None),
        _time(bench, "int4", "7B", LLAMA_7B, MANY, 0.60),
        _time(bench, "fp8", "7B", LLAMA_7B, MANY, None),
        _time(bench, "int8", "7B", LLAMA_7B, MANY, None),
        _time(bench, "invariant", "7B", LLAMA_7B, MANY, None),
    ]


def _time(bench: Bench, form: str, model: str, shapes: Shapes, tokens: int, share: float | None) -> Case:
    dtype = torch.float32 if bench.dry else torch.bfloat16
    numbers = sum(rows * columns for rows, columns in shapes)

    def make() -> Run:
        xs = [randn(bench, tokens, columns, dtype=dtype) for _, columns in shapes]
        calls = _calls(bench, form, shapes, dtype)

        def run() -> None:
            for call, x in zip(calls, xs, strict=True):
                call(x)

        return run

    def library() -> Run:
        xs = [randn(bench, tokens, columns, dtype=dtype) for _, columns in shapes]
        weights = [randn(bench, *shape, dtype=dtype, scale=0.02) for shape in shapes]
        return lambda: [functional.linear(x, weight) for x, weight in zip(xs, weights, strict=True)]

    return fast(
        bench,
        f"{form}, a {model} layer's products, M = {tokens}",
        "bound: weights once, or the bf16 matmul rate",
        make,
        nbytes=numbers * (elements(dtype, 1) if bench.dry else BITS[form] / 8),
        flops=2.0 * numbers * tokens,
        share=share,
        others={"cuBLAS 16 bit": library},
    )


def _calls(bench: Bench, form: str, shapes: Shapes, dtype: torch.dtype) -> list[Callable[[Tensor], object]]:
    """One call for each product, its weight random numbers on the device."""
    if form not in ("plain", "invariant"):
        found = [loaded(bench, form, [_random(bench, form, *shape)], dtype) for shape in shapes]
        return [lambda x, weight=weight: weight(x, None) for weight in found]
    weights = [randn(bench, *shape, dtype=dtype, scale=0.02) for shape in shapes]
    if form == "plain":
        from headrace.backends.torch.kernels.gemv import gemv

        return [lambda x, weight=weight: gemv(x, weight, None) for weight in weights]
    from headrace.backends.torch.kernels.matmul import invariant_tile, matmul, new_counters

    card = card_of(bench)
    counters = new_counters(card, bench.clock.device)

    def product(x: Tensor, weight: Tensor) -> Tensor:
        return matmul(x, weight, None, invariant_tile(len(x), *weight.shape, dtype, card), counters)

    return [lambda x, weight=weight: product(x, weight) for weight in weights]
