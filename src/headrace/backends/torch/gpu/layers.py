"""A layer's parts on a GPU: the meaning of `torch/layers.py`, in as few kernels as that takes.

Between two parts the residual stream is a pair (hidden, branch): what a part gives is added to the hidden states, in
place, by the kernel that computes the next norm. T: rows of the step, padding of a graph's bucket included.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from headrace.backends.torch.adapters import RowAdapters
from headrace.backends.torch.build import Builder, Kit
from headrace.backends.torch.gpu.slots import GpuLinear, GpuNorm, GpuSlots
from headrace.backends.torch.gpu.store import LayerCache
from headrace.backends.torch.kernels.activation import activate, gated
from headrace.backends.torch.kernels.attention import Spans, Splits, Workspace, paged_attention
from headrace.backends.torch.kernels.experts import experts_mlp
from headrace.backends.torch.kernels.rope import Rotary, rope_and_store
from headrace.backends.torch.kernels.routing import route
from headrace.backends.torch.layers import as_is
from headrace.backends.torch.packed.plain import PlainWeight
from headrace.backends.torch.parameters import Linear
from headrace.core.errors import UnsupportedModel
from headrace.core.spec import AttentionSpec, MlpSpec, MoeSpec
from headrace.models.names import layer as name_in_layer

Rows = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """What all layers of a step share, on the device."""

    positions: Tensor
    """[T] int32"""
    slots: Tensor
    """[T] int32; -1: a row of padding."""
    spans: Spans
    block_tables: Tensor
    splits: Splits
    workspace: Workspace
    capability: int
    """Of the device: 10 × major + minor."""
    rotaries: Sequence[Rotary]
    caches: Sequence[LayerCache]
    """By layer."""
    mixed: Tensor
    """(at least T, widest heads × head dim) What attention gives. Rows of padding keep what they had: numbers."""
    adapters: RowAdapters | None


class Mlp(Protocol):
    def __call__(self, x_TH: Tensor, step: Step) -> Tensor: ...


@dataclass(slots=True)
class Attention:
    spec: AttentionSpec
    layer: int
    meeting: int
    """Nothing on a GPU."""
    turn: int | None
    """Which rotary embedding, if any."""
    qkv: GpuLinear
    q_norm: Any
    """A norm of each head, or `as_is`."""
    k_norm: Any
    o: GpuLinear

    def __call__(self, x_TH: Tensor, step: Step) -> Tensor:
        spec, cache = self.spec, step.caches[self.layer]
        qkv = self.qkv(x_TH, step.adapters)
        rotary = None if self.turn is None else step.rotaries[self.turn]
        q_norm, k_norm = (None if norm is as_is else norm for norm in (self.q_norm, self.k_norm))
        rope_and_store(
            qkv,
            step.positions,
            step.slots,
            rotary,
            spec,
            q_norm,
            k_norm,
            cache.keys,
            cache.values,
            cache.key_scales,
            cache.value_scales,
        )
        width = spec.heads * spec.head_dim
        mixed = step.mixed[: len(qkv), :width]
        paged_attention(
            qkv[:, :width].view(len(qkv), spec.heads, spec.head_dim),
            cache.keys,
            cache.values,
            mixed.view(len(qkv), spec.heads, spec.head_dim),
            step.spans,
            step.block_tables,
            scale=spec.scale,
            window=spec.window,
            softcap=spec.softcap,
            k_scales=cache.key_scales,
            v_scales=cache.value_scales,
            splits=step.splits,
            workspace=step.workspace,
            capability=step.capability,
        )
        return self.o(mixed, step.adapters)


@dataclass(slots=True)
class GatedMlp:
    gate_up: GpuLinear
    down: GpuLinear
    activation: str

    def __call__(self, x: Tensor, step: Step) -> Tensor:
        weight = self.gate_up.weight
        if step.adapters is None and isinstance(weight, PlainWeight) and weight.fuses_gate(len(x)):
            return self.down(weight.gated(x, self.gate_up.bias, self.activation))
        return self.down(gated(self.gate_up(x, step.adapters), self.activation), step.adapters)


@dataclass(slots=True)
class PlainMlp:
    up: GpuLinear
    down: GpuLinear
    activation: str

    def __call__(self, x: Tensor, step: Step) -> Tensor:
        return self.down(activate(self.up(x, step.adapters), self.activation), step.adapters)


@dataclass(slots=True)
class Experts:
    """In place of a layer's MLP. Adapters do not reach inside."""

    spec: MoeSpec
    router: Linear
    up: Tensor
    """(experts, inner or, gate and up under one another where it is gated, 2 × inner, hidden size)"""
    down: Tensor
    """(experts, hidden size, inner)"""
    activation: str
    gated: bool
    invariant: bool

    def __call__(self, x: Tensor, step: Step) -> Tensor:
        scores = self.router(x.float(), step.adapters)
        weights_TK, chosen_TK = route(scores, self.spec.experts_per_token, self.spec.normalise_weights)
        return experts_mlp(
            x,
            weights_TK,
            chosen_TK,
            self.up,
            self.down,
            None,
            self.activation,
            gated=self.gated,
            invariant=self.invariant,
        )


@dataclass(slots=True)
class Sequential:
    """Attention, then the MLP, each beside its residual. `after_…`: norm and scale of what is added to it."""

    pre_attn: Any
    attention: Attention
    after_attn: Rows
    pre_mlp: Any
    mlp: Mlp
    after_mlp: Rows

    def __call__(self, hidden_TH: Tensor, branch_TH: Tensor | None, step: Step) -> Tensor:
        """The new branch; `branch_TH` goes into `hidden_TH`."""
        branch = self.after_attn(self.attention(joined(hidden_TH, branch_TH, self.pre_attn), step))
        return self.after_mlp(self.mlp(joined(hidden_TH, branch, self.pre_mlp), step))


@dataclass(slots=True)
class Parallel:
    """Attention and MLP read the same rows (GPT-J)."""

    pre_attn: Any
    attention: Attention
    mlp: Mlp
    after: Rows

    def __call__(self, hidden_TH: Tensor, branch_TH: Tensor | None, step: Step) -> Tensor:
        normed = joined(hidden_TH, branch_TH, self.pre_attn)
        return self.after(self.attention(normed, step) + self.mlp(normed, step))


def joined(hidden_TH: Tensor, branch_TH: Tensor | None, norm: Any) -> Tensor:
    """Adds the branch to the hidden states, in place, and gives the norm of the sum."""
    if branch_TH is None:
        normed: Tensor = norm(hidden_TH)
        return normed
    if isinstance(norm, GpuNorm):
        return norm.joined(hidden_TH, branch_TH)
    hidden_TH.add_(branch_TH)
    return hidden_TH


def make_kit(invariant: bool, packed: bool) -> Kit:
    """What `build` makes layers of. `invariant`: one configuration of every kernel; `packed`: weights are rounded at
    load."""

    def experts(builder: Builder, index: int, mlp: MlpSpec, spec: MoeSpec) -> Experts:
        if packed:
            raise UnsupportedModel(
                "quant: a mixture of experts runs with plain weights on a GPU (quant none or stored)"
            )
        parts = ("gate", "up") if mlp.gated else ("up",)
        names = [f"mlp.experts.{expert}" for expert in range(spec.num_experts)]
        inner, hidden = spec.intermediate, builder.hidden_size
        slots = builder.slots
        assert isinstance(slots, GpuSlots)
        ups = [[name_in_layer(index, f"{name}.{part}") for part in parts] for name in names]
        downs = [[name_in_layer(index, f"{name}.down")] for name in names]
        return Experts(
            spec=spec,
            router=builder.router(index, spec.num_experts),
            up=slots.experts(ups, inner, hidden),
            down=slots.experts(downs, hidden, inner),
            activation=mlp.activation,
            gated=mlp.gated,
            invariant=invariant,
        )

    return Kit(Sequential, Parallel, Attention, GatedMlp, PlainMlp, experts)
