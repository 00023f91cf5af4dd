"""GpuBackend: the fast path on CUDA. Two plans in flight, so that the device never waits for Python."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
import triton

from headrace.backends.base import BackendOptions
from headrace.backends.ranges import Range
from headrace.backends.torch.gpu.flight import Flight
from headrace.backends.torch.gpu.loaded import Loaded
from headrace.core.errors import (
    BackendUnavailable,
    ConfigError,
    EngineError,
    OutOfMemory,
    UnsupportedModel,
    shorten,
)
from headrace.core.spec import ModelSpec
from headrace.core.types import Capacity, StepPlan, StepResult
from headrace.parallel.mesh import Mesh
from headrace.weights.lora import Adapter
from headrace.weights.qtensor import QTensor

DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
GIB = 2**30


class GpuBackend:
    """See `backends.base.Backend`. On the CPU, where Triton interprets its kernels, it is for tests."""

    name = "torch"
    depth = 2

    def __init__(self, device: str = "cuda") -> None:
        """Raises BackendUnavailable if torch has no such device."""
        self._device = torch.device(device)
        if self._device.type == "cuda" and not torch.cuda.is_available():
            raise BackendUnavailable(
                f"device: cuda, and this torch ({torch.__version__}) finds no CUDA device: it needs an NVIDIA GPU, its "
                "driver, and a torch that is built for CUDA"
            )
        self._loaded: Loaded | None = None
        self._closed = False
        self._flights: deque[Flight] = deque()
        self._profiling = False

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
        with _device_errors("loading: the weights and the KV cache do not fit in the GPU's memory"):
            self._loaded = Loaded(spec, tensors, options, DTYPES[options.dtype], self._device, self.depth)
        return Capacity(options.num_blocks, options.block_size, options.max_rows, options.max_tokens)

    def load_adapter(self, adapter: Adapter) -> None:
        """Raises UnsupportedModel, WeightsMismatch, OutOfMemory; EngineError if its name is taken."""
        loaded = self._require()
        with _device_errors(f"adapter {shorten(adapter.name)} does not fit in the GPU's memory"):
            loaded.decoder.load_adapter(adapter)

    def submit(self, plan: StepPlan) -> None:
        """Launches the plan, behind at most one other. Raises EngineError on a plan that breaks the protocol."""
        loaded = self._require()
        if len(self._flights) == self.depth:
            raise EngineError(f"plan {plan.step} submitted while {self.depth} others are unanswered")
        with _device_errors("a step does not fit in the GPU's memory"):
            for flight in self._flights:
                loaded.settle(flight)
            self._flights.append(loaded.launch(plan))

    def result(self) -> StepResult:
        """Raises EngineError if no plan is unanswered."""
        loaded = self._require()
        if not self._flights:
            raise EngineError("result() without a plan")
        began = time.perf_counter()
        flight = self._flights.popleft()
        with _device_errors("a step does not fit in the GPU's memory"):
            rows = loaded.answer(flight)
        return StepResult(flight.plan.step, tuple(rows), flight.seconds | {"wait": time.perf_counter() - began})

    def reset(self) -> None:
        """Raises EngineError without a model, BackendUnavailable where the device is gone."""
        loaded = self._require()
        self._flights.clear()
        with _device_errors("the GPU's memory is full"):
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
                torch.cuda.empty_cache()
            loaded.forget_rows()

    def probe(self) -> Mapping[str, object]:
        found: dict[str, object] = {
            "device": str(self._device),
            "torch": torch.__version__,
            "triton": triton.__version__,
        }
        if self._device.type == "cuda":
            properties = torch.cuda.get_device_properties(self._device)
            found |= {
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "multiprocessors": properties.multi_processor_count,
                "memory_bytes": properties.total_memory,
                "cuda": torch.version.cuda,
            }
        return found

    def explain(self) -> str:
        loaded = self._require()
        options = loaded.options
        sizes = ", ".join(map(str, loaded.graphs.sizes))
        how = "CUDA graphs" if self._device.type == "cuda" else "no graphs"
        invariant = " Batch-invariant: one configuration of every kernel." if options.batch_invariant else ""
        return (
            f"torch {torch.__version__}, Triton {triton.__version__}, {self._device}, {options.dtype}, weights "
            f"{loaded.decoder.forms.explain()}, KV cache {options.kv_dtype}. Decode steps of {sizes} rows: {how}; "
            f"every other step is launched kernel by kernel. Two plans in flight; greedy, top-k, top-p and min-p rows "
            f"are sampled on the device, what else a row asks for on the host.{invariant}"
        )

    def profile(self, on: bool) -> None:
        """See `backends.ranges.Profiled`: ranges of the caller's, for NVIDIA's profilers. When a step's kernels run,
        the host has long gone on, and what it does then is no measure of them: no ranges are kept."""
        self._require()
        self._profiling = on

    def ranged(self, name: str) -> AbstractContextManager[object]:
        if self._profiling and self._device.type == "cuda":
            shown: AbstractContextManager[object] = torch.cuda.nvtx.range(name)
            return shown
        return nullcontext()

    def take_ranges(self) -> list[Range]:
        self._require()
        return []

    def memory(self) -> Mapping[str, int]:
        """Bytes by use. A cache counts as full."""
        loaded = self._require()
        vision = loaded.decoder.vision
        return {
            "weights": loaded.decoder.weight_bytes,
            "adapters": loaded.decoder.adapter_bytes,
            "kv_cache": sum(tensor.nbytes for cache in loaded.caches for tensor in cache.tensors),
            "encoder_cache": 0 if vision is None else vision.cache.max_bytes,
            "workspace": loaded.workspace_bytes,
        }

    def close(self) -> None:
        loaded, self._loaded = self._loaded, None
        if loaded is not None:
            loaded.close()
            del loaded
        self._closed = True
        self._flights.clear()
        if self._device.type == "cuda" and torch.cuda.is_initialized():
            torch.cuda.empty_cache()

    def _require(self) -> Loaded:
        if self._loaded is None:
            raise EngineError("the torch backend is closed" if self._closed else "the torch backend holds no model")
        return self._loaded


@contextmanager
def _device_errors(message: str) -> Iterator[None]:
    """Raises OutOfMemory with this message where memory ends, BackendUnavailable where the device is gone."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        free, total = torch.cuda.mem_get_info()
        raise OutOfMemory(f"{message}: {free / GIB:.1f} of {total / GIB:.1f} GiB are free") from error
    except torch.AcceleratorError as error:
        raise BackendUnavailable(f"the GPU has failed: {shorten(str(error).splitlines()[0], 200)}") from error
