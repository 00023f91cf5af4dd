"""What a GPU backend holds between load() and close(): launches steps, and answers for them.

Nothing here waits for the device, but `answer`, and `settle` where the host samples a row: its token must be on the
device before the next step is launched.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from headrace.backends.base import BackendOptions
from headrace.backends.rows import Batch, IntArray, RequestTable
from headrace.backends.sampling import F32, code_and_message, sample, score
from headrace.backends.torch import answers
from headrace.backends.torch.adapters import RowAdapters
from headrace.backends.torch.gpu.attention import AttentionPlan
from headrace.backends.torch.gpu.decoder import GpuDecoder
from headrace.backends.torch.gpu.flight import Event, Flight, Wanted, device_error
from headrace.backends.torch.gpu.graphs import Graphs, buckets, replay_seconds
from headrace.backends.torch.gpu.layers import Step
from headrace.backends.torch.gpu.staging import Layout, Staging, StepArrays
from headrace.backends.torch.gpu.store import copy_blocks, make_caches
from headrace.backends.torch.kernels import sampling as device_sampling
from headrace.backends.torch.kernels.attention import Spans, Splits, span_tiles
from headrace.backends.torch.kernels.embed import put_blocks
from headrace.backends.torch.kernels.matmul import Card
from headrace.core.errors import EngineError, NonFiniteLogits, shorten
from headrace.core.spec import ModelSpec
from headrace.core.types import RowError, RowOut, RowStep, StepPlan, TokenLogprobs
from headrace.weights.qtensor import QTensor

INTERPRETED = 4
"""In place of a card's multiprocessors where kernels are interpreted: work is shared out there as well."""
NOTHING_DRAWN = (0, 0, 0, 0, device_sampling.NOTHING)


class Loaded:
    """A model on a device. Not thread-safe."""

    def __init__(
        self,
        spec: ModelSpec,
        tensors: Iterable[tuple[str, QTensor]],
        options: BackendOptions,
        dtype: torch.dtype,
        device: torch.device,
        depth: int,
    ) -> None:
        self.options, self.device = options, device
        card = card_of(device)
        self.decoder = GpuDecoder(spec, tensors, options, dtype, device, card)
        if device.type == "cuda" and not options.batch_invariant:
            self.decoder.forms.choose(dtype, replay_seconds)
        shapes = [(one.attention.kv_heads, one.attention.head_dim) for one in spec.layers]
        self.caches = make_caches(shapes, options.num_blocks, options.block_size, options.kv_dtype, device)
        most_blocks = -(-options.max_model_len // options.block_size)
        self._block_tables = torch.zeros(options.max_rows, most_blocks, dtype=torch.int32, device=device)
        self._last = torch.zeros(options.max_rows + 1, dtype=torch.int32, device=device)
        """The token that each row sampled last; one more, which nobody reads."""
        sizes = buckets(options.max_rows)
        self.attention = AttentionPlan(self.decoder.heads, dtype, options, sizes, device, card)
        largest = Layout(options.max_tokens, options.max_rows, options.max_tokens, options.max_tokens, options.max_rows)
        # One more than plans in flight: a row that is computed again without its drafts is sent beside them.
        self._staging = Staging(largest, depth + 1, device)
        widest = max(one.heads * one.head_dim for one in self.decoder.heads)
        self._mixed = torch.zeros(options.max_tokens, widest, dtype=dtype, device=device)
        self._tokens = torch.zeros(options.max_rows, dtype=torch.int32, device=device)
        self._sampler = device_sampling.make_workspace(options.max_rows, spec.vocab_size, device)
        self._failed: dict[int, RowError] = {}
        """Rows that failed and are not released yet: their steps in flight answer with the same error."""
        self.forget_rows()
        with torch.inference_mode():
            self._prepare_device(sizes)

    def forget_rows(self) -> None:
        options, spec = self.options, self.decoder.spec
        sizes = (options.max_rows, options.max_model_len, options.block_size, options.num_blocks, spec.vocab_size)
        self.table = RequestTable(*sizes, spec.vision)
        self._failed.clear()

    def close(self) -> None:
        """Its memory goes as soon as nobody holds it: the graphs know how to run a step, and so hold it themselves."""
        del self.graphs

    @property
    def workspace_bytes(self) -> int:
        """What steps use beside weights and KV cache and never give back."""
        tensors = (self._block_tables, self._last, self._mixed, self._tokens)
        fixed = sum(one.nbytes for one in tensors)
        return fixed + self._sampler.nbytes + self.attention.nbytes + self._staging.nbytes

    # ------------------------------------------------------------ launch

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> Flight:
        """Starts a plan. Raises EngineError on one that breaks the protocol."""
        began = time.perf_counter()
        for row in plan.release:
            self._failed.pop(row, None)
        self.table.apply(plan)
        self._put_blocks(plan)
        copy_blocks(self.caches, plan.copies)
        failed = dict(self._failed)
        failed |= {row: error for row, error in self._faults(plan.rows) if row not in failed}
        steps = [step for step in plan.rows if step.row not in failed]
        return self._compute(plan, steps, failed, began)

    def _faults(self, steps: Sequence[RowStep]) -> Iterable[tuple[int, RowError]]:
        """Rows that cannot be computed, and why. Their images are encoded here: what is wrong with one is the row's."""
        for step in steps:
            name = self.table.row(step.row).adapter
            if not self.decoder.has_adapter(name):
                yield step.row, RowError(EngineError.code, f"adapter {shorten(name)} is not loaded")
        if (vision := self.decoder.vision) is None:
            return
        for step in steps:
            try:
                for part in self.table.batch([step]).images:
                    vision.rows(part.image)
            except Exception as error:  # the row's own
                yield step.row, RowError(*code_and_message(error))

    def _put_blocks(self, plan: StepPlan) -> None:
        entries = []
        for step in plan.rows:
            first = self.table.row(step.row).num_blocks - len(step.new_blocks)
            entries += [(step.row, first + i, block) for i, block in enumerate(step.new_blocks)]
        if entries:
            put_blocks(self._block_tables, *self._sent(np.array(entries, np.int32).T))

    def _sent(self, values: NDArray[np.int32]) -> Tensor:
        """A small array on the device."""
        host = torch.from_numpy(np.ascontiguousarray(values))
        if self.device.type != "cuda":
            return host
        return host.pin_memory().to(self.device, non_blocking=True)

    def _compute(
        self, plan: StepPlan, steps: Sequence[RowStep], failed: Mapping[int, RowError], began: float
    ) -> Flight:
        if not steps:
            nothing = Wanted([], np.empty(0, np.int64), [])
            none = torch.empty(0, dtype=torch.int32)
            return Flight(plan, failed, steps, nothing, none, None, {}, {}, [], Event(self.device), {"prepare": 0.0})
        batch = self.table.batch(steps)
        wanted = Wanted.of(batch, steps, self.table)
        adapters = self.decoder.adapters(batch, self.device)
        size = self._bucket(batch, steps, wanted, adapters)
        if size is None:
            hidden, logits = self._run(batch, steps, wanted, adapters)
        else:
            layout = bucket_layout(size)
            self._staging.send(layout, lambda arrays: self._write(arrays, batch, steps, wanted, ones(size)))
            hidden, logits = None, self.graphs.launch(size)
        kept = self._places_for_host(steps, wanted)
        scores = [self._scores(step, int(batch.starts[i]), hidden, adapters) for i, step in enumerate(steps)]
        flight = Flight(
            plan=plan,
            failed=failed,
            steps=steps,
            wanted=wanted,
            tokens=self._fetched(self._tokens[: len(wanted.drawn)]),
            logits=self._fetched(_taken(logits, kept).float()) if logits is not None and kept else None,
            kept={place: index for index, place in enumerate(kept)},
            expected={i: self.table.expect(steps[i].row) for i in wanted.drawn},
            scores=scores,
            done=Event(self.device),
            seconds={"prepare": time.perf_counter() - began},
        )
        if self.decoder.vision is not None:
            self.decoder.vision.cache.trim(self.table.unfinished_images())
        return flight

    def _bucket(
        self, batch: Batch, steps: Sequence[RowStep], wanted: Wanted, adapters: RowAdapters | None
    ) -> int | None:
        """The graph that runs this batch; None: it has to be launched kernel by kernel."""
        decode = bool((batch.lengths == 1).all()) and len(wanted.places) == len(steps)
        plain = adapters is None and not batch.images and not any(step.score_prompt for step in steps)
        return self.graphs.size_for(len(steps)) if decode and plain else None

    def _run_bucket(self, size: int) -> Tensor:
        """A decode step of `size` rows, whose arrays are in place."""
        _, logits = self._forward(bucket_layout(size), 1, self.attention.splits_of_bucket(size))
        assert logits is not None
        return logits

    def _run(
        self, batch: Batch, steps: Sequence[RowStep], wanted: Wanted, adapters: RowAdapters | None
    ) -> tuple[Tensor, Tensor | None]:
        """Hidden states and logits of any step."""
        queries = self.attention.queries(int(batch.lengths.max()))
        tiles = span_tiles(batch.lengths, queries)
        layout = Layout(len(batch.token_ids), len(steps), len(tiles), len(wanted.places), len(wanted.drawn))
        self._staging.send(layout, lambda arrays: self._write(arrays, batch, steps, wanted, tiles))
        at_places = None if adapters is None else adapters.take(wanted.places)
        images = batch if batch.images else None
        return self._forward(layout, queries, self.attention.splits(len(steps)), adapters, at_places, images)

    def _forward(
        self,
        layout: Layout,
        queries: int,
        splits: Splits,
        adapters: RowAdapters | None = None,
        at_places: RowAdapters | None = None,
        images: Batch | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """A step whose arrays are in place: hidden states, and logits where any are wanted; what is drawn becomes the
        rows' last tokens. `adapters`: of the tokens, `at_places`: of the places whose logits are wanted."""
        arrays = self._staging.on_device(layout)
        hidden = self.decoder.states(arrays, self._last, self._step(arrays, queries, splits, adapters), images)
        if not layout.places:
            return hidden, None
        logits = self.decoder.logits(hidden, arrays.places, at_places)
        if layout.draws:
            self._draw(arrays, logits)
        return hidden, logits

    def _step(self, arrays: StepArrays, queries: int, splits: Splits, adapters: RowAdapters | None = None) -> Step:
        return Step(
            positions=arrays.positions,
            slots=arrays.slots,
            spans=Spans(arrays.starts, arrays.lengths, arrays.contexts, arrays.rows, arrays.tiles, queries),
            block_tables=self._block_tables,
            splits=splits,
            workspace=self.attention.workspace,
            capability=self.attention.capability,
            rotaries=self.decoder.rotaries,
            caches=self.caches,
            mixed=self._mixed,
            adapters=adapters,
        )

    def _draw(self, arrays: StepArrays, logits: Tensor) -> None:
        count = len(arrays.draw_rows)
        tokens = self._tokens[:count]
        draws = device_sampling.Draws(arrays.draw_floats, arrays.draw_ints)
        device_sampling.sample(logits[:count], draws, tokens, self._sampler)
        self._last.scatter_(0, arrays.draw_rows.long(), tokens)

    def _write(
        self, arrays: StepArrays, batch: Batch, steps: Sequence[RowStep], wanted: Wanted, tiles: NDArray[np.int32]
    ) -> None:
        """Fills the host's arrays; what they have beyond the step is padding."""
        rows = np.array([step.row for step in steps], np.int32)
        _fill(arrays.token_ids, batch.token_ids, 0)
        _fill(arrays.token_rows, np.repeat(rows, batch.lengths), 0)
        _fill(arrays.positions, batch.positions, 0)
        _fill(arrays.slots, batch.slots, -1)
        for target, values in ((arrays.starts, batch.starts), (arrays.lengths, batch.lengths)):
            _fill(target, values, 0)
        _fill(arrays.contexts, batch.contexts, 0)
        _fill(arrays.rows, rows, 0)
        arrays.tiles[:] = tiles
        _fill(arrays.places, wanted.places, 0)
        _fill(arrays.draw_rows, rows[wanted.drawn], self.options.max_rows)
        arrays.draw_ints[:] = NOTHING_DRAWN
        arrays.draw_floats[:] = 1.0
        if wanted.drawn:
            floats, ints = zip(*(self._draw_of(steps[i]) for i in wanted.drawn), strict=True)
            arrays.draw_floats[: len(floats)], arrays.draw_ints[: len(ints)] = floats, ints

    def _draw_of(self, step: RowStep) -> tuple[tuple[float, ...], tuple[int, ...]]:
        row = self.table.row(step.row).sampling
        return device_sampling.row_of(row.sampling, step.start + step.length - row.num_prompt)

    def _send_padding(self, layout: Layout) -> None:
        """A step of nothing, for whoever captures or warms up."""
        nothing = np.zeros(0, np.int64)

        def write(arrays: StepArrays) -> None:
            for name in ("token_ids", "token_rows", "positions", "starts", "lengths", "contexts", "rows", "places"):
                _fill(getattr(arrays, name), nothing, 0)
            _fill(arrays.slots, nothing, -1)
            _fill(arrays.draw_rows, nothing, self.options.max_rows)
            arrays.tiles[:] = ones(layout.tiles)
            arrays.draw_ints[:] = NOTHING_DRAWN
            arrays.draw_floats[:] = 1.0

        self._staging.send(layout, write)

    def _prepare_device(self, sizes: Sequence[int]) -> None:
        """Compiles every kernel and takes the memory of the largest step, so that no request waits or fails for it."""
        if self.device.type == "cuda":
            layout = Layout(self.options.max_tokens, 1, 1, 1, 1)
            self._send_padding(layout)
            self._forward(layout, self.attention.queries(layout.tokens), self.attention.splits(1))
            torch.cuda.synchronize(self.device)
        self.graphs = Graphs(self._run_bucket, sizes, self.device, lambda size: self._send_padding(bucket_layout(size)))

    # ------------------------------------------------------------ what the host reads

    def _places_for_host(self, steps: Sequence[RowStep], wanted: Wanted) -> list[int]:
        """Which of the P places the host reads the logits of."""
        drawn = set(wanted.drawn)
        kept: list[int] = []
        for i, step in enumerate(steps):
            scored = self.table.row(step.row).sampling.sampling.logprobs is not None
            if step.logits or (step.sample and (i not in drawn or scored)):
                kept += wanted.of_step[i].tolist()
        return kept

    def _fetched(self, values: Tensor) -> Tensor:
        """On its way into pinned memory; there once the step's event has come."""
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=self.device.type == "cuda")
        return host.copy_(values, non_blocking=True)

    def _scores(self, step: RowStep, first: int, hidden: Tensor | None, adapters: RowAdapters | None) -> answers.Scores:
        def logits_of(places: IntArray) -> F32:
            assert hidden is not None
            mine = None if adapters is None else adapters.take(places)
            logits = self.decoder.logits(hidden, self._sent(places.astype(np.int32)), mine)
            found: F32 = logits.float().cpu().numpy()
            return found

        return answers.scores(self.table, step, first, logits_of)

    # ------------------------------------------------------------ answer

    def settle(self, flight: Flight) -> None:
        """Samples the rows that are the host's to sample, and tells the device: a later step may begin with them."""
        drawn = set(flight.wanted.drawn)
        mine = [i for i, step in enumerate(flight.steps) if step.sample and i not in drawn and i not in flight.outs]
        if not mine:
            return
        flight.done.wait()
        sampled: list[tuple[int, int]] = []
        for i in mine:
            step, logits = flight.steps[i], flight.logits_of(i)
            tokens = sample(logits[-1 - len(step.drafts) :], answers.positions(self.table, step))
            out = answers.row_out(step, tokens, logits if step.logits else None)
            if out.error is not None and step.drafts:
                # A draft is a guess: one that makes its row fail must not end the request.
                out = self._without_drafts(flight, step)
            elif out.error is None:
                self.table.append(step.row, out.tokens)
            if out.error is None:
                sampled.append((step.row, out.tokens[-1]))
            flight.outs[i] = out
        if sampled:
            rows, last = self._sent(np.array(sampled, np.int32).T)
            self._last.index_copy_(0, rows.long(), last)

    def _without_drafts(self, flight: Flight, step: RowStep) -> RowOut:
        alone = replace(step, drafts=(), mask=answers.masks(step)[0])
        again = self._compute(flight.plan, [alone], {}, time.perf_counter())
        self.settle(again)
        return self._outs(again)[0]

    @torch.inference_mode()
    def answer(self, flight: Flight) -> list[RowOut]:
        """Waits for the step; what it gave to each row of its plan."""
        self.settle(flight)
        flight.done.wait()
        outs = {step.row: out for step, out in zip(flight.steps, self._outs(flight), strict=True)}
        for row, error in flight.failed.items():
            outs[row] = RowOut(row, error=error)
        for row, out in outs.items():
            if out.error is not None:
                self._failed.setdefault(row, out.error)
                outs[row] = RowOut(row, error=self._failed[row])
        return [outs[step.row] for step in flight.plan.rows]

    def _outs(self, flight: Flight) -> list[RowOut]:
        place_of = {i: place for place, i in enumerate(flight.wanted.drawn)}
        tokens = flight.tokens.tolist()
        found = []
        for i, step in enumerate(flight.steps):
            if step.row in self._failed:
                out = RowOut(step.row, error=self._failed[step.row])
            elif i in flight.outs:
                out = flight.outs[i]
            elif i in place_of:
                out = self._drawn_out(flight, i, tokens[place_of[i]])
            else:
                out = answers.row_out(step, [], flight.logits_of(i) if step.logits else None)
            found.append(answers.with_scores(out, flight.scores[i]))
        return found

    def _drawn_out(self, flight: Flight, index: int, token: int) -> RowOut:
        """The answer of a row that the device sampled."""
        step = flight.steps[index]
        if (error := device_error(token)) is not None:
            return RowOut(step.row, error=error)
        self.table.settle(step.row, flight.expected[index], token)
        logprobs: tuple[TokenLogprobs, ...] = ()
        wanted = self.table.row(step.row).sampling.sampling.logprobs
        if wanted is not None:
            try:
                logprobs = tuple(score(flight.logits_of(index)[-1:], [token], wanted))
            except NonFiniteLogits as fault:
                return RowOut(step.row, error=RowError(fault.code, str(fault)))
        return RowOut(step.row, (token,), 0, logprobs, None, flight.logits_of(index) if step.logits else None)


def card_of(device: torch.device) -> Card:
    """What kernels' configurations depend on; where they are interpreted, those of a small Hopper."""
    if device.type != "cuda":
        return Card(multiprocessors=INTERPRETED)
    properties = torch.cuda.get_device_properties(device)
    return Card((properties.major, properties.minor), properties.multi_processor_count)


def bucket_layout(size: int) -> Layout:
    """Of a decode step of so many rows."""
    return Layout(size, size, size, size, size)


def ones(count: int) -> NDArray[np.int32]:
    """The tiles of so many spans of one token."""
    return np.stack((np.arange(count), np.zeros(count)), axis=1).astype(np.int32)


def _fill(target: NDArray[np.int32], values: NDArray[np.generic], padding: int) -> None:
    target[: len(values)] = values
    target[len(values) :] = padding


def _taken(logits: Tensor, rows: Sequence[int]) -> Tensor:
    if list(rows) == list(range(len(logits))):
        return logits
    return logits.index_select(0, torch.tensor(rows, device=logits.device))
