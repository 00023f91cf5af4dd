"""The answers of `headrace plan energy` as documents: every constant, its source, and what the signs mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from headrace.plan import cost, energy
from headrace.plan.cost import Option, Purchase, accounting, verdicts
from headrace.plan.document import Basis, Column, Document, Quantity, Table
from headrace.plan.energy import Comparison, Load, Side

STUDY = "published table of annual energy savings per GPU node (NVLM study)"
ARITHMETIC = f"formulas of the {STUDY}"
PUE_1 = "as in the published table, which counts the computers alone"
INPUT = "input"
DEFAULT = "not given: the command's default"
EPA = "EPA, greenhouse gas equivalencies calculator"
TRT = "NVIDIA, TensorRT-LLM on H100 against A100: speed-ups, energy and total cost of ownership"
NOT_EVIDENCE = (
    "The study's 3.3x was measured between two methods (batch against one by one) on the same six A100; the calculator "
    "wants a GPU against a CPU. The table is reproduced for its arithmetic; it is no evidence for either kind of node."
)


@dataclass(frozen=True, slots=True)
class Part:
    """What one question adds to the document."""

    quantities: Sequence[Quantity] = ()
    tables: Sequence[Table] = ()
    notes: Sequence[str] = ()
    data: Mapping[str, object] | None = None


def document(title: str, parts: Sequence[Part]) -> Document:
    """All parts, in order."""
    data: dict[str, object] = {}
    for part in parts:
        data |= part.data or {}
    return Document(
        title,
        quantities=[one for part in parts for one in part.quantities],
        tables=[one for part in parts for one in part.tables],
        notes=[one for part in parts for one in part.notes],
        data=data,
    )


# ---------------------------------------------------------------- two kinds of nodes


def comparison(found: Comparison, tokens_per_s: float | None, equivalents: bool, is_study: bool) -> Part:
    """`tokens_per_s`: of the other side's devices, where it is known; `is_study`: its speed-up is the study's."""
    quantities = [*_constants(found, equivalents), *_results(found, equivalents), *_break_even(found)]
    if tokens_per_s is not None:
        quantities += _per_tokens(found, tokens_per_s)
    low, high = found.saved_interval
    data: dict[str, object] = {
        "printed": dict(energy.printed(found, equivalents)),
        "nodes": found.nodes,
        "saved_kwh": found.saved.total,
        "saved_kwh_interval": [low, high],
        "significant": found.significant,
    }
    notes = [energy.sign_sentence(found)]
    if is_study:
        notes.append(NOT_EVIDENCE)
    return Part(quantities, _tables(found, equivalents), notes, {"comparison": data})


def _constants(found: Comparison, equivalents: bool) -> list[Quantity]:
    speedup, load = found.speedup, found.load
    how = {
        "published": STUDY,
        "measured": f"given: at least {speedup.measured} of each side; medians, and the worst and the best pair",
    }.get(speedup.basis, "given")
    low, high = (speedup.low, speedup.high) if speedup.measured > 1 else (None, None)
    rows = [
        Quantity(
            "gpu_vs_cpu_speedup", speedup.value, "x", "work of other / work of base", how, speedup.basis, low, high
        )
    ]
    for label, side in (("base", found.base), ("other", found.other)):
        rows += _side(label, side)
    hours = _setting(load, "hours_per_year", STUDY + ": load 24/7/365")
    rows += [
        Quantity("hours of load", load.hours_per_year, "h/year", INPUT, hours[0], hours[1]),
        Quantity("price of power", load.price_per_kwh, "$/kWh", INPUT, *_setting(load, "price_per_kwh", STUDY)),
        Quantity("PUE", load.pue, "", "building / computers", *_setting(load, "pue", PUE_1)),
        Quantity(
            f"grid factor, {load.grid.name}", load.grid.grams, "g CO₂/kWh", INPUT, load.grid.source, load.grid.basis
        ),
    ]
    if equivalents:
        rows.append(Quantity("a car", energy.CAR_TONNES, "t CO₂/year", INPUT, EPA, "published"))
        rows.append(Quantity("a tree seedling", energy.SEEDLING_TONNES, "t CO₂ in 10 years", INPUT, EPA, "published"))
    return rows


def _side(label: str, side: Side) -> list[Quantity]:
    fields = (
        ("used", "devices used", ""),
        ("per_node", "devices in a node", ""),
        ("node_kw", "node, full load", "kW"),
        ("network_kw", "network of a node", "kW"),
    )
    rows = []
    for name, words, unit in fields:
        basis: Basis = "given" if name in side.given else side.basis
        source = "given" if name in side.given else side.source
        rows.append(Quantity(f"{label} ({side.name}): {words}", getattr(side, name), unit, INPUT, source, basis))
    return rows


def _setting(load: Load, name: str, source: str) -> tuple[str, Basis]:
    return ("given", "given") if name in load.given else (source, "published")


def _results(found: Comparison, equivalents: bool) -> list[Quantity]:
    basis = _basis(found)
    load, ends = found.load, found.saved_interval if found.speedup.measured > 1 else ()

    def saved(name: str, unit: str, formula: str, per_kwh: float) -> Quantity:
        low, high = (end * per_kwh for end in ends) if ends else (None, None)
        return Quantity(name, found.saved.total * per_kwh, unit, formula, ARITHMETIC, basis, low, high)

    over = f"{load.years:g} years"
    rows = [
        Quantity("base nodes for one other node", found.nodes, "nodes", energy.NODES, ARITHMETIC, basis),
        saved("energy saved", "kWh/year", energy.SAVED, 1.0),
        saved("cost saved", "$/year", energy.COST, load.price_per_kwh),
        saved(f"cost saved in {over}", "$", f"{energy.COST} x years", load.price_per_kwh * load.years),
        saved("CO₂ saved", "t/year", energy.CO2, load.grid.tonnes),
    ]
    if equivalents:
        cars, seedlings = "t CO₂ / t of a car and year", "t CO₂ / t of a seedling in 10 years"
        rows.append(Quantity("the same in cars taken off the road", found.cars, "cars", cars, EPA, basis))
        rows.append(
            Quantity("the same in seedlings grown 10 years", found.seedlings, "seedlings", seedlings, EPA, basis)
        )
    return rows


def _basis(found: Comparison) -> Basis:
    """The weakest of what goes in: whatever the user gave, else what the figures were published with."""
    given = found.base.given or found.other.given or found.load.given
    return "given" if given or found.speedup.basis != "published" else "published"


def _break_even(found: Comparison) -> list[Quantity]:
    rows = []
    for network, words in ((False, "without the network"), (True, "with it")):
        value = energy.break_even_speedup(found.base, found.other, network)
        name = f"speed-up at which both use equal energy, {words}"
        rows.append(Quantity(name, value, "x", energy.BREAK_EVEN, "powers above", _basis(found)))
    return rows


def _per_tokens(found: Comparison, tokens_per_s: float) -> list[Quantity]:
    load, rows = found.load, []
    sides = ((found.base, tokens_per_s / found.speedup.value), (found.other, tokens_per_s))
    for side, rate in sides:
        kwh = energy.kwh_per_million_tokens(side, rate, load.pue)
        made: tuple[tuple[str, float, str, str], ...] = (
            ("energy", kwh, "kWh/Mtoken", energy.PER_TOKENS),
            ("power cost", kwh * load.price_per_kwh, "$/Mtoken", energy.COST),
            ("CO₂", kwh * load.grid.grams, "g/Mtoken", energy.CO2),
        )
        for name, value, unit, formula in made:
            rows.append(
                Quantity(f"{name}, {side.name}", value, unit, formula, f"at {rate:.5g} tokens/s", _basis(found))
            )
    return rows


def _tables(found: Comparison, equivalents: bool) -> list[Table]:
    shown = energy.printed(found, equivalents)
    used = f"{energy.COMPUTE} + {energy.NETWORK}"
    columns = (
        Column("kWh a year"),
        Column(found.base.name, "kWh", used, ARITHMETIC),
        Column(found.other.name, "kWh", used, ARITHMETIC),
        Column("savings", "kWh", energy.SAVED, ARITHMETIC),
    )
    words = {"compute": "compute", "network": "networking", "total": "total"}
    rows = [
        (label, *(shown[f"{side}_{name}_kwh"] for side in ("base", "other", "saved"))) for name, label in words.items()
    ]
    years = f"{found.load.years:g} years"
    meaning: list[tuple[str, str, str]] = [
        ("power cost, a year", shown["saved_cost_year"], "$"),
        (f"power cost, {years}", shown["saved_cost_years"], "$"),
        ("CO₂, a year", shown["saved_co2_t"], "t"),
    ]
    if equivalents:
        meaning.append(("cars, a year", shown["cars"], "cars"))
        meaning.append(("seedlings grown 10 years", shown["seedlings"], "seedlings"))
    title = f"Annual energy savings per node: {found.other.name} against {found.base.name}"
    note = "Rounded half up by magnitude; parentheses: negative."
    value = Column("value", "", "savings in kWh x price, x grid factor, / a car's or a seedling's CO₂", ARITHMETIC)
    return [
        Table(title, columns, rows, (note,)),
        Table("What the savings come to", (Column("savings"), value, Column("unit")), meaning, (note,)),
    ]


# ---------------------------------------------------------------- published ratios of two GPU generations


def tensorrt_llm() -> Part:
    """Energy and TCO ratios of H100 against A100 from two node powers: 5.6 and 3.2, and what 5.3 and 3 need."""
    rows = [
        Quantity("A100 node", energy.A100_NODE_KW, "kW", INPUT, "NVIDIA DGX A100 data sheet", "data sheet"),
        Quantity("H100 node", energy.H100_NODE_KW, "kW", INPUT, energy.STUDY_GPU.source, "published"),
    ]
    printed = {}
    claims = (("GPT-J 6B", 8.0, 5.3), ("Llama 2 70B", 4.6, 3.0))
    interval = cost.cost_ratio_interval([(speedup, ratio, 1) for _, speedup, ratio in claims])
    assert interval is not None
    middle = sum(interval) / 2
    for model, speedup, ratio in claims:
        value = energy.energy_ratio(speedup, energy.A100_NODE_KW, energy.H100_NODE_KW)
        tco = speedup / middle
        formula = "speed-up x cost of A100 / cost of H100"
        note = f"published: {ratio:g}. A check, no prediction: the price ratio below is the one that fits both claims"
        rows += [
            Quantity(f"speed-up, {model}", speedup, "x", INPUT, TRT, "published"),
            Quantity(f"energy ratio, {model}", value, "x", energy.ENERGY_RATIO, TRT, "published"),
            Quantity(f"TCO ratio, {model}", tco, "x", formula, TRT, "published", note=note),
        ]
        printed[model] = {"energy_ratio": str(cost.half_up(value, 1)), "tco_ratio": str(cost.half_up(tco, 1))}
    rows.append(
        Quantity(
            "cost of an H100 node / of an A100 node that both TCO claims need",
            middle,
            "",
            "largest lower and smallest upper bound of speed-up / (TCO ratio ± half of its last digit)",
            TRT,
            "published",
            *interval,
        )
    )
    note = "Both claims are of whole nodes at full load: ratios of node powers, and of node prices, explain them."
    return Part(rows, (), (note,), {"tensorrt_llm": {"printed": printed, "cost_ratio": list(interval)}})


# ---------------------------------------------------------------- money


@dataclass(frozen=True, slots=True)
class Hour:
    """What an hour of a machine costs."""

    price: float
    """Dollars."""
    source: str = "given"
    basis: Basis = "given"
    owned: bool = False


def work(hour: Hour, requests: float | None, tokens: float | None) -> Part:
    """Cost of a request and of a million tokens; `requests`, `tokens`: per second."""
    how = "owned" if hour.owned else "rented"
    rows = []
    if requests is not None:
        value, at = cost.cost_per_request(hour.price, requests), f"at {requests:g} requests/s"
        rows.append(Quantity(f"cost of a request, {how}", value, "$", cost.PER_REQUEST, at, hour.basis))
    if tokens is not None:
        value, at = cost.cost_per_million_tokens(hour.price, tokens), f"at {tokens:g} tokens/s"
        name = f"cost of a million tokens, {how}"
        rows.append(Quantity(name, value, "$/Mtoken", cost.PER_MILLION_TOKENS, at, hour.basis))
    return Part(rows)


def rent(hour: Hour) -> Part:
    return Part([Quantity("rent of an hour", hour.price, "$/h", INPUT, hour.source, hour.basis)])


def ownership(machine: Purchase, rent_per_hour: float | None, load: Load, given: frozenset[str]) -> Part:
    """Total cost of ownership; with a rent, when buying has paid for itself. `given`: what the user set of life_years
    and fixed_per_hour."""
    life, fixed = ("given" if name in given else DEFAULT for name in ("life_years", "fixed_per_hour"))
    hours_a_year = f"years x {load.hours_per_year:g} hours of use a year"
    rows = [
        Quantity("price of the machine", machine.price, "$", INPUT, "given", "given"),
        Quantity("hours of use in its life", machine.life_hours, "h", hours_a_year, life, "given"),
        Quantity("its power", machine.kw, "kW", INPUT, "given", "given"),
        Quantity("PUE", machine.pue, "", "building / computers", *_setting(load, "pue", PUE_1)),
        Quantity("price of power", machine.price_per_kwh, "$/kWh", INPUT, *_setting(load, "price_per_kwh", STUDY)),
        Quantity("fixed costs", machine.fixed_per_hour, "$/h", INPUT, fixed, "given"),
        Quantity("TCO of an hour of use", machine.tco_per_hour, "$/h", cost.TCO, "figures above", "given"),
    ]
    if rent_per_hour is None:
        return Part(rows)
    hours = machine.break_even_hours(rent_per_hour)
    if hours is None:
        why = "never: rent is not above what running the own machine costs"
        rows.append(
            Quantity("buying beats renting after", None, "h", cost.BREAK_EVEN, "figures above", "given", note=why)
        )
        return Part(rows, (), (f"Renting stays cheaper: {why[7:]}.",))
    rows.append(Quantity("buying beats renting after", hours, "h", cost.BREAK_EVEN, "figures above", "given"))
    years = hours / load.hours_per_year
    within = "within its life" if hours <= machine.life_hours else "later than its life: renting is cheaper"
    note = (
        f"Bought, it has paid for itself after {accounting(hours)} hours of use ({years:.3g} years at "
        f"{load.hours_per_year:g} hours a year), {within}."
    )
    return Part(rows, (), (note,))


def options(choices: Sequence[Option]) -> Part:
    """Ways to run the same work, by their cost of a million tokens."""
    columns = (
        Column("option"),
        Column("price", "$/h", INPUT, "given, or the device catalogue (Mélange's GPU table)"),
        Column("cost", "$/Mtoken", cost.PER_MILLION_TOKENS, "median of the given tokens/s"),
        Column("best measured", "$/Mtoken", cost.PER_MILLION_TOKENS, "largest of the given tokens/s"),
        Column("worst measured", "$/Mtoken", cost.PER_MILLION_TOKENS, "smallest of the given tokens/s"),
        Column("verdict", "", "against the cheapest: whether both spreads overlap, else the ratio"),
    )
    rows: list[tuple[str | float, ...]] = []
    for option, said in zip(choices, verdicts(choices), strict=True):
        rows.append((option.name, option.price_per_hour, option.cost, *option.spread, said))
    notes = ["Options whose spreads overlap with the cheapest one's are no significant difference."]
    single = [option.name for option in choices if len(option.tokens_per_s) == 1]
    if single:
        notes.append(f"Measured once, so without a spread: {', '.join(single)}.")
    return Part((), (Table("Cost of a million tokens", columns, rows, notes),))
