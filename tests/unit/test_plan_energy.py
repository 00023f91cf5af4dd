"""`headrace plan energy`: the published table to the digit, published ratios, costs, and what is refused."""

from __future__ import annotations

import argparse
from dataclasses import replace
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.cli.plan_energy import add_arguments, document
from headrace.core.errors import InvalidParameter
from headrace.plan import energy
from headrace.plan.cost import (
    CHEAPEST,
    NO_DIFFERENCE,
    Option,
    Purchase,
    accounting,
    cost_per_million_tokens,
    cost_per_request,
    cost_ratio_interval,
    half_up,
    verdicts,
)
from headrace.plan.devices import same_device
from headrace.plan.document import Document, Quantity
from headrace.plan.energy import STUDY_CPU, STUDY_GPU, Load, compare, given_speedup, measured_speedup, study
from headrace.plan.grid import GRIDS, US_MARGINAL, find_grid


def plan(*words: str) -> Document:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return document(parser.parse_args(words))


def quantity(answer: Document, name: str) -> Quantity:
    found = [one for one in answer.quantities if one.name == name]
    assert len(found) == 1, [one.name for one in answer.quantities]
    return found[0]


def number(answer: Document, name: str) -> float:
    value = quantity(answer, name).value
    assert isinstance(value, int | float)
    return value


# ---------------------------------------------------------------- the published table


PUBLISHED = {
    # Annual energy savings per GPU node, the study's table: CPU nodes, GPU node, savings.
    "base_compute_kwh": "1,136",
    "other_compute_kwh": "81,380",
    "saved_compute_kwh": "(80,245)",
    "base_network_kwh": "48",
    "other_network_kwh": "1,627",
    "saved_network_kwh": "(1,579)",
    "base_total_kwh": "1,184",
    "other_total_kwh": "83,008",
    "saved_total_kwh": "(81,824)",
    "saved_cost_year": "(14,728.31)",
    "saved_cost_years": "(44,184.92)",
    "saved_co2_t": "(58)",
    "cars": "(13)",
    "seedlings": "(959)",
}


def test_the_published_table_to_the_digit() -> None:
    assert len(PUBLISHED) == 14
    answer = plan("--preset", "nvlm-study")
    assert answer.data["comparison"]["printed"] == PUBLISHED  # type: ignore[index]
    cells = {str(cell) for table in answer.tables for row in table.rows for cell in row}
    assert cells >= set(PUBLISHED.values())
    assert number(answer, "base nodes for one other node") == pytest.approx(0.1178571, abs=5e-8)
    assert number(answer, "energy saved") == pytest.approx(-81_823.92, abs=0.005)


def test_the_sign_is_said_in_words() -> None:
    rule, *rest = plan("--preset", "nvlm-study").notes
    assert "a negative figure, in parentheses, is a cost, not a saving" in rule
    assert "uses 81,824 kWh a year more than the 0.1179 nodes of Intel dual SPR 8480C" in rule
    assert "an extra cost of $14,728.31 a year" in rule
    assert any("on the same six A100" in note for note in rest)


def test_every_constant_is_shown_with_its_source() -> None:
    answer = plan("--preset", "nvlm-study")
    constants = {3.3, 2, 112, 1.1, 0.0464366, 4, 8, 9.29, 4 * 0.0464366, 8760, 0.18, 1.0, 709.0, 4.6, 0.0604935136}
    assert constants <= {one.value for one in answer.quantities}
    assert all(one.source and one.formula for one in answer.quantities)
    assert {one.basis for one in answer.quantities} == {"published"}


@pytest.mark.parametrize(("grams", "seedlings"), [(707.0, "(956)"), (708.0, "(958)"), (709.0, "(959)")])
def test_only_one_grid_factor_gives_the_seedlings(grams: float, seedlings: str) -> None:
    load = Load(grid=replace(US_MARGINAL, grams=grams))
    found = compare(STUDY_CPU, STUDY_GPU, given_speedup(3.3), load)
    assert energy.printed(found)["seedlings"] == seedlings


def test_the_printed_seedling_and_the_port_figure_do_not_fit() -> None:
    assert accounting(study().co2 / 0.060) == "(967)"
    ports = 0.743 / 64 * 4
    found = compare(
        replace(STUDY_CPU, network_kw=ports), replace(STUDY_GPU, network_kw=4 * ports), given_speedup(3.3), Load()
    )
    assert energy.printed(found)["saved_cost_years"] == "(44,184.94)"


def test_break_even_speedup_is_236_5() -> None:
    answer = plan("--preset", "nvlm-study")
    value = number(answer, "speed-up at which both use equal energy, without the network")
    assert half_up(value, 1) == Decimal("236.5")
    with_network = number(answer, "speed-up at which both use equal energy, with it")
    equal = compare(STUDY_CPU, STUDY_GPU, given_speedup(with_network), Load())
    assert equal.saved.total == pytest.approx(0, abs=1e-6)
    better = compare(STUDY_CPU, STUDY_GPU, given_speedup(300), Load())
    assert better.saved.total > 0 and "kWh a year less than" in energy.sign_sentence(better)


# ---------------------------------------------------------------- published ratios of TensorRT-LLM


def test_the_four_ratios_of_tensorrt_llm() -> None:
    answer = plan("--preset", "tensorrt-llm")
    assert answer.data["tensorrt_llm"]["printed"] == {  # type: ignore[index]
        "GPT-J 6B": {"energy_ratio": "5.6", "tco_ratio": "5.3"},
        "Llama 2 70B": {"energy_ratio": "3.2", "tco_ratio": "3.0"},
    }
    assert number(answer, "energy ratio, GPT-J 6B") == pytest.approx(5.597, abs=5e-4)
    assert number(answer, "energy ratio, Llama 2 70B") == pytest.approx(3.219, abs=5e-4)
    interval = quantity(answer, "cost of an H100 node / of an A100 node that both TCO claims need")
    assert (interval.low, interval.high) == (pytest.approx(1.508, abs=5e-4), pytest.approx(1.524, abs=5e-4))


def test_claims_that_contradict_each_other_have_no_interval() -> None:
    assert cost_ratio_interval([(8, 5.3, 1), (4.6, 5.3, 1)]) is None
    with pytest.raises(InvalidParameter, match="printed"):
        cost_ratio_interval([(8, 0.0, 1)])


# ---------------------------------------------------------------- the two sides


@pytest.mark.parametrize(
    ("base", "other"),
    [
        ("A100", "a100"),
        ("6 x NVIDIA A100-SXM4-80GB", "A100 80 GB"),
        ("H100", "NVIDIA H100 80GB HBM3"),
        ("AMD EPYC 7763 64-Core Processor", "EPYC 7763"),
        ("Intel(R) Xeon(R) Platinum 8480C", "8480C"),
        ("spr", "8480C"),
        ("My card", "my-card"),
    ],
)
def test_a_ratio_of_one_device_with_itself_is_refused(base: str, other: str) -> None:
    with pytest.raises(InvalidParameter, match=r"^gpu_vs_cpu_speedup: .*different devices"):
        plan("--gpu-vs-cpu-speedup", "3.3", "--base-device", base, "--other-device", other, *NODES)


@pytest.mark.parametrize(
    ("base", "other"), [("A10", "A100"), ("A100-40GB", "A100-80GB"), ("H100 SXM5", "H100 PCIe"), ("AMD", "Intel")]
)
def test_other_devices_are_not_taken_for_one(base: str, other: str) -> None:
    assert not same_device(base, other)


NODES = (
    *("--base-used", "64", "--base-per-node", "128", "--base-node-kw", "0.8"),
    *("--other-used", "2", "--other-per-node", "8", "--other-node-kw", "1.2"),
)
SIDES = ("--base-device", "EPYC 7763", "--other-device", "L4", *NODES)


@pytest.mark.parametrize("flag", ["--other-device", "--base-used", "--other-per-node", "--other-node-kw"])
def test_a_speedup_needs_both_sides_whole(flag: str) -> None:
    """No published figure of another node stands in for what was not given."""
    place = SIDES.index(flag)
    field = flag[2:].replace("-", "_")
    with pytest.raises(InvalidParameter, match=rf"^{field}: got None"):
        plan("--gpu-vs-cpu-speedup", "40", *SIDES[:place], *SIDES[place + 2 :])


def test_measured_seconds_give_the_speedup_and_its_interval() -> None:
    answer = plan(*SIDES, "--base-seconds", "100,110,90", "--other-seconds", "2,1.8,2.5")
    speedup = quantity(answer, "gpu_vs_cpu_speedup")
    assert (speedup.value, speedup.low, speedup.high) == (50, 36, pytest.approx(110 / 1.8))
    assert speedup.basis == "measured"
    # A quarter of an L4 node against half an EPYC node: 50 / 36 / 61.1 x 2 nodes of 0.8 kW against one of 1.2 kW.
    saved = quantity(answer, "energy saved")
    assert saved.value == pytest.approx(8760 * (100 * 0.8 - 1.2))
    assert saved.low == pytest.approx(8760 * (72 * 0.8 - 1.2))
    assert quantity(answer, "cost saved").low == pytest.approx(0.18 * 8760 * (72 * 0.8 - 1.2))
    assert {one.basis for one in answer.quantities if one.name.startswith(("base (", "other ("))} == {"given"}
    assert answer.data["comparison"]["significant"] is True  # type: ignore[index]


def test_one_measurement_says_nothing_of_significance() -> None:
    answer = plan(*SIDES, "--base-seconds", "100", "--other-seconds", "2,1.8,2.5")
    assert answer.data["comparison"]["significant"] is None  # type: ignore[index]
    assert "measured once" in answer.notes[0]
    assert quantity(answer, "energy saved").low is None


def test_within_the_spread_there_is_no_significant_difference() -> None:
    even = energy.break_even_speedup(STUDY_CPU, STUDY_GPU, network=True)
    scattered = measured_speedup([even * 0.9, even, even * 1.1], [1.0, 1.0, 1.0], rates=False)
    found = compare(STUDY_CPU, STUDY_GPU, scattered, Load())
    assert found.significant is False and "no significant difference" in energy.sign_sentence(found)
    clear = measured_speedup([even * 1.2, even * 1.3, even * 1.4], [1.0, 1.0, 1.0], rates=False)
    assert compare(STUDY_CPU, STUDY_GPU, clear, Load()).significant


def test_throughputs_also_give_figures_of_a_million_tokens() -> None:
    answer = plan(*SIDES, "--base-tokens-per-s", "10", "--other-tokens-per-s", "500")
    assert number(answer, "gpu_vs_cpu_speedup") == 50
    # 2 of 8 devices of a node of 1.2 kW, a million tokens at 500/s: 2000 s at 0.3 kW.
    kwh = number(answer, "energy, L4")
    assert kwh == pytest.approx(0.3 * 2000 / 3600)
    assert number(answer, "power cost, L4") == pytest.approx(0.18 * kwh)
    assert number(answer, "CO₂, L4") == pytest.approx(709 * kwh)
    switched = plan(*SIDES, "--base-tokens-per-s", "10", "--other-tokens-per-s", "500", "--other-network-kw", "0.4")
    assert number(switched, "energy, L4") == pytest.approx(0.4 * 2000 / 3600)
    known = plan(*SIDES, "--gpu-vs-cpu-speedup", "50", "--other-tokens-per-s", "500")
    assert number(known, "energy, EPYC 7763") == number(answer, "energy, EPYC 7763")


def test_pue_country_and_equivalents() -> None:
    plain = plan("--preset", "nvlm-study")
    answer = plan("--preset", "nvlm-study", "--pue", "1.5", "--grid", "france", "--no-equivalents")
    assert number(answer, "energy saved") == pytest.approx(1.5 * number(plain, "energy saved"))
    assert number(answer, "CO₂ saved") == pytest.approx(number(answer, "energy saved") * 56.039e-6)
    assert not [one for one in answer.quantities if "car" in one.name or "seedling" in one.name]
    assert "cars" not in answer.data["comparison"]["printed"]  # type: ignore[index]
    assert quantity(answer, "energy saved").basis == "given"


def test_grids() -> None:
    assert find_grid("World").grams == 475
    assert find_grid("deu") == find_grid("Germany") == GRIDS["DEU"]
    assert find_grid("12.5").grams == 12.5 and find_grid("12.5").basis == "given"
    assert all(grid.source and 0 < grid.grams < 1000 for grid in GRIDS.values())
    for bad in ("Atlantis", "-1", "nan"):
        with pytest.raises(InvalidParameter, match=r"^grid: "):
            find_grid(bad)


# ---------------------------------------------------------------- money


def test_cost_of_a_request_and_of_tokens() -> None:
    assert cost_per_request(3.6, 2) == pytest.approx(0.0005)
    assert cost_per_million_tokens(3.67, 1857) == pytest.approx(3.67e6 / (3600 * 1857))
    answer = plan("--gpu", "a100", "--requests-per-s", "2", "--tokens-per-s", "1857")
    assert number(answer, "rent of an hour") == 3.67
    assert number(answer, "cost of a million tokens, rented") == pytest.approx(0.549, abs=5e-4)
    # 1 $ an hour over 10,000 hours of use, and as much for power.
    both = plan(
        *("--price", "10000", "--kw", "10", "--price-per-kwh", "0.1", "--life-years", "5", "--hours-per-year", "2000"),
        *("--rent-per-hour", "3", "--requests-per-s", "1"),
    )
    assert number(both, "TCO of an hour of use") == pytest.approx(2)
    assert number(both, "cost of a request, owned") == pytest.approx(2 / 3600)
    assert number(both, "cost of a request, rented") == pytest.approx(3 / 3600)


def test_total_cost_of_ownership_and_break_even() -> None:
    machine = Purchase(30_000, 30_000, kw=1.0, price_per_kwh=0.2, pue=1.5, fixed_per_hour=0.1)
    assert machine.running_per_hour == pytest.approx(0.4)
    assert machine.tco_per_hour == pytest.approx(1.4)
    hours = machine.break_even_hours(2.4)
    assert hours == pytest.approx(15_000)
    # By then both have cost the same.
    assert machine.price + machine.running_per_hour * 15_000 == pytest.approx(2.4 * 15_000)
    assert machine.break_even_hours(0.4) is None
    answer = plan("--price", "17520", "--kw", "0", "--rent-per-hour", "2", "--life-years", "1")
    assert number(answer, "buying beats renting after") == 8760
    assert any("(1 years at 8760 hours a year), within its life" in note for note in answer.notes)
    late = plan(
        "--price", "17520", "--kw", "0", "--rent-per-hour", "2", "--life-years", "3", "--hours-per-year", "2000"
    )
    assert any("(4.38 years at 2000 hours a year), later than its life" in note for note in late.notes)
    never = plan("--price", "10000", "--kw", "10", "--rent-per-hour", "1")
    assert quantity(never, "buying beats renting after").value is None
    assert any("Renting stays cheaper" in note for note in never.notes)


def test_options_within_the_spread_are_no_significant_difference() -> None:
    answer = plan("--option", "own:1:100,110,90", "--option", "rented:1.05:105,95", "--option", "h100::50")
    (table,) = answer.tables
    assert [row[-1] for row in table.rows] == [CHEAPEST, NO_DIFFERENCE, "15 x the cheapest"]
    assert any("without a spread: h100" in note for note in table.notes)
    assert verdicts([]) == []
    assert any("Mélange" in column.source for column in table.columns)
    free = Option("free", 0, [1]), Option("paid", 1, [1])
    assert verdicts(free) == [CHEAPEST, "dearer"]


# ---------------------------------------------------------------- rounding


@pytest.mark.parametrize(
    ("value", "places", "text"),
    [
        (2.5, 0, "3"),
        (-2.5, 0, "(3)"),
        (0.125, 2, "0.13"),
        (-0.4, 0, "0"),
        (-0.0, 2, "0.00"),
        (1234567.005, 2, "1,234,567.01"),
        (-999.5, 0, "(1,000)"),
    ],
)
def test_half_up_by_magnitude(value: float, places: int, text: str) -> None:
    assert accounting(value, places) == text


@given(st.floats(-1e12, 1e12), st.integers(0, 3))
def test_accounting_is_the_same_for_both_signs(value: float, places: int) -> None:
    plain, text = accounting(abs(value), places), accounting(-abs(value), places)
    assert text in (plain, f"({plain})")
    assert abs(Decimal(plain.replace(",", "")) - Decimal(abs(value))) <= Decimal("0.5001") * Decimal(10) ** -places


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("words", "field"),
    [
        ((), "energy"),
        (("--preset", "nvlm-study", "--pue", "0.9"), "pue"),
        (("--preset", "nvlm-study", "--hours-per-year", "9000"), "hours_per_year"),
        (("--preset", "nvlm-study", "--base-node-kw", "-1"), "base_node_kw"),
        (("--preset", "nvlm-study", "--other-network-kw", "-1"), "other_network_kw"),
        (("--preset", "nvlm-study", "--gpu-vs-cpu-speedup", "nan"), "gpu_vs_cpu_speedup"),
        (("--preset", "nvlm-study", "--gpu-vs-cpu-speedup", "1e-300"), "gpu_vs_cpu_speedup"),
        (("--preset", "nvlm-study", "--years", "1e300"), "years"),
        (("--preset", "nvlm-study", "--base-device", "L4"), "base_device"),
        (("--preset", "nvlm-study", "--other-tokens-per-s", "500,-3"), "other_tokens_per_s"),
        (("--preset", "tensorrt-llm", "--grid", "world"), "grid"),
        (("--preset", "tensorrt-llm", "--other-tokens-per-s", "5"), "base_tokens_per_s"),
        ((*SIDES, "--base-device", " ", "--gpu-vs-cpu-speedup", "2"), "base_device"),
        (("--rent-per-hour", "1", "--tokens-per-s", "1", "--pue", "1.2"), "pue"),
        (("--rent-per-hour", "1", "--tokens-per-s", "1", "--gpu", "L4"), "gpu"),
        (("--rent-per-hour", "1", "--tokens-per-s", "1", "--life-years", "2"), "life_years"),
        (("--gpu-vs-cpu-speedup", "2", "--base-seconds", "1"), "gpu_vs_cpu_speedup"),
        ((*SIDES, "--base-seconds", "1,x", "--other-seconds", "1"), "base_seconds"),
        ((*SIDES, "--base-seconds", "1"), "other_seconds"),
        ((*SIDES, "--base-seconds", "1", "--other-tokens-per-s", "1"), "seconds"),
        ((*SIDES,), "base_device"),
        (("--tokens-per-s", "3"), "tokens_per_s"),
        (("--rent-per-hour", "-1"), "rent_per_hour"),
        (("--rent-per-hour", "1"), "rent_per_hour"),
        (("--rent-per-hour", "1", "--requests-per-s", "0"), "requests_per_s"),
        (("--gpu", "h200"), "gpu"),
        (("--gpu", "abacus"), "gpu"),
        (("--price", "1"), "kw"),
        (("--price", "1", "--kw", "1", "--life-years", "0"), "life_years"),
        (("--option", "a:b"), "option"),
        (("--option", "a:x:1"), "option"),
        (("--option", "a:1:0"), "option"),
        (("--option", "a::3"), "option"),
    ],
)
def test_bad_input_is_one_line_that_names_the_field(words: tuple[str, ...], field: str) -> None:
    with pytest.raises(InvalidParameter) as caught:
        plan(*words)
    assert caught.value.field == field and "\n" not in str(caught.value)


def test_the_largest_figures_are_still_printed() -> None:
    huge = "1e12"
    answer = plan(
        "--preset", "nvlm-study", "--years", huge, "--price-per-kwh", huge, "--pue", huge, "--base-used", huge
    )
    assert "inf" not in str(answer.data)
