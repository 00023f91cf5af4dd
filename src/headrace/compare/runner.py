"""The experiment: one loaded model, every method in every round, then the two verdicts."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from headrace.compare.machine import Machine, probe_machine
from headrace.compare.measure import Timing, batching_bound, run_rounds, time_method
from headrace.compare.methods import BASE, Outcome
from headrace.compare.methods.admission import AdmissionMethod, describe
from headrace.compare.score import Known, is_reference, loader, reference_of, score
from headrace.compare.verdict import Divergence, SameModel, Scored, same_arithmetic, same_model
from headrace.compare.workloads import Workload
from headrace.core.config import ResolvedConfig
from headrace.engine.hardware import peak_rss_bytes
from headrace.engine.model import OpenModel
from headrace.text.detokenize import Detokenizer


@dataclass(frozen=True, slots=True)
class MethodResult:
    name: str
    description: str
    rounds: tuple[Outcome, ...]
    timing: Timing
    divergence: Divergence | None
    """Verdict 1, same arithmetic: where a round's token ids first leave the base's first round; None: identical."""
    same_model: SameModel
    """Verdict 2: the worst of the rounds' answers."""

    @property
    def identical(self) -> bool:
        return self.divergence is None


@dataclass(frozen=True, slots=True)
class Comparison:
    """Everything a report says. The first method is the base."""

    methods: tuple[MethodResult, ...]
    workload: Workload
    texts: Mapping[str, tuple[str, ...]]
    """Method -> the answers of its first round, as text."""
    bound: float
    """Batching bound of the base's answers (`measure.batching_bound`)."""
    one_scoring: bool
    """The methods run in the reference's own arithmetic: one teacher-forced run served both sides of verdict 2."""
    load_s: float
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


def compare(
    opened: OpenModel, workload: Workload, names: Sequence[str], repeats: int, progress: Callable[[str], None]
) -> Comparison:
    """Loads the model, runs `names` (the base first) `repeats` times, and judges. Raises ModelError or EngineError."""
    progress("loading the model")
    core, load_s = opened.start()
    try:
        methods = [AdmissionMethod(name, core) for name in names]
        runs = run_rounds(methods, workload, repeats, progress)
        peak = peak_rss_bytes()
    finally:
        core.close()
    # The engine's weights go before those of the scoring come: two copies might not fit.
    del core, methods
    gc.collect()
    progress("scoring the answers")
    scored = score_runs(opened, workload, runs)
    return Comparison(
        methods=judge_runs(runs, scored),
        workload=workload,
        texts={name: tuple(_text(opened, output) for output in outcomes[0].outputs) for name, outcomes in runs.items()},
        bound=batching_bound([len(output) for output in runs[BASE][0].outputs]),
        one_scoring=is_reference(opened.config),
        load_s=load_s,
        repeats=repeats,
        peak_rss_bytes=peak,
        model=_printable(opened.checkpoint.path),
        model_name=_printable(opened.checkpoint.path.resolve()).rpartition("/")[2],
        fingerprint=opened.checkpoint.fingerprint(),
        config=opened.config,
        machine=probe_machine(),
        measured_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )


Scores = Mapping[tuple[int, tuple[int, ...]], Scored]
"""(question, output) -> its score; most methods give the same outputs, and each is scored once."""


def score_runs(opened: OpenModel, workload: Workload, runs: Mapping[str, tuple[Outcome, ...]]) -> Scores:
    """Teacher-forces every distinct answer of every round."""
    answers = dict.fromkeys(
        (question, output)
        for outcomes in runs.values()
        for outcome in outcomes
        for question, output in enumerate(outcome.outputs)
    )
    known: list[Known] = [(workload.prompts[question], output) for question, output in answers]
    longest = max(len(prompt) + len(output) for prompt, output in known)
    config = opened.config
    own = loader(opened, config, longest)
    reference = None if is_reference(config) else loader(opened, reference_of(config), longest)
    return dict(zip(answers, score(known, config.block_size, own, reference), strict=True))


def judge_runs(runs: Mapping[str, tuple[Outcome, ...]], scores: Scores) -> tuple[MethodResult, ...]:
    """Both verdicts and the timing of every method."""
    base = runs[BASE]
    expected = base[0].outputs
    base_margins = [scores[question, output].margins for question, output in enumerate(expected)]
    results = []
    for name, outcomes in runs.items():
        distinct = dict.fromkeys(outcome.outputs for outcome in outcomes)
        qualities = [
            same_model(outputs, [scores[question, output] for question, output in enumerate(outputs)])
            for outputs in distinct
        ]
        results.append(
            MethodResult(
                name=name,
                description=describe(name),
                rounds=outcomes,
                timing=time_method(outcomes, base),
                divergence=same_arithmetic(expected, [outcome.outputs for outcome in outcomes], base_margins),
                same_model=max(qualities, key=lambda quality: (not quality.lossless, quality.mean_kl)),
            )
        )
    return tuple(results)


def _printable(path: Path) -> str:
    """A file name need not be valid text."""
    return os.fsencode(path).decode("utf-8", "replace")


def _text(opened: OpenModel, token_ids: Sequence[int]) -> str:
    detokenizer = Detokenizer(opened.tokenizer, True)
    return detokenizer.push(list(token_ids)) + detokenizer.finish()
