"""headrace's own tensor names, the same for every architecture: what a weight map's targets are called.

    embed.weight (V, H)                             final_norm.{weight,bias}
    layers.I.attn.{q,k,v,o}.{weight,bias}           head.{weight,bias}      (no head.weight where the embedding is tied)
    layers.I.attn.{q_norm,k_norm}.weight            embed.positions         (learned positions)
    layers.I.mlp.{gate,up,down}.{weight,bias}       layers.I.mlp.router.weight
    layers.I.norms.{pre_attn,post_attn,pre_mlp,post_mlp}.{weight,bias}
    layers.I.mlp.experts.E.{gate,up,down}.weight

A linear layer's weight is (out, in), as in a checkpoint.
"""

from __future__ import annotations

EMBED = "embed.weight"
FINAL_NORM = "final_norm"
HEAD = "head"


def layer(index: int, part: str) -> str:
    """`layer(3, "attn.q.weight")` -> `layers.3.attn.q.weight`"""
    return f"layers.{index}.{part}"
