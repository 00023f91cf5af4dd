"""A plan as one HTML page in itself: no script, nothing fetched. Every text from outside is escaped."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

from headrace.pages.markup import cell, figure, grid, listed, name_kind, safe, whole_page
from headrace.plan.document import Column, Document, Plot, Quantity, Table, Value
from headrace.plan.numbers import column_texts, interval_text, source_text, value_text
from headrace.plan.plots import chart, has_points, undrawn
from headrace.plan.text import is_command, is_number_column

MOST_ROWS = 1000
"""Of a table; --json has the rest."""
ONE_LINE = 24
"""Letters of the longest text of a column whose texts are not broken."""


def page(document: Document, kicker: Sequence[str]) -> str:
    """The whole document. `kicker`: when and with what it was made, in short pieces."""
    sections = (
        *_quantities(document.quantities),
        *(part for plot in document.plots for part in _plot(plot)),
        *(part for table in document.tables for part in _table(table)),
        *_notes(document.notes),
    )
    return whole_page("headrace plan", document.title, kicker, document.title, sections)


def _quantities(quantities: Sequence[Quantity]) -> Iterator[str]:
    """Two columns, so that a phone shows them whole: what it is and where from, what it comes to and how sure."""
    if not quantities:
        return
    rows = []
    for one in quantities:
        source = source_text(one)
        below = (one.formula, f"Source: {source}" if source else "")
        name = f'<th class="told" scope="row">{safe(one.name)}{"".join(_small(line) for line in below if line)}</th>'
        interval = interval_text(one)
        rows.append(name + cell(value_text(one), "value", interval and f"from {interval}", one.basis, one.note))
    yield grid((("quantity, formula, source", ""), ("value, what it rests on", "")), rows, "quantities")


def _small(line: str) -> str:
    return f"<small>{safe(line)}</small>"


def _plot(plot: Plot) -> Iterator[str]:
    yield f"<h2>{safe(plot.title)}</h2>"
    left = undrawn(plot)
    told = f"{left} {'point has' if left == 1 else 'points have'} no place on these axes." if left else ""
    if has_points(plot):
        yield figure([partial(chart, plot)], told)
    else:
        yield f'<p class="note">Nothing to draw. {safe(told)}</p>'


def _table(table: Table) -> Iterator[str]:
    if table.title:
        yield f"<h2>{safe(table.title)}</h2>"
    rows: Sequence[Sequence[Value]] = table.rows[:MOST_ROWS]
    columns = [[row[index] for row in rows] for index in range(len(table.columns))]
    texts = [column_texts(values, one.unit) for values, one in zip(columns, table.columns, strict=True)]
    kinds = [_kind(*pair, index == 0) for index, pair in enumerate(zip(columns, texts, strict=True))]
    head = [
        (f"{one.name}, {one.unit}" if one.unit else one.name, kind)
        for one, kind in zip(table.columns, kinds, strict=True)
    ]
    if rows and columns:
        yield grid(head, [_row(texts, kinds, index) for index in range(len(rows))], "pinned")
    else:
        yield '<p class="note">No rows.</p>'
    if left := len(table.rows) - len(rows):
        yield f'<p class="note">{left} more {"row is" if left == 1 else "rows are"} in the JSON (--json).</p>'
    for note in table.notes:
        yield f'<p class="note">{safe(note)}</p>'
    told = [_origin(column) for column in table.columns if column.formula or column.source]
    if told:
        yield f"<details><summary>Where its columns are from</summary>\n{listed(told)}</details>"


def _kind(values: Sequence[Value], texts: Sequence[str], first: bool) -> str:
    """Class of a column's cells. Of the first one, which stays in sight: a long name is broken."""
    if is_number_column(values):
        return "number"
    longest = max(texts, key=len, default="")
    if first:
        return name_kind(longest)
    return "short" if len(longest) <= ONE_LINE else "text"


def _row(texts: Sequence[Sequence[str]], kinds: Sequence[str], index: int) -> str:
    first, *others = (column[index] for column in texts)
    rest = "".join(cell(said, kind) for said, kind in zip(others, kinds[1:], strict=True))
    return f'<th class="{kinds[0]}" scope="row">{safe(first)}</th>{rest}'


def _origin(column: Column) -> str:
    said = f"{column.name}: {column.formula or 'as given'}"
    return f"{said} ({column.source})" if column.source else said


def _notes(notes: Sequence[str]) -> Iterator[str]:
    if notes:
        yield "<h2>Notes</h2>"
    for note in notes:
        yield f"<pre>{safe(note)}</pre>" if is_command(note) else f"<p>{safe(note)}</p>"
