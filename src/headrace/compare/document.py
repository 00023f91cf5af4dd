"""The comparison as plain data for JSON: every figure of the report, and the token ids it rests on."""

from __future__ import annotations

from dataclasses import asdict
from statistics import median
from typing import Any

from headrace.compare.advice import advise
from headrace.compare.measure import WARM_UP_TOKENS
from headrace.compare.runner import Comparison, MethodResult
from headrace.compare.verdict import LOSSLESS_MEAN_KL, Divergence

SCHEMA = 1


def document(comparison: Comparison) -> dict[str, Any]:
    """A JSON object without NaN. Indices (questions, tokens, rounds) count from 0."""
    workload = comparison.workload
    advice = advise(comparison.methods, comparison.bound)
    return {
        "schema": SCHEMA,
        "methods": {result.name: _method(result) for result in comparison.methods},
        "recommendation": {"method": advice.method, "sentences": list(advice.sentences)},
        "batching_bound": comparison.bound,
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
            "manifest": workload.manifest(),
        },
        "config": asdict(comparison.config) | {"reasons": dict(comparison.config.reasons)},
        "machine": asdict(comparison.machine),
        "measured_at": comparison.measured_at,
        "load_s": comparison.load_s,
        "repeats": comparison.repeats,
        "warm_up": {"runs": 1, "max_tokens": min(WARM_UP_TOKENS, workload.max_tokens)},
        "peak_rss_bytes": comparison.peak_rss_bytes,
        "same_model": {
            "reference": f"{comparison.config.backend} float32, float32 KV cache",
            "lossless_mean_kl": LOSSLESS_MEAN_KL,
            "one_scoring_served_both": comparison.one_scoring,
        },
        "texts": {name: list(texts) for name, texts in comparison.texts.items()},
    }


def _method(result: MethodResult) -> dict[str, Any]:
    timing = result.timing
    first = result.rounds[0]
    requests = [request for outcome in result.rounds for request in outcome.requests]
    model = result.same_model
    return {
        "description": result.description,
        "seconds": {
            "median": timing.spread.median,
            "min": timing.spread.low,
            "max": timing.spread.high,
            "all": list(timing.seconds),
        },
        "output_tokens_per_s": timing.output_tokens_per_s,
        "ratio_to_serial": {
            "median": timing.ratio.median,
            "min": timing.ratio.low,
            "max": timing.ratio.high,
            "all": list(timing.ratios),
        },
        "claim": str(timing.claim),
        "verdict": "identical" if result.identical else "different",
        "divergence": _divergence(result.divergence),
        "same_model": {
            "verdict": "lossless" if model.lossless else "lossy",
            "positions": model.positions,
            "mean_kl_nats": model.mean_kl,
            "max_kl_nats": model.max_kl,
            "top1_agreement": model.top1_agreement,
            "divergence": _divergence(model.divergence),
        },
        "outputs": [list(output) for output in first.outputs],
        "finish_reasons": [request.finish_reason for request in first.requests],
        "output_tokens": first.output_tokens,
        "iterations": len(first.iterations),
        "computed_tokens": first.computed_tokens,
        "preemptions": first.preemptions,
        "ttft_s": {"median": median(request.ttft_s for request in requests)},
        "latency_s": {"median": median(request.latency_s for request in requests)},
        "rounds": [asdict(outcome) for outcome in result.rounds],
    }


def _divergence(found: Divergence | None) -> dict[str, Any] | None:
    return None if found is None else asdict(found)
