"""How good past predictions were: what `headrace plan --accuracy` shows of the store of calibration."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import median

from headrace.plan.calibration import ENOUGH, LEVEL, RIDGE, WIDE, WINDOW, Calibration, Pair, Store
from headrace.plan.document import Column, Document, Plot, Quantity, Series, Table, Value

NAMES: Mapping[str, str] = {"ttft_s": "TTFT", "itl_s": "ITL", "tokens_per_s": "throughput", "peak_bytes": "peak memory"}
"""Of what is stored, as `headrace plan model` says it."""
MEDIAN = "median of |predicted - measured| / measured"
COVERAGE = "pairs whose measurement lay in the interval said before it / such pairs"
BACK_TEST = "runs stored by compare and the benchmarks"
UNITS = "A pair is one figure, predicted and then measured. Each prediction used only the pairs before it."


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
    half = f"; from {ENOUGH} pairs on, of half of them"
    quantile = "exp of the conformal quantile of |ln(measured / corrected)|, of the other half"
    columns = [
        Column("quantity"),
        Column("machine"),
        Column("pairs", "", "count", source),
        Column("models", "", "count", source),
        Column("error", "%", f"{MEDIAN}, with the factor of that time", source),
        Column("error of the formula", "%", f"{MEDIAN}, without a factor", source),
        Column(f"in the {LEVEL:.0%} interval", "%", f"{COVERAGE}; split-conformal intervals", source),
        Column("pairs with one", "", f"count: those with {ENOUGH} or more before them", source),
        Column(f"within factor {WIDE:g}", "%", f"{COVERAGE}; of pairs with fewer before them", source),
        Column("factor now", "", f"exp(Σ ln(measured / predicted) / (n + {RIDGE:g})){half}", source),
        Column("interval's factor now", "", f"{quantile}; with fewer than {ENOUGH} pairs {WIDE:g}", source),
    ]
    return Document(
        title="How good past predictions were",
        quantities=_overall(pairs, source),
        tables=[Table("By quantity", columns, rows, named_by=2)],
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
        NAMES.get(quantity, quantity),
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
    series = []
    for (quantity, machine), pairs in sorted(groups.items()):
        name = NAMES.get(quantity, quantity)
        points = [(index, pair.measured / pair.corrected) for index, pair in enumerate(pairs, 1)]
        series.append(Series(name if len(machines) == 1 else f"{name}, {machine}", points, "dots"))
    longest = max(len(pairs) for pairs in groups.values())
    series.append(Series("equal", [(1, 1.0), (max(2, longest), 1.0)], "dashed"))
    return Plot("Measured / predicted", "pair, oldest first", "measured / predicted", series, log_y=True)
