"""Values as text: as many digits as mean something, and columns of numbers that are read from top to bottom."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from numbers import Integral, Real
from typing import TypeGuard

from headrace.plan.document import Basis, Quantity, Value

NONE = "–"
DIGITS, COLUMN_DIGITS, LEAST_DIGITS = 5, 4, 3
"""Significant ones: of a number by itself, of the largest and of the smallest number of a column."""
UNSURE_DIGITS = 3
"""Of what was measured or simulated, and of an interval and what lies in it: more would say more than is known."""
UNSURE: frozenset[Basis] = frozenset({"measured", "calibrated", "simulated"})
LARGE, SMALL = 1e15, 1e-4
"""From the one on, and below the other, with a power of ten."""
SPREAD = 1e3
"""Largest over smallest number of a column, up to which all of them have the same decimals."""
MONEY = frozenset({"$"})
"""Units of which there are cents."""
LEAST_CENTS = 1.0
_NUMBER = re.compile(r"[≤≥<>~≈×$ ]*\(?[-−+]?[$]?\d[\d,.]*\)?[ %x×]*|–|∞")
_BINARY = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
BYTES = frozenset({"B", "byte", "bytes"})
LEAST_BYTES = 2**20
"""From so many on, a number of bytes is also said in a larger unit."""


def _power(value: float, digits: int = DIGITS) -> int:
    """Of ten, at or below |value| as it is rounded to `digits` digits."""
    return int(f"{abs(value):.{digits - 1}e}".partition("e")[2])


def _fixed(value: float, decimals: int) -> str:
    text = f"{value:,.{decimals}f}"
    return text.removeprefix("-") if float(text.replace(",", "")) == 0 else text


def number_text(value: Value, digits: int = DIGITS) -> str:
    """So many significant digits of a float, a whole number in full, a text as it is; None: a dash."""
    if value is None:
        return NONE
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Integral):
        return f"{int(value):,}"
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else "-∞" if value < 0 else "∞"
    if value == 0:
        return "0"
    if not SMALL <= abs(value) < LARGE:
        mantissa, _, power = f"{value:.{min(digits, 4) - 1}e}".partition("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(power)}"
    text = _fixed(value, max(0, digits - 1 - _power(value, digits)))
    return text.rstrip("0").rstrip(".") if "." in text else text


def column_texts(values: Sequence[Value], unit: str = "") -> list[str]:
    """Of one column: floats with the same number of decimals where they are of a size; money in cents."""
    numbers = [float(one) for one in values if is_number(one)]
    sizes = [abs(one) for one in numbers if one]
    plain = [number_text(one, COLUMN_DIGITS) for one in values]
    if not any(isinstance(one, float) for one in values) or not sizes or not all(map(math.isfinite, numbers)):
        return plain
    if max(sizes) > SPREAD * min(sizes) or max(sizes) >= LARGE or min(sizes) < SMALL:
        return plain
    if _is_money(unit) and min(sizes) >= LEAST_CENTS:
        decimals = 2
    else:
        needed = max(len(text.partition(".")[2]) for one, text in zip(values, plain, strict=True) if is_number(one))
        of_largest = COLUMN_DIGITS - 1 - _power(max(sizes), COLUMN_DIGITS)
        of_smallest = LEAST_DIGITS - 1 - _power(min(sizes), LEAST_DIGITS)
        decimals = min(needed, max(0, of_largest, of_smallest))
    return [
        _fixed(float(one), decimals) if is_number(one) and one else text
        for one, text in zip(values, plain, strict=True)
    ]


def _is_money(unit: str) -> bool:
    return unit.partition("/")[0].partition(" ")[0] in MONEY


def is_number(value: Value) -> TypeGuard[float]:
    """Whether it can be held against others: neither a text nor yes or no."""
    return isinstance(value, Real) and not isinstance(value, bool)


def is_number_text(value: Value) -> bool:
    """Whether it is a text that says a number: (1,136), ≤ 12.5 %."""
    return isinstance(value, str) and _NUMBER.fullmatch(value) is not None


def value_text(quantity: Quantity) -> str:
    """With its unit; many bytes also in a unit that is easier to read."""
    value, unit = quantity.value, quantity.unit
    if value is None:
        return NONE
    in_interval = quantity.low is not None or quantity.high is not None
    digits = UNSURE_DIGITS if in_interval or quantity.basis in UNSURE else DIGITS
    if in_interval and is_number(value):
        value = _rounded(value)
    if _is_money(unit) and is_number(value) and abs(value) >= LEAST_CENTS:
        text = column_texts([float(value)], unit)[0]
    else:
        text = number_text(value, digits)
    text = f"{text} {unit}".strip()
    if unit in BYTES and is_number(value) and LEAST_BYTES <= abs(value) < math.inf:
        scale = min(len(_BINARY) - 1, int(math.log2(abs(value)) // 10))
        larger = value / 1024**scale
        text += f" ({number_text(_rounded(larger)) if in_interval else f'{larger:.2f}'} {_BINARY[scale]})"
    return text


def _rounded(value: float) -> float:
    """To the digits of an interval, above its decimal point too."""
    return float(f"{value:.{UNSURE_DIGITS - 1}e}")


def interval_text(quantity: Quantity) -> str:
    """From its low to its high end; empty where there is none."""
    ends = (quantity.low, quantity.high)
    if ends == (None, None):
        return ""
    return " to ".join(NONE if end is None else number_text(_rounded(end), UNSURE_DIGITS) for end in ends)


def source_text(quantity: Quantity) -> str:
    """Where it is from; of arithmetic alone, which needs no paper, that."""
    return quantity.source or ("arithmetic alone" if quantity.basis == "exact" else "")
