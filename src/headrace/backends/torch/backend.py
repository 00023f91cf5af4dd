"""TorchBackend: the plain reference. Eager torch on the CPU, one plan at a time."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace

import torch

from headrace.backends.base import BackendOptions
from headrace.backends.ranges import GATHER, HEAD, SAMPLE, Range
from headrace.backends.rows import Batch, IntArray, RequestTable
from headrace.backends.sampling import F32, Position, code_and_message, sample
from headrace.backends.torch import answers, ops
from headrace.backends.torch.attention import TILE
from headrace.backends.torch.kvstore import KVStore
from headrace.backends.torch.model import Decoder
from headrace.backends.torch.ranges import Ranges
from headrace.core.errors import ConfigError, EngineError, OutOfMemory, UnsupportedModel, shorten
from headrace.core.spec import ModelSpec
from headrace.core.types import Capacity, RowError, RowOut, RowStep, StepPlan, StepResult
from headrace.parallel.mesh import Mesh
from headrace.weights.lora import Adapter
from headrace.weights.qtensor import QTensor

DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


class Loaded:
    """What exists between load() and close()."""

    def __init__(
        self,
        spec: ModelSpec,
        tensors: Iterable[tuple[str, QTensor]],
        options: BackendOptions,
    ) -> None:
        dtype = DTYPES[options.dtype]
        multiple = ops.row_multiple(options.threads)
        self.options = options
        self.decoder = Decoder(spec, tensors, dtype, options.max_model_len, multiple, options.image_cache_bytes)
        shapes = [(one.attention.kv_heads, one.attention.head_dim) for one in spec.layers]
        self.store = KVStore(shapes, options.num_blocks, options.block_size, dtype)
        self.ranges: Ranges | None = None
        """While somebody profiles."""
        self.forget_rows()

    def ranged(self, name: str) -> AbstractContextManager[object]:
        return nullcontext() if self.ranges is None else self.ranges(name)

    def forget_rows(self) -> None:
        options, spec = self.options, self.decoder.spec
        sizes = (options.max_rows, options.max_model_len, options.block_size, options.num_blocks, spec.vocab_size)
        self.table = RequestTable(*sizes, spec.vision)

    def trim_images(self) -> None:
        """Forgets encoded images past the bound; a row that stands within one keeps it."""
        if self.decoder.vision is not None:
            self.decoder.vision.cache.trim(self.table.unfinished_images())


class TorchBackend:
    """See `backends.base.Backend`. Setting the number of threads is process-wide, as torch has it."""

    name = "torch"
    depth = 1

    def __init__(self, query_tile: int | None = TILE) -> None:
        self.query_tile = query_tile
        """Most queries of a span that attention meets in one call; None: all, with the whole matrix of their scores,
        which is for comparisons. May be changed between two plans."""
        self._loaded: Loaded | None = None
        self._closed = False
        self._result: StepResult | None = None
        self._kept: list[Range] = []

    def load(
        self, spec: ModelSpec, tensors: Iterable[tuple[str, QTensor]], options: BackendOptions, mesh: Mesh
    ) -> Capacity:
        """Raises UnsupportedModel, WeightsMismatch, ConfigError, OutOfMemory; EngineError if loaded or closed."""
        if self._closed or self._loaded is not None:
            raise EngineError("load() of a torch backend that is closed or already holds a model")
        if (mesh.tp, mesh.pp) != (1, 1):
            raise UnsupportedModel(f"mesh: {mesh.tp} × {mesh.pp} ranks, the torch backend runs on 1 × 1")
        if options.dtype not in DTYPES:
            raise ConfigError(f"dtype: got {shorten(options.dtype)}, allowed: {', '.join(DTYPES)}")
        torch.set_num_threads(options.threads)
        with _memory_errors("loading: the weights and the KV cache do not fit in memory"):
            self._loaded = Loaded(spec, tensors, options)
        return Capacity(options.num_blocks, options.block_size, options.max_rows, options.max_tokens)

    def load_adapter(self, adapter: Adapter) -> None:
        """Raises UnsupportedModel, WeightsMismatch, OutOfMemory; EngineError if its name is taken."""
        loaded = self._require()
        with _memory_errors(f"adapter {shorten(adapter.name)} does not fit in memory"):
            loaded.decoder.load_adapter(adapter)

    def submit(self, plan: StepPlan) -> None:
        """Runs the plan here and now. Raises EngineError on a plan that breaks the protocol."""
        loaded = self._require()
        if self._result is not None:
            raise EngineError(f"plan {plan.step} submitted before the result of plan {self._result.step} was taken")
        began = time.perf_counter()
        seconds = {"prepare": 0.0, "forward": 0.0, "sample": 0.0}
        table, store = loaded.table, loaded.store
        with loaded.ranged(GATHER):
            table.apply(plan)
            if len(fresh := table.fresh_blocks(plan)):
                store.zero_blocks(torch.from_numpy(fresh))
            store.copy_blocks(plan.copies)
        seconds["prepare"] += time.perf_counter() - began
        rows = self._run(loaded, plan.rows, seconds) if plan.rows else []
        loaded.trim_images()
        self._result = StepResult(plan.step, tuple(rows), seconds)

    def result(self) -> StepResult:
        """Raises EngineError if no plan is unanswered."""
        self._require()
        if self._result is None:
            raise EngineError("result() without a plan")
        result, self._result = self._result, None
        return result

    def reset(self) -> None:
        """Raises EngineError without a model."""
        self._require().forget_rows()
        self._result = None

    def probe(self) -> Mapping[str, object]:
        return {
            "device": "cpu",
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "instructions": torch.backends.cpu.get_cpu_capability(),
            "mkl": torch.backends.mkl.is_available(),
        }

    def explain(self) -> str:
        loaded = self._require()
        options, multiple = loaded.options, ops.row_multiple(loaded.options.threads)
        return (
            f"torch {torch.__version__}, eager, CPU, {options.threads} threads, {options.dtype}. "
            f"Products get a multiple of {multiple} rows, and attention meets values {ops.KEY_CHUNK} keys at a time: "
            "so a row's bits depend neither on its company nor on its chunks."
            f"{_explain_images(loaded)}"
        )

    def profile(self, on: bool) -> None:
        """See `backends.ranges.Profiled`: torch's own profiler runs, with every operator."""
        loaded = self._require()
        if on and loaded.ranges is None:
            loaded.ranges = Ranges()
            loaded.decoder.name_ranges(loaded.ranges)
        elif not on and loaded.ranges is not None:
            loaded.decoder.name_ranges(None)
            self._kept += loaded.ranges.end()
            loaded.ranges = None

    def ranged(self, name: str) -> AbstractContextManager[object]:
        ranges = self._require().ranges
        return nullcontext() if ranges is None else ranges.shown(name)

    def take_ranges(self) -> list[Range]:
        self._require()
        kept, self._kept = self._kept, []
        return kept

    def memory(self) -> Mapping[str, int]:
        """Bytes; the workspace is the largest step's logits, the one large array beside weights and KV. A cache counts
        as full."""
        loaded = self._require()
        vision = loaded.decoder.vision
        return {
            "weights": loaded.decoder.weight_bytes,
            "adapters": loaded.decoder.adapter_bytes,
            "kv_cache": loaded.store.nbytes,
            "encoder_cache": 0 if vision is None else vision.cache.max_bytes,
            "workspace": 4 * max(loaded.options.max_rows, answers.SCORED_ROWS) * loaded.decoder.spec.vocab_size,
        }

    def close(self) -> None:
        if self._loaded is not None:
            self.profile(False)
        self._kept = []
        self._closed = True
        self._loaded = None
        self._result = None

    def _require(self) -> Loaded:
        if self._loaded is None:
            raise EngineError("the torch backend is closed" if self._closed else "the torch backend holds no model")
        return self._loaded

    def _run(self, loaded: Loaded, steps: Sequence[RowStep], seconds: dict[str, float]) -> list[RowOut]:
        """All rows in one forward. If that fails, halves, until the row at fault is alone (law 6)."""
        began = time.perf_counter()
        try:
            with loaded.ranged(GATHER):
                batch = loaded.table.batch(steps)
            prepared = time.perf_counter()
            states = loaded.decoder.states(batch, loaded.store, self.query_tile)
            with loaded.ranged(HEAD):
                logits_PV: F32 = loaded.decoder.logits(states, batch.logit_positions).numpy()

            def logits_of(places: IntArray) -> F32:
                return loaded.decoder.logits(states, places).numpy()

            scores = [
                answers.scores(loaded.table, step, int(batch.starts[i]), logits_of) for i, step in enumerate(steps)
            ]
        except Exception as error:  # the row at fault gets it as data
            if len(steps) == 1 and steps[0].drafts:
                return [self._run_without_drafts(loaded, steps[0], seconds)]
            if len(steps) == 1:
                return [RowOut(steps[0].row, error=RowError(*code_and_message(error)))]
            half = len(steps) // 2
            return self._run(loaded, steps[:half], seconds) + self._run(loaded, steps[half:], seconds)
        computed = time.perf_counter()
        with loaded.ranged(SAMPLE):
            outs = _sample(loaded, steps, batch, logits_PV)
        outs = [answers.with_scores(out, mine) for out, mine in zip(outs, scores, strict=True)]
        seconds["prepare"] += prepared - began
        seconds["forward"] += computed - prepared
        seconds["sample"] += time.perf_counter() - computed
        for i, step in enumerate(steps):
            if outs[i].error is not None and step.drafts:
                outs[i] = self._run_without_drafts(loaded, step, seconds)
        return outs

    def _run_without_drafts(self, loaded: Loaded, step: RowStep, seconds: dict[str, float]) -> RowOut:
        """A draft is a guess: one that makes its row fail (its NaN reaches the whole span) must not end the request."""
        first = step.start + step.length
        loaded.store.zero_slots(torch.from_numpy(loaded.table.slots(step.row, first, first + len(step.drafts))))
        return self._run(loaded, [replace(step, drafts=(), mask=answers.masks(step)[0])], seconds)[0]


def _explain_images(loaded: Loaded) -> str:
    vision = loaded.decoder.vision
    if vision is None:
        return ""
    encoder, projector = vision.spec.encoder, vision.spec.projector
    return (
        f" Images: tile by tile through {encoder.layers} blocks of width {encoder.hidden_size}, {projector.merge} and "
        f"a projector, {projector.tokens} rows a tile; up to {vision.cache.max_bytes / 2**20:.0f} MiB of "
        "such rows are kept by the image's hash."
    )


@contextmanager
def _memory_errors(message: str) -> Iterator[None]:
    """Raises OutOfMemory with this message where memory ends."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        # torch's CPU allocator says so in a RuntimeError.
        if isinstance(error, RuntimeError) and "alloc" not in str(error):
            raise
        raise OutOfMemory(message) from error


def _sample(loaded: Loaded, steps: Sequence[RowStep], batch: Batch, logits_PV: F32) -> list[RowOut]:
    """Samples every position that wants a token in one call, then lets each row keep what its drafts allow."""
    places: list[int] = []
    positions: list[Position] = []
    for i, step in enumerate(steps):
        if step.sample:
            wanted = 1 + len(step.drafts)
            stop = int(batch.logit_starts[i] + batch.logit_counts[i])
            places += range(stop - wanted, stop)
            positions += answers.positions(loaded.table, step)
    whole = len(places) == len(logits_PV)
    sampled = iter(sample(logits_PV if whole else logits_PV[places], positions))
    outs = []
    for i, step in enumerate(steps):
        mine = [next(sampled) for _ in range(1 + len(step.drafts))] if step.sample else []
        first = int(batch.logit_starts[i])
        raw = logits_PV[first : first + int(batch.logit_counts[i])].copy() if step.logits else None
        out = answers.row_out(step, mine, raw)
        if out.error is None and step.sample:
            loaded.table.append(step.row, out.tokens)
        if out.error is None and out.accepted < len(step.drafts):
            # What was rejected may be infinite: it must not lie where later tokens only mask it.
            place = int(batch.starts[i] + step.length + out.accepted)
            stop = int(batch.starts[i] + batch.lengths[i])
            loaded.store.zero_slots(torch.from_numpy(batch.slots[place:stop]))
        outs.append(out)
    return outs
