"""A probe's profile as tables and a roofline plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from headrace.plan.document import Column, Document, Quantity, Table, Value
from headrace.plan.profile import JUDGED, NOISY, Figure, Profile
from headrace.plan.roofline import SOURCE, product_intensity, roofline

GIGA = 1e9
UNITS: Mapping[str, tuple[float, str]] = {
    "FLOP/s": (GIGA, "GFLOP/s"),
    "bytes/s": (GIGA, "GB/s"),
    "s": (1e-6, "µs"),
}
"""Unit of a figure -> (what it is divided by, unit that is shown)."""
NANO_BELOW_S = 1e-7
MEDIAN = "median of the rounds; a round: the median of its passes, or their mean (kernels, engine steps)"
OTHERS = "(processor time of all programs, stolen time included, − the probe's) / duration"
SPREAD = "(largest − smallest) / median of the rounds"
STREAM = "McCalpin: STREAM; bytes read and written, without write-allocate"
KINDS: Mapping[str, str] = {
    "gemm": "{weights} {n} × {k}, M = {rows}, {set_bytes}",
    "stream": "STREAM {kind}",
    "read": "reading, working set {bytes}",
    "gather": "gather, pieces of {piece_bytes}",
    "attend": "keys and values, {dtype}, by attention",
    "attention": "attention, {phase}, {dtype} keys",
    "disk": "disk, a file of {bytes} in {where}",
    "host_link": "host memory → {to}",
    "card": "GPU, {kind} {dtype}",
    "application": "{kernel}",
    "operation": "an operation of a step",
    "rows": "norm and rounding, a number",
    "step": "engine step, {rows} rows",
}
"""Figure -> how a line of the table calls it."""
TABLES: Sequence[tuple[str, Sequence[str]]] = (
    ("Products of the native backend: weights N × K, M tokens, bytes of all weights in turn", ("gemm",)),
    ("Memory", ("stream", "read", "gather", "attend")),
    ("Disk, links and GPU", ("disk", "host_link", "card")),
    ("Applications", ("application", "attention")),
    ("Overheads", ("operation", "rows", "step")),
)


def describe(profile: Profile) -> Document:
    plot = roofline(profile)
    notes = [profile.verdict, *_notes(profile)]
    return Document(
        f"Probe of {profile.machine.cpu}",
        quantities=_quantities(profile),
        tables=[table for title, names in TABLES if (table := _table(profile, title, names)) is not None],
        plots=[] if plot is None else [plot],
        notes=notes,
        data={"profile": profile.as_json()},
    )


def _quantities(profile: Profile) -> list[Quantity]:
    machine, source = profile.machine, _source(profile)
    given: list[tuple[str, Value, str, str]] = [
        ("cores", machine.cores, "", "CPUs that the process may use, or its quota pays for"),
        ("threads", machine.threads, "", "--threads, or one a core"),
        ("instruction set", machine.instruction_set or "native kernels not built", "", "the widest with kernels"),
        ("memory", machine.memory_bytes / GIGA, "GB", "installed, or the limit of the control group"),
        *((f"{level} cache", size / 2**10, "KiB", "one of them") for level, size in sorted(machine.caches.items())),
        ("other programs' load", machine.busy_cores, "cores", OTHERS),
        ("load average", machine.load_average, "", "of the minute before"),
        ("duration", profile.seconds, "s", "of the whole probe"),
    ]
    found = [
        Quantity(name, value, unit, formula, "the system", "measured", note="" if value is not None else "not known")
        for name, value, unit, formula in given
    ]
    heads = [
        ("float32 products", "FLOP/s", _best(profile, ("float32",)), "largest of the products"),
        ("int8-activation products", "FLOP/s", _best(profile, ("int8", "int4")), "largest of the products"),
        ("memory bandwidth", "bytes/s", profile.find("read", bytes=_largest_read(profile)), "reading, largest set"),
        ("STREAM triad", "bytes/s", profile.find("stream", kind="triad"), "24 bytes an element"),
        ("disk", "bytes/s", profile.find("disk"), "a file that is not in the page cache"),
        ("engine step, 1 row", "s", profile.find("step", rows=1), "engine with next to no model"),
    ]
    for name, unit, one, formula in heads:
        found.append(_quantity(name, unit, one, f"{formula}; {MEDIAN}", source))
    formula = f"{SPREAD}: the largest of {', '.join(JUDGED)}"
    spread = Quantity(
        "largest spread", 100 * profile.worst_spread, "%", formula, source, "measured", note=profile.verdict
    )
    return [*found, spread]


def _quantity(name: str, unit: str, one: Figure | None, formula: str, source: str) -> Quantity:
    scale, shown = UNITS[unit]
    if one is None or one.value is None:
        return Quantity(name, None, shown, formula, source, "measured", note="not measured")
    low, high = min(one.rounds) / scale, max(one.rounds) / scale
    return Quantity(name, one.value / scale, shown, formula, source, "measured", low, high, one.verdict)


def _best(profile: Profile, weights: Sequence[str]) -> Figure | None:
    products = [one for one in profile.figures if one.name == "gemm" and one.rounds and one.of["weights"] in weights]
    return max(products, key=lambda one: one.value or 0.0, default=None)


def _largest_read(profile: Profile) -> int:
    return max((int(one.of["bytes"]) for one in profile.figures if one.name == "read" and one.rounds), default=0)


def _source(profile: Profile) -> str:
    return f"probe of {profile.machine.date}" + (f", {profile.path}" if profile.path else "")


def _table(profile: Profile, title: str, names: Sequence[str]) -> Table | None:
    figures = sorted(
        (one for one in profile.figures if one.name in names), key=lambda one: (names.index(one.name), bool(one.note))
    )
    if not figures:
        return None
    source = _source(profile)
    columns = [
        Column("what"),
        Column("median", "", MEDIAN, source),
        Column("unit"),
        Column("spread", "%", SPREAD, source),
        Column("intensity", "FLOPs a byte", "FLOPs ÷ least bytes moved", SOURCE),
        Column("verdict", "", f"spread ≤ {NOISY:.0%}", source),
    ]
    with_intensity = "gemm" in names or "application" in names
    kept = [index for index, column in enumerate(columns) if with_intensity or column.name != "intensity"]
    rows = [_row(one) for one in figures]
    notes = [STREAM] if "stream" in names else []
    notes += dict.fromkeys(one.note for one in figures if one.note and one.rounds)
    return Table(title, [columns[i] for i in kept], [[row[i] for i in kept] for row in rows], notes)


def _row(one: Figure) -> list[Value]:
    of = {key: _size(int(value)) if key.endswith("bytes") else value for key, value in one.of.items()}
    name = KINDS.get(one.name, one.name).format_map(_Blank(of)).strip() if one.rounds or one.of else one.name
    if one.value is None or one.spread is None:
        return [name, None, "", None, None, one.note]
    scale, unit = UNITS.get(one.unit, (1.0, one.unit))
    if one.unit == "s" and one.value < NANO_BELOW_S:
        scale, unit = 1e-9, "ns"
    intensity = product_intensity(one) if one.name == "gemm" else one.of.get("intensity")
    return [name, one.value / scale, unit, 100 * one.spread, intensity, one.verdict]


class _Blank(dict[str, object]):
    """A figure that was not measured does not say all of it."""

    def __missing__(self, key: str) -> str:
        return ""


def _size(nbytes: int) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if nbytes >= size:
            return f"{nbytes / size:g} {unit}"
    return f"{nbytes} B"


def _notes(profile: Profile) -> list[str]:
    machine = profile.machine
    notes = [
        f"{machine.cpu}, {machine.threads} threads of {machine.cores} cores, {machine.system}, "
        + ", ".join(f"{name} {version}" for name, version in machine.libraries.items()),
    ]
    if profile.path:
        notes.append(f"Written to {profile.path}; the other plans read it from there.")
    return notes
