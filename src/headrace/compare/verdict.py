"""The two verdicts (docs/CONTRACTS.md §4): same arithmetic, of a method and of each of its answers, and same model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

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


class Verdict(StrEnum):
    """Of an answer against the reference's, and of a method: its worst answer's. The worst is last."""

    IDENTICAL = "identical"
    NEAR_TIE = "near-tie"
    DIFFERENT = "different"


RANKS = tuple(Verdict)


@dataclass(frozen=True, slots=True)
class Epsilon:
    """Below which margin between the two largest logits the order of summation may decide which of them is larger."""

    value: float
    """2 × the largest |Δ logit| between two orders of summation of the base's own arithmetic; 0: not measured, or the
    orders gave the same bits: then no difference is a near-tie."""
    positions: int
    """At how many positions it was measured, over the whole vocabulary; 0: not measured."""
    source: str
    """Which two orders; where it was not measured, why not."""

    def __str__(self) -> str:
        if not self.positions:
            return f"ε not measured ({self.source})"
        return f"ε = {self.value:.2g} logits (2 × the largest |Δ logit| of {self.source}, {self.positions} positions)"


@dataclass(frozen=True, slots=True)
class RequestVerdict:
    """One answer against the reference's answer to the same request. Indices count from 0."""

    question: int
    token: int | None = None
    """Where the answer first leaves the reference, an ending included; None: identical."""
    margin: float | None = None
    """The reference's largest logit there minus its second largest; None: identical, or the reference has ended."""
    epsilon: float = 0.0
    """A margin below it is a near-tie."""
    round: int = 0
    """Whose answer it is."""

    @property
    def kind(self) -> Verdict:
        if self.token is None:
            return Verdict.IDENTICAL
        near = self.margin is not None and self.margin < self.epsilon
        return Verdict.NEAR_TIE if near else Verdict.DIFFERENT

    def __str__(self) -> str:
        if self.token is None:
            return str(Verdict.IDENTICAL)
        if self.margin is None:
            why = "the reference has ended"
        elif not self.epsilon:
            why = f"margin {self.margin:.2g}, ε 0"
        else:
            why = f"margin {self.margin:.2g} {'<' if self.kind is Verdict.NEAR_TIE else '≥'} ε {self.epsilon:.2g}"
        return f"{self.kind} at token {self.token + 1} ({why})"


@dataclass(frozen=True, slots=True)
class MethodVerdict:
    """The worst verdict of a method's answers, with the counts of all."""

    kind: Verdict
    identical: int
    near_ties: int
    different: int
    worst: RequestVerdict
    """The earliest divergence of the worst kind; of a method without one, its first answer."""

    @property
    def answers(self) -> int:
        return self.identical + self.near_ties + self.different

    def __str__(self) -> str:
        if self.kind is Verdict.IDENTICAL:
            return f"identical: {self.identical} of {self.answers} answers"
        counts = [(self.different, "different"), (self.near_ties, "near-tie"), (self.identical, "identical")]
        told = ", ".join(f"{count} {name}" for count, name in counts if count)
        return f"{self.kind}: of {self.answers} answers {told}; question {self.worst.question + 1}: {self.worst}"


def divergences(
    reference: Outputs, outputs: Outputs, margins: Sequence[Sequence[float]], epsilon: float = 0.0
) -> tuple[RequestVerdict, ...]:
    """The verdict on each answer.

    `margins`: for every token of `reference`, the difference of its two largest logits there. `epsilon`: logits; what
    counts as a tie (`Epsilon.value`). A near-tie says why a difference may have come about; a method that promises the
    reference's own bits has broken its promise all the same. Raises ValueError where the three differ in length.
    """
    return tuple(
        _verdict(question, expected, output, known, epsilon)
        for question, (expected, output, known) in enumerate(zip(reference, outputs, margins, strict=True))
    )


def _verdict(
    question: int, expected: Sequence[int], output: Sequence[int], margins: Sequence[float], epsilon: float
) -> RequestVerdict:
    token = first_difference(expected, output)
    if token is None:
        return RequestVerdict(question, epsilon=epsilon)
    return RequestVerdict(question, token, margins[token] if token < len(margins) else None, epsilon)


def worst_of_rounds(rounds: Sequence[Sequence[RequestVerdict]]) -> tuple[RequestVerdict, ...]:
    """For each request the worst verdict of its rounds, with the number of that round (at least one round, all of the
    same requests)."""
    numbered = [[replace(one, round=number) for one in found] for number, found in enumerate(rounds)]
    return tuple(min(found, key=_badness) for found in zip(*numbered, strict=True))


def method_verdict(verdicts: Sequence[RequestVerdict]) -> MethodVerdict:
    """What is to be said of a method with these answers (at least one)."""
    worst = min(verdicts, key=_badness)
    kinds = [one.kind for one in verdicts]
    identical, near_ties, different = (kinds.count(kind) for kind in RANKS)
    return MethodVerdict(worst.kind, identical, near_ties, different, worst)


def _badness(verdict: RequestVerdict) -> tuple[int, int]:
    """The smaller the worse; of two of a kind, what diverges earlier."""
    return -RANKS.index(verdict.kind), 0 if verdict.token is None else verdict.token


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
