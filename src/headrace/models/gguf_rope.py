"""The rotary embedding of a GGUF file as transformers' rope_parameters: keys `rope.*`, and tensors of divisors.

A tensor of dim / 2 numbers divides the frequencies: `rope_freqs` is what the converter makes of Llama 3.1's rule,
`rope_factors_long` and `rope_factors_short` are LongRoPE's two lists.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from headrace.core.errors import CheckpointError, UnsupportedModel, shorten
from headrace.models.config import MAX_CONTEXT, ConfigReader
from headrace.models.rope import DEFAULT_BASE, MAX_FACTOR

ReadVector = Callable[[str], Sequence[float]]
RopeTensors = tuple[str, ...]

FREQUENCIES = "rope_freqs.weight"
LONG_AND_SHORT = ("rope_factors_long.weight", "rope_factors_short.weight")

KINDS: Mapping[str, str] = {"none": "default", "linear": "linear", "yarn": "yarn", "longrope": "longrope"}


def read_rope(
    metadata: ConfigReader,
    prefix: str,
    dim: int,
    context: int,
    shapes: Mapping[str, tuple[int, ...]],
    honoured: RopeTensors,
    read_vector: ReadVector | None,
) -> dict[str, Any]:
    """The scaling that the file asks for, in keys or in tensors; both at once only where they mean the same.

    Raises CheckpointError, UnsupportedModel.
    """
    present = [name for name in (FREQUENCIES, *LONG_AND_SHORT) if name in shapes]
    for name in present:
        if name not in honoured or read_vector is None:
            raise UnsupportedModel(f"{metadata.where}: tensor {name} is present, allowed: files without it")
    base = {"rope_theta": metadata.get_float(f"{prefix}rope.freq_base", DEFAULT_BASE, low=1.0)}
    type_key = f"{prefix}rope.scaling.type"
    kind = metadata.get_choice(type_key, KINDS, "linear")
    attention_key = f"{prefix}rope.scaling.attn_factor"
    long = kind == "longrope" or (not metadata.has(type_key) and set(LONG_AND_SHORT) <= set(present))
    if not long:
        metadata.require(attention_key, 1.0)
    for key in ("yarn_attn_factor", "yarn_ext_factor"):
        metadata.require(f"{prefix}rope.scaling.{key}", 1.0)
    original = metadata.find_int(f"{prefix}rope.scaling.original_context_length", high=MAX_CONTEXT)
    if long:
        _require_only(metadata, type_key, present, LONG_AND_SHORT)
        long_list, short_list = (_divisors(metadata, name, dim, shapes, read_vector) for name in LONG_AND_SHORT)
        return {
            "rope_type": "longrope",
            **base,
            "original_max_position_embeddings": original or context,
            "attention_factor": metadata.get_float(attention_key, 1.0, high=MAX_FACTOR),
            "long_factor": long_list,
            "short_factor": short_list,
        }
    factor = _factor(metadata, prefix)
    plain = kind == "default" or (kind == "linear" and factor == 1.0)
    if present:
        _require_only(metadata, type_key, present, (FREQUENCIES,))
        if not plain:
            metadata.unsupported(type_key, f"none, beside the tensor {FREQUENCIES}")
        # One list for every length, which leaves cos and sin as they are: LongRoPE with nothing to choose.
        divisors = _divisors(metadata, FREQUENCIES, dim, shapes, read_vector)
        same = {"factor": 1.0, "attention_factor": 1.0, "original_max_position_embeddings": context}
        return {"rope_type": "longrope", **base, **same, "long_factor": divisors, "short_factor": divisors}
    if plain:
        return {"rope_type": "default", **base}
    return {
        "rope_type": kind,
        **base,
        "factor": factor,
        "original_max_position_embeddings": original,
        "beta_fast": metadata.find_float(f"{prefix}rope.scaling.yarn_beta_fast", high=MAX_FACTOR),
        "beta_slow": metadata.find_float(f"{prefix}rope.scaling.yarn_beta_slow", high=MAX_FACTOR),
    }


def _factor(metadata: ConfigReader, prefix: str) -> float:
    """A factor without a type means linear, as in llama.cpp."""
    key = metadata.first_of(f"{prefix}rope.scaling.factor", f"{prefix}rope.scale_linear")
    factor = metadata.get_float(key, 1.0, high=MAX_FACTOR)
    return factor if factor >= 1.0 else metadata.bad(key, f"a number from 1 to {MAX_FACTOR:g}")


def _require_only(metadata: ConfigReader, type_key: str, present: Sequence[str], needed: Sequence[str]) -> None:
    if sorted(present) != sorted(needed):
        found = ", ".join(present) or "none"
        raise UnsupportedModel(f"{metadata.where}: {type_key} and tensors: got {found}, allowed: {', '.join(needed)}")


def _divisors(
    metadata: ConfigReader,
    name: str,
    dim: int,
    shapes: Mapping[str, tuple[int, ...]],
    read_vector: ReadVector | None,
) -> list[float]:
    assert read_vector is not None
    where = f"{metadata.where}: tensor {name}"
    if shapes[name] != (dim // 2,):
        raise CheckpointError(f"{where}: shape is {shorten(shapes[name])}, allowed: ({dim // 2},)")
    values = [float(value) for value in read_vector(name)]
    for value in values:
        if not 0.0 < value <= MAX_FACTOR:
            raise CheckpointError(f"{where}: a divisor is {value}, allowed: a number above 0, up to {MAX_FACTOR:g}")
    return values
