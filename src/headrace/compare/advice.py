"""Which method to use, and why, in plain sentences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from headrace.compare.measure import WARM_UP_TOKENS, Claim, Timing, judge
from headrace.compare.runner import Comparison, MethodResult
from headrace.compare.verdict import LOSSLESS_MEAN_KL
from headrace.core.resolve import precision_text

ROUNDING: Mapping[str, str] = {
    "none": "",
    "stored": " Activations are rounded to 8 bits where they meet packed weights: that is in the KL. What the "
    "checkpoint's own packing has lost is not, for it is in both.",
    "int8": " Activations are rounded to 8 bits too, where they meet such weights.",
    "int4": " Activations are rounded to 8 bits, where they meet such weights.",
}
"""quant -> what there is to say of it beside the same-model verdict."""


@dataclass(frozen=True, slots=True)
class Advice:
    """What to use, and why, in plain sentences."""

    method: str
    headline: str
    sentences: tuple[str, ...]


def advise(methods: Sequence[MethodResult], bound: float) -> Advice:
    """The fastest method whose tokens are identical; where methods cannot be told apart, the one that needs least
    thought: serial, then fused (no batch size or window to choose), then the order given."""
    base = methods[0]
    others = methods[1:]
    rounds = len(base.rounds)
    if not others:
        said = f"Only {base.name} was run: there is nothing to compare it with."
        return Advice(base.name, f"{base.name}, measured alone", (said,))
    different = [one for one in others if not one.identical]
    dropped = tuple(f"{one.name} is out: its tokens differ from {base.name}'s ({one.divergence})." for one in different)
    if any(one.timing.claim is Claim.TOO_FEW for one in others):
        quickest = min(others, key=lambda one: one.timing.spread.median)
        counted = f"{rounds} {plural(rounds, 'round')}"
        said = (
            f"No advice: {counted} cannot tell methods apart ({quickest.name} measured "
            f"{quickest.timing.ratio.median:.2f} times {base.name}'s speed); use --repeats 3 or more."
        )
        return Advice(base.name, f"{counted}: too few to tell the methods apart", (said, *dropped))
    faster = [one for one in others if one.identical and one.timing.claim is Claim.FASTER]
    if not faster:
        passed = [one for one in others if one.identical]
        claims = "; ".join(f"{one.name}: {claim_text(one.timing)}" for one in passed)
        said = f"Use {base.name}: no method with identical tokens was faster" + (f" ({claims})." if claims else ".")
        headline = f"No method was faster than {base.name} with identical tokens"
        return Advice(base.name, headline, (said, *dropped))
    quickest = min(faster, key=lambda one: one.timing.spread.median)
    best = min(_tied(faster, quickest), key=lambda one: one.name != "fused")
    ratio = best.timing.ratio
    said = (
        f"Use {best.name}: {ratio.median:.2f} times as fast as {base.name} ({ratio.low:.2f}–{ratio.high:.2f} over "
        f"{rounds} rounds), with identical tokens. The batching bound of these answers (Σ lengths / max length, a "
        f"decode bound by memory) is {bound:.2f}."
    )
    tied = [one.name for one in _tied(faster, best) if one is not best]
    told = (f"No significant difference between {best.name} and {', '.join(tied)}.",) if tied else ()
    headline = f"{best.name} is {ratio.median:.2f} times as fast as {base.name}, with identical tokens"
    return Advice(best.name, headline, (said, *told, *dropped))


def _tied(methods: Sequence[MethodResult], with_one: MethodResult) -> list[MethodResult]:
    """Those that cannot be told from `with_one`, itself included."""
    seconds = with_one.timing.seconds
    return [one for one in methods if one is with_one or judge(seconds, one.timing.seconds) is Claim.SAME]


def claim_text(timing: Timing) -> str:
    """The claim with its numbers."""
    ratio = timing.ratio
    return f"{timing.claim}, ratio {ratio.median:.2f} ({ratio.low:.2f}–{ratio.high:.2f})"


def plural(count: int, noun: str) -> str:
    return noun if count == 1 else noun + "s"


def measured_text(comparison: Comparison) -> str:
    """What was measured, in one sentence or two."""
    config, workload = comparison.config, comparison.workload
    count = comparison.repeats
    warm_up = min(WARM_UP_TOKENS, workload.max_tokens)
    return (
        f"Measured: {comparison.model_name}, {config.backend} backend, {precision_text(config)}, "
        f"{config.threads} {plural(config.threads, 'thread')}; {len(workload.prompts)} questions that arrive together, "
        f"greedy, up to {workload.max_tokens} output tokens each; {count} {plural(count, 'round')} in rotated order "
        f"after a warm-up of {warm_up} tokens; prefix cache off. Loading took {comparison.load_s:.1f} s and is "
        "not counted."
    )


def model_text(comparison: Comparison) -> str:
    """What the same-model verdict rests on."""
    config = comparison.config
    if comparison.one_scoring:
        return (
            f"Same model: {config.backend} float32 is the fp32 reference itself, so one teacher-forced run "
            "served both sides and KL is 0 by definition; top-1 says whether every token was its likeliest."
        )
    divergence = comparison.base.same_model.divergence
    where = "" if divergence is None else f" {comparison.base.name} and fp32: {divergence}."
    return (
        f"Same model: every answer teacher-forced through the {config.backend} backend twice, in fp32 (the "
        f"checkpoint's weights as float32, float32 KV cache) and as measured ({precision_text(config)}); "
        "KL(fp32 ‖ method) per output token in nats. Lossless means that every token is fp32's likeliest and mean KL ≤ "
        f"{LOSSLESS_MEAN_KL:g} (what rounding of fp32 sums can explain).{ROUNDING[config.quant]}{where}"
    )
