"""After a comparison: what `headrace plan model` says of the same runs is stored beside what was measured.

Of the methods there are formulas for two: `serial`, one request at a time, and `fused`, all of them in one batch; on
the native backend of a machine that was probed. Nothing else is guessed at.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import TYPE_CHECKING

from headrace.core.errors import HeadraceError

if TYPE_CHECKING:
    from headrace.compare.methods import Outcome, RequestRun
    from headrace.compare.runner import Comparison, MethodResult
    from headrace.plan.profile import Profile

FUSED = "fused"
MOSTLY = 0.9
"""A batch whose requests are in flight together for this share of its steps is one of that size."""
Numbers = Mapping[str, float]


def remember(comparison: Comparison, model: str, environ: Mapping[str, str]) -> str:
    """-> a line about what was stored or why not; empty where plan has no formula for this comparison, or no probe.

    `model`: as the user named it. Never raises: a comparison does not fail for what is kept of it.
    """
    from headrace.cli.console import state_folder
    from headrace.plan.profile import default_path as profile_path
    from headrace.plan.profile import read_profile

    folder, config = state_folder(environ), comparison.config
    if folder is None or config.backend != "native" or not profile_path(folder).is_file():
        return ""
    try:
        profile = read_profile(profile_path(folder))
        machine = profile.machine
        if (machine.cpu, machine.threads) != (comparison.machine.cpu, config.threads):
            return ""
        count = _store(comparison, model, profile, folder)
    except HeadraceError as error:
        return f"not stored for headrace plan --accuracy: {error}"
    return f"{count} numbers stored beside their predictions: headrace plan --accuracy"


def _store(comparison: Comparison, model: str, profile: Profile, folder: Path) -> int:
    from headrace.plan.calibration import Context, Store, default_path, machine_key, record_run
    from headrace.plan.model import numbers, predict
    from headrace.plan.speed import ProbedSpeed, native_weights
    from headrace.plan.subject import read_subject

    config, subject = comparison.config, read_subject(model)
    speed = ProbedSpeed(subject.spec, native_weights(subject, config.quant, config.dtype), profile, config.kv_dtype)
    store = Store(default_path(folder))
    key = machine_key(profile.machine.cpu, profile.machine.threads)
    context = Context(key, subject.name, "compare", measured_at=comparison.measured_at)
    prompt = round(fmean(map(len, comparison.workload.prompts)))
    count = 0
    for requests, output, measured in measured_runs(comparison):
        said = predict(speed, subject.spec, config.kv_dtype, requests, prompt, output)
        count += record_run(store, numbers(said), measured, context)
    return count


def measured_runs(comparison: Comparison) -> Iterator[tuple[int, int, Numbers]]:
    """(requests at a time, mean tokens of an answer, what was measured by plan's names) of each method that plan knows
    and that ran in the comparison's own arithmetic."""
    workload = comparison.workload
    if any(request.images for request in workload.requests):
        return
    known = {one.name: one for one in comparison.methods if one.config == comparison.config}
    base, fused = known.get(comparison.base.name), known.get(FUSED)
    if base is not None and (output := _mean_output(base)) > 1:
        waits = [wait for outcome in base.rounds for wait in waits_alone(outcome)]
        yield 1, output, _positive({"ttft_s": waits, "itl_s": _gaps(base), "tokens_per_s": _rates(base)})
    count = len(workload.requests)
    together = fused is not None and fused.figures.overlap is not None and fused.figures.overlap.median >= MOSTLY
    if fused is not None and together and count > 1 and (output := _mean_output(fused)) > 1:
        yield count, output, _positive({"itl_s": _gaps(fused), "tokens_per_s": _rates(fused)})


def waits_alone(outcome: Outcome) -> list[float]:
    """Seconds to each first token where one request runs at a time: from its arrival, or from the end of the one before
    it if that is later."""
    free_s, waits = 0.0, []
    for request in sorted((one for one in outcome.requests if one.token_s), key=lambda one: one.token_s[0]):
        waits.append(request.token_s[0] - max(free_s, request.arrival_s))
        free_s = request.token_s[-1]
    return waits


def _mean_output(method: MethodResult) -> int:
    outcome = method.rounds[0]
    return round(outcome.output_tokens / len(outcome.requests))


def _gaps(method: MethodResult) -> list[float]:
    """Seconds a token of each answer after its first: a batch's events may bring several at once."""
    from headrace.compare.figures import time_per_token

    requests: list[RequestRun] = [one for outcome in method.rounds for one in outcome.requests]
    return [gap for one in requests if (gap := time_per_token(one)) is not None]


def _rates(method: MethodResult) -> list[float]:
    return [outcome.output_tokens / outcome.seconds for outcome in method.rounds if outcome.seconds > 0]


def _positive(measured: Mapping[str, Sequence[float]]) -> Numbers:
    """Medians; without what was not measured, or is 0."""
    found = {name: median(values) for name, values in measured.items() if values}
    return {name: value for name, value in found.items() if value > 0}
