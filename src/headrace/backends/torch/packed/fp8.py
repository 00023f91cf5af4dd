"""Weights as E4M3 codes with a scale a row, for GPUs of capability 8.9 and above."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from headrace.backends.torch.kernels.matmul import FEW_TOKENS, Card, Tile, invariant_tile
from headrace.backends.torch.kernels.quantise import MOST_FP8, quantise_fp8
from headrace.backends.torch.packed.eight_bits import EightBitWeight, keeps, row_scales
from headrace.core.errors import ConfigError

CAPABILITY = (8, 9)
"""The first with fp8 in its tensor cores."""


def fp8_form(schemes: Collection[str], group: int, cols: int) -> bool:
    """Whether tensors of these schemes become an `Fp8Weight` without another rounding. `group`: columns a scale.

    Blocks of 128 × 128 do not: they are better dequantised to plain weights.
    """
    return keeps("fp8", schemes, group, cols)


class Fp8Weight(EightBitWeight):
    """The scale of a row is max|w| ÷ 448, a code the nearest E4M3 of w ÷ scale, ties to even.

    More than `FEW_TOKENS` bfloat16 rows go to torch's own row-wise product, unless `invariant`: then one tile and one
    order of summing serve every M, and a row's bits depend on that row alone.
    """

    scheme = "fp8"
    code = torch.float8_e4m3fn

    def __init__(
        self,
        rows: int,
        cols: int,
        dtype: torch.dtype,
        device: torch.device,
        card: Card,
        counters: Tensor | None = None,
        invariant: bool = False,
    ) -> None:
        """Raises ConfigError on a GPU that has no fp8."""
        if device.type == "cuda" and card.capability < CAPABILITY:
            found = ".".join(map(str, card.capability))
            raise ConfigError(
                f"quant: got 'fp8' on a GPU of capability {found}, allowed: 8.9 and above; int8 runs here"
            )
        super().__init__(rows, cols, dtype, device, card, counters)
        self.invariant = invariant

    def quantise(self, x_MK: Tensor) -> tuple[Tensor, Tensor]:
        return quantise_fp8(x_MK, self._codes.shape[1])

    def encode(self, values_NK: Tensor) -> tuple[Tensor, Tensor]:
        scales = row_scales(values_NK, MOST_FP8)
        return (values_NK / scales[:, None]).clamp_(-MOST_FP8, MOST_FP8).to(self.code), scales

    def product(self, codes_MK: Tensor, scales_M1: Tensor, bias_N: Tensor | None, dtype: torch.dtype) -> Tensor:
        # torch's row-wise product writes bfloat16 everywhere; other types only with some versions of CUDA.
        if self.invariant or len(codes_MK) <= FEW_TOKENS or dtype != torch.bfloat16:
            return super().product(codes_MK, scales_M1, bias_N, dtype)
        rows = self.shape[0]
        padding = len(self._codes) - rows
        if bias_N is not None and padding:
            bias_N = torch.nn.functional.pad(bias_N, (0, padding))
        scales_1N = self._scales[None, :]
        y = torch._scaled_mm(codes_MK, self._codes.t(), scales_M1, scales_1N, bias=bias_N, out_dtype=dtype)
        return y[:, :rows]

    def tile(self, tokens: int) -> Tile:
        if self.invariant:
            return invariant_tile(tokens, *self.shape, self.code, self.card)
        return super().tile(tokens)
