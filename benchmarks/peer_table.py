"""Tables of what was measured: medians with their range, ratios of paired rounds, and the share of the read bound."""

from __future__ import annotations

from benchmarks.peer_run import Row, WorkResult
from benchmarks.peer_work import Figure

from headrace.compare.figures import Spread

DASH = "–"


def values(row: Row, figure: Figure) -> list[float]:
    """One value a round; empty if the engine failed."""
    return [] if row.error else [one[figure.key] for one in row.rounds]


def ratios(one: Row, other: Row, figure: Figure) -> Spread | None:
    """How many times as good `one` was as `other`, round by round. None if a round of either is missing."""
    mine, theirs = values(one, figure), values(other, figure)
    if not mine or len(mine) != len(theirs):
        return None
    pairs = zip(mine, theirs, strict=True)
    return Spread.of([a / b if figure.more_is_better else b / a for a, b in pairs])


def best_peer(result: WorkResult, figure: Figure) -> Row | None:
    """The outside engine with the best median, of those that keep to the instruction set of the run."""
    rows = [row for row in result.rows if not row.spec.ours and row.spec.keeps_to(result.isa)]
    peers = [row for row in rows if values(row, figure)]
    sign = -1 if figure.more_is_better else 1
    return min(peers, key=lambda row: sign * Spread.of(values(row, figure)).median, default=None)


def bound_share(result: WorkResult, row: Row) -> float | None:
    """Decode speed ÷ (read bandwidth at the size of the weights ÷ bytes of weights). The KV cache is not counted."""
    if not result.work.bound_by_reading or row.error or not row.rounds:
        return None
    size = int(row.loaded["weights_bytes"])
    gb_s = result.gb_s(size)
    return None if gb_s is None else Spread.of(values(row, result.work.figures[0])).median / (gb_s * 1e9 / size)


def against_best(result: WorkResult, row: Row) -> str:
    """For each figure, how many times as good as the peer that is best at it."""
    said = []
    for figure in result.work.figures:
        best = best_peer(result, figure)
        found = None if best is None else ratios(row, best, figure)
        if best is not None and found is not None:
            said.append(f"{figure.title} {spread_text(found, 2)} × {best.spec.name}")
    return "; ".join(said) or "nothing to compare"


def spread_text(spread: Spread | None, digits: int) -> str:
    if spread is None:
        return DASH
    return f"{spread.median:.{digits}f} ({spread.low:.{digits}f}–{spread.high:.{digits}f})"


def table(result: WorkResult) -> list[list[str]]:
    """Cells, the header first."""
    figures = result.work.figures
    lead = figures[0]
    best = best_peer(result, lead)
    ours = [row for row in result.rows if row.spec.ours]
    header = ["engine", *(figure.title for figure in figures), "× best peer"]
    header += [f"{row.spec.name} ÷ it" for row in ours]
    bounded = result.work.bound_by_reading
    if bounded:
        header += ["weights MB", "read GB/s", "of bound"]
    lines = [header]
    for row in result.rows:
        cells = [row.spec.name + ("" if row.spec.keeps_to(result.isa) else " *")]
        for figure in figures:
            found = values(row, figure)
            cells.append(spread_text(Spread.of(found), figure.digits) if found else DASH)
        cells.append(DASH if best is None else spread_text(ratios(row, best, lead), 2))
        cells += [DASH if row is mine else spread_text(ratios(mine, row, lead), 2) for mine in ours]
        if bounded:
            cells += _bound_cells(result, row)
        lines.append(cells)
    return lines


def _bound_cells(result: WorkResult, row: Row) -> list[str]:
    share = bound_share(result, row)
    if share is None:
        return [DASH, DASH, DASH]
    size = int(row.loaded["weights_bytes"])
    return [f"{size / 1e6:.1f}", f"{result.gb_s(size):.1f}", f"{share:.0%}"]


def as_markdown(result: WorkResult) -> str:
    """The work's table, the errors below it, and how quiet the machine was."""
    lines = table(result)
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    rules = ["-" * width if column == 0 else "-" * (width - 1) + ":" for column, width in enumerate(widths)]
    text = [f"### {result.work.name}: {result.work.title}", ""]
    for line in (lines[0], rules, *lines[1:]):
        cells = [line[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True))]
        text.append(f"| {' | '.join(cells)} |")
    return "\n".join([*text, "", *notes(result)]) + "\n"


def notes(result: WorkResult) -> list[str]:
    """What the reader of the table must know, a line each."""
    rows = result.rows
    said = [f"- {row.spec.name}: {row.error}" for row in rows if row.error]
    said += [f"- {row.spec.name} against the best peer: {against_best(result, row)}" for row in rows if row.spec.ours]
    if any(not row.spec.keeps_to(result.isa) for row in rows):
        said.append(f"- * uses newer instructions than {result.isa} and cannot be told not to; no best peer here")
    static = [row.spec.name for row in rows if row.loaded.get("scheduling") == "static"]
    if static and len(result.work.prompts) > 1:
        said.append(f"- static batches (who comes while one runs waits for its end): {', '.join(static)}")
    if result.canary_s:
        said.append(f"- canary loop: {spread_text(Spread.of([1000 * one for one in result.canary_s]), 1)} ms")
    others = [one["other_cores"] for row in rows for one in row.rounds if "other_cores" in one]
    if others:
        said.append(f"- cores busy with something else during the runs: {spread_text(Spread.of(others), 2)}")
    busy = [(row.spec.name, [one["busy_cores"] for one in row.rounds]) for row in rows if row.rounds]
    said.append("- cores kept busy: " + ", ".join(f"{name} {Spread.of(cores).median:.2f}" for name, cores in busy))
    return said
