"""What a model's weights are: linears and norms, and the slots through which named tensors come into them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial

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


@dataclass(frozen=True, slots=True, eq=False)
class Hole:
    """Where a named tensor is to go."""

    shape: tuple[int, ...]
    put: Callable[[QTensor], None]


@dataclass(slots=True)
class Slots:
    """Where each named tensor goes: views of the model's own memory."""

    dtype: torch.dtype
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    holes: dict[str, Hole] = field(default_factory=dict)
    num_bytes: int = 0
    """Of all that was made."""
    linears: list[Linear] = field(default_factory=list)
    norms: list[Norm] = field(default_factory=list)
    places: dict[str, Place] = field(default_factory=dict)
    """Of every named linear."""

    def tensor(self, name: str, *shape: int) -> Tensor:
        """What is neither a product's nor a norm's."""
        return self.stacked({name: shape[0]}, *shape[1:])

    def linear(self, names: Mapping[str, int], width: int, bias: bool, dtype: torch.dtype | None = None) -> Linear:
        """One product for several named ones. `names`: name -> rows."""
        named = {f"{name}.weight": rows for name, rows in names.items()}
        return self._add(names, self.stacked(named, width, dtype=dtype), bias)

    def tied_linear(self, name: str, weight: Tensor, bias: bool) -> Linear:
        """A product with a weight that is there already; its bias is its own."""
        return self._add({name: len(weight)}, weight, bias)

    def norm(self, name: str, spec: NormSpec) -> Norm:
        dtype = torch.float32 if spec.unit_offset else self.dtype
        weight = self.stacked({f"{name}.weight": spec.width}, dtype=dtype)
        self.norms.append(Norm(spec, weight, self._biases({name: spec.width}) if spec.bias else None))
        return self.norms[-1]

    def stacked(self, names: Mapping[str, int], *width: int, dtype: torch.dtype | None = None) -> Tensor:
        """Memory for tensors that lie under one another. `names`: name -> rows; `width`: of each row, if it has any."""
        made = torch.empty(sum(names.values()), *width, dtype=dtype or self.dtype, device=self.device)
        self.num_bytes += made.nbytes
        for name, view in zip(names, made.split(list(names.values())), strict=True):
            self.holes[name] = Hole(tuple(view.shape), partial(copy, view))
        return made

    def fill(self, tensors: Iterable[tuple[str, QTensor]]) -> int:
        """Every slot exactly once; then the weights get the layout they are used in, and the views go. -> bytes.

        Raises WeightsMismatch.
        """
        missing = dict(self.holes)
        for name, tensor in tensors:
            if name not in missing:
                fault = "came twice" if name in self.holes else "is not part of the model"
                raise WeightsMismatch(f"tensor {shorten(name)} {fault}")
            hole = missing.pop(name)
            if hole.shape != tensor.shape:
                raise WeightsMismatch(f"tensor {shorten(name)} has shape {tensor.shape}, needed {hole.shape}")
            hole.put(tensor)
        if missing:
            raise WeightsMismatch(f"{len(missing)} tensors did not come, the first is {min(missing)}")
        self.holes.clear()  # so that each plain weight goes as soon as it is packed
        for norm in self.norms:
            if norm.spec.unit_offset:
                norm.weight.add_(1.0)
        self.pack()
        return self.num_bytes

    def pack(self) -> None:
        """The weights of products get the layout they are used in."""
        for linear in self.linears:
            linear.weight = ops.pack(linear.weight)

    def _add(self, names: Mapping[str, int], weight: Tensor, bias: bool) -> Linear:
        linear = Linear(weight, self._biases(names) if bias else None)
        self.linears.append(linear)
        self.place(names, linear.deltas, weight.shape[1], weight.dtype)
        return linear

    def place(self, names: Mapping[str, int], deltas: dict[str, Delta], width: int, dtype: torch.dtype) -> None:
        """Notes where named linears are, for adapters."""
        start = 0
        for name, rows in names.items():
            self.places[name] = Place(deltas, start, (rows, width), dtype, self.device)
            start += rows

    def _biases(self, names: Mapping[str, int]) -> Tensor:
        return self.stacked({f"{name}.bias": rows for name, rows in names.items()})


def copy(view: Tensor, tensor: QTensor) -> None:
    """Dequantises a few rows at a time, so that a large tensor is never there twice."""
    row_bytes = 4 * math.prod(tensor.shape[1:])
    step = max(1, DEQUANTISE_BYTES // max(1, row_bytes))
    for start in range(0, tensor.shape[0], step):
        stop = min(start + step, tensor.shape[0])
        # A copy, for torch refuses to look at the read-only pages of a file.
        values = np.array(tensor.rows(start, stop).dequantise(), np.float32)
        view[start:stop].copy_(torch.from_numpy(values))
