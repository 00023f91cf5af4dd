"""How much CO₂ a kilowatt-hour brings with it, by country."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from headrace.core.errors import InvalidParameter, shorten
from headrace.plan.cost import check_number
from headrace.plan.document import Basis

GRAMS_PER_TONNE = 1e6


@dataclass(frozen=True, slots=True)
class Grid:
    """Where the power comes from."""

    name: str
    grams: float
    """Of CO₂ for each kWh."""
    source: str
    basis: Basis = "published"

    @property
    def tonnes(self) -> float:
        """Of CO₂ for each kWh."""
        return self.grams / GRAMS_PER_TONNE


_EMBER = "Our World in Data, yearly electricity data (after Ember), {year}: mean of the generation, CO₂ equivalents"

_COUNTRIES_2023: Mapping[str, tuple[str, float]] = {
    "ARG": ("Argentina", 354.103),
    "AUS": ("Australia", 548.692),
    "AUT": ("Austria", 110.812),
    "BEL": ("Belgium", 138.107),
    "BRA": ("Brazil", 98.348),
    "CAN": ("Canada", 170.043),
    "CHE": ("Switzerland", 34.843),
    "CHL": ("Chile", 291.113),
    "CHN": ("China", 582.317),
    "CZE": ("Czechia", 449.724),
    "DEU": ("Germany", 380.95),
    "DNK": ("Denmark", 151.65),
    "EGY": ("Egypt", 570.306),
    "ESP": ("Spain", 174.05),
    "EST": ("Estonia", 416.667),
    "FIN": ("Finland", 79.158),
    "FRA": ("France", 56.039),
    "GBR": ("United Kingdom", 237.589),
    "GRC": ("Greece", 336.574),
    "IND": ("India", 713.441),
    "IRL": ("Ireland", 290.805),
    "ITA": ("Italy", 330.718),
    "JPN": ("Japan", 485.392),
    "KEN": ("Kenya", 70.492),
    "KOR": ("South Korea", 430.567),
    "LUX": ("Luxembourg", 105.263),
    "MAR": ("Morocco", 630.014),
    "MEX": ("Mexico", 507.245),
    "NGA": ("Nigeria", 523.247),
    "NLD": ("Netherlands", 267.622),
    "NOR": ("Norway", 30.08),
    "NZL": ("New Zealand", 112.758),
    "PAK": ("Pakistan", 440.608),
    "PHL": ("Philippines", 610.688),
    "POL": ("Poland", 661.926),
    "PRT": ("Portugal", 165.553),
    "QAT": ("Qatar", 602.5),
    "ROU": ("Romania", 240.583),
    "RUS": ("Russia", 441.039),
    "SGP": ("Singapore", 470.783),
    "SWE": ("Sweden", 40.695),
    "THA": ("Thailand", 549.583),
    "TUR": ("Turkey", 464.586),
    "TWN": ("Taiwan", 642.378),
    "USA": ("United States", 369.473),
    "VNM": ("Vietnam", 475.449),
    "ZAF": ("South Africa", 707.686),
}
_COUNTRIES_2022: Mapping[str, tuple[str, float]] = {
    "ARE": ("United Arab Emirates", 561.135),
    "HKG": ("Hong Kong", 699.499),
    "IDN": ("Indonesia", 675.931),
    "ISL": ("Iceland", 27.68),
    "ISR": ("Israel", 582.927),
    "MYS": ("Malaysia", 605.831),
    "SAU": ("Saudi Arabia", 706.791),
    "UKR": ("Ukraine", 259.693),
}

US_MARGINAL = Grid(
    "US-MARGINAL",
    709.0,
    "EPA AVERT, marginal emissions, weighted US mean, as EPA's equivalencies calculator had it until 2023",
)
GRIDS: Mapping[str, Grid] = {
    "WORLD": Grid("world", 475.0, "CodeCarbon 3.3, its world average (IEA 2019)"),
    "US-MARGINAL": US_MARGINAL,
    **{
        code: Grid(name, grams, _EMBER.format(year=year))
        for year, table in ((2023, _COUNTRIES_2023), (2022, _COUNTRIES_2022))
        for code, (name, grams) in table.items()
    },
}
"""ISO 3166 code of three letters, WORLD or US-MARGINAL -> grid. Figures as CodeCarbon 3.3 carries them."""


def find_grid(text: str) -> Grid:
    """The grid of a country (code or English name, in any case), or grams of CO₂ per kWh as a number.

    Raises InvalidParameter.
    """
    try:
        grams = float(text)
    except ValueError:
        wanted = text.strip().casefold()
        for code, grid in GRIDS.items():
            if wanted in (code.casefold(), grid.name.casefold()):
                return grid
        allowed = f"grams of CO₂ per kWh, a country's English name, or one of {', '.join(GRIDS)}"
        raise InvalidParameter("grid", text, allowed) from None
    check_number("grid", grams, 0, 10_000)
    return Grid(shorten(grams), grams, "given", "given")
