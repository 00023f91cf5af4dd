"""The comparison as plain data for JSON: every figure of the report, and the token ids it rests on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from headrace.compare import cells, study
from headrace.compare.advice import Advice
from headrace.compare.arithmetic import warms_up_whole
from headrace.compare.certificate import prompts_sha256, tokens_sha256
from headrace.compare.figures import Figures, Latency, Spread
from headrace.compare.measure import WARM_UP_REQUESTS, WARM_UP_TOKENS, Timing
from headrace.compare.methods import Outcome
from headrace.compare.runner import Comparison, MethodResult
from headrace.compare.verdict import LOSSLESS_MEAN_KL, Divergence, RequestVerdict

SCHEMA = 2
"""Raised whenever a field changes its name or meaning. 2: figures, failures, outcomes of every round, verdicts of every
request, hashes."""


def document(comparison: Comparison, advice: Advice) -> dict[str, Any]:
    """A JSON object without NaN. Indices (requests, tokens, rounds) count from 0; times are seconds, memory bytes,
    energy joules, ratios base / method, margins logits. `advice`: what `advise` said of this comparison."""
    workload = comparison.workload
    whole = warms_up_whole(comparison.config)
    warm_up = workload if whole else workload.warm_up(WARM_UP_TOKENS, WARM_UP_REQUESTS)
    return {
        "schema": SCHEMA,
        "methods": {result.name: _method(result) for result in comparison.methods},
        "failures": [asdict(failure) for failure in comparison.failures],
        "recommendation": asdict(advice),
        "batching_bound": comparison.bound,
        "study": [
            {
                "what": published.what,
                "ratio": published.ratio,
                "here": [{"method": name, "ratio": ratio} for name, ratio in ours],
            }
            for published, ours in study.rows(comparison)
        ],
        "model": {
            "name": comparison.model_name,
            "path": comparison.model,
            "fingerprint": comparison.fingerprint,
        },
        "workload": {
            "name": workload.name,
            "sha256": workload.sha256,
            "max_tokens": workload.max_tokens,
            "chat_template": workload.templated,
            "prompts_sha256": prompts_sha256(workload.prompts),
            "prompt_sha256": [tokens_sha256(prompt) for prompt in workload.prompts],
            "manifest": workload.manifest(),
        },
        "config": asdict(comparison.config) | {"reasons": dict(comparison.config.reasons)},
        "machine": asdict(comparison.machine),
        "measured_at": comparison.measured_at,
        "load_s": comparison.load_s,
        "repeats": comparison.repeats,
        "warm_up": {
            "runs": 1,
            "max_requests": len(warm_up.requests),
            "max_tokens": warm_up.max_tokens,
        },
        "peak_rss_bytes": comparison.peak_rss_bytes,
        "epsilon": asdict(comparison.epsilon),
        "wishes": asdict(comparison.wishes),
        "same_model": {
            "reference": f"{comparison.config.backend} float32, float32 KV cache{on_device(comparison)}",
            "lossless_mean_kl": LOSSLESS_MEAN_KL,
            "one_scoring_served_both": comparison.one_scoring,
        },
        "texts": {name: list(texts) for name, texts in comparison.texts.items()},
    }


def on_device(comparison: Comparison) -> str:
    """Where the reference of the same-model verdict runs, where that is not plain: the base is on a GPU."""
    return "" if comparison.config.device == "cpu" else f", {comparison.reference.device}"


def _method(result: MethodResult) -> dict[str, Any]:
    timing, first = result.timing, result.rounds[0]
    return {
        "description": result.description,
        "exact": result.exact,
        "load_s": result.load_s,
        "seconds": _spread(timing.spread) | {"all": list(timing.seconds)},
        "output_tokens_per_s": timing.output_tokens_per_s,
        "ratio_to_serial": _spread(timing.ratio) | {"all": list(timing.ratios)} | _evidence(timing),
        "claim": str(timing.claim),
        "figures": _figures(result),
        **_verdicts(result),
        "outputs": [list(output) for output in first.outputs],
        "output_sha256": [tokens_sha256(output) for output in first.outputs],
        "finish_reasons": [request.finish_reason for request in first.requests],
        "output_tokens": first.output_tokens,
        "iterations": len(first.iterations),
        "computed_tokens": first.computed_tokens,
        "preemptions": first.preemptions,
        "rounds": [_round(outcome, first) for outcome in result.rounds],
    }


def _evidence(timing: Timing) -> dict[str, Any]:
    found = timing.evidence
    if found is None:
        return {"evidence": None}
    return {"evidence": asdict(found) | {"level": found.level}}


def _verdicts(result: MethodResult) -> dict[str, Any]:
    found = result.verdict
    model = result.same_model
    return {
        "verdict": str(found.kind),
        "answers": {"identical": found.identical, "near_tie": found.near_ties, "different": found.different},
        "divergence": _divergence(result.divergence),
        "divergences": [_request_verdict(one) for one in result.divergences],
        "same_model": {
            "verdict": "lossless" if model.lossless else "lossy",
            "positions": model.positions,
            "mean_kl_nats": model.mean_kl,
            "max_kl_nats": model.max_kl,
            "top1_agreement": model.top1_agreement,
            "divergence": _divergence(model.divergence),
        },
    }


def _request_verdict(one: RequestVerdict) -> dict[str, Any]:
    return asdict(one) | {"verdict": str(one.kind)}


def _figures(result: MethodResult) -> dict[str, Any]:
    """Field by field as `figures.Figures` has them, with its units."""
    figures = result.figures
    return {name: _figure(getattr(figures, name)) for name in Figures.__dataclass_fields__} | {
        "joules_per_request": cells.joules_per_request(result)
    }


def _figure(value: object) -> object:
    if isinstance(value, Spread):
        return _spread(value)
    if isinstance(value, Latency):
        return {name: _spread(getattr(value, name)) for name in Latency.__dataclass_fields__}
    return value


def _round(outcome: Outcome, first: Outcome) -> dict[str, Any]:
    """Every time of it. Its token ids only where they are not those of the method's first round, which are in
    `outputs`: null says the same."""
    requests = []
    for request, before in zip(outcome.requests, first.requests, strict=True):
        told: dict[str, Any] = asdict(request)
        same = outcome is not first and request.token_ids == before.token_ids
        requests.append(told | {"token_ids": None if same else list(request.token_ids)})
    return {
        "seconds": outcome.seconds,
        "requests": requests,
        "iterations": [asdict(one) for one in outcome.iterations],
        "computed_tokens": outcome.computed_tokens,
        "preemptions": outcome.preemptions,
        "cpu_s": outcome.cpu_s,
        "peak_rss_bytes": outcome.peak_rss_bytes,
        "joules": dict(outcome.joules),
    }


def _spread(spread: Spread) -> dict[str, Any]:
    return {"median": spread.median, "min": spread.low, "max": spread.high}


def _divergence(found: Divergence | None) -> Mapping[str, Any] | None:
    return None if found is None else asdict(found)
