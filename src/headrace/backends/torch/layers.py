"""A layer's parts. What a spec's fields ask for is put together when the model is loaded, not looked up in a step.

T: tokens and, after them, rows of padding; H: hidden size, D: head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from headrace.backends.torch import ops
from headrace.backends.torch.adapters import RowAdapters
from headrace.backends.torch.attention import Meeting, attend
from headrace.backends.torch.kvstore import KVStore
from headrace.backends.torch.parameters import Linear, Norm
from headrace.backends.torch.rope import apply_rope
from headrace.core.spec import AttentionSpec

Rows = Callable[[Tensor], Tensor]
"""Works on each row by itself."""


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """What all layers of a step share."""

    count: int
    """Tokens; the rows after them are padding."""
    turns: Sequence[tuple[Tensor, Tensor]]
    """cos and sin of the tokens, for each rotary embedding of the model."""
    meetings: Sequence[Meeting]
    """For each kind of heads of the model."""
    store: KVStore
    adapters: RowAdapters | None
    """Of the tokens; None: no token has one."""


Layer = Callable[[Tensor, Step], Tensor]
"""From the hidden states before it to those after it."""


class Mlp(Protocol):
    def __call__(self, x_TH: Tensor, count: int, adapters: RowAdapters | None) -> Tensor:
        """`count`: how many rows are tokens; what the others give is not used. `adapters`: of these rows."""


@dataclass(slots=True)
class Attention:
    spec: AttentionSpec
    layer: int
    """Whose KV it is."""
    meeting: int
    turn: int | None
    """Which rotary embedding, if any."""
    qkv: Linear
    """One product for three: their rows lie under one another."""
    q_norm: Rows
    k_norm: Rows
    o: Linear

    def __call__(self, x_TH: Tensor, step: Step) -> Tensor:
        spec = self.spec
        heads = self.qkv(x_TH, step.adapters)[: step.count].view(step.count, -1, spec.head_dim)
        q, k, v = heads.split((spec.heads, spec.kv_heads, spec.kv_heads), dim=1)
        q, k = self.q_norm(q), self.k_norm(k)
        if self.turn is not None and spec.rope is not None:
            cos, sin = step.turns[self.turn]
            q, k = (apply_rope(x, cos, sin, spec.rope.interleaved) for x in (q, k))
        meeting = step.meetings[self.meeting]
        step.store.write(self.layer, meeting.places, k, v)
        for tile in meeting.tiles:
            attend(tile, self.layer, spec, q, meeting.mixed, step.store)
        return self.o(meeting.mixed.flatten(1), step.adapters)


@dataclass(slots=True)
class GatedMlp:
    gate_up: Linear
    """One product for two."""
    down: Linear
    activation: str

    def __call__(self, x_TH: Tensor, count: int, adapters: RowAdapters | None) -> Tensor:
        return self.down(ops.gated(self.gate_up(x_TH, adapters), self.activation), adapters)


@dataclass(slots=True)
class PlainMlp:
    up: Linear
    down: Linear
    activation: str

    def __call__(self, x_TH: Tensor, count: int, adapters: RowAdapters | None) -> Tensor:
        return self.down(ops.activate(self.up(x_TH, adapters), self.activation), adapters)


@dataclass(slots=True)
class Sequential:
    """Attention, then the MLP, each beside its residual. `after_…`: norm and scale of what is added to it."""

    pre_attn: Rows
    attention: Attention
    after_attn: Rows
    pre_mlp: Rows
    mlp: Mlp
    after_mlp: Rows

    def __call__(self, hidden_TH: Tensor, step: Step) -> Tensor:
        hidden_TH = hidden_TH + self.after_attn(self.attention(self.pre_attn(hidden_TH), step))
        return hidden_TH + self.after_mlp(self.mlp(self.pre_mlp(hidden_TH), step.count, step.adapters))


@dataclass(slots=True)
class Parallel:
    """Attention and MLP read the same rows (GPT-J)."""

    pre_attn: Rows
    attention: Attention
    mlp: Mlp
    after: Rows

    def __call__(self, hidden_TH: Tensor, step: Step) -> Tensor:
        normed = self.pre_attn(hidden_TH)
        return hidden_TH + self.after(self.attention(normed, step) + self.mlp(normed, step.count, step.adapters))


def as_is(x: Tensor) -> Tensor:
    return x


def after(norm: Norm | None, scale: float) -> Rows:
    """What a branch goes through before it is added to the residual."""
    if scale == 1.0:
        return norm or as_is
    first = norm or as_is
    return lambda x: first(x) * scale
