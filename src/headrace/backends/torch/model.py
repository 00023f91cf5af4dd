"""Decoder: a ModelSpec and its tensors, run over one step's batch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from headrace.backends import ranges as names
from headrace.backends.rows import Batch, IntArray
from headrace.backends.support import refuse_unsupported
from headrace.backends.torch import ops
from headrace.backends.torch.adapters import RowAdapters, load_adapter
from headrace.backends.torch.attention import TILE, Meeting, meeting
from headrace.backends.torch.build import PLAIN, build
from headrace.backends.torch.kvstore import KVStore
from headrace.backends.torch.layers import Layer, Step
from headrace.backends.torch.parameters import Slots
from headrace.backends.torch.ranges import Naming, Ranges
from headrace.backends.torch.rope import rope_table
from headrace.core.errors import EngineError, shorten
from headrace.core.spec import ModelSpec
from headrace.weights.lora import Adapter
from headrace.weights.qtensor import QTensor


@dataclass(frozen=True, slots=True, eq=False)
class States:
    """What a step's layers made of its tokens."""

    hidden: Tensor
    """(tokens and padding, hidden size)"""
    adapters: RowAdapters | None


class Decoder:
    """Runs steps. Not thread-safe: one step at a time."""

    def __init__(
        self,
        spec: ModelSpec,
        tensors: Iterable[tuple[str, QTensor]],
        dtype: torch.dtype,
        max_model_len: int,
        row_multiple: int,
        image_cache_bytes: int,
    ) -> None:
        """Raises UnsupportedModel naming the field that is not run, and WeightsMismatch."""
        refuse_unsupported(spec, "torch")
        self.spec = spec
        self._row_multiple = row_multiple
        slots = Slots(dtype)
        parts = build(spec, slots, PLAIN, row_multiple, image_cache_bytes)
        self._embedding, self._final_norm, self._head = parts.embedding, parts.final_norm, parts.head
        self._built: Sequence[Layer] = parts.layers
        self._layers: Sequence[Layer] = self._built
        self.vision = parts.vision
        self.weight_bytes = slots.fill(tensors)
        if self.vision is not None:
            self.vision.finish()
        self._places = parts.places
        self._adapters: set[str] = set()
        self.adapter_bytes = 0
        if spec.embedding.tied and self._head.weight is not self._embedding:
            self.weight_bytes += self._embedding.nbytes
        self._kinds = parts.kinds
        self._naming: Naming | None = None
        self._rope_tables = [rope_table(rope, max_model_len, dtype) for rope in parts.kinds.ropes]

    def load_adapter(self, adapter: Adapter) -> None:
        """Raises EngineError if the name is taken, UnsupportedModel and WeightsMismatch."""
        if adapter.name in self._adapters:
            raise EngineError(f"adapter {shorten(adapter.name)} is loaded already")
        self.adapter_bytes += load_adapter(adapter, self._places, self._row_multiple)
        self._adapters.add(adapter.name)

    def name_ranges(self, ranges: Ranges | None) -> None:
        """From now on the decoder's parts are ranges; None: no more, and it is as it was built."""
        if self._naming is not None:
            self._naming.undo()
        self._layers, self._naming = self._built, None
        if ranges is not None:
            self._naming = Naming(ranges)
            self._naming.put(self, "_final_norm", "final norm")
            self._naming.put(self, "_head", names.HEAD)
            self._layers = self._naming.layers(self._built)

    @torch.inference_mode()
    def states(self, batch: Batch, store: KVStore, query_tile: int | None = TILE) -> States:
        """Computes a step and leaves K and V in the store. `query_tile`: as in `attention.meeting`.

        Raises EngineError for an adapter that is not loaded.
        """
        for name in batch.adapters:
            if name and name not in self._adapters:
                raise EngineError(f"adapter {shorten(name)} is not loaded")
        adapters = RowAdapters.of_spans(batch.adapters, batch.lengths, self._row_multiple)
        ranged = nullcontext if self._naming is None else self._naming.ranges
        with ranged(names.EMBED):
            hidden = ops.embed(torch.from_numpy(batch.token_ids), self._embedding)
            if self.spec.embedding.scale != 1.0:
                hidden = ops.scale(hidden, self.spec.embedding.scale)
        if batch.images:
            assert self.vision is not None  # only then does the request table take images
            with ranged(names.VISION):
                self.vision.splice(batch, hidden)
        hidden = self._pad(hidden)
        with ranged(names.GATHER):
            positions = torch.from_numpy(batch.positions)
            turns = [(cos[positions], sin[positions]) for cos, sin in self._rope_tables]
            step = Step(len(batch.token_ids), turns, self._meetings(batch, store, hidden, query_tile), store, adapters)
        for layer in self._layers:
            hidden = layer(hidden, step)
        return States(hidden, adapters)

    @torch.inference_mode()
    def logits(self, states: States, places: IntArray) -> Tensor:
        """Of the tokens at these places of the step's flat arrays: (places, vocabulary) float32, raw."""
        wanted = states.hidden[torch.from_numpy(places)]
        adapters = None if states.adapters is None else states.adapters.take(places)
        logits = self._head(self._final_norm(self._pad(wanted)), adapters)[: len(wanted)].float()
        head = self.spec.head
        if head.scale != 1.0:
            logits.mul_(head.scale)
        return logits if head.softcap is None else ops.softcap(logits, head.softcap)

    def _meetings(self, batch: Batch, store: KVStore, hidden: Tensor, query_tile: int | None) -> list[Meeting]:
        meetings = []
        for like, windows in zip(self._kinds.heads, self._kinds.windows, strict=True):
            mixed = hidden.new_zeros(len(hidden), like.heads, like.head_dim)
            meetings.append(meeting(batch, like, tuple(windows), store, mixed, query_tile))
        return meetings

    def _pad(self, x: Tensor) -> Tensor:
        """Rows of zeros, up to a number at which products do not show how many rows there are."""
        return functional.pad(x, (0, 0, 0, -len(x) % self._row_multiple))
