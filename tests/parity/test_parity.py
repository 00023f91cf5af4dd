"""Each backend gives transformers' logits, whatever the chunks, the company and the history."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from headrace.core.types import SamplingParams
from headrace.models.registry import describe
from headrace.testing.conformance import BackendConformance
from headrace.testing.driver import Driver
from headrace.weights.checkpoint import open_checkpoint
from headrace.weights.lora import Adapter, LowRank
from headrace.weights.qtensor import QTensor
from tests.parity.cases import CASES, EXPERTS, FAMILIES
from tests.parity.common import TOLERANCE, Checkpoint, Open, all_logits, difference, of_case, prompt_of


@pytest.fixture(params=CASES)
def model(request: pytest.FixtureRequest, checkpoint: Checkpoint) -> Path:
    return of_case(request.param, checkpoint)


@pytest.fixture
def plain(checkpoint: Checkpoint) -> Path:
    return checkpoint("llama")


# ---------------------------------------------------------------- the same model


@pytest.mark.parametrize(("name", "chunk"), [*product(CASES, [512, 7]), *product(FAMILIES, [64, 1])])
def test_prefill_in_chunks(name: str, chunk: int, checkpoint: Checkpoint, open_driver: Open, reference: Any) -> None:
    model, tokens = of_case(name, checkpoint), prompt_of(150)
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
@pytest.mark.parametrize("name", CASES)
def test_low_precision_strays_no_further_than_transformers(
    name: str, dtype: str, checkpoint: Checkpoint, open_driver: Open, reference: Any
) -> None:
    """From float32: at most 1.5 times as far as transformers in the same type, on the average of all logits."""
    model, tokens = of_case(name, checkpoint), prompt_of(80)
    limit = 0.2 if name in EXPERTS else 0.1  # a token that is almost between two experts goes to the other
    wanted = reference(model).logits(tokens)
    theirs = np.abs(reference(model, dtype).logits(tokens) - wanted).mean()
    ours = np.abs(all_logits(open_driver(model, dtype=dtype), tokens) - wanted).mean()
    assert 0 < ours < 1.5 * theirs < limit * wanted.std()


# ---------------------------------------------------------------- the same bits

ALONE = (
    *FAMILIES,
    "one_kv_head",
    "odd_sizes",
    "odd_everywhere",
    "gemma3_softcap_biases",
    "gptj_odd_sizes_old",
    "qwen3_moe_all_dense_first_old",
)


@pytest.mark.parametrize(
    ("name", "dtype", "threads", "companies"),
    [
        *product(ALONE, ["float32"], [1], [(1, 2, 3, 6, 17, 32)]),
        *product(ALONE, ["bfloat16", "float16"], [1], [(3, 17)]),
        *product(ALONE, ["float32"], [2, 3], [(5,)]),
    ],
)
def test_bits_depend_on_the_row_alone(
    name: str, dtype: str, threads: int, companies: tuple[int, ...], checkpoint: Checkpoint, open_driver: Open
) -> None:
    """A sequence's logits are the same bits alone and whole, in chunks, and in company of 1 to 32 other rows."""
    driver = open_driver(of_case(name, checkpoint), dtype=dtype, threads=threads, max_tokens=2048)
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


def unsaid(tensors: Any) -> Any:
    """That token's logit is 0 (or its bias), far below the largest: no model generates it."""
    for name, tensor in tensors:
        if name == "head.weight":
            values = tensor.dequantise().copy()
            values[POISON] = 0.0
            tensor = QTensor.from_array(values)
        yield name, tensor


class TestConformance(BackendConformance):
    vocab_size = 61
    poison_id = POISON

    @pytest.fixture(params=["llama", "gemma3", "gptj", "qwen3_moe"])
    def driver(self, request: pytest.FixtureRequest, checkpoint: Checkpoint, open_driver: Open) -> Driver:
        self.model = checkpoint(request.param, vocab_size=61)
        return open_driver(self.model, change=lambda tensors: unsaid(poisoned(tensors)), max_tokens=64, max_rows=8)

    def adapter(self, name: str) -> Adapter:
        source = open_checkpoint(self.model)
        random = np.random.default_rng(list(name.encode()))
        weights = {}
        for rule in describe(source.config, source.format, source.shapes()).adapter_map.rules:
            if rule.target.endswith(("attn.q.weight", "attn.o.weight", "mlp.down.weight")):
                (rows, columns), rank = rule.shape, 3
                a, b = (random.normal(0, 0.3, size).astype(np.float32) for size in ((rank, columns), (rows, rank)))
                low = LowRank(QTensor.from_array(a), QTensor.from_array(b), 2.0)
                weights[rule.target.removesuffix(".weight")] = low
        return Adapter(name, weights)


@pytest.mark.parametrize("name", [*FAMILIES, "gemma3_softcap_biases"])
def test_nan_stays_in_its_row(name: str, checkpoint: Checkpoint, open_driver: Open) -> None:
    path = of_case(name, checkpoint)
    clean, sick = open_driver(path), open_driver(path, change=poisoned)
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
    assert out.error is None and out.accepted <= 1, "drafts are dropped, not the row"
    tokens += out.tokens
    assert tokens + driver.decode([row], 12 - len(tokens))[row] == expected


@pytest.mark.parametrize("backend_name", ["torch"], indirect=True)
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
