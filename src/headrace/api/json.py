"""JSON from a client, read strictly; JSON to a client, in ASCII."""

from __future__ import annotations

import json
import math
from typing import Any

from headrace.core.errors import InvalidJson, shorten


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {shorten(text)} is not finite")
    return value


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is not JSON")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        names = [key for key, _ in pairs]
        twice = next(name for name in made if names.count(name) > 1)
        raise ValueError(f"the key {shorten(twice)} is there twice")
    return made


def read_object(text: str) -> dict[str, Any]:
    """A JSON object: finite numbers, no key twice. Raises InvalidJson."""
    try:
        value = json.loads(text, parse_float=_finite, parse_constant=_no_constant, object_pairs_hook=_unique)
    except RecursionError:
        raise InvalidJson("the JSON is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise InvalidJson(f"not JSON: {error.msg} at character {error.pos}") from None
    except ValueError as error:  # also an integer of more than 4,300 digits
        raise InvalidJson(f"not JSON: {str(error).split(';')[0]}") from None
    if not isinstance(value, dict):
        raise InvalidJson(f"got {shorten(value)}, allowed: a JSON object")
    return value


def dump(value: object) -> str:
    """One line of JSON in ASCII: no character in it can split the line or fail to be encoded."""
    return json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
