"""Flover's seven experiments on the model at hand: calibrate, cut what would take too long, run every point, judge."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median

from headrace.compare.arithmetic import order_follows_batch
from headrace.compare.flover.findings import overall_time, poisson, throughput
from headrace.compare.flover.findings_slots import shuffles
from headrace.compare.flover.findings_time import against_engines, cumulative, timeline
from headrace.compare.flover.plan import (
    BUDGET_S,
    FUSED,
    INSTANCES_METHOD,
    Measured,
    Scale,
    cell_workload,
    choose_length,
    envelope,
    methods_of,
    published_of,
    shapes,
)
from headrace.compare.flover.published import LENGTH
from headrace.compare.flover.results import CellRun, Findings, Result, same_tokens
from headrace.compare.measure import run_rounds
from headrace.compare.methods import Method, Outcome
from headrace.compare.workloads import Workload
from headrace.core.errors import HeadraceError, InvalidParameter

PROBE_TOKENS = 32
"""Of the answers that times of iterations are measured with."""
PROBES = 5
"""Runs of each measurement before the experiment; their median counts."""
OURS = frozenset({FUSED, INSTANCES_METHOD})
"""Of what is started before the calibration."""
MAKE = Callable[[str], Method]
"""Name of a method -> the method, not started. Raises HeadraceError."""


@dataclass(slots=True)
class _Bench:
    """Methods that have been started, and why the others have not."""

    make: MAKE
    workload: Workload
    """What they got ready for."""
    progress: Callable[[str], None]
    methods: dict[str, Method] = field(default_factory=dict)
    descriptions: dict[str, str] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    def start(self, name: str) -> None:
        """Raises HeadraceError for fused alone: without it there is nothing to tell."""
        self.progress(f"loading: {name}")
        method = None
        try:
            method = self.make(name)
            method.start(self.workload)
            # Only now does it know what it is capped at.
            self.descriptions[name] = method.description
        except HeadraceError as error:
            if method is not None:
                method.close()
            self.fail(name, error)
        else:
            self.methods[name] = method

    def fail(self, name: str, error: HeadraceError) -> None:
        if name == FUSED:
            raise error
        self.failures[name] = str(error)
        if (method := self.methods.pop(name, None)) is not None:
            method.close()

    def close(self) -> None:
        for method in self.methods.values():
            method.close()
        self.methods.clear()


def run_experiment(
    number: int,
    make: MAKE,
    prompts: Sequence[tuple[int, ...]],
    longest: int,
    *,
    repeats: int = 3,
    seed: int = 0,
    budget_s: float = BUDGET_S,
    outside: Sequence[str] = (),
    progress: Callable[[str], None] = lambda text: None,
) -> Result:
    """Experiment `number`, 1 to 7.

    `make`: as `methods.registry.make_method`; `prompts`: at least `plan.requests_of(number)`, eight tokens each as
    published; `longest`: tokens of prompt and answer that the model's context has room for; `budget_s`: about how long
    all rounds may take; `outside`: names of the engines of experiment 7. The engine needs `plan.requests_of(number)`
    rows, or requests wait for each other. Raises InvalidParameter, and HeadraceError where the fused method fails; a
    method that fails otherwise is in `Result.failures`.
    """
    published = published_of(number)
    _check(longest, prompts, repeats, budget_s)
    bench = _Bench(make, envelope(number, prompts, longest), progress)
    try:
        for name in methods_of(number, Scale(1.0), outside):
            # Windows are as long as the calibration says, and need none of their own.
            if not name.startswith("window:"):
                bench.start(name)
        progress("calibrating")
        measured = _calibrate(bench)
        ready = [name for name in methods_of(number, Scale(1.0), outside) if name not in bench.failures]
        scale = choose_length(number, ready, measured, repeats, budget_s, longest, seed)
        scale = replace(scale, single_s=_single(bench, scale.tokens(LENGTH)))
        wanted = [name for name in methods_of(number, scale, outside) if name not in bench.failures]
        for name in wanted:
            if name not in bench.methods:
                bench.start(name)
        cells = _run_cells(bench, number, scale, wanted, prompts, repeats, seed)
    finally:
        bench.close()
    findings = _findings(number, cells, scale, measured, seed, outside)
    kept = {name: told for name, told in bench.descriptions.items() if name not in bench.failures}
    return Result(published, scale, measured, repeats, seed, tuple(cells), kept, bench.failures, findings)


def _check(longest: int, prompts: Sequence[tuple[int, ...]], repeats: int, budget_s: float) -> None:
    if repeats < 1:
        raise InvalidParameter("repeats", repeats, "an integer ≥ 1")
    if budget_s <= 0:
        raise InvalidParameter("budget_s", budget_s, "a number above 0")
    most = max(map(len, prompts), default=0)
    if longest < most + 2 * PROBE_TOKENS:
        raise InvalidParameter("max_model_len", longest, f"at least {most + 2 * PROBE_TOKENS} for this experiment")


def _calibrate(bench: _Bench) -> Measured:
    """Times of an iteration with one request and with all of them; of engines from outside with all of them."""
    fused = bench.methods[FUSED]
    everyone = bench.workload
    rows = len(everyone.requests)
    fused.run(everyone.warm_up(PROBE_TOKENS, rows))
    alone = [fused.run(everyone.warm_up(PROBE_TOKENS, 1)) for _ in range(PROBES)]
    batch = [fused.run(everyone.warm_up(PROBE_TOKENS, rows)) for _ in range(PROBES)]
    step_s = median(_decode_s(one) for one in alone)
    outside = {name: _outside_s(bench, name) for name in tuple(bench.methods) if name not in OURS}
    outside_s = {name: seconds for name, seconds in outside.items() if seconds is not None}
    return Measured(step_s, max(step_s, median(_decode_s(one) for one in batch)), rows, outside_s)


def _outside_s(bench: _Bench, name: str) -> float | None:
    """Seconds a token, with all requests at once; the first run warms up. None: it failed, and is out."""
    piece = bench.workload.warm_up(PROBE_TOKENS, len(bench.workload.requests))
    try:
        runs = [bench.methods[name].run(piece).seconds for _ in range(2)]
    except HeadraceError as error:
        bench.fail(name, error)
        return None
    return runs[-1] / PROBE_TOKENS


def _decode_s(run: Outcome) -> float:
    """Seconds a token after the first, of the request that came last."""
    times = max((request.token_s for request in run.requests), key=lambda found: found[-1])
    return max(1e-9, (times[-1] - times[0]) / (len(times) - 1))


def _single(bench: _Bench, tokens: int) -> float:
    """Seconds of one request of so many tokens, alone."""
    piece = bench.workload.warm_up(tokens, 1)
    return median(bench.methods[FUSED].run(piece).seconds for _ in range(PROBES))


def _run_cells(
    bench: _Bench,
    number: int,
    scale: Scale,
    names: Sequence[str],
    prompts: Sequence[tuple[int, ...]],
    repeats: int,
    seed: int,
) -> list[CellRun]:
    found = []
    for shape in shapes(number):
        workload = cell_workload(number, shape, scale, prompts, seed)
        methods = [bench.methods[name] for name in names if name in bench.methods]

        def told(text: str, label: str = shape.label) -> None:
            bench.progress(f"{label}: {text}")

        runs = run_rounds(methods, workload, repeats, told, bench.fail)
        exact = frozenset(name for name in runs if bench.methods[name].exact)
        free = any(order_follows_batch(bench.methods[name].config) for name in exact)
        found.append(CellRun(shape, workload, runs, exact, free))
    return found


def _findings(
    number: int, cells: Sequence[CellRun], scale: Scale, measured: Measured, seed: int, outside: Sequence[str]
) -> Findings:
    ways: Mapping[int, Callable[[], Findings]] = {
        1: lambda: overall_time(cells, scale, measured),
        2: lambda: throughput(cells, measured),
        3: lambda: poisson(cells, scale, seed),
        4: lambda: shuffles(cells, scale, measured),
        5: lambda: timeline(cells),
        6: lambda: cumulative(cells, scale, seed),
        7: lambda: against_engines(cells, outside),
    }
    found = ways[number]()
    return replace(found, checks=(same_tokens(cells, FUSED), *found.checks))
