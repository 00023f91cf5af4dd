"""Weights as int8 codes with a scale a row: integer sums are exact, so a row's bits depend on that row alone."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from headrace.backends.torch.kernels.matmul import Card
from headrace.backends.torch.kernels.quantise import MOST_INT8, quantise_int8
from headrace.backends.torch.packed.eight_bits import EightBitWeight, keeps, row_scales
from headrace.core.errors import ConfigError

MOST_COLUMNS = (2**31 - 1) // (128 * 127)
"""What a sum in 32 bits holds: stored weights go down to −128, inputs to −127."""


def int8_form(schemes: Collection[str], group: int, cols: int) -> bool:
    """Whether tensors of these schemes become an `Int8Weight` without another rounding. `group`: columns a scale."""
    return keeps("int8", schemes, group, cols)


class Int8Weight(EightBitWeight):
    """The scale of a row is max|w| ÷ 127, a code the nearest integer of w ÷ scale, ties to even."""

    scheme = "int8"
    code = torch.int8

    def __init__(
        self, rows: int, cols: int, dtype: torch.dtype, device: torch.device, card: Card, counters: Tensor | None = None
    ) -> None:
        """Raises ConfigError for rows whose sums might not fit 32 bits."""
        if cols > MOST_COLUMNS:
            raise ConfigError(f"quant: got 'int8' for rows of {cols} weights, allowed: at most {MOST_COLUMNS}")
        super().__init__(rows, cols, dtype, device, card, counters)

    def quantise(self, x_MK: Tensor) -> tuple[Tensor, Tensor]:
        return quantise_int8(x_MK, self._codes.shape[1])

    def encode(self, values_NK: Tensor) -> tuple[Tensor, Tensor]:
        scales = row_scales(values_NK, MOST_INT8)
        codes = (values_NK / scales[:, None]).round_().nan_to_num_(0.0).clamp_(-MOST_INT8, MOST_INT8)
        return codes.to(self.code), scales
