"""Tensors of a checkpoint to the device, a few rows at a time: never a float32 copy of what is plain, on the host."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor

from headrace.core.errors import WeightsMismatch, shorten
from headrace.weights.qtensor import Array, QTensor

CHUNK_BYTES = 1 << 25
"""Most bytes copied at once."""

PLAIN: Mapping[str, torch.dtype] = MappingProxyType(
    {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
)


class Rows:
    """Which rows of a product have come: several named tensors lie under one another in it."""

    def __init__(self, rows: int, cols: int) -> None:
        self.rows = rows
        self.cols = cols
        self._came = 0

    def take(self, start: int, tensor: QTensor) -> None:
        """Raises WeightsMismatch unless the tensor is rows [start, start + n) of the product."""
        if len(tensor.shape) != 2 or tensor.shape[1] != self.cols or not 0 <= start <= self.rows - tensor.shape[0]:
            where = f"from row {start} of {(self.rows, self.cols)}"
            raise WeightsMismatch(f"tensor of shape {shorten(tensor.shape)} does not fit {where}")
        self._came += tensor.shape[0]

    def finish(self) -> None:
        """Raises WeightsMismatch unless as many rows came as there are."""
        if self._came != self.rows:
            raise WeightsMismatch(f"{self._came} rows came for a product of {self.rows}")


def uploaded(tensor: QTensor, device: torch.device) -> Iterator[tuple[int, Tensor]]:
    """(first row, the rows on the device) … of a tensor (N, K), CHUNK_BYTES at a time.

    f32, f16 and bf16 arrive in their own type: their bytes go as they are. All other schemes arrive as float32.
    """
    dtype = PLAIN.get(tensor.scheme, torch.float32)
    # Once: rows in another order are copied whenever a plane is asked for.
    tensor = QTensor(tensor.scheme, tensor.shape, dict(tensor.planes))
    for start, stop in _spans(tensor.shape, dtype.itemsize):
        part = tensor.rows(start, stop)
        values = part.planes["data"] if tensor.scheme in PLAIN else part.dequantise()
        yield start, uploaded_array(values, device).view(dtype)


def uploaded_array(values: Array, device: torch.device) -> Tensor:
    """torch refuses to look at the read-only pages of a file: these are copied first."""
    return torch.from_numpy(np.array(values, copy=None if values.flags.writeable else True, order="C")).to(device)


def uploaded_codes(tensor: QTensor, device: torch.device) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(first row, its numbers `q`, its scales `s` as float32) … of a tensor of `weights/scaled.py` (N, K)."""
    tensor = QTensor(tensor.scheme, tensor.shape, dict(tensor.planes))
    for start, stop in _spans(tensor.shape, 1):
        planes = tensor.rows(start, stop).planes
        scales = uploaded_array(planes["s"], device)
        if planes["s"].dtype == np.uint16:
            scales = scales.view(torch.bfloat16)
        yield start, uploaded_array(planes["q"], device), scales.float()


def _spans(shape: tuple[int, ...], element_bytes: int) -> Iterator[tuple[int, int]]:
    step = max(1, CHUNK_BYTES // max(1, math.prod(shape[1:]) * element_bytes))
    for start in range(0, shape[0], step):
        yield start, min(start + step, shape[0])
