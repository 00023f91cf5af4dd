"""The only formulas for arithmetic, and for the bytes that a step or a rank moves: `sizing` in motion.

A multiply-add is two FLOPs. Norms, biases, rotary angles and softmax are left out, as published counts do.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import groupby

from headrace.core.sizing import (
    CHANNELS,
    Matrix,
    end_weights,
    kv_bytes_per_token,
    layer_weights,
    projector_weights,
    tensor_parallel_bytes,
)
from headrace.core.spec import LayerSpec, ModelSpec


def layer_products(layer: LayerSpec, hidden: int) -> Iterator[Matrix]:
    """The weights that one token of a layer is multiplied with: of experts, the router and the chosen ones."""
    experts = layer.mlp.experts
    if experts is not None:
        yield Matrix(experts.num_experts, hidden)
        chosen = replace(experts, num_experts=experts.experts_per_token)
        layer = replace(layer, mlp=replace(layer.mlp, experts=chosen))
    yield from (matrix for matrix in layer_weights(layer, hidden) if matrix.linear)


def alike(layers: Iterable[LayerSpec]) -> Iterator[tuple[LayerSpec, int]]:
    """Neighbours that are equal, counted: most models are one layer many times."""
    for layer, group in groupby(layers):
        yield layer, sum(1 for _ in group)


def layer_flops(spec: ModelSpec) -> int:
    """Of one token in all layers of the decoder, attention's scores left out: 2 × active weights."""
    each = ((sum(one.numbers for one in layer_products(layer, spec.hidden_size)), n) for layer, n in alike(spec.layers))
    return 2 * sum(count * numbers for numbers, count in each)


def head_flops(spec: ModelSpec) -> int:
    """Of one row of logits."""
    return 2 * spec.vocab_size * spec.hidden_size


def token_flops(spec: ModelSpec) -> int:
    """2 × P_active: a token that is sampled from. The embedding is looked up, and counts nothing."""
    return layer_flops(spec) + head_flops(spec)


def attention_flops(spec: ModelSpec, context: int) -> int:
    """Of one token that attends to `context` tokens: 4 n h D L; a layer with a window sees no more than that."""
    each = ((layer.attention, count) for layer, count in alike(spec.layers))
    return sum(4 * count * one.heads * one.head_dim * min(context, one.window or context) for one, count in each)


def causal_flops(spec: ModelSpec, tokens: int) -> int:
    """Attention of a prompt: 2 n h D L², each token sees those before it; in a layer with a window w < L: 2 h D (2 L w
    − w²)."""
    total = 0
    for layer, count in alike(spec.layers):
        one = layer.attention
        window = min(tokens, one.window or tokens)
        total += 2 * count * one.heads * one.head_dim * (2 * tokens * window - window * window)
    return total


def prefill_flops(spec: ModelSpec, tokens: int) -> int:
    """2 P L + 2 n h D L², of which the head's are of one row: no other is sampled from."""
    return layer_flops(spec) * tokens + head_flops(spec) + causal_flops(spec, tokens)


def image_flops(spec: ModelSpec) -> int:
    """Of one tile: tower over its patches, projector over its rows; 0 for a model that reads no images."""
    if spec.vision is None:
        return 0
    encoder, projector = spec.vision.encoder, spec.vision.projector
    patches = encoder.grid**2 + (1 if encoder.class_token else 0)
    # The patch convolution and the blocks; stored positions, of the same two dimensions, are added and not multiplied.
    pixels = CHANNELS * encoder.patch_size**2 * encoder.hidden_size
    width = encoder.heads * encoder.head_dim
    block = 4 * width * encoder.hidden_size + 2 * encoder.intermediate * encoder.hidden_size
    tower = 2 * patches * (pixels + encoder.layers * block) + 4 * encoder.layers * width * patches**2
    middle = sum(one.numbers for one in projector_weights(projector, spec.hidden_size) if one.cols > 1)
    return tower + 2 * projector.tokens * middle


def read_bytes(spec: ModelSpec, form: str, tokens: int) -> int:
    """Weights that a step of `tokens` tokens reads: layers and head once; of experts those that somebody chose, on
    average E (1 − (1 − k/E)^T) of E where each token chooses k at random; a row of the embedding for each token."""
    total = 0
    for layer, count in alike(spec.layers):
        total += count * sum(matrix.nbytes(form) for matrix in _read(layer, spec.hidden_size, tokens))
    ends = list(end_weights(spec))
    total += sum(matrix.nbytes(form) for matrix in (ends if spec.embedding.tied else ends[1:]))
    return total + (0 if spec.embedding.tied else 2 * tokens * spec.hidden_size)


def _read(layer: LayerSpec, hidden: int, tokens: int) -> Iterator[Matrix]:
    experts = layer.mlp.experts
    if experts is None:
        yield from layer_weights(layer, hidden)
        return
    chosen = experts.num_experts * (1 - (1 - experts.experts_per_token / experts.num_experts) ** tokens)
    some = replace(experts, num_experts=max(1, min(experts.num_experts, round(chosen))))
    yield from layer_weights(replace(layer, mlp=replace(layer.mlp, experts=some)), hidden)
    # The router knows all of them.
    yield Matrix(experts.num_experts - some.num_experts, hidden)


# ---------------------------------------------------------------- ranks


def stages(layers: int, pp: int) -> tuple[int, ...]:
    """Layers of each pipeline stage: as even as can be, the first ones hold the rest."""
    return tuple(layers // pp + (1 if stage < layers % pp else 0) for stage in range(pp))


def rank_bytes(spec: ModelSpec, form: str, tp: int, pp: int) -> tuple[int, ...] | None:
    """Weights on one GPU of each pipeline stage, every layer dealt out to `tp`; None where heads are not dealt out
    evenly. Stage 0 has embedding and vision side, the last one norm and head (a tied one: a copy of the embedding)."""
    seeing = replace(spec, layers=tuple(layer for layer, _ in alike(spec.layers)))
    whole, decoder = (tensor_parallel_bytes(one, form, tp) for one in (seeing, replace(seeing, vision=None)))
    if whole is None or decoder is None:
        return None
    sizes = [
        sum(n * sum(one.nbytes(form, tp) for one in layer_weights(layer, spec.hidden_size)) for layer, n in alike(part))
        for part in _parts(spec, pp)
    ]
    first = 1 if spec.embedding.learned_positions is None else 2
    ends = [one.nbytes(form, tp) for one in end_weights(spec)]
    sizes[0] += whole - decoder + sum(ends[:first])
    sizes[-1] += sum(ends[first:]) + (ends[0] if spec.embedding.tied and pp > 1 else 0)
    return tuple(sizes)


def rank_kv_bytes(spec: ModelSpec, dtype: str, tp: int, pp: int) -> int:
    """KV cache of a token on one GPU of the stage that has most of it; its heads are dealt out to `tp`."""
    return max(kv_bytes_per_token(replace(spec, layers=part), dtype) for part in _parts(spec, pp)) // tp


def all_reduce_bytes(spec: ModelSpec, size: int, gpus: int) -> float:
    """What each of `gpus` that deal out every layer sends for one token: 2 (N − 1) / N d e, a ring all-reduce, after
    attention and after the MLP; once in a layer that adds both at once. `size`: bytes of a number."""
    sums = sum(1 if layer.parallel else 2 for layer in spec.layers)
    return sums * 2 * (gpus - 1) / gpus * spec.hidden_size * size


def _parts(spec: ModelSpec, pp: int) -> Sequence[tuple[LayerSpec, ...]]:
    found: list[tuple[LayerSpec, ...]] = []
    start = 0
    for count in stages(len(spec.layers), pp):
        found.append(spec.layers[start : start + count])
        start += count
    return found
