"""The comparison on a terminal, or piped: answers, tables as wide as it is, a few sentences."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from headrace.compare import cells, study
from headrace.compare.advice import Advice, measured_text, model_text
from headrace.compare.answers import shown_answers
from headrace.compare.figures import Latency
from headrace.compare.measure import Claim
from headrace.compare.runner import Comparison, MethodResult
from headrace.pages.chart_axes import short_text
from headrace.pages.plain import clean, shortened

MOST_QUESTIONS = 4
"""Whose answers are shown; there are files for the rest."""
MOST_LETTERS = 800
"""Of an answer."""
NAME_WIDTH = 20
"""Of a method's name, before it goes on in the next line."""
SHORT_CLAIMS: Mapping[Claim, str] = {Claim.SAME: "no signif.\ndifference", Claim.TOO_FEW: "too few\nrepeats"}
"""What a ratio does not say by itself."""
GAP = 2
"""Between two columns: padding, and the table's own blank."""


def show(comparison: Comparison, advice: Advice, out: Console) -> None:
    """Prints everything that was found. `advice`: what `advise` said of this comparison."""
    _answers(comparison, out)
    _tables(comparison, out)
    for failure in comparison.failures:
        out.print(Text.assemble((failure.name, "bold"), f" did not run: {clean(cells.reason_text(failure))}"))
    if comparison.failures:
        out.print()
    if study.applies(comparison):
        _study(comparison, out)
    for sentence in advice.sentences:
        # A command stays one line, so that it can be copied.
        command = advice.command is not None and sentence.endswith(advice.command)
        out.print(Text(clean(sentence)), soft_wrap=command)
    out.print()
    for sentence in (measured_text(comparison), model_text(comparison)):
        out.print(Text(clean(sentence), style="dim"))


def _answers(comparison: Comparison, out: Console) -> None:
    questions = comparison.workload.requests
    for index, question in enumerate(questions[:MOST_QUESTIONS]):
        title = f": {clean(question.title)}" if question.title else ""
        for name, text in shown_answers(comparison, index):
            whose = "" if name == comparison.base.name else f" · {name} answers differently"
            out.rule(Text(f"request {index + 1}{title}{whose}", style="bold"), align="left", style="dim")
            out.print(Text(shortened(text, MOST_LETTERS)))
            out.print()
    left = len(questions) - MOST_QUESTIONS
    if left > 0:
        out.print(Text(f"Answers to {left} more {'request' if left == 1 else 'requests'}: --json, --csv.\n"))


@dataclass(frozen=True, slots=True)
class _Column:
    """One column, a cell for each method."""

    heading: str
    cells: Sequence[str]
    styles: Sequence[str]
    number: bool = True

    @property
    def width(self) -> int:
        return max(cell_len(line) for cell in (self.heading, *self.cells) for line in cell.splitlines() or [""])


def _tables(comparison: Comparison, out: Console) -> None:
    """As few tables under each other as the width allows; each begins with the names."""
    names = [Text(result.name, style="bold") for result in comparison.methods]
    widest = min(NAME_WIDTH, max(cell_len("method"), *(name.cell_len for name in names)))
    for group in _groups(list(_columns(comparison.methods)), out.width - widest):
        table = Table(box=box.SIMPLE_HEAD, padding=(0, GAP - 1, 0, 0), pad_edge=False, show_edge=False)
        table.header_style = "bold"
        table.add_column("method", overflow="fold", width=widest)
        for column in group:
            table.add_column(column.heading, justify="right" if column.number else "left", no_wrap=True)
        for index, name in enumerate(names):
            table.add_row(name, *(Text(one.cells[index], style=one.styles[index]) for one in group))
        out.print(table)
        out.print()


def _groups(columns: Sequence[_Column], width: int) -> list[list[_Column]]:
    """The columns in their order, in groups of at most that width (one column at least)."""
    groups: list[list[_Column]] = []
    left = 0
    for column in columns:
        if not groups or column.width + GAP > left:
            groups.append([])
            left = width
        groups[-1].append(column)
        left -= column.width + GAP
    return groups


def _columns(methods: Sequence[MethodResult]) -> Iterator[_Column]:
    """All that there is to show, the most important first; what no method tells has no column."""
    plain = [""] * len(methods)
    figures = [result.figures for result in methods]
    yield _Column(
        "seconds\n(range)",
        [_below(cells.seconds_text(one.seconds.median), cells.range_text(one.seconds)) for one in figures],
        plain,
    )
    yield _Column(
        "× serial\n(interval)", [_ratio(result) for result in methods], [_claim_style(result) for result in methods]
    )
    yield _Column(
        "same\narithmetic",
        ["\n".join(cells.arithmetic_lines(result)) for result in methods],
        [_arithmetic_style(result) for result in methods],
        number=False,
    )
    yield _Column(
        "same\nmodel",
        ["\n".join(cells.model_lines(result)) for result in methods],
        ["green" if result.same_model.lossless else "yellow" for result in methods],
        number=False,
    )
    yield _Column("output\ntokens/s", [cells.rate_text(one.output_tokens_per_s.median) for one in figures], plain)
    unit, factor = cells.latency_unit([one.ttft for one in figures])
    yield _Column(f"TTFT, {unit}\np50 / p95", [_latency(one.ttft, factor) for one in figures], plain)
    unit, factor = cells.latency_unit([one.itl for one in figures])
    if any(one.itl for one in figures):
        yield _Column(
            f"ITL, {unit}\np95",
            [cells.NONE if one.itl is None else short_text(one.itl.p95.median * factor) for one in figures],
            plain,
        )
    if any(one.peak_rss_bytes is not None for one in figures):
        yield _Column("peak\nmemory", [cells.memory_text(one.peak_rss_bytes) for one in figures], plain)
    if any(one.joules is not None for one in figures):
        yield _Column("joules a\nrequest", [_joules(result) for result in methods], plain)


def _below(first: str, second: str) -> str:
    return f"{first}\n{second}" if second else first


def _ratio(result: MethodResult) -> str:
    timing = result.timing
    if timing.claim is Claim.BASE:
        return "1"
    ratio = cells.ratio_of(result)
    told = f"{ratio.median:.2f}"
    if ratio.low < ratio.high:
        told += f"\n{ratio.low:.2f}–{ratio.high:.2f}"
    return _below(told, SHORT_CLAIMS.get(timing.claim, ""))


def _latency(latency: Latency, factor: float) -> str:
    return " / ".join(short_text(one.median * factor) for one in (latency.p50, latency.p95))


def _joules(result: MethodResult) -> str:
    joules = cells.joules_per_request(result)
    if joules is None:
        return cells.NONE
    return short_text(joules) + ("\nestimated" if cells.is_estimated(result) else "")


def _claim_style(result: MethodResult) -> str:
    return "green" if result.timing.claim is Claim.FASTER else ""


def _arithmetic_style(result: MethodResult) -> str:
    """Red where a promise is broken."""
    if not cells.differing(result):
        return "green"
    return "red" if result.exact and not result.kept else "yellow"


def _study(comparison: Comparison, out: Console) -> None:
    """Its ratios beside ours, in short."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, GAP - 1, 0, 0), pad_edge=False, show_edge=False)
    table.header_style = "bold"
    table.add_column("× one by one")
    table.add_column("study", justify="right", no_wrap=True)
    table.add_column("here")
    for published, ours in study.rows(comparison):
        if published.short and published.pictures == study.has_pictures(comparison):
            here = ", ".join(f"{name} {ratio:.2f}" for name, ratio in ours) or "not measured"
            table.add_row(published.short, study.ratio_text(published.ratio, 2), Text(here))
    table.add_row("batching bound, Σ lengths / longest", "≤ 4", f"{comparison.bound:.2f}")
    out.print(table)
    out.print(Text(study.IN_SHORT, style="dim"))
    out.print()
