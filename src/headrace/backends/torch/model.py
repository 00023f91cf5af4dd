"""Decoder: a ModelSpec and its tensors, run over one step's batch."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from headrace.backends.rows import Batch
from headrace.backends.torch import ops
from headrace.backends.torch.attention import attend, tiles
from headrace.backends.torch.kvstore import KVStore
from headrace.core.errors import UnsupportedModel, WeightsMismatch, shorten
from headrace.core.spec import LayerSpec, ModelSpec, NormSpec, RopeSpec
from headrace.models.names import EMBED, FINAL_NORM, HEAD, layer
from headrace.weights.qtensor import QTensor

DEQUANTISE_BYTES = 1 << 25
"""Most bytes of float32 made at once while loading."""


@dataclass(slots=True)
class Linear:
    weight: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        return ops.linear(x, self.weight, self.bias)


@dataclass(slots=True)
class Norm:
    spec: NormSpec
    weight: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        return ops.norm(x, self.weight, self.bias, self.spec)


@dataclass(slots=True)
class Layer:
    """`qkv` and `gate_up` are one product each: their rows lie under one another."""

    spec: LayerSpec
    pre_attn: Norm
    qkv: Linear
    o: Linear
    pre_mlp: Norm
    gate_up: Linear
    down: Linear


@dataclass(slots=True)
class Slots:
    """Where each named tensor goes: views of the model's own memory."""

    dtype: torch.dtype
    views: dict[str, Tensor] = field(default_factory=dict)

    def linear(self, names: dict[str, int], width: int, bias: bool) -> Linear:
        """One product for several named ones. `names`: name -> rows."""
        rows = sum(names.values())
        weight = torch.empty(rows, width, dtype=self.dtype)
        biases = torch.empty(rows, dtype=self.dtype) if bias else None
        self.views |= zip((f"{name}.weight" for name in names), weight.split(list(names.values())), strict=True)
        if biases is not None:
            self.views |= zip((f"{name}.bias" for name in names), biases.split(list(names.values())), strict=True)
        return Linear(weight, biases)

    def norm(self, name: str, spec: NormSpec) -> Norm:
        norm = Norm(spec, *(torch.empty(spec.width, dtype=self.dtype) for _ in range(2)))
        self.views[f"{name}.weight"] = norm.weight
        if spec.bias and norm.bias is not None:
            self.views[f"{name}.bias"] = norm.bias
        else:
            norm.bias = None
        return norm

    def fill(self, tensors: Iterable[tuple[str, QTensor]]) -> None:
        """Every slot exactly once. Raises WeightsMismatch."""
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


class Decoder:
    """Runs steps. Not thread-safe: one step at a time."""

    def __init__(
        self,
        spec: ModelSpec,
        tensors: Iterable[tuple[str, QTensor]],
        dtype: torch.dtype,
        max_model_len: int,
        row_multiple: int,
    ) -> None:
        """Raises UnsupportedModel naming the field that is not run, and WeightsMismatch."""
        refuse_unsupported(spec)
        self.spec = spec
        self._row_multiple = row_multiple
        slots = Slots(dtype)
        self._embedding = torch.empty(spec.vocab_size, spec.hidden_size, dtype=dtype)
        slots.views[EMBED] = self._embedding
        self._layers = [_layer(slots, index, layer_spec, spec) for index, layer_spec in enumerate(spec.layers)]
        self._final_norm = slots.norm(FINAL_NORM, spec.final_norm)
        if spec.embedding.tied:
            self._head = Linear(self._embedding, None)
        else:
            self._head = slots.linear({HEAD: spec.vocab_size}, spec.hidden_size, spec.head.bias)
        slots.fill(tensors)
        self.weight_bytes = sum(view.nbytes for view in slots.views.values())
        slots.views.clear()  # so that each plain weight goes as soon as it is packed
        for block in self._layers:
            for linear in (block.qkv, block.o, block.gate_up, block.down):
                linear.weight = ops.pack(linear.weight)
        self._head.weight = ops.pack(self._head.weight)
        if spec.embedding.tied and self._head.weight is not self._embedding:
            self.weight_bytes += self._embedding.nbytes
        self._attention = spec.layers[0].attention
        self._windows = tuple({layer_spec.attention.window for layer_spec in spec.layers})
        # A list, not a dict: a RopeSpec may hold a mapping and has no hash.
        self._rope_specs: list[RopeSpec] = []
        for layer_spec in spec.layers:
            if (rope := layer_spec.attention.rope) is not None and rope not in self._rope_specs:
                self._rope_specs.append(rope)
        self._rope_tables = [ops.rope_table(rope, max_model_len, dtype) for rope in self._rope_specs]
        ropes = [one.attention.rope for one in spec.layers]
        self._rope_of = [None if rope is None else self._rope_specs.index(rope) for rope in ropes]

    @torch.inference_mode()
    def logits(self, batch: Batch, store: KVStore) -> Tensor:
        """Computes a step, leaves K and V in the store. Returns (P, vocabulary) float32, raw."""
        count = len(batch.token_ids)
        hidden = ops.embed(torch.from_numpy(batch.token_ids), self._embedding)
        hidden = self._pad(hidden)
        positions = torch.from_numpy(batch.positions)
        ropes = [(cos[positions], sin[positions]) for cos, sin in self._rope_tables]
        places = store.places(torch.from_numpy(batch.slots), self._attention.kv_heads)
        step_tiles = tiles(batch, self._attention, self._windows, store)
        mixed = hidden.new_zeros(len(hidden), self._attention.heads, self._attention.head_dim)
        for index, block in enumerate(self._layers):
            attention = block.spec.attention
            q, k, v = _heads(block, block.qkv(block.pre_attn(hidden))[:count])
            if (turn := self._rope_of[index]) is not None:
                interleaved = self._rope_specs[turn].interleaved
                q, k = (ops.apply_rope(x, *ropes[turn], interleaved) for x in (q, k))
            store.write(index, places, k, v)
            for tile in step_tiles:
                attend(tile, index, attention, q, mixed, store)
            hidden = hidden + block.o(mixed.flatten(1))
            inner = ops.gated_mlp(block.gate_up(block.pre_mlp(hidden)), block.spec.mlp.activation)
            hidden = hidden + block.down(inner)
        wanted = hidden[torch.from_numpy(batch.logit_positions)]
        return self._head(self._final_norm(self._pad(wanted)))[: len(wanted)].float()

    def _pad(self, x: Tensor) -> Tensor:
        """Rows of zeros, up to a number at which products do not show how many rows there are."""
        return functional.pad(x, (0, 0, 0, -len(x) % self._row_multiple))


def refuse_unsupported(spec: ModelSpec) -> None:
    """Raises UnsupportedModel naming the first field whose value this backend does not run."""
    first = spec.layers[0].attention if spec.layers else None
    if first is None:
        raise UnsupportedModel("layers: none, at least one is needed")
    faults = [
        ("embedding.scale", spec.embedding.scale != 1.0),
        ("embedding.learned_positions", spec.embedding.learned_positions is not None),
        ("head.softcap", spec.head.softcap is not None),
        ("head.scale", spec.head.scale != 1.0),
        ("head.bias", spec.head.bias and spec.embedding.tied),
        ("final_norm.unit_offset", spec.final_norm.unit_offset),
        ("vision", spec.vision is not None),
    ]
    for one in spec.layers:
        attention, norms = one.attention, one.norms
        shape = (attention.heads, attention.kv_heads, attention.head_dim)
        scaling = attention.rope.scaling if attention.rope else None
        faults += [
            ("attention.q_norm", attention.q_norm is not None),
            ("attention.k_norm", attention.k_norm is not None),
            ("attention.softcap", attention.softcap is not None),
            ("attention.alibi", attention.alibi),
            ("attention.rope", attention.rope is not None and attention.rope.dim > attention.head_dim),
            ("rope.scaling", scaling is not None and scaling.kind not in ops.ROPE_SCALINGS),
            ("attention.heads that differ between layers", shape != (first.heads, first.kv_heads, first.head_dim)),
            ("attention.heads that kv_heads does not divide", bool(attention.heads % attention.kv_heads)),
            ("mlp.experts", one.mlp.experts is not None),
            ("mlp.gated = false", not one.mlp.gated),
            ("norms.pre_attn = none", norms.pre_attn is None),
            ("norms.pre_mlp = none", norms.pre_mlp is None),
            ("norms.post_attn", norms.post_attn is not None),
            ("norms.post_mlp", norms.post_mlp is not None),
            ("norms.unit_offset", any(n is not None and n.unit_offset for n in (norms.pre_attn, norms.pre_mlp))),
            ("parallel", one.parallel),
            ("residual_scale", one.residual_scale != 1.0),
        ]
    for name, refused in faults:
        if refused:
            raise UnsupportedModel(f"the torch backend does not run {name} yet (model {spec.name})")


def _layer(slots: Slots, index: int, spec: LayerSpec, model: ModelSpec) -> Layer:
    attention, mlp, norms = spec.attention, spec.mlp, spec.norms
    width = model.hidden_size
    q_rows, kv_rows = attention.heads * attention.head_dim, attention.kv_heads * attention.head_dim
    qkv = {"attn.q": q_rows, "attn.k": kv_rows, "attn.v": kv_rows}
    gate_up = {"mlp.gate": mlp.intermediate, "mlp.up": mlp.intermediate}
    assert norms.pre_attn is not None and norms.pre_mlp is not None

    def linear(rows: dict[str, int], columns: int, bias: bool) -> Linear:
        return slots.linear({layer(index, name): count for name, count in rows.items()}, columns, bias)

    return Layer(
        spec=spec,
        pre_attn=slots.norm(layer(index, "norms.pre_attn"), norms.pre_attn),
        qkv=linear(qkv, width, attention.qkv_bias),
        o=linear({"attn.o": width}, q_rows, attention.o_bias),
        pre_mlp=slots.norm(layer(index, "norms.pre_mlp"), norms.pre_mlp),
        gate_up=linear(gate_up, width, mlp.bias),
        down=linear({"mlp.down": width}, mlp.intermediate, mlp.bias),
    )


def _heads(block: Layer, qkv_TK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    attention = block.spec.attention
    heads = qkv_TK.view(len(qkv_TK), -1, attention.head_dim)
    q, k, v = heads.split((attention.heads, attention.kv_heads, attention.kv_heads), dim=1)
    return q, k, v


def _copy(tensor: QTensor, view: Tensor) -> None:
    """Dequantises a few rows at a time, so that a large tensor is never there twice."""
    row_bytes = 4 * math.prod(tensor.shape[1:])
    step = max(1, DEQUANTISE_BYTES // max(1, row_bytes))
    for start in range(0, tensor.shape[0], step):
        stop = min(start + step, tensor.shape[0])
        # A copy, for torch refuses to look at the read-only pages of a file.
        values = np.array(tensor.rows(start, stop).dequantise(), np.float32)
        view[start:stop].copy_(torch.from_numpy(values))
