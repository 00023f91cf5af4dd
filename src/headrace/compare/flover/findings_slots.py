"""What the runs of experiment 4 come to: the slot simulator on our own traces, the published gains beside."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from headrace.compare.flover.findings import gain_sentence, not_slower, trace_checks
from headrace.compare.flover.plan import FUSED, INSTANCES_METHOD, Measured, Scale
from headrace.compare.flover.plots import Line, line_chart
from headrace.compare.flover.published import EXPERIMENT_4, REQUESTS
from headrace.compare.flover.results import CellRun, Figure, Findings, Grid, spread_text, together
from headrace.compare.flover.shuffle import SlotRun, ends_in_the_middle, run_rows, run_slots
from headrace.compare.flover.trace import Check, token_iterations
from headrace.compare.methods import Outcome

MOST_POINTS = 300
"""Of a line: more could not be told apart."""


def shuffles(cells: Sequence[CellRun], scale: Scale, measured: Measured) -> Findings:
    """Experiment 4: the slot simulator on our own traces, beside the paged engine's rows."""
    slot_rows, gain_rows = [], []
    found_checks: list[tuple[str, tuple[Check, ...]]] = []
    for cell in cells:
        run = cell.round(FUSED)
        tokens = token_iterations(run)
        joined, lengths = [one[0] for one in tokens], [len(one) for one in tokens]
        slots = REQUESTS
        tidy, loose = (run_slots(joined, lengths, slots, one) for one in (True, False))
        rows = run_rows(joined, lengths, slots)
        found_checks.append(
            (cell.shape.label, _slot_checks(run, tidy, loose, rows, ends_in_the_middle(joined, lengths)))
        )
        high = cell.shape.longest
        slot_rows.append(
            (
                f"{high} (here {scale.tokens(high)})",
                f"{sum(lengths) / len(lengths):.0f}",
                str(tidy.moves),
                str(tidy.moved_tokens),
                str(tidy.waste),
                f"{loose.waste} ({100 * loose.waste_share:.0f}%)",
                str(rows.moves),
                "0",
            )
        )
        gain = _shuffle_gain(tidy, loose, measured)
        theirs = [
            EXPERIMENT_4[f"{model}, {what}"].values[high]
            for what in ("shuffle gain", "over instances")
            for model in ("LLaMA 13B", "LLaMA 65B")
        ]
        over = spread_text(cell.ratio(INSTANCES_METHOD, FUSED))
        gain_rows.append(
            (
                str(high),
                f"{gain:.2f}",
                *(f"{one:.2f}" for one in theirs[:2]),
                over,
                *(f"{one:.1f}" for one in theirs[2:]),
            )
        )
    grids = (
        Grid(
            "Slots that are shuffled, slots that are not, and a paged engine's rows, on our own trace",
            (
                *("longest length", "mean", "shuffles: moves", "tokens of KV copied", "rows wasted"),
                *("without: rows wasted", "paged: row moves", "tokens of KV copied"),
            ),
            tuple(slot_rows),
            f"{REQUESTS} slots. Simulated from when our engine's requests joined and ended. Share: of all rows "
            "computed. The released code copies a whole slot at a move, however full it is.",
        ),
        Grid(
            "What it gains",
            (
                *("longest length", "shuffle here (estimate)", "LLaMA 13B", "LLaMA 65B"),
                *("over instances, here", "LLaMA 13B", "LLaMA 65B"),
            ),
            tuple(gain_rows),
            "Estimate: iterations without the shuffle / with it, each as long as the measured ones say for its rows; "
            "copying is not counted. Models: published.",
        ),
    )
    merged = tuple(
        together([(label, found[i]) for label, found in found_checks]) for i in range(len(found_checks[0][1]))
    )
    sentences = [
        "Our engine keeps its KV in pages: a request that ends leaves a row to fill and no KV to copy, so it computes "
        "what shuffled slots compute and copies nothing.",
        *gain_sentence(cells[0], "8.0 and 10.6"),
        *gain_sentence(cells[-1], "13.3 and 23.4"),
    ]
    checks = (*merged, *trace_checks(cells), *not_slower(cells, (INSTANCES_METHOD,), {}))
    figure = Figure(partial(_rows_chart, loose), f"Rows of each iteration, lengths {cells[-1].shape.label}, scaled.")
    return Findings(grids, checks, tuple(sentences), (figure,))


def _rows_chart(loose: SlotRun, width: float) -> str:
    every = -(-len(loose.live) // MOST_POINTS)
    named = (("live rows: shuffled slots, and our rows", loose.live), ("computed without a shuffle", loose.computed))
    lines = [
        Line(name, tuple((float(at), float(rows[at])) for at in range(0, len(rows), every)), False)
        for name, rows in named
    ]
    return line_chart(lines, "iterations", "rows", False, width)


def _slot_checks(run: Outcome, tidy: SlotRun, loose: SlotRun, rows: SlotRun, middle_first: bool) -> tuple[Check, ...]:
    counted = tuple(one.in_flight for one in run.iterations)
    return (
        Check(
            "shuffled: rows computed = live rows in every iteration", tidy.computed == tidy.live, f"{len(tidy.live)}"
        ),
        Check("shuffled: no way needs fewer moves", tidy.moves == tidy.least_moves, f"{tidy.moves} moves"),
        Check("paged: rows computed = live rows in every iteration", rows.computed == rows.live, f"{len(rows.live)}"),
        Check("live slots = our engine's requests in flight, every iteration", tidy.live == counted, f"{len(counted)}"),
        Check(
            "not shuffled: rows are wasted where a middle request ends first",
            (loose.waste > 0) == middle_first,
            f"{loose.waste} rows",
        ),
    )


def _shuffle_gain(tidy: SlotRun, loose: SlotRun, measured: Measured) -> float:
    with_, without = (sum(map(measured.iteration_s, one.computed)) for one in (tidy, loose))
    return without / with_
