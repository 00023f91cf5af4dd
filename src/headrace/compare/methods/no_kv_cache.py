"""One request at a time without a KV cache: what the cache is worth."""

from __future__ import annotations

from headrace.compare.methods import Iteration, Outcome
from headrace.compare.methods.bench import Bench
from headrace.compare.methods.rows import Row, open_answers, wait_until
from headrace.compare.workloads import Workload
from headrace.core.config import ResolvedConfig

DESCRIPTION = (
    "one request at a time without a KV cache: each token computes the prompt and the whole answer so far again, which "
    "grows with the square of the length"
)


class NoKvCacheMethod:
    """Serial; for every token the sequence enters the backend as a new one."""

    exact = True
    description = DESCRIPTION

    def __init__(self, name: str, bench: Bench) -> None:
        self.name = name
        self.config: ResolvedConfig | None = bench.opened.config
        self._bench = bench

    def start(self, workload: Workload) -> float:
        _ = self._bench.backend
        return self._bench.load_s

    def run(self, workload: Workload) -> Outcome:
        bench = self._bench
        answers = open_answers(bench.opened, workload, self.name)
        iterations: list[Iteration] = []
        with bench.rows() as rows:
            blocks = range(rows.capacity.blocks)
            began_s = bench.clock()
            for answer in answers:
                wait_until(began_s + answer.arrival_s, bench.clock, bench.sleep)
                while answer.reason is None:
                    row = Row(0, blocks, answer, list(answer.known))
                    token = None
                    while token is None:
                        count = min(row.left, rows.capacity.max_tokens)
                        (token,) = rows.step([(row, count)])
                        iterations.append(Iteration(bench.clock() - began_s, 1, count))
                    rows.release(row)
                    answer.take(token, iterations[-1].end_s)
        requests = tuple(answer.run() for answer in answers)
        return Outcome(
            requests=requests,
            seconds=max(one.end_s for one in requests),
            iterations=tuple(iterations),
            computed_tokens=rows.computed_tokens,
        )

    def close(self) -> None:
        """Nothing is the method's own."""
