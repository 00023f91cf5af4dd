"""RequestTable: a fixed row a live request, and one step's arrays gathered from it (docs/CONTRACTS.md §1).

A plan names spans and never repeats tokens: a row's ids come with its `Admit`, and what the backend samples is appended
here. Everything is preallocated; `batch` gathers and copies nothing that is not in the step.
A plan that breaks the protocol is a bug of the control plane: EngineError.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from headrace.backends.sampling import RowSampling
from headrace.core.errors import EngineError
from headrace.core.spec import VisionSpec
from headrace.core.types import Admit, ImageSpan, RowStep, StepPlan

IntArray = NDArray[np.int64]

PENDING = -1
"""In place of a token id that a step in flight is sampling."""


@dataclass(frozen=True, slots=True, eq=False)
class ImagePart:
    """Rows of an image that a step's tokens are."""

    image: ImageSpan
    places: IntArray
    """Of its placeholders, in the flat arrays."""
    first: int
    """Which of the image's rows the first of them is; the others follow."""


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """One step's arrays. T: tokens, R: spans (in the plan's order), P: positions whose logits are wanted.

    A block table's unused entries hold `num_blocks`, a block that no row owns and that is always zero.
    """

    token_ids: IntArray
    """[T]"""
    positions: IntArray
    """[T] position of each token in its sequence."""
    slots: IntArray
    """[T] where each token's K and V go: block × block_size + offset."""
    starts: IntArray
    """[R] a span's first place in the flat arrays."""
    lengths: IntArray
    """[R] tokens in a span, drafts included."""
    contexts: IntArray
    """[R] tokens a span's last token sees, itself included."""
    block_tables: IntArray
    """[R, most blocks of a row]"""
    logit_positions: IntArray
    """[P] places in the flat arrays."""
    logit_starts: IntArray
    """[R] a span's first place in the P logits; it has `lengths` of them, or one, or none."""
    logit_counts: IntArray
    """[R]"""
    adapters: tuple[str, ...]
    """[R] names; empty: none"""
    images: tuple[ImagePart, ...] = ()
    unfinished_images: frozenset[str] = frozenset()
    """Hashes of those that a live row has come to and will not be through with after this step."""


@dataclass(frozen=True, slots=True, eq=False)
class RowImage:
    image: ImageSpan
    positions: IntArray
    """Of its placeholders in the row's tokens; one at least."""


@dataclass(slots=True)
class Row:
    """What is known of a live request beside its tokens and blocks."""

    sampling: RowSampling
    adapter: str
    num_tokens: int
    num_blocks: int = 0
    images: tuple[RowImage, ...] = ()
    num_computed: int = 0
    """Tokens from the first on that are computed, or will be once the plans that came are."""


class RequestTable:
    """Rows 0 … max_rows - 1: token ids and block tables of the live requests."""

    def __init__(
        self,
        max_rows: int,
        max_model_len: int,
        block_size: int,
        num_blocks: int,
        vocab_size: int,
        vision: VisionSpec | None = None,
    ) -> None:
        """`vision`: None where no row has images."""
        self.vocab_size = vocab_size
        self._vision = vision
        self.block_size = block_size
        self.num_blocks = num_blocks
        self._tokens = np.zeros((max_rows, max_model_len), np.int64)
        self._blocks = np.full((max_rows, -(-max_model_len // block_size)), num_blocks, np.int64)
        self._rows: list[Row | None] = [None] * max_rows

    def apply(self, plan: StepPlan) -> None:
        """Forgets released rows, then takes in the admitted, then what the plan's rows get and compute."""
        for row in plan.release:
            self._release(row)
        for admit in plan.admit:
            self._admit(admit)
        for step in plan.rows:
            self._take_step(step)

    def row(self, index: int) -> Row:
        """The live request in a row."""
        found = self._rows[index] if 0 <= index < len(self._rows) else None
        if found is None:
            raise EngineError(f"the plan names row {index}, where no request is")
        return found

    def token_ids(self, index: int, stop: int) -> IntArray:
        """The first `stop` tokens of a row: a view, which later steps do not change."""
        return self._tokens[index, :stop]

    def fresh_blocks(self, plan: StepPlan) -> IntArray:
        """New blocks that do not lie wholly before their row's `start`: whatever a former owner left is in them."""
        fresh: list[int] = []
        for step in plan.rows:
            if step.new_blocks:
                first = self.row(step.row).num_blocks - len(step.new_blocks)
                filled = max(0, step.start // self.block_size - first)
                fresh.extend(step.new_blocks[filled:])
        return np.asarray(fresh, np.int64)

    def slots(self, index: int, start: int, stop: int) -> IntArray:
        """Where tokens [start, stop) of a row lie in the KV pool."""
        positions = np.arange(start, stop)
        blocks: IntArray = self._blocks[index, positions // self.block_size]
        return blocks * self.block_size + positions % self.block_size

    def batch(self, steps: Sequence[RowStep]) -> Batch:
        """The arrays of these rows' spans. Call after `apply`."""
        lengths = np.array([step.length + len(step.drafts) for step in steps], np.int64)
        first = np.array([step.start for step in steps], np.int64)
        index = np.array([step.row for step in steps], np.int64)
        starts = np.cumsum(lengths) - lengths
        span = np.repeat(np.arange(len(steps)), lengths)
        offsets = np.arange(len(span)) - starts[span]
        positions = first[span] + offsets
        token_ids = self._tokens[index[span], positions]
        blocks = self._blocks[index[span], positions // self.block_size]
        for i, step in enumerate(steps):
            self._check(step)
            if step.drafts:
                stop = int(starts[i] + lengths[i])
                token_ids[stop - len(step.drafts) : stop] = step.drafts
        most = max(self.row(step.row).num_blocks for step in steps)
        wanted = [_logit_count(step) for step in steps]
        stops = starts + lengths
        counts = np.array(wanted, np.int64)
        places = [np.arange(stop - count, stop) for stop, count in zip(stops, wanted, strict=True) if count]
        return Batch(
            token_ids=token_ids,
            positions=positions,
            slots=blocks * self.block_size + positions % self.block_size,
            starts=starts,
            lengths=lengths,
            contexts=first + lengths,
            block_tables=self._blocks[index, :most],
            logit_positions=np.concatenate(places) if places else np.empty(0, np.int64),
            logit_starts=np.cumsum(counts) - counts,
            logit_counts=counts,
            adapters=tuple(self.row(step.row).adapter for step in steps),
            images=tuple(self._image_parts(steps, starts)),
            unfinished_images=self.unfinished_images(),
        )

    def unfinished_images(self) -> frozenset[str]:
        """Hashes of the images that a live row has come to and is not through with."""
        return frozenset(
            one.image.hash
            for row in self._rows
            if row is not None
            for one in row.images
            if one.positions[0] < row.num_computed <= one.positions[-1]
        )

    def _image_parts(self, steps: Sequence[RowStep], starts: IntArray) -> Iterator[ImagePart]:
        for step, place in zip(steps, starts, strict=True):
            for one in self.row(step.row).images:
                first, stop = np.searchsorted(one.positions, (step.start, step.start + step.length))
                if first < stop:
                    yield ImagePart(one.image, one.positions[first:stop] - step.start + place, int(first))

    def append(self, index: int, tokens: Sequence[int]) -> None:
        """Adds what was sampled. Ids past the longest sequence are dropped: no plan can ever compute them."""
        row = self.row(index)
        kept = tokens[: self._tokens.shape[1] - row.num_tokens]
        self._tokens[index, row.num_tokens : row.num_tokens + len(kept)] = kept
        row.num_tokens += len(kept)

    def expect(self, index: int) -> int:
        """One more token, which a step in flight samples: its id is PENDING until `settle`. -> its position."""
        position = self.row(index).num_tokens
        self.append(index, (PENDING,))
        return position

    def settle(self, index: int, position: int, token: int) -> None:
        """Says what a token that was expected is."""
        if position < self._tokens.shape[1]:
            self._tokens[index, position] = token

    def _release(self, index: int) -> None:
        self.row(index)
        self._rows[index] = None
        self._blocks[index] = self.num_blocks

    def _admit(self, admit: Admit) -> None:
        count = len(admit.token_ids)
        if not 0 <= admit.row < len(self._rows) or self._rows[admit.row] is not None:
            raise EngineError(f"row {admit.row} is not free")
        if not 0 < count <= self._tokens.shape[1] or not 0 < admit.num_prompt <= count:
            raise EngineError(f"row {admit.row} is admitted with {admit.num_prompt} prompt tokens of {count}")
        self._tokens[admit.row, :count] = admit.token_ids
        sampling = RowSampling(admit.sampling, admit.num_prompt, admit.stop_ids, self.vocab_size)
        images = tuple(self._located(admit, image) for image in admit.images)
        self._rows[admit.row] = Row(sampling, admit.adapter, count, images=images)

    def _located(self, admit: Admit, image: ImageSpan) -> RowImage:
        if self._vision is None:
            raise EngineError(f"row {admit.row} is admitted with an image, and the model reads none")
        stop = image.start + image.length
        if not 0 <= image.start <= stop <= admit.num_prompt:
            raise EngineError(f"row {admit.row} has an image from {image.start} to {stop}, not within its prompt")
        inside = self._tokens[admit.row, image.start : stop] == self._vision.image_token_id
        positions = np.flatnonzero(inside) + image.start
        wanted = image.tiles * self._vision.projector.tokens
        if len(positions) != wanted or not wanted:
            raise EngineError(f"row {admit.row} has {len(positions)} placeholders for an image of {wanted} rows")
        return RowImage(image, positions)

    def _take_step(self, step: RowStep) -> None:
        row = self.row(step.row)
        count = len(step.new_blocks)
        if row.num_blocks + count > self._blocks.shape[1]:
            raise EngineError(f"row {step.row} gets more blocks than the longest sequence needs")
        if any(not 0 <= block < self.num_blocks for block in step.new_blocks):
            raise EngineError(f"row {step.row} gets a block outside 0 … {self.num_blocks - 1}")
        self._blocks[step.row, row.num_blocks : row.num_blocks + count] = step.new_blocks
        row.num_blocks += count
        row.num_computed = step.start + step.length

    def _check(self, step: RowStep) -> None:
        row = self.row(step.row)
        stop = step.start + step.length
        if step.start < 0 or step.length < 1 or stop > row.num_tokens:
            raise EngineError(f"row {step.row} has {row.num_tokens} tokens, the plan wants {step.start} to {stop}")
        if (step.sample or step.drafts) and stop != row.num_tokens:
            raise EngineError(f"row {step.row} cannot sample after token {stop} of {row.num_tokens}")
        if step.drafts and not step.sample:
            raise EngineError(f"row {step.row} has drafts but does not sample")
        if stop + len(step.drafts) > row.num_blocks * self.block_size:
            raise EngineError(f"row {step.row} has {row.num_blocks} blocks for {stop + len(step.drafts)} tokens")


def _logit_count(step: RowStep) -> int:
    if step.logits:
        return step.length + len(step.drafts)
    return 1 + len(step.drafts) if step.sample else 0
