"""Flover's memory shuffle as an exact simulator, and the row compaction of a paged engine beside it.

A slot holds one request's whole KV and every activation row; a step computes the slots from the lowest live one to the
highest. The shuffle (arXiv 2305.13484, and the released code) keeps the live ones together: of all windows as wide as
there are live slots it takes the first with most of them inside, and moves each one outside to the next hole inside.
A paged engine moves no KV: only the batch's rows stay dense, by the last row into the hole.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Shuffle:
    """What one shuffle does."""

    moves: tuple[tuple[int, int], ...]
    """(from, to), in the order in which they are made."""
    base: int
    """The first slot of the window, which is computed from now on."""


def shuffle(live: Sequence[bool]) -> Shuffle:
    """Of these slots; none is live: nothing to do, base 0."""
    width = sum(live)
    inside = most = sum(live[:width])
    base = 0
    for start in range(1, len(live) - width + 1):
        inside += live[start + width - 1] - live[start - 1]
        if inside > most:
            base, most = start, inside
    window = range(base, base + width)
    holes = [slot for slot in window if not live[slot]]
    outside = [slot for slot, used in enumerate(live) if used and slot not in window]
    return Shuffle(tuple(zip(outside, holes, strict=True)), base)


def fewest_moves(live: Sequence[bool]) -> int:
    """n_live - most live slots in a window that wide: no way to make them contiguous has fewer moves, since each
    window's holes have to be filled from outside."""
    width = sum(live)
    starts = range(len(live) - width + 1)
    return width - max((sum(live[start : start + width]) for start in starts), default=0)


def compact(live: Sequence[bool]) -> tuple[tuple[int, int], ...]:
    """Moves (from, to) of rows 0 … that make the live ones dense from row 0: the last live row into the first hole."""
    count = sum(live)
    holes = [row for row in range(count) if not live[row]]
    last = [row for row in range(len(live) - 1, count - 1, -1) if live[row]]
    return tuple(zip(last, holes, strict=True))


def span(live: Sequence[bool]) -> int:
    """Rows computed without a shuffle: from the lowest live slot to the highest, holes included."""
    used = [slot for slot, one in enumerate(live) if one]
    return used[-1] - used[0] + 1 if used else 0


@dataclass(frozen=True, slots=True)
class SlotRun:
    """A whole workload in slots, or in paged rows."""

    live: tuple[int, ...]
    """Requests in flight in each busy iteration."""
    computed: tuple[int, ...]
    """Rows computed in it."""
    moves: int
    least_moves: int
    """The fewest that leave the live ones together each time, wherever they come to lie."""
    moved_tokens: int
    """Generated tokens whose KV they copied (the released code copies a whole slot, however full it is)."""

    @property
    def waste(self) -> int:
        """Rows computed for no request, over the whole run."""
        return sum(self.computed) - sum(self.live)

    @property
    def waste_share(self) -> float:
        """Of all rows computed."""
        return self.waste / sum(self.computed)


def run_slots(arrivals: Sequence[int], lengths: Sequence[int], slots: int, shuffled: bool) -> SlotRun:
    """Requests through `slots` slots, in iterations. A request that finds every slot taken waits.

    Without the shuffle, request k goes to slot k as in the released code, and round from the first slot where there
    are more requests than slots. With it, to the slot above the highest live one, or else to the one below the lowest.
    """
    return _run(arrivals, lengths, slots, _Shuffled() if shuffled else _Fixed())


def run_rows(arrivals: Sequence[int], lengths: Sequence[int], rows: int) -> SlotRun:
    """The same requests in a paged engine's batch rows: a newcomer takes the row after the last, and no KV moves."""
    return _run(arrivals, lengths, rows, _Paged())


def ends_in_the_middle(joined: Sequence[int], lengths: Sequence[int]) -> bool:
    """Whether a request's slot lies, after its end, between two that are live at once: with slots in order of arrival
    that never move, and as many slots as requests, that is when rows are wasted."""
    ends = [at + length for at, length in zip(joined, lengths, strict=True)]
    count = len(ends)
    return any(
        max(joined[high], ends[middle]) < min(ends[low], ends[high])
        for middle in range(1, count - 1)
        for low in range(middle)
        for high in range(middle + 1, count)
    )


class _Fixed:
    """Slots that stay where they are."""

    copies_kv = False

    def __init__(self) -> None:
        self._next = 0

    def place(self, live: Sequence[bool]) -> int:
        slot = next(at % len(live) for at in range(self._next, self._next + len(live)) if not live[at % len(live)])
        self._next = slot + 1
        return slot

    def tidy(self, live: Sequence[bool]) -> Iterable[tuple[int, int]]:
        return ()


class _Shuffled:
    """Slots that are contiguous after every step."""

    copies_kv = True

    def place(self, live: Sequence[bool]) -> int:
        used = [slot for slot, one in enumerate(live) if one]
        if not used:
            return 0
        return used[-1] + 1 if used[-1] + 1 < len(live) else used[0] - 1

    def tidy(self, live: Sequence[bool]) -> Iterable[tuple[int, int]]:
        return shuffle(live).moves


class _Paged:
    """Rows that are dense from 0."""

    copies_kv = False

    def place(self, live: Sequence[bool]) -> int:
        return sum(live)

    def tidy(self, live: Sequence[bool]) -> Iterable[tuple[int, int]]:
        return compact(live)


def _run(arrivals: Sequence[int], lengths: Sequence[int], slots: int, way: _Fixed | _Shuffled | _Paged) -> SlotRun:
    waiting = deque(sorted(zip(arrivals, range(len(arrivals)), strict=True)))
    owner: list[int | None] = [None] * slots
    left = list(lengths)
    live_rows: list[int] = []
    computed: list[int] = []
    moves = least_moves = moved_tokens = now = 0
    while waiting or any(one is not None for one in owner):
        if all(one is None for one in owner):
            now = max(now, waiting[0][0])
        while waiting and waiting[0][0] <= now and None in owner:
            owner[way.place([one is not None for one in owner])] = waiting.popleft()[1]
        live = [one is not None for one in owner]
        live_rows.append(sum(live))
        computed.append(span(live))
        for slot, request in enumerate(owner):
            if request is not None:
                left[request] -= 1
                if left[request] == 0:
                    owner[slot] = None
        after = [one is not None for one in owner]
        least_moves += fewest_moves(after)
        for source, target in way.tidy(after):
            moved = owner[source]
            assert moved is not None
            owner[source], owner[target] = None, moved
            moves += 1
            moved_tokens += (lengths[moved] - left[moved]) if way.copies_kv else 0
        now += 1
    return SlotRun(tuple(live_rows), tuple(computed), moves, least_moves, moved_tokens)
