"""JSON as its standard has it: finite numbers, and, where asked for, no key twice."""

from __future__ import annotations

import json
import math

from headrace.core.errors import shorten

EXACT = 2**53
"""Integers up to this are exact as float64."""


def parse(text: str, unique_keys: bool = False, whole: bool = False) -> object:
    """The value of a JSON text. `whole`: 4.0 is the integer 4, as JSON Schema has it.

    Raises ValueError (JSONDecodeError where it is no JSON at all) and RecursionError.
    """
    hook = _unique if unique_keys else None
    number = _finite_or_whole if whole else _finite
    return json.loads(text, parse_float=number, parse_constant=_no_constant, object_pairs_hook=hook)


def _finite_or_whole(text: str) -> float | int:
    value = _finite(text)
    return int(value) if value.is_integer() and abs(value) <= EXACT else value


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
