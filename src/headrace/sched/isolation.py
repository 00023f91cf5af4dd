"""Isolation: whose row makes a step fail? Halves of the suspects are tried, one after the other, until one is alone.

A step that raises says nothing of its rows. Since a row's answer depends neither on its company nor on being computed
anew, all of them can be tried again, in halves, up to where they were; who fails alone, and again alone, is at fault.
One faulty row among n costs at most 2 ⌈log2 n⌉ + 2 trials.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from headrace.sched.sequence import Sequence


class Isolation:
    """Who may be computed while a fault is looked into: everyone else is parked, in the queue, meanwhile."""

    def __init__(self) -> None:
        self._groups: deque[list[Sequence]] = deque()
        self._trial: set[Sequence] = set()
        self._accused: set[Sequence] = set()
        """Who has failed alone once."""

    @property
    def active(self) -> bool:
        return bool(self._trial or self._groups)

    def allows(self, sequence: Sequence) -> bool:
        """Whether it may join."""
        return not self.active or sequence in self._trial

    def blame(self, rows: Iterable[Sequence]) -> Sequence | None:
        """A step of these unfinished rows has failed: returns the one at fault if it is known now, else plans trials.

        A row that fails alone is tried once more: a fault that does not come again is nobody's.
        """
        suspects = sorted(rows, key=lambda s: s.place)
        trial, self._trial = self._trial, set()
        if trial:
            # Who has passed its trial was not in the step; who found no room in it has its trial yet to come.
            suspects = [s for s in suspects if s in trial]
            self._wait(sorted(trial.difference(suspects), key=lambda s: s.place))
        if len(suspects) == 1:
            if suspects[0] in self._accused:
                return suspects[0]
            self._accused.add(suspects[0])
        half = len(suspects) // 2
        self._wait(suspects[:half])
        self._wait(suspects[half:])
        return None

    def _wait(self, group: list[Sequence]) -> None:
        if group:
            self._groups.append(group)

    def proceed(self) -> None:
        """Begins the next trial if the last one is over. Between steps only, with none in flight."""
        while not self._trial and self._groups:
            self._trial = {s for s in self._groups.popleft() if not s.ended}

    def computed(self, sequence: Sequence) -> None:
        """A step with it was committed: at the place of the fault it has passed."""
        if sequence.num_computed >= sequence.tried_until:
            self.ended(sequence)

    def ended(self, sequence: Sequence) -> None:
        self._trial.discard(sequence)
        self._accused.discard(sequence)

    def parked(self, running: list[Sequence]) -> list[Sequence]:
        """Rows that go back to the queue, so that the next step computes none but those on trial, and has room for
        them."""
        if not self._trial:
            return []
        return [s for s in reversed(running) if s not in self._trial]
