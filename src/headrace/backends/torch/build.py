"""From a ModelSpec to its parts: what the layers share, and which part each field becomes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from headrace.backends.torch.adapters import Place
from headrace.backends.torch.layers import Attention, GatedMlp, Parallel, PlainMlp, Sequential, after, as_is
from headrace.backends.torch.moe import Experts
from headrace.backends.torch.parameters import Linear, Norm, Slots
from headrace.backends.torch.vision.images import Vision
from headrace.core.spec import AttentionSpec, LayerSpec, MlpSpec, ModelSpec, MoeSpec, NormSpec, RopeSpec
from headrace.models.names import EMBED, FINAL_NORM, HEAD
from headrace.models.names import layer as name_in_layer


@dataclass(slots=True)
class Kinds:
    """What layers have in common, and a step works out once for all of them."""

    ropes: list[RopeSpec] = field(default_factory=list)
    """A list, not a dict: a RopeSpec may hold a mapping and has no hash."""
    heads: list[AttentionSpec] = field(default_factory=list)
    """A layer's of each kind of heads."""
    windows: list[set[int | None]] = field(default_factory=list)
    """For each kind of heads."""

    def rope(self, spec: RopeSpec | None) -> int | None:
        if spec is None:
            return None
        if spec not in self.ropes:
            self.ropes.append(spec)
        return self.ropes.index(spec)

    def meeting(self, spec: AttentionSpec) -> int:
        shapes = [(one.heads, one.kv_heads, one.head_dim) for one in self.heads]
        shape = (spec.heads, spec.kv_heads, spec.head_dim)
        if shape not in shapes:
            shapes.append(shape)
            self.heads.append(spec)
            self.windows.append(set())
        index = shapes.index(shape)
        self.windows[index].add(spec.window)
        return index


@dataclass(frozen=True, slots=True, eq=False)
class Parts:
    """A model whose weights are still to come."""

    embedding: Tensor
    layers: Sequence[Any]
    """Of the kit: a `Layer`, or `gpu.layers.Sequential` and its like."""
    final_norm: Norm
    head: Linear
    kinds: Kinds
    places: Mapping[str, Place]
    """Linears of the decoder by name: what adapters may add to."""
    vision: Vision | None


@dataclass(frozen=True, slots=True)
class Kit:
    """What layers are made of: on a CPU `PLAIN`, on a GPU that of `gpu/layers.py`, with the same fields."""

    sequential: Callable[..., Any]
    parallel: Callable[..., Any]
    attention: Callable[..., Any]
    gated_mlp: Callable[..., Any]
    plain_mlp: Callable[..., Any]
    experts: Callable[[Builder, int, MlpSpec, MoeSpec], Any]


def build(spec: ModelSpec, slots: Slots, kit: Kit, row_multiple: int, image_cache_bytes: int) -> Parts:
    """Every part of the model, each weight to come through `slots`. `row_multiple`: see `ops.row_multiple`."""
    builder = Builder(slots, kit, spec.hidden_size, row_multiple)
    embedding = slots.tensor(EMBED, spec.vocab_size, spec.hidden_size)
    layers = [builder.layer(index, layer_spec) for index, layer_spec in enumerate(spec.layers)]
    final_norm = slots.norm(FINAL_NORM, spec.final_norm)
    if spec.embedding.tied:
        head = slots.tied_linear(HEAD, embedding, spec.head.bias)
    else:
        head = slots.linear({HEAD: spec.vocab_size}, spec.hidden_size, spec.head.bias)
    places = dict(slots.places)
    vision = None if spec.vision is None else Vision(spec.vision, spec.hidden_size, slots, image_cache_bytes)
    return Parts(embedding, layers, final_norm, head, builder.kinds, places, vision)


@dataclass(slots=True)
class Builder:
    """Makes layers whose weights are filled later, through `slots`."""

    slots: Slots
    kit: Kit
    hidden_size: int
    row_multiple: int
    kinds: Kinds = field(default_factory=Kinds)

    def layer(self, index: int, spec: LayerSpec) -> Any:
        norms = spec.norms
        attention = self._attention(index, spec.attention)
        mlp = self._mlp(index, spec.mlp)
        pre_attn = self._norm(index, "norms.pre_attn", norms.pre_attn) or as_is
        if spec.parallel:
            return self.kit.parallel(pre_attn, attention, mlp, after(None, spec.residual_scale))
        return self.kit.sequential(
            pre_attn=pre_attn,
            attention=attention,
            after_attn=after(self._norm(index, "norms.post_attn", norms.post_attn), spec.residual_scale),
            pre_mlp=self._norm(index, "norms.pre_mlp", norms.pre_mlp) or as_is,
            mlp=mlp,
            after_mlp=after(self._norm(index, "norms.post_mlp", norms.post_mlp), spec.residual_scale),
        )

    def _attention(self, index: int, spec: AttentionSpec) -> Any:
        q_rows, kv_rows = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
        qkv = {"attn.q": q_rows, "attn.k": kv_rows, "attn.v": kv_rows}
        return self.kit.attention(
            spec=spec,
            layer=index,
            meeting=self.kinds.meeting(spec),
            turn=self.kinds.rope(spec.rope),
            qkv=self._linear(index, qkv, self.hidden_size, spec.qkv_bias),
            q_norm=self._norm(index, "attn.q_norm", spec.q_norm) or as_is,
            k_norm=self._norm(index, "attn.k_norm", spec.k_norm) or as_is,
            o=self._linear(index, {"attn.o": self.hidden_size}, q_rows, spec.o_bias),
        )

    def _mlp(self, index: int, spec: MlpSpec) -> Any:
        if spec.experts is not None:
            return self.kit.experts(self, index, spec, spec.experts)
        return self.dense_mlp(index, "mlp", spec, spec.intermediate)

    def dense_mlp(self, index: int, part: str, spec: MlpSpec, inner: int) -> Any:
        down = self._linear(index, {f"{part}.down": self.hidden_size}, inner, spec.bias)
        if spec.gated:
            gate_up = self._linear(index, {f"{part}.gate": inner, f"{part}.up": inner}, self.hidden_size, spec.bias)
            return self.kit.gated_mlp(gate_up, down, spec.activation)
        up = self._linear(index, {f"{part}.up": inner}, self.hidden_size, spec.bias)
        return self.kit.plain_mlp(up, down, spec.activation)

    def router(self, index: int, count: int) -> Linear:
        """float32 in every type: which experts are chosen must not hang on a rounding."""
        names = {name_in_layer(index, "mlp.router"): count}
        return self.slots.linear(names, self.hidden_size, bias=False, dtype=torch.float32)

    def _linear(self, index: int, parts: Mapping[str, int], width: int, bias: bool) -> Linear:
        return self.slots.linear({name_in_layer(index, part): rows for part, rows in parts.items()}, width, bias)

    def _norm(self, index: int, part: str, spec: NormSpec | None) -> Norm | None:
        return None if spec is None else self.slots.norm(name_in_layer(index, part), spec)


def _experts(builder: Builder, index: int, mlp: MlpSpec, spec: MoeSpec) -> Experts:
    return Experts(
        spec=spec,
        router=builder.router(index, spec.num_experts),
        experts=[
            builder.dense_mlp(index, f"mlp.experts.{expert}", mlp, spec.intermediate)
            for expert in range(spec.num_experts)
        ],
        row_multiple=builder.row_multiple,
    )


PLAIN = Kit(Sequential, Parallel, Attention, GatedMlp, PlainMlp, _experts)
