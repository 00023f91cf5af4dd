"""What every plan answers with: numbers with their sources, tables, plots. Rendered elsewhere: text, JSON, a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

Basis = Literal["exact", "measured", "calibrated", "data sheet", "published", "given", "simulated"]
"""What a number rests on: arithmetic alone, a probe of this machine, past errors of the same prediction, a vendor's
figures, a paper, the user's own words, a simulation."""
Value = float | int | str | None


@dataclass(frozen=True, slots=True)
class Quantity:
    """One number."""

    name: str
    value: Value
    """None: not known; `note` says why."""
    unit: str = ""
    formula: str = ""
    """Its formula's name or the formula itself, as --explain prints it."""
    source: str = ""
    """Paper and section, data sheet, profile file …"""
    basis: Basis = "exact"
    low: float | None = None
    high: float | None = None
    """Of the interval, where there is one."""
    note: str = ""


@dataclass(frozen=True, slots=True)
class Column:
    name: str
    unit: str = ""
    formula: str = ""
    source: str = ""


@dataclass(frozen=True, slots=True)
class Table:
    title: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Value]]
    notes: Sequence[str] = ()
    named_by: int = 1
    """How many columns, from the first on, tell its rows apart: they stay where a narrow terminal splits it."""


@dataclass(frozen=True, slots=True)
class Series:
    name: str
    points: Sequence[tuple[float, float]]
    style: Literal["line", "dots", "steps", "dashed"] = "line"


@dataclass(frozen=True, slots=True)
class Plot:
    title: str
    x: str
    """Label, with its unit."""
    y: str
    series: Sequence[Series]
    log_x: bool = False
    log_y: bool = False


@dataclass(frozen=True, slots=True)
class Document:
    """The answer of one `headrace plan` command."""

    title: str
    quantities: Sequence[Quantity] = ()
    tables: Sequence[Table] = ()
    plots: Sequence[Plot] = ()
    notes: Sequence[str] = ()
    data: Mapping[str, object] = field(default_factory=dict)
    """For --json beside the rest: whatever a program wants to read."""
