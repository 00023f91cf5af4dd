"""JSON as its standard has it: finite numbers, and, where asked for, no key twice."""

from __future__ import annotations

import json
import math

from headrace.core.errors import shorten


def parse(text: str, unique_keys: bool = False) -> object:
    """The value of a JSON text. Raises ValueError (JSONDecodeError where it is no JSON at all) and RecursionError."""
    hook = _unique if unique_keys else None
    return json.loads(text, parse_float=_finite, parse_constant=_no_constant, object_pairs_hook=hook)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {shorten(text)} is not finite")
    return value


def _no_constant(text: str) -> float:
    raise ValueError(f"the number {text} is not finite")


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    made = dict(pairs)
    if len(made) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {shorten(twice)} is there twice")
    return made
