"""What a backend is (docs/CONTRACTS.md §1). `headrace.testing.conformance` is its test suite."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from headrace.core.spec import ModelSpec
from headrace.core.types import Capacity, StepPlan, StepResult
from headrace.parallel.mesh import Mesh
from headrace.weights.qtensor import QTensor

if TYPE_CHECKING:
    from headrace.weights.lora import Adapter


@dataclass(frozen=True, slots=True)
class BackendOptions:
    """Sizes and precision, all resolved: a backend decides none of them."""

    dtype: str
    """float32, bfloat16 or float16: the type of plain weights, and on torch of all that is computed."""
    threads: int
    block_size: int
    num_blocks: int
    max_rows: int
    max_tokens: int
    """Most tokens computed in one step."""
    max_model_len: int
    quant: str = "none"
    """How weights are kept: none (plain numbers), stored (as the checkpoint packs them), int8, int4, fp8."""
    kv_dtype: str = "float32"
    """float32, bfloat16, float16, int8 or fp8."""
    image_cache_bytes: int = 0
    """Of encoded images that no row needs any more, kept for whoever brings them again."""
    batch_invariant: bool = False
    """On CUDA: every answer's bits independent of the batch. On a CPU they always are."""
    device: str = "cpu"
    """cpu or cuda."""


class Backend(Protocol):
    """Executes one plan after another on one rank. A row's error is data (RowOut.error), never an exception.

    `submit` and `result` raise BackendUnavailable if the device itself is gone. Whatever else they raise (EngineError
    for a plan that breaks the protocol, MemoryError, an exception of a library) may be a row's fault: `reset` follows.
    """

    name: str
    depth: int
    """Plans that may be in flight: 1 on CPU, 2 on CUDA."""

    def load(
        self, spec: ModelSpec, tensors: Iterable[tuple[str, QTensor]], options: BackendOptions, mesh: Mesh
    ) -> Capacity:
        """Takes every tensor the model's weight map names, once. Raises ModelError or EngineError."""

    def load_adapter(self, adapter: Adapter) -> None:
        """A LoRA adapter, which rows may name from then on: after load(), before the first plan that names it.

        Raises UnsupportedModel, WeightsMismatch or EngineError.
        """

    def submit(self, plan: StepPlan) -> None:
        """Starts a plan; at most `depth` may be unanswered."""

    def result(self) -> StepResult:
        """Waits for the oldest unanswered plan."""

    def reset(self) -> None:
        """Forgets every row and every unanswered plan, whatever state an exception of `submit` or `result` left.

        KV blocks keep what answered plans wrote; what an unanswered plan was to write is of no use. Adapters stay.
        Raises EngineError if that is not possible.
        """

    def probe(self) -> Mapping[str, object]:
        """What was found on this machine: device, library versions, instruction sets."""

    def explain(self) -> str:
        """How a step runs: kernels, shapes and why they were chosen."""

    def memory(self) -> Mapping[str, int]:
        """Bytes by use: weights, adapters, kv_cache, workspace, encoder_cache (of images)."""

    def close(self) -> None:
        """Gives everything back; further calls are errors."""


@runtime_checkable
class ReadsAhead(Protocol):
    """A backend whose load can begin early."""

    def begin(
        self, spec: ModelSpec, tensors: Iterable[tuple[str, QTensor]], options: BackendOptions, mesh: Mesh
    ) -> None:
        """Starts on a load, as far as nothing need be waited for; `load`, with the same arguments, does the rest.

        Raises what `load` does.
        """
