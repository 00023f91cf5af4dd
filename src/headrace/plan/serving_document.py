"""The answer of `plan serving`: what the mix costs, what it consists of, who serves what."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from headrace.core.errors import InvalidParameter
from headrace.plan.cost import PER_REQUEST, cost_per_request
from headrace.plan.document import Basis, Column, Document, Plot, Quantity, Series, Table, Value
from headrace.plan.serving import LATENCIES, PAPER, Alone, Demand, Gpu, Mix, Slo, alone, money, solve, throughputs

MOST_GPUS = 1_000_000
"""Of an answer."""
PLOT_TIME_LIMIT_S = 1.0
SCALES = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
"""Of the plot: times the rate that was asked for."""
PUBLISHED: Sequence[tuple[str, str, str]] = (
    ("Arena (chat)", "15 to 77", "9 to 68"),
    ("PubMed (long documents)", "15 to 33", "2 to 22"),
    ("mixed", "13 to 51", "4 to 51"),
)
"""Workload, % saved against one GPU type at an SLO of 120 ms and of 40 ms for each token."""


def document(gpus: Sequence[Gpu], demand: Demand, slo: Slo | None = None, notes: Sequence[str] = ()) -> Document:
    """Raises InvalidParameter, BackendUnavailable."""
    slo = slo or Slo()
    served = throughputs(gpus, demand, slo)
    fastest = [max(row[bucket] for row in served) for bucket in range(len(demand.rates))]
    if sum(rate / most for rate, most in zip(demand.rates, fastest, strict=True) if rate) > MOST_GPUS:
        raise InvalidParameter("rate", demand.rate, f"requests/s that {MOST_GPUS:,} GPUs can serve")
    mix = solve(gpus, demand, slo)
    single = [alone(gpu, row, demand) for gpu, row in zip(gpus, served, strict=True)]
    counts = {gpu.name: count for gpu, count in zip(gpus, mix.counts, strict=True) if count}
    named = ", ".join(f"{count} x {name}" for name, count in counts.items())
    limits = [f"{name} ≤ {getattr(slo, name):g}" for name in LATENCIES if getattr(slo, name) is not None]
    said = [
        "Latencies that are kept: " + ("; ".join(limits) if limits else "those the throughputs were taken with") + ".",
        "A mix of whole GPUs; routing is assumed to send each request where its slice belongs. No spare for failures "
        "or for bursts above the rate.",
        *notes,
    ]
    models = list(dict.fromkeys(gpu.model for gpu in gpus if gpu.model))
    if len(models) > 1:
        said.append(f"Throughputs are of different models, as if they answered alike: {', '.join(models)}.")
    if not mix.proven:
        said.insert(0, f"The search was stopped: another mix may cost as little as ${mix.least:.2f}/h.")
    return Document(
        title=f"Serving: {named} for {demand.rate:g} requests/s",
        quantities=_quantities(gpus, demand, mix, single),
        tables=(
            _gpu_table(gpus, mix, single),
            *_bucket_tables(gpus, demand, mix, served),
            _published(),
        ),
        plots=(_plot(gpus, demand, slo, mix, served),),
        notes=said,
        data={"mix": {**counts, "cost": mix.cost}, "proven": mix.proven},
    )


def _quantities(gpus: Sequence[Gpu], demand: Demand, mix: Mix, single: Sequence[Alone]) -> list[Quantity]:
    basis = _weakest([gpu.basis for gpu in gpus])
    source = "; ".join(dict.fromkeys(gpu.source for gpu in gpus))
    cheapest = min(range(len(gpus)), key=lambda index: single[index].cost)
    best = single[cheapest]
    can = best.count is not None
    return [
        Quantity(
            "cost",
            mix.cost,
            "$/h",
            "least Σ price · count, each slice on one type, Σ slice's rate / throughput ≤ count of each type",
            f"{PAPER}; throughputs: {source}",
            basis,
            note="" if mix.proven else "the best that was found in time",
        ),
        Quantity("rented at a time", sum(mix.counts), "", "Σ count of each type", PAPER, basis),
        Quantity(
            "cost of a request",
            cost_per_request(mix.cost, demand.rate),
            "$",
            PER_REQUEST,
            f"{PAPER}; throughputs: {source}",
            basis,
        ),
        Quantity(
            f"{gpus[cheapest].name} alone" if can else "one type alone",
            best.cost if can else None,
            "$/h",
            "⌈Σ rate / throughput⌉ · price",
            f"{PAPER}; throughputs: {source}",
            basis,
            note="the cheapest single type" if can else "no single type serves every size",
        ),
        Quantity(
            "saved by the mix",
            100 * (1 - mix.cost / best.cost) if can else None,
            "%",
            "1 − mix / cheapest single type",
            PAPER,
            basis,
            note="" if can else "no single type serves every size",
        ),
    ]


def _weakest(bases: Sequence[Basis]) -> Basis:
    """Of figures that rest on different things: what is known least well."""
    return next(
        (one for one in bases if one not in ("given", "measured")), "measured" if "measured" in bases else "given"
    )


def _gpu_table(gpus: Sequence[Gpu], mix: Mix, single: Sequence[Alone]) -> Table:
    rows: list[list[Value]] = [
        [
            gpu.name,
            gpu.per_hour,
            count,
            load,
            money(count * gpu.per_hour),
            only.count,
            None if only.count is None else only.cost,
        ]
        for gpu, count, load, only in zip(gpus, mix.counts, mix.loads, single, strict=True)
    ]
    missing = tuple(
        f"{gpu.name} alone: no throughput within the latencies for {only.missing}."
        for gpu, only in zip(gpus, single, strict=True)
        if only.missing
    )
    return Table(
        "GPU types",
        (
            Column("GPU"),
            Column("price", "$/h", "as given, else the catalogue's", "given or Mélange's GPU table"),
            Column("count in the mix", "", "of least cost", PAPER),
            Column("busy", "GPUs", "Σ slice's rate / throughput", PAPER),
            Column("cost", "$/h", "price · count", PAPER),
            Column("count alone", "", "⌈Σ rate / throughput⌉", PAPER),
            Column("cost alone", "$/h", "price · count alone", PAPER),
        ),
        rows,
        notes=missing,
    )


def _bucket_tables(
    gpus: Sequence[Gpu], demand: Demand, mix: Mix, served: Sequence[Sequence[float]]
) -> tuple[Table, Table]:
    dealt: list[list[Value]] = []
    most: list[list[Value]] = []
    for index, (name, rate) in enumerate(zip(demand.buckets, demand.rates, strict=True)):
        if rate:
            dealt.append([name, rate, *(100 * part / demand.slice_factor for part in mix.slices[index])])
            most.append([name, *(row[index] for row in served)])
    return (
        Table(
            "Who serves what",
            (
                Column("requests"),
                Column("rate", "1/s", "histogram · rate", "given"),
                *(Column(gpu.name, "%", "slices there / slices of this size", PAPER) for gpu in gpus),
            ),
            dealt,
            notes=(f"Requests of a size are dealt out in slices: {demand.slice_factor}.",),
        ),
        Table(
            "What one of each serves",
            (
                Column("requests of this size alone"),
                *(Column(gpu.name, "1/s", "most within the latencies", gpu.source) for gpu in gpus),
            ),
            most,
        ),
    )


def _published() -> Table:
    where = f"{PAPER}, evaluation: L4, A10G, A100, H100"
    return Table(
        "Published: saved against a single GPU type",
        (
            Column("workload"),
            Column("SLO 120 ms", "%", "measured by the authors", where),
            Column("SLO 40 ms", "%", "measured by the authors", where),
        ),
        PUBLISHED,
    )


def _plot(gpus: Sequence[Gpu], demand: Demand, slo: Slo, mix: Mix, served: Sequence[Sequence[float]]) -> Plot:
    """What the mix and each single type cost at this and at other rates."""
    others = [replace(demand, rates=[rate * scale for rate in demand.rates]) for scale in SCALES]
    costs = [
        mix.cost if scale == 1 else solve(gpus, one, slo, PLOT_TIME_LIMIT_S).cost
        for scale, one in zip(SCALES, others, strict=True)
    ]
    lines = [Series("mix", [(one.rate, cost) for one, cost in zip(others, costs, strict=True)])]
    for gpu, row in zip(gpus, served, strict=True):
        if alone(gpu, row, demand).count is not None:
            points = [(one.rate, alone(gpu, row, one).cost) for one in others]
            lines.append(Series(f"{gpu.name} alone", points, "dashed"))
    return Plot("Cost against rate", "requests/s", "$/h", lines, log_x=True, log_y=True)
