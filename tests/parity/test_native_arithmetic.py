"""The native backend in each of its kinds of arithmetic: the protocol, the same bits whatever the company, and how far
int8 activations stray from the plain backend."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from headrace.backends.base import BackendOptions
from headrace.core.types import SamplingParams, TokenLogprobs
from headrace.models.registry import describe
from headrace.testing.conformance import BackendConformance
from headrace.testing.driver import Driver
from headrace.weights.checkpoint import open_checkpoint
from headrace.weights.loader import stream
from headrace.weights.lora import Adapter, LowRank
from headrace.weights.qtensor import QTensor
from tests.parity.common import Checkpoint, Logits, Open, all_logits, prompt_of
from tests.parity.native_cases import ARITHMETIC, EXPERTS, SIZES, WIDE, Tensors, random_tensor

kernels = pytest.importorskip("headrace.backends.native._kernels")
backend_module = pytest.importorskip("headrace.backends.native.backend")
weights_module = pytest.importorskip("headrace.backends.native.weights")

SETS: Sequence[str] = backend_module.instruction_sets()
POISON = 60
VOCAB = 61


@pytest.fixture(params=["native"])
def backend_name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def open_as(checkpoint: Checkpoint, open_driver: Open) -> Callable[..., Driver]:
    """A tiny model in this arithmetic."""

    def open_one(
        name: str, architecture: str = "llama", change: Callable[[Any], Any] = lambda tensors: tensors, **options: Any
    ) -> Driver:
        one = ARITHMETIC[name]
        path = checkpoint(architecture, **(EXPERTS if architecture == "qwen3_moe" else one.sizes))
        return open_driver(path, change=lambda tensors: change(one.change(tensors)), **{**one.options, **options})

    return open_one


# ---------------------------------------------------------------- the protocol


def poisoned(tensors: Tensors) -> Tensors:
    """One token's embedding is NaN, where the checkpoint packs it too; and its logit is 0, so that nobody says it."""
    for name, tensor in tensors:
        if name in ("embed.weight", "head.weight"):
            tensor = with_row(tensor, POISON, np.nan if name == "embed.weight" else 0.0)
        yield name, tensor


def with_row(tensor: QTensor, row: int, value: float) -> QTensor:
    """All of a row, by its numbers or by what scales them."""
    planes = {name: plane.copy() for name, plane in tensor.planes.items()}
    if tensor.scheme == "bf16":
        planes["data"][row] = 0x7FC0 if np.isnan(value) else 0
    for name in {"data", "d", "m", "dmin", "s"} & planes.keys():
        if planes[name].dtype.kind == "f":
            planes[name][row] = value
    return QTensor(tensor.scheme, tensor.shape, planes)


def random_adapter(name: str, model: Path, size: float = 0.3) -> Adapter:
    source = open_checkpoint(model)
    random = np.random.default_rng(list(name.encode()))
    weights = {}
    for rule in describe(source.config, source.format, source.shapes()).adapter_map.rules:
        if rule.target.endswith(("attn.q.weight", "attn.o.weight", "mlp.down.weight")):
            (rows, columns), rank = rule.shape, 3
            a, b = (random.normal(0, size, shape).astype(np.float32) for shape in ((rank, columns), (rows, rank)))
            low = LowRank(QTensor.from_array(a), QTensor.from_array(b), 2.0)
            weights[rule.target.removesuffix(".weight")] = low
    return Adapter(name, weights)


class TestConformance(BackendConformance):
    vocab_size = VOCAB
    poison_id = POISON

    @pytest.fixture(params=ARITHMETIC)
    def driver(self, request: pytest.FixtureRequest, checkpoint: Checkpoint, open_as: Callable[..., Driver]) -> Driver:
        self.model = checkpoint("llama", **ARITHMETIC[request.param].sizes)
        return open_as(request.param, change=poisoned, max_tokens=64, max_rows=8)

    def adapter(self, name: str) -> Adapter:
        return random_adapter(name, self.model)


# ---------------------------------------------------------------- NaN


@pytest.mark.parametrize(
    ("name", "architecture"),
    [(name, "llama") for name in ARITHMETIC]
    + [(name, "qwen3_moe") for name, one in ARITHMETIC.items() if one.sizes is not WIDE],
)
def test_nan_stays_in_its_row(name: str, architecture: str, open_as: Callable[..., Driver]) -> None:
    clean, sick = open_as(name, architecture), open_as(name, architecture, change=poisoned)
    prompts = [[token % POISON for token in prompt_of(12 + i, i)] for i in range(6)]
    alone = [all_logits(clean, prompt) for prompt in prompts]
    for turn in range(3):  # the blocks of a failed row go to others
        bad = [sick.admit([5, POISON, *(i % POISON for i in prompt_of(20, turn))]), sick.admit([POISON])]
        rows = [sick.admit(prompt) for prompt in prompts]
        steps = [sick.span(row, len(prompt), logits=True) for row, prompt in zip(rows, prompts, strict=True)]
        outs = sick.run(sick.span(bad[0], 22), *steps, sick.span(bad[1], 1))
        for row in bad:
            assert outs[row].error is not None and outs[row].error.code == "nan_logits" and not outs[row].tokens
        for row, wanted in zip(rows, alone, strict=True):
            assert outs[row].error is None and np.array_equal(outs[row].logits[:, :POISON], wanted[:, :POISON])
        for row in (*bad, *rows):
            sick.release(row)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("quant", ["none", "int8", "int4"])
def test_one_bad_number_is_not_rounded_away(quant: str, value: float, open_as: Callable[..., Driver]) -> None:
    """A single weight of one token's embedding, wherever it lies in its group."""

    def spoilt(tensors: Tensors) -> Tensors:
        for name, tensor in tensors:
            if name == "embed.weight":
                values = tensor.dequantise().copy()
                values[[7, 8, 9], [0, 13, 63]] = value
                tensor = QTensor.from_array(values)
            yield name, tensor

    driver = open_as("float32", change=spoilt, quant=quant)
    rows = {token: driver.admit([3, token, 4]) for token in (6, 7, 8, 9, 10)}
    outs = driver.run(*(driver.span(row, 3) for row in rows.values()))
    errors = {token: outs[row].error for token, row in rows.items()}
    assert [token for token, error in errors.items() if error is not None and error.code == "nan_logits"] == [7, 8, 9]


# ---------------------------------------------------------------- the same bits


def company(driver: Driver, tokens: Sequence[int], others: int, seed: int) -> tuple[Logits, list[TokenLogprobs]]:
    """The row's logits and log-probabilities, computed among `others` rows in random chunks, at a random place."""
    draw = np.random.default_rng([seed, others])
    place = int(draw.integers(0, others + 1))
    crowd = [driver.admit([int(i) for i in draw.integers(3, 60, draw.integers(1, 40))]) for _ in range(others)]
    row = driver.admit(tokens, SamplingParams(prompt_logprobs=3, logprobs=3, temperature=0.8, seed=5))
    logits, scores = [], []
    while (left := len(tokens) - driver.rows[row].computed) > 0:
        size = min(left, 1 if left < 4 else int(draw.integers(1, 60)))
        mine = driver.span(row, size, sample=size == left, logits=True)
        mine = replace(mine, score_prompt=True)
        steps = [
            driver.span(other, 1 if driver.rows[other].computed else driver.rows[other].num_prompt) for other in crowd
        ]
        out = driver.run(*steps[:place], mine, *steps[place:])[row]
        assert out.error is None
        logits.append(out.logits)
        scores += [*out.prompt_logprobs, *out.logprobs]
    for gone in (row, *crowd):
        driver.release(gone)
    return np.concatenate(logits), scores


@pytest.mark.parametrize(
    ("name", "isa", "threads"), [*product(ARITHMETIC, SETS, [1]), *product(ARITHMETIC, SETS[-1:], [2, 3])]
)
def test_bits_depend_on_the_row_alone(name: str, isa: str, threads: int, open_as: Callable[..., Driver]) -> None:
    driver = open_as(name, backend=backend_module.NativeBackend(isa), threads=threads, max_tokens=2048)
    tokens = [token % POISON for token in prompt_of(140, 6)]
    alone = all_logits(driver, tokens)
    first = company(driver, tokens, 0, 0)
    assert np.array_equal(first[0], alone) and len(first[1]) == len(tokens)
    for seed, others in enumerate((0, 1, 2, 5, 17) if threads == 1 else (0, 5)):
        logits, scores = company(driver, tokens, others, seed)
        assert np.array_equal(logits, alone) and scores == first[1]
    size = driver.capacity.block_size
    owner = driver.admit(tokens)
    driver.run(driver.span(owner, 64, sample=False))
    hit = driver.admit(tokens, shared=driver.rows[owner].blocks[: 64 // size])
    out = driver.run(driver.span(owner, 9, sample=False), driver.span(hit, len(tokens) - 64, logits=True))[hit]
    assert np.array_equal(out.logits, alone[64:])


def test_more_threads_share_the_work_and_change_nothing(open_as: Callable[..., Driver]) -> None:
    tokens = [token % POISON for token in prompt_of(100, 2)]
    for name in ("float32", "int4", "q4_1"):
        one, three = open_as(name, threads=1), open_as(name, threads=3)
        assert np.array_equal(all_logits(one, tokens), all_logits(three, tokens))


@pytest.mark.parametrize("name", ["float32", "q4_1", "packed and plain"])
@pytest.mark.parametrize("isa", SETS)
def test_a_long_prompt_at_once_and_in_pieces(name: str, isa: str, open_as: Callable[..., Driver]) -> None:
    """More tokens than meet a panel at a time (120), and pieces of every kind: one item a thread, two, or many."""
    driver = open_as(name, backend=backend_module.NativeBackend(isa), threads=3)
    prompt = [token % POISON for token in prompt_of(250, 3)]
    whole = all_logits(driver, prompt)
    for chunk in (249, 121, 40, 13, 3):
        assert all_logits(driver, prompt, chunk).tobytes() == whole.tobytes(), chunk


def test_steps_of_two_backends_at_once(open_as: Callable[..., Driver]) -> None:
    """Each has its workspace and its threads."""
    drivers = [open_as("q4_1", threads=2), open_as("q4_1", threads=2), open_as("int8", threads=1)]
    prompts = [[token % POISON for token in prompt_of(60, i)] for i in range(len(drivers))]
    wanted = [all_logits(driver, prompt, 9) for driver, prompt in zip(drivers, prompts, strict=True)]
    with ThreadPoolExecutor(3) as workers:
        found = list(workers.map(lambda i: [all_logits(drivers[i], prompts[i], 9) for _ in range(5)], range(3)))
    for mine, same in zip(found, wanted, strict=True):
        assert all(np.array_equal(one, same) for one in mine)


# ---------------------------------------------------------------- how near


NEAR = 0.01
"""Nats. A model as small as these, of random weights, shows more of a rounding than a trained one."""


def divergence(found: Logits, wanted: Logits) -> float:
    """Mean KL(wanted ‖ found) in nats."""

    def logs(logits: Logits) -> Any:
        centred = logits.astype(np.float64) - logits.max(-1, keepdims=True)
        return centred - np.log(np.exp(centred).sum(-1, keepdims=True))

    p, q = logs(wanted), logs(found)
    return float((np.exp(p) * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("name", [name for name, one in ARITHMETIC.items() if one.schemes])
def test_stored_weights_give_nearly_the_plain_models_logits(name: str, open_as: Callable[..., Driver]) -> None:
    """The same weights dequantised, with float32 arithmetic; the difference is the rounding of activations."""
    tokens = [token % POISON for token in prompt_of(150, 1)]
    wanted = all_logits(open_as(name, quant="none", kv_dtype="float32"), tokens)
    found = all_logits(open_as(name), tokens)
    assert 0 < divergence(found, wanted) < NEAR
    assert (found.argmax(-1) == wanted.argmax(-1)).mean() > 0.9


@pytest.mark.parametrize("name", ["q4_1", "q8_0", "int4, int8"])
def test_adapters_over_stored_weights(name: str, checkpoint: Checkpoint, open_as: Callable[..., Driver]) -> None:
    """What an adapter adds is computed in float32, from activations that are not rounded."""
    tokens = [token % POISON for token in prompt_of(60, 1)]
    adapter = random_adapter("a", checkpoint("llama", **SIZES), 0.1)

    def logits_of(driver: Driver, whose: str) -> Logits:
        row = driver.admit(tokens, adapter=whose)
        found = driver.run(driver.span(row, len(tokens), logits=True))[row].logits
        assert found is not None
        return found

    drivers = open_as(name), open_as(name, quant="none", kv_dtype="float32")
    for driver in drivers:
        driver.backend.load_adapter(adapter)
    stored, plain = ([logits_of(driver, whose) for whose in ("a", "")] for driver in drivers)
    assert divergence(stored[0], plain[0]) < NEAR < divergence(*plain)


def narrow(tensors: Tensors) -> Tensors:
    """Plain weights of the size that a trained model's have."""
    for index, (name, tensor) in enumerate(tensors):
        yield name, random_tensor("f32", tensor.shape, index) if len(tensor.shape) == 2 else tensor


@pytest.mark.parametrize("quant", ["int8", "int4"])
def test_weights_rounded_at_load(quant: str, open_as: Callable[..., Driver]) -> None:
    """Against the plain backend with the rounded weights; and the rounding itself is what the number of bits allows."""
    packer = kernels.Packer(1)

    def rounded(tensors: Tensors) -> Tensors:
        for name, tensor in narrow(tensors):
            if len(tensor.shape) == 2:
                bits = 8 if name == "embed.weight" else int(quant[3:])
                weight = kernels.quantise_numbers(packer, bits, tensor.dequantise(), "f32")
                tensor = QTensor.from_array(weight.unpack())
            yield name, tensor

    tokens = [token % POISON for token in prompt_of(150, 1)]
    wanted = all_logits(open_as("float32", change=rounded), tokens)
    found = all_logits(open_as("float32", change=narrow, quant=quant), tokens)
    assert 0 < divergence(found, wanted) < NEAR


def test_two_sessions_on_one_program(checkpoint: Checkpoint) -> None:
    """Each with blocks, rows and a workspace of its own, at the same time."""
    source = open_checkpoint(checkpoint("llama", **ARITHMETIC["q4_1"].sizes))
    description = describe(source.config, source.format, source.shapes())
    tensors = ARITHMETIC["q4_1"].change(stream(source, description.weight_map))
    options = BackendOptions("float32", 2, 16, 16, 4, 128, 128, "stored", "int8")
    packing = weights_module.Packing(tensors, kernels.Packer(options.threads), options.quant, options.dtype)
    loaded = backend_module.Loaded(description.spec, packing, options, SETS[-1])
    head = loaded.compiled.head, loaded.compiled.logits
    sessions = [
        kernels.Session(loaded.compiled.program, loaded.kv, VOCAB, 4, 128, 128, threads, *head) for threads in (1, 2)
    ]
    prompts = [[token % POISON for token in prompt_of(70, i)] for i in range(2)]

    def run(which: int, chunk: int) -> list[Logits]:
        session, prompt, parts = sessions[which], prompts[which], []
        sampling = kernels.RowSampling(SamplingParams(), len(prompt), (), VOCAB)
        session.admit(0, prompt, len(prompt), sampling, -1)
        session.append_blocks(0, list(range(8 * which, 8 * which + 5)))
        for start in range(0, len(prompt), chunk):
            session.ask(0, start, min(chunk, len(prompt) - start), [], False, True, False, None)
            ((_, _, _, error, logits, _),) = session.run()
            assert error is None
            parts.append(logits)
        session.release(0)
        return parts

    alone = [np.concatenate(run(which, 70)) for which in range(2)]
    with ThreadPoolExecutor(2) as workers:
        for _ in range(5):
            found = list(workers.map(run, range(2), (3, 7)))
            assert all(np.array_equal(np.concatenate(mine), same) for mine, same in zip(found, alone, strict=True))
