"""Threads over one model: each answers a request by itself, and they take turns at computing."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from types import TracebackType

from headrace.compare.methods import Iteration, Outcome, RequestRun
from headrace.compare.methods.bench import Bench
from headrace.compare.methods.rows import Answer, Row, Rows, open_answers, tokens_kept, wait_until
from headrace.compare.workloads import Workload
from headrace.core.config import ResolvedConfig
from headrace.core.errors import ConfigError
from headrace.core.sizing import blocks_for

MOST = 8
"""Threads, unless more are asked for."""


class ThreadsMethod:
    """A thread pool over the bench's backend, without a scheduler."""

    exact = True

    def __init__(self, name: str, threads: int | None, bench: Bench) -> None:
        """`threads`: None: one a request, at most `MOST`."""
        self.name = name
        self.config: ResolvedConfig | None = bench.opened.config
        self._bench = bench
        self._asked = threads
        self._threads = threads or MOST
        self.description = self._describe("")

    def start(self, workload: Workload) -> float:
        """Raises ConfigError where the engine's limits do not let so many threads have a request each."""
        _, capacity = self._bench.backend
        kept = tokens_kept(self._bench.opened, workload)
        fitting = capacity.blocks // blocks_for(kept, capacity.block_size)
        most = min(fitting, capacity.max_rows)
        why = f"the KV cache holds {fitting} requests of {kept} tokens, max_num_seqs is {capacity.max_rows}"
        if self._asked is not None and self._asked > most:
            raise ConfigError(f"{self.name}: {self._asked} threads, allowed: up to {most} ({why})")
        wanted = self._asked or min(MOST, len(workload.requests))
        self._threads = min(wanted, most)
        self.description = self._describe("" if self._threads == wanted else f"; no more: {why}")
        return self._bench.load_s

    def run(self, workload: Workload) -> Outcome:
        bench = self._bench
        answers = open_answers(bench.opened, workload, self.name)
        with bench.rows() as rows:
            return _Run(bench, rows, answers, self._threads).run()

    def close(self) -> None:
        """Nothing is the method's own."""

    def _describe(self, cap: str) -> str:
        each = "a request each, each in calls of its own to the one model, by turns"
        return f"a pool of {self._threads} Python threads: {each}{cap}"


class _Turns:
    """A lock that goes to whoever has waited longest. A plain one mostly goes back to the thread that has just given it
    up, so that requests would be answered one after the other."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._tickets = 0
        self._turn = 0

    def __enter__(self) -> None:
        with self._changed:
            mine = self._tickets
            self._tickets += 1
            self._changed.wait_for(lambda: self._turn == mine)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._changed:
            self._turn += 1
            self._changed.notify_all()


class _Run:
    """One run: what its threads share. All of it but `_free` belongs to the thread whose turn it is."""

    def __init__(self, bench: Bench, rows: Rows, answers: Sequence[Answer], threads: int) -> None:
        self._bench = bench
        self._rows = rows
        self._answers = answers
        self._threads = threads
        self._turns = _Turns()
        share = rows.capacity.blocks // threads
        self._free: SimpleQueue[tuple[int, range]] = SimpleQueue()
        """(row, its blocks), one for each thread."""
        for number in range(threads):
            self._free.put((number, range(number * share, (number + 1) * share)))
        self._in_flight = 0
        self._iterations: list[Iteration] = []
        self._error: BaseException | None = None
        """Why all threads are to stop."""
        self._began_s = bench.clock()

    def run(self) -> Outcome:
        bench = self._bench
        with ThreadPoolExecutor(self._threads, "headrace-compare") as pool:
            try:
                for answer in self._answers:
                    wait_until(self._began_s + answer.arrival_s, bench.clock, bench.sleep)
                    if self._error is not None:
                        break
                    pool.submit(self._serve, answer)
                pool.shutdown()
            except BaseException as error:  # Ctrl-C: the threads are not to answer all that is left
                self._error = error
                raise
        if self._error is not None:
            raise self._error
        requests: tuple[RequestRun, ...] = tuple(answer.run() for answer in self._answers)
        return Outcome(
            requests=requests,
            seconds=max(one.end_s for one in requests),
            iterations=tuple(self._iterations),
            computed_tokens=self._rows.computed_tokens,
        )

    def _serve(self, answer: Answer) -> None:
        """In a thread: one request, from its prompt to its end."""
        number, blocks = self._free.get()
        row = Row(number, blocks, answer, list(answer.request.token_ids))
        try:
            while answer.reason is None:
                with self._turns:
                    if self._error is not None:
                        return
                    try:
                        self._compute(row)
                    except BaseException as error:
                        self._error = error
                        raise
        finally:
            self._free.put((number, blocks))

    def _compute(self, row: Row) -> None:
        """One call to the model, for this row alone."""
        self._in_flight += row.computed == 0
        count = min(row.left, self._rows.capacity.max_tokens)
        (token,) = self._rows.step([(row, count)])
        elapsed_s = self._bench.clock() - self._began_s
        self._iterations.append(Iteration(elapsed_s, self._in_flight, count))
        if token is not None:
            row.answer.take(token, elapsed_s)
        if row.answer.reason is not None:
            self._in_flight -= 1
            self._rows.release(row)
