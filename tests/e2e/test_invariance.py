"""A part of `tests/robustness/invariance.py`, whose whole takes many minutes: answers of the demo model are the same to
the last bit of their log-probabilities, whatever the batch, the chunks, the cache and the pool of blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from headrace import LLM
from tests.robustness.invariance import Run, bits, work

RUNS = (Run(13, 33, True, preempted=True), Run(3, None, True), Run(32, 48, False))


@pytest.mark.demo
@pytest.mark.parametrize("settings", [{}, {"kv_dtype": "int8"}], ids=str)
def test_answers_do_not_show_how_they_were_computed(settings: dict[str, Any], demo_path: Path) -> None:
    prompts, sampling = work(16, 20)
    with LLM("demo", backend="native", threads=2, **settings, **Run(1, None, False).settings("float32")) as llm:
        kv_dtype = llm.config.kv_dtype
        wanted = bits([llm.generate(prompt, one)[0] for prompt, one in zip(prompts, sampling, strict=True)])
    assert len(set(wanted)) == len(prompts)
    preemptions = hits = 0
    for run in RUNS:
        with LLM("demo", backend="native", threads=2, **settings, **run.settings(kv_dtype)) as llm:
            answers = llm.generate(prompts, sampling)
            assert bits(answers) == wanted, str(run)
            preemptions += llm.stats.preemptions
            hits += sum(one.cached_tokens > 0 for one in answers)
    assert hits > 0 and preemptions > 0
