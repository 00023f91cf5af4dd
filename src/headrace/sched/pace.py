"""Pace: how many tokens a step may compute so that it does not take longer than wanted.

A step is the grain of everything else: tokens of running answers come out after it, and who has gone gives its blocks
back after it. Its time is about a + b × tokens, with a (reading the weights) and b (arithmetic) of the machine, both
≥ 0. So of a step that took less than the wanted time T, tokens × T ÷ seconds is a number that takes T at most.
"""

from __future__ import annotations

FIRST_SHARE = 8
"""The first step may have one part in this many of the largest step: nothing is known of the machine then."""


class Pace:
    """`step_seconds`: the wanted time of a step; `most`: tokens of the largest step; `chunk`: tokens that a step may
    have beside one for each row, however slow the machine is, so that prompts get on."""

    def __init__(self, step_seconds: float, most: int, chunk: int) -> None:
        if step_seconds <= 0:
            raise ValueError(f"step_seconds {step_seconds} must be > 0")
        self._step_seconds = step_seconds
        self._most = most
        self._chunk = chunk
        self._tokens = max(1.0, most / FIRST_SHARE)

    def budget(self, num_rows: int) -> int:
        """Tokens of the next step, in which `num_rows` rows want some."""
        return min(self._most, max(int(self._tokens), num_rows + self._chunk))

    def measured(self, num_tokens: int, seconds: float) -> None:
        """A step of `num_tokens` took `seconds`.

        A short step may say less than is known already and lowers nothing; a slow one always counts, so that a
        pause of the machine costs the few steps that it takes to grow again.
        """
        if num_tokens < 1 or seconds <= 0:
            return
        fits = num_tokens * self._step_seconds / seconds
        if seconds > self._step_seconds or fits > self._tokens:
            self._tokens = min(fits, float(self._most))
