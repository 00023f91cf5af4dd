"""A plan on a terminal, or piped: numbers, tables as wide as it is, and with --explain where each number is from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich import box
from rich.cells import cell_len
from rich.console import Console, JustifyMethod
from rich.padding import Padding
from rich.table import Table as Grid
from rich.text import Text

from headrace.pages.plain import clean
from headrace.plan.document import Column, Document, Quantity, Table, Value
from headrace.plan.numbers import column_texts, interval_text, is_number, is_number_text, source_text, value_text

MOST_ROWS = 60
"""Of a table; --json has the rest."""
TEXT_WIDTHS = (120, 80, 60, 50, 42, 34)
"""Of a column of texts, before they go on in the next line: the first with which the table fits, or the last."""
VALUE_WIDTH = 44
"""Of a value with its unit, before it goes on in the next line."""
GAP = 2
"""Between two columns."""
INDENT = 4
UNTOLD = "not named"
COMMANDS = ("headrace ", "pip ", "sudo ", "nvidia-smi ", "deepspeed ", "torchrun ")
"""What a note begins with that is one."""


def show(document: Document, out: Console, explain: bool = False) -> None:
    """Prints all of it but the plots. `explain`: also the formula and the source of every number."""
    out.print(Text(clean(document.title), style="bold"))
    out.print()
    if document.quantities:
        _quantities(document.quantities, out)
    for table in document.tables:
        _table(table, out)
    if document.plots:
        titles = "; ".join(clean(plot.title) for plot in document.plots)
        out.print(Text(f"Plots, which --html FILE draws: {titles}.", style="dim"))
        out.print()
    for note in document.notes:
        _note(note, out)
    if explain:
        if document.notes:
            out.print()
        _explain(document, out)


def is_command(note: str) -> bool:
    """Whether a note is a command to be copied, and so stays one line."""
    return note.startswith(COMMANDS) and "\n" not in note and not note.endswith(".")


def _note(note: str, out: Console, style: str = "") -> None:
    out.print(Text(clean(note), style=style), soft_wrap=is_command(note))


def _grid() -> Grid:
    return Grid(box=box.SIMPLE_HEAD, padding=(0, GAP - 1, 0, 0), pad_edge=False, show_edge=False, header_style="bold")


def _quantities(quantities: Sequence[Quantity], out: Console) -> None:
    """A row each, notes as footnotes: many rows have the same."""
    intervals = [interval_text(one) for one in quantities]
    notes = list(dict.fromkeys(one.note for one in quantities if one.note))
    values = [clean(value_text(one)) for one in quantities]
    grid = _grid()
    grid.add_column("", overflow="fold")
    grid.add_column("value", overflow="fold", no_wrap=max(map(cell_len, values)) <= VALUE_WIDTH)
    if any(intervals):
        grid.add_column("interval", no_wrap=True)
    grid.add_column("rests on", no_wrap=True)
    for one, value, interval in zip(quantities, values, intervals, strict=True):
        cells = [Text(clean(one.name)), Text(value, style="bold"), *([Text(interval)] if any(intervals) else [])]
        mark = f" [{notes.index(one.note) + 1}]" if one.note else ""
        grid.add_row(*cells, Text(f"{one.basis}{mark}", style="dim"))
    out.print(grid)
    for number, note in enumerate(notes, 1):
        out.print(Text(f"[{number}] {clean(note)}", style="dim"))
    out.print()


@dataclass(frozen=True, slots=True)
class _Column:
    """One column as texts, a cell for each row."""

    heading: str
    cells: Sequence[str]
    number: bool

    def width(self, most: int) -> int:
        """`most`: of a column of texts."""
        widest = max(cell_len(line) for cell in (self.heading, *self.cells) for line in cell.splitlines() or [""])
        return widest if self.number else min(widest, most)


def is_number_column(values: Sequence[Value]) -> bool:
    """All that is known in it are numbers, or texts of one."""
    return all(value is None or is_number(value) or is_number_text(value) for value in values)


def _columns(table: Table, rows: Sequence[Sequence[Value]]) -> Iterator[_Column]:
    for index, column in enumerate(table.columns):
        values = [row[index] for row in rows]
        heading = f"{column.name}\n{column.unit}" if column.unit else column.name
        yield _Column(
            clean(heading), [clean(one) for one in column_texts(values, column.unit)], is_number_column(values)
        )


def _table(table: Table, out: Console) -> None:
    """In as many tables under each other as the width needs; each begins with the columns that name its rows."""
    if table.title:
        out.print(Text(clean(table.title), style="bold"))
    rows = table.rows[:MOST_ROWS]
    columns = list(_columns(table, rows))
    if rows and columns:
        _pieces(columns, len(rows), table.named_by, out)
    else:
        out.print(Text("(no rows)\n"))
    if left := len(table.rows) - len(rows):
        out.print(Text(f"{left} more {'row' if left == 1 else 'rows'}: --json, --html FILE."))
    for note in table.notes:
        _note(note, out, "dim")
    if left or table.notes:
        out.print()


def _pieces(columns: Sequence[_Column], rows: int, named_by: int, out: Console) -> None:
    for most in TEXT_WIDTHS:
        widths = [column.width(most) for column in columns]
        if sum(widths) + GAP * len(widths) <= out.width:
            break
    for group in _groups(widths, named_by, out.width):
        grid = _grid()
        for index in group:
            number = columns[index].number
            side: JustifyMethod = "right" if number else "left"
            limit = None if number else most
            grid.add_column(columns[index].heading, justify=side, no_wrap=number, max_width=limit, overflow="fold")
        for row in range(rows):
            grid.add_row(*(Text(columns[index].cells[row]) for index in group))
        out.print(grid)
        out.print()


def _groups(widths: Sequence[int], named_by: int, width: int) -> list[list[int]]:
    """Indices of the columns in their order, in groups of at most that width, each with the first `named_by` columns
    and, if there is one, another."""
    names = list(range(named_by))
    groups = [names[:]]
    room = left = width - sum(widths[:named_by]) - GAP * named_by
    for index in range(named_by, len(widths)):
        if widths[index] + GAP > left and len(groups[-1]) > named_by:
            groups.append(names[:])
            left = room
        groups[-1].append(index)
        left -= widths[index] + GAP
    return groups


def _explain(document: Document, out: Console) -> None:
    out.print(Text("Where each number is from", style="bold"))
    out.print()
    for one in document.quantities:
        out.print(Text.assemble((clean(one.name), "bold"), f" = {clean(value_text(one))}"))
        interval = interval_text(one)
        told = (
            ("formula", one.formula),
            ("source", source_text(one)),
            ("rests on", one.basis),
            ("interval", interval),
            ("note", one.note),
        )
        _told(told, out)
    for table in document.tables:
        if table.columns:
            out.print(Text(f"{clean(table.title)}: columns", style="bold"))
            for column in table.columns:
                unit = f", {column.unit}" if column.unit else ""
                out.print(
                    Padding(Text(clean(f"{column.name}{unit}{_origin(column)}")), (0, 0, 0, INDENT), expand=False)
                )
            out.print()


def _origin(column: Column) -> str:
    told = ": " + column.formula if column.formula else ""
    return f"{told} [{column.source}]" if column.source else told


def _told(told: Sequence[tuple[str, str]], out: Console) -> None:
    for name, said in told:
        if said or name in ("formula", "source"):
            line = Text.assemble((f"{name}: ", "dim"), clean(said) or UNTOLD)
            out.print(Padding(line, (0, 0, 0, INDENT), expand=False))
    out.print()
