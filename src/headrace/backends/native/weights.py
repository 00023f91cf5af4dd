"""A checkpoint's tensors -> what the kernels read: packed weights, and vectors of float32.

How a weight is kept (`BackendOptions.quant`):

    none     plain numbers of the compute type, whatever the checkpoint holds
    stored   as the checkpoint packs it, where there is a kernel for it; plain numbers as they are; else float32
    int8, int4   plain numbers are rounded to groups of 32 columns, what is packed already stays; the embedding, which
                 may be the head as well, gets 8 bits in both
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from headrace.backends.native import _kernels
from headrace.core.errors import WeightsMismatch, shorten
from headrace.models.names import EMBED
from headrace.weights.files import mapped_file
from headrace.weights.qtensor import SCHEMES, QTensor, Reordered
from headrace.weights.scaled import ORDER, scale_values, unpack_nibbles

F32 = NDArray[np.float32]

PLAIN = ("f32", "f16", "bf16")
COMPUTE_TYPES: Mapping[str, str] = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
GROUP = 32
"""Columns that share a scale where a kernel meets codes."""
READ_AHEAD = 128 * 2**20
"""Bytes of packed weights that are begun before anybody waits for them."""
MOST_COPIED = 8 * 2**20
"""Bytes that wait to be packed and are not the file's own."""


@dataclass(slots=True)
class Tensors:
    """Every tensor of a model, by headrace's own name; taken out one by one as the program is made."""

    weights: dict[str, _kernels.Weight] = field(default_factory=dict)
    vectors: dict[str, F32] = field(default_factory=dict)
    nbytes: int = 0

    def weight(self, name: str, rows: int, columns: int) -> _kernels.Weight:
        """Raises WeightsMismatch if it did not come, or has another shape."""
        found = self.weights.pop(name, None)
        if found is None:
            raise WeightsMismatch(f"tensor {shorten(name)} did not come")
        if (found.rows, found.columns) != (rows, columns):
            shape = (found.rows, found.columns)
            raise WeightsMismatch(f"tensor {shorten(name)} has shape {shape}, needed {(rows, columns)}")
        return found

    def vector(self, name: str, width: int) -> F32:
        """Raises WeightsMismatch if it did not come, or has another length."""
        found = self.vectors.pop(name, None)
        if found is None:
            raise WeightsMismatch(f"tensor {shorten(name)} did not come")
        if found.shape != (width,):
            raise WeightsMismatch(f"tensor {shorten(name)} has shape {found.shape}, needed {(width,)}")
        return found

    def finish(self) -> None:
        """Raises WeightsMismatch if a tensor is left."""
        if left := [*self.weights, *self.vectors]:
            raise WeightsMismatch(f"tensor {shorten(min(left))} is not part of the model")


class Packing:
    """Packs every tensor as it comes. `exact`: weights kept as float32 in every type.

    What the checkpoint packs is packed behind the caller, by the packer's threads: `take_all` returns every weight, and
    after `finish` they hold what they should. Both raise WeightsMismatch, or what the stream of tensors raises.
    """

    def __init__(
        self,
        tensors: Iterable[tuple[str, QTensor]],
        packer: _kernels.Packer,
        quant: str,
        dtype: str,
        exact: Iterable[str] = (),
    ) -> None:
        self.packer = packer
        self._tensors = iter(tensors)
        self._quant = quant
        self._dtype = dtype
        self._exact = frozenset(exact)
        self._packed = Tensors()
        self._copied = 0
        """Bytes that wait in memory of their own."""

    def read_ahead(self) -> None:
        """Takes the first tensors, as far as nothing need be waited for."""
        while self._packed.nbytes < READ_AHEAD and self._take():
            pass

    def take_all(self) -> Tensors:
        while self._take():
            pass
        return self._packed

    def finish(self) -> None:
        self.packer.finish()

    def _take(self) -> bool:
        """The next tensor; False where there is none."""
        found = next(self._tensors, None)
        if found is None:
            return False
        name, tensor = found
        packed = self._packed
        if name in packed.weights or name in packed.vectors:
            raise WeightsMismatch(f"tensor {shorten(name)} came twice")
        if len(tensor.shape) == 1:
            packed.vectors[name] = np.array(tensor.dequantise(), np.float32)
            packed.nbytes += packed.vectors[name].nbytes
            return True
        if len(tensor.shape) != 2:
            raise WeightsMismatch(f"tensor {shorten(name)} has shape {tensor.shape}, needed one or two dimensions")
        if name in self._exact:
            weight = _dense(self.packer, tensor, "f32")
        else:
            quant = "int8" if self._quant == "int4" and name == EMBED else self._quant
            weight = _pack(self.packer, tensor, quant, self._dtype, behind=True)
            self._make_room(tensor)
        packed.weights[name] = weight
        packed.nbytes += weight.nbytes
        return True

    def _make_room(self, tensor: QTensor) -> None:
        """What is not a view of a file, such as joined rows, is a copy: few of them may wait at a time."""
        planes = tensor.planes.stored if isinstance(tensor.planes, Reordered) else tensor.planes
        if any(mapped_file(plane) is None for plane in planes.values()):
            self._copied += tensor.nbytes
        if self._copied > MOST_COPIED:
            self.packer.finish()
            self._copied = 0


def pack_all(
    tensors: Iterable[tuple[str, QTensor]], packer: _kernels.Packer, quant: str, dtype: str, exact: Iterable[str] = ()
) -> Tensors:
    """All of `Packing` at once."""
    packing = Packing(tensors, packer, quant, dtype, exact)
    packed = packing.take_all()
    packing.finish()
    return packed


def _pack(packer: _kernels.Packer, tensor: QTensor, quant: str, dtype: str, behind: bool = False) -> _kernels.Weight:
    if quant == "none":
        return _dense(packer, tensor, COMPUTE_TYPES[dtype])
    if tensor.scheme not in PLAIN and (stored := _stored(packer, tensor, behind)) is not None:
        return stored
    if quant in ("int8", "int4") and tensor.shape[1] % GROUP == 0:
        source = tensor if tensor.scheme in PLAIN else QTensor.from_array(tensor.dequantise())
        return _kernels.quantise_numbers(packer, int(quant[3:]), _numbers(source), source.scheme)
    return _dense(packer, tensor, tensor.scheme if tensor.scheme in PLAIN else "f32")


def _numbers(tensor: QTensor) -> NDArray[np.generic]:
    data = tensor.planes["data"]
    return data if data.strides[-1] == data.itemsize else np.ascontiguousarray(data)


def _dense(packer: _kernels.Packer, tensor: QTensor, target: str) -> _kernels.Weight:
    source = tensor if tensor.scheme in PLAIN else QTensor.from_array(tensor.dequantise())
    return _kernels.pack_numbers(packer, _numbers(source), source.scheme, target)


def _stored(packer: _kernels.Packer, tensor: QTensor, behind: bool = False) -> _kernels.Weight | None:
    """As the checkpoint packs it; None where no kernel reads that. `behind`: the packer may go on with it."""
    rows, columns = tensor.shape
    if tensor.scheme in SCHEMES:
        moved = tensor.planes if isinstance(tensor.planes, Reordered) else None
        stored, order = (tensor.planes, None) if moved is None else (moved.stored, moved.order)
        planes = [stored[name] for name, _, _ in SCHEMES[tensor.scheme].record]
        return _kernels.pack_blocks(packer, tensor.scheme, planes, rows, columns, order, behind, mapped_file(planes[0]))
    if tensor.scheme == "fp8" or ORDER in tensor.planes or tensor.group % GROUP:
        return None
    bits = 4 if tensor.scheme.startswith("int4") else 8
    numbers = tensor.planes["q"]
    # int8 codes are shifted to 0 … 255, so that 128 means zero.
    codes = unpack_nibbles(numbers) if bits == 4 else np.ascontiguousarray(numbers).view(np.uint8) ^ np.uint8(128)
    zero = 8 if bits == 4 else 128
    scales = np.ascontiguousarray(scale_values(tensor.planes["s"]))
    minima = None
    if "z" in tensor.planes:
        zeros = tensor.planes["z"].astype(np.float32) + np.float32(0 if bits == 4 else 128)
        with np.errstate(invalid="ignore", over="ignore"):  # a scale that is not finite gives such values
            minima, zero = -zeros * scales, 0
    return _kernels.pack_scaled(packer, bits, np.ascontiguousarray(codes), scales, minima, zero)
