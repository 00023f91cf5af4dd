"""The page's tables: the summary, every figure of every method, and where answers differ."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from headrace.compare import cells
from headrace.compare.cells import NONE, rate_text
from headrace.compare.figures import Figures, Latency, Spread
from headrace.compare.measure import Claim
from headrace.compare.runner import Comparison, MethodResult
from headrace.compare.verdict import RequestVerdict, Verdict
from headrace.pages.chart_axes import short_text
from headrace.pages.markup import cell, grid, name_cell, name_kind, safe

MOST_DIVERGENCES = 40
"""Rows of the table of divergences."""


def summary(comparison: Comparison) -> Iterator[str]:
    """Two tables: time and verdicts; latency, memory and energy."""
    head: Sequence[tuple[str, str]] = (
        ("method", ""),
        ("seconds", "number"),
        ("× serial", "number"),
        ("output tokens/s", "number"),
        ("same arithmetic", ""),
        ("same model", ""),
    )
    yield grid(head, [_time_row(result) for result in comparison.methods], "pinned")
    yield (
        '<p class="note">Seconds: median over the rounds, below it their range. × serial: how many times as fast, '
        "below it the 95 % interval. Same model: against the checkpoint's weights in fp32.</p>"
    )
    methods = comparison.methods
    all_figures = [result.figures for result in methods]
    ttft, itl = (cells.latency_unit([kind(one) for one in all_figures]) for kind in (_ttft, _itl))
    head = (
        ("method", ""),
        (f"TTFT p50, {ttft[0]}", "number"),
        (f"TTFT p95, {ttft[0]}", "number"),
        (f"ITL p50, {itl[0]}", "number"),
        (f"ITL p95, {itl[0]}", "number"),
        ("peak memory", "number"),
        ("joules a request", "number"),
    )
    yield grid(head, [_latency_row(result, ttft[1], itl[1]) for result in methods], "pinned")
    yield (
        '<p class="note">TTFT: time to first token, from a request’s arrival. ITL: time between two tokens of an '
        "answer. Each the median over the rounds.</p>"
    )


def _ttft(figures: Figures) -> Latency | None:
    return figures.ttft


def _itl(figures: Figures) -> Latency | None:
    return figures.itl


def _time_row(result: MethodResult) -> str:
    timing, figures = result.timing, result.figures
    ratio = cell("1", "number")
    if timing.claim is not Claim.BASE:
        found = cells.ratio_of(result)
        interval = f"{found.low:.2f}–{found.high:.2f}" if found.low < found.high else ""
        ratio = cell(f"{found.median:.2f}", "number", interval, cells.claim_words(result))
    first, *more = cells.arithmetic_lines(result)
    promised = "bad" if result.exact and not result.kept else "mild"
    arithmetic = cell(first, promised if cells.differing(result) else "good", *more)
    first, *more = cells.model_lines(result)
    model = cell(first, "good" if result.same_model.lossless else "mild", *more)
    seconds = cell(cells.seconds_text(figures.seconds.median), "number", cells.range_text(figures.seconds))
    rate = cell(rate_text(figures.output_tokens_per_s.median), "number")
    return f"{name_cell(result.name)}{seconds}{ratio}{rate}{arithmetic}{model}"


def _latency_row(result: MethodResult, ttft_factor: float, itl_factor: float) -> str:
    figures = result.figures
    joules = cells.joules_per_request(result)
    energy = NONE if joules is None else short_text(joules)
    told = [short_text(one.median * ttft_factor) for one in (figures.ttft.p50, figures.ttft.p95)]
    if figures.itl is None:
        told += [NONE, NONE]
    else:
        told += [short_text(one.median * itl_factor) for one in (figures.itl.p50, figures.itl.p95)]
    memory = cells.memory_text(figures.peak_rss_bytes)
    return (
        name_cell(result.name)
        + "".join(cell(one, "number") for one in (*told, memory))
        + cell(energy, "number", cells.energy_note(result))
    )


Told = Callable[[MethodResult], str]
Number = TypeVar("Number", int, float)


def details(comparison: Comparison) -> Iterator[str]:
    """Every figure, a row each and a column a method; figures that no method tells are left out."""
    methods = comparison.methods
    rows = []
    for name, tell in _rows(comparison):
        told = [tell(result) for result in methods]
        if any(one != NONE for one in told):
            rows.append(f'<th scope="row">{safe(name)}</th>' + "".join(cell(one, "number") for one in told))
    yield "<h2>Every figure</h2>"
    yield grid(
        (("", ""), *((one.name, f"number {name_kind(one.name)}".strip()) for one in methods)), rows, "pinned figures"
    )
    yield (
        '<p class="note">Medians over the rounds of each round’s figure. TPOT: (last token − first) / (tokens − 1). '
        "E2E: last token − arrival. Overlap: mean of requests in flight / number of requests.</p>"
    )


def _rows(comparison: Comparison) -> Iterator[tuple[str, Told]]:
    yield "requests a minute", lambda one: rate_text(one.figures.requests_per_min.median)
    yield "requests/s within the latency target", _spread(lambda one: one.goodput_per_s, short_text)
    kinds: Sequence[tuple[str, Callable[[Figures], Latency | None]]] = (
        ("TTFT", lambda one: one.ttft),
        ("ITL", lambda one: one.itl),
        ("TPOT", lambda one: one.tpot),
        ("E2E", lambda one: one.e2e),
    )
    for name, kind in kinds:
        unit, factor = cells.latency_unit([kind(one.figures) for one in comparison.methods])
        for part in ("mean", "p50", "p95", "p99"):
            yield f"{name} {part}, {unit}", _latency(kind, part, factor)
    yield "output tokens", lambda one: str(one.rounds[0].output_tokens)
    yield "tokens through the model", lambda one: _known(one.rounds[0].computed_tokens, str)
    yield "iterations", _spread(lambda one: one.iterations, lambda value: f"{value:.0f}")
    yield "mean in flight", _spread(lambda one: one.mean_in_flight, short_text)
    yield "overlap", _spread(lambda one: one.overlap, lambda value: f"{100 * value:.1f} %")
    yield "preemptions", lambda one: str(max(outcome.preemptions for outcome in one.rounds))
    yield "peak memory", lambda one: cells.memory_text(one.figures.peak_rss_bytes)
    yield "processor seconds", _spread(lambda one: one.cpu_s, cells.seconds_text)
    yield "joules a run", _spread(lambda one: one.joules, short_text)
    yield "source of the joules", lambda one: cells.energy_note(one) or NONE
    yield "cost a request", lambda one: _known(one.figures.cost_per_request, lambda cost: f"{cost:.3g}")
    yield "cost of a million output tokens", lambda one: _known(one.figures.cost_per_million_tokens, short_text)
    yield "grams of CO₂ a run", lambda one: _known(one.figures.gco2, short_text)
    yield "seconds to load (not counted)", lambda one: cells.seconds_text(one.load_s)


def _spread(pick: Callable[[Figures], Spread | None], form: Callable[[float], str]) -> Told:
    def tell(result: MethodResult) -> str:
        spread = pick(result.figures)
        return NONE if spread is None else form(spread.median)

    return tell


def _latency(kind: Callable[[Figures], Latency | None], part: str, factor: float) -> Told:
    def tell(result: MethodResult) -> str:
        latency = kind(result.figures)
        if latency is None:
            return NONE
        spread: Spread = getattr(latency, part)
        return short_text(spread.median * factor)

    return tell


def _known(value: Number | None, form: Callable[[Number], str]) -> str:
    return NONE if value is None else form(value)


def divergences(comparison: Comparison) -> Iterator[str]:
    """A row for each answer that is not the base's own; at most `MOST_DIVERGENCES`, those of every method in turn."""
    found = [(result, cells.differing(result)) for result in comparison.methods]
    found = [(result, differing) for result, differing in found if differing]
    if not found:
        return
    each = max(1, MOST_DIVERGENCES // len(found))
    rows = [_divergence_row(result, one) for result, differing in found for one in differing[:each]]
    yield "<h2>Where answers leave serial’s</h2>"
    head = (("method", ""), ("request", "number"), ("token", "number"), ("logit margin", "number"), ("verdict", ""))
    yield grid(head, rows)
    told = "Margin: serial’s largest logit there minus its second largest; – where serial’s answer has ended. A margin "
    told += f"below ε is a near-tie: {comparison.epsilon}."
    if left := sum(len(differing) for _, differing in found) - len(rows):
        told += f" {left} more are in the JSON report (--json)."
    yield f'<p class="note">{safe(told)}</p>'


def _divergence_row(result: MethodResult, found: RequestVerdict) -> str:
    assert found.token is not None
    margin = _known(found.margin, lambda value: f"{value:.2g}")
    numbers = "".join(cell(one, "number") for one in (found.question + 1, found.token + 1, margin))
    bad = "bad" if result.exact and found.kind is Verdict.DIFFERENT else "mild"
    return f"{name_cell(result.name)}{numbers}{cell(found.kind, bad)}"
