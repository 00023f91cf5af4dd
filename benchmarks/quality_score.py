"""How far a format's logits are from fp32's: KL divergence, top-1 agreement and perplexity, in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Logits = NDArray[np.float32]
F64 = NDArray[np.float64]


class Truth:
    """fp32's answer at some positions, made ready to hold formats against."""

    def __init__(self, logits: Logits) -> None:
        """logits (positions, vocabulary)"""
        self.best = logits.argmax(axis=1)
        self._p = np.empty(logits.shape, np.float64)
        self._sum_p_log_p = np.empty(len(logits), np.float64)
        for at, row in enumerate(logits):  # one by one, since a row stays in the processor's cache
            log_p = row.astype(np.float64)
            log_p -= log_sum_exp(log_p)
            np.exp(log_p, out=self._p[at])
            self._sum_p_log_p[at] = self._p[at] @ log_p

    def kl(self, at: int, logits: F64, log_z: float) -> float:
        """KL(fp32 ‖ format) = Σ p (log p - log q) in nats at position `at`; logits (vocabulary,) and their log Σ exp.

        Never negative: what rounding leaves below zero is zero.
        """
        return max(0.0, float(self._sum_p_log_p[at] - self._p[at] @ logits) + log_z)


def log_sum_exp(logits: F64) -> float:
    """log Σ exp of (vocabulary,)"""
    top = float(logits.max())
    return top + math.log(float(np.exp(logits - top).sum()))


@dataclass(slots=True)
class Distance:
    """From one reference: a value for every position."""

    kl: list[float] = field(default_factory=list)
    agreed: list[bool] = field(default_factory=list)


@dataclass(slots=True)
class Tally:
    """One format's figures, growing chunk by chunk; windows have equally many positions."""

    distances: dict[str, Distance] = field(default_factory=dict)
    """By the reference's name."""
    losses: list[float] = field(default_factory=list)
    """-log q(next token), nats."""

    def add(self, logits: Logits, targets: Sequence[int], truths: dict[str, Truth]) -> None:
        """logits (positions, vocabulary); targets: the token that follows each position."""
        best = logits.argmax(axis=1)
        for name, truth in truths.items():
            found = self.distances.setdefault(name, Distance())
            found.agreed += (best == truth.best).tolist()
        for at, (row, target) in enumerate(zip(logits, targets, strict=True)):
            wide = row.astype(np.float64)
            log_z = log_sum_exp(wide)
            self.losses.append(log_z - float(wide[target]))
            for name, truth in truths.items():
                self.distances[name].kl.append(truth.kl(at, wide, log_z))

    @property
    def perplexity(self) -> float:
        return math.exp(math.fsum(self.losses) / len(self.losses))

    def summary(self, reference: str, windows: int) -> Summary:
        found = self.distances[reference]
        return summarise(np.array(found.kl), np.array(found.agreed), windows)


@dataclass(frozen=True, slots=True)
class Summary:
    """KL in nats a token."""

    positions: int
    mean_kl: float
    standard_error: float | None
    """Of the mean, from the means of the windows; None for one window."""
    median_kl: float
    p99_kl: float
    max_kl: float
    top1_agreement: float
    """Share of positions where both have the same likeliest token (lowest id on a tie)."""


def summarise(kl: F64, agreed: NDArray[np.bool_], windows: int) -> Summary:
    """kl and agreed (positions,), in the order of `windows` windows of one length."""
    means = kl.reshape(windows, -1).mean(axis=1)
    error = float(means.std(ddof=1)) / math.sqrt(windows) if windows > 1 else None
    median, p99 = (float(value) for value in np.quantile(kl, (0.5, 0.99)))
    return Summary(len(kl), float(kl.mean()), error, median, p99, float(kl.max()), float(agreed.mean()))
