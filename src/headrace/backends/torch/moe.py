"""Mixture of experts: each token goes through the few MLPs that a router chooses for it (arXiv 2101.03961, 2401.04088).

A token's bits depend neither on who else goes to its experts nor on their number: each expert gets a multiple of
`row_multiple` rows, and a token's answers are added one by one, the likeliest expert's first.
T: tokens (and rows of padding after them), H: hidden size, K: experts a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from headrace.backends.torch import ops
from headrace.backends.torch.adapters import RowAdapters
from headrace.backends.torch.layers import Mlp
from headrace.backends.torch.parameters import Linear
from headrace.core.spec import MoeSpec

IntArray = NDArray[np.int64]


@dataclass(slots=True)
class Experts:
    """In place of a layer's MLP."""

    spec: MoeSpec
    router: Linear
    experts: Sequence[Mlp]
    row_multiple: int

    def __call__(self, x_TH: Tensor, count: int, adapters: RowAdapters | None) -> Tensor:
        scores = self.router(x_TH.float(), adapters)[:count]
        weights_TK, chosen_TK = ops.route(scores, self.spec.experts_per_token, self.spec.normalise_weights)
        groups = group_by_expert(chosen_TK.numpy(), self.spec.num_experts, self.row_multiple)
        gathered = x_TH.index_select(0, torch.from_numpy(groups.tokens))
        answers = torch.cat(
            [
                self.experts[expert](
                    gathered[start:stop],
                    stop - start,
                    None if adapters is None else adapters.take(groups.tokens[start:stop]),
                )
                for expert, start, stop in groups.spans
            ]
        )
        places_TK = torch.from_numpy(groups.places)
        mixed_TH = torch.zeros(x_TH.shape, dtype=torch.float32)
        for choice in range(self.spec.experts_per_token):
            mixed_TH[:count] += answers.index_select(0, places_TK[:, choice]).float() * weights_TK[:, choice, None]
        return mixed_TH.to(x_TH.dtype)


@dataclass(frozen=True, slots=True, eq=False)
class Groups:
    """The rows of a step's experts, those of an expert together."""

    tokens: IntArray
    """[rows] whose token each row is; a group is filled up with its first."""
    spans: list[tuple[int, int, int]]
    """(expert, start, stop) of every expert that has tokens."""
    places: IntArray
    """[T, K] the row of each token's choice."""


def group_by_expert(chosen_TK: IntArray, num_experts: int, row_multiple: int) -> Groups:
    """`chosen_TK`: the experts of each token, all different."""
    flat = chosen_TK.ravel()
    order = np.argsort(flat, kind="stable")
    sizes = np.bincount(flat, minlength=num_experts)
    hit = np.flatnonzero(sizes)
    sizes = sizes[hit]
    padded = -(-sizes // row_multiple) * row_multiple
    starts, firsts = np.cumsum(padded) - padded, np.cumsum(sizes) - sizes
    places = np.empty(len(flat), np.int64)
    places[order] = np.arange(len(flat)) + np.repeat(starts - firsts, sizes)
    tokens = np.repeat(order[firsts], padded)
    tokens[places] = np.arange(len(flat))
    spans = list(zip(hit.tolist(), starts.tolist(), (starts + padded).tolist(), strict=True))
    return Groups(tokens // chosen_TK.shape[1], spans, places.reshape(chosen_TK.shape))
