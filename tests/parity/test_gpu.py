"""The GPU backend gives transformers' logits and the plain backend's tokens.

On the CPU, where Triton interprets its kernels, with one model a family; `make gpu-check` runs all of them on CUDA.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from headrace.core.errors import ConfigError, EngineError
from headrace.core.sizing import kv_bytes_per_token
from headrace.core.types import EngineLimits, FinishEvent, Request, SamplingParams, TokenEvent
from headrace.engine.core import EngineCore
from headrace.models.registry import describe
from headrace.sched.policy import parse_policy
from headrace.sched.prefix import PrefixCache
from headrace.sched.scheduler import Scheduler
from headrace.testing.driver import Driver
from headrace.testing.vision_checkpoints import Kind, tiny_vision_checkpoint
from headrace.weights.checkpoint import open_checkpoint
from tests.parity.cases import CASES, FAMILIES
from tests.parity.common import VOCAB, Checkpoint, Open, all_logits, difference, of_case, prompt_of
from tests.parity.gpu_cases import CUDA, SIZES, gpu_backend, opener
from tests.parity.vision_cases import IMAGE_TEXT, open_vision, pad_of, picture
from tests.parity.vision_cases import SIZES as ALL_VISION_SIZES
from tests.parity.vision_cases import prompt_of as image_prompt

TOLERANCE = 1e-4
VISION_SIZES: dict[str, Any] = ALL_VISION_SIZES | {"max_rows": 4, "max_tokens": 64, "max_model_len": 64}


@pytest.fixture(autouse=True)
def _interpreted(interpreted: None) -> None:
    """See tests/conftest.py."""


@pytest.fixture
def backend_name() -> str:
    return "torch"


@pytest.fixture
def open_gpu(open_driver: Open) -> Open:
    return opener(open_driver)


@pytest.mark.parametrize("name", CASES if CUDA else FAMILIES)
def test_logits_whatever_the_chunks(name: str, checkpoint: Checkpoint, open_gpu: Open, reference: Any) -> None:
    """Chunks of several tokens, and then single ones, as a decode step computes them."""
    path, tokens = of_case(name, checkpoint), prompt_of(16)
    driver, wanted = open_gpu(path), reference(path).logits(tokens)
    row = driver.admit(tokens)
    found = [driver.run(driver.span(row, size, sample=False, logits=True))[row].logits for size in (9, 5, 1)]
    found.append(driver.run(driver.span(row, 1, logits=True))[row].logits)
    assert difference(np.concatenate(found), wanted) < TOLERANCE


# ---------------------------------------------------------------- the engine, two plans in flight

REQUESTS: Sequence[SamplingParams] = (
    SamplingParams(max_tokens=4),
    SamplingParams(max_tokens=3, temperature=1.0, seed=5, top_p=0.9, top_k=20, logprobs=2),
    SamplingParams(max_tokens=3, temperature=0.8, seed=-7, repetition_penalty=1.3, frequency_penalty=0.5),
    SamplingParams(max_tokens=2, min_tokens=2, prompt_logprobs=1),
)


def answers(driver: Driver, blocks: int) -> dict[str, tuple[Any, ...]]:
    """Tokens, log-probabilities and end of each request; the third comes when the others decode."""
    capacity = driver.capacity
    scheduler = Scheduler(
        capacity, 64, frozenset(), parse_policy("fused"), PrefixCache(blocks, capacity.block_size, "model", True)
    )
    core = EngineCore(driver.backend, scheduler, EngineLimits(VOCAB, 64))
    waiting = [Request(str(i), tuple(prompt_of(5 + 3 * i, i)), one) for i, one in enumerate(REQUESTS)]
    found: dict[str, list[Any]] = {request.id: [] for request in waiting}
    for turn in range(40):
        for request in waiting[: 3 if turn == 0 else 1] if turn in (0, 2) else ():
            waiting.remove(request)
            core.submit(request)
        for event in core.step():
            if isinstance(event, TokenEvent):
                scores = [round(one.logprob, 3) for one in (*event.logprobs, *event.prompt_logprobs)]
                found[event.request_id].append((event.token_ids, scores))
            else:
                assert isinstance(event, FinishEvent), event
        scheduler.check_integrity()
        if not core.has_work and not waiting:
            break
    return {name: tuple(events) for name, events in found.items()}


def test_requests_that_come_and_go_are_answered_as_on_the_plain_backend(
    checkpoint: Checkpoint, open_gpu: Open, open_driver: Open
) -> None:
    path = checkpoint("llama")
    assert answers(open_gpu(path), 64) == answers(open_driver(path, **SIZES), 64)


# ---------------------------------------------------------------- how numbers are kept


@pytest.mark.parametrize(
    ("options", "most"),
    [
        ({"quant": "int4"}, 0.6),
        ({"quant": "int8"}, 0.1),
        ({"quant": "fp8"}, 0.3),
        ({"kv_dtype": "fp8"}, 0.3),
        ({"dtype": "float16", "kv_dtype": "float16"}, 0.02),
    ],
)
def test_few_bits(options: dict[str, Any], most: float, checkpoint: Checkpoint, open_gpu: Open, reference: Any) -> None:
    """The logits stray by about what the rounding is worth: more would be a fault, none would mean that nothing was
    rounded."""
    path = checkpoint("llama", hidden_size=64, intermediate_size=96, num_attention_heads=4, initializer_range=0.05)
    tokens = prompt_of(12)
    strayed = all_logits(open_gpu(path, **options), tokens, 7) - reference(path).logits(tokens)
    spread = reference(path).logits(tokens).std()
    assert 1e-5 < np.sqrt((strayed**2).mean()) / spread < most


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv_dtype": "int8"}, "kv_dtype: got 'int8', allowed on a GPU: float32"),
        ({"quant": "int3"}, "quant: got 'int3', allowed on a GPU: none, stored"),
        ({"dtype": "float64"}, "dtype: got 'float64'"),
    ],
)
def test_options_it_does_not_know(
    options: dict[str, Any], message: str, checkpoint: Checkpoint, open_gpu: Open
) -> None:
    with pytest.raises(ConfigError, match=message):
        open_gpu(checkpoint("llama"), **options)


# ---------------------------------------------------------------- plans and images


def test_a_third_plan_is_refused_and_results_need_a_plan(checkpoint: Checkpoint, open_gpu: Open) -> None:
    driver = open_gpu(checkpoint("llama"))
    with pytest.raises(EngineError, match="result"):
        driver.backend.result()
    row = driver.admit(prompt_of(3))
    driver.submit(driver.span(row, 3))
    driver.submit(driver.span(row, 1))
    with pytest.raises(EngineError, match="2 others are unanswered"):
        driver.submit(driver.span(row, 1))
    first, second = driver.result(), driver.result()
    assert len(first[row].tokens) == len(second[row].tokens) == 1


def test_images_and_one_that_cannot_be_read(tmp_path: Path) -> None:
    """Rows of text and of images in one step, chunks that end within an image; a bad picture is its own row's fault."""
    kind: Kind = "nvlm"
    path = tiny_vision_checkpoint(tmp_path / "model", kind, text=IMAGE_TEXT)
    plain = open_vision(path, kind, **VISION_SIZES)
    found = open_vision(path, kind, backend=gpu_backend(), **VISION_SIZES)
    side = plain.spec.vision.tiling.tile_size
    prompt = image_prompt(pad_of(kind), [[5, 6, 7], picture(1, side), [8, 9]])
    assert np.abs(found.driver.logits(prompt, 5) - plain.driver.logits(prompt)).max() < TOLERANCE
    span = prompt.images[0]
    bad = replace(prompt, images=(replace(span, pixels=span.pixels[:-1], hash="0" * 64),))
    rows = [found.driver.admit_prompt(bad), found.driver.admit([5, 6, 7])]
    steps = [found.driver.span(row, size) for row, size in zip(rows, (len(bad.token_ids), 3), strict=True)]
    outs = found.driver.run(*steps)
    assert "bytes of pixels" in outs[rows[0]].error.message and len(outs[rows[1]].tokens) == 1


def test_what_it_says_of_itself(checkpoint: Checkpoint, open_gpu: Open) -> None:
    path = checkpoint("llama")
    driver = open_gpu(path)
    memory = driver.backend.memory()
    assert set(memory) == {"weights", "adapters", "kv_cache", "encoder_cache", "workspace"}
    source = open_checkpoint(path)
    description = describe(source.config, source.format, source.shapes())
    assert memory["weights"] == 4 * sum(math.prod(rule.shape) for rule in description.weight_map.rules)
    slots = SIZES["num_blocks"] * SIZES["block_size"]
    assert memory["kv_cache"] == slots * kv_bytes_per_token(description.spec, "float32")
    assert "float32" in driver.backend.explain() and "1, 2, 4, 8 rows" in driver.backend.explain()
    driver.backend.close()
    with pytest.raises(EngineError, match="closed"):
        driver.backend.memory()
