"""The two verdicts (docs/CONTRACTS.md §4): same arithmetic, same model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

Outputs = Sequence[Sequence[int]]
"""Token ids of every question's answer."""

LOSSLESS_MEAN_KL = 1e-6
"""Nats. KL is about half the variance of the difference in logits: fp32 sums taken in another order move logits by
1e-4 at most, far below this; a difference of 1e-3 gives 5e-7; rounding to 16 bits (1e-2 and more) is far above it."""


@dataclass(frozen=True, slots=True)
class Divergence:
    """Where an answer first leaves the reference. Indices count from 0."""

    question: int
    token: int
    """Index in the output; where one answer is the other's beginning, the length of the shorter."""
    round: int = 0
    margin: float | None = None
    """The reference's largest logit there minus its second largest; None where the reference has ended."""

    def __str__(self) -> str:
        margin = "" if self.margin is None else f", logit margin {self.margin:.2g}"
        return f"first divergence at token {self.token + 1} of question {self.question + 1}{margin}"


@dataclass(frozen=True, slots=True)
class SameModel:
    """One method's answers under the fp32 model, teacher-forced: position by position on the method's own tokens."""

    positions: int
    mean_kl: float | None
    """KL(fp32 ‖ method) in nats, mean over output positions; None: the method's logits are not known."""
    max_kl: float | None
    top1_agreement: float
    """Share of the emitted tokens that are fp32's likeliest (lowest id on a tie)."""
    divergence: Divergence | None
    """The first emitted token that fp32 would not have chosen."""

    @property
    def lossless(self) -> bool:
        """Where the logits are not known, every token being fp32's likeliest has to do."""
        close = self.mean_kl is None or self.mean_kl <= LOSSLESS_MEAN_KL
        return self.divergence is None and self.top1_agreement == 1 and close


def percent(share: float) -> str:
    """Never rounded up to 100 %."""
    return "100 %" if share == 1 else f"{math.floor(share * 1000) / 10:.1f} %"


def kl_figure(kl: float | None) -> str:
    """A divergence in nats for a reader."""
    return "unknown" if kl is None else f"{kl:.1e}"


def first_difference(reference: Sequence[int], other: Sequence[int]) -> int | None:
    """First index where two answers differ, an ending included; None if they are equal."""
    for index, (expected, found) in enumerate(zip(reference, other, strict=False)):
        if expected != found:
            return index
    return None if len(reference) == len(other) else min(len(reference), len(other))


def same_arithmetic(
    reference: Outputs, rounds: Sequence[Outputs], margins: Sequence[Sequence[float]]
) -> Divergence | None:
    """None if every round's token ids are the reference's; else the earliest difference of the first round with one.

    `margins`: for every token of `reference`, the difference of its two largest logits there.
    """
    for number, outputs in enumerate(rounds):
        found = [
            (token, question)
            for question, (expected, output) in enumerate(zip(reference, outputs, strict=True))
            if (token := first_difference(expected, output)) is not None
        ]
        if found:
            token, question = min(found)
            margin = margins[question][token] if token < len(margins[question]) else None
            return Divergence(question, token, number, margin)
    return None


@dataclass(frozen=True, slots=True)
class Scored:
    """One answer, teacher-forced; a value for every output token."""

    margins: tuple[float, ...]
    """Of the method's own arithmetic: largest logit - second largest."""
    kl: tuple[float, ...] | None
    """KL(fp32 ‖ method), nats; None: the method's logits are not known."""
    argmax: tuple[int, ...]
    """fp32's likeliest token, lowest id on a tie."""
    fp32_margins: tuple[float, ...]

    def without_kl(self) -> Scored:
        """The same, of a method whose logits are not known."""
        return replace(self, kl=None)


def same_model(outputs: Outputs, scored: Sequence[Scored]) -> SameModel:
    """Verdict on one method's answers; `scored[q]` is of `outputs[q]`."""
    kl = [value for one in scored for value in one.kl or ()]
    agreed = 0
    found: list[tuple[int, int]] = []
    for question, (output, one) in enumerate(zip(outputs, scored, strict=True)):
        agreed += sum(token == best for token, best in zip(output, one.argmax, strict=True))
        if (token := first_difference(one.argmax, output)) is not None:
            found.append((token, question))
    divergence = None
    if found:
        token, question = min(found)
        divergence = Divergence(question, token, margin=scored[question].fp32_margins[token])
    positions = sum(map(len, outputs))
    known = len(kl) == positions
    mean_kl, max_kl = (math.fsum(kl) / positions, max(kl)) if known else (None, None)
    return SameModel(positions, mean_kl, max_kl, agreed / positions, divergence)
