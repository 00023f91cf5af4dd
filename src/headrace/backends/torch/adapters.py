"""LoRA in a step: which rows have which adapter, and what it adds to the outputs of a product (arXiv 2106.09685).

Only the rows of an adapter are gathered, multiplied and added to; a step without adapters knows nothing of this file.
A row's bits do not show its company: each adapter's rows are filled up to a multiple of `row_multiple`, and ranks are
padded with zeros until the products are large enough for that to hold (`ops.row_multiple`).
T: rows of x, K: columns, R: ranks of all layers that share a product, N: outputs of one layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from headrace.core.errors import UnsupportedModel, WeightsMismatch, shorten
from headrace.weights.lora import Adapter, LowRank
from headrace.weights.qtensor import QTensor

SMALL_PRODUCT = 16**3
"""Multiplications up to which torch may choose another kernel."""
NONE = -1
Product = Callable[[Tensor, Tensor], Tensor]
"""x (M, K), weight (N, K) -> (M, N)"""
CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """The rows of a step that one adapter computes."""

    name: str
    rows: Tensor
    """Their places."""
    filled: Tensor | None
    """The same, and the first again and again up to a multiple of `row_multiple`; None: all rows, in order."""

    def gather(self, x_TK: Tensor) -> Tensor:
        return x_TK if self.filled is None else x_TK.index_select(0, self.filled)

    def add(self, delta: Tensor, y_TN: Tensor) -> None:
        if self.filled is None:
            y_TN += delta
        else:
            y_TN.index_add_(0, self.rows, delta[: len(self.rows)])


class RowAdapters:
    """Which adapter each row of x has. Rows of x after these are padding."""

    def __init__(
        self, names: Sequence[str], which_T: NDArray[np.int64], row_multiple: int, device: torch.device = CPU
    ) -> None:
        """`which_T`: a place in `names` for each row, or NONE."""
        self._device = device
        self._names = names
        self._which_T = which_T
        self._row_multiple = row_multiple
        self._groups: list[Group] | None = None

    @classmethod
    def of_spans(
        cls, spans: Sequence[str], lengths: NDArray[np.int64], row_multiple: int, device: torch.device = CPU
    ) -> RowAdapters | None:
        """From the adapter of each span and its number of rows; None where no span has one."""
        names = sorted(set(spans) - {""})
        if not names:
            return None
        which = np.array([names.index(name) if name else NONE for name in spans], np.int64)
        return cls(names, np.repeat(which, lengths), row_multiple, device)

    def take(self, rows: NDArray[np.int64]) -> RowAdapters:
        """Of rows that were gathered."""
        return RowAdapters(self._names, self._which_T[rows], self._row_multiple, self._device)

    @property
    def groups(self) -> Sequence[Group]:
        if self._groups is None:
            self._groups = [self._group(i) for i in range(len(self._names)) if (self._which_T == i).any()]
        return self._groups

    def _group(self, index: int) -> Group:
        rows = np.flatnonzero(self._which_T == index)
        places = torch.from_numpy(rows).to(self._device)
        if len(rows) == len(self._which_T):
            return Group(self._names[index], places, None)
        missing = -len(rows) % self._row_multiple
        filled = np.concatenate((rows, np.full(missing, rows[0])))
        return Group(self._names[index], places, torch.from_numpy(filled).to(self._device))


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """One layer's share of a product that several layers have in common."""

    ranks: slice
    outputs: slice
    b: Tensor
    """(N, ranks), with the scale in it."""


@dataclass(frozen=True, slots=True, eq=False)
class Delta:
    """What one adapter adds to the outputs of one product."""

    a: Tensor
    """(R, K) of all its layers, under one another; layers that were one in the adapter share their rows."""
    parts: Sequence[Part]

    def add_to(self, y_TN: Tensor, x_TK: Tensor, group: Group, product: Product = functional.linear) -> None:
        inner = product(group.gather(x_TK), self.a)
        for part in self.parts:
            group.add(product(inner[:, part.ranks], part.b), y_TN[:, part.outputs])

    @property
    def nbytes(self) -> int:
        return self.a.nbytes + sum(part.b.nbytes for part in self.parts)


@dataclass(frozen=True, slots=True, eq=False)
class Place:
    """Where a named linear layer is: some outputs of a product."""

    deltas: dict[str, Delta]
    """Of the product, by adapter."""
    start: int
    shape: tuple[int, int]
    """(N, K)"""
    dtype: torch.dtype
    device: torch.device


def load_adapter(adapter: Adapter, places: Mapping[str, Place], row_multiple: int) -> int:
    """Gives every product its share; all of them or none. Returns the bytes.

    Raises UnsupportedModel for a layer that is no linear of the model, and WeightsMismatch for a shape.
    """
    whose = f"adapter {shorten(adapter.name)}"
    products: dict[int, list[tuple[Place, LowRank]]] = {}
    for name, low in adapter.weights.items():
        place = places.get(name)
        if place is None:
            raise UnsupportedModel(f"{whose}: {shorten(name)} is no linear layer that the torch backend runs")
        found, (rows, columns) = (*low.b.shape, *low.a.shape), place.shape
        rank = low.a.shape[0] if low.a.shape else 0
        if found != (rows, rank, rank, columns) or not rank:
            raise WeightsMismatch(f"{whose}: {shorten(name)}: B {low.b.shape} × A {low.a.shape} is not {place.shape}")
        products.setdefault(id(place.deltas), []).append((place, low))
    made = [(layers[0][0].deltas, _delta(layers, row_multiple, whose)) for layers in products.values()]
    for deltas, delta in made:
        deltas[adapter.name] = delta
    return sum(delta.nbytes for _, delta in made)


def _delta(layers: Sequence[tuple[Place, LowRank]], row_multiple: int, whose: str) -> Delta:
    """The layers of one product."""
    dtype, device = layers[0][0].dtype, layers[0][0].device
    stacked: dict[int, tuple[QTensor, slice]] = {}
    parts = []
    for place, low in layers:
        if id(low.a) not in stacked:
            start = max((ranks.stop for _, ranks in stacked.values()), default=0)
            stacked[id(low.a)] = low.a, slice(start, start + _padded_rank(low.a, layers, row_multiple))
        ranks = stacked[id(low.a)][1]
        rows, rank = low.b.shape
        b_NR = torch.zeros(rows, ranks.stop - ranks.start, dtype=dtype)
        b_NR[:, :rank] = _float32(low.b) * low.scale
        if not b_NR.isfinite().all():
            raise UnsupportedModel(f"{whose}: scale × B is too large for {str(dtype).removeprefix('torch.')}")
        parts.append(Part(ranks, slice(place.start, place.start + rows), b_NR.to(device)))
    a_RK = torch.zeros(max(part.ranks.stop for part in parts), layers[0][0].shape[1], dtype=dtype)
    for a, ranks in stacked.values():
        a_RK[ranks.start : ranks.start + a.shape[0]] = _float32(a)
    return Delta(a_RK.to(device), parts)


def _padded_rank(a: QTensor, layers: Sequence[tuple[Place, LowRank]], row_multiple: int) -> int:
    """At least so many that no product with `row_multiple` rows is a small one."""
    narrowest = min(a.shape[1], *(place.shape[0] for place, low in layers if low.a is a))
    return max(a.shape[0], SMALL_PRODUCT // (row_multiple * narrowest) + 1)


def _float32(tensor: QTensor) -> Tensor:
    # A copy, for torch refuses to look at the read-only pages of a file.
    return torch.from_numpy(np.array(tensor.dequantise(), np.float32))
