"""Which method to use, and why, in plain sentences."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from statistics import fmean, median

from headrace.compare.arithmetic import rounding_text, warms_up_whole
from headrace.compare.figures import Latency, Prices, Slo, figures_of, run_joules
from headrace.compare.measure import SHORT_S, WARM_UP_TOKENS, Claim, Timing, judge, passes_of
from headrace.compare.methods import Outcome
from headrace.compare.methods.registry import URL, is_outside
from headrace.compare.runner import Comparison, MethodResult, Wishes
from headrace.compare.statistics import ENOUGH, FEW_LEVEL, LEVEL, RESAMPLES, SEED, claim_level, weigh
from headrace.compare.verdict import LOSSLESS_MEAN_KL, SameModel, kl_figure, percent
from headrace.core.config import EngineConfig, ResolvedConfig
from headrace.core.errors import InvalidParameter
from headrace.core.resolve import precision_text
from headrace.sched.policy import parse_policy

QUALITY_LIMITS: Mapping[str, tuple[float, float]] = {"ok": (0.98, 0.02), "warn": (0.95, 0.1)}
"""Least top-1 agreement and largest mean KL in nats of a lossy method; beyond both: refuse. Provisional."""
QUALITY_POSITIONS = 4096
"""Output tokens that these limits are meant for."""
LOSSY: Mapping[str, str] = {"fused-int8": "int8", "fused-int4": "int4", "fused-fp8": "fp8"}
"""Method -> its `quant`."""


class Objective(StrEnum):
    """What the best method has least of."""

    TIME = "time"
    COST = "cost"
    ENERGY = "energy"
    MEMORY = "memory"


LESS: Mapping[Objective, str] = {
    Objective.TIME: "{0:.2f} times as fast as {1}",
    Objective.COST: "{0:.2f} times as cheap as {1}",
    Objective.ENERGY: "{0:.2f} times as sparing of energy as {1}",
    Objective.MEMORY: "{0:.2f} times as sparing of memory as {1}",
}
BETTER: Mapping[Objective, str] = {
    Objective.TIME: "faster",
    Objective.COST: "cheaper",
    Objective.ENERGY: "more sparing of energy",
    Objective.MEMORY: "more sparing of memory",
}


@dataclass(frozen=True, slots=True)
class Advice:
    """What to use, and why, in plain sentences."""

    method: str
    headline: str
    sentences: tuple[str, ...]
    """Everything below in words too."""
    runner_up: str | None = None
    command: str | None = None
    """Starts a server that works as the advised method did; None: no advice, or `headrace serve` has no such method."""


def advise(
    methods: Sequence[MethodResult],
    bound: float,
    wishes: Wishes | None = None,
    model: str = "MODEL",
    config: ResolvedConfig | None = None,
    crossing: str = "",
) -> Advice:
    """The best by the objective of the methods that gave the base's tokens, meet the SLO and can be served;
    where methods cannot be told apart, the one that needs least thought: serial, then fused (no batch size or window
    to choose), then the order given.

    The best is one that may be called better than the base (`measure.judge`). Lossy methods, outside engines and what
    cannot be served are named where they are better still, never chosen. `model`, `config`: as the methods had them,
    for the command; `crossing`: what is known of the break-even rate, in a sentence.
    """
    base = methods[0]
    if len(methods) == 1:
        said = f"Only {base.name} was run: there is nothing to compare it with."
        return Advice(base.name, f"{base.name}, measured alone", (said,))
    if claim_level(len(base.rounds)) is None:
        return _too_few(methods)
    return _Choice(methods, bound, wishes or Wishes(), model, config, crossing).advice()


def advice_of(comparison: Comparison, model: str | None = None, crossing: str = "") -> Advice:
    """`advise` on a whole comparison. `model`: as the user named it."""
    named = comparison.model if model is None else model
    return advise(comparison.methods, comparison.bound, comparison.wishes, named, comparison.config, crossing)


def _too_few(methods: Sequence[MethodResult]) -> Advice:
    base, rounds = methods[0], len(methods[0].rounds)
    quickest = min(methods[1:], key=lambda one: one.timing.spread.median)
    counted = f"{rounds} {plural(rounds, 'round')}"
    said = (
        f"No advice: {counted} cannot tell methods apart ({quickest.name} measured "
        f"{quickest.timing.ratio.median:.2f} times {base.name}'s speed); use --repeats 3 or more."
    )
    out = tuple(_out(one, base) for one in methods[1:] if one.exact and not one.kept)
    return Advice(base.name, f"{counted}: too few to tell the methods apart", (said, *out))


class _Choice:
    """One objective's series of every method, and what follows from them."""

    def __init__(
        self,
        methods: Sequence[MethodResult],
        bound: float,
        wishes: Wishes,
        model: str,
        config: ResolvedConfig | None,
        crossing: str,
    ) -> None:
        self.methods, self.base, self.bound, self.wishes = methods, methods[0], bound, wishes
        self.model, self.config, self.crossing = model, config, crossing
        self.objective = objective_of(wishes)
        self.notes: list[str] = []
        found = series_of(methods, self.objective, wishes.prices)
        if self.objective is Objective.MEMORY and self.base.config is not None and self.base.config.device == "cuda":
            self.notes.append("Memory is the host's: what a method takes of the GPU's is not in it.")
        if self.base.name not in found:
            self.notes.append(
                f"By {self.objective} nothing can be said: {_missing(self.objective, wishes)}. The advice is by time."
            )
            self.objective = Objective.TIME
            found = series_of(methods, Objective.TIME, wishes.prices)
        self.series = found
        self.notes += [
            f"{one.name} is left out: its {self.objective} was not measured."
            for one in methods
            if one.name not in found
        ]
        self.late = {one.name: missed for one in methods if (missed := missed_slo(one, wishes.slo))}

    def advice(self) -> Advice:
        eligible = self._eligible()
        meeting = [one for one in eligible if one.name not in self.late]
        candidates = meeting or eligible
        best = self._best(candidates)
        ranked = self._ranked(candidates, best)
        second = self._second(ranked, best)
        sentences = (self._why(best, candidates), *self._of_second(best, second, ranked), *self.notes)
        sentences += (*self._dropped(candidates), *self._better_still(best), *self._changes(best, candidates))
        if not meeting:
            sentences = ("No method with identical tokens meets the SLO; without it:", *sentences)
        command = serve_command(self.model, best.name, self.config)
        if command is not None:
            sentences += (f"Start it with: {command}",)
        return Advice(best.name, self._headline(best), sentences, None if second is None else second.name, command)

    def _eligible(self) -> list[MethodResult]:
        """What may be chosen, but for the SLO. Rounded weights may give the same tokens here, and others elsewhere."""
        known = [one for one in self.methods if one.name in self.series and one.name not in LOSSY]
        return [one for one in known if one.kept and servable(one.name)]

    def _claim(self, one: MethodResult, against: MethodResult) -> Claim:
        """FASTER: `one` needs less."""
        return judge(self.series[against.name], self.series[one.name], self._passes(against))

    def _passes(self, one: MethodResult) -> tuple[tuple[float, ...], ...]:
        """All its runs' seconds, where they are what the series is of."""
        return passes_of(one.rounds) if self.objective is Objective.TIME and _together(one.rounds) else ()

    def _tied(self, among: Sequence[MethodResult], with_one: MethodResult) -> list[MethodResult]:
        """Those that cannot be told from `with_one`, itself included."""
        return [one for one in among if one is with_one or self._claim(one, with_one) is Claim.SAME]

    def _best(self, candidates: Sequence[MethodResult]) -> MethodResult:
        pool = list(candidates)
        if self.base in candidates:
            better = [one for one in pool if one is not self.base and self._claim(one, self.base) is Claim.FASTER]
            pool = better or [self.base]
        first = min(pool, key=lambda one: median(self.series[one.name]))
        return min(self._tied(pool, first), key=lambda one: (one is not self.base, one.name != "fused"))

    def _ranked(self, candidates: Sequence[MethodResult], best: MethodResult) -> list[MethodResult]:
        """The candidates, and what of ours no server does; without those that `_better_still` names."""
        ours = [one for one in self.methods if one.exact and one.kept and one.name not in self.late]
        return [
            one
            for one in ours
            if one.name in self.series
            and (one in candidates or (not servable(one.name) and self._claim(one, best) is not Claim.FASTER))
        ]

    def _second(self, candidates: Sequence[MethodResult], best: MethodResult) -> MethodResult | None:
        rest = [one for one in candidates if one is not best]
        return min(rest, key=lambda one: median(self.series[one.name]), default=None)

    def _ratio(self, one: MethodResult, against: MethodResult) -> str:
        """How many times as good, with its interval."""
        found = weigh(self.series[against.name], self.series[one.name])
        low, high = found.interval
        said = LESS[self.objective].format(found.ratio, against.name)
        return f"{said} ({low:.2f}–{high:.2f} over {found.pairs} rounds)"

    def _headline(self, best: MethodResult) -> str:
        if best is self.base:
            return f"No method was {BETTER[self.objective]} than {best.name} with identical tokens"
        ratio = weigh(self.series[self.base.name], self.series[best.name]).ratio
        return f"{best.name} is {LESS[self.objective].format(ratio, self.base.name)}, with {tokens_text(best)}"

    def _why(self, best: MethodResult, candidates: Sequence[MethodResult]) -> str:
        if best is self.base:
            others = [one for one in candidates if one is not best]
            claims = "; ".join(f"{one.name}: {self._claim_text(one)}" for one in others)
            said = f"Use {best.name}: no method with identical tokens was {BETTER[self.objective]}"
            return said + (f" ({claims})." if claims else ".")
        said = f"Use {best.name}: {self._ratio(best, self.base)}, with {tokens_text(best)}."
        if self.base.name in self.late:
            said += f" {self.base.name} does not meet the SLO ({self.late[self.base.name]})."
        if self.objective is Objective.TIME:
            said += (
                " The batching bound of these answers (Σ lengths / max length, a decode bound by memory) is "
                f"{self.bound:.2f}."
            )
        return said

    def _claim_text(self, one: MethodResult) -> str:
        if self.objective is Objective.TIME and _together(one.rounds):
            return claim_text(one.timing)
        claim = self._claim(one, self.base)
        word = {Claim.FASTER: BETTER[self.objective], Claim.SLOWER: f"not {BETTER[self.objective]}"}.get(
            claim, str(claim)
        )
        return f"{word}, {self._ratio(one, self.base)}"

    def _of_second(
        self, best: MethodResult, second: MethodResult | None, candidates: Sequence[MethodResult]
    ) -> tuple[str, ...]:
        if second is None:
            return ()
        tied = [one.name for one in self._tied(candidates, best) if one is not best]
        told = [f"No significant difference between {best.name} and {', '.join(tied)}."] if tied else []
        if second.name not in tied and second is not self.base:
            told.append(f"Second is {second.name}: {best.name} is {self._ratio(best, second)}.")
        return tuple(told)

    def _dropped(self, candidates: Sequence[MethodResult]) -> list[str]:
        said = [_out(one, self.base) for one in self.methods[1:] if one.exact and not one.kept]
        return said + [
            f"{one.name} is out: it does not meet the SLO ({self.late[one.name]})."
            for one in self._eligible()
            if one not in candidates and one is not self.base
        ]

    def _better_still(self, best: MethodResult) -> list[str]:
        """Methods that are better than the choice, and why they are not it."""
        said = []
        for one in self.methods[1:]:
            if one.name not in self.series or one is best or (one.exact and servable(one.name)):
                continue
            better = self._claim(one, best) is Claim.FASTER
            if _foreign(one.name):
                if better:
                    tokens = "the same tokens" if one.identical else "other tokens"
                    said.append(f"{one.name}, an engine from outside, was {self._ratio(one, best)}, with {tokens}.")
            elif one.name in LOSSY:
                said.append(self._of_lossy(one, best, better))
            elif better:
                tokens = tokens_text(one) if one.kept else "other tokens"
                said.append(f"{one.name} was {self._ratio(one, best)}, with {tokens}; headrace serve does not do that.")
        return said

    def _of_lossy(self, one: MethodResult, best: MethodResult, better: bool) -> str:
        gate = quality_gate(one.same_model)
        how = self._ratio(one, best) if better else f"not {BETTER[self.objective]} than {best.name}"
        said = f"{one.name} is lossy, so it is never chosen by itself: {how}; {loss_text(one.same_model)}: {gate}."
        command = serve_command(self.model, one.name, self.config)
        if not better or gate == "refuse" or command is None:
            return said
        return f"{said} If that loss is acceptable: {command}"

    def _changes(self, best: MethodResult, candidates: Sequence[MethodResult]) -> list[str]:
        """What would change the choice."""
        said = [self.crossing] if self.crossing else []
        if self.late:
            free = _Choice(self.methods, self.bound, Wishes(self.objective, None, self.wishes.prices), "", None, "")
            if (other := free._best(self._eligible())) is not best:
                said.append(f"Without the SLO it would be {other.name}.")
        for objective in Objective:
            series = series_of(self.methods, objective, self.wishes.prices)
            if objective is self.objective or not all(one.name in series for one in candidates):
                continue
            choice = _Choice(self.methods, self.bound, Wishes(objective, None, self.wishes.prices), "", None, "")
            other = choice._best(candidates)
            if other is not best and choice._claim(other, best) is Claim.FASTER:
                said.append(f"By {objective} it would be {other.name}.")
        return said


def _out(one: MethodResult, base: MethodResult) -> str:
    return f"{one.name} is out: its tokens differ from {base.name}'s ({one.divergence})."


def tokens_text(one: MethodResult) -> str:
    """What its tokens are beside the base's, of a method that kept its promise."""
    near = one.verdict.near_ties
    return "identical tokens" + (f" but for {near} near-{plural(near, 'tie')}" if near else "")


def _foreign(name: str) -> bool:
    """Whether it is an engine or a server from outside."""
    return name.startswith(URL) or is_outside(name)


def _together(rounds: Sequence[Outcome]) -> bool:
    return all(one.arrival_s == 0 for one in rounds[0].requests)


def objective_of(wishes: Wishes) -> Objective:
    """Raises InvalidParameter."""
    try:
        return Objective(wishes.objective)
    except ValueError as error:
        raise InvalidParameter("objective", wishes.objective, ", ".join(Objective)) from error


def _missing(objective: Objective, wishes: Wishes) -> str:
    prices = wishes.prices
    if objective is Objective.COST and prices.per_hour is None and prices.per_kwh is None:
        return "no price was given"
    return "peak memory is not known" if objective is Objective.MEMORY else "the runs' joules are not known"


def series_of(methods: Sequence[MethodResult], objective: Objective, prices: Prices) -> Mapping[str, tuple[float, ...]]:
    """Method -> what each round took; without methods of which a round's figure is not known.

    Time is the seconds of a run, or, where requests arrive one after the other (a run then lasts about as long as
    their arrivals), the mean latency of its requests.
    """
    found = {}
    for one in methods:
        values = [_figure_of(outcome, objective, prices, _together(one.rounds)) for outcome in one.rounds]
        known = tuple(value for value in values if value is not None)
        if len(known) == len(values):
            found[one.name] = known
    return found


def _figure_of(outcome: Outcome, objective: Objective, prices: Prices, together: bool) -> float | None:
    if objective is Objective.TIME:
        return outcome.seconds if together else fmean(one.latency_s for one in outcome.requests)
    if objective is Objective.COST:
        return prices.cost(outcome.seconds, run_joules(outcome))
    return run_joules(outcome) if objective is Objective.ENERGY else outcome.peak_rss_bytes


def missed_slo(one: MethodResult, slo: Slo | None) -> str:
    """Which limit its 95th percentiles pass, as the median over the rounds; empty: none."""
    if slo is None:
        return ""
    figures = figures_of(one.rounds, slo, Prices())
    limits: tuple[tuple[str, Latency | None, float | None], ...] = (
        ("TTFT", figures.ttft, slo.ttft_s),
        ("TPOT", figures.tpot, slo.itl_s),
    )
    missed = [
        f"p95 {name} {found.p95.median:.3g} s, wanted {limit:g} s"
        for name, found, limit in limits
        if limit is not None and found is not None and found.p95.median > limit
    ]
    return "; ".join(missed)


def quality_gate(quality: SameModel) -> str:
    """ok, warn or refuse, by QUALITY_LIMITS; refuse where the KL is not known."""
    for said, (top1, kl) in QUALITY_LIMITS.items():
        if quality.mean_kl is not None and quality.top1_agreement >= top1 and quality.mean_kl <= kl:
            return said
    return "refuse"


def loss_text(quality: SameModel) -> str:
    """A lossy method's figures against fp32, and how far they carry."""
    few = (
        f", fewer than the {QUALITY_POSITIONS} that the limits are meant for"
        if quality.positions < QUALITY_POSITIONS
        else ""
    )
    return (
        f"top-1 {percent(quality.top1_agreement)}, mean KL {kl_figure(quality.mean_kl)} nats against fp32 over "
        f"{quality.positions} tokens{few}"
    )


def servable(name: str) -> bool:
    """Whether `headrace serve` can work as this method does."""
    return name in LOSSY or _policy(name) is not None


def _policy(name: str) -> str | None:
    if name in LOSSY:
        return "fused"
    try:
        return parse_policy(name).name
    except InvalidParameter:
        return None


def serve_command(model: str, name: str, config: ResolvedConfig | None) -> str | None:
    """What starts a server that works as the method of that name did: its policy, its rounding, and every setting of
    `config` that the user had made; the automatic ones come out the same again. None where there is none."""
    policy = _policy(name)
    if policy is None:
        return None
    settings: dict[str, object] = {"policy": policy}
    if config is not None:
        chosen = [field for field, reason in config.reasons.items() if reason == "as set"]
        plain = EngineConfig("")
        chosen += [one for one in ("instruction_set", "block_size") if getattr(config, one) != getattr(plain, one)]
        settings |= {one: getattr(config, one) for one in chosen}
    if name in LOSSY:
        settings["quant"] = LOSSY[name]
    values = {key: "" if value is True else f" {shlex.quote(str(value))}" for key, value in settings.items()}
    flags = [f"--{key.replace('_', '-')}{value}" for key, value in values.items()]
    return " ".join(("headrace serve", model if model == "MODEL" else shlex.quote(model), *flags))


def claim_text(timing: Timing) -> str:
    """The claim with its numbers."""
    found = timing.evidence
    if found is None:
        return str(timing.claim)
    low, high = found.interval
    told = f"{timing.claim}, ratio {found.ratio:.2f} ({low:.2f}–{high:.2f})"
    return f"{told}, p = {found.p_value:.2g}" if found.pairs >= ENOUGH else told


def rule_text(rounds: int) -> str:
    """When so many rounds call a method faster or slower."""
    if rounds >= ENOUGH:
        return (
            f"Faster or slower is said where a sign-flip test of the {rounds} paired rounds gives p ≤ {LEVEL:g}, the "
            f"95 % interval of the ratio (bootstrap over rounds, {RESAMPLES:,} resamples, seed {SEED}) leaves out 1, "
            "and the ratio is beyond the noise floor: what the base's own runs, held against one another, differ by."
        )
    if claim_level(rounds) is None:
        return f"{rounds} {plural(rounds, 'round')} cannot tell methods apart: 3 can, {ENOUGH} or more do it better."
    return (
        f"Faster or slower is said only where all {rounds} paired rounds say so, and so clearly that two equal methods "
        f"would look like it in at most {FEW_LEVEL:.0%} of comparisons (five rounds by their pairs; three or four if "
        f"the times do not overlap at all). {ENOUGH} rounds or more are judged at {LEVEL:.0%}."
    )


def plural(count: int, noun: str) -> str:
    return noun if count == 1 else noun + "s"


def measured_text(comparison: Comparison) -> str:
    """What was measured, in one sentence or two."""
    config, workload = comparison.config, comparison.workload
    count = comparison.repeats
    on_gpu = "" if config.device == "cpu" else f" on {comparison.machine.device(config)}"
    warm_up = "one run" if warms_up_whole(config) else f"{min(WARM_UP_TOKENS, workload.max_tokens)} tokens"
    requests = len(workload.requests)
    arrive = f"that arrive within {workload.requests[-1].arrival_s:.3g} s"
    quickest = min(one.timing.spread.low for one in comparison.methods)
    passes = (
        f"; where a run is shorter than {SHORT_S:g} s, a round has several of each method, there and back, and the one "
        "of median length counts"
    )
    return (
        f"Measured: {comparison.model_name}, {config.backend} backend{on_gpu}, {precision_text(config)}, "
        f"{config.threads} {plural(config.threads, 'thread')}; {requests} {plural(requests, 'question')} "
        f"{'that arrive together' if workload.together else arrive}, "
        f"greedy, up to {workload.max_tokens} output tokens each; {count} {plural(count, 'round')} in rotated order "
        f"after a warm-up of {warm_up}{passes if quickest < SHORT_S else ''}; prefix cache off. Loading took "
        f"{comparison.load_s:.1f} s and is not counted."
    )


def model_text(comparison: Comparison) -> str:
    """What the same-model verdict rests on."""
    config = comparison.config
    if comparison.one_scoring:
        return (
            f"Same model: {config.backend} float32 is the fp32 reference itself, so one teacher-forced run "
            "served both sides and KL is 0 by definition; top-1 says whether every token was its likeliest."
        )
    where_fp32 = "" if comparison.reference.device == config.device else "; on the CPU, for the GPU has no room for it"
    divergence = comparison.base.same_model.divergence
    where = "" if divergence is None else f" {comparison.base.name} and fp32: {divergence}."
    return (
        f"Same model: every answer teacher-forced through the {config.backend} backend twice, in fp32 (the "
        f"checkpoint's weights as float32, float32 KV cache{where_fp32}) and as measured ({precision_text(config)}); "
        "KL(fp32 ‖ method) per output token in nats. Lossless means that every token is fp32's likeliest and mean KL ≤ "
        f"{LOSSLESS_MEAN_KL:g} (what rounding of fp32 sums can explain).{rounding_text(config)}{where}"
    )
