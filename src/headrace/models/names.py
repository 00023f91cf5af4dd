"""headrace's own tensor names, the same for every architecture: what a weight map's targets are called.

    embed.weight (V, H)                             final_norm.{weight,bias}
    layers.I.attn.{q,k,v,o}.{weight,bias}           head.{weight,bias}      (no head.weight where the embedding is tied)
    layers.I.attn.{q_norm,k_norm}.weight            embed.positions         (learned positions)
    layers.I.mlp.{gate,up,down}.{weight,bias}       layers.I.mlp.router.weight
    layers.I.norms.{pre_attn,post_attn,pre_mlp,post_mlp}.{weight,bias}
    layers.I.mlp.experts.E.{gate,up,down}.weight

    vision.patch.{weight,bias}  (C, 3 × p × p)                  vision.class_token (C,)      vision.positions (rows, C)
    vision.layers.I.attn.{q,k,v,o}.{weight,bias}                vision.layers.I.attn.{q_norm,k_norm}.weight
    vision.layers.I.mlp.{up,down}.{weight,bias}                 vision.layers.I.norms.{pre_attn,pre_mlp}.{weight,bias}
    vision.layers.I.scales.{attn,mlp} (C,)                      projector.norm.{weight,bias}
    projector.{up,down}.{weight,bias}

A linear layer's weight is (out, in), as in a checkpoint. A patch's numbers are channel by channel, row by row.
"""

from __future__ import annotations

EMBED = "embed.weight"
FINAL_NORM = "final_norm"
HEAD = "head"


VISION = "vision"
PROJECTOR = "projector"


def vision_layer(index: int, part: str) -> str:
    """`vision_layer(3, "attn.q.weight")` -> `vision.layers.3.attn.q.weight`"""
    return f"{VISION}.layers.{index}.{part}"


def layer(index: int, part: str) -> str:
    """`layer(3, "attn.q.weight")` -> `layers.3.attn.q.weight`"""
    return f"layers.{index}.{part}"
