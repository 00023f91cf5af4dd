"""Energy, CO₂ and cost: two kinds of nodes for the same work, a request, a million tokens, buying against renting."""

from __future__ import annotations

import argparse
from dataclasses import fields, replace
from statistics import median
from typing import TYPE_CHECKING, Any

from headrace.core.errors import InvalidParameter, shorten

if TYPE_CHECKING:
    from headrace.plan.cost import Option
    from headrace.plan.document import Basis, Document
    from headrace.plan.energy import Load, Side, Speedup
    from headrace.plan.energy_document import Part

PRESETS = ("nvlm-study", "tensorrt-llm")
NOTHING = (
    "something to plan: --preset nvlm-study, --gpu-vs-cpu-speedup X, measurements of both sides (--base-seconds and "
    "--other-seconds, or tokens-per-s), --rent-per-hour X, --price X or --option NAME:PRICE:RATE"
)
SIDES = (("used", "devices (of a CPU: cores) that did the work"), ("per-node", "devices in a node"))
POWERS = (("node-kw", "kW of a node at full load"), ("network-kw", "kW of a node's share of the switches"))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--preset",
        choices=PRESETS,
        help="nvlm-study: the published table, to the digit. tensorrt-llm: H100 against A100 nodes, published ratios.",
    )
    group = parser.add_argument_group("two sides (constants not given: the published comparison's nodes)")
    group.add_argument(
        "--gpu-vs-cpu-speedup",
        type=float,
        metavar="X",
        help="Work of the other side's devices / work of the base's in the same time; never of two runs on one device.",
    )
    for side, words in (("base", "base side (CPUs)"), ("other", "other side (GPUs)")):
        group.add_argument(f"--{side}-name", metavar="TEXT", help=f"What a node of the {words} is called.")
        group.add_argument(f"--{side}-device", metavar="TEXT", help=f"What the {words} was measured on.")
        for name, what in (*SIDES, *POWERS):
            group.add_argument(f"--{side}-{name}", type=float, metavar="X", help=f"Of the {words}: {what}.")
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
    group.add_argument("--life-years", type=float, metavar="X", default=3.0, help="Of the bought machine. Default: 3.")
    group.add_argument("--fixed-per-hour", type=float, metavar="X", default=0.0, help="$: room, care. Default: 0.")
    group.add_argument(
        "--option",
        action="append",
        metavar="NAME:PRICE:RATE[,RATE…]",
        help="A way to run the work: its name, $/h (empty: the device catalogue's) and measured tokens/s. Repeatable.",
    )


def add_use(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--hours-per-year", type=float, metavar="X", help="Of load. Default: 8760, 24/7/365.")
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
    parts += _money(arguments, load)
    if not parts:
        raise InvalidParameter("energy", None, NOTHING)
    return energy_document.document("Energy and cost", parts)


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
    speedup = _speedup(arguments)
    if speedup is None and not is_study:
        _no_sides_alone(arguments)
        return None
    if not is_study:
        for name in ("base_device", "other_device"):
            if not getattr(arguments, name):
                allowed = "the name of the device that side was measured on (a speed-up needs two different ones)"
                raise InvalidParameter(name, getattr(arguments, name), allowed)
    base, other = _side(arguments, "base", energy.STUDY_CPU), _side(arguments, "other", energy.STUDY_GPU)
    found = energy.compare(base, other, speedup or energy.given_speedup(energy.STUDY_SPEEDUP, "published"), load)
    rates = _rates("other_tokens_per_s", arguments.other_tokens_per_s)
    tokens_per_s = median(rates) if rates else None
    return comparison(found, tokens_per_s, not arguments.no_equivalents, speedup is None)


def _no_sides_alone(arguments: argparse.Namespace) -> None:
    for side in ("base", "other"):
        for name in ("name", "device", *(name.replace("-", "_") for name, _ in (*SIDES, *POWERS))):
            value = getattr(arguments, f"{side}_{name}")
            if value is not None:
                raise InvalidParameter(f"{side}_{name}", value, "only with a speed-up or measurements of both sides")


def _speedup(arguments: argparse.Namespace) -> Speedup | None:
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
    if arguments.preset is not None and asked == ["tokens_per_s"] and arguments.base_tokens_per_s is None:
        return None
    base, other = (_rates(field, getattr(arguments, field)) for field in measured[asked[0]])
    return measured_speedup(base, other, rates=asked[0] == "tokens_per_s")


def _rates(field: str, text: str | None) -> list[float]:
    """Numbers with commas. Raises InvalidParameter."""
    if text is None:
        return []
    try:
        return [float(one) for one in text.split(",")]
    except ValueError:
        raise InvalidParameter(field, text, "numbers > 0, with commas between them") from None


def _side(arguments: argparse.Namespace, label: str, default: Side) -> Side:
    from headrace.plan.cost import check_number

    given: dict[str, Any] = {}
    for item in fields(default):
        value = getattr(arguments, f"{label}_{item.name}", None)
        if value is not None:
            given[item.name] = value
    if "device" in given and "name" not in given:
        given["name"] = f"node of {given['device']}"
    for name, value in given.items():
        if isinstance(value, float):
            check_number(f"{label}_{name}", value, above=name != "network_kw")
    return replace(default, **given, given=frozenset(given))


def _money(arguments: argparse.Namespace, load: Load) -> list[Part]:
    from headrace.plan import energy_document
    from headrace.plan.cost import HOURS_PER_YEAR, Purchase, check_number

    parts = []
    price, source, basis = _rent(arguments)
    requests, tokens = arguments.requests_per_s, arguments.tokens_per_s
    if arguments.price is not None:
        if arguments.kw is None:
            raise InvalidParameter("kw", None, "the bought machine's kW at work, beside --price")
        check_number("life_years", arguments.life_years, above=True)
        machine = Purchase(
            arguments.price,
            arguments.life_years * HOURS_PER_YEAR,
            arguments.kw,
            load.price_per_kwh,
            load.pue,
            arguments.fixed_per_hour,
        )
        parts.append(energy_document.ownership(machine, price, load))
        if price is None:
            price, source, basis = machine.tco_per_hour, "TCO of an hour", "given"
    if price is not None:
        if requests is None and tokens is None and arguments.price is None:
            raise InvalidParameter("rent_per_hour", price, "only beside --requests-per-s, --tokens-per-s or --price")
        parts.append(energy_document.rent(price, source, basis, requests, tokens))
    else:
        for name, value in (("requests_per_s", requests), ("tokens_per_s", tokens), ("kw", arguments.kw)):
            if value is not None:
                raise InvalidParameter(name, value, "only with --rent-per-hour, --gpu or --price")
    if arguments.option:
        parts.append(energy_document.options([_option(text) for text in arguments.option]))
    return parts


def _rent(arguments: argparse.Namespace) -> tuple[float | None, str, Basis]:
    """$/h, its source and basis."""
    from headrace.plan.cost import check_number

    if arguments.rent_per_hour is not None:
        check_number("rent_per_hour", arguments.rent_per_hour)
        return arguments.rent_per_hour, "given", "given"
    if arguments.gpu is not None:
        price, source = _catalogue(arguments.gpu)
        return price, source, "published"
    return None, "", "given"


def _catalogue(name: str) -> tuple[float, str]:
    from headrace.plan.devices import DEVICES, find_device

    device = find_device(name)
    if device.price_per_hour is None:
        priced = ", ".join(one for one, device in DEVICES.items() if device.price_per_hour is not None)
        raise InvalidParameter("gpu", name, f"one with a published price ({priced}), or give the price yourself")
    return device.price_per_hour, device.source


def _option(text: str) -> Option:
    from headrace.plan.cost import Option

    words = text.split(":")
    allowed = "NAME:PRICE:RATE[,RATE…], with $/h (empty: the catalogue's) and tokens/s"
    if len(words) != 3 or not words[0]:
        raise InvalidParameter("option", text, allowed)
    name, price, rates = words
    try:
        per_hour = float(price) if price else _catalogue(name)[0]
    except ValueError:
        raise InvalidParameter("option", text, allowed) from None
    try:
        return Option(name, per_hour, _rates("option", rates))
    except InvalidParameter as error:
        raise InvalidParameter("option", text, f"{allowed} ({shorten(error.field)})") from None
