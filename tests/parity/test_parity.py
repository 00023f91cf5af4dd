"""Each backend gives transformers' logits, whatever the chunks, the company and the history."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from headrace.core.types import RowOut, SamplingParams
from headrace.testing.conformance import BackendConformance
from headrace.testing.driver import Driver
from headrace.weights.qtensor import QTensor

Checkpoint = Callable[..., Path]
Open = Callable[..., Driver]
Logits = NDArray[np.float32]

TOLERANCE = 1e-4
VOCAB = 97
DTYPES = ("float32", "bfloat16", "float16")
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 5000.0, "factor": 3.0}
SLIDING = {"use_sliding_window": True, "sliding_window": 19, "max_window_layers": 1, "num_hidden_layers": 3}
"""The first layer sees everything, the other two 19 tokens."""

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "gqa": ("llama", {}),
    "mha": ("llama", {"num_key_value_heads": 6}),
    "one_kv_head": ("llama", {"num_key_value_heads": 1}),
    "tied": ("llama", {"tie_word_embeddings": True}),
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "head_dim": ("llama", {"head_dim": 20}),
    "odd_sizes": ("llama", {"head_dim": 10, "intermediate_size": 77}),
    "gelu": ("llama", {"hidden_act": "gelu"}),
    "gelu_tanh": ("llama", {"hidden_act": "gelu_pytorch_tanh"}),
    "llama3_rope": ("llama", {"rope_parameters": LLAMA3_ROPE}),
    "linear_rope": ("llama", {"rope_parameters": LINEAR_ROPE}),
    "old_spelling": ("llama", {"rope_parameters": LLAMA3_ROPE, "spelling": "old"}),
    "sharded": ("llama", {"max_shard_size": "40KB"}),
    "stored_bf16": ("llama", {"dtype": "bfloat16"}),
    "qwen2": ("qwen2", {}),
    "qwen2_tied_one_kv_head": ("qwen2", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    "qwen2_sliding": ("qwen2", SLIDING),
    "qwen2_old_spelling": ("qwen2", {"spelling": "old"}),
}


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return [int(i) for i in np.random.default_rng([length, seed]).integers(3, VOCAB, length)]


def spans(driver: Driver, row: int, sizes: Sequence[int]) -> Iterator[RowOut]:
    """Runs the row in these chunks, alone, and gives each one's logits."""
    for size in sizes:
        out = driver.run(driver.span(row, size, sample=False, logits=True))[row]
        assert out.error is None, out.error
        yield out


def all_logits(driver: Driver, tokens: Sequence[int], chunk: int = 512) -> Logits:
    """Logits of every position of a sequence, computed in chunks, in a row of its own."""
    row = driver.admit(tokens)
    sizes = [min(chunk, len(tokens) - start) for start in range(0, len(tokens), chunk)]
    logits = np.concatenate([out.logits for out in spans(driver, row, sizes)])
    driver.release(row)
    return logits


def difference(found: Logits, wanted: Logits) -> float:
    assert found.shape == wanted.shape and found.dtype == np.float32
    return float(np.abs(found - wanted).max())


@pytest.fixture(params=CONFIGS)
def model(request: pytest.FixtureRequest, checkpoint: Checkpoint) -> Path:
    architecture, config = CONFIGS[request.param]
    return checkpoint(architecture, **config)


@pytest.fixture
def plain(checkpoint: Checkpoint) -> Path:
    return checkpoint("llama")


# ---------------------------------------------------------------- the same model


@pytest.mark.parametrize("chunk", [512, 64, 7, 1])
def test_prefill_in_chunks(model: Path, chunk: int, open_driver: Open, reference: Any) -> None:
    tokens = prompt_of(150)
    assert difference(all_logits(open_driver(model), tokens, chunk), reference(model).logits(tokens)) < TOLERANCE


def test_mixed_spans_decode_prefix_hit_and_preemption(model: Path, open_driver: Open, reference: Any) -> None:
    driver, wanted = open_driver(model), reference(model)
    size = driver.capacity.block_size
    a, b = prompt_of(30, 1), prompt_of(75, 2)
    hit = [*a[: 2 * size], *prompt_of(9, 3)]
    first, second = driver.admit(a), driver.admit(b)
    for sizes in ((20, 40), (9, 30), (1, 1)):
        steps = [driver.span(row, n, sample=False, logits=True) for row, n in zip((first, second), sizes, strict=True)]
        starts = [step.start for step in steps]
        outs = driver.run(*steps)
        for tokens, row, start, n in zip((a, b), (first, second), starts, sizes, strict=True):
            assert difference(outs[row].logits, wanted.logits(tokens)[start : start + n]) < TOLERANCE
    third = driver.admit(hit, shared=driver.rows[first].blocks[:2])
    outs = driver.run(driver.span(third, 9, logits=True), driver.span(second, 4, sample=True, logits=True))
    assert difference(outs[third].logits, wanted.logits(hit)[2 * size :]) < TOLERANCE
    tokens = [*b, *outs[second].tokens, *driver.decode([second], 5)[second]]
    driver.release(second)
    all_logits(driver, prompt_of(60, 4))
    again = driver.admit(tokens, num_prompt=len(b))
    outs = driver.run(driver.span(again, len(tokens), logits=True))
    assert difference(outs[again].logits, wanted.logits(tokens)) < TOLERANCE


def test_greedy_tokens(model: Path, open_driver: Open, reference: Any) -> None:
    prompt = prompt_of(11, 5)
    assert open_driver(model).generate(prompt, 64) == reference(model).greedy(prompt, 64)


@pytest.mark.parametrize("block_size", [1, 16, 48, 256])
def test_any_block_size(plain: Path, block_size: int, open_driver: Open, reference: Any) -> None:
    tokens = prompt_of(150)
    driver = open_driver(plain, block_size=block_size, num_blocks=2 * 256 // block_size + 1)
    assert difference(all_logits(driver, tokens, 61), reference(plain).logits(tokens)) < TOLERANCE


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_strays_no_further_than_transformers(
    model: Path, dtype: str, open_driver: Open, reference: Any
) -> None:
    """From float32: at most 1.5 times as far as transformers in the same type, on the average of all logits."""
    tokens = prompt_of(80)
    wanted = reference(model).logits(tokens)
    theirs = np.abs(reference(model, dtype).logits(tokens) - wanted).mean()
    ours = np.abs(all_logits(open_driver(model, dtype=dtype), tokens) - wanted).mean()
    assert 0 < ours < 1.5 * theirs < 0.1 * wanted.std()


# ---------------------------------------------------------------- the same bits


@pytest.mark.parametrize(
    ("name", "dtype", "threads", "companies"),
    [
        *product(["gqa", "one_kv_head", "qwen2_sliding", "odd_sizes"], DTYPES, [1], [(1, 2, 3, 6, 17, 32)]),
        *product(["gqa", "odd_sizes"], ["float32"], [2, 3], [(5,)]),
    ],
)
def test_bits_depend_on_the_row_alone(
    name: str, dtype: str, threads: int, companies: tuple[int, ...], checkpoint: Checkpoint, open_driver: Open
) -> None:
    """A sequence's logits are the same bits alone and whole, in chunks, and in company of 1 to 32 other rows."""
    architecture, config = CONFIGS[name]
    driver = open_driver(checkpoint(architecture, **config), dtype=dtype, threads=threads)
    tokens = prompt_of(140, 6)
    alone = all_logits(driver, tokens)
    for chunk in (97, 64, 5, 1) if threads == 1 else (97, 33):
        assert np.array_equal(all_logits(driver, tokens, chunk), alone)
    generator = np.random.default_rng(7)
    for company in companies:
        place = int(generator.integers(0, company + 1))
        others = [driver.admit(prompt_of(int(generator.integers(1, 40)), i)) for i in range(place)]
        row = driver.admit(tokens)
        others += [driver.admit(prompt_of(int(generator.integers(1, 90)), i)) for i in range(company - place)]
        chunk = int(generator.integers(20, 100))
        found = []
        while (left := len(tokens) - driver.rows[row].computed) > 0:
            mine = driver.span(row, min(left, 1 if left < 12 else chunk), sample=False, logits=True)
            steps = [driver.span(other, _next(driver, other), sample=True) for other in others]
            outs = driver.run(*steps[:place], mine, *steps[place:])
            assert all(out.error is None for out in outs.values())
            found.append(outs[row].logits)
        assert np.array_equal(np.concatenate(found), alone)
        for gone in (row, *others):
            driver.release(gone)


def _next(driver: Driver, row: int) -> int:
    """The whole prompt at first, then a token at a time."""
    live = driver.rows[row]
    return 1 if live.computed else live.num_prompt


def test_sampled_tokens_are_the_same_in_company(plain: Path, open_driver: Open) -> None:
    driver = open_driver(plain)
    prompts = [prompt_of(5 + i, i) for i in range(9)]
    sampling = [SamplingParams(temperature=1.0, seed=i, top_p=0.9 if i % 2 else 1.0, top_k=i) for i in range(9)]
    alone = []
    for prompt, one in zip(prompts, sampling, strict=True):
        row = driver.admit(prompt, one)
        alone.append([*driver.prefill(row, len(prompt)).tokens, *driver.decode([row], 12)[row]])
        driver.release(row)
    rows = [driver.admit(prompt, one) for prompt, one in zip(prompts, sampling, strict=True)]
    first = driver.run(*(driver.span(row, len(prompt)) for row, prompt in zip(rows, prompts, strict=True)))
    rest = driver.decode(rows, 12)
    assert [[*first[row].tokens, *rest[row]] for row in rows] == alone


# ---------------------------------------------------------------- failures stay where they are


POISON = 60


def poisoned(tensors: Any) -> Any:
    """One token's embedding is NaN."""
    for name, tensor in tensors:
        if name == "embed.weight":
            values = tensor.dequantise().copy()
            values[POISON] = np.nan
            tensor = QTensor.from_array(values)
        yield name, tensor


class TestConformance(BackendConformance):
    vocab_size = 61
    poison_id = POISON

    @pytest.fixture
    def driver(self, checkpoint: Checkpoint, open_driver: Open) -> Driver:
        return open_driver(checkpoint("llama", vocab_size=61), change=poisoned, max_tokens=64, max_rows=8)


def test_nan_stays_in_its_row(plain: Path, open_driver: Open) -> None:
    clean, sick = open_driver(plain), open_driver(plain, change=poisoned)
    prompts = [[token if token != POISON else 3 for token in prompt_of(12 + i, i)] for i in range(6)]
    alone = [all_logits(clean, prompt) for prompt in prompts]
    for turn in range(3):  # the blocks of a failed row go to others
        bad = [sick.admit([5, POISON, *prompt_of(20, turn)]), sick.admit([POISON])]
        rows = [sick.admit(prompt) for prompt in prompts]
        steps = [sick.span(row, len(prompt), logits=True) for row, prompt in zip(rows, prompts, strict=True)]
        outs = sick.run(sick.span(bad[0], 22), *steps, sick.span(bad[1], 1))
        for row in bad:
            assert outs[row].error is not None and outs[row].error.code == "nan_logits" and not outs[row].tokens
        for row, wanted in zip(rows, alone, strict=True):
            assert outs[row].error is None and np.array_equal(outs[row].logits, wanted)
        for row in (*bad, *rows):
            sick.release(row)


def test_a_rejected_draft_of_nan_leaves_no_trace(plain: Path, open_driver: Open) -> None:
    driver = open_driver(plain, change=poisoned)
    prompt = [token for token in prompt_of(9, 8) if token != POISON]
    expected = driver.generate(prompt, 12)
    assert POISON not in expected
    row = driver.admit(prompt)
    tokens = list(driver.prefill(row, len(prompt)).tokens)
    out = driver.run(driver.span(row, 1, drafts=[expected[1], POISON, POISON]))[row]
    assert out.error is None and out.accepted == 0, "the drafts are dropped, not the row"
    tokens += out.tokens
    assert tokens + driver.decode([row], 12 - len(tokens))[row] == expected


@pytest.mark.parametrize("error", [RuntimeError("kernel\nfell over"), MemoryError(), ValueError("no")])
def test_an_exception_costs_one_row(
    plain: Path, open_driver: Open, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    from headrace.backends.torch import ops

    driver = open_driver(plain)
    prompts = [[token if token != POISON else 3 for token in prompt_of(4 + i, i)] for i in range(7)]
    expected = [driver.generate(prompt, 5) for prompt in prompts]
    embed = ops.embed

    def failing(token_ids: Any, weight: Any) -> Any:
        if (token_ids == POISON).any():
            raise error
        return embed(token_ids, weight)

    monkeypatch.setattr(ops, "embed", failing)
    rows = [driver.admit(prompt) for prompt in prompts]
    bad = [driver.admit([1, 2, POISON]), driver.admit([POISON])]
    steps = [driver.span(row, len(prompt)) for row, prompt in zip(rows, prompts, strict=True)]
    outs = driver.run(*steps[:3], driver.span(bad[0], 3), *steps[3:], driver.span(bad[1], 1))
    assert list(outs) == [*rows[:3], bad[0], *rows[3:], bad[1]]
    for row in bad:
        failure = outs[row].error
        assert failure is not None and failure.code == "engine_fault"
        assert failure.message.startswith(type(error).__name__) and "\n" not in failure.message
    rest = driver.decode(rows, 4)
    assert [[*outs[row].tokens, *rest[row]] for row in rows] == expected


def test_a_sampling_error_costs_one_row(plain: Path, open_driver: Open) -> None:
    driver = open_driver(plain)
    good = driver.generate(prompt_of(5), 1)
    rows = [driver.admit(prompt_of(5)), driver.admit(prompt_of(5), SamplingParams(temperature=1.0))]
    outs = driver.run(*(driver.span(row, 5) for row in rows))
    assert list(outs[rows[0]].tokens) == good
    assert outs[rows[1]].error is not None and "seed" in outs[rows[1]].error.message
