"""The comparison as a folder of tables for other programs: comma-separated, UTF-8, a heading line, times in seconds.

`COLUMNS` says what every column means, and goes into the folder too, as columns.csv. A figure that a method does not
tell is an empty cell. Requests and rounds count from 1.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TextIO

from headrace.compare.cells import differing, median_round
from headrace.compare.curves import token_points
from headrace.compare.figures import Figures, Prices, figures_of
from headrace.compare.methods import Outcome
from headrace.compare.runner import Comparison, MethodResult
from headrace.core.errors import InvalidParameter

Row = Sequence[object]

METHOD = ("method", "name of the method")
ROUND = ("round", "number of the round")
COLUMNS: Mapping[str, Sequence[tuple[str, str]]] = {
    "methods.csv": (
        METHOD,
        ROUND,
        ("seconds", "s, from the start of the run to the end of its last answer; loading is not in it"),
        ("ratio_to_serial", "seconds of serial in the same round / seconds; above 1: faster"),
        ("output_tokens", "generated tokens of all requests"),
        ("output_tokens_per_s", "tokens/s: output_tokens / seconds"),
        ("requests_per_min", "1/min, from the first arrival to the last end"),
        *(
            (f"{kind}_{part}_s", f"s, {said}: {part} over {over}")
            for kind, said, over in (
                ("ttft", "from a request's arrival to its first token", "its requests"),
                ("itl", "between consecutive tokens of a request", "all gaps"),
                ("tpot", "(last token - first) / (tokens - 1)", "its requests"),
                ("e2e", "from a request's arrival to its last token", "its requests"),
            )
            for part in ("mean", "p50", "p95", "p99")
        ),
        ("iterations", "steps of the model"),
        ("mean_in_flight", "requests in the batch, mean over the iterations"),
        ("overlap", "mean_in_flight / number of requests, 0 to 1"),
        ("computed_tokens", "tokens that went through the model, prompts included"),
        ("preemptions", "requests that lost their memory and were computed again"),
        ("cpu_s", "s of processor time of all processes of the method"),
        ("peak_rss_bytes", "bytes, highest resident memory of all processes of the method"),
        ("joules", "J of the whole machine"),
        ("energy_source", "where the joules are from; an estimate says so"),
        ("load_s", "s that loading took, once"),
        ("identical", "true: every answer of every round has serial's own token ids"),
    ),
    "requests.csv": (
        METHOD,
        ROUND,
        ("request", "number of the request in the workload"),
        ("arrival_s", "s from the start of the run"),
        ("first_token_s", "s from the start of the run; empty: no token"),
        ("end_s", "s from the start of the run"),
        ("ttft_s", "s: first_token_s - arrival_s"),
        ("prompt_tokens", "tokens of the prompt"),
        ("output_tokens", "generated tokens"),
        ("finish_reason", "stop: ended by itself; length: cut at its limit"),
    ),
    "progress.csv": (
        METHOD,
        ("round", "the round whose time is nearest to the method's median: the only one here"),
        ("t_s", "s from the start of the run, at which tokens came"),
        ("tokens", "output tokens so far, of all requests"),
        ("fraction", "tokens / output tokens of the run"),
    ),
    "completions.csv": (
        METHOD,
        ("round", "as in progress.csv"),
        ("t_s", "s from the start of the run, at which a request ended"),
        ("request", "which"),
        ("completed", "requests that have ended so far"),
        ("fraction", "completed / requests"),
    ),
}
"""File -> (column, meaning with unit)."""
INDEX = "columns.csv"
ALLOWED = "a folder that can be made and written to"


class CsvFolder:
    """A folder that was seen to be writable before the work. Raises InvalidParameter, naming `field`, if it is not."""

    def __init__(self, field: str, path: str) -> None:
        self.path = path
        self._folder = Path(path)
        refusal = InvalidParameter(field, path, ALLOWED)
        try:
            if not path:
                raise refusal
            made = not self._folder.exists()
            self._folder.mkdir(exist_ok=True)
            probe = self._temporary("probe")
            probe.touch()
            probe.unlink()
            if made:
                self._folder.rmdir()
        except (OSError, ValueError) as error:
            raise refusal from error

    def write(self, comparison: Comparison) -> None:
        """All files, each whole or not at all; what else is in the folder stays. Raises OSError."""
        self._folder.mkdir(exist_ok=True)
        tables = {
            "methods.csv": _methods(comparison),
            "requests.csv": _requests(comparison),
            "progress.csv": _progress(comparison),
            "completions.csv": _completions(comparison),
        }
        for name, rows in tables.items():
            self._write(name, [column for column, _ in COLUMNS[name]], rows)
        told = ((name, column, said) for name, columns in COLUMNS.items() for column, said in columns)
        self._write(INDEX, ("file", "column", "meaning"), told)

    def write_texts(self, texts: Mapping[str, str]) -> None:
        """Files that are made already: name -> content. The same otherwise."""
        self._folder.mkdir(exist_ok=True)
        for name, text in texts.items():
            self._keep(name, partial(_put, text))

    def _write(self, name: str, head: Sequence[str], rows: Iterable[Row]) -> None:
        def write(file: TextIO) -> None:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(head)
            writer.writerows(rows)

        self._keep(name, write)

    def _keep(self, name: str, write: Callable[[TextIO], object]) -> None:
        temporary = self._temporary(name)
        try:
            with temporary.open("w", encoding="utf-8", newline="") as file:
                write(file)
            temporary.replace(self._folder / name)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise

    def _temporary(self, name: str) -> Path:
        return self._folder / f".{name}.{os.getpid()}.tmp"


def _put(text: str, file: TextIO) -> None:
    file.write(text)


def _methods(comparison: Comparison) -> Iterator[Row]:
    for result in comparison.methods:
        identical = "false" if differing(result) else "true"
        rounds = zip(result.rounds, result.timing.ratios, strict=True)
        for number, (outcome, ratio) in enumerate(rounds, 1):
            figures = figures_of([outcome], None, Prices())
            yield (
                result.name,
                number,
                outcome.seconds,
                ratio,
                outcome.output_tokens,
                figures.output_tokens_per_s.median,
                figures.requests_per_min.median,
                *_latencies(figures),
                *_median(figures, "iterations", "mean_in_flight", "overlap"),
                outcome.computed_tokens,
                outcome.preemptions,
                outcome.cpu_s,
                outcome.peak_rss_bytes,
                *_median(figures, "joules"),
                figures.energy_source,
                result.load_s,
                identical,
            )


def _latencies(figures: Figures) -> Iterator[float | None]:
    for latency in (figures.ttft, figures.itl, figures.tpot, figures.e2e):
        if latency is None:
            yield from (None,) * 4
        else:
            yield from (one.median for one in (latency.mean, latency.p50, latency.p95, latency.p99))


def _median(figures: Figures, *names: str) -> Iterator[float | None]:
    for name in names:
        spread = getattr(figures, name)
        yield None if spread is None else spread.median


def _requests(comparison: Comparison) -> Iterator[Row]:
    for result in comparison.methods:
        for number, outcome in enumerate(result.rounds, 1):
            for index, (asked, answer) in enumerate(zip(comparison.workload.requests, outcome.requests, strict=True)):
                yield (
                    result.name,
                    number,
                    index + 1,
                    answer.arrival_s,
                    answer.token_s[0] if answer.token_s else None,
                    answer.end_s,
                    answer.ttft_s if answer.token_s else None,
                    len(asked.token_ids),
                    len(answer.token_ids),
                    answer.finish_reason,
                )


def _progress(comparison: Comparison) -> Iterator[Row]:
    for result in comparison.methods:
        number, outcome = _median_round(result)
        total = max(1, outcome.output_tokens)
        for at, tokens in token_points(outcome):
            yield result.name, number, at, tokens, tokens / total


def _completions(comparison: Comparison) -> Iterator[Row]:
    for result in comparison.methods:
        number, outcome = _median_round(result)
        count = len(outcome.requests)
        ends = sorted((request.end_s, index) for index, request in enumerate(outcome.requests, 1))
        for completed, (at, index) in enumerate(ends, 1):
            yield result.name, number, at, index, completed, completed / count


def _median_round(result: MethodResult) -> tuple[int, Outcome]:
    outcome = median_round(result)
    return result.rounds.index(outcome) + 1, outcome
