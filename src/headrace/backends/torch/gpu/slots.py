"""Where named tensors go on a GPU: products whose weights may be packed, and experts that lie side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from headrace.backends.torch.adapters import Delta, Product, RowAdapters
from headrace.backends.torch.kernels.norm import add_norm, norm
from headrace.backends.torch.parameters import Hole, Norm, Slots
from headrace.backends.torch.parameters import copy as copy_values
from headrace.core.spec import NormSpec
from headrace.weights.qtensor import QTensor


class Weight(Protocol):
    """A product's weight on the device, as its form keeps it (`packed/`)."""

    @property
    def shape(self) -> tuple[int, int]: ...

    @property
    def nbytes(self) -> int: ...

    def put(self, start: int, tensor: QTensor) -> None:
        """Rows [start, start + n)."""

    def finish(self) -> None:
        """Once all rows have come."""

    def __call__(self, x_MK: Tensor, bias_N: Tensor | None) -> Tensor:
        """(M, N) in x's type."""


MakeWeight = Callable[..., Weight]
"""From the tensors of a product, whose rows lie under one another."""


@dataclass(slots=True)
class GpuLinear:
    """What `parameters.Linear` is on a CPU."""

    bias: Tensor | None
    weight: Any = None
    """A `Weight`; None until its tensors have come."""
    deltas: dict[str, Delta] = field(default_factory=dict)
    product: Product = functional.linear
    """With the weights of adapters."""

    def __call__(self, x: Tensor, adapters: RowAdapters | None = None) -> Tensor:
        y: Tensor = self.weight(x, self.bias)
        return y if adapters is None else self.adapted(y, x, adapters)

    def adapted(self, y: Tensor, x: Tensor, adapters: RowAdapters) -> Tensor:
        """y, with what the adapters of x's rows add to it."""
        for group in adapters.groups if self.deltas else ():
            if (delta := self.deltas.get(group.name)) is not None:
                delta.add_to(y, x, group, self.product)
        return y


@dataclass(slots=True)
class GpuNorm(Norm):
    def __call__(self, x: Tensor) -> Tensor:
        """Over the last dimension."""
        return norm(x.reshape(-1, self.spec.width), self.weight, self.bias, self.spec).view(x.shape)

    def joined(self, hidden_TH: Tensor, branch_TH: Tensor) -> Tensor:
        """Adds the branch to the hidden states, in place, and gives the norm of the sum."""
        return add_norm(hidden_TH, branch_TH, self.weight, self.bias, self.spec)


class GpuSlots(Slots):
    """`layers`: how the weights of the decoder's layers are kept; `plain`: those of everything else, in another type if
    one is given; `tied`: the embedding, where that is the head as well; `product`: with the weights of adapters."""

    def __init__(
        self,
        dtype: torch.dtype,
        device: torch.device,
        layers: MakeWeight,
        plain: MakeWeight,
        tied: Callable[[Tensor], Weight],
        product: Product,
    ) -> None:
        super().__init__(dtype, device)
        self._layers, self._plain, self._tied, self._product = layers, plain, tied, product

    def linear(self, names: Mapping[str, int], width: int, bias: bool, dtype: torch.dtype | None = None) -> Any:
        linear = GpuLinear(self._biases(names) if bias else None, product=self._product)
        come: dict[str, QTensor] = {}
        in_layers = all(name.startswith("layers.") for name in names)
        make = self._layers if in_layers and dtype is None else partial(self._plain, dtype=dtype)

        def take(name: str, tensor: QTensor) -> None:
            come[name] = tensor
            if len(come) == len(names):
                linear.weight = make([come[one] for one in names])
                self.num_bytes += linear.weight.nbytes
                come.clear()

        for name, rows in names.items():
            self.holes[f"{name}.weight"] = Hole((rows, width), partial(take, name))
        self.place(names, linear.deltas, width, dtype or self.dtype)
        return linear

    def tied_linear(self, name: str, weight: Tensor, bias: bool) -> Any:
        biases = self._biases({name: len(weight)}) if bias else None
        linear = GpuLinear(biases, self._tied(weight), product=self._product)
        self.place({name: len(weight)}, linear.deltas, weight.shape[1], weight.dtype)
        return linear

    def norm(self, name: str, spec: NormSpec) -> Norm:
        made = super().norm(name, spec)
        self.norms[-1] = GpuNorm(made.spec, made.weight, made.bias)
        return self.norms[-1]

    def experts(self, names: Sequence[Sequence[str]], rows: int, width: int) -> Tensor:
        """(experts, names an expert × rows, width): each expert's named tensors under one another, in `dtype`."""
        made = torch.empty(len(names), len(names[0]), rows, width, dtype=self.dtype, device=self.device)
        self.num_bytes += made.nbytes
        for expert, named in zip(made, names, strict=True):
            for view, name in zip(expert, named, strict=True):
                self.holes[f"{name}.weight"] = Hole((rows, width), partial(copy_values, view))
        return made.flatten(1, 2)

    def pack(self) -> None:
        """Done as the tensors came."""
