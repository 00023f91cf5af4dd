"""What a ModelSpec may ask of the backends that run it from its data alone."""

from __future__ import annotations

import math

from headrace.backends.rope import SCALINGS
from headrace.core.errors import UnsupportedModel
from headrace.core.spec import ModelSpec, VisionSpec

ACTIVATIONS = frozenset({"silu", "gelu", "gelu_tanh", "relu"})
SEEING = frozenset({"torch"})
"""Backends that read images."""


def refuse_unsupported(spec: ModelSpec, backend: str) -> None:
    """Raises UnsupportedModel naming the first field whose value `backend` does not run."""
    if not spec.layers:
        raise UnsupportedModel("layers: none, at least one is needed")
    faults = [
        ("embedding.learned_positions", spec.embedding.learned_positions is not None),
    ]
    if spec.vision is not None:
        faults += _vision_faults(spec.vision) if backend in SEEING else [("vision", True)]
    for one in spec.layers:
        attention, mlp, norms = one.attention, one.mlp, one.norms
        rope, experts = attention.rope, mlp.experts
        others = (norms.post_attn, norms.pre_mlp, norms.post_mlp)
        head_norms = [norm for norm in (attention.q_norm, attention.k_norm) if norm is not None]
        faults += [
            ("attention.alibi", attention.alibi),
            ("attention.heads that kv_heads does not divide", bool(attention.heads % attention.kv_heads)),
            ("attention.q_norm or k_norm over all heads", any(n.width != attention.head_dim for n in head_norms)),
            ("attention.rope wider than a head", rope is not None and rope.dim > attention.head_dim),
            ("rope.scaling", rope is not None and rope.scaling is not None and rope.scaling.kind not in SCALINGS),
            ("mlp.activation", mlp.activation not in ACTIVATIONS),
            ("mlp.experts with biases", experts is not None and mlp.bias),
            ("mlp.experts.shared_intermediate", experts is not None and experts.shared_intermediate is not None),
            ("norms.pre_attn = none", norms.pre_attn is None),
            ("norms.pre_mlp = none", norms.pre_mlp is None and not one.parallel),
            ("norms beside pre_attn in a parallel layer", one.parallel and others != (None, None, None)),
        ]
    for name, refused in faults:
        if refused:
            raise UnsupportedModel(f"the {backend} backend does not run {name} (model {spec.name})")


def _vision_faults(vision: VisionSpec) -> list[tuple[str, bool]]:
    encoder, projector, tokens = vision.encoder, vision.projector, vision.projector.tokens
    pooled = projector.merge == "average_pool"
    width, heads_width = encoder.hidden_size, encoder.heads * encoder.head_dim
    whole = math.isqrt(max(tokens, 0)) ** 2 == tokens <= encoder.grid**2 if pooled else 4 * tokens == encoder.grid**2
    return [
        ("vision.encoder.layers below 1", encoder.layers < 1),
        ("vision.encoder.activation", encoder.activation not in ACTIVATIONS),
        ("vision.encoder.qk_norm by head", encoder.qk_norm is not None and encoder.qk_norm.width != heads_width),
        ("vision.encoder.tile_size other than the tiling's", encoder.tile_size != vision.tiling.tile_size),
        ("vision.projector.activation", projector.activation not in ACTIVATIONS),
        ("vision.projector.tokens that its merge does not give", tokens < 1 or not whole),
        ("vision.projector.width that its merge does not give", projector.width != (width if pooled else 4 * width)),
    ]
