"""How good past predictions were: what `headrace plan --accuracy` shows of the store of calibration."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import median

from headrace.plan.calibration import ENOUGH, LEVEL, RIDGE, WINDOW, Calibration, Pair, Store
from headrace.plan.document import Column, Document, Plot, Quantity, Series, Table, Value

MEDIAN = "median of |predicted - measured| / measured"
COVERAGE = "pairs whose measurement lay in the interval said before it / such pairs"
BACK_TEST = "runs stored by compare and the benchmarks"
UNITS = "Errors in percent of what was measured; each prediction used only the runs before it."


def accuracy(store: Store) -> Document:
    """Error and coverage by quantity and machine. Raises ConfigError."""
    pairs = store.pairs()
    notes = [*store.notes, UNITS]
    if not pairs:
        notes.append(f"Nothing is stored yet in {store.path}: `headrace compare` stores what it measured.")
        return Document("How good past predictions were", notes=notes)
    source = f"{BACK_TEST}, {store.path}"
    groups: dict[tuple[str, str], list[Pair]] = {}
    for pair in pairs:
        groups.setdefault((pair.quantity, pair.machine), []).append(pair)
    rows = [_accuracy_row(*key, groups[key]) for key in sorted(groups)]
    columns = [
        Column("quantity"),
        Column("machine"),
        Column("pairs"),
        Column("models"),
        Column("error", "%", f"{MEDIAN}, with the factor of that time", source),
        Column("error of the formula", "%", f"{MEDIAN}, without a factor", source),
        Column(f"inside {LEVEL:.0%}", "%", f"{COVERAGE}; split-conformal intervals", source),
        Column("of", "", f"pairs with such an interval: {ENOUGH} or more before them", source),
        Column("inside ×/÷ 2", "%", f"{COVERAGE}; uncalibrated intervals", source),
        Column(
            "factor now", "", f"exp(Σ ln(measured / predicted) / (n + {RIDGE:g})), of the pairs that fit it", source
        ),
        Column("interval now", "×/÷", "exp of the conformal quantile of |ln(measured / corrected)|", source),
    ]
    return Document(
        title="How good past predictions were",
        quantities=_overall(pairs, source),
        tables=[Table("By quantity", columns, rows)],
        plots=[_ratios(groups)],
        notes=notes,
        data={"pairs": len(pairs), "file": str(store.path)},
    )


def _accuracy_row(quantity: str, machine: str, pairs: Sequence[Pair]) -> list[Value]:
    conformal = [pair for pair in pairs if pair.label == "calibrated"]
    others = [pair for pair in pairs if pair.label != "calibrated"]
    logs = [(math.log(pair.measured) - math.log(pair.predicted), pair.model) for pair in pairs[-WINDOW:]]
    now = Calibration.of(logs)
    return [
        quantity,
        machine,
        len(pairs),
        len({pair.model for pair in pairs}),
        100 * median(pair.error for pair in pairs),
        100 * median(pair.raw_error for pair in pairs),
        _share_covered(conformal),
        len(conformal),
        _share_covered(others),
        now.factor,
        now.spread,
    ]


def _share_covered(pairs: Sequence[Pair]) -> float | None:
    """Percent; None of none."""
    return 100 * sum(pair.covered for pair in pairs) / len(pairs) if pairs else None


def _overall(pairs: Sequence[Pair], source: str) -> list[Quantity]:
    conformal = [pair for pair in pairs if pair.label == "calibrated"]
    error = 100 * median(pair.error for pair in pairs)
    enough = f"{len(conformal)} pairs have one" if conformal else f"no quantity had {ENOUGH} pairs before it yet"
    return [
        Quantity("pairs", len(pairs), "", "count", source, "measured"),
        Quantity("median error", error, "%", f"{MEDIAN}, of all pairs", source, "measured"),
        Quantity(
            f"coverage of {LEVEL:.0%} intervals",
            _share_covered(conformal),
            "%",
            COVERAGE,
            source,
            "measured",
            note=enough,
        ),
    ]


def _ratios(groups: Mapping[tuple[str, str], Sequence[Pair]]) -> Plot:
    machines = {machine for _, machine in groups}
    series = [
        Series(
            quantity if len(machines) == 1 else f"{quantity}, {machine}",
            [(index + 1, pair.measured / pair.corrected) for index, pair in enumerate(pairs)],
            "dots",
        )
        for (quantity, machine), pairs in sorted(groups.items())
    ]
    longest = max(len(pairs) for pairs in groups.values())
    series.append(Series("equal", [(1, 1.0), (max(2, longest), 1.0)], "dashed"))
    return Plot("Measured / predicted", "number of the pair", "measured / predicted", series, log_y=True)
