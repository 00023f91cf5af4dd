"""A comparison's method as a certificate."""

from __future__ import annotations

from typing import Any

from headrace.compare.certificate import Setting, Side, Weights, certificate, instructions_of
from headrace.compare.runner import Comparison
from headrace.engine.model import create_backend


def certify(comparison: Comparison, name: str, weights: Weights, tokenizer: str | None) -> dict[str, Any]:
    """The certificate of the method `name` against the base. `tokenizer`: `certificate.tokenizer_sha256`."""
    base = comparison.base
    result = next(one for one in comparison.methods if one.name == name)
    config = comparison.config
    first = base.rounds[0]
    answers = [result.rounds[one.round].requests[one.question] for one in result.divergences]
    return certificate(
        created=comparison.measured_at,
        model_name=comparison.model_name,
        weights=weights,
        tokenizer=tokenizer,
        workload=comparison.workload,
        reference=Side(base.name, config, first.outputs, [one.finish_reason for one in first.requests]),
        method=Side(name, result.config, [one.token_ids for one in answers], [one.finish_reason for one in answers]),
        verdicts=result.divergences,
        margins=comparison.margins,
        epsilon=comparison.epsilon,
        setting=Setting(
            comparison.machine,
            instructions_of(create_backend(config.backend, config.instruction_set, config.device)),
            config.threads,
            config.device == "cuda",
        ),
    )
