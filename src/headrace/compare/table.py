"""The comparison on a terminal, or piped: answers, table, a few sentences."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TextIO

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from headrace.compare.advice import advise, measured_text, model_text
from headrace.compare.answers import clean, shown_answers
from headrace.compare.measure import Claim, Spread, figure, ratio_figure
from headrace.compare.runner import Comparison, MethodResult
from headrace.compare.verdict import kl_figure, percent

PIPED_WIDTH = 100


def console(stream: TextIO | None = None, width: int | None = None) -> Console:
    """Plain and of a fixed width where nobody watches."""
    stream = sys.stdout if stream is None else stream
    if stream.isatty():
        return Console(file=stream, width=width, highlight=False)
    return Console(file=stream, width=width or PIPED_WIDTH, highlight=False, color_system=None, force_terminal=False)


def show(comparison: Comparison, out: Console) -> None:
    """Prints everything that was found."""
    _answers(comparison, out)
    out.print(_table(comparison))
    out.print()
    for sentence in (*advise(comparison.methods, comparison.bound).sentences, measured_text(comparison)):
        out.print(Text(sentence))
    out.print(Text(model_text(comparison)))


def show_written(path: str, out: Console) -> None:
    # One line whatever the width, so that it can be clicked and copied.
    out.print(Text(f"Written: {clean(path)}"), soft_wrap=True)


def _answers(comparison: Comparison, out: Console) -> None:
    for index, question in enumerate(comparison.workload.requests):
        for name, text in shown_answers(comparison, index):
            whose = "" if name == comparison.base.name else f" · {name} answers differently"
            out.rule(Text(f"question {index + 1}: {question.title}{whose}", style="bold"), align="left", style="dim")
            out.print(Text(text))
            out.print()


def _table(comparison: Comparison) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False, header_style="bold")
    table.add_column("method", overflow="fold")
    for heading in ("seconds\n(range)", "output\ntokens/s", "× serial\n(range)", "itera-\ntions"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("same\narithmetic", no_wrap=True)
    table.add_column("same\nmodel", no_wrap=True)
    for result in comparison.methods:
        table.add_row(*_row(result))
    return table


def _row(result: MethodResult) -> tuple[Text, ...]:
    timing, quality = result.timing, result.same_model
    ratio = "1" if timing.claim is Claim.BASE else with_range(timing.ratio, ratio_figure)
    if timing.claim is Claim.SAME:
        ratio += "\nno signif.\ndifference"
    model = (
        "lossless" if quality.lossless else f"KL {kl_figure(quality.mean_kl)}\ntop-1 {percent(quality.top1_agreement)}"
    )
    return (
        Text(result.name),
        Text(with_range(timing.spread, figure)),
        Text(f"{timing.output_tokens_per_s:.1f}"),
        Text(ratio, style="green" if timing.claim is Claim.FASTER else ""),
        Text(str(len(result.rounds[0].iterations))),
        Text("identical" if result.identical else "different", style="green" if result.identical else "red"),
        Text(model, style="green" if quality.lossless else "yellow"),
    )


def with_range(spread: Spread, form: Callable[[float], str]) -> str:
    """Median, and below it the range where there is one."""
    if spread.low == spread.high:
        return form(spread.median)
    return f"{form(spread.median)}\n{form(spread.low)}–{form(spread.high)}"
