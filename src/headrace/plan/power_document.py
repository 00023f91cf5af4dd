"""The answer of `headrace plan power` as a document: the row, the sweep of extra servers, the operator's commands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from headrace.plan.document import Basis, Column, Document, Plot, Quantity, Series, Table
from headrace.plan.power import LOWEST_MHZ, PRIORITIES, Level, Policy, Priority, commands
from headrace.plan.power_simulation import SLOS, WARM_UP_S, WORKS, Point, Row, Run, most_extra, thinned

POLCA = "Patel et al., POLCA: Power Oversubscription in LLM Cloud Providers, 2023 (arXiv 2308.12908)"
FITTED = "fitted to POLCA's figures: peak of 79 %, rise of up to 11.8 points in 40 s, 20 % off a peak for ≤ 7 % of time"
HELD = "published: {}, which the server model was fitted to"
CHOSEN = "chosen for this simulation"
SIMULATED = "simulation, seed {seed}, {hours:g} h"
PUBLISHED_PEAK, PUBLISHED_RISE, PUBLISHED_EXTRA = 0.79, 0.118, 0.30
INPUT = "input"
PLOT_POINTS = 400
LEVELS: Mapping[Level, str] = {
    Level.FREE: "free clocks",
    Level.LOW_T1: "low priority, first clock",
    Level.LOW_T2: "low priority, second clock",
    Level.HIGH_T2: "high priority too",
    Level.BRAKE: "brake",
}


def document(row: Row, policy: Policy, points: Sequence[Point], shown: Point, given: frozenset[str]) -> Document:
    """`points`: of the sweep, by extra servers; `shown`: the one whose power is drawn; `given`: names of fields of row
    and policy that the user set."""
    source = SIMULATED.format(seed=row.seed, hours=row.hours)
    return Document(
        "Power oversubscription: extra servers on one row's power",
        quantities=[*_findings(row, policy, points, source), *_inputs(row, policy, given)],
        tables=[_sweep(points, source), _levels(points, source), _works(), _commands(policy)],
        plots=[_brakes(points), *_latencies(points), _power(policy, shown)],
        notes=[*_notes(row, points, shown), *dict.fromkeys(command for _, command in commands(policy))],
        data={"sweep": [_plain(one) for one in points], "most_extra": most_extra(points)},
    )


def _inputs(row: Row, policy: Policy, given: frozenset[str]) -> list[Quantity]:
    model = row.model
    rows: list[tuple[str, str, float, str, str]] = [
        ("servers", "servers provisioned for", row.servers, "", POLCA),
        ("server_kw", "provisioned for a server", row.server_kw, "kW", "NVIDIA DGX A100 data sheet, 8 A100"),
        ("t1", "threshold T1", policy.t1, "of provisioned power", POLCA),
        ("t2", "threshold T2", policy.t2, "of provisioned power", POLCA),
        ("hysteresis", "clocks come back below the threshold by", policy.hysteresis, "of provisioned power", POLCA),
        ("limit", "brake above", policy.limit, "of provisioned power", POLCA),
        ("low_t1_mhz", "low priority above T1", policy.low_t1_mhz, "MHz", POLCA),
        ("low_t2_mhz", "low priority above T2", policy.low_t2_mhz, "MHz", POLCA),
        ("high_t2_mhz", "high priority, if that does not suffice", policy.high_t2_mhz, "MHz", POLCA),
        ("brake_mhz", "brake", policy.brake_mhz, "MHz", POLCA),
        ("settle_s", "a command is given so long to show before the next", policy.settle_s, "s", POLCA),
        ("telemetry_s", "telemetry every", row.telemetry_s, "s", POLCA),
        ("capping_s", "a lock of clocks acts after", row.capping_s, "s", POLCA),
        ("braking_s", "the brake acts after", row.braking_s, "s", POLCA),
        ("ups_s", "the UPS carries too much power for", row.ups_s, "s", POLCA),
        ("utilisation", "mean load of a server", row.utilisation, "of its time", CHOSEN),
        ("wave", "the day's wave", row.wave, "of the mean load", CHOSEN),
        ("slots", "requests a server answers at once", row.slots, "", CHOSEN),
        ("idle", "power of an idle server", model.idle, "of its provisioned power", FITTED),
        ("prefill", "power of a prefill", model.prefill, "of its provisioned power", FITTED),
        ("decode", "power of a decode", model.decode, "of its provisioned power", FITTED),
        ("clock_mhz", "highest clock", model.clock_mhz, "MHz", "NVIDIA A100 data sheet"),
        ("exponent", "power above idle falls with the clock to the power of", model.exponent, "", FITTED),
        ("sensitivity", "share of a decode that slows with the clock", model.sensitivity, "", FITTED),
        ("prefill_token_s", "prefill", row.prefill_token_s, "s/token", "BLOOM-176B, 8 A100: 2 P / (50 % of the peak)"),
        ("decode_token_s", "decode", row.decode_token_s, "s/token", "BLOOM-176B, 8 A100: 2 P / (60 % of bandwidth)"),
    ]
    made = []
    for name, words, value, unit, source in rows:
        basis: Basis = "published" if source == POLCA else "data sheet" if "data sheet" in source else "simulated"
        if name in given:
            basis, source = "given", "given"
        made.append(Quantity(words, value, unit, INPUT, source, basis))
    return made


def _findings(row: Row, policy: Policy, points: Sequence[Point], source: str) -> list[Quantity]:
    base = points[0].free
    rise = base.largest_rise(row.capping_s)
    most = most_extra(points)
    total = row.servers * row.server_kw
    unit = "of provisioned power"
    published = HELD.format(f"{PUBLISHED_PEAK:.0%}")
    short = "" if rise is not None else f"the run is no longer than its first {WARM_UP_S:g} s, which do not count"
    rows = [
        Quantity("provisioned power", total, "kW", "servers x kW", "inputs below", "exact"),
        Quantity("peak without extra servers", base.peak, unit, "largest reading", source, "simulated", note=published),
        Quantity(
            f"largest rise within {row.capping_s:g} s",
            rise,
            unit,
            "largest reading - lowest of the readings before",
            source,
            "simulated",
            note=short or HELD.format(f"{PUBLISHED_RISE:.1%}"),
        ),
        Quantity(
            "highest safe T2",
            None if rise is None else policy.limit - rise,
            unit,
            "limit - largest rise while a command is on its way",
            source,
            "simulated",
            note=short or "published: 88.2 %, and 89 % chosen",
        ),
    ]
    name = "extra servers that keep both SLOs without a brake"
    words = f"published: {PUBLISHED_EXTRA:.0%}"
    if most is None:
        words = "not even the fewest extra servers do"
    percent = None if most is None else 100 * most
    rows.append(Quantity(name, percent, "%", "most of the sweep", source, "simulated", note=words))
    return rows


def _sweep(points: Sequence[Point], source: str) -> Table:
    peak, brakes = "largest reading / provisioned", "times that power passed the limit, in the run"
    columns = [
        Column("extra", "%"),
        Column("servers", "", "provisioned for x (1 + extra)", INPUT),
        Column("peak, free", "%", f"{peak}, clocks never lowered", source),
        Column("peak, controlled", "%", peak, source),
        Column("brakes, naive", "", f"{brakes}: no controller, only the brake", source),
        Column("brakes, controlled", "", brakes, source),
    ]
    longer = "latency / latency at free clocks - 1"
    columns += [Column(f"{priority} {name}", "% longer", longer, source) for priority in _ORDER for name in _NAMES]
    columns.append(Column("verdict", "", "no brake, both SLOs", POLCA))
    rows: list[tuple[str | float, ...]] = []
    for one in points:
        broken = one.controlled.broken()
        impacts = [round(100 * value, 2) for priority in _ORDER for value in one.controlled.impact[priority]]
        rows.append(
            (
                100 * one.extra,
                one.free.servers,
                round(100 * one.free.peak, 1),
                round(100 * one.controlled.run.peak, 1),
                one.naive.run.brakes,
                one.controlled.run.brakes,
                *impacts,
                "fails: " + ", ".join(broken) if broken else "keeps all",
            )
        )
    high, low = SLOS["high"], SLOS["low"]
    note = (
        f"Kept is: no brake, high priority p50 < {high.p50:.0%} and p99 < {high.p99:.0%} longer, low priority p50 < "
        f"{low.p50:.0%} and p99 < {low.p99:.0%} longer (POLCA)."
    )
    return Table("Extra servers: brakes and latency by priority", columns, rows, (note,))


_NAMES = ("p50", "p99")
_ORDER: Sequence[Priority] = ("high", "low")


def _levels(points: Sequence[Point], source: str) -> Table:
    share = "time in force / time of the run"
    columns = [Column("extra", "%"), *(Column(words, "% of time", share, source) for words in LEVELS.values())]
    rows = []
    for one in points:
        run = one.controlled.run
        total = sum(run.level_s.values())
        rows.append((100 * one.extra, *(round(100 * run.level_s[level] / total, 2) for level in LEVELS)))
    return Table("How long each level was in force", columns, rows)


def _works() -> Table:
    columns = (
        Column("work", source=POLCA),
        Column("priority"),
        Column("of the servers", "%", INPUT, POLCA),
        Column("prompt", "tokens", INPUT, POLCA),
        Column("answer", "tokens", INPUT, POLCA),
    )
    rows = [
        (work.name, work.priority, 100 * work.share, "{}–{}".format(*work.prompt), "{}–{}".format(*work.answer))
        for work in WORKS
    ]
    return Table("Work", columns, rows, ("Lengths are drawn evenly between both ends.",))


def _commands(policy: Policy) -> Table:
    notes = (
        "headrace changes no device: an operator runs these, as root, on the servers named. The brake is a "
        "signal of the hardware and has no command.",
        f"{LOWEST_MHZ} MHz is the A100's lowest clock; other GPUs: nvidia-smi -q -d SUPPORTED_CLOCKS.",
    )
    return Table("For the operator", (Column("when"), Column("command")), list(commands(policy)), notes)


def _brakes(points: Sequence[Point]) -> Plot:
    naive = [(100 * one.extra, float(one.naive.run.brakes)) for one in points]
    controlled = [(100 * one.extra, float(one.controlled.run.brakes)) for one in points]
    series = (Series("no controller", naive, "dashed"), Series("controller", controlled))
    return Plot("Brakes", "extra servers (%)", "brakes", series)


def _latencies(points: Sequence[Point]) -> list[Plot]:
    """None where no request took longer."""
    series = []
    for priority in _ORDER:
        for index, name in enumerate(_NAMES):
            values = [(100 * one.extra, 100 * one.controlled.impact[priority][index]) for one in points]
            longer = [point for point in values if point[1] > 0]
            if longer:
                series.append(Series(f"{priority} priority, {name}", longer))
    title = "Latency with the controller, against free clocks"
    return [Plot(title, "extra servers (%)", "longer (%)", series, log_y=True)] if series else []


def _power(policy: Policy, shown: Point) -> Plot:
    runs = (("free clocks", shown.free), ("controller", shown.controlled.run))
    series = [Series(name, _trace(run)) for name, run in runs]
    end = max(point[0] for one in series for point in one.points)
    lines = (("T1", policy.t1), ("T2", policy.t2), ("limit", policy.limit))
    series += [Series(name, [(0.0, 100 * value), (end, 100 * value)], "dashed") for name, value in lines]
    title = f"Power of the row with {shown.extra:.0%} extra servers"
    return Plot(title, "time (h)", "provisioned power (%)", series)


def _trace(run: Run) -> list[tuple[float, float]]:
    hours = run.telemetry_s / 3600
    return [(index * hours, 100 * share) for index, share in thinned(run.shares, PLOT_POINTS)]


def _notes(row: Row, points: Sequence[Point], shown: Point) -> list[str]:
    servers = f"With {shown.extra:.0%} extra servers"
    kept, lost = shown.controlled.broken(), shown.naive.broken()
    notes = [
        f"{servers} the controller {_said(kept)}.",
        f"{servers} and no controller, only the brake, the row {_said(lost)}.",
    ]
    if most_extra(points) is None:
        notes.append("Not even the row as it is keeps everything: lower its load, or provision more power.")
    if row.hours * 3600 < row.day_s / 2:
        notes.append(
            f"Only {row.hours:g} h from the day's lowest load on: its crest, after {row.day_s / 7200:g} h, is not in "
            "it, so nothing here says that the row is safe."
        )
    notes.append(
        "Simulated, on a load and a server model that are listed with the inputs. POLCA's figures (30 % extra servers, "
        "no brake in six weeks) are a simulation too, of its authors, on a load like that of their clusters."
    )
    return notes


def _said(broken: Sequence[str]) -> str:
    return f"fails: {', '.join(broken)}" if broken else "never brakes and keeps both SLOs"


def _plain(point: Point) -> dict[str, object]:
    return {
        "extra": point.extra,
        "servers": point.free.servers,
        "free_peak": point.free.peak,
        **{
            name: {
                "peak": one.run.peak,
                "brakes": one.run.brakes,
                "tripped": one.run.tripped,
                "latency_longer": {priority: list(one.impact[priority]) for priority in PRIORITIES},
                "broken": one.broken(),
            }
            for name, one in (("naive", point.naive), ("controlled", point.controlled))
        },
    }
