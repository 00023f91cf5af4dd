"""The energy of the same work on two kinds of nodes, for a year: kWh, money, CO₂, and which side uses more.

The arithmetic is that of NVIDIA's published comparison of CPU and GPU nodes: one full node of the other kind works for
a year, and against it stand as many nodes of the base kind as do the same work. What is "saved" is base - other, so a
negative figure is energy that the other node uses beyond the base.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from headrace.core.errors import InvalidParameter
from headrace.plan.cost import HOURS_PER_YEAR, MILLION, SECONDS_PER_HOUR, accounting, check_number
from headrace.plan.devices import same_device
from headrace.plan.document import Basis
from headrace.plan.grid import US_MARGINAL, Grid

NODES = "speed-up x (base used / base per node) / (other used / other per node)"
COMPUTE = "node kW x hours x PUE x nodes"
NETWORK = "network kW of a node x hours x PUE x nodes"
SAVED = "base - other; negative: the other uses more"
COST = "kWh x price of a kWh"
CO2 = "kWh x grid factor"
BREAK_EVEN = "(other node kW x used / per node) / (base node kW x used / per node)"
PER_TOKENS = "kW of the devices used x PUE x 1e6 / (3600 x tokens/s)"
ENERGY_RATIO = "speed-up x old node kW / new node kW"

CAR_TONNES = 4.60
"""Of CO₂ a car and year: EPA, greenhouse gas equivalencies calculator."""
SEEDLING_TONNES = 0.0604935136
"""Of CO₂ that a tree seedling takes up in 10 years: the same, unrounded (it prints 0.060)."""

_NVIDIA = "derived from NVIDIA's published comparison of CPU and GPU nodes, whose every figure follows from it"


@dataclass(frozen=True, slots=True)
class Side:
    """Devices of one kind that do the work, and the node they are a part of. Raises InvalidParameter."""

    name: str
    device: str
    """What the time or throughput was measured on."""
    used: float
    """Devices (of a CPU: cores) that did the work."""
    per_node: float
    node_kw: float
    """At full load."""
    network_kw: float = 0.0
    """A node's share of the switches."""
    source: str = "given"
    """Of what the user did not give."""
    basis: Basis = "given"
    given: frozenset[str] = frozenset()
    """Names of fields that the user set."""

    def __post_init__(self) -> None:
        for name in ("used", "per_node", "node_kw"):
            check_number(name, getattr(self, name), above=True)
        check_number("network_kw", self.network_kw)

    @property
    def share(self) -> float:
        """Of one node."""
        return self.used / self.per_node

    def power(self, network: bool = True) -> float:
        """kW of the devices that did the work, as their share of the node."""
        return (self.node_kw + (self.network_kw if network else 0.0)) * self.share


NETWORK_KW = 0.0464366
"""Of a CPU node: fitted to the published table; about 743 W of a switch / 64 ports x 4 (which gives 44,184.94)."""
STUDY_CPU = Side("Intel dual SPR 8480C", "Intel Xeon Platinum 8480C", 2, 112, 1.100, NETWORK_KW, _NVIDIA, "published")
STUDY_GPU = Side("8 x H100 80GB", "NVIDIA H100 80GB", 4, 8, 9.290, 4 * NETWORK_KW, _NVIDIA, "published")
STUDY_SPEEDUP = 3.3
A100_NODE_KW, H100_NODE_KW = 6.5, 9.29


@dataclass(frozen=True, slots=True)
class Load:
    """How the nodes are used. Raises InvalidParameter."""

    hours_per_year: float = HOURS_PER_YEAR
    price_per_kwh: float = 0.18
    pue: float = 1.0
    """Power of the whole building / of its computers."""
    grid: Grid = US_MARGINAL
    years: float = 3
    given: frozenset[str] = frozenset()
    """Names of fields that the user set."""

    def __post_init__(self) -> None:
        check_number("hours_per_year", self.hours_per_year, 0, 8784, above=True)
        check_number("price_per_kwh", self.price_per_kwh)
        check_number("pue", self.pue, 1)
        check_number("years", self.years, above=True)


@dataclass(frozen=True, slots=True)
class Speedup:
    """Work of the other side's devices / work of the base's in the same time, each on its own device."""

    value: float
    low: float
    high: float
    basis: Basis
    measured: int = 0
    """Measurements of each side, at the fewest; 0: none, a number was given."""


def given_speedup(value: float, basis: Basis = "given") -> Speedup:
    """Raises InvalidParameter."""
    check_number("gpu_vs_cpu_speedup", value, above=True)
    return Speedup(value, value, value, basis)


def measured_speedup(base: Sequence[float], other: Sequence[float], rates: bool) -> Speedup:
    """From measurements of the same work on both sides: seconds, or with `rates` tokens/s. Medians; the interval is of
    the worst pair and the best. Raises InvalidParameter."""
    unit = "tokens_per_s" if rates else "seconds"
    for side, values in (("base", base), ("other", other)):
        if not values:
            raise InvalidParameter(f"{side}_{unit}", values, f"at least one number > 0, as the other side has {unit}")
        for value in values:
            check_number(f"{side}_{unit}", value, above=True)
    over, under = (other, base) if rates else (base, other)
    return Speedup(
        median(over) / median(under),
        min(over) / max(under),
        max(over) / min(under),
        "measured",
        min(len(base), len(other)),
    )


def check_devices(base: Side, other: Side) -> None:
    """Raises InvalidParameter where both sides ran on the same device: such a ratio compares two methods, and says
    nothing of one kind of node against another."""
    if same_device(base.device, other.device):
        raise InvalidParameter(
            "gpu_vs_cpu_speedup",
            f"both sides on {other.device}",
            "a ratio of two sides that ran on different devices (name them with --base-device and --other-device)",
        )


@dataclass(frozen=True, slots=True)
class Use:
    """kWh."""

    compute: float
    network: float

    @property
    def total(self) -> float:
        return self.compute + self.network

    def minus(self, other: Use) -> Use:
        return Use(self.compute - other.compute, self.network - other.network)


@dataclass(frozen=True, slots=True)
class Comparison:
    """A year of one full other node, against as many base nodes as do its work."""

    base: Side
    other: Side
    speedup: Speedup
    load: Load
    nodes: float
    """Base nodes that do the work of one other node."""
    base_kwh: Use
    other_kwh: Use

    @property
    def saved(self) -> Use:
        """kWh; negative: the other node uses more."""
        return self.base_kwh.minus(self.other_kwh)

    @property
    def saved_interval(self) -> tuple[float, float]:
        """kWh at the lowest speed-up that was measured, and at the highest."""
        low, high = (self._saved_at(value) for value in (self.speedup.low, self.speedup.high))
        return low, high

    def _saved_at(self, speedup: float) -> float:
        return self.base_kwh.total * speedup / self.speedup.value - self.other_kwh.total

    @property
    def significant(self) -> bool | None:
        """Whether the difference has one sign over the whole interval; None: no spread is known, so nobody can say."""
        low, high = self.saved_interval
        return low > 0 or high < 0 if self.speedup.measured > 1 else None

    @property
    def cost(self) -> float:
        """Dollars saved in a year."""
        return self.saved.total * self.load.price_per_kwh

    @property
    def co2(self) -> float:
        """Tonnes saved in a year."""
        return self.saved.total * self.load.grid.tonnes

    @property
    def cars(self) -> float:
        """As many cars' CO₂ of a year."""
        return self.co2 / CAR_TONNES

    @property
    def seedlings(self) -> float:
        """As many seedlings take it up in 10 years."""
        return self.co2 / SEEDLING_TONNES


def compare(base: Side, other: Side, speedup: Speedup, load: Load) -> Comparison:
    """The formulas of the published comparison. Raises InvalidParameter where both sides are one device."""
    check_devices(base, other)
    nodes = speedup.value * base.share / other.share
    hours = load.hours_per_year * load.pue
    base_kwh = Use(base.node_kw * hours * nodes, base.network_kw * hours * nodes)
    other_kwh = Use(other.node_kw * hours, other.network_kw * hours)
    return Comparison(base, other, speedup, load, nodes, base_kwh, other_kwh)


def study() -> Comparison:
    """The published table."""
    return compare(STUDY_CPU, STUDY_GPU, given_speedup(STUDY_SPEEDUP, "published"), Load())


def break_even_speedup(base: Side, other: Side, network: bool = False) -> float:
    """At which both sides use equal energy for the same work; `network`: the switches' counted too."""
    return other.power(network) / base.power(network)


def kwh_per_million_tokens(side: Side, tokens_per_s: float, pue: float = 1.0) -> float:
    """Of the devices used, at full load, with their share of node and switches. Raises InvalidParameter."""
    check_number("tokens_per_s", tokens_per_s, above=True)
    return side.power() * pue * MILLION / (SECONDS_PER_HOUR * tokens_per_s)


def energy_ratio(speedup: float, old_node_kw: float, new_node_kw: float) -> float:
    """Energy of the same work on old nodes / on new ones. Raises InvalidParameter."""
    check_number("speedup", speedup, above=True)
    check_number("old_node_kw", old_node_kw, above=True)
    check_number("new_node_kw", new_node_kw, above=True)
    return speedup * old_node_kw / new_node_kw


def printed(found: Comparison, equivalents: bool = True) -> Mapping[str, str]:
    """The table's figures as it prints them: rounded half up by magnitude, parentheses for negatives."""
    figures = {}
    for name in ("compute", "network", "total"):
        for side, use in (("base", found.base_kwh), ("other", found.other_kwh), ("saved", found.saved)):
            figures[f"{side}_{name}_kwh"] = _shown(getattr(use, name))
    figures["saved_cost_year"] = accounting(found.cost, 2)
    figures["saved_cost_years"] = accounting(found.cost * found.load.years, 2)
    figures["saved_co2_t"] = _shown(found.co2)
    if equivalents:
        figures["cars"] = _shown(found.cars)
        figures["seedlings"] = _shown(found.seedlings)
    return figures


def _shown(value: float) -> str:
    """Whole numbers as the table has them; small ones with two decimals."""
    return accounting(value, 0 if abs(value) >= 10 else 2)


def sign_sentence(found: Comparison) -> str:
    """What the sign means, and what it is here."""
    rule = (
        f"Savings are what the base's nodes use less what one node of {found.other.name} uses: a negative figure, in "
        "parentheses, is a cost, not a saving."
    )
    saved, (low, high) = found.saved.total, found.saved_interval
    if found.significant is False:
        between = f"between {accounting(low)} and {accounting(high)} kWh a year"
        return f"{rule} Here there is no significant difference: {between}, as the measurements scatter."
    direction, meaning = ("more", "an extra cost") if saved < 0 else ("less", "a saving")
    once = " One side was measured once: how far that scatters is not known." if found.speedup.measured == 1 else ""
    return (
        f"{rule} Here one node of {found.other.name} uses {accounting(abs(saved))} kWh a year {direction} than the "
        f"{found.nodes:.4g} nodes of {found.base.name} that do its work: {meaning} of "
        f"${accounting(abs(found.cost), 2)} a year.{once}"
    )
