"""The comparison on a terminal, or piped: answers, table, a few sentences."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TextIO

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from headrace.compare.advice import advise, measured_text, model_text
from headrace.compare.answers import clean, shown_answers
from headrace.compare.measure import Claim, Spread
from headrace.compare.runner import Comparison, MethodResult

PIPED_WIDTH = 100


def console(stream: TextIO | None = None, width: int | None = None) -> Console:
    """Plain and of a fixed width where nobody watches."""
    stream = sys.stdout if stream is None else stream
    if stream.isatty():
        return Console(file=stream, width=width, highlight=False)
    return Console(file=stream, width=width or PIPED_WIDTH, highlight=False, color_system=None, force_terminal=False)


def show(comparison: Comparison, written: Sequence[str], out: Console) -> None:
    """Prints everything; `written`: paths of the reports."""
    _answers(comparison, out)
    out.print(_table(comparison))
    for sentence in (*advise(comparison.methods, comparison.bound).sentences, measured_text(comparison)):
        out.print(Text(sentence))
    out.print(Text(model_text(comparison)))
    for path in written:
        # One line whatever the width, so that it can be clicked and copied.
        out.print(Text(f"Written: {clean(path)}"), soft_wrap=True)


def _answers(comparison: Comparison, out: Console) -> None:
    for index, question in enumerate(comparison.workload.questions):
        for name, text in shown_answers(comparison, index):
            whose = "" if name == comparison.base.name else f" · {name} answers differently"
            out.rule(Text(f"question {index + 1}: {question.title}{whose}", style="bold"), align="left", style="dim")
            out.print(Text(text))
            out.print()


def _table(comparison: Comparison) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    table.add_column("method", no_wrap=True)
    for heading in ("seconds", "output\ntokens/s", "× serial", "itera-\ntions"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("same arithmetic")
    table.add_column("same model")
    for result in comparison.methods:
        table.add_row(*_row(result))
    return table


def _row(result: MethodResult) -> tuple[Text, ...]:
    timing = result.timing
    arithmetic = "identical" if result.divergence is None else str(result.divergence)
    faster = timing.claim is Claim.FASTER
    ratio = "1" if timing.claim is Claim.BASE else with_range(timing.ratio, ".2f")
    if timing.claim is Claim.SAME:
        ratio += "\nno signif.\ndifference"
    return (
        Text(result.name),
        Text(with_range(timing.spread, ".2f")),
        Text(f"{timing.output_tokens_per_s:.1f}"),
        Text(ratio, style="green" if faster else ""),
        Text(str(result.rounds[0].iterations)),
        Text(arithmetic, style="green" if result.identical else "red"),
        Text(str(result.same_model), style="green" if result.same_model.lossless else "yellow"),
    )


def with_range(spread: Spread, form: str) -> str:
    """Median, and below it the range where there is one."""
    return f"{spread.median:{form}}\n[{spread.low:{form}}–{spread.high:{form}}]"
