"""The decoder on a GPU: a ModelSpec and its tensors, run over one step's arrays."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from headrace.backends.base import BackendOptions
from headrace.backends.rows import Batch
from headrace.backends.support import refuse_unsupported
from headrace.backends.torch import ops
from headrace.backends.torch.adapters import RowAdapters, load_adapter
from headrace.backends.torch.build import build
from headrace.backends.torch.gpu.layers import Step, make_kit
from headrace.backends.torch.gpu.slots import GpuSlots
from headrace.backends.torch.gpu.staging import StepArrays
from headrace.backends.torch.gpu.weights import Forms
from headrace.backends.torch.kernels.embed import embed, take_rows
from headrace.backends.torch.kernels.matmul import Card
from headrace.backends.torch.kernels.rope import rotary
from headrace.core.errors import EngineError, shorten
from headrace.core.spec import AttentionSpec, ModelSpec
from headrace.weights.lora import Adapter
from headrace.weights.qtensor import QTensor

ROW_MULTIPLE = 1
"""Rows of an adapter's products are not filled up: which kernel a library takes is not promised on a GPU."""


class GpuDecoder:
    """Launches steps. Not thread-safe: one step at a time."""

    def __init__(
        self,
        spec: ModelSpec,
        tensors: Iterable[tuple[str, QTensor]],
        options: BackendOptions,
        dtype: torch.dtype,
        device: torch.device,
        card: Card,
    ) -> None:
        """Raises UnsupportedModel naming the field that is not run, and WeightsMismatch."""
        refuse_unsupported(spec, "torch")
        self.spec = spec
        self.forms = Forms(options.quant, dtype, device, options.batch_invariant, card)
        slots = GpuSlots(dtype, device, self.forms.of_layers, self.forms.plain, self.forms.tied, self.forms.product)
        kit = make_kit(options.batch_invariant, options.quant in ("int4", "int8", "fp8"))
        parts = build(spec, slots, kit, ROW_MULTIPLE, options.image_cache_bytes)
        self._embedding, self._final_norm, self._head = parts.embedding, parts.final_norm, parts.head
        self._layers = parts.layers
        self.vision = parts.vision
        self.weight_bytes = slots.fill(tensors)
        if self.vision is not None:
            self.vision.finish()
        self._places = parts.places
        self._adapters: set[str] = set()
        self.adapter_bytes = 0
        self.kinds = parts.kinds
        self.rotaries = [rotary(rope, options.max_model_len, device) for rope in parts.kinds.ropes]

    @property
    def heads(self) -> Sequence[AttentionSpec]:
        """A layer's attention for each kind of heads."""
        return self.kinds.heads

    def load_adapter(self, adapter: Adapter) -> None:
        """Raises EngineError if the name is taken, UnsupportedModel and WeightsMismatch."""
        if adapter.name in self._adapters:
            raise EngineError(f"adapter {shorten(adapter.name)} is loaded already")
        self.adapter_bytes += load_adapter(adapter, self._places, ROW_MULTIPLE)
        self._adapters.add(adapter.name)

    def has_adapter(self, name: str) -> bool:
        return not name or name in self._adapters

    def adapters(self, batch: Batch, device: torch.device) -> RowAdapters | None:
        return RowAdapters.of_spans(batch.adapters, batch.lengths, ROW_MULTIPLE, device)

    def states(self, arrays: StepArrays, last: Tensor, step: Step, images: Batch | None = None) -> Tensor:
        """(T, H) What the layers make of the step's tokens; K and V are left in the caches. `images`: the batch whose
        images are put over their placeholders. A step may be captured in a graph where it has none, and no adapters."""
        hidden = embed(arrays.token_ids, last, arrays.token_rows, self._embedding, self.spec.embedding.scale)
        if images is not None:
            assert self.vision is not None  # only then does the request table take images
            self.vision.splice(images, hidden)
        branch = None
        for layer in self._layers:
            branch = layer(hidden, branch, step)
        assert branch is not None
        return hidden.add_(branch)

    def logits(self, hidden_TH: Tensor, places: Tensor | None, adapters: RowAdapters | None = None) -> Tensor:
        """(places, vocabulary), raw: of these rows, or of all; `adapters`: of these rows."""
        wanted = hidden_TH if places is None else take_rows(hidden_TH, places)
        logits = self._head(self._final_norm(wanted), adapters)
        head = self.spec.head
        if head.scale != 1.0:
            logits = logits.float().mul_(head.scale)
        return logits if head.softcap is None else ops.softcap(logits, head.softcap)
