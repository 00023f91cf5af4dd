"""The experiment: every method in every round, then the two verdicts. A method that fails loses its own row alone."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean

from headrace.compare.arithmetic import order_follows_batch, warms_up_whole
from headrace.compare.arrivals import Poisson, arrive
from headrace.compare.break_even import BreakEven, break_even
from headrace.compare.figures import Figures, Prices, Slo, figures_of
from headrace.compare.machine import Machine, probe_machine
from headrace.compare.measure import Timing, batching_bound, run_rounds, time_method
from headrace.compare.methods import BASE, Method, Outcome
from headrace.compare.methods.bench import Bench, share_card
from headrace.compare.methods.registry import make_method
from headrace.compare.peer_setup import PeerCache
from headrace.compare.score import Known, loader, measure_epsilon, reference_here, score
from headrace.compare.verdict import (
    Divergence,
    Epsilon,
    MethodVerdict,
    RequestVerdict,
    SameModel,
    Scored,
    Verdict,
    divergences,
    method_verdict,
    same_arithmetic,
    same_model,
    worst_of_rounds,
)
from headrace.compare.workloads import Workload
from headrace.core.config import ResolvedConfig
from headrace.core.errors import HeadraceError
from headrace.engine.energy import Meter
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
    config: ResolvedConfig | None
    """As `Method.config`."""
    rounds: tuple[Outcome, ...]
    load_s: float
    timing: Timing
    figures: Figures
    divergence: Divergence | None
    """Verdict 1, same arithmetic: where a round's token ids first leave the base's first round; None: identical."""
    divergences: tuple[RequestVerdict, ...]
    """The same of each request: the worst of its rounds."""
    same_model: SameModel
    """Verdict 2: the worst of the rounds' answers."""

    @property
    def identical(self) -> bool:
        return self.divergence is None

    @property
    def kept(self) -> bool:
        """Whether its tokens are what a method of ours promises: the base's; where the order of summation follows the
        batch, the base's but for near-ties."""
        if self.identical:
            return True
        return self.exact and order_follows_batch(self.config) and self.verdict.kind is Verdict.NEAR_TIE

    @property
    def verdict(self) -> MethodVerdict:
        return method_verdict(self.divergences)


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
    margins: tuple[tuple[float, ...], ...]
    """For every token of the base's first answers, the difference of its two largest logits there."""
    epsilon: Epsilon
    """Which margin counts as a tie in the base's arithmetic."""
    reference: ResolvedConfig
    """What verdict 2 refers to: `score.reference_here`."""
    wishes: Wishes
    load_s: float
    """Of the base's model."""
    repeats: int
    peak_rss_bytes: int
    """The highest of this process while it loaded, and of any method in a run."""
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

    @property
    def one_scoring(self) -> bool:
        """The methods run in the reference's own arithmetic: one teacher-forced run served both sides of verdict 2."""
        return self.config == self.reference


@dataclass(frozen=True, slots=True)
class Wishes:
    """What the user wants of the methods, and what things cost."""

    objective: str = "time"
    """What the best method has least of: time, cost, energy or memory."""
    slo: Slo | None = None
    prices: Prices = field(default_factory=Prices)


@dataclass(frozen=True, slots=True)
class Outside:
    """What methods from outside need."""

    peers: PeerCache | None = None
    """Where other engines are set up."""
    api_key: str = ""
    """For a server's Authorization header."""


SEED = 0
"""Of the arrivals of `find_break_even`: every method has the same."""
Runs = Mapping[str, tuple[Outcome, ...]]
"""Method -> its rounds."""
Progress = Callable[[str], None]
"""Hears what is being done now."""


def compare(
    opened: OpenModel,
    workload: Workload,
    names: Sequence[str],
    repeats: int,
    progress: Progress,
    wishes: Wishes | None = None,
    outside: Outside | None = None,
    meters: Sequence[Meter] = (),
) -> Comparison:
    """Runs `names` (the base first) `repeats` times, and judges. `meters`: of the machine's energy.

    Raises ModelError or EngineError where the base fails, InvalidParameter for a name that is no method.
    """
    wishes, outside = wishes or Wishes(), outside or Outside()
    share_card(opened, workload)
    reference = reference_here(opened, workload.longest)
    bench = Bench(opened)
    methods = {name: make_method(name, bench, outside.peers, outside.api_key) for name in names}
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
        after_loading = peak_rss_bytes()
        ready = [methods[name] for name in loaded]
        runs = run_rounds(ready, workload, repeats, progress, fail, meters, warms_up_whole(opened.config))
        # Each run begins with a fresh peak, where the system allows that.
        peaks = [outcome.peak_rss_bytes or 0 for outcomes in runs.values() for outcome in outcomes]
        peak = max(peak_rss_bytes(), after_loading, *peaks)
    finally:
        for method in methods.values():
            method.close()
        bench.close()
    # The engine's weights go before those of the scoring come: two copies might not fit.
    del bench
    gc.collect()
    progress("scoring the answers")
    configs = {name: methods[name].config for name in runs}
    scored = score_runs(opened, workload, runs, configs, reference)
    answers = list(zip(workload.prompts, runs[BASE][0].outputs, strict=True))
    differ = any(outcome.outputs != runs[BASE][0].outputs for outcomes in runs.values() for outcome in outcomes)
    # Where they may differ, those of a later run of a certificate may.
    wanted = differ or order_follows_batch(opened.config)
    epsilon = measure_epsilon(opened, opened.config, answers) if wanted else Epsilon(0.0, 0, "no answer differs")
    return Comparison(
        methods=judge_runs(runs, scored, methods, loaded, epsilon, wishes),
        failures=tuple(failures),
        workload=workload,
        texts={name: tuple(_text(opened, output) for output in outcomes[0].outputs) for name, outcomes in runs.items()},
        bound=batching_bound([len(output) for output in runs[BASE][0].outputs]),
        margins=tuple(scored[BASE, index, output].margins for index, (_, output) in enumerate(answers)),
        epsilon=epsilon,
        reference=reference,
        wishes=wishes,
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
    opened: OpenModel,
    workload: Workload,
    runs: Runs,
    configs: Mapping[str, ResolvedConfig | None],
    reference: ResolvedConfig,
) -> Scores:
    """Teacher-forces every distinct answer of every round, in the arithmetic of the method that gave it, and in that of
    `reference`.

    `configs`: of each method; None: an engine from outside, whose logits nobody knows.
    """
    found: dict[tuple[str, int, tuple[int, ...]], Scored] = {}
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
        images = [workload.requests[question].images for question, _ in answers]
        longest = max(len(prompt) + len(output) for prompt, output in known)
        by_fp32 = loader(opened, reference, longest)
        if config is None:
            scores = [one.without_kl() for one in score(known, opened.config.block_size, by_fp32, None, images)]
        else:
            other = None if config == reference else by_fp32
            scores = score(known, config.block_size, loader(opened, config, longest), other, images)
        for answer, one in zip(answers, scores, strict=True):
            for name in names:
                found[name, *answer] = one
    return found


def judge_runs(
    runs: Runs,
    scores: Scores,
    methods: Mapping[str, Method],
    loaded: Mapping[str, float],
    epsilon: Epsilon,
    wishes: Wishes,
) -> tuple[MethodResult, ...]:
    """Both verdicts, the timing and the figures of every method."""
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
                config=methods[name].config,
                rounds=outcomes,
                load_s=loaded[name],
                timing=time_method(outcomes, base),
                figures=figures_of(outcomes, wishes.slo, wishes.prices),
                divergence=same_arithmetic(expected, [outcome.outputs for outcome in outcomes], base_margins),
                divergences=worst_of_rounds(
                    [divergences(expected, one.outputs, base_margins, epsilon.value) for one in outcomes]
                ),
                same_model=max(qualities, key=lambda quality: (not quality.lossless, quality.mean_kl or 0.0)),
            )
        )
    return tuple(results)


def find_break_even(
    opened: OpenModel,
    workload: Workload,
    names: tuple[str, str],
    rates: tuple[float, float],
    budget_s: float,
    progress: Progress,
    outside: Outside,
) -> BreakEven:
    """The arrival rate, between the two `rates` in requests a second, at which two methods change places in mean
    latency: the workload's requests, arriving as a Poisson process. `budget_s`: about how long it may take."""
    until_s = time.monotonic() + budget_s
    bench = Bench(opened)
    methods = {name: make_method(name, bench, outside.peers, outside.api_key) for name in names}

    def measure(name: str, rate: float) -> float:
        progress(f"break-even: {name} at {rate:.3g} requests/s")
        outcome = methods[name].run(arrive(workload, Poisson.of_rate(rate), SEED))
        return fmean(request.latency_s for request in outcome.requests)

    try:
        for method in methods.values():
            method.start(workload)
        return break_even(measure, names, *rates, go_on=lambda: time.monotonic() < until_s)
    finally:
        for method in methods.values():
            method.close()
        bench.close()


def _printable(path: Path) -> str:
    """A file name need not be valid text."""
    return os.fsencode(path).decode("utf-8", "replace")


def _text(opened: OpenModel, token_ids: Sequence[int]) -> str:
    """For a reader; of a model without a tokenizer the ids."""
    if not opened.has_text:
        return f"token ids {' '.join(map(str, token_ids))}"
    detokenizer = Detokenizer(opened.tokenizer, True)
    return detokenizer.push(list(token_ids)) + detokenizer.finish()
