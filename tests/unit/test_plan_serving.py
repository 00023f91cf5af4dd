"""`plan serving`: Mélange's example, the mix against brute force, limits that bind."""

from __future__ import annotations

import ctypes
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from headrace.core.errors import BackendUnavailable, InvalidParameter
from headrace.plan import serving
from headrace.plan.serving import Alone, Demand, Gpu, Mix, Point, Slo, alone, solve, throughputs
from headrace.plan.serving_input import MELANGE, read_gpus, read_workload
from tests.unit.plan_serving_cases import quantity, run, table, written

INSTANCES = 200
MOST_SLICES = 12


def melange(slice_factor: int = 1) -> tuple[list[Gpu], Demand]:
    workload = read_workload(MELANGE, slice_factor=slice_factor)
    return read_gpus(MELANGE, workload, Path()), workload.demand


# ---------------------------------------------------------------- Mélange's example


@pytest.mark.parametrize(("slice_factor", "counts", "cost"), [(1, [3, 1], 6.70), (2, [2, 1], 5.69), (4, [2, 1], 5.69),
                                                              (8, [2, 1], 5.69)])  # fmt: skip
def test_melange_example(slice_factor: int, counts: list[int], cost: float) -> None:
    """Mélange's repository, example config: A10G 3, A100 1, $6.70; with slice factor 2, 4, 8: $5.69 (brute force)."""
    mix = solve(*melange(slice_factor))
    assert (mix.counts, mix.cost) == (counts, cost)
    assert mix.proven


def test_melange_example_on_one_type_alone() -> None:
    """The same: all A10G is a load of 12.0, $12.12; all A100 is 1.125, so 2, $7.34."""
    gpus, demand = melange()
    served = throughputs(gpus, demand, Slo())
    a10g, a100 = (alone(gpu, row, demand) for gpu, row in zip(gpus, served, strict=True))
    assert a10g == Alone(12, pytest.approx(12.0), 12.12)
    assert a100 == Alone(2, pytest.approx(1.125), 7.34)


def test_the_command_says_what_it_costs_and_who_serves_what() -> None:
    found = run("--preset", "melange-example")
    assert found.data["mix"] == {"A10G": 3, "A100-80GB": 1, "cost": 6.7}
    assert quantity(found, "cost").value == 6.7
    assert quantity(found, "A100-80GB alone").value == 7.34
    assert quantity(found, "saved by the mix").value == pytest.approx(100 * (1 - 6.7 / 7.34))
    assert quantity(found, "cost of a request").value == pytest.approx(6.7 / 3600 / 30)
    rows = table(found, "Who serves what").rows
    assert [row[1] for row in rows] == pytest.approx([6, 3, 15, 6])
    assert all(float(row[2] or 0) + float(row[3] or 0) == 100 for row in rows)
    assert [row[1:] for row in table(found, "What one of each serves").rows] == [[2, 20], [1, 20], [5, 40], [2, 20]]
    assert [row[2] for row in table(found, "GPU types").rows] == [3, 1]
    mixed, *others = found.plots[0].series
    assert (30.0, 6.7) in mixed.points
    assert len(others) == 2
    for one in others:  # at no rate is a single type cheaper
        assert all(mix[1] <= single[1] for mix, single in zip(mixed.points, one.points, strict=True))
    assert all(one.formula and one.source for one in found.quantities)


def test_flags_win_over_the_file() -> None:
    assert run("--preset", "melange-example", "--slice-factor", "2").data["mix"] == {
        "A10G": 2,
        "A100-80GB": 1,
        "cost": 5.69,
    }
    assert run("--preset", "melange-example", "--rate", "15").data["mix"] == {"A100-80GB": 1, "cost": 3.67}
    assert run("--preset", "melange-example", "--gpus", "A10G").data["mix"] == {"A10G": 12, "cost": 12.12}


# ---------------------------------------------------------------- the mix


def brute_force(prices: Sequence[float], loads: Sequence[Sequence[float]]) -> float:
    """Every way to give each slice to a type. `loads`: [type][slice]."""
    types, slices = len(prices), len(loads[0])
    every = np.arange(types**slices)
    digits = np.stack([every // types**place % types for place in range(slices)])
    cost = np.zeros(len(every))
    for kind, price in enumerate(prices):
        load = np.where(digits == kind, np.asarray(loads[kind])[:, None], 0.0).sum(axis=0)
        cost += price * np.ceil(load - serving.FULL)
    return float(cost.min())


def test_as_cheap_as_brute_force(capfd: pytest.CaptureFixture[str]) -> None:
    drawn = random.Random(5)
    several = mixed = 0
    for _ in range(INSTANCES):
        types = drawn.choice((2, 2, 3))
        most = MOST_SLICES if types == 2 else 8
        buckets = drawn.randint(1, most)
        factor = drawn.randint(1, most // buckets)
        prices = [round(drawn.uniform(0.3, 8), 2) for _ in range(types)]
        rates = [drawn.uniform(0.1, 10) for _ in range(buckets)]
        # One bucket in five is more than a type can serve; the last type can serve everything.
        served = [
            [
                drawn.uniform(0.5, 5) * price if drawn.random() > 0.2 or kind == types - 1 else 0.0
                for _ in range(buckets)
            ]
            for kind, price in enumerate(prices)
        ]
        gpus = [
            Gpu(str(kind), price, [[Point(one)] for one in row])
            for kind, (price, row) in enumerate(zip(prices, served, strict=True))
        ]
        mix = solve(gpus, Demand([str(bucket) for bucket in range(buckets)], rates, factor))
        loads = [
            [
                rate / factor / one if one else np.inf
                for rate, one in zip(rates, row, strict=True)
                for _ in range(factor)
            ]
            for row in served
        ]
        assert mix.cost == pytest.approx(brute_force(prices, loads), abs=1e-6)
        check(mix, gpus, rates, factor)
        several += sum(mix.counts) > 1
        mixed += sum(count > 0 for count in mix.counts) > 1
    assert several > INSTANCES / 2 and mixed > INSTANCES / 4
    ctypes.CDLL(None).fflush(None)
    assert capfd.readouterr().out == ""  # HiGHS has something to say of some of them


def check(mix: Mix, gpus: Sequence[Gpu], rates: Sequence[float], factor: int) -> None:
    """Every slice is given to one type that serves it, and there are GPUs enough."""
    assert all(sum(parts) == factor for parts in mix.slices)
    for kind, gpu in enumerate(gpus):
        load = 0.0
        for parts, rate, points in zip(mix.slices, rates, gpu.points, strict=True):
            assert parts[kind] == 0 or points[0].per_s > 0
            load += parts[kind] / factor * rate / points[0].per_s if parts[kind] else 0.0
        assert mix.loads[kind] == pytest.approx(load)
        assert load <= mix.counts[kind] + serving.FULL
    assert mix.cost == pytest.approx(sum(count * gpu.per_hour for count, gpu in zip(mix.counts, gpus, strict=True)))


def test_the_papers_size_is_solved_to_the_end() -> None:
    """10 x 6 sizes, 4 GPU types, slice factor 8 (Mélange, evaluation)."""
    drawn = random.Random(1)
    gpus = [
        Gpu(str(kind), price, [[Point(drawn.uniform(0.5, 4) * price)] for _ in range(60)])
        for kind, price in enumerate((0.70, 1.01, 3.67, 7.516))
    ]
    rates = [2 * drawn.random() ** 3 for _ in range(60)]
    mix = solve(gpus, Demand([str(bucket) for bucket in range(60)], rates, 8))
    assert mix.proven
    check(mix, gpus, rates, 8)


def test_without_time_there_is_still_a_mix() -> None:
    gpus, demand = melange(8)
    mix = solve(gpus, demand, time_limit_s=0.0)
    check(mix, gpus, demand.rates, 8)
    # No dearer than one type alone: the A100s, $7.34.
    assert 5.69 <= mix.cost <= 7.34


def test_the_least_load_takes_the_cheapest_gpu() -> None:
    found = run("--preset", "melange-example", "--rate", "1e-8")
    assert found.data["mix"] == {"A10G": 1, "cost": 1.01}
    assert quantity(found, "saved by the mix").value == 0


def test_a_hopelessly_slow_type_is_left_out() -> None:
    gpus = [Gpu("slow", 0.1, [[Point(1e-300)]]), Gpu("fast", 5.0, [[Point(1.0)]])]
    mix = solve(gpus, Demand(["a"], [4.0]))
    assert mix.counts == [0, 4] and mix.cost == 20


def test_sizes_that_nobody_asks_for_need_no_gpu() -> None:
    gpus = [Gpu("small", 1.0, [[Point(2.0)], []])]
    mix = solve(gpus, Demand(["a", "b"], [4.0, 0.0]))
    assert mix.counts == [2] and mix.slices[1] == [0]


def test_without_scipy_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(BackendUnavailable, match=r"pip install 'headrace\[plan\]'"):
        solve(*melange())


def test_scipy_is_imported_only_to_solve() -> None:
    code = "import sys, headrace.cli.plan_serving, headrace.plan.serving_input; sys.exit('scipy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ---------------------------------------------------------------- latencies


def points(*rows: tuple[float, float, float]) -> list[Point]:
    return [Point(*row) for row in rows]


FAST = Gpu("fast", 4.0, [points((1, 0.1, 0.01), (9, 0.5, 0.03)), points((1, 0.4, 0.02))])
SLOW = Gpu("slow", 1.0, [points((2, 0.3, 0.05)), points((0.5, 0.9, 0.06))])
PAIR = Demand(["short", "long"], [1.0, 0.5])


def test_a_limit_takes_the_fastest_point_that_keeps_it() -> None:
    assert throughputs([FAST, SLOW], PAIR, Slo()) == [[9, 1], [2, 0.5]]
    assert throughputs([FAST, SLOW], PAIR, Slo(itl_s=0.02)) == [[1, 1], [0, 0]]
    assert throughputs([FAST, SLOW], PAIR, Slo(ttft_s=0.4)) == [[1, 1], [2, 0]]
    assert solve([FAST, SLOW], PAIR, Slo(itl_s=0.02)).counts == [2, 0]


@pytest.mark.parametrize(
    ("slo", "field", "said"),
    [
        (Slo(itl_s=0.015), "itl_s", "0.02 s or more: long needs it on fast"),
        (Slo(itl_s=0.001), "itl_s", r"0.02 s or more: long \(and 1 other\) needs it on fast"),
        (Slo(ttft_s=0.2), "ttft_s", "0.4 s or more: long needs it on fast"),
        (Slo(0.2, 0.015), "ttft_s", "0.4 s or more.*itl_s is in the way too: 0.02 s or more"),
        (Slo(0.2, 1.0), "ttft_s", "0.4 s or more: long needs it on fast, the fastest there is$"),
    ],
)
def test_an_slo_that_no_gpu_meets_says_what_binds(slo: Slo, field: str, said: str) -> None:
    with pytest.raises(InvalidParameter, match=said) as raised:
        solve([FAST, SLOW], PAIR, slo)
    assert raised.value.field == field


def test_the_limit_that_is_named_is_one_that_can_be_kept() -> None:
    close = Gpu("close", 1.0, [points((1, 0.02000000000001, 0.01))])
    with pytest.raises(InvalidParameter, match=r"0\.02001 s or more"):
        solve([close], Demand(["any"], [1.0]), Slo(0.02))
    assert solve([close], Demand(["any"], [1.0]), Slo(0.02001)).counts == [1]


def test_sizes_that_nobody_asks_for_need_no_latencies() -> None:
    part = Gpu("part", 1.0, [points((1, 0.1, 0.01)), [Point(1.0)]])
    assert solve([part], Demand(["a", "b"], [1.0, 0.0]), Slo(1.0, 1.0)).counts == [1]


def test_limits_that_are_met_one_by_one_and_not_together() -> None:
    either = Gpu("either", 1.0, [points((1, 0.1, 0.9), (1, 0.9, 0.1))])
    with pytest.raises(InvalidParameter, match="both on none"):
        solve([either], Demand(["any"], [1.0]), Slo(0.2, 0.2))


def test_a_size_that_no_gpu_holds() -> None:
    with pytest.raises(InvalidParameter, match="a throughput for requests of long: none has one"):
        solve([Gpu("small", 1.0, [points((1, 0.1, 0.1)), []])], PAIR, Slo(itl_s=1.0))


def test_a_limit_needs_latencies() -> None:
    with pytest.raises(InvalidParameter, match="A10G has throughputs without itl_s"):
        run("--preset", "melange-example", "--itl-s", "0.1")


def test_a_type_that_cannot_serve_all_alone_says_what(tmp_path: Path) -> None:
    info = {
        "part": {"cost": 1, "tputs": [[5, 0], [1, 1]]},
        "rest": {"cost": 2, "tputs": [[0, 9], [1, 1]]},
    }
    found = run(written(tmp_path, gpu_info=info))
    assert quantity(found, "one type alone").value is None
    assert quantity(found, "saved by the mix").value is None
    assert table(found, "GPU types").notes == (
        "part alone: no throughput within the latencies for ≤ 100 in, ≤ 400 out.",
        "rest alone: no throughput within the latencies for ≤ 100 in, ≤ 50 out.",
    )
