"""How the attention of a model is launched: tiles, shares of long rows, and the memory that they need."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from headrace.backends.base import BackendOptions
from headrace.backends.torch.kernels.attention import (
    Splits,
    choose_splits,
    make_workspace,
    query_tile,
    workspace_bytes,
    workspace_slots,
)
from headrace.backends.torch.kernels.matmul import Card
from headrace.core.sizing import INVARIANT_CHUNK, MOST_CHUNKS
from headrace.core.spec import AttentionSpec


class AttentionPlan:
    """For layers with `heads`: a layer's attention for each kind."""

    def __init__(
        self,
        heads: Sequence[AttentionSpec],
        dtype: torch.dtype,
        options: BackendOptions,
        buckets: Sequence[int],
        device: torch.device,
        card: Card,
    ) -> None:
        major, minor = card.capability
        self.capability = 10 * major + minor
        self._processors = card.multiprocessors
        self._kv_heads = min(one.kv_heads for one in heads)
        self._max_context = options.max_model_len
        most_blocks = -(-options.max_model_len // options.block_size)
        table = most_blocks * options.block_size
        self._chunk = 64 * max(INVARIANT_CHUNK // 64, -(-table // (64 * MOST_CHUNKS))) if options.batch_invariant else 0
        self._heads, self._dtype = heads, dtype
        self._splits = {rows: self.splits(rows) for rows in buckets}
        needs = [
            (rows, one.heads, one.head_dim, workspace_slots(self.splits(rows), table))
            for rows in range(1, options.max_rows + 1)
            for one in heads
        ]
        # Parts and sums are two tensors: the largest of each.
        largest = max(needs, key=lambda need: workspace_bytes(*need))
        self.workspace = make_workspace(*largest, device)

    def queries(self, longest: int) -> int:
        """Of a span in one tile, in a step whose longest span has so many tokens."""
        if longest == 1:
            return 1
        kinds = ((one.heads, one.kv_heads, one.head_dim) for one in self._heads)
        return min(query_tile(*kind, self._dtype, longest, self._chunk) for kind in kinds)

    def splits(self, rows: int) -> Splits:
        """For a step of so many spans, some of one token."""
        return Splits(choose_splits(rows, self._kv_heads, self._max_context, self._processors), self._chunk)

    def splits_of_bucket(self, size: int) -> Splits:
        return self._splits[size]

    @property
    def nbytes(self) -> int:
        return self.workspace.partials.nbytes + self.workspace.stats.nbytes
