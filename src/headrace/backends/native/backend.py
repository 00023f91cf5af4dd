"""NativeBackend: a program of our own kernels on the CPU, one call a step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import TYPE_CHECKING

import numpy as np

from headrace.backends.base import BackendOptions
from headrace.backends.native import _kernels
from headrace.backends.native.program import Compiled, compile_model, routers
from headrace.backends.native.ranges import named_ranges
from headrace.backends.native.weights import COMPUTE_TYPES, Packing
from headrace.backends.ranges import Range
from headrace.core.errors import (
    ConfigError,
    EngineError,
    OutOfMemory,
    UnsupportedModel,
    WeightsMismatch,
    shorten,
)
from headrace.core.spec import ModelSpec
from headrace.core.types import Admit, Capacity, RowError, RowOut, RowStep, StepPlan, StepResult, TokenLogprobs
from headrace.parallel.mesh import Mesh
from headrace.weights.qtensor import QTensor

if TYPE_CHECKING:
    from headrace.weights.lora import Adapter

NO_ADAPTER = -1
MAX_BLOCKS = 2**31 - 1
QUANTS = ("none", "stored", "int8", "int4")
KV_TYPES = ("float32", "bfloat16", "int8")
NO_ROOM = "loading: the weights and the KV cache do not fit in memory"
PHASES = ("prepare", "forward", "sample")


class Loaded:
    """What exists between load() and close()."""

    def __init__(
        self,
        spec: ModelSpec,
        packing: Packing,
        options: BackendOptions,
        instruction_set: str,
    ) -> None:
        self.spec = spec
        self.options = options
        self.instruction_set = instruction_set
        self.packer = packing.packer
        packed = packing.take_all()
        self.weight_bytes = packed.nbytes
        self.kv = _kernels.KvStore(options.kv_dtype, options.block_size, options.num_blocks)
        self.compiled: Compiled = compile_model(spec, packed, self.kv, instruction_set, options.max_model_len)
        self.session = _kernels.Session(
            self.compiled.program,
            self.kv,
            spec.vocab_size,
            options.max_rows,
            options.max_tokens,
            options.max_model_len,
            options.threads,
            self.compiled.head,
            self.compiled.logits,
        )
        packing.finish()
        self.adapters: dict[str, int] = {}
        self.adapter_bytes = 0
        self.lost: dict[int, RowError] = {}
        """Rows that were admitted with an adapter that is not loaded."""


class NativeBackend:
    """See `backends.base.Backend`."""

    name = "native"
    depth = 1

    def __init__(self, instruction_set: str | None = None) -> None:
        """`instruction_set`: one of `instruction_sets()`; None: the fastest. Raises ConfigError for another."""
        found = instruction_sets()
        if instruction_set is not None and instruction_set not in found:
            raise ConfigError(f"instruction set: got {shorten(instruction_set)}, allowed: {', '.join(found)}")
        self._instruction_set = instruction_set or found[-1]
        self._packing: Packing | None = None
        self._loaded: Loaded | None = None
        self._closed = False
        self._result: StepResult | None = None

    def begin(
        self, spec: ModelSpec, tensors: Iterable[tuple[str, QTensor]], options: BackendOptions, mesh: Mesh
    ) -> None:
        """Starts on a load, as far as nothing need be waited for: threads go on with it. `load`, with the same
        arguments, does the rest. Raises what `load` does."""
        if self._closed or self._loaded is not None or self._packing is not None:
            raise EngineError("load() of a native backend that is closed or already holds a model")
        if (mesh.tp, mesh.pp) != (1, 1):
            raise UnsupportedModel(f"mesh: {mesh.tp} × {mesh.pp} ranks, the native backend runs on 1 × 1")
        choices = {"dtype": COMPUTE_TYPES, "quant": QUANTS, "kv_dtype": KV_TYPES}
        for name, allowed in choices.items():
            if (value := getattr(options, name)) not in allowed:
                raise ConfigError(f"{name}: got {shorten(value)}, allowed: {', '.join(allowed)}")
        with _memory_errors(NO_ROOM):
            if options.num_blocks > MAX_BLOCKS:
                raise MemoryError
            packer = _kernels.Packer(options.threads)
            packing = Packing(tensors, packer, options.quant, options.dtype, routers(spec))
            packing.read_ahead()
        self._packing = packing

    def load(
        self, spec: ModelSpec, tensors: Iterable[tuple[str, QTensor]], options: BackendOptions, mesh: Mesh
    ) -> Capacity:
        """Raises UnsupportedModel, WeightsMismatch, ConfigError, OutOfMemory; EngineError if loaded or closed."""
        if self._packing is None:
            self.begin(spec, tensors, options, mesh)
        packing, self._packing = self._packing, None
        assert packing is not None
        with _memory_errors(NO_ROOM):
            self._loaded = Loaded(spec, packing, options, self._instruction_set)
        return Capacity(options.num_blocks, options.block_size, options.max_rows, options.max_tokens)

    def load_adapter(self, adapter: Adapter) -> None:
        """Raises UnsupportedModel, WeightsMismatch, OutOfMemory; EngineError if its name is taken."""
        loaded = self._require()
        whose = f"adapter {shorten(adapter.name)}"
        if adapter.name in loaded.adapters:
            raise EngineError(f"{whose} is loaded already")
        compiled, made = loaded.compiled, []
        with _memory_errors(f"{whose} does not fit in memory"):
            for name, low in adapter.weights.items():
                if name not in compiled.linears:
                    raise UnsupportedModel(f"{whose}: {shorten(name)} is no linear layer that the native backend runs")
                rows, columns = compiled.shapes[name]
                rank = low.a.shape[0] if low.a.shape else 0
                if (*low.b.shape, *low.a.shape) != (rows, rank, rank, columns) or not rank:
                    raise WeightsMismatch(
                        f"{whose}: {shorten(name)}: B {low.b.shape} × A {low.a.shape} is not {(rows, columns)}"
                    )
                a, b = (np.array(one.dequantise(), np.float32) for one in (low.a, low.b))
                if not abs(low.scale) * float(np.abs(b).max()) <= float(np.finfo(np.float32).max):  # NaN is too
                    raise UnsupportedModel(f"{whose}: scale × B is too large for float32")
                made.append((compiled.linears[name], low.scale, a, b))
            number = len(loaded.adapters)
            for linear, scale, a, b in made:
                loaded.adapter_bytes += linear.add_delta(loaded.packer, number, scale, a, b)
        loaded.adapters[adapter.name] = number

    def submit(self, plan: StepPlan) -> None:
        """Runs the plan here and now. Raises EngineError on a plan that breaks the protocol."""
        loaded = self._require()
        if self._result is not None:
            raise EngineError(f"plan {plan.step} submitted before the result of plan {self._result.step} was taken")
        try:
            self._result = self._run(loaded, plan)
        except (TypeError, ValueError) as error:
            loaded.session.cancel()
            wide = isinstance(error, TypeError)
            raise EngineError("the plan holds a number of more than 32 bits" if wide else str(error)) from error

    def result(self) -> StepResult:
        """Raises EngineError if no plan is unanswered."""
        self._require()
        if self._result is None:
            raise EngineError("result() without a plan")
        result, self._result = self._result, None
        return result

    def reset(self) -> None:
        """Raises EngineError without a model."""
        loaded = self._require()
        self._result = None
        loaded.lost.clear()
        loaded.session.cancel()
        for row in range(loaded.options.max_rows):
            # Which rows the plan that failed had admitted by then, the session alone knows.
            with suppress(ValueError):
                loaded.session.release(row)

    def probe(self) -> Mapping[str, object]:
        return {
            "device": "cpu",
            "instructions": self._instruction_set,
            "available": instruction_sets(),
            "built": _kernels.built_instruction_sets(),
        }

    def explain(self) -> str:
        """The program: each operation's shape, weights and kernel, and its share of the time so far."""
        loaded = self._require()
        cycles = loaded.session.cycles
        total = max(1, sum(cycles))
        options = loaded.options
        wide = max(len(line.kernel) for line in loaded.compiled.lines)
        lines = [
            f"native, {loaded.instruction_set}, {options.threads} threads, weights {options.quant}, "
            f"keys and values {options.kv_dtype}: {len(cycles)} operations, one call a step",
            f"{'operation':<24}{'shape':<36}{'MB':>9}  {'kernel':<{wide}}{'time':>9}",
        ]
        for line, spent in zip(loaded.compiled.lines, cycles, strict=True):
            name = line.name if line.layer is None else f"{line.layer} {line.name}"
            lines.append(
                f"{name:<24}{line.shape:<36}{line.nbytes / 1e6:>9.3f}  {line.kernel:<{wide}}{spent / total:>9.2%}"
            )
        return "\n".join(lines)

    def profile(self, on: bool) -> None:
        """See `backends.ranges.Profiled`."""
        self._require().session.profile(on)

    def ranged(self, name: str) -> AbstractContextManager[object]:
        """Nobody from outside sees the kernels' ranges."""
        return nullcontext()

    def take_ranges(self) -> list[Range]:
        loaded = self._require()
        return named_ranges(loaded.compiled.lines, loaded.session.take_timings())

    def memory(self) -> Mapping[str, int]:
        loaded = self._require()
        return {
            "weights": loaded.weight_bytes,
            "adapters": loaded.adapter_bytes,
            "kv_cache": loaded.kv.nbytes,
            "workspace": loaded.session.nbytes,
        }

    def close(self) -> None:
        self._closed = True
        self._packing = self._loaded = None
        self._result = None

    def _require(self) -> Loaded:
        if self._loaded is None:
            raise EngineError("the native backend is closed" if self._closed else "the native backend holds no model")
        return self._loaded

    def _run(self, loaded: Loaded, plan: StepPlan) -> StepResult:
        session = loaded.session
        for row in plan.release:
            loaded.lost.pop(row, None)
            session.release(row)
        for admit in plan.admit:
            _admit(loaded, admit)
        for source, target in plan.copies:
            loaded.kv.copy(source, target)
        lost = loaded.lost
        for step in plan.rows:
            if step.new_blocks:
                session.append_blocks(step.row, step.new_blocks)
            if step.row in lost:
                continue
            mask = None if step.mask is None else step.mask if isinstance(step.mask, bytes) else b""
            session.ask(
                step.row, step.start, step.length, step.drafts, step.sample, step.logits, step.score_prompt, mask
            )
        answers = iter(session.run())
        rows = [
            RowOut(step.row, error=lost[step.row]) if step.row in lost else _row_out(step, next(answers))
            for step in plan.rows
        ]
        return StepResult(plan.step, tuple(rows), dict(zip(PHASES, session.seconds, strict=True)))


def instruction_sets() -> Sequence[str]:
    """What this machine can run, the fastest last."""
    return _kernels.instruction_sets()


def _admit(loaded: Loaded, admit: Admit) -> None:
    sampling = _kernels.RowSampling(admit.sampling, admit.num_prompt, admit.stop_ids, loaded.spec.vocab_size)
    adapter = loaded.adapters.get(admit.adapter, NO_ADAPTER) if admit.adapter else NO_ADAPTER
    loaded.session.admit(admit.row, admit.token_ids, admit.num_prompt, sampling, adapter)
    if admit.adapter and admit.adapter not in loaded.adapters:
        message = f"adapter {shorten(admit.adapter)} is not loaded"
        loaded.lost[admit.row] = RowError(EngineError.code, message)


def _row_out(step: RowStep, answer: _kernels.Answer) -> RowOut:
    tokens, accepted, logprobs, error, logits, prompt_logprobs = answer
    if error is not None:
        return RowOut(step.row, error=RowError(*error))
    if not logprobs and logits is None and not prompt_logprobs:
        return RowOut(step.row, tokens, accepted)
    each = tuple(TokenLogprobs(*one) for one in logprobs)
    return RowOut(step.row, tokens, accepted, each, None, logits, tuple(TokenLogprobs(*one) for one in prompt_logprobs))


@contextmanager
def _memory_errors(message: str) -> Iterator[None]:
    """Raises OutOfMemory with this message where memory ends."""
    try:
        yield
    except MemoryError as error:
        raise OutOfMemory(message) from error
