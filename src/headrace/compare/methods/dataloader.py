"""Static batches as a DataLoader and `generate` make them: who has ended is computed until all have."""

from __future__ import annotations

from collections.abc import Sequence

from headrace.compare.methods import Iteration, Outcome, RequestRun
from headrace.compare.methods.bench import Bench
from headrace.compare.methods.rows import Answer, Row, Rows, open_answers, wait_until
from headrace.compare.workloads import Workload
from headrace.core.config import ResolvedConfig
from headrace.core.errors import ConfigError
from headrace.core.sizing import blocks_for

MOST = 32
"""Requests of a batch, unless another number is asked for."""


class DataLoaderMethod:
    """Batches of what waits; no engine. An answer is handed over when its batch has ended, as `generate` does it."""

    exact = True

    def __init__(self, name: str, size: int | None, bench: Bench) -> None:
        """`size`: of a batch; None: all that wait, at most `MOST`."""
        self.name = name
        self.config: ResolvedConfig | None = bench.opened.config
        self._bench = bench
        self._asked = size
        self._size = size or MOST
        self.description = self._describe()

    def start(self, workload: Workload) -> float:
        """Raises ConfigError where the engine has not so many rows."""
        _, capacity = self._bench.backend
        if self._asked is not None and self._asked > capacity.max_rows:
            most = f"up to max_num_seqs, {capacity.max_rows}"
            raise ConfigError(f"{self.name}: batches of {self._asked}, allowed: {most}")
        self._size = min(self._size, capacity.max_rows)
        self.description = self._describe()
        return self._bench.load_s

    def run(self, workload: Workload) -> Outcome:
        bench = self._bench
        answers = open_answers(bench.opened, workload, self.name)
        waiting = list(answers)
        requests: list[RequestRun] = []
        iterations: list[Iteration] = []
        with bench.rows() as rows:
            began_s = bench.clock()
            while waiting:
                wait_until(began_s + waiting[0].arrival_s, bench.clock, bench.sleep)
                now_s = bench.clock()
                arrived = [answer for answer in waiting[: self._size] if began_s + answer.arrival_s <= now_s]
                batch = _Batch(bench, rows, arrived, began_s)
                iterations += batch.run()
                requests += [row.answer.run(iterations[-1].end_s) for row in batch.rows]
                del waiting[: len(batch.rows)]
        return Outcome(
            requests=tuple(requests),
            seconds=max(one.end_s for one in requests),
            iterations=tuple(iterations),
            computed_tokens=rows.computed_tokens,
        )

    def close(self) -> None:
        """Nothing is the method's own."""

    def _describe(self) -> str:
        return (
            f"batches of up to {self._size} as a DataLoader and generate make them: those that wait start together, a "
            "row that has ended is computed until the longest has, then all are handed over; prompts are packed, not "
            "padded"
        )


class _Batch:
    """One batch, from its prompts to the end of its longest answer."""

    def __init__(self, bench: Bench, rows: Rows, arrived: Sequence[Answer], began_s: float) -> None:
        """Takes as many of `arrived`, in order, as the KV cache has room for until the batch ends."""
        self._bench = bench
        self._backend = rows
        self._began_s = began_s
        self._iterations: list[Iteration] = []
        size, context = rows.capacity.block_size, bench.opened.limits.max_model_len
        shares: list[int] = []
        for count in range(1, len(arrived) + 1):
            longest = max(answer.limit for answer in arrived[:count])
            kept = [min(len(answer.request.token_ids) + longest, context) for answer in arrived[:count]]
            wanted = [blocks_for(tokens, size) for tokens in kept]
            if shares and sum(wanted) > rows.capacity.blocks:
                break
            shares = wanted
        self.rows: list[Row] = []
        for number, share in enumerate(shares):
            first = sum(shares[:number])
            blocks = range(first, first + share)
            self.rows.append(Row(number, blocks, arrived[number], list(arrived[number].request.token_ids)))

    def run(self) -> Sequence[Iteration]:
        """Its steps; every answer is whole then."""
        while prompts := [row for row in self.rows if row.left and not row.answer.token_ids]:
            self._step(self._chunks(prompts))
        context = self._bench.opened.limits.max_model_len
        while any(row.answer.reason is None for row in self.rows):
            # A row may be full before the batch has ended, never before its own answer has.
            self._step([(row, 1) for row in self.rows if len(row.token_ids) < context])
        for row in self.rows:
            self._backend.release(row)
        return self._iterations

    def _chunks(self, prompts: Sequence[Row]) -> list[tuple[Row, int]]:
        """As much of the prompts, in order, as one step computes."""
        spans = []
        budget = self._backend.capacity.max_tokens
        for row in prompts:
            if count := min(row.left, budget):
                spans.append((row, count))
                budget -= count
        return spans

    def _step(self, spans: Sequence[tuple[Row, int]]) -> None:
        in_flight = sum(row.answer.reason is None for row in self.rows)
        tokens = self._backend.step(spans)
        elapsed_s = self._bench.clock() - self._began_s
        self._iterations.append(Iteration(elapsed_s, in_flight, sum(count for _, count in spans)))
        for (row, _), token in zip(spans, tokens, strict=True):
            if token is not None and row.answer.reason is None:
                row.answer.take(token, elapsed_s)
