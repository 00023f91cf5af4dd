"""What the cells of a report say, on a terminal and on a page: figures with their units, and both verdicts in words."""

from __future__ import annotations

from collections.abc import Sequence

from headrace.compare.charts import unit_of
from headrace.compare.figures import TOO_SHORT, Latency, Spread
from headrace.compare.measure import Claim
from headrace.compare.methods import Outcome
from headrace.compare.runner import Comparison, Failure, MethodResult
from headrace.compare.verdict import RequestVerdict, Verdict, kl_figure, percent

NONE = "–"
"""Of a figure that a method does not tell."""
ESTIMATED = "estimated"


def seconds_text(seconds: float) -> str:
    """Four digits or more: 0.0123, 1.234, 12.34, 123.4."""
    decimals = next(count for least, count in ((100.0, 1), (10.0, 2), (1.0, 3), (0.0, 4)) if abs(seconds) >= least)
    return f"{seconds:.{decimals}f}"


def range_text(spread: Spread) -> str:
    """The range over the rounds in seconds; empty where there is none."""
    return f"{seconds_text(spread.low)}–{seconds_text(spread.high)}" if spread.low < spread.high else ""


def rate_text(rate: float) -> str:
    """Tokens or requests in a time: one decimal, none from 1000 on."""
    return f"{rate:.0f}" if rate >= 1000 else f"{rate:.1f}"


def latency_unit(latencies: Sequence[Latency | None]) -> tuple[str, float]:
    """(unit, units a second) that suits a column of latencies."""
    return unit_of(max((one.p95.median for one in latencies if one is not None), default=0.0))


def memory_text(size: int | None) -> str:
    """GiB from one on, else MiB."""
    if size is None:
        return NONE
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


def joules_per_request(result: MethodResult) -> float | None:
    """Joules of the machine in a run / requests; None where they are not known."""
    joules = result.figures.joules
    return None if joules is None else joules.median / len(result.rounds[0].requests)


def energy_note(result: MethodResult) -> str:
    """Where its joules are from, or why there are none."""
    return result.figures.energy_source.replace(TOO_SHORT, ": too short").replace("+", " + ")


def is_estimated(result: MethodResult) -> bool:
    """Whether an estimate is in its joules."""
    return ESTIMATED in result.figures.energy_source


def ratio_of(result: MethodResult) -> Spread:
    """How many times as fast as the base, with its 95 % interval; the base itself: 1."""
    evidence = result.timing.evidence
    return Spread(1.0, 1.0, 1.0) if evidence is None else Spread(evidence.ratio, *evidence.interval)


def median_round(result: MethodResult) -> Outcome:
    """The round whose time is nearest to the median: what figures of one run are drawn from."""
    return min(result.rounds, key=lambda outcome: abs(outcome.seconds - result.figures.seconds.median))


def claim_words(result: MethodResult) -> str:
    """What its ratio does not say by itself; empty where the claim is plain."""
    claim = result.timing.claim
    return "" if claim in (Claim.BASE, Claim.FASTER, Claim.SLOWER) else str(claim)


def differing(result: MethodResult) -> list[RequestVerdict]:
    """The verdicts on its answers that are not identical."""
    return [one for one in result.divergences if one.kind is not Verdict.IDENTICAL]


def place_text(token: int, question: int, margin: float | None) -> str:
    """Where answers part, and how near a tie it was; counted from 1."""
    told = "" if margin is None else f", margin {margin:.2g}"
    return f"token {token + 1} of request {question + 1}{told}"


def arithmetic_lines(result: MethodResult) -> list[str]:
    """Verdict 1 in short lines."""
    verdict = result.verdict
    if verdict.kind is Verdict.IDENTICAL:
        return [str(verdict.kind)]
    counts = ((verdict.different, Verdict.DIFFERENT), (verdict.near_ties, Verdict.NEAR_TIE))
    told = [f"{kind}: {count} of {verdict.answers}" for count, kind in counts if count]
    worst = verdict.worst
    assert worst.token is not None
    margin = [] if worst.margin is None else [f"margin {worst.margin:.2g}"]
    return [*told, f"token {worst.token + 1}, req. {worst.question + 1}", *margin]


def model_lines(result: MethodResult) -> list[str]:
    """Verdict 2 in short lines."""
    quality = result.same_model
    if quality.lossless:
        return ["lossless"]
    return [f"KL {kl_figure(quality.mean_kl)}", f"top-1 {percent(quality.top1_agreement)}"]


def quality_text(result: MethodResult) -> str:
    """Verdict 2 with all of its figures."""
    quality = result.same_model
    found = quality.divergence
    where = "" if found is None else f"; first other choice at {place_text(found.token, found.question, found.margin)}"
    return (
        f"mean KL {kl_figure(quality.mean_kl)}, max {kl_figure(quality.max_kl)} nats, "
        f"top-1 {percent(quality.top1_agreement)} of {quality.positions} tokens{where}"
    )


def reason_text(failure: Failure) -> str:
    """Why a method did not run, without its name before it."""
    return failure.reason.removeprefix(f"{failure.name}: ")


def ending_text(finish_reason: str) -> str:
    return "ended by itself" if finish_reason == "stop" else "cut at its length limit"


def describe_workload(comparison: Comparison) -> str:
    """How many requests, and how they arrive."""
    requests = comparison.workload.requests
    count = len(requests)
    noun = "request" if count == 1 else "requests"
    if comparison.workload.together:
        return f"{count} {noun}" + (" at once" if count > 1 else "")
    return f"{count} {noun} over {seconds_text(requests[-1].arrival_s)} s"
