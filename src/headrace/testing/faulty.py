"""FaultyBackend: another backend, in which chosen requests make steps fail."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from headrace.backends.base import Backend, BackendOptions
from headrace.core.spec import ModelSpec
from headrace.core.types import Admit, Capacity, RowError, StepPlan, StepResult
from headrace.parallel.mesh import Mesh
from headrace.weights.lora import Adapter
from headrace.weights.qtensor import QTensor

KINDS = ("exception", "memory", "nan")
PLACES = ("before submit", "after submit", "before result", "after result")


class Injected(RuntimeError):
    """An exception as a library under the backend might raise it."""


@dataclass(slots=True)
class Fault:
    """What goes wrong, where the step that computes one token of one request's is concerned."""

    prompt: tuple[int, ...]
    """Whose: the request with this prompt."""
    position: int
    """The token."""
    kind: str = "exception"
    """exception and memory (a MemoryError) take the whole step with them; nan is the row's own error, as data."""
    place: str = "before submit"
    """Where they are raised: before or after the inner backend's own submit or result."""
    times: int | None = None
    """How often; None: whenever that token is computed."""
    fired: int = 0


class FaultyBackend:
    """See `backends.base.Backend`; all but the faults is the inner backend's."""

    def __init__(self, inner: Backend, faults: Sequence[Fault] = ()) -> None:
        self.inner = inner
        self.faults = list(faults)
        self.name = inner.name
        self.depth = inner.depth
        self.resets = 0
        self._admits: dict[int, Admit] = {}
        self._plans: list[StepPlan] = []
        self._sick: set[int] = set()

    def load(
        self, spec: ModelSpec, tensors: Iterable[tuple[str, QTensor]], options: BackendOptions, mesh: Mesh
    ) -> Capacity:
        return self.inner.load(spec, tensors, options, mesh)

    def load_adapter(self, adapter: Adapter) -> None:
        self.inner.load_adapter(adapter)

    def submit(self, plan: StepPlan) -> None:
        for row in plan.release:
            self._admits.pop(row, None)
            self._sick.discard(row)
        self._admits.update((admit.row, admit) for admit in plan.admit)
        self._raise(plan, "before submit")
        self.inner.submit(plan)
        self._raise(plan, "after submit")
        self._plans.append(plan)

    def result(self) -> StepResult:
        plan = self._plans.pop(0)
        self._raise(plan, "before result")
        result = self.inner.result()
        self._raise(plan, "after result")
        self._sick.update(step.row for step in plan.rows if self._fires(plan, step.row, "nan"))
        rows = [
            replace(
                out, tokens=(), accepted=0, logprobs=(), prompt_logprobs=(), error=RowError("nan_logits", "injected")
            )
            if out.row in self._sick
            else out
            for out in result.rows
        ]
        return replace(result, rows=tuple(rows))

    def reset(self) -> None:
        self.resets += 1
        self._admits.clear()
        self._plans.clear()
        self._sick.clear()
        self.inner.reset()

    def probe(self) -> Mapping[str, object]:
        return self.inner.probe()

    def explain(self) -> str:
        return self.inner.explain()

    def memory(self) -> Mapping[str, int]:
        return self.inner.memory()

    def close(self) -> None:
        self.inner.close()

    def _raise(self, plan: StepPlan, place: str) -> None:
        for step in plan.rows:
            if self._fires(plan, step.row, "memory", place):
                raise MemoryError
            if self._fires(plan, step.row, "exception", place):
                raise Injected(f"row {step.row} at 0x7f00")

    def _fires(self, plan: StepPlan, row: int, kind: str, place: str = "") -> bool:
        """Whether a fault of this kind is due; it is counted then."""
        admit = self._admits[row]
        step = next(step for step in plan.rows if step.row == row)
        for fault in self.faults:
            if (
                fault.kind == kind
                and place in ("", fault.place)
                and fault.prompt == admit.token_ids[: admit.num_prompt]
                and step.start <= fault.position < step.start + step.length
                and (fault.times is None or fault.fired < fault.times)
            ):
                fault.fired += 1
                return True
        return False
