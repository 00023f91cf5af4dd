"""What fp8 and int8 weights share: codes with a float32 scale a row, met with inputs rounded the same way (W8A8).

N: rows, K: columns, M: rows of x.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection

import torch
from torch import Tensor

from headrace.backends.torch.kernels.matmul import Card, Tile, matmul, new_counters, tile_of
from headrace.backends.torch.kernels.quantise import SCALE_MULTIPLE
from headrace.backends.torch.packed.upload import Rows, uploaded, uploaded_codes
from headrace.weights.qtensor import QTensor

MULTIPLE = 16
"""N and K are padded to it with zeros: loads of 16 bytes, and what torch's own product asks for."""


class EightBitWeight(ABC):
    """Stands where a plain weight stands. y = (Σ code_w × code_x) × scale_x × scale_w + bias, in float32, rounded once.

    Inputs are rounded row by row (`kernels/quantise.py`): a row's meaning never depends on its company.
    """

    scheme: str
    """Stored codes that are kept as they are, where a row has one scale."""
    code: torch.dtype

    def __init__(
        self, rows: int, cols: int, dtype: torch.dtype, device: torch.device, card: Card, counters: Tensor | None = None
    ) -> None:
        """`dtype`: of the inputs. `counters`: `new_counters`, shared by the products of a stream; None: its own."""
        self.shape = (rows, cols)
        self.dtype = dtype
        self.device = device
        self.card = card
        self._counters = new_counters(card, device) if counters is None else counters
        self._rows = Rows(rows, cols)
        height, width = _padded(rows, MULTIPLE), _padded(cols, MULTIPLE)
        self._codes = torch.zeros(height, width, dtype=self.code, device=device)
        self._scales = torch.ones(_padded(rows, SCALE_MULTIPLE), dtype=torch.float32, device=device)[:height]

    @property
    def nbytes(self) -> int:
        return self._codes.nbytes + self._scales.nbytes

    def put(self, start: int, tensor: QTensor) -> None:
        """Rows [start, start + n). Codes of `scheme` with one scale a row are kept; all else is rounded here, on the
        device, from its float32 value. Raises WeightsMismatch for rows that are not the product's.

        Stored scales of 16 bits lose nothing as float32; that a value is rounded to their type (`weights/scaled.py`)
        is not repeated.
        """
        self._rows.take(start, tensor)
        if keeps(self.scheme, {tensor.scheme}, tensor.group, tensor.shape[1]) and "order" not in tensor.planes:
            for first, codes, scales in uploaded_codes(tensor, self.device):
                self._set(start + first, codes.view(self.code), scales[:, 0])
        else:
            for first, values in uploaded(tensor, self.device):
                self._set(start + first, *self.encode(values.float()))

    def finish(self) -> None:
        """Raises WeightsMismatch where rows are missing."""
        self._rows.finish()

    def dequantise(self) -> Tensor:
        """(N, K) float32."""
        rows, cols = self.shape
        return self._codes[:rows, :cols].float() * self._scales[:rows, None]

    def __call__(self, x_MK: Tensor, bias_N: Tensor | None) -> Tensor:
        """(M, N) in x's type. A row of x with NaN or an infinity gives NaN."""
        codes, scales = self.quantise(x_MK)
        return self.product(codes, scales, bias_N, x_MK.dtype)

    def product(self, codes_MK: Tensor, scales_M1: Tensor, bias_N: Tensor | None, dtype: torch.dtype) -> Tensor:
        """The same for inputs that are codes already, as `quantise` gives them. -> (M, N)"""
        rows = self.shape[0]
        tile = self.tile(len(codes_MK))
        scales = (scales_M1, self._scales)
        return matmul(codes_MK, self._codes[:rows], bias_N, tile, self._counters, dtype, scales)

    def tile(self, tokens: int) -> Tile:
        return tile_of(tokens, *self.shape, self.code, self.card)

    @abstractmethod
    def quantise(self, x_MK: Tensor) -> tuple[Tensor, Tensor]:
        """-> codes (M, K padded with zeros), scales (M, 1)."""

    @abstractmethod
    def encode(self, values_NK: Tensor) -> tuple[Tensor, Tensor]:
        """float32 -> codes (N, K), scales (N,). A row of zeros has scale 1; one with NaN has NaN."""

    def _set(self, start: int, codes: Tensor, scales: Tensor) -> None:
        self._codes[start : start + len(codes), : self.shape[1]] = codes
        self._scales[start : start + len(codes)] = scales


def keeps(scheme: str, schemes: Collection[str], group: int, cols: int) -> bool:
    """Whether tensors are codes of `scheme` with one scale a row: anything finer would have to be rounded again."""
    return set(schemes) == {scheme} and group == cols


def row_scales(values_NK: Tensor, most: float) -> Tensor:
    """max|w| ÷ most -> (N,); 1 for a row of zeros."""
    scales = values_NK.abs().amax(dim=1) / most
    return torch.where(scales == 0.0, 1.0, scales)


def _padded(count: int, multiple: int) -> int:
    return count + -count % multiple
