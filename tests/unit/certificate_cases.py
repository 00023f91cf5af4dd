"""Certificates of real runs, for tests: what `headrace compare --certificate` does with a comparison's parts."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

from headrace.compare.certificate import Setting, Side, certificate, hash_weights, instructions_of, tokenizer_sha256
from headrace.compare.machine import probe_machine
from headrace.compare.methods import BASE
from headrace.compare.methods.bench import Bench
from headrace.compare.methods.registry import make_method
from headrace.compare.score import loader, measure_epsilon, score
from headrace.compare.verdict import divergences
from headrace.compare.workloads import Workload, WorkloadRequest
from headrace.core.config import EngineConfig
from headrace.engine.model import OpenModel, create_backend

CREATED = "2026-01-01T00:00:00+00:00"


def open_tiny(path: Path, **settings: Any) -> OpenModel:
    """A model with room for few and short requests."""
    chosen = {"threads": 1, "max_model_len": 128, "max_num_seqs": 4, "prefix_cache": False} | settings
    return OpenModel(EngineConfig(str(path), **chosen))


def three_prompts() -> Workload:
    prompts = ((5, 6, 7), (11, 12, 13, 14, 15), (20,))
    return Workload("three", tuple(WorkloadRequest(ids, 6, title=str(ids)) for ids in prompts), ignore_eos=True)


def make(opened: OpenModel, workload: Workload, name: str = "fused") -> dict[str, Any]:
    """The certificate of one run of the base and of the method `name`; `opened` is closed."""
    with closing(opened):
        bench = Bench(opened)
        sides = {}
        for one in (BASE, name):
            method = make_method(one, bench)
            method.start(workload)
            outcome = method.run(workload)
            sides[one] = Side(one, method.config, outcome.outputs, [run.finish_reason for run in outcome.requests])
            method.close()
        bench.close()
        config = opened.config
        reference, method_side = sides[BASE], sides[name]
        known = list(zip(workload.prompts, reference.outputs, strict=True))
        longest = max(len(prompt) + len(output) for prompt, output in known)
        margins = [one.margins for one in score(known, config.block_size, loader(opened, config, longest), None)]
        epsilon = measure_epsilon(opened, config, known)
        return certificate(
            created=CREATED,
            model_name=opened.checkpoint.path.name,
            weights=hash_weights(opened.checkpoint, lambda text: None),
            tokenizer=tokenizer_sha256(opened.checkpoint),
            workload=workload,
            reference=reference,
            method=method_side,
            verdicts=divergences(reference.outputs, method_side.outputs, margins, epsilon.value),
            margins=margins,
            epsilon=epsilon,
            setting=Setting(
                probe_machine(), instructions_of(create_backend(config.backend, config.instruction_set)), config.threads
            ),
        )
