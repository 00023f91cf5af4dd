"""The profile on a terminal, or piped."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import median

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from headrace.profile.ranges import DECODE, PREFILL, Row, layer_rows, summarise
from headrace.profile.run import Profile, Step

UNNAMED = "between them"


def show(profile: Profile, top: int, out: Console) -> None:
    """`top`: how many of the slowest parts of layers are listed."""
    for line in _head(profile):
        out.print(Text(line))
    out.print()
    out.print(_table(profile))
    out.print()
    if top and (slowest := layer_rows(profile.roots)[:top]):
        out.print(Text("The slowest parts of single layers", style="bold"))
        table = _new_table()
        table.add_column("phase")
        for heading in ("layer", "part"):
            table.add_column(heading, justify="right" if heading == "layer" else "left")
        for heading in ("calls", "total ms", "share", "mean µs", "× median\nlayer"):
            table.add_column(heading, justify="right", no_wrap=True)
        for one in slowest:
            share = one.total_ns / (profile.end_ns - profile.begin_ns)
            mean = _micro(one.total_ns / one.calls)
            values = (one.phase, one.layer, one.part, one.calls, _milli(one.total_ns), f"{share:.1%}", mean)
            table.add_row(*map(str, values), f"{one.of_median:.2f}")
        out.print(table)
        out.print()
    for line in _legend(profile):
        out.print(Text(line))


def _head(profile: Profile) -> Iterator[str]:
    work = profile.work
    yield f"Profile of {profile.model_name}. {profile.how}"
    requests = f"{work.requests} requests at once, each" if work.requests > 1 else "1 request:"
    yield (
        f"{requests} {work.prompt_tokens} prompt tokens (random ids) and {work.max_tokens} tokens of a greedy answer. "
        f"After a warm-up, one run without the profile and one with it, of {profile.seconds:.3f} s:"
    )
    for phase in (PREFILL, DECODE):
        steps = [step for step in profile.steps if step.phase == phase]
        if steps:
            count = f"{len(steps)} step" + ("s" if len(steps) > 1 else "")
            plain = _times([step for step in profile.plain_steps if step.phase == phase])
            tokens = sum(step.tokens for step in steps)
            yield f"  {phase}: {count}, {tokens} tokens; a step {_times(steps)}, without the profile {plain}"
    if profile.preemptions:
        yield f"Requests gave way {profile.preemptions} times: the KV cache is small for this work."


def _times(steps: Sequence[Step]) -> str:
    """Median and range."""
    times = [(step.end_ns - step.begin_ns) / 1e6 for step in steps]
    if len(times) < 2:
        return f"{sum(times):.2f} ms"
    return f"{median(times):.2f} ms (median; {min(times):.2f}–{max(times):.2f})"


def _new_table() -> Table:
    return Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False, header_style="bold")


def _table(profile: Profile) -> Table:
    table = _new_table()
    table.add_column("range", no_wrap=True, overflow="ellipsis")
    for heading in ("calls", "total\nms", "self\nms", "share", "mean\nµs", "GB/s", "GFLOP\n/s"):
        table.add_column(heading, justify="right", no_wrap=True)
    load_ms = _milli(profile.load.end_ns - profile.load.begin_ns)
    table.add_row("load", "1", load_ms, "", "", "", "", "", end_section=True)
    whole_ns = profile.end_ns - profile.begin_ns
    rows = summarise(profile.roots)
    for row in rows:
        depth = len(row.path) - 1
        name = Text("  " * depth + row.path[-1], style="bold" if depth == 0 else "")
        table.add_row(name, *_figures(row, whole_ns))
    unnamed_ns = whole_ns - sum(row.total_ns for row in rows if len(row.path) == 1)
    table.add_row(UNNAMED, "", _milli(unnamed_ns), "", f"{unnamed_ns / whole_ns:.1%}", "", "", "")
    return table


def _figures(row: Row, whole_ns: int) -> tuple[str, ...]:
    has_inside = row.self_ns != row.total_ns
    return (
        str(row.calls),
        _milli(row.total_ns),
        _milli(row.self_ns) if has_inside else "",
        f"{row.total_ns / whole_ns:.1%}",
        _micro(row.total_ns / row.calls),
        _rate(row.gigabytes_per_s),
        _rate(row.gigaflops),
    )


def _legend(profile: Profile) -> Iterator[str]:
    yield (
        "total: from a range's begin to its end, with the ranges inside it; self: without them (empty: nothing is "
        f"inside). share: of the {profile.seconds:.3f} s from the first request to the last answer, without the load."
    )
    yield (
        f"{PREFILL}: steps that compute prompt tokens, whatever else they compute; {DECODE}: steps that compute "
        "answers only. schedule: the step is planned; gather: its arrays are made; commit: its tokens are taken over. "
        f"Self time of a step: what passes between these under no name; “{UNNAMED}”: outside of all ranges."
    )
    if profile.config.device == "cuda":
        yield (
            "Two plans are in flight: a step launches one and waits for the one before it, under whose name it counts; "
            "wait: for the GPU. What the GPU does meanwhile is for Nsight Systems to show."
        )
    else:
        yield (
            "GB/s: a product's weights, read once a call; GFLOP/s: two operations for each multiply-add. A product is "
            "as fast as it can be where one of them comes near what the machine has: of memory bandwidth with few rows "
            "(decode), of arithmetic with many (prefill)."
        )
    if (profile.config.backend, profile.config.device) == ("torch", "cpu"):
        yield (
            "Products count the rows of padding that torch computes, and the profile itself takes its time: compare "
            "ranges with each other, and runs with the run without the profile."
        )
    if not profile.has_text:
        yield "The model has no tokenizer: nothing was detokenised."


def _milli(ns: float) -> str:
    return f"{ns / 1e6:.2f}" if ns < 1e9 else f"{ns / 1e6:.0f}"


def _micro(ns: float) -> str:
    return f"{ns / 1e3:.1f}" if ns < 1e7 else f"{ns / 1e3:.0f}"


def _rate(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}" if value < 1000 else f"{value:.0f}"
