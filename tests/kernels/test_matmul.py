"""Our products against float64, and what they promise of bits: `kernels/{matmul,gemv,quantise}.py`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from headrace.backends.torch import ops
from headrace.backends.torch.kernels.gemv import gated_gemv, gemv
from headrace.backends.torch.kernels.matmul import (
    FEW_TOKENS,
    Card,
    Tile,
    invariant_tile,
    matmul,
    new_counters,
    tile_of,
)
from headrace.backends.torch.kernels.quantise import quantise_fp8, quantise_int8
from headrace.core.errors import EngineError

CPU = torch.device("cpu")
H200 = Card((9, 0), 132)
A100 = Card((8, 0), 108)
SMALL = Card((9, 0), 4)
"""So few multiprocessors that K is cut once, or not at all."""
SHAPES = ((1, 40, 1100), (3, 33, 130), (17, 130, 300), (70, 45, 72))
BOUND = {torch.float32: 1e-6, torch.float16: 2**-10}
TilesBy = Callable[[int, int, int, torch.dtype, Card], Tile]


@pytest.fixture(autouse=True)
def _poison() -> Iterator[None]:
    """Memory that was not written is NaN, or the largest integer."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def poisoned(rows: int, cols: int, dtype: torch.dtype) -> Tensor:
    """Random rows that lie apart in memory, with NaN around them."""
    held = torch.full((rows + 3, cols + 16), float("nan")).to(dtype)
    held[1 : rows + 1, :cols] = torch.randn(rows, cols).to(dtype)
    return held[1 : rows + 1, :cols]


def product(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    return x.double() @ w.double().T + (0.0 if bias is None else bias.double())


def off_by(y: Tensor, expected: Tensor) -> float:
    """The largest difference beside the size of a row: NaN where there is one."""
    return float(((y.double() - expected).abs() / expected.abs().amax(1, keepdim=True)).max())


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tiles", [tile_of, invariant_tile])
def test_product_is_that_of_float64(dtype: torch.dtype, shape: tuple[int, int, int], tiles: TilesBy) -> None:
    M, N, K = shape
    x, w, bias = poisoned(M, K, dtype), poisoned(N, K, dtype), torch.randn(N).to(dtype)
    counters = new_counters(H200, CPU)
    tile = tiles(M, N, K, dtype, H200)
    for given_bias in (bias, None):
        y = matmul(x, w, given_bias, tile, counters)
        assert y.dtype == dtype
        assert off_by(y, product(x, w, given_bias)) < BOUND[dtype]
        assert not counters.any()  # the next product finds them as this one did
    assert torch.equal(y, matmul(x, w, None, replace(tile, spread=not tile.spread), counters))


@pytest.mark.parametrize("dtype", BOUND)
def test_a_row_has_the_same_bits_in_any_company(dtype: torch.dtype, ordered: None) -> None:
    N, K = 40, 600
    x, w, bias = poisoned(70, K, dtype), poisoned(N, K, dtype), torch.randn(N).to(dtype)
    counters = new_counters(H200, CPU)

    def rows(part: Tensor) -> Tensor:
        return matmul(part, w, bias, invariant_tile(len(part), N, K, dtype, H200), counters)

    assert invariant_tile(1, N, K, dtype, H200).parts > 1
    whole = rows(x)
    for start, stop in ((0, 1), (37, 38), (66, 70), (3, 20)):
        assert torch.equal(rows(x[start:stop]), whole[start:stop])


def test_an_invariant_tile_sums_in_one_order() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float8_e4m3fn):
        for N, K in ((4096, 4096), (22016, 4096), (4096, 11008), (128256, 8192)):
            tiles = [invariant_tile(M, N, K, dtype, H200) for M in (1, 8, 64, 65, 512, 8192)]
            assert {(tile.rows, tile.tokens, tile.depth, tile.parts) for tile in tiles} == {
                (tiles[0].rows, tiles[0].tokens, tiles[0].depth, tiles[0].parts)
            }
            assert not tiles[-1].spread


@pytest.mark.parametrize("card", [H200, A100, Card((8, 9), 142), SMALL])
@pytest.mark.parametrize("tiles", [tile_of, invariant_tile])
@given(M=st.integers(1, 9000), N=st.integers(1, 130000), K=st.integers(1, 30000), data=st.data())
@settings(max_examples=25, deadline=None)
def test_tiles_fit_the_card(tiles: TilesBy, card: Card, M: int, N: int, K: int, data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.int8]))
    tile = tiles(M, N, K, dtype, card)
    assert tile.stages * (tile.rows + tile.tokens) * tile.depth * dtype.itemsize <= card.shared_bytes - 2048
    assert 1 <= tile.parts <= 16
    grid = -(-N // tile.rows) * -(-M // tile.tokens)
    if tile.spread:
        assert grid * tile.parts <= 4 * card.slots(tile.warps)  # so there are counters, and tens of MiB of sums at most
    if tiles is tile_of and M <= FEW_TOKENS:
        assert tile.tokens >= M


@pytest.mark.parametrize("tokens", [1, 2, 3])
@pytest.mark.parametrize("dtype", BOUND)
def test_gemv_is_that_of_float64(tokens: int, dtype: torch.dtype) -> None:
    for N, K in ((9, 1100), (5, 24)):
        x, w, bias = poisoned(tokens, K, dtype), poisoned(N, K, dtype), torch.randn(N).to(dtype)
        for given_bias in (bias, None):
            assert off_by(gemv(x, w, given_bias), product(x, w, given_bias)) < BOUND[dtype]


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu"])
@pytest.mark.parametrize("tokens", [1, 3])
def test_gated_gemv_is_gated_of_the_product(tokens: int, activation: str) -> None:
    for dtype, bound in BOUND.items():
        x, w, bias = poisoned(tokens, 520, dtype), poisoned(2 * 5, 520, dtype) / 16, torch.randn(10).to(dtype)
        expected = ops.gated(product(x, w, bias).to(dtype).float(), activation).double()
        close = {"rtol": 4 * bound, "atol": 4 * bound}
        torch.testing.assert_close(gated_gemv(x, w, bias, activation).double(), expected, **close)
    expected = ops.gated(product(x, w, None).to(dtype).float(), activation).double()
    torch.testing.assert_close(gated_gemv(x, w, None, activation).double(), expected, **close)


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # the interpreter's numpy, at NaN
def test_nan_stays_in_its_row() -> None:
    x, w = poisoned(4, 300, torch.float32), poisoned(20, 300, torch.float32)
    clean = x.clone()
    x[2, 5] = float("nan")
    counters = new_counters(H200, CPU)
    tile = tile_of(4, 20, 300, x.dtype, H200)
    for multiply in (lambda x: matmul(x, w, None, tile, counters), lambda x: gemv(x, w, None)):
        y, expected = multiply(x), multiply(clean)
        assert y[2].isnan().all()
        assert torch.equal(y[[0, 1, 3]], expected[[0, 1, 3]])


@pytest.mark.parametrize("shape", SHAPES)
def test_int8_sums_are_exact(shape: tuple[int, int, int]) -> None:
    M, N, K = shape
    x, w = (torch.randint(-128, 128, (rows, K), dtype=torch.int8) for rows in (M, N))
    scales = torch.rand(M, 1) * 0.01, torch.rand(N)
    bias = torch.randn(N)
    y = matmul(x, w, bias, tile_of(M, N, K, x.dtype, H200), new_counters(H200, CPU), torch.float32, scales)
    sums = (x.long() @ w.long().T).float()
    assert torch.equal(y, sums * scales[0] * scales[1] + bias)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tiles", [tile_of, invariant_tile])
def test_fp8_product_is_that_of_its_codes(shape: tuple[int, int, int], tiles: TilesBy) -> None:
    M, N, K = shape
    x, w = (torch.randn(rows, K).to(torch.float8_e4m3fn) for rows in (M, N))
    scales = torch.rand(M, 1) + 0.1, torch.rand(N) + 0.1
    tile = tiles(M, N, K, x.dtype, H200)
    y = matmul(x, w, None, tile, new_counters(H200, CPU), torch.float32, scales)
    assert off_by(y, (x.double() @ w.double().T) * scales[0] * scales[1]) < 1e-6


FINITE = st.floats(-(2.0**127), 2.0**127, width=32, allow_subnormal=False)


@given(st.lists(FINITE, min_size=1, max_size=40))
@settings(max_examples=40, deadline=None)
def test_codes_are_the_nearest(values: list[float]) -> None:
    x = torch.tensor([values])
    for quantise, most in ((quantise_fp8, 448.0), (quantise_int8, 127.0)):
        codes, scales = quantise(x, 64)
        expected = x.abs().amax() / most
        expected = expected if expected > 0 else torch.tensor(1.0)
        assert torch.equal(scales[0, 0], expected)
        scaled = (x / expected).clamp(-most, most)
        assert torch.equal(codes[:, : len(values)].float(), nearest(scaled, codes.dtype).float())
        assert not codes[:, len(values) :].float().any()


def nearest(scaled: Tensor, dtype: torch.dtype) -> Tensor:
    return scaled.round().to(dtype) if dtype == torch.int8 else scaled.to(dtype)


@pytest.mark.parametrize("quantise", [quantise_fp8, quantise_int8])
def test_quantise_edges(quantise: Callable[..., tuple[Tensor, Tensor]]) -> None:
    x = poisoned(6, 20000, torch.float16)  # longer than a chunk
    x[1] = 0.0
    x[2, 19999] = float("nan")
    x[3, 3] = float("-inf")
    codes, scales = quantise(x)
    assert scales.shape == (6, 1)
    assert scales[1] == 1.0
    assert scales[[2, 3]].isnan().all() and not codes[[2, 3]].float().any()
    most = 127.0 if codes.dtype == torch.int8 else 448.0
    for row in (0, 4, 5):
        expected = x[row].float().abs().max() / most
        assert scales[row] == expected
        assert torch.equal(codes[row].float(), nearest(x[row].float() / expected, codes.dtype).float())
    assert quantise(x[:0])[0].shape == (0, 20000)


def test_what_does_not_fit_is_refused() -> None:
    x, w = torch.randn(2, 8), torch.randn(3, 8)
    counters, tile = new_counters(H200, CPU), tile_of(2, 3, 8, torch.float32, H200)
    assert matmul(x[:0], w, None, tile, counters).shape == (0, 3)
    for bad in (
        lambda: matmul(x, w[:, :7], None, tile, counters),
        lambda: matmul(x, w.half(), None, tile, counters),
        lambda: matmul(x, w, torch.zeros(2), tile, counters),
        lambda: matmul(x, torch.randn(8, 3).T, None, tile, counters),
        lambda: gemv(torch.randn(5, 8), w, None),
        lambda: gemv(x[:, :7], w, None),
        lambda: gated_gemv(x, w, None, "silu"),
        lambda: gated_gemv(x, w[:2], None, "tanh"),
        lambda: quantise_fp8(x, 7),
        lambda: quantise_int8(torch.randn(8, 2).T),
    ):
        with pytest.raises(EngineError):
            bad()
