"""What running costs: a request, a million tokens, an hour of a machine that is owned; when buying beats renting.

Money is in US dollars, as published prices are; the formulas hold for any currency.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Context, Decimal
from statistics import median

from headrace.core.errors import InvalidParameter

HOURS_PER_YEAR = 8760
SECONDS_PER_HOUR = 3600
MILLION = 1e6
PER_REQUEST = "price per hour / 3600 / (requests/s)"
PER_MILLION_TOKENS = "price per hour x 1e6 / (3600 x tokens/s)"
TCO = "price / hours of use in its life + kW x PUE x price per kWh + fixed costs per hour"
BREAK_EVEN = "price / (rent per hour - running cost per hour)"
TINY, HUGE = 1e-12, 1e12
"""No input is larger, and none that has to be > 0 is smaller: products and ratios of all of them stay finite."""
MOST_DIGITS = 400
"""Of a number that is rounded: more than any float has before its point."""


def check_number(field: str, value: object, low: float = 0.0, high: float = HUGE, above: bool = False) -> None:
    """Raises InvalidParameter unless `value` is a number from `low` (`above`: more than it) to `high`."""
    number = value if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
    least = low + TINY if above else low
    if not least <= number <= high:
        # The ends that nobody comes near are named only to who has passed them.
        floor = f"a number > {low:g}" if above and not low < number < least else f"a number ≥ {least:g}"
        raise InvalidParameter(field, value, f"{floor} and ≤ {high:g}" if high != HUGE or number > high else floor)


def half_up(value: float, places: int = 0) -> Decimal:
    """`value` rounded half away from zero, as calculators and accountants do (Python's round takes the even one)."""
    return Decimal(repr(value)).quantize(Decimal(1).scaleb(-places), ROUND_HALF_UP, Context(prec=MOST_DIGITS))


def accounting(value: float, places: int = 0) -> str:
    """`1,184`, and `(81,824)` for a negative number: rounded half up by magnitude, never a minus nor a zero in
    parentheses."""
    text = f"{half_up(abs(value), places):,}"
    return f"({text})" if value < 0 and any(digit in text for digit in "123456789") else text


def cost_per_request(price_per_hour: float, requests_per_s: float) -> float:
    """Dollars. Raises InvalidParameter."""
    check_number("price_per_hour", price_per_hour)
    check_number("requests_per_s", requests_per_s, above=True)
    return price_per_hour / SECONDS_PER_HOUR / requests_per_s


def cost_per_million_tokens(price_per_hour: float, tokens_per_s: float) -> float:
    """Dollars. Raises InvalidParameter."""
    check_number("price_per_hour", price_per_hour)
    check_number("tokens_per_s", tokens_per_s, above=True)
    return price_per_hour * MILLION / (SECONDS_PER_HOUR * tokens_per_s)


@dataclass(frozen=True, slots=True)
class Purchase:
    """A machine that is bought. Raises InvalidParameter."""

    price: float
    """Dollars, once."""
    life_hours: float
    """Hours of use that the price is spread over."""
    kw: float
    """Taken from the plug at work, without what PUE adds."""
    price_per_kwh: float
    pue: float = 1.0
    """Power of the whole building / of its computers."""
    fixed_per_hour: float = 0.0
    """Dollars: room, care, interest."""

    def __post_init__(self) -> None:
        for name in ("price", "kw", "price_per_kwh", "fixed_per_hour"):
            check_number(name, getattr(self, name))
        check_number("life_hours", self.life_hours, above=True)
        check_number("pue", self.pue, 1)

    @property
    def running_per_hour(self) -> float:
        """Dollars that one hour costs once it is bought: power and fixed costs."""
        return self.kw * self.pue * self.price_per_kwh + self.fixed_per_hour

    @property
    def tco_per_hour(self) -> float:
        """Dollars: total cost of ownership of an hour of use."""
        return self.price / self.life_hours + self.running_per_hour

    def break_even_hours(self, rent_per_hour: float) -> float | None:
        """Hours of use after which buying has cost as much as renting; None: never, as rent is not above what running
        the own machine costs. Raises InvalidParameter."""
        check_number("rent_per_hour", rent_per_hour)
        saved = rent_per_hour - self.running_per_hour
        return self.price / saved if saved > 0 else None


@dataclass(frozen=True, slots=True)
class Option:
    """One of several ways to run the same work. Raises InvalidParameter."""

    name: str
    price_per_hour: float
    tokens_per_s: Sequence[float]
    """Of each measurement, at least one; several tell the spread."""

    def __post_init__(self) -> None:
        check_number("price_per_hour", self.price_per_hour)
        if not self.tokens_per_s:
            raise InvalidParameter("tokens_per_s", self.tokens_per_s, "at least one number > 0")
        for rate in self.tokens_per_s:
            check_number("tokens_per_s", rate, above=True)

    @property
    def cost(self) -> float:
        """Dollars per million tokens, at the median throughput."""
        return cost_per_million_tokens(self.price_per_hour, median(self.tokens_per_s))

    @property
    def spread(self) -> tuple[float, float]:
        """The same at the best and at the worst measurement."""
        costs = [cost_per_million_tokens(self.price_per_hour, rate) for rate in self.tokens_per_s]
        return min(costs), max(costs)


CHEAPEST, NO_DIFFERENCE = "cheapest", "no significant difference"


def verdicts(options: Sequence[Option]) -> list[str]:
    """What each option is against the cheapest by median: within each other's spread there is no difference."""
    if not options:
        return []
    best = min(options, key=lambda one: one.cost)
    said = []
    for option in options:
        if option is best:
            said.append(CHEAPEST)
        elif option.spread[0] <= best.spread[1]:
            said.append(NO_DIFFERENCE)
        elif best.cost == 0:
            said.append("dearer")
        else:
            said.append(f"{option.cost / best.cost:.3g} x the cheapest")
    return said


def cost_ratio_interval(claims: Sequence[tuple[float, float, int]]) -> tuple[float, float] | None:
    """Between which ratios of prices (new device / old) all `claims` hold; None: between none.

    A claim: (speed-up, the printed ratio of total costs, its decimals). Cost ratio = speed-up / price ratio, and the
    printed number may have been rounded by half of its last digit.
    """
    low, high = 0.0, math.inf
    for speedup, printed, places in claims:
        half = 0.5 * 10.0**-places
        check_number("speedup", speedup, above=True)
        check_number("printed", printed, half, above=True)
        low = max(low, speedup / (printed + half))
        high = min(high, speedup / (printed - half))
    return (low, high) if low <= high else None
