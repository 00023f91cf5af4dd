"""Which queries meet which keys in a step: worked out once, used by every layer.

Spans of one token (decode) are attended in a few padded calls of many rows, longer spans in tiles of `TILE` queries
that each see the context up to the tile's end. How spans are grouped never shows in their bits (`ops.attention`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from headrace.backends.rows import Batch, IntArray
from headrace.backends.torch import ops
from headrace.backends.torch.kvstore import KVStore
from headrace.core.spec import AttentionSpec

TILE = 64
"""Most queries of a span in one call, unless another number is asked for."""
MAX_KEYS = 32768
"""Most keys, all rows together, in one call: bounds the copies of K and V."""


@dataclass(frozen=True, slots=True, eq=False)
class Tile:
    """One call of attention: R rows with n queries each."""

    queries: Tensor | slice
    """[R × n] places in the flat arrays."""
    runs: Tensor
    """[R × KV heads × blocks] (block, head) pairs to gather."""
    hidden: dict[int | None, Tensor]
    """Window -> (R, M, L), True where the query does not see the key; M: n × query heads a KV head, padded."""


@dataclass(frozen=True, slots=True, eq=False)
class Meeting:
    """A step's attention, for all layers that have the same heads."""

    tiles: list[Tile]
    places: Tensor
    """Where the tokens' keys and values go in a layer's KV."""
    mixed: Tensor
    """(T, heads, head dim) What comes out: written by one layer after another, zero for the rows of padding."""


def meeting(
    batch: Batch,
    like: AttentionSpec,
    windows: Sequence[int | None],
    store: KVStore,
    mixed: Tensor,
    query_tile: int | None = TILE,
) -> Meeting:
    """`like`: one of the layers; `windows`: those that occur among them; `mixed`: zeros; `query_tile`: most queries of
    a span in one call, None: all of them, with the whole matrix of their scores."""
    places = store.places(torch.from_numpy(batch.slots), like.kv_heads)
    return Meeting(tiles(batch, like, windows, store, query_tile), places, mixed)


def tiles(
    batch: Batch,
    attention: AttentionSpec,
    windows: Sequence[int | None],
    store: KVStore,
    query_tile: int | None = TILE,
) -> list[Tile]:
    """All queries of a step. `windows`: those that occur among the layers."""
    groups = [*_single_groups(batch, store.block_size), *_span_tiles(batch, query_tile)]
    return [_tile(batch, spans, first, count, attention, windows, store) for spans, first, count in groups]


def attend(tile: Tile, layer: int, spec: AttentionSpec, q_THD: Tensor, out_THD: Tensor, store: KVStore) -> None:
    """Puts the attention of the tile's queries into their places of `out_THD`."""
    hidden = tile.hidden[spec.window]
    rows, padded, length = hidden.shape
    heads, per_head = spec.kv_heads, spec.heads // spec.kv_heads
    q = q_THD[tile.queries].view(rows, -1, heads, per_head, spec.head_dim)
    count = q.shape[1] * per_head
    q = q.transpose(1, 2).reshape(rows * heads, count, spec.head_dim)
    if padded > count:
        q = functional.pad(q, (0, 0, 0, padded - count))
    keys, values = (x.view(rows * heads, length, spec.head_dim) for x in store.gather(layer, tile.runs))
    mixed = ops.attention(q, keys, values, hidden, spec.scale, spec.softcap)[:, :count]
    mixed = mixed.view(rows, heads, -1, per_head, spec.head_dim).transpose(1, 2)
    out_THD[tile.queries] = mixed.reshape(-1, spec.heads, spec.head_dim)


def _single_groups(batch: Batch, block_size: int) -> Iterator[tuple[IntArray, int, int]]:
    """Spans of one token, those of like context together."""
    singles = np.flatnonzero(batch.lengths == 1)
    singles = singles[np.argsort(batch.contexts[singles], kind="stable")]
    while len(singles):
        # From the longest down: the group's padded length is that of its last.
        size = max(1, MAX_KEYS // _padded(int(batch.contexts[singles[-1]]), block_size))
        yield np.sort(singles[-size:]), 0, 1
        singles = singles[:-size]


def _span_tiles(batch: Batch, query_tile: int | None) -> Iterator[tuple[IntArray, int, int]]:
    for span in np.flatnonzero(batch.lengths > 1):
        length = int(batch.lengths[span])
        most = query_tile or length
        for first in range(0, length, most):
            yield np.array([span]), first, min(most, length - first)


def _padded(length: int, block_size: int) -> int:
    """A length in whole blocks and whole chunks."""
    unit = math.lcm(ops.KEY_CHUNK, block_size)
    return -(-length // unit) * unit


def _tile(
    batch: Batch,
    spans: IntArray,
    first: int,
    count: int,
    spec: AttentionSpec,
    windows: Sequence[int | None],
    store: KVStore,
) -> Tile:
    """Queries [first, first + count) of each of these spans."""
    if len(spans) < (rows := -(-ops.batch_minimum(spec.head_dim) // spec.kv_heads)):
        spans = np.resize(spans, rows)  # the same rows again: their bits are the same as well
    flat = (batch.starts[spans] + first)[:, None] + np.arange(count)
    positions = batch.positions[flat]
    length = _padded(int(positions.max()) + 1, store.block_size)
    num_blocks = length // store.block_size
    nobody = len(store.layers[0][0]) - 1
    table = np.full((len(spans), num_blocks), nobody, np.int64)
    known = batch.block_tables[spans, :num_blocks]
    table[:, : known.shape[1]] = known
    runs = table[:, None, :] * spec.kv_heads + np.arange(spec.kv_heads)[:, None]
    hidden = {window: _hidden(positions, length, spec.heads // spec.kv_heads, window) for window in windows}
    return Tile(_as_slice(flat.ravel()), torch.from_numpy(runs.ravel()), hidden)


def _hidden(positions_Rn: IntArray, length: int, per_head: int, window: int | None) -> Tensor:
    keys = np.arange(length)
    seen_from = positions_Rn[:, :, None]
    hidden = keys > seen_from
    if window is not None:
        hidden |= keys <= seen_from - window
    hidden = np.repeat(hidden, per_head, axis=1)
    # Rows of padding see every key: a row that sees none would be NaN, and slow.
    padding = -hidden.shape[1] % ops.QUERY_MULTIPLE
    return torch.from_numpy(np.pad(hidden, ((0, 0), (0, padding), (0, 0))))


def _as_slice(flat: IntArray) -> Tensor | slice:
    """A run of places as a slice, which copies nothing."""
    if len(flat) == 1 or bool((np.diff(flat) == 1).all()):
        return slice(int(flat[0]), int(flat[-1]) + 1)
    return torch.from_numpy(flat)
