"""A plan as plain data for JSON: every number with its unit, formula and source, and what only a program wants."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from numbers import Integral, Real
from pathlib import PurePath
from typing import Any

from headrace.plan.document import Document

SCHEMA = 1
"""Raised whenever a field changes its name or meaning."""


def as_json(document: Document) -> str:
    """One JSON object, its names those of plan/document.py. JSON has no number that is not finite: those are the texts
    "inf", "-inf" and "nan"."""
    return json.dumps({"schema": SCHEMA, **plain(document)}, allow_nan=False, ensure_ascii=False, indent=1) + "\n"


def plain(value: object) -> Any:
    """Mappings, lists, texts and numbers only; of numpy's scalars and arrays too. Raises TypeError."""
    if value is None or isinstance(value, str | bool):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        number = float(value)
        return number if math.isfinite(number) else str(number)
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): plain(one) for key, one in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Iterable):
        return [plain(one) for one in value]
    raise TypeError(f"no JSON for {type(value).__name__}")
