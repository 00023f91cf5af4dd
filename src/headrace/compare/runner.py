"""The experiment: every method in every round, then the two verdicts. A method that fails loses its own row alone."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from headrace.compare.machine import Machine, probe_machine
from headrace.compare.measure import Timing, batching_bound, run_rounds, time_method
from headrace.compare.methods import BASE, Method, Outcome
from headrace.compare.methods.bench import Bench
from headrace.compare.methods.registry import make_method
from headrace.compare.score import Known, is_reference, loader, reference_of, score
from headrace.compare.verdict import Divergence, SameModel, Scored, same_arithmetic, same_model
from headrace.compare.workloads import Workload
from headrace.core.config import ResolvedConfig
from headrace.core.errors import HeadraceError
from headrace.engine.hardware import peak_rss_bytes
from headrace.engine.model import OpenModel
from headrace.text.detokenize import Detokenizer


@dataclass(frozen=True, slots=True)
class MethodResult:
    """A method that ran in every round."""

    name: str
    description: str
    exact: bool
    """Whether it promises the base's own token ids."""
    rounds: tuple[Outcome, ...]
    load_s: float
    timing: Timing
    divergence: Divergence | None
    """Verdict 1, same arithmetic: where a round's token ids first leave the base's first round; None: identical."""
    same_model: SameModel
    """Verdict 2: the worst of the rounds' answers."""

    @property
    def identical(self) -> bool:
        return self.divergence is None


@dataclass(frozen=True, slots=True)
class Failure:
    """A method that could not run here, or broke off."""

    name: str
    description: str
    reason: str


@dataclass(frozen=True, slots=True)
class Comparison:
    """Everything a report says. The first method is the base."""

    methods: tuple[MethodResult, ...]
    failures: tuple[Failure, ...]
    workload: Workload
    texts: Mapping[str, tuple[str, ...]]
    """Method -> the answers of its first round, as text."""
    bound: float
    """Batching bound of the base's answers (`measure.batching_bound`)."""
    one_scoring: bool
    """The methods run in the reference's own arithmetic: one teacher-forced run served both sides of verdict 2."""
    load_s: float
    """Of the base's model."""
    repeats: int
    peak_rss_bytes: int
    """Of the process, up to the end of the rounds."""
    model: str
    """Path of the file or folder."""
    model_name: str
    fingerprint: str
    config: ResolvedConfig
    machine: Machine
    measured_at: str
    """Date and time of the end, UTC."""

    @property
    def base(self) -> MethodResult:
        return self.methods[0]


Runs = Mapping[str, tuple[Outcome, ...]]
"""Method -> its rounds."""
Progress = Callable[[str], None]
"""Hears what is being done now."""


def compare(
    opened: OpenModel, workload: Workload, names: Sequence[str], repeats: int, progress: Progress
) -> Comparison:
    """Runs `names` (the base first) `repeats` times, and judges. Raises ModelError or EngineError where the base
    fails, InvalidParameter for a name that is no method."""
    bench = Bench(opened)
    methods = {name: make_method(name, bench) for name in names}
    failures: list[Failure] = []

    def fail(name: str, error: HeadraceError) -> None:
        if name == BASE:
            raise error
        failures.append(Failure(name, methods[name].description, str(error)))
        methods[name].close()

    loaded: dict[str, float] = {}
    try:
        for name, method in methods.items():
            progress(f"loading: {name}")
            try:
                loaded[name] = method.start(workload)
            except HeadraceError as error:
                fail(name, error)
        runs = run_rounds([methods[name] for name in loaded], workload, repeats, progress, fail)
        peak = peak_rss_bytes()
    finally:
        for method in methods.values():
            method.close()
        bench.close()
    # The engine's weights go before those of the scoring come: two copies might not fit.
    del bench
    gc.collect()
    progress("scoring the answers")
    configs = {name: methods[name].config for name in runs}
    scored = score_runs(opened, workload, runs, configs)
    return Comparison(
        methods=judge_runs(runs, scored, methods, loaded),
        failures=tuple(failures),
        workload=workload,
        texts={name: tuple(_text(opened, output) for output in outcomes[0].outputs) for name, outcomes in runs.items()},
        bound=batching_bound([len(output) for output in runs[BASE][0].outputs]),
        one_scoring=is_reference(opened.config),
        load_s=loaded[BASE],
        repeats=repeats,
        peak_rss_bytes=peak,
        model=_printable(opened.checkpoint.path),
        model_name=_printable(opened.checkpoint.path.resolve()).rpartition("/")[2],
        fingerprint=opened.checkpoint.fingerprint(),
        config=opened.config,
        machine=probe_machine(),
        measured_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )


Scores = Mapping[tuple[str, int, tuple[int, ...]], Scored]
"""(method, question, output) -> its score."""


def score_runs(
    opened: OpenModel, workload: Workload, runs: Runs, configs: Mapping[str, ResolvedConfig | None]
) -> Scores:
    """Teacher-forces every distinct answer of every round, in the arithmetic of the method that gave it.

    `configs`: of each method; None: an engine from outside, whose logits nobody knows.
    """
    found: dict[tuple[str, int, tuple[int, ...]], Scored] = {}
    reference = reference_of(opened.config)
    left = list(runs)
    while left:
        config = configs[left[0]]
        names = [name for name in left if configs[name] == config]
        left = [name for name in left if name not in names]
        answers = dict.fromkeys(
            (question, output)
            for name in names
            for outcome in runs[name]
            for question, output in enumerate(outcome.outputs)
        )
        known: list[Known] = [(workload.prompts[question], output) for question, output in answers]
        longest = max(len(prompt) + len(output) for prompt, output in known)
        by_fp32 = loader(opened, reference, longest)
        if config is None:
            scores = [one.without_kl() for one in score(known, opened.config.block_size, by_fp32, None)]
        else:
            other = None if is_reference(config) else by_fp32
            scores = score(known, config.block_size, loader(opened, config, longest), other)
        for answer, one in zip(answers, scores, strict=True):
            for name in names:
                found[name, *answer] = one
    return found


def judge_runs(
    runs: Runs, scores: Scores, methods: Mapping[str, Method], loaded: Mapping[str, float]
) -> tuple[MethodResult, ...]:
    """Both verdicts and the timing of every method."""
    base = runs[BASE]
    expected = base[0].outputs
    base_margins = [scores[BASE, question, output].margins for question, output in enumerate(expected)]
    results = []
    for name, outcomes in runs.items():
        distinct = dict.fromkeys(outcome.outputs for outcome in outcomes)
        qualities = [
            same_model(outputs, [scores[name, question, output] for question, output in enumerate(outputs)])
            for outputs in distinct
        ]
        results.append(
            MethodResult(
                name=name,
                description=methods[name].description,
                exact=methods[name].exact,
                rounds=outcomes,
                load_s=loaded[name],
                timing=time_method(outcomes, base),
                divergence=same_arithmetic(expected, [outcome.outputs for outcome in outcomes], base_margins),
                same_model=max(qualities, key=lambda quality: (not quality.lossless, quality.mean_kl or 0.0)),
            )
        )
    return tuple(results)


def _printable(path: Path) -> str:
    """A file name need not be valid text."""
    return os.fsencode(path).decode("utf-8", "replace")


def _text(opened: OpenModel, token_ids: Sequence[int]) -> str:
    detokenizer = Detokenizer(opened.tokenizer, True)
    return detokenizer.push(list(token_ids)) + detokenizer.finish()
