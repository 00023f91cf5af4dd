"""Flover's memory shuffle: golden moves, fewest moves, and what is computed with and without it."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.compare.flover.shuffle import (
    compact,
    ends_in_the_middle,
    fewest_moves,
    run_rows,
    run_slots,
    shuffle,
    span,
)

GOLDEN = (
    ("11011011", ((6, 2), (7, 5)), 0),
    ("01101110", ((6, 3),), 1),
    ("10001110", ((0, 3),), 3),
    ("10101010", ((4, 1), (6, 3)), 0),
    ("00111001", ((7, 1),), 1),
    ("11100010", ((6, 3),), 0),
)


def slots(text: str) -> list[bool]:
    return [one == "1" for one in text]


def moved(live: list[bool], moves: tuple[tuple[int, int], ...]) -> list[bool]:
    """What is live after the moves, each from a live slot into a hole."""
    after = list(live)
    for source, target in moves:
        assert after[source] and not after[target]
        after[source], after[target] = False, True
    return after


@pytest.mark.parametrize(("text", "moves", "base"), GOLDEN)
def test_golden(text: str, moves: tuple[tuple[int, int], ...], base: int) -> None:
    found = shuffle(slots(text))
    assert (found.moves, found.base) == (moves, base)


@pytest.mark.parametrize("text", ["", "0", "1", "0000", "1111", "0110"])
def test_nothing_to_move(text: str) -> None:
    found = shuffle(slots(text))
    assert found.moves == () and found.base == max(0, text.find("1"))


@given(st.lists(st.booleans(), max_size=64))
def test_a_shuffle_leaves_the_live_together_with_as_few_moves_as_the_formula_says(live: list[bool]) -> None:
    found = shuffle(live)
    after = moved(live, found.moves)
    width = sum(live)
    assert after[found.base : found.base + width] == [True] * width and span(after) == width
    best = [sum(live[start : start + width]) for start in range(len(live) - width + 1)]
    assert len(found.moves) == width - max(best, default=0) == fewest_moves(live)
    assert found.base == best.index(max(best)), "the first of the best windows"


def test_no_other_way_needs_fewer_moves() -> None:
    """Every slot map of up to ten slots, against a search through all moves."""
    for size in range(11):
        distances = fewest_by_search(size)
        for live in product((False, True), repeat=size):
            assert len(shuffle(live).moves) == distances[live]


def fewest_by_search(size: int) -> dict[tuple[bool, ...], int]:
    """Slot map -> moves of one live slot into one hole to a map without a hole inside, breadth first from those."""
    found = {live: 0 for live in product((False, True), repeat=size) if span(live) == sum(live)}
    front = list(found)
    while front:
        reached = []
        for live in front:
            for source, target in product(range(size), repeat=2):
                if live[source] and not live[target]:
                    before = list(live)
                    before[source], before[target] = False, True
                    if tuple(before) not in found:
                        found[tuple(before)] = found[live] + 1
                        reached.append(tuple(before))
        front = reached
    return found


@given(st.lists(st.booleans(), max_size=64))
def test_compaction_fills_holes_from_the_end(live: list[bool]) -> None:
    moves = compact(live)
    assert moved(live, moves) == sorted(live, reverse=True)
    assert len(moves) == live[: sum(live)].count(False) >= fewest_moves(live)


TRACES = st.lists(st.tuples(st.integers(0, 20), st.integers(1, 15)), min_size=1, max_size=12)


@given(TRACES)
def test_rows_computed_are_the_live_ones_with_the_shuffle_and_in_pages(trace: list[tuple[int, int]]) -> None:
    arrivals, lengths = sorted(at for at, _ in trace), [length for _, length in trace]
    tidy = run_slots(arrivals, lengths, len(trace), True)
    loose = run_slots(arrivals, lengths, len(trace), False)
    rows = run_rows(arrivals, lengths, len(trace))
    assert tidy.live == loose.live == rows.live and sum(tidy.live) == sum(lengths)
    assert tidy.computed == tidy.live and tidy.waste == 0 == tidy.waste_share
    assert rows.computed == rows.live and rows.moved_tokens == 0
    assert tidy.moves == tidy.least_moves and rows.moves >= rows.least_moves
    assert loose.moves == 0 and all(a >= b for a, b in zip(loose.computed, loose.live, strict=True))
    assert (loose.waste > 0) == ends_in_the_middle(arrivals, lengths)


@given(TRACES, st.integers(1, 4))
def test_requests_wait_for_a_slot(trace: list[tuple[int, int]], count: int) -> None:
    arrivals, lengths = sorted(at for at, _ in trace), [length for _, length in trace]
    for found in (run_slots(arrivals, lengths, count, shuffled) for shuffled in (True, False)):
        assert max(found.live) <= count and sum(found.live) == sum(lengths)
        assert max(found.computed) <= count


def test_a_middle_request_that_ends_first_wastes_a_row_until_an_edge_reaches_it() -> None:
    """Three at once; the middle one ends after 1, the last after 3, the first after 4."""
    loose = run_slots((0, 0, 0), (4, 1, 3), 3, False)
    assert loose.live == (3, 2, 2, 1) and loose.computed == (3, 3, 3, 1) and loose.waste == 2
    tidy = run_slots((0, 0, 0), (4, 1, 3), 3, True)
    assert (tidy.moves, tidy.moved_tokens, tidy.computed) == (1, 1, (3, 2, 2, 1))
    rows = run_rows((0, 0, 0), (4, 1, 3), 3)
    assert (rows.moves, rows.moved_tokens, rows.waste) == (1, 0, 0)


def test_a_newcomer_lies_beside_the_live_ones() -> None:
    """Shuffled slots at the upper end of the buffer: the next request goes below them, and nothing is wasted."""
    found = run_slots((0, 0, 0, 2), (1, 5, 5, 3), 3, True)
    assert found.live == (3, 2, 3, 3, 3) and found.computed == found.live and found.moves == 0
