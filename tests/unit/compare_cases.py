"""Comparisons made of planted figures, for tests of verdicts and reports."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from headrace.backends.base import BackendOptions
from headrace.compare.machine import Machine
from headrace.compare.measure import batching_bound
from headrace.compare.methods import Iteration, Outcome, RequestRun
from headrace.compare.runner import Comparison, Wishes, judge_runs
from headrace.compare.verdict import Epsilon, Scored
from headrace.compare.workloads import Workload, WorkloadRequest
from headrace.core.config import ResolvedConfig
from headrace.core.spec import ModelSpec
from headrace.core.types import Admit, Capacity, RowError, RowOut, StepPlan, StepResult
from headrace.parallel.mesh import Mesh
from headrace.weights.qtensor import QTensor

MARGIN = 0.25
EPSILON = Epsilon(0.01, 64, "two planted orders")
REASONS = {"threads": "as set"}
CONFIG = ResolvedConfig(
    "torch", "bfloat16", "none", "bfloat16", "auto", 2, "fused", 16, 64, 512, 32, 512, False, REASONS
)
OUTPUTS = ((5, 6, 7, 8), (9, 10, 11))

Outputs = Sequence[tuple[int, ...]]


def outcome(outputs: Outputs, seconds: float, together: bool = True) -> Outcome:
    """A round of `seconds`: all at once, or one after the other."""
    share = seconds / len(outputs)
    requests = tuple(
        RequestRun(
            tuple(output),
            "length",
            0.0,
            (seconds / 4 if together else share * (index + 0.2),) * len(output),
            seconds if together else share * (index + 1),
        )
        for index, output in enumerate(outputs)
    )
    iterations = tuple(Iteration(seconds * (i + 1) / 10, len(outputs), 3) for i in range(10))
    return Outcome(requests, seconds, iterations, computed_tokens=30)


def scored(output: Sequence[int], argmax: Sequence[int] | None = None, kl: float = 0.0) -> Scored:
    margins = (MARGIN,) * len(output)
    return Scored(margins, (kl,) * len(output), tuple(output if argmax is None else argmax), margins)


def workload(count: int, max_tokens: int = 4) -> Workload:
    requests = [
        WorkloadRequest((1, 2, 3 + number), max_tokens, title=f"title {number}", text=f"text <b>{number}</b>")
        for number in range(count)
    ]
    return Workload("planted", tuple(requests), templated=True)


def comparison(
    runs: Mapping[str, tuple[Outcome, ...]], texts: Mapping[str, tuple[str, ...]] | None = None, kl: float = 0.0
) -> Comparison:
    """The whole experiment, from planted runs; the base is `serial`."""
    scores = {
        (name, question, output): scored(output, kl=kl)
        for name, outcomes in runs.items()
        for one in outcomes
        for question, output in enumerate(one.outputs)
    }
    base = runs["serial"][0]
    methods = {name: PlantedMethod(name) for name in runs}
    plain = tuple(f"answer {number}" for number in range(len(base.requests)))
    return Comparison(
        methods=judge_runs(runs, scores, methods, dict.fromkeys(runs, 1.5), EPSILON, Wishes()),
        failures=(),
        workload=workload(len(base.requests)),
        texts=dict.fromkeys(runs, plain) | dict(texts or {}),
        bound=batching_bound([len(output) for output in base.outputs]),
        margins=tuple((MARGIN,) * len(output) for output in base.outputs),
        epsilon=EPSILON,
        reference=replace(CONFIG, dtype="float32", kv_dtype="float32"),
        wishes=Wishes(),
        load_s=1.5,
        repeats=len(runs["serial"]),
        peak_rss_bytes=10**9,
        model="/models/planted.gguf",
        model_name="planted.gguf",
        fingerprint="ab" * 32,
        config=CONFIG,
        machine=Machine("a CPU", 2, 2**33, "Linux x86_64", "3.11", {"numpy": "2"}),
        measured_at="2026-01-01T00:00:00+00:00",
    )


class PlantedMethod:
    """A name, and what is said of it."""

    config = None
    exact = True

    def __init__(self, name: str) -> None:
        self.name = name
        self.description = f"what {name} does"

    def start(self, workload: Workload) -> float:
        return 0.0

    def run(self, workload: Workload) -> Outcome:
        return outcome(OUTPUTS, 1.0)

    def close(self) -> None:
        pass


class TableBackend:
    """The logits after a token are a row of a table: the smallest model there is. Greedy, one KV cache for nothing."""

    name = "table"
    depth = 1

    def __init__(self, table: np.ndarray, poison: int | None = None) -> None:
        self._table = table.astype(np.float32)
        self._poison = poison
        self._rows: dict[int, list[int]] = {}
        self._answer: StepResult | None = None
        self.largest_span = 0
        self.closed = False

    def load(
        self, spec: ModelSpec, tensors: Iterable[tuple[str, QTensor]], options: BackendOptions, mesh: Mesh
    ) -> Capacity:
        return Capacity(options.num_blocks, options.block_size, options.max_rows, options.max_tokens)

    def submit(self, plan: StepPlan) -> None:
        for row in plan.release:
            del self._rows[row]
        for admit in plan.admit:
            self._admit(admit)
        outs = []
        for step in plan.rows:
            ids = self._rows[step.row][step.start : step.start + step.length]
            assert len(ids) == step.length
            self.largest_span = max(self.largest_span, step.length)
            if self._poison in ids:
                outs.append(RowOut(step.row, error=RowError("nan_logits", "poisoned")))
                continue
            logits = self._table[ids]
            token = int(logits[-1].argmax())
            if step.sample:
                self._rows[step.row].append(token)
            outs.append(
                RowOut(step.row, (token,) if step.sample else (), logits=logits.copy() if step.logits else None)
            )
        self._answer = StepResult(plan.step, tuple(outs))

    def _admit(self, admit: Admit) -> None:
        assert admit.row not in self._rows
        self._rows[admit.row] = list(admit.token_ids)

    def result(self) -> StepResult:
        assert self._answer is not None
        answer, self._answer = self._answer, None
        return answer

    def probe(self) -> Mapping[str, object]:
        return {}

    def explain(self) -> str:
        return "a table"

    def memory(self) -> Mapping[str, int]:
        return {"weights": self._table.nbytes}

    def close(self) -> None:
        self.closed = True
