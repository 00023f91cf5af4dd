"""Rotary embeddings in a config, both spellings -> RopeSpec (transformers 5.23, `modeling_rope_utils.py`).

transformers 5: `rope_parameters` {"rope_type", "rope_theta", …}; before: `rope_theta` beside `rope_scaling`
{"type" or "rope_type", "factor", …}. Numbers that a formula derives are derived here: no backend needs the config.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from headrace.core.spec import RopeScaling, RopeSpec
from headrace.models.config import MAX_CONTEXT, ConfigReader

DEFAULT_BASE = 10_000.0
MAX_FACTOR = 1e6

KNOWN_KEYS = frozenset(
    {
        "rope_type",
        "type",
        "rope_theta",
        "partial_rotary_factor",
        "factor",
        "original_max_position_embeddings",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
        "short_factor",
        "long_factor",
        "low_freq_factor",
        "high_freq_factor",
        "finetuned",
    }
)
"""A known key that the kind at hand does not use is ignored, as transformers does; an unknown one is refused."""


def read_rope(
    config: ConfigReader,
    head_dim: int,
    context: int,
    *,
    default_base: float = DEFAULT_BASE,
    partial: bool = False,
    kinds: Mapping[str, str] | None = None,
) -> RopeSpec:
    """The one rotary embedding of a model whose layers share it.

    `partial`: the architecture honours partial_rotary_factor. `kinds`: its own words for the kinds it has.
    Raises UnsupportedModel where both spellings are present and disagree.
    """
    tables = [config.find_table(key) for key in ("rope_scaling", "rope_parameters")]
    present = [table for table in tables if table is not None] or [ConfigReader({}, config.where)]
    specs = [
        rope_from_table(config, table, head_dim, context, default_base=default_base, partial=partial, kinds=kinds)
        for table in present
    ]
    if specs[0] != specs[-1]:
        config.unsupported("rope_scaling", "the same as rope_parameters, or one of the two absent")
    return specs[0]


def rope_from_table(
    config: ConfigReader,
    table: ConfigReader,
    head_dim: int,
    context: int,
    *,
    base_key: str = "rope_theta",
    default_base: float = DEFAULT_BASE,
    partial: bool = False,
    kinds: Mapping[str, str] | None = None,
) -> RopeSpec:
    """One table of rope numbers; what it lacks is looked up in the config around it (the base under `base_key`)."""
    table.refuse_unknown(KNOWN_KEYS)
    base = table.find_float("rope_theta", low=1.0) or config.get_float(base_key, default_base, low=1.0)
    dim = _rotary_dim(config, table, head_dim, partial)
    kind = table.get_choice(table.first_of("rope_type", "type"), kinds or {name: name for name in SCALINGS}, "default")
    return RopeSpec(dim, base, scaling=SCALINGS[kind](config, table, dim, context))


def _rotary_dim(config: ConfigReader, table: ConfigReader, head_dim: int, partial: bool) -> int:
    holder = table if table.has("partial_rotary_factor") else config
    factor = holder.get_float("partial_rotary_factor", 1.0, high=1.0)
    if factor != 1.0 and not partial:
        holder.unsupported("partial_rotary_factor", "absent or 1.0 for this architecture")
    dim = int(head_dim * factor)
    if dim < 2 or dim % 2:
        allowed = f"what makes an even rotary dimension (here {dim} of a head of {head_dim})"
        if factor != 1.0:
            holder.unsupported("partial_rotary_factor", allowed)
        config.unsupported(config.first_of("head_dim", "hidden_size"), allowed)
    return dim


def _factor(table: ConfigReader) -> float:
    factor = table.get_float("factor", high=MAX_FACTOR)
    return factor if factor >= 1.0 else table.bad("factor", f"a number from 1 to {MAX_FACTOR:g}")


def _original_context(config: ConfigReader, table: ConfigReader, context: int) -> int:
    # transformers gives the config's own key priority over the table's (Phi-3 keeps it there).
    holder = config if config.has("original_max_position_embeddings") else table
    return holder.get_int("original_max_position_embeddings", context, high=MAX_CONTEXT)


def _default(config: ConfigReader, table: ConfigReader, dim: int, context: int) -> None:
    return None


def _linear(config: ConfigReader, table: ConfigReader, dim: int, context: int) -> RopeScaling:
    return RopeScaling("linear", {"factor": _factor(table)})


def _dynamic(config: ConfigReader, table: ConfigReader, dim: int, context: int) -> RopeScaling:
    if dim <= 2:
        table.unsupported(table.first_of("rope_type", "type"), "another kind where the rotary dimension is 2")
    return RopeScaling("dynamic", {"factor": _factor(table), "original_context": float(context)})


def _llama3(config: ConfigReader, table: ConfigReader, dim: int, context: int) -> RopeScaling:
    low = table.get_float("low_freq_factor", high=MAX_FACTOR)
    high = table.get_float("high_freq_factor", low=low, high=MAX_FACTOR)
    numbers = {
        "factor": _factor(table),
        "original_context": float(_original_context(config, table, context)),
        "low_freq_factor": low,
        "high_freq_factor": high,
    }
    return RopeScaling("llama3", numbers)


def _yarn(config: ConfigReader, table: ConfigReader, dim: int, context: int) -> RopeScaling:
    """YaRN (arXiv 2309.00071); `attention_factor` multiplies cos and sin, `truncate` (1 or 0) rounds the ramp."""
    original = _original_context(config, table, context)
    # Without a factor the stretch is what the two contexts say; where they are equal, nothing says it.
    has_factor = table.has("factor") or original >= context
    factor = _factor(table) if has_factor else context / original

    def magnitude(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0

    attention = table.find_float("attention_factor", high=MAX_FACTOR)
    if attention is None:
        over, under = (table.find_float(key, high=MAX_FACTOR) for key in ("mscale", "mscale_all_dim"))
        attention = magnitude(over) / magnitude(under) if over and under else magnitude(1.0)
    slow = table.get_float("beta_slow", 1.0, high=MAX_FACTOR)
    numbers = {
        "factor": factor,
        "original_context": float(original),
        "beta_fast": table.get_float("beta_fast", 32.0, high=MAX_FACTOR),
        "beta_slow": slow,
        "attention_factor": attention,
        "truncate": float(table.get_bool("truncate", True)),
    }
    if numbers["beta_fast"] < slow:
        table.bad("beta_fast", f"a number from beta_slow ({slow:g}) up")
    return RopeScaling("yarn", numbers)


def _longrope(config: ConfigReader, table: ConfigReader, dim: int, context: int) -> RopeScaling:
    """LongRoPE (arXiv 2402.13753): `long_factors` divide the frequencies of a sequence past `original_context`."""
    original = _original_context(config, table, context)
    factor = _factor(table) if table.has("factor") else context / original
    attention = table.find_float("attention_factor", high=MAX_FACTOR)
    if attention is None:
        if factor > 1.0 and original < 2:
            table.bad("original_max_position_embeddings", "an integer from 2 up")
        attention = math.sqrt(1.0 + math.log(factor) / math.log(original)) if factor > 1.0 else 1.0
    return RopeScaling(
        "longrope",
        {"factor": factor, "original_context": float(original), "attention_factor": attention},
        short_factors=table.get_floats("short_factor", dim // 2),
        long_factors=table.get_floats("long_factor", dim // 2),
    )


ReadScaling = Callable[[ConfigReader, ConfigReader, int, int], RopeScaling | None]
SCALINGS: Mapping[str, ReadScaling] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}
