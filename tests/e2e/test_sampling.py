"""Sampling through the whole engine: a request's answer is its own, whatever runs beside it and whatever befell it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from headrace import LLM, Completion, SamplingParams
from headrace.engine.model import child_seed
from headrace.testing.checkpoints import tiny_checkpoint

VOCAB = 97


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("model"), "llama", num_hidden_layers=4)


def open_llm(model: Path, **settings: Any) -> LLM:
    return LLM(str(model), dtype="float32", threads=1, **settings)


def random_prompt(draw: random.Random, most: int) -> list[int]:
    return [draw.randrange(3, VOCAB) for _ in range(draw.randint(1, most))]


def random_sampling(draw: random.Random, seed: int) -> SamplingParams:
    """Each field present in about half of them."""

    def maybe(value: Any, otherwise: Any) -> Any:
        return value if draw.random() < 0.5 else otherwise

    few = draw.sample(range(VOCAB), 12)
    return SamplingParams(
        max_tokens=draw.randint(120, 190),
        min_tokens=maybe(draw.randint(1, 15), 0),
        temperature=draw.choice([0.0, 0.3, 0.8, 1.0, 1.7]),
        top_k=maybe(draw.randint(1, 60), 0),
        top_p=maybe(draw.uniform(0.3, 0.99), 1.0),
        min_p=maybe(draw.uniform(0.001, 0.2), 0.0),
        typical_p=maybe(draw.uniform(0.3, 0.99), 1.0),
        repetition_penalty=maybe(draw.uniform(0.8, 1.5), 1.0),
        presence_penalty=maybe(draw.uniform(-1, 1), 0.0),
        frequency_penalty=maybe(draw.uniform(-1, 1), 0.0),
        logit_bias=maybe({i: draw.uniform(-5, 5) for i in few[:4]}, {}),
        allowed_token_ids=maybe(draw.sample(range(VOCAB), 60), None),
        bad_words_ids=maybe([few[4:5], few[5:7], few[7:10]], []),
        stop_token_ids=few[10:] if draw.random() < 0.2 else [],
        ignore_eos=draw.random() < 0.8,
        logprobs=maybe(draw.randint(0, 5), None),
        prompt_logprobs=maybe(draw.randint(0, 5), None),
        seed=seed,
    )


def contents(completions: Sequence[Completion]) -> list[object]:
    """Everything that must be the same to the last bit."""
    assert all(one.error is None for one in completions), completions
    return [(c.token_ids, c.logprobs, c.prompt_logprobs, c.finish_reason, c.seed) for c in completions]


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_alone_in_company_and_after_a_preemption(model: Path, backend: str) -> None:
    draw = random.Random(11)
    prompts = [random_prompt(draw, 60) for _ in range(32)]
    asked = [random_sampling(draw, seed) for seed in range(32)]
    with open_llm(model, backend=backend) as llm:
        alone = [llm.generate(prompt, one)[0] for prompt, one in zip(prompts, asked, strict=True)]
        assert contents(llm.generate(prompts, asked)) == contents(alone)
        assert llm.stats.preemptions == 0
    with open_llm(model, kv_cache_mib=1, max_num_batched_tokens=40, backend=backend) as llm:
        assert contents(llm.generate(prompts, asked)) == contents(alone)
        assert llm.stats.preemptions >= 5
    assert len({one.token_ids for one in alone}) > 25, "the requests differ"


def test_two_engines_at_once(model: Path) -> None:
    """Each in a thread of the caller's, with two threads of its own."""
    draw = random.Random(12)
    prompts = [random_prompt(draw, 60) for _ in range(8)]
    asked = [replace(random_sampling(draw, seed), max_tokens=30, min_tokens=0) for seed in range(8)]
    settings = {"backend": "native", "dtype": "float32", "threads": 2}
    with LLM(str(model), **settings) as one, LLM(str(model), **settings) as other:
        wanted = contents(one.generate(prompts, asked))
        assert contents(other.generate(prompts, asked)) == wanted
        with ThreadPoolExecutor(2) as workers:
            for _ in range(3):
                found = list(workers.map(lambda llm: contents(llm.generate(prompts, asked)), (one, other)))
                assert found == [wanted, wanted]


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_prompt_logprobs_are_those_of_transformers(model: Path, backend: str) -> None:
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager").eval()
    prompt = random_prompt(random.Random(3), 1) + list(range(3, 90))
    with torch.inference_mode():
        logits = reference(torch.tensor([prompt])).logits[0].double().numpy()
    wanted = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    found = []
    for budget in (512, 33):
        with open_llm(model, backend=backend, max_num_batched_tokens=budget) as llm:
            for _ in range(2):  # the second time the cache holds the prompt, and must not be asked
                (completion,) = llm.generate(prompt, max_tokens=3, prompt_logprobs=3)
                assert completion.cached_tokens == 0
                found.append(completion.prompt_logprobs)
            (one,) = llm.generate(prompt[:1], max_tokens=1, prompt_logprobs=0)
            assert one.prompt_logprobs == (None,)
            (cached,) = llm.generate(prompt, max_tokens=3)
            assert cached.cached_tokens > 0 and cached.prompt_logprobs is None
    assert found[0] is not None and all(one == found[0] for one in found), "whatever the chunks"
    assert found[0][0] is None and len(found[0]) == len(prompt)
    for place, (token, one) in enumerate(zip(prompt[1:], found[0][1:], strict=True)):
        assert one is not None and one.logprob == pytest.approx(wanted[place, token], abs=1e-4)
        best = sorted(range(VOCAB), key=lambda i: -wanted[place, i])[:3]
        assert [i for i, _ in one.top] == best
        assert [value for _, value in one.top] == pytest.approx([wanted[place, i] for i in best], abs=1e-4)


def test_n_answers_are_n_requests(model: Path) -> None:
    prompts = [[5, 6, 7], [8]]
    sampling = SamplingParams(max_tokens=12, temperature=1.0, seed=-4, n=5, logprobs=1)
    with open_llm(model) as llm:
        answers = llm.generate(prompts, [sampling, replace(sampling, n=2)])
        assert [(one.index, one.choice) for one in answers] == [(0, i) for i in range(5)] + [(1, 0), (1, 1)]
        assert [one.seed for one in answers[:5]] == [child_seed(-4, i) for i in range(5)]
        assert len({one.token_ids for one in answers[:5]}) == 5
        for one in answers:
            single = replace(sampling, n=1, seed=one.seed)
            (again,) = llm.generate(prompts[one.index], single)
            assert (again.token_ids, again.logprobs) == (one.token_ids, one.logprobs)
        assert contents(llm.generate(prompts[0], sampling)) == contents(answers[:5])
        greedy = llm.generate(prompts[0], max_tokens=6, n=3)
        assert len({one.token_ids for one in greedy}) == 1 and [one.seed for one in greedy] == [None] * 3
        unseeded = llm.generate(prompts[0], max_tokens=6, temperature=1.0, n=2)
        assert unseeded[0].seed is not None and unseeded[0].seed != unseeded[1].seed
        refused = llm.generate([[VOCAB], [5]], max_tokens=2, n=2)
        assert [(one.index, one.choice, one.error is None) for one in refused] == [
            (0, 0, False), (0, 1, False), (1, 0, True), (1, 1, True)
        ]  # fmt: skip


def test_ids_are_held_against_the_vocabulary(model: Path) -> None:
    faults: list[dict[str, Any]] = [
        {"logit_bias": {VOCAB: 1.0}},
        {"allowed_token_ids": [3, VOCAB]},
        {"bad_words_ids": [[3, VOCAB]]},
        {"allowed_token_ids": [3, 4], "bad_words_ids": [[3], [4]]},
        {"allowed_token_ids": [3], "stop_token_ids": [3], "min_tokens": 2},
        {"bad_words": ["x"]},
        {"stop": ["x"]},
    ]
    with open_llm(model) as llm:
        for fault in faults:
            (refused,) = llm.generate([5, 6], **fault)
            assert refused.error is not None and refused.error.code == "invalid_parameter", fault
            assert next(iter(fault)) in refused.error.message
        (lost,) = llm.generate([5, 6], allowed_token_ids=[2], min_tokens=1)  # 2 is the model's own end
        assert lost.error is not None and lost.error.code == "no_token_allowed"


@pytest.mark.demo
def test_texts_never_to_be_said_and_stop_texts_that_stay(demo_path: Path) -> None:
    with LLM("demo", dtype="float32", threads=1) as llm:
        prompt = "The capital of France is"
        (free,) = llm.generate(prompt, max_tokens=16)
        assert " Paris" in free.text
        for words in ("Paris", " Paris"):
            (banned,) = llm.generate(prompt, max_tokens=16, bad_words=words)
            assert banned.error is None and "Paris" not in banned.text
        (cut,) = llm.generate(prompt, max_tokens=16, stop="Par")
        (kept,) = llm.generate(prompt, max_tokens=16, stop="Par", include_stop_str_in_output=True)
        assert kept.text == cut.text + "Par" and kept.token_ids == cut.token_ids
        assert kept.finish_reason == "stop"
