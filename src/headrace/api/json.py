"""JSON from a client, read strictly; JSON to a client, in ASCII."""

from __future__ import annotations

import json
from json.encoder import encode_basestring_ascii
from typing import Any

from headrace.core import strict_json
from headrace.core.errors import InvalidJson, shorten


def read_object(text: str) -> dict[str, Any]:
    """A JSON object: finite numbers (4.0 is an integer), no key twice. Raises InvalidJson."""
    try:
        value = strict_json.parse(text, unique_keys=True, whole=True)
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


def quote(text: str) -> str:
    """`dump` of a text, without its cost."""
    return encode_basestring_ascii(text)
