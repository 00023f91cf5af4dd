"""A plan between its launch and its answer: what comes back from the device, and what the host makes of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from headrace.backends.rows import Batch, IntArray, RequestTable
from headrace.backends.sampling import F32, GREEDY_BELOW, NOT_FINITE, RowSampling
from headrace.backends.torch import answers
from headrace.backends.torch.kernels import sampling as device_sampling
from headrace.core.errors import NonFiniteLogits, NoTokenAllowed
from headrace.core.types import RowError, RowOut, RowStep, StepPlan

NONE_ALLOWED = "no token is allowed here: every one is masked, or has no probability"


def draws_on_device(row: RowSampling, step: RowStep) -> bool:
    """Whether the device's sampler knows all that the row asks for in this step."""
    sampling = row.sampling
    edits = row.forbidden is not None or len(row.bias_ids) > 0 or bool(row.bad_sequences) or row.penalises
    early = step.start + step.length - row.num_prompt < sampling.min_tokens and len(row.stop_ids) > 0
    seedless = sampling.temperature >= GREEDY_BELOW and sampling.seed is None
    host = edits or early or seedless or sampling.typical_p < 1
    return not (host or step.drafts or step.mask is not None)


def device_error(code: int) -> RowError | None:
    """What the device's sampler says in place of a token; None: it is one."""
    if code == device_sampling.NOT_FINITE:
        return RowError(NonFiniteLogits.code, NOT_FINITE)
    if code == device_sampling.NO_TOKEN:
        return RowError(NoTokenAllowed.code, NONE_ALLOWED)
    return None


@dataclass(frozen=True, slots=True, eq=False)
class Wanted:
    """Where logits are wanted: first the places that the device's sampler looks at, a row each, then the others."""

    drawn: Sequence[int]
    """Which of the steps each of the first places belongs to."""
    places: IntArray
    """[P] in the flat arrays."""
    of_step: Sequence[IntArray]
    """For each step: which of the P are its own, in order."""

    @classmethod
    def of(cls, batch: Batch, steps: Sequence[RowStep], table: RequestTable) -> Wanted:
        drawn = [
            i for i, step in enumerate(steps) if step.sample and draws_on_device(table.row(step.row).sampling, step)
        ]
        stops = batch.logit_starts + batch.logit_counts
        first = stops[drawn] - 1
        order = np.concatenate((first, np.setdiff1d(np.arange(len(batch.logit_positions)), first)))
        rank = np.empty(len(order), np.int64)
        rank[order] = np.arange(len(order))
        own = [rank[start:stop] for start, stop in zip(batch.logit_starts, stops, strict=True)]
        return cls(drawn, batch.logit_positions[order], own)


class Event:
    """A place in the device's stream that the host can wait for."""

    def __init__(self, device: torch.device) -> None:
        self._event = torch.cuda.Event() if device.type == "cuda" else None
        if self._event is not None:
            self._event.record(torch.cuda.current_stream(device))

    def wait(self) -> None:
        if self._event is not None:
            self._event.synchronize()


@dataclass(slots=True, eq=False)
class Flight:
    plan: StepPlan
    failed: Mapping[int, RowError]
    """Row -> why it was not computed."""
    steps: Sequence[RowStep]
    """Those that were."""
    wanted: Wanted
    tokens: Tensor
    """[D] int32, pinned: what the device sampled."""
    logits: Tensor | None
    """(L, vocabulary) float32, pinned."""
    kept: Mapping[int, int]
    """Place among the P -> its row of `logits`."""
    expected: Mapping[int, int]
    """Which of the steps the device samples for -> the position of the token."""
    scores: Sequence[answers.Scores]
    """Of each step's prompt."""
    done: Event
    seconds: dict[str, float]
    outs: dict[int, RowOut] = field(default_factory=dict)
    """Which of the steps the host has sampled for -> its answer."""

    def logits_of(self, step: int) -> F32:
        """A step's logits, in the order of its tokens."""
        assert self.logits is not None
        values: F32 = self.logits.numpy()[[self.kept[int(place)] for place in self.wanted.of_step[step]]]
        return values
