"""The choices on an NVIDIA GPU: types, weights, and what fits its memory. `resolve.py` asks here, with the reasons."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from headrace.core.config import EngineConfig, Gpu, ResolvedConfig
from headrace.core.errors import InvalidParameter, OutOfMemory
from headrace.core.sizing import MIB, CardBudget, CardUse, Stored, blocks_for, card_budget, kv_bytes_per_block
from headrace.core.spec import ModelSpec

CUDA_MAX_NUM_SEQS = 256
CUDA_MAX_BATCHED_TOKENS = 8192
SMALL_STEP = (32, 1024)
"""max_num_seqs and max_num_batched_tokens that are proposed where the defaults do not fit."""
LEAST_TOKENS = 512
"""A card that has no room for one request of so many is too small for the model, where nobody has set a limit."""
CARD_SHARE = 0.9
"""Of the card's memory; the rest is for the driver, torch's allocator and what else draws on the card."""
OLDEST_CARD = (7, 5)
"""Turing: the oldest that CUDA 13 and Triton know."""
BFLOAT16_CARD = (8, 0)
FP8_CARD = (8, 9)
"""Compute capabilities from which the card computes with the type: Ampere, Ada."""
Choice = tuple[str, str]
"""What was chosen and why; the reason is empty where the user has set it."""


def gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f} GiB"


def card_text(gpu: Gpu) -> str:
    return f"{gpu.name} (compute capability {gpu.capability[0]}.{gpu.capability[1]})"


def cuda_dtype(config: EngineConfig, gpu: Gpu, stored: Stored) -> Choice:
    """Raises InvalidParameter for bfloat16 on a card without it."""
    if config.dtype != "auto":
        if config.dtype == "bfloat16" and gpu.capability < BFLOAT16_CARD:
            raise InvalidParameter("dtype", config.dtype, f"auto, float16, float32 on {card_text(gpu)}")
        return config.dtype, ""
    if gpu.capability < BFLOAT16_CARD:
        return "float16", f"{card_text(gpu)} does not compute with bfloat16, which needs 8.0"
    if stored.dtype in ("bfloat16", "float16"):
        return stored.dtype, "the checkpoint's own type"
    if stored.dtype == "float32":
        return "bfloat16", "half the bytes of the checkpoint's float32, with its range"
    return "bfloat16", "16 bits with the range of float32; the checkpoint names no type of its own"


def cuda_quant(config: EngineConfig, spec: ModelSpec, gpu: Gpu, stored: Stored) -> Choice:
    """Raises InvalidParameter for fp8 on a card without it, and for experts that would have to be rounded."""
    quant = config.quant
    if quant == "auto":
        if stored.packed:
            return "stored", "the fewest bytes, without a rounding of weights"
        return "none", "the checkpoint's weights are plain numbers"
    if quant in ("int8", "int4", "fp8") and any(layer.mlp.experts is not None for layer in spec.layers):
        raise InvalidParameter("quant", quant, "auto, none, stored for a mixture of experts on CUDA")
    if quant == "fp8" and gpu.capability < FP8_CARD:
        raise InvalidParameter("quant", quant, f"auto, none, stored, int8, int4 on {card_text(gpu)}: fp8 needs 8.9")
    return quant, ""


def cuda_kv_dtype(config: EngineConfig, gpu: Gpu, dtype: str) -> Choice:
    """Raises InvalidParameter for what is neither `dtype` nor fp8, and for fp8 on a card without it."""
    wanted = config.kv_dtype
    if wanted == "auto":
        return dtype, "as dtype"
    if wanted == "fp8" and gpu.capability < FP8_CARD:
        raise InvalidParameter("kv_dtype", wanted, f"auto, {dtype} on {card_text(gpu)}: fp8 needs 8.9")
    if wanted not in (dtype, "fp8"):
        raise InvalidParameter("kv_dtype", wanted, f"auto, {dtype}, fp8 on CUDA with a dtype of {dtype}; or device cpu")
    return wanted, ""


def cuda_batch_invariant(config: EngineConfig) -> Choice:
    if config.batch_invariant:
        return "True", ""
    return "False", "the fastest kernels choose their order of summation by the batch"


def usable_bytes(gpu: Gpu) -> int:
    """What is left of the card's share beside what others hold."""
    return max(0, int(CARD_SHARE * gpu.total_bytes) - (gpu.total_bytes - gpu.free_bytes))


def card_use(config: ResolvedConfig) -> CardUse:
    """What a resolved configuration takes of a card."""
    return CardUse(
        config.dtype,
        config.quant,
        config.kv_dtype,
        config.block_size,
        config.max_num_seqs,
        config.max_num_batched_tokens,
        config.max_model_len,
        config.batch_invariant,
    )


def cuda_blocks(config: EngineConfig, spec: ModelSpec, gpu: Gpu, use: CardUse, stored: Stored) -> tuple[int, str]:
    """(blocks of the KV cache, why so many). `use.max_model_len`: as set, else the model's.

    Raises OutOfMemory with the whole budget if the model, or one request of `max_model_len` as set, does not fit.
    """
    plan = _Plan(config, spec, gpu, use, stored)
    if config.kv_cache_mib is not None and plan.pool_blocks < plan.request_blocks:
        needed_mib = plan.request_blocks * plan.block_bytes / MIB
        raise OutOfMemory(
            f"the KV cache can have {config.kv_cache_mib} MiB, but one request of {plan.request_tokens} tokens needs "
            f"{needed_mib:.1f} MiB: lower max_model_len or raise kv_cache_mib"
        )
    if not plan.fits:
        raise OutOfMemory(plan.refusal())
    if config.kv_cache_mib is not None:
        blocks, why = plan.pool_blocks, "what kv_cache_mib holds"
    else:
        blocks = min(plan.affordable, plan.most_blocks)
        why = f"what is left of {CARD_SHARE:.0%} of {gpu.name}: {gib(plan.left)}"
    if blocks == plan.most_blocks:
        why = f"enough for {use.max_num_seqs} requests of {use.max_model_len} tokens"
    return blocks, why


class _Plan:
    """One way to run the model on the card."""

    def __init__(self, config: EngineConfig, spec: ModelSpec, gpu: Gpu, use: CardUse, stored: Stored) -> None:
        self.config, self.spec, self.gpu, self.use, self.stored = config, spec, gpu, use, stored
        self.budget: CardBudget = card_budget(spec, use, stored, gpu.multiprocessors)
        self.block_bytes = kv_bytes_per_block(spec, use.kv_dtype, use.block_size)
        self.most_blocks = use.max_num_seqs * blocks_for(use.max_model_len, use.block_size)
        """More would never be filled."""
        least = 2 if config.kv_cache_mib is not None else min(LEAST_TOKENS, spec.context)
        self.request_tokens = config.max_model_len or least
        self.request_blocks = blocks_for(self.request_tokens, use.block_size)
        self.pool_blocks = self.request_blocks
        """The fewest that will do."""
        if config.kv_cache_mib is not None:
            self.pool_blocks = min(self.most_blocks, config.kv_cache_mib * MIB // self.block_bytes)
        self.left = max(0, usable_bytes(gpu) - self.budget.total)
        """For the KV cache."""
        self.affordable = self.left // self.block_bytes

    @property
    def fits(self) -> bool:
        return self.affordable >= self.pool_blocks >= self.request_blocks

    def refusal(self) -> str:
        """Every part of the budget, what there is, and what would fit."""
        budget, gpu, kv_bytes = self.budget, self.gpu, self.pool_blocks * self.block_bytes
        asked = self.config.kv_cache_mib is not None
        what = "as kv_cache_mib says" if asked else f"for one request of {self.request_tokens} tokens"
        parts = {
            f"weights ({self._weights_text()})": budget.weights,
            f"a step of {self.use.tokens} tokens and {self.use.max_num_seqs} requests": budget.step,
            "images": budget.images,
            "CUDA graphs": budget.graphs,
            f"KV cache {what}": kv_bytes,
        }
        listed = ", ".join(f"{name} {gib(size)}" for name, size in parts.items() if size)
        there = f"{gib(usable_bytes(gpu))} ({CARD_SHARE:.0%} of {gib(gpu.total_bytes)}"
        held = gpu.total_bytes - gpu.free_bytes
        there += f", less {gib(held)} that is in use)" if held else ")"
        ways = "; or ".join(self.ways()) or "no setting: it takes a card with more memory"
        return (
            f"the model does not fit {gpu.name}: {listed}; together {gib(budget.total + kv_bytes)}, and there are "
            f"{there}. What would fit: {ways}"
        )

    def ways(self) -> Iterator[str]:
        """Changes of one setting that make it fit, nearest to what was asked first; else of several at once."""
        config, use = self.config, self.use
        found = False
        if config.kv_cache_mib is not None and self.left // MIB * MIB // self.block_bytes >= self.request_blocks:
            yield f"kv_cache_mib up to {self.left // MIB}"
            found = True
        elif config.kv_cache_mib is None and config.max_model_len is not None and self.affordable:
            yield f"max_model_len up to {self.affordable * use.block_size}"
            found = True
        for text, other in self._others():
            if other.fits:
                yield f"{text} ({gib(other.budget.total)} beside the KV cache)"
                found = True
        if not found:
            yield from self._together()

    def _others(self) -> Iterator[tuple[str, _Plan]]:
        use = self.use
        seqs, tokens = min(SMALL_STEP[0], use.max_num_seqs), min(SMALL_STEP[1], use.max_num_batched_tokens)
        if (seqs, tokens) != (use.max_num_seqs, use.max_num_batched_tokens):
            text = f"max_num_seqs {seqs} with max_num_batched_tokens {tokens}"
            yield text, self._with(replace(use, max_num_seqs=seqs, max_num_batched_tokens=tokens))
        if use.kv_dtype != "fp8" and self.gpu.capability >= FP8_CARD:
            yield "kv_dtype fp8", self._with(replace(use, kv_dtype="fp8"))
        for quant in self._quants():
            yield f"quant {quant}", self._with(replace(use, quant=quant))

    def _quants(self) -> tuple[str, ...]:
        """Smaller forms of the weights, the largest first."""
        if any(layer.mlp.experts is not None for layer in self.spec.layers):
            return ()
        if self.stored.packed:
            return ("stored",) if self.use.quant == "none" else ()
        eight = "fp8" if self.gpu.capability >= FP8_CARD else "int8"
        return {"none": (eight, "int4"), "stored": (eight, "int4"), "int4": ()}.get(self.use.quant, ("int4",))

    def _together(self) -> Iterator[str]:
        """All of the changes at once, where only that helps."""
        config, use = self.config, self.use
        words: list[str] = []
        for text, other in self._others():
            use = replace(
                use,
                **{
                    name: getattr(other.use, name)
                    for name in ("quant", "kv_dtype", "max_num_seqs", "max_num_batched_tokens")
                    if getattr(other.use, name) != getattr(self.use, name)
                },
            )
            words = [word for word in words if not (word.startswith("quant") and text.startswith("quant"))] + [text]
        plan = self._with(use)
        if words and plan.fits:
            yield f"{', '.join(words)} ({gib(plan.budget.total)} beside the KV cache)"
        elif words and config.kv_cache_mib is None and config.max_model_len is not None and plan.affordable:
            yield f"{', '.join(words)}, max_model_len up to {plan.affordable * use.block_size}"

    def _with(self, use: CardUse) -> _Plan:
        return _Plan(self.config, self.spec, self.gpu, use, self.stored)

    def _weights_text(self) -> str:
        quant, dtype = self.use.quant, self.use.dtype
        if quant == "stored" and self.stored.packed:
            return "as stored"
        return dtype if quant in ("none", "stored") else quant
