"""From the times of a program's operations to named ranges: operations, parts of a layer, layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from headrace.backends.native.program import Line
from headrace.backends.ranges import GATHER, LAYER, SAMPLE, Range

AROUND: Mapping[int, str] = {-1: GATHER, -2: SAMPLE}
"""What a session does around operations, by what stands in place of an operation's number."""


def named_ranges(lines: Sequence[Line], timings: NDArray[np.int64]) -> list[Range]:
    """`timings`: as `Session.take_timings` gives them; `lines`: of the program that ran."""
    operations: list[tuple[Range, str]] = []
    for number, rows, begin_ns, end_ns in timings.tolist():
        if number in AROUND:
            operations.append((Range(AROUND[number], begin_ns, end_ns), ""))
            continue
        line = lines[number]
        name = line.name.removeprefix("attn.").removeprefix("mlp.")
        work = rows * line.multiply_adds
        operations.append((Range(name, begin_ns, end_ns, line.layer, line.read_bytes, work), line.part))
    found = []
    # No layer follows itself, and none of its parts does: between two steps the embedding stands.
    for layer, in_layer in groupby(operations, lambda one: one[0].layer):
        inside = list(in_layer)
        if layer is not None:
            found.append(_around(LAYER, [one for one, _ in inside]))
        for part, in_part in groupby(inside, lambda one: one[1]):
            members = [one for one, _ in in_part]
            found += [_around(part, members), *members] if part else members
    return found


def _around(name: str, members: Sequence[Range]) -> Range:
    return Range(name, members[0].begin_ns, members[-1].end_ns, members[0].layer)
