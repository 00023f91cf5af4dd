"""Plain weights: the library's product, or ours where a measurement says that it is quicker.

N: rows, K: columns, M: rows of x.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from headrace.backends.torch.kernels.gemv import gated_gemv, gemv
from headrace.backends.torch.kernels.matmul import Card, invariant_tile, matmul, new_counters, tile_of
from headrace.backends.torch.packed.choices import LIBRARY, Choices
from headrace.backends.torch.packed.upload import Rows, uploaded
from headrace.weights.qtensor import QTensor


class PlainWeight:
    """A tensor (N, K) of the inputs' type. `choices` says which kernel meets how many rows.

    With `invariant`, one tile and one order of summing serve every M: a row's bits depend on that row alone.
    """

    def __init__(
        self,
        rows: int,
        cols: int,
        dtype: torch.dtype,
        device: torch.device,
        card: Card,
        counters: Tensor | None = None,
        choices: Choices = LIBRARY,
        invariant: bool = False,
    ) -> None:
        """`counters`: `new_counters`, shared by the products of a stream; None: its own."""
        self._use(torch.empty(rows, cols, dtype=dtype, device=device), card, counters, choices, invariant)

    @classmethod
    def over(
        cls,
        weight_NK: Tensor,
        card: Card,
        counters: Tensor | None = None,
        choices: Choices = LIBRARY,
        invariant: bool = False,
    ) -> PlainWeight:
        """A product with a tensor that is filled elsewhere: a head tied to the embedding."""
        made = cls.__new__(cls)
        made._use(weight_NK, card, counters, choices, invariant)
        return made

    def _use(self, weight: Tensor, card: Card, counters: Tensor | None, choices: Choices, invariant: bool) -> None:
        self.weight = weight
        self.card = card
        self.choices = choices
        self.invariant = invariant
        self._counters = new_counters(card, weight.device) if counters is None else counters
        self._rows = Rows(*weight.shape)

    @property
    def shape(self) -> tuple[int, int]:
        return (self.weight.shape[0], self.weight.shape[1])

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.weight.device

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes

    def put(self, start: int, tensor: QTensor) -> None:
        """Rows [start, start + n), rounded once to the type. Raises WeightsMismatch for rows that are not the
        product's."""
        self._rows.take(start, tensor)
        for first, values in uploaded(tensor, self.device):
            self.weight[start + first : start + first + len(values)].copy_(values)

    def finish(self) -> None:
        """Raises WeightsMismatch where rows are missing."""
        self._rows.finish()

    def dequantise(self) -> Tensor:
        """(N, K) float32."""
        return self.weight.float()

    def __call__(self, x_MK: Tensor, bias_N: Tensor | None) -> Tensor:
        """(M, N) in x's type."""
        tokens = len(x_MK)
        if self.invariant:
            tile = invariant_tile(tokens, *self.shape, self.dtype, self.card)
            return matmul(x_MK, self.weight, bias_N, tile, self._counters)
        kernel = self.choices.kernel(*self.shape, tokens)
        if kernel == "gemv":
            return gemv(x_MK, self.weight, bias_N)
        if kernel == "tiles":
            tile = tile_of(tokens, *self.shape, self.dtype, self.card)
            return matmul(x_MK, self.weight, bias_N, tile, self._counters)
        return functional.linear(x_MK, self.weight, bias_N)

    def fuses_gate(self, tokens: int) -> bool:
        """Whether `gated` may be called for so many rows of x: where the product would be `gemv`'s."""
        return not self.invariant and self.choices.kernel(*self.shape, tokens) == "gemv"

    def gated(self, x_MK: Tensor, bias_N: Tensor | None, activation: str) -> Tensor:
        """act(gate) × up -> (M, N ÷ 2), of a product whose rows are the gate's and then up's: `ops.gated`."""
        return gated_gemv(x_MK, self.weight, bias_N, activation)
