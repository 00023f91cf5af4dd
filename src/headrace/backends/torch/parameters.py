"""What a model's weights are: linears and norms, and the slots through which named tensors come into them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from headrace.backends.torch import ops
from headrace.backends.torch.adapters import Delta, Place, RowAdapters
from headrace.core.errors import WeightsMismatch, shorten
from headrace.core.spec import NormSpec
from headrace.weights.qtensor import QTensor

DEQUANTISE_BYTES = 1 << 25
"""Most bytes of float32 made at once while loading."""


@dataclass(slots=True)
class Linear:
    """Every product of a step with a weight is a call of one of these. The rows of several projections may lie under
    one another."""

    weight: Tensor
    bias: Tensor | None
    deltas: dict[str, Delta] = field(default_factory=dict)
    """By adapter: what it adds."""

    def __call__(self, x: Tensor, adapters: RowAdapters | None = None) -> Tensor:
        """`adapters`: of the rows of x; None: no row has one."""
        y = ops.linear(x, self.weight, self.bias)
        if adapters is not None and self.deltas:
            for group in adapters.groups:
                if (delta := self.deltas.get(group.name)) is not None:
                    delta.add_to(y, x, group)
        return y


@dataclass(slots=True)
class Norm:
    spec: NormSpec
    weight: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        return ops.norm(x, self.weight, self.bias, self.spec)


@dataclass(slots=True)
class Slots:
    """Where each named tensor goes: views of the model's own memory."""

    dtype: torch.dtype
    views: dict[str, Tensor] = field(default_factory=dict)
    linears: list[Linear] = field(default_factory=list)
    norms: list[Norm] = field(default_factory=list)
    places: dict[str, Place] = field(default_factory=dict)
    """Of every named linear."""

    def tensor(self, name: str, *shape: int) -> Tensor:
        """What is neither a product's nor a norm's."""
        self.views[name] = torch.empty(*shape, dtype=self.dtype)
        return self.views[name]

    def linear(self, names: Mapping[str, int], width: int, bias: bool, dtype: torch.dtype | None = None) -> Linear:
        """One product for several named ones. `names`: name -> rows."""
        counts = list(names.values())
        weight = torch.empty(sum(counts), width, dtype=dtype or self.dtype)
        self.views |= zip((f"{name}.weight" for name in names), weight.split(counts), strict=True)
        return self._add(names, weight, bias)

    def tied_linear(self, name: str, weight: Tensor, bias: bool) -> Linear:
        """A product with a weight that is there already; its bias is its own."""
        return self._add({name: len(weight)}, weight, bias)

    def _add(self, names: Mapping[str, int], weight: Tensor, bias: bool) -> Linear:
        linear = Linear(weight, self._biases(names) if bias else None)
        self.linears.append(linear)
        start = 0
        for name, rows in names.items():
            self.places[name] = Place(linear.deltas, start, (rows, weight.shape[1]), weight.dtype)
            start += rows
        return linear

    def norm(self, name: str, spec: NormSpec) -> Norm:
        weight = torch.empty(spec.width, dtype=torch.float32 if spec.unit_offset else self.dtype)
        self.views[f"{name}.weight"] = weight
        self.norms.append(Norm(spec, weight, self._biases({name: spec.width}) if spec.bias else None))
        return self.norms[-1]

    def fill(self, tensors: Iterable[tuple[str, QTensor]]) -> int:
        """Every slot exactly once; then the weights get the layout they are used in, and the views go. -> bytes.

        Raises WeightsMismatch.
        """
        missing = dict(self.views)
        for name, tensor in tensors:
            if name not in missing:
                fault = "came twice" if name in self.views else "is not part of the model"
                raise WeightsMismatch(f"tensor {shorten(name)} {fault}")
            view = missing.pop(name)
            if tuple(view.shape) != tensor.shape:
                raise WeightsMismatch(f"tensor {shorten(name)} has shape {tensor.shape}, needed {tuple(view.shape)}")
            _copy(tensor, view)
        if missing:
            raise WeightsMismatch(f"{len(missing)} tensors did not come, the first is {min(missing)}")
        return self._finish()

    def _finish(self) -> int:
        num_bytes = sum(view.nbytes for view in self.views.values())
        self.views.clear()  # so that each plain weight goes as soon as it is packed
        for norm in self.norms:
            if norm.spec.unit_offset:
                norm.weight.add_(1.0)
        for linear in self.linears:
            linear.weight = ops.pack(linear.weight)
        return num_bytes

    def _biases(self, names: Mapping[str, int]) -> Tensor:
        counts = list(names.values())
        biases = torch.empty(sum(counts), dtype=self.dtype)
        self.views |= zip((f"{name}.bias" for name in names), biases.split(counts), strict=True)
        return biases


def _copy(tensor: QTensor, view: Tensor) -> None:
    """Dequantises a few rows at a time, so that a large tensor is never there twice."""
    row_bytes = 4 * math.prod(tensor.shape[1:])
    step = max(1, DEQUANTISE_BYTES // max(1, row_bytes))
    for start in range(0, tensor.shape[0], step):
        stop = min(start + step, tensor.shape[0])
        # A copy, for torch refuses to look at the read-only pages of a file.
        values = np.array(tensor.rows(start, stop).dequantise(), np.float32)
        view[start:stop].copy_(torch.from_numpy(values))
