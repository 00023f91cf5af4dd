"""Ranges, one inside another: what each took in all, and by itself."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from statistics import median

from headrace.backends.ranges import ATTENTION, LAYER, MLP, Range

PREFILL, DECODE = "headrace.prefill", "headrace.decode"
LOAD, SCHEDULE, COMMIT, DETOKENISE, WAIT = "load", "schedule", "commit", "detokenise", "wait"
ALL_LAYERS = "layers"
"""The sum of a model's layers, where a table has no row for each."""


@dataclass(slots=True)
class Node:
    """A range and what lies directly within it, in order of time."""

    range: Range
    inside: list[Node] = field(default_factory=list)

    @property
    def total_ns(self) -> int:
        return self.range.end_ns - self.range.begin_ns

    @property
    def self_ns(self) -> int:
        """Without the ranges inside; operators of a library are no ranges of ours."""
        return self.total_ns - sum(one.total_ns for one in self.inside if not one.range.is_detail)


def nest(ranges: Iterable[Range]) -> list[Node]:
    """Those that lie in no other. Of ranges that are equal, the one that comes first is the outer one.

    Libraries have clocks of their own, microseconds away from ours: what hangs over the end of a range is cut there.
    """
    roots: list[Node] = []
    open_nodes: list[Node] = []
    for one in sorted(ranges, key=lambda one: (one.begin_ns, -one.end_ns)):
        while open_nodes and one.begin_ns >= open_nodes[-1].range.end_ns:
            open_nodes.pop()
        node = Node(one)
        if open_nodes:
            node.range = replace(one, end_ns=min(one.end_ns, open_nodes[-1].range.end_ns))
            open_nodes[-1].inside.append(node)
        else:
            roots.append(node)
        open_nodes.append(node)
    return roots


def walk(nodes: Iterable[Node]) -> Iterator[Node]:
    """All of them, outer before inner."""
    for node in nodes:
        yield node
        yield from walk(node.inside)


@dataclass(slots=True)
class Row:
    """All ranges of one name in one place."""

    path: tuple[str, ...]
    """Names, from the outermost range to this one."""
    calls: int = 0
    total_ns: int = 0
    self_ns: int = 0
    weight_bytes: int = 0
    multiply_adds: int = 0

    @property
    def gigabytes_per_s(self) -> float | None:
        """Of weights, each read once a call; None: no product, or not known."""
        return self.weight_bytes / self.total_ns if self.weight_bytes and self.total_ns else None

    @property
    def gigaflops(self) -> float | None:
        """10⁹ floating-point operations a second, two for each multiply-add; None: no product, or not known."""
        return 2 * self.multiply_adds / self.total_ns if self.multiply_adds and self.total_ns else None

    def add(self, node: Node) -> None:
        self.calls += 1
        self.total_ns += node.total_ns
        self.self_ns += node.self_ns
        self.weight_bytes += node.range.weight_bytes
        self.multiply_adds += node.range.multiply_adds


def summarise(roots: Sequence[Node]) -> list[Row]:
    """A row a name and place, the layers of a model in one; each row before those within it, in order of time."""
    rows: dict[tuple[str, ...], Row] = {}

    def add(node: Node, above: tuple[str, ...]) -> None:
        if node.range.is_detail:
            return
        name = ALL_LAYERS if node.range.name == LAYER else node.range.name
        path = (*above, name)
        rows.setdefault(path, Row(path)).add(node)
        for one in node.inside:
            add(one, path)

    for root in roots:
        add(root, ())
    inside: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    for row in rows.values():
        inside[row.path[:-1]].append(row)

    def in_order(some: Iterable[Row]) -> Iterator[Row]:
        for row in some:
            yield row
            yield from in_order(inside[row.path])

    # Steps of the engine first, then what is done between them.
    return list(in_order(sorted(inside[()], key=lambda row: row.path[0] not in (PREFILL, DECODE))))


@dataclass(frozen=True, slots=True)
class LayerRow:
    """Attention or MLP of one layer, in all steps of one phase."""

    phase: str
    layer: int
    part: str
    calls: int
    total_ns: int
    of_median: float
    """Its time, as a multiple of the median layer's."""


def layer_rows(roots: Sequence[Node]) -> list[LayerRow]:
    """The slowest first."""
    calls: dict[tuple[str, int, str], list[int]] = defaultdict(list)
    for root in roots:
        for node in walk(root.inside):
            if node.range.layer is not None and node.range.name in (ATTENTION, MLP):
                calls[root.range.name, node.range.layer, node.range.name].append(node.total_ns)
    totals: dict[tuple[str, str], list[int]] = defaultdict(list)
    for (phase, _, part), times in calls.items():
        totals[phase, part].append(sum(times))
    rows = [
        LayerRow(phase, layer, part, len(times), sum(times), sum(times) / max(1.0, median(totals[phase, part])))
        for (phase, layer, part), times in calls.items()
    ]
    return sorted(rows, key=lambda row: -row.total_ns)
