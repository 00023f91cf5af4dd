"""What a model takes of a device's memory, how many requests that leaves room for, and the fewest devices it fits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from headrace.core.flops import rank_bytes, rank_kv_bytes
from headrace.core.resolve import CPU_MAX_BATCHED_TOKENS, CPU_MAX_NUM_SEQS
from headrace.core.resolve_cuda import CARD_SHARE, CUDA_MAX_BATCHED_TOKENS
from headrace.core.sizing import GRAPH_BYTES, MOST_MULTIPROCESSORS, SCORED_ROWS, CardUse, blocks_for, card_step_bytes
from headrace.core.sizing import kv_bytes_per_block as block_bytes
from headrace.core.spec import ModelSpec
from headrace.plan.devices import Device
from headrace.plan.speed import Precision, Weights

BLOCK = 16
"""Tokens of a block of the KV cache."""
LANES = 16
"""What the native backend pads blocks and heads to."""
PROCESS_BYTES = 47 * 2**20
"""Of a process that has imported engine and native kernels, before a model: CPython 3.11 with numpy (measured)."""
TOKEN_BYTES = 400
"""A token of the vocabulary as the tokenizer holds it: text, merges, tables (measured on 49,152 of them)."""
WIDTHS = (1, 2, 4, 8)
"""Devices of a node that share every layer."""
DEPTHS = (1, 2, 4, 8)
"""Nodes, a pipeline stage each."""


@dataclass(frozen=True, slots=True)
class Room:
    """Of one device of the stage that holds most."""

    stages: tuple[int, ...]
    """Bytes of weights on one device of each pipeline stage."""
    kv_per_token: int
    step: int
    """Intermediate results, at most, and graphs."""
    memory: int
    """Of the device, as far as a model may take it."""

    @property
    def weights(self) -> int:
        return max(self.stages)

    @property
    def left(self) -> int:
        """For keys and values; negative where the model does not fit."""
        return self.memory - self.weights - self.step

    def requests(self, tokens: int) -> int:
        """That fit with `tokens` tokens each."""
        return max(0, self.left // (blocks_for(tokens, BLOCK) * BLOCK * self.kv_per_token))

    def used(self, requests: int, tokens: int) -> int:
        return self.weights + self.step + requests * blocks_for(tokens, BLOCK) * BLOCK * self.kv_per_token


def device_room(
    spec: ModelSpec, device: Device, held: Precision, tp: int, pp: int, requests: int, tokens: int
) -> Room | None:
    """None where heads are not dealt out evenly to `tp`."""
    stages = rank_bytes(spec, held.form, tp, pp)
    if stages is None:
        return None
    use = CardUse(held.dtype, held.quant, held.kv_dtype, BLOCK, max(1, requests), CUDA_MAX_BATCHED_TOKENS, tokens)
    step, memory = card_step_bytes(spec, use, MOST_MULTIPROCESSORS), device.memory_bytes
    if device.kind == "gpu":
        step, memory = step + GRAPH_BYTES, int(CARD_SHARE * memory)
    kv = rank_kv_bytes(spec, held.kv_dtype, tp, pp)
    return Room(tuple(held.factor * size for size in stages), kv, step, memory)


def fewest(
    spec: ModelSpec, device: Device, held: Precision, requests: int, tokens: int
) -> tuple[int, int, Room] | None:
    """(tp, pp, room) of the fewest devices that hold the model and so many requests; None: no node of up to 8, and no
    8 of them. A device without a link to another is taken alone."""
    for pp in DEPTHS if device.peer_link is not None else (1,):
        for tp in WIDTHS if device.peer_link is not None else (1,):
            if pp > len(spec.layers) or (pp > 1 and tp < WIDTHS[-1]):
                continue
            room = device_room(spec, device, held, tp, pp, requests, tokens)
            if room is not None and room.requests(tokens) >= requests:
                return tp, pp, room
    return None


# ---------------------------------------------------------------- the native backend


def native_peak(
    spec: ModelSpec, weights: Weights, kv_dtype: str, requests: int, prompt: int, output: int, has_text: bool
) -> dict[str, int]:
    """Bytes resident at the peak of a process that answers `requests` prompts at once, by what they are for.

    A buffer counts as far as it is written; keys and values of every request, in whole blocks.
    """
    rows = min(requests, CPU_MAX_NUM_SEQS)
    tokens = min(rows * prompt, CPU_MAX_BATCHED_TOKENS)
    blocks = rows * blocks_for(prompt + output, BLOCK)
    found = {
        "process": PROCESS_BYTES,
        "weights": weights.nbytes,
        "kv_cache": blocks * block_bytes(spec, kv_dtype, BLOCK, LANES),
        "step": tokens * _token_bytes(spec) + min(rows, SCORED_ROWS) * 4 * spec.vocab_size,
    }
    return found | ({"tokenizer": TOKEN_BYTES * spec.vocab_size} if has_text else {})


def _token_bytes(spec: ModelSpec) -> int:
    """Of one token's row in every buffer of the widest layer: float32, and codes (1.5 bytes a number with what scales
    them) of what a product reads."""
    most = 0
    for layer in spec.layers:
        attention, mlp = layer.attention, layer.mlp
        queries, keys = attention.heads * attention.head_dim, attention.kv_heads * attention.head_dim
        inner = mlp.intermediate
        if mlp.experts is not None:
            inner = mlp.experts.experts_per_token * (3 * mlp.experts.intermediate + 2 * spec.hidden_size)
        read = spec.hidden_size + queries + inner
        most = max(most, 4 * (2 * spec.hidden_size + 2 * queries + 2 * keys + inner) + 3 * read // 2)
    return most


def listed(stages: Sequence[int]) -> str:
    """GiB of each stage."""
    return " / ".join(f"{size / 2**30:.2f}" for size in stages)
