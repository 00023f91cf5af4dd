"""Energy, CO₂ and cost: two kinds of nodes for the same work, a request, a million tokens, buying against renting."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import replace
from statistics import median
from typing import TYPE_CHECKING, Any

from headrace.core.errors import InvalidParameter

if TYPE_CHECKING:
    from headrace.plan.cost import Option, Purchase
    from headrace.plan.document import Document
    from headrace.plan.energy import Load, Side, Speedup
    from headrace.plan.energy_document import Hour, Part

PRESETS = ("nvlm-study", "tensorrt-llm")
NOTHING = (
    "something to plan: --preset nvlm-study, --gpu-vs-cpu-speedup X, measurements of both sides (--base-seconds and "
    "--other-seconds, or tokens-per-s), --rent-per-hour X, --price X or --option NAME:PRICE:RATE"
)
LIFE_YEARS = 3.0
NODE = (
    ("used", "devices (of a CPU: cores) that did the work"),
    ("per_node", "devices in a node"),
    ("node_kw", "kW of a node at full load"),
    ("network_kw", "kW of a node's share of the switches"),
)
"""Numbers of a side, and what they are."""
TWO_SIDES = "none without --preset nvlm-study, a speed-up or measurements of both sides"
BOUGHT = "none without --price, the machine that is bought"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--preset",
        choices=PRESETS,
        help="nvlm-study: the published table, to the digit. tensorrt-llm: H100 against A100 nodes, published ratios.",
    )
    group = parser.add_argument_group("two sides (what --preset nvlm-study has of them need not be given beside it)")
    group.add_argument(
        "--gpu-vs-cpu-speedup",
        type=float,
        metavar="X",
        help="Work of the other side's devices / work of the base's in the same time; never of two runs on one device.",
    )
    for side, words in (("base", "base side (CPUs)"), ("other", "other side (GPUs)")):
        group.add_argument(f"--{side}-name", metavar="TEXT", help=f"What a node of the {words} is called.")
        group.add_argument(f"--{side}-device", metavar="TEXT", help=f"What the {words} was measured on.")
        for name, what in NODE:
            flag = f"--{side}-{name.replace('_', '-')}"
            group.add_argument(flag, type=float, metavar="X", help=f"Of the {words}: {what}.")
        for name in ("seconds", "tokens-per-s"):
            what = f"Measured on the {words}: {name.replace('-per-', '/')} of the same work; several with commas."
            group.add_argument(f"--{side}-{name}", metavar="X[,X…]", help=what)
    group = parser.add_argument_group("use")
    add_use(group)
    group = parser.add_argument_group("money")
    group.add_argument("--rent-per-hour", type=float, metavar="X", help="$ of an hour of the machine.")
    group.add_argument("--gpu", metavar="NAME", help="Rent as the device catalogue has it.")
    group.add_argument("--requests-per-s", type=float, metavar="X", help="For the cost of a request.")
    group.add_argument("--tokens-per-s", type=float, metavar="X", help="For the cost of a million tokens.")
    group.add_argument("--price", type=float, metavar="X", help="$ of the machine, bought; with --kw.")
    group.add_argument("--kw", type=float, metavar="X", help="Of the bought machine, at work.")
    group.add_argument("--life-years", type=float, metavar="X", help=f"Of the bought machine. Default: {LIFE_YEARS:g}.")
    group.add_argument(
        "--fixed-per-hour", type=float, metavar="X", help="$ for each hour of use: room, care. Default: 0."
    )
    group.add_argument(
        "--option",
        action="append",
        metavar="NAME:PRICE:RATE[,RATE…]",
        help="A way to run the work: its name, $/h (empty: the device catalogue's) and measured tokens/s. Repeatable; "
        "those that differ by no more than their measurements scatter are told so.",
    )


def add_use(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--hours-per-year", type=float, metavar="X", help="Of use. Default: 8760, 24/7/365.")
    group.add_argument("--price-per-kwh", type=float, metavar="X", help="$. Default: 0.18.")
    group.add_argument("--pue", type=float, metavar="X", help="Power of the building / of its computers. Default: 1.")
    group.add_argument(
        "--grid",
        metavar="NAME|X",
        help="A country (USA, germany), world, us-marginal, or grams of CO₂ per kWh. Default: us-marginal.",
    )
    group.add_argument("--years", type=float, metavar="X", help="Of the cost over several years. Default: 3.")
    group.add_argument("--no-equivalents", action="store_true", help="Leave out cars and seedlings.")


def document(arguments: argparse.Namespace) -> Document:
    """Raises InvalidParameter."""
    from headrace.plan import energy_document

    load = _load(arguments)
    parts = []
    if arguments.preset == "tensorrt-llm":
        parts.append(energy_document.tensorrt_llm())
    comparison = _comparison(arguments, load)
    if comparison is not None:
        parts.append(comparison)
    elif arguments.price is None:
        _refuse(arguments, ("hours_per_year", "price_per_kwh", "pue"), "none without two sides, or --price")
    parts += _money(arguments, load)
    if not parts:
        raise InvalidParameter("energy", None, NOTHING)
    return energy_document.document("Energy and cost", parts)


def _refuse(arguments: argparse.Namespace, names: Iterable[str], allowed: str) -> None:
    """Raises InvalidParameter where one was given: nobody would read it."""
    for name in names:
        value = getattr(arguments, name)
        if value is not None and value is not False:
            raise InvalidParameter(name, value, allowed)


def _load(arguments: argparse.Namespace) -> Load:
    from headrace.plan.energy import Load
    from headrace.plan.grid import find_grid

    given: dict[str, Any] = {}
    for name in ("hours_per_year", "price_per_kwh", "pue", "years"):
        if getattr(arguments, name) is not None:
            given[name] = getattr(arguments, name)
    if arguments.grid is not None:
        given["grid"] = find_grid(arguments.grid)
    return Load(**given, given=frozenset(given))


def _comparison(arguments: argparse.Namespace, load: Load) -> Part | None:
    """None where nobody asked for one."""
    from headrace.plan import energy
    from headrace.plan.energy_document import comparison

    is_study = arguments.preset == "nvlm-study"
    speedup = _speedup(arguments, is_study)
    if speedup is None:
        named = [f"{side}_{name}" for side in ("base", "other") for name in ("name", "device")]
        if is_study:
            _refuse(arguments, named, "none beside the study's own speed-up, which is of its own devices")
        else:
            named += [f"{side}_{name}" for side in ("base", "other") for name, _ in NODE]
            _refuse(arguments, (*named, "years", "grid", "no_equivalents"), TWO_SIDES)
            return None
    base = _side(arguments, "base", energy.STUDY_CPU if is_study else None)
    other = _side(arguments, "other", energy.STUDY_GPU if is_study else None)
    found = energy.compare(base, other, speedup or energy.given_speedup(energy.STUDY_SPEEDUP, "published"), load)
    rates = _rates("other_tokens_per_s", arguments.other_tokens_per_s)
    tokens_per_s = median(rates) if rates else None
    return comparison(found, tokens_per_s, not arguments.no_equivalents, speedup is None)


def _speedup(arguments: argparse.Namespace, is_study: bool) -> Speedup | None:
    """None: none was given or measured."""
    from headrace.plan.energy import given_speedup, measured_speedup

    measured = {name: (f"base_{name}", f"other_{name}") for name in ("seconds", "tokens_per_s")}
    asked = [name for name, pair in measured.items() if any(getattr(arguments, field) is not None for field in pair)]
    value = arguments.gpu_vs_cpu_speedup
    if value is not None:
        # Throughput of one side beside it tells the energy of a million tokens.
        if asked and (asked != ["tokens_per_s"] or arguments.base_tokens_per_s is not None):
            raise InvalidParameter("gpu_vs_cpu_speedup", value, "none beside measurements of both sides")
        return given_speedup(value)
    if not asked:
        return None
    if len(asked) > 1:
        raise InvalidParameter("seconds", "beside tokens_per_s", "one of the two, for both sides")
    if is_study and asked == ["tokens_per_s"] and arguments.base_tokens_per_s is None:
        return None
    base, other = (_rates(field, getattr(arguments, field)) for field in measured[asked[0]])
    return measured_speedup(base, other, rates=asked[0] == "tokens_per_s")


def _rates(field: str, text: str | None) -> list[float]:
    """Numbers > 0, with commas. Raises InvalidParameter."""
    from headrace.plan.cost import check_number

    if text is None:
        return []
    try:
        rates = [float(one) for one in text.split(",")]
    except ValueError:
        raise InvalidParameter(field, text, "numbers > 0, with commas between them") from None
    for rate in rates:
        check_number(field, rate, above=True)
    return rates


def _side(arguments: argparse.Namespace, label: str, study: Side | None) -> Side:
    """`study`: what a side is where nothing else is said; None: all of it but the network has to be said, for another
    node's figures would be nobody's."""
    from headrace.plan.cost import check_number
    from headrace.plan.energy import Side

    given: dict[str, Any] = {}
    for name, what in (("device", "the name of the device that side was measured on"), *NODE):
        field = f"{label}_{name}"
        value = getattr(arguments, field)
        if value is None and study is None and name != "network_kw":
            raise InvalidParameter(field, None, f"{what}: a speed-up needs both sides")
        if name == "device" and value is not None and not value.strip():
            raise InvalidParameter(field, value, what)
        if isinstance(value, float):
            check_number(field, value, above=name != "network_kw")
        if value is not None:
            given[name] = value
    told, called = frozenset(given), getattr(arguments, f"{label}_name") or given.get("device")
    if called is not None:
        given["name"] = called
    if study is None:
        return Side(**given, source="not given: not counted", given=told)
    return replace(study, **given, given=told)


def _money(arguments: argparse.Namespace, load: Load) -> list[Part]:
    from headrace.plan import energy_document
    from headrace.plan.energy_document import Hour

    parts, hours = [], []
    requests, tokens = arguments.requests_per_s, arguments.tokens_per_s
    rented = _rent(arguments)
    if rented is not None:
        if requests is None and tokens is None and arguments.price is None:
            raise InvalidParameter(
                "rent_per_hour", rented.price, "only beside --requests-per-s, --tokens-per-s or --price"
            )
        parts.append(energy_document.rent(rented))
        hours.append(rented)
    if arguments.price is None:
        _refuse(arguments, ("kw", "life_years", "fixed_per_hour"), BOUGHT)
    else:
        machine = _machine(arguments, load)
        given = frozenset(name for name in ("life_years", "fixed_per_hour") if getattr(arguments, name) is not None)
        parts.append(energy_document.ownership(machine, rented.price if rented else None, load, given))
        hours.append(Hour(machine.tco_per_hour, owned=True))
    if not hours:
        _refuse(arguments, ("requests_per_s", "tokens_per_s"), "none without --rent-per-hour, --gpu or --price")
    parts += [energy_document.work(hour, requests, tokens) for hour in hours]
    if arguments.option:
        parts.append(energy_document.options([_option(text) for text in arguments.option]))
    return parts


def _machine(arguments: argparse.Namespace, load: Load) -> Purchase:
    from headrace.plan.cost import Purchase, check_number

    if arguments.kw is None:
        raise InvalidParameter("kw", None, "the bought machine's kW at work, beside --price")
    years = LIFE_YEARS if arguments.life_years is None else arguments.life_years
    check_number("life_years", years, 0, 1000, above=True)
    return Purchase(
        arguments.price,
        years * load.hours_per_year,
        arguments.kw,
        load.price_per_kwh,
        load.pue,
        arguments.fixed_per_hour or 0.0,
    )


def _rent(arguments: argparse.Namespace) -> Hour | None:
    from headrace.plan.cost import check_number
    from headrace.plan.energy_document import Hour

    if arguments.rent_per_hour is not None:
        _refuse(arguments, ("gpu",), "none beside --rent-per-hour: one rent")
        check_number("rent_per_hour", arguments.rent_per_hour)
        return Hour(arguments.rent_per_hour)
    if arguments.gpu is not None:
        return Hour(*_catalogue("gpu", arguments.gpu), "published")
    return None


def _catalogue(field: str, name: str) -> tuple[float, str]:
    """$/h of a device, and where that is from."""
    from headrace.plan.devices import DEVICES, find_device

    priced = ", ".join(one for one, device in DEVICES.items() if device.price_per_hour is not None)
    allowed = f"one with a published price ({priced}), or give the price yourself"
    try:
        device = find_device(name)
    except InvalidParameter:
        raise InvalidParameter(field, name, allowed) from None
    if device.price_per_hour is None:
        raise InvalidParameter(field, name, allowed)
    return device.price_per_hour, device.source


def _option(text: str) -> Option:
    from headrace.plan.cost import Option

    allowed = "NAME:PRICE:RATE[,RATE…], with $/h (empty: the catalogue's) and tokens/s"
    name, _, rest = text.partition(":")
    price, colon, rates = rest.partition(":")
    if not name or not colon or ":" in rates:
        raise InvalidParameter("option", text, allowed)
    try:
        per_hour = float(price) if price else _catalogue("name", name)[0]
        return Option(name, per_hour, _rates("rate", rates))
    except ValueError:
        raise InvalidParameter("option", text, allowed) from None
    except InvalidParameter as error:
        raise InvalidParameter("option", text, f"{allowed}; {error}") from None
