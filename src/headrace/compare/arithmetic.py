"""What a configuration computes in, as far as verdicts depend on it: the order of its sums, and what it rounds."""

from __future__ import annotations

from collections.abc import Mapping

from headrace.core.config import ResolvedConfig

PACKING = "What the checkpoint's own packing has lost is not, for it is in both."
CPU_ROUNDING: Mapping[str, str] = {
    "none": "",
    "stored": f" Activations are rounded to 8 bits where they meet packed weights: that is in the KL. {PACKING}",
    "int8": " Activations are rounded to 8 bits too, where they meet such weights.",
    "int4": " Activations are rounded to 8 bits, where they meet such weights.",
}
"""quant -> what there is to say of it beside the same-model verdict; products of integers."""
GPU_ROUNDING: Mapping[str, str] = {
    "none": "",
    "stored": " Activations are rounded to 8 bits where they meet weights that are packed in 8 bits, and nowhere else: "
    f"that is in the KL. {PACKING}",
    "int8": " Activations are rounded to 8 bits too, where they meet such weights.",
    "int4": " Activations are not rounded: they stay {dtype}.",
    "fp8": " Activations are rounded to fp8 too, where they meet such weights.",
}
"""The same on CUDA, where weights of 4 bits are unpacked to the type of arithmetic."""


def rounding_text(config: ResolvedConfig) -> str:
    """What there is to say of `quant` beside the same-model verdict; empty, or a sentence after a space."""
    if config.device == "cuda":
        return GPU_ROUNDING[config.quant].format(dtype=config.dtype)
    return CPU_ROUNDING[config.quant]


def rounded_activations(config: ResolvedConfig, is_packed: bool) -> str:
    """Which activations are rounded to 8 bits, in words; empty: none. `is_packed`: the checkpoint's weights are."""
    everywhere, stored = "activations rounded to 8 bits", config.quant == "stored" and is_packed
    if config.device == "cuda":
        if stored:
            return f"{everywhere} where weights are packed in 8 bits"
        return everywhere if config.quant in ("int8", "fp8") else ""
    return everywhere if stored or config.quant in ("int8", "int4") else ""


def warms_up_whole(config: ResolvedConfig) -> bool:
    """Whether a method of ours is warmed up by a whole run: its kernels are compiled as shapes come up."""
    return config.device == "cuda"


def order_follows_batch(config: ResolvedConfig | None) -> bool:
    """Whether two correct runs may differ by a near-tie (docs/CONTRACTS.md §4). None: an engine from outside."""
    return config is not None and config.device == "cuda" and not config.batch_invariant


def order_text(config: ResolvedConfig) -> str:
    """What that means for a reader; empty, or a sentence after a space."""
    if not order_follows_batch(config):
        return ""
    return (
        " On this GPU the order of summation follows the batch, and the kernels that were quickest when the model was "
        "loaded: an answer that leaves serial's at a near-tie keeps the promise, any other difference breaks it. With "
        "--batch-invariant none may differ."
    )
