"""An experiment's result on a terminal, as a section of the page, and as JSON."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from statistics import fmean
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from headrace.compare.flover.identities import overlap_percent
from headrace.compare.flover.published import Published
from headrace.compare.flover.results import CellRun, Grid, Result
from headrace.compare.flover.trace import mean_in_flight
from headrace.compare.methods import Outcome
from headrace.pages.markup import cell, figure, grid, listed, safe

RANGE = "–"
"""Between the ends of one, in a cell."""
SOURCE = "Flover (temporal fusion for autoregressive models; arXiv 2305.13484, HiPC 2023; GTC 2024)"


def headline(result: Result) -> str:
    return f"Experiment {result.published.number} of Flover: {result.published.title}"


def show(result: Result, out: Console) -> None:
    """Prints everything that was found."""
    out.print(Text(headline(result), style="bold"))  # in a rule, what does not fit would be cut
    out.rule(style="dim")
    for sentence in (*result.findings.sentences, *result.notes):
        out.print(Text(sentence))
    for one in result.findings.grids:
        out.print()
        out.print(Text(one.title, style="bold"))
        out.print(table(one, out.width))
        if one.note:
            out.print(Text(one.note, style="dim"))
    out.print()
    out.print(Text("Identities", style="bold"))
    for check in result.findings.checks:
        mark = Text("holds  ", style="green") if check.holds else Text("BROKEN ", style="red")
        out.print(mark + Text(f"{check.name}: {check.detail}"))
    for name, reason in result.failures.items():
        out.print(Text(f"{name} did not run: {reason}", style="yellow"))


def table(one: Grid, width: int) -> Table:
    """For a terminal of `width` columns: where a row does not fit, ranges stand below their medians; what does not fit
    then is folded, never cut."""
    natural = [max(map(len, column)) for column in zip(*one.rows, strict=True)]
    narrow = sum(natural) + len(natural) - 1 > width
    found = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False, header_style="bold")
    for index, heading in enumerate(one.head):
        found.add_column(Text(heading), justify="right" if index else "left", overflow="fold", no_wrap=not index)
    for row in one.rows:
        found.add_row(*(Text(_stacked(cell) if narrow else cell) for cell in row))
    return found


def _stacked(cell: str) -> str:
    """`1.94 (1.93–1.95)` in two lines."""
    value, opened, span = cell.partition(" (")
    return f"{value}\n{span.removesuffix(')')}" if opened and RANGE in span else cell


def section(result: Result) -> str:
    """HTML, for the page whose style is report.css and whose heading is `headline`."""
    return "\n".join(_pieces(result))


def _pieces(result: Result) -> Iterator[str]:
    for sentence in result.findings.sentences:
        yield f"<p>{safe(sentence)}</p>"
    for drawn in result.findings.figures:
        yield figure([drawn.draw], drawn.caption)
    for one in result.findings.grids:
        yield f"<h2>{safe(one.title)}</h2>"
        rows = [cell(row[0], "name") + "".join(cell(text, "number") for text in row[1:]) for row in one.rows]
        yield grid([(heading, "number" if index else "") for index, heading in enumerate(one.head)], rows)
        if one.note:
            yield f'<p class="note">{safe(one.note)}</p>'
    yield "<h2>Identities on our own traces and on the iteration clock</h2>"
    checks = [
        cell(check.name)
        + cell("holds" if check.holds else "broken", "good" if check.holds else "bad")
        + cell(check.detail)
        for check in result.findings.checks
    ]
    yield grid((("identity", ""), ("", ""), ("found", "")), checks)
    if result.failures:
        yield "<h2>Methods that did not run</h2>"
        yield grid((("method", ""), ("why", "")), [cell(n, "name") + cell(why) for n, why in result.failures.items()])
    yield "<h2>How it was run, and what was published</h2>"
    ran = (f"{name}: {told}." for name, told in result.descriptions.items())
    counted = f"{result.repeats} rounds of each point; seed {result.seed}. Published: {SOURCE}."
    yield listed((*result.notes, *ran, counted, *result.published.remarks))


def document(result: Result) -> dict[str, Any]:
    """A JSON object without NaN: every figure above, and the seconds they rest on."""
    scale, measured = result.scale, result.measured
    return {
        "experiment": result.published.number,
        "published": _published(result.published),
        "notes": list(result.notes),
        "length_factor": scale.length,
        "time_factor": scale.time,
        "single_s": scale.single_s,
        "iteration_s": {"rows": measured.rows, "alone": measured.step_s, "all": measured.batch_step_s},
        "repeats": result.repeats,
        "seed": result.seed,
        "cells": [_cell(one) for one in result.cells],
        "methods": dict(result.descriptions),
        "failures": dict(result.failures),
        "tables": [
            {"title": one.title, "head": list(one.head), "rows": [list(row) for row in one.rows], "note": one.note}
            for one in result.findings.grids
        ],
        "checks": [{"name": one.name, "holds": one.holds, "detail": one.detail} for one in result.findings.checks],
        "sentences": list(result.findings.sentences),
    }


def csv_files(result: Result) -> Mapping[str, str]:
    """Name of a file -> its text: every round of every point, and the experiment's own."""
    lines = [
        f"{one.shape.label.replace(',', ' ')},{one.shape.key:g},{name},{number},{run.seconds:.6f},{run.output_tokens},"
        f"{len(run.iterations) or ''}"
        for one in result.cells
        for name, rounds in one.runs.items()
        for number, run in enumerate(rounds, 1)
    ]
    head = "point,key,method,round,seconds,output_tokens,iterations"
    return {"rounds.csv": "\n".join([head, *lines]) + "\n", **result.findings.files}


def _published(published: Published) -> dict[str, Any]:
    return {
        "title": published.title,
        "source": SOURCE,
        "variable": published.variable,
        "series": [
            {
                "name": one.name,
                "unit": one.unit,
                "mark": str(one.mark),
                "values": [[key, value] for key, value in one.values.items()],
            }
            for one in published.series
        ],
        "remarks": list(published.remarks),
    }


def _cell(one: CellRun) -> dict[str, Any]:
    return {
        "label": one.shape.label,
        "key": one.shape.key,
        "workload_sha256": one.workload.sha256,
        "arrivals_s": [asked.arrival_s for asked in one.workload.requests],
        "lengths": [asked.max_tokens for asked in one.workload.requests],
        "methods": {name: [_round(run) for run in rounds] for name, rounds in one.runs.items()},
    }


def _round(run: Outcome) -> dict[str, Any]:
    iterations = len(run.iterations)
    overlap = overlap_percent(mean_in_flight(run), len(run.requests)) if iterations else None
    return {
        "seconds": run.seconds,
        "output_tokens": run.output_tokens,
        "iterations": iterations or None,
        "overlap_percent": overlap,
        "mean_latency_s": fmean(request.latency_s for request in run.requests),
        "ends_s": [request.end_s for request in run.requests],
    }
