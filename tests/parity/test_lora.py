"""LoRA adapters against the peft package on tiny models; and that rows with and without do not touch each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.backends.torch import ops
from headrace.backends.torch.adapters import RowAdapters
from headrace.core.errors import EngineError, UnsupportedModel, WeightsMismatch
from headrace.models.registry import describe
from headrace.testing.driver import Driver
from headrace.weights.checkpoint import open_checkpoint
from headrace.weights.lora import Adapter, LowRank, read_adapter
from headrace.weights.qtensor import QTensor
from tests.parity.common import TOLERANCE, Checkpoint, Logits, Open, create_backend, difference, prompt_of
from tests.parity.peft_adapters import Tuned, write_adapter

Make = Callable[..., Path]
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """A random adapter of a checkpoint; the same arguments give the same folder."""
    made: dict[str, Path] = {}

    def make(model: Path, seed: int = 0, **config: Any) -> Path:
        key = repr((model, seed, sorted(config.items())))
        if key not in made:
            made[key] = write_adapter(tmp_path_factory.mktemp("adapter"), model, seed, **config)
        return made[key]

    return make


def load(driver: Driver, model: Path, **folders: Path) -> Driver:
    source = open_checkpoint(model)
    description = describe(source.config, source.format, source.shapes())
    for name, folder in folders.items():
        driver.backend.load_adapter(read_adapter(name, folder, description.spec, description.adapter_map))
    return driver


def logits_of(driver: Driver, tokens: Sequence[int], adapter: str = "", chunk: int | None = None) -> Logits:
    row = driver.admit(tokens, adapter=adapter)
    parts = []
    while (left := len(tokens) - driver.rows[row].computed) > 0:
        out = driver.run(driver.span(row, min(left, chunk or left), sample=False, logits=True))[row]
        assert out.error is None, out.error
        parts.append(out.logits)
    driver.release(row)
    return np.concatenate(parts)


CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "q_and_v": ("llama", {}, {"target_modules": ["q_proj", "v_proj"]}),
    "all_linear": ("llama", {}, {"target_modules": "all-linear", "r": 3}),
    "rank_1_and_rslora": ("llama", {}, {"target_modules": ATTENTION, "r": 1, "use_rslora": True}),
    "rank_over_width": ("llama", {}, {"target_modules": [*ATTENTION, *MLP], "r": 64, "lora_alpha": 16}),
    "patterns": (
        "llama",
        {},
        {
            "target_modules": [*ATTENTION, *MLP],
            "rank_pattern": {r"layers\.1\.mlp\..*": 7, "q_proj": 2, "layers.0.self_attn.v_proj": 5},
            "alpha_pattern": {"k_proj": 3, r".*\.(up|down)_proj": 1, "^model.layers.0.self_attn.o_proj": 20},
        },
    ),
    "patterns_and_rslora": (
        "llama",
        {},
        {"target_modules": MLP, "use_rslora": True, "rank_pattern": {"up_proj": 9}, "alpha_pattern": {"gate_proj": 5}},
    ),
    "one_layer": ("llama", {}, {"target_modules": ["down_proj"], "layers_to_transform": [1]}),
    "by_expression": ("llama", {}, {"target_modules": r".*layers\.0\..*(k_proj|gate_proj)"}),
    "not_the_k": ("llama", {}, {"target_modules": ATTENTION, "exclude_modules": ["k_proj"]}),
    "head": ("llama", {}, {"target_modules": ["lm_head", "o_proj"]}),
    "tied_head": ("llama", {"tie_word_embeddings": True}, {"target_modules": ["lm_head"]}),
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True}, {"target_modules": "all-linear"}),
    "orthogonal": ("llama", {}, {"target_modules": ["q_proj"], "init_lora_weights": "orthogonal"}),
    "qwen2": ("qwen2", {}, {"target_modules": ["q_proj", "k_proj", "up_proj"]}),
    "qwen3": ("qwen3", {}, {"target_modules": "all-linear"}),
    "gemma3": ("gemma3", {}, {"target_modules": "all-linear"}),
    "phi3_fused": ("phi3", {}, {"target_modules": ["qkv_proj", "gate_up_proj", "down_proj"], "r": 5}),
    "gptj": ("gptj", {}, {"target_modules": ["q_proj", "v_proj", "out_proj", "fc_in", "fc_out"]}),
    "qwen3_moe_attention": ("qwen3_moe", {}, {"target_modules": ATTENTION}),
    "mixtral_attention": ("mixtral", {}, {"target_modules": ATTENTION}),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest, checkpoint: Checkpoint, adapter: Make) -> tuple[Path, Path]:
    architecture, config, lora = CASES[request.param]
    model = checkpoint(architecture, **config)
    return model, adapter(model, **lora)


@pytest.fixture
def llama(checkpoint: Checkpoint) -> Path:
    return checkpoint("llama")


@pytest.fixture
def two(llama: Path, adapter: Make) -> dict[str, Path]:
    """Two adapters of different ranks and layers."""
    return {
        "a": adapter(llama, 1, target_modules=[*ATTENTION, "lm_head"], r=3),
        "b": adapter(llama, 2, target_modules=["v_proj", *MLP], r=10, lora_alpha=5),
    }


@pytest.fixture
def forwards(backend_name: str, monkeypatch: pytest.MonkeyPatch) -> Callable[[Driver], int]:
    """How many forwards there were: torch tries a plan that fails again in halves, which would hide the fault. On the
    native backend a plan is one call."""
    if backend_name == "native":
        return lambda driver: driver.step
    calls: list[int] = []
    embed = ops.embed

    def counting(*arguments: Any) -> Any:
        calls.append(1)
        return embed(*arguments)

    monkeypatch.setattr(ops, "embed", counting)
    return lambda driver: len(calls)


# ---------------------------------------------------------------- the same as peft


def test_logits_are_pefts(case: tuple[Path, Path], open_driver: Open) -> None:
    model, folder = case
    driver = load(open_driver(model), model, a=folder)
    tokens = prompt_of(120)
    wanted, plain = Tuned(model, folder).logits(tokens), Tuned(model, None).logits(tokens)
    assert difference(wanted, plain) > 0.05, "the adapter must do something"
    for chunk in (None, 7):
        assert difference(logits_of(driver, tokens, "a", chunk), wanted) < TOLERANCE
    assert difference(logits_of(driver, tokens), plain) < TOLERANCE


@pytest.mark.parametrize("name", ["a", "b", ""])
def test_greedy_decoding_is_pefts(name: str, llama: Path, two: dict[str, Path], open_driver: Open) -> None:
    driver = load(open_driver(llama), llama, **two)
    prompt = prompt_of(9, 3)
    assert driver.generate(prompt, 64, adapter=name) == Tuned(llama, two.get(name)).greedy(prompt, 64)


def test_all_in_one_batch_of_prefill_and_decode(llama: Path, two: dict[str, Path], open_driver: Open) -> None:
    driver = load(open_driver(llama), llama, **two)
    oracles = {name: Tuned(llama, two.get(name)) for name in ("a", "b", "")}
    names = ["a", "", "b", "b", "a", "", "a"]
    prompts = [prompt_of(5 + 3 * i, i) for i in range(len(names))]
    rows = [driver.admit(prompt, adapter=name) for prompt, name in zip(prompts, names, strict=True)]
    early, late = rows[:4], rows[4:]
    spans = [driver.span(row, len(prompt)) for row, prompt in zip(early, prompts[:4], strict=True)]
    tokens = {row: list(out.tokens) for row, out in driver.run(*spans).items()}
    decoding = [driver.span(row, 1, logits=True) for row in early]
    chunks = [driver.span(row, 9, logits=True, sample=False) for row in late]
    outs = driver.run(*decoding[:2], *chunks, *decoding[2:])
    for row, prompt, name in zip(rows, prompts, names, strict=True):
        wanted = oracles[name].logits([*prompt, *tokens[row]] if row in early else prompt[:9])
        assert difference(outs[row].logits, wanted[-1:] if row in early else wanted) < TOLERANCE


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_stays_close(dtype: str, llama: Path, two: dict[str, Path], open_driver: Open) -> None:
    driver = load(open_driver(llama, dtype=dtype), llama, **two)
    tokens = prompt_of(60, 5)
    plain = difference(logits_of(driver, tokens), Tuned(llama, None).logits(tokens))
    for name, folder in two.items():
        assert difference(logits_of(driver, tokens, name), Tuned(llama, folder).logits(tokens)) < 4 * plain


# ---------------------------------------------------------------- the same bits


@pytest.mark.parametrize(
    ("dtype", "threads"), [("float32", 1), ("float32", 2), ("float32", 3), ("bfloat16", 1), ("float16", 1)]
)
def test_bits_depend_on_the_row_and_its_adapter_alone(
    dtype: str, threads: int, llama: Path, two: dict[str, Path], open_driver: Open, forwards: Callable[[Driver], int]
) -> None:
    bare = open_driver(llama, dtype=dtype, threads=threads)
    driver = load(open_driver(llama, dtype=dtype, threads=threads), llama, **two)
    tokens = prompt_of(70, 6)
    alone = {name: logits_of(driver, tokens, name) for name in ("", "a", "b")}
    assert np.array_equal(alone[""], logits_of(bare, tokens)), "who has no adapter does not notice any"
    plans = driver.step - forwards(driver)
    for name, chunk in (("a", 33), ("b", 5), ("", 16)):
        assert np.array_equal(logits_of(driver, tokens, name, chunk), alone[name])
    for company in ("", "a", "b", "ab", "abab ba  b"):
        crowd = [driver.admit(prompt_of(6 + i, i), adapter=name.strip()) for i, name in enumerate(company)]
        rows = {name: driver.admit(tokens, adapter=name) for name in alone}
        found: dict[str, list[Logits]] = {name: [] for name in alone}
        for turn, size in enumerate((40, 27, 1, 2)):
            mine = [driver.span(row, size, logits=True, sample=size == 2) for row in rows.values()]
            others = [driver.span(row, 1 if turn else 6 + i) for i, row in enumerate(crowd)]
            outs = driver.run(*others[:3], *mine, *others[3:])
            for name, row in rows.items():
                found[name].append(outs[row].logits)
        assert all(np.array_equal(np.concatenate(found[name]), alone[name]) for name in alone)
        for row in (*crowd, *rows.values()):
            driver.release(row)
    assert forwards(driver) == driver.step - plans, "no plan was cut into halves"


@pytest.mark.parametrize("architecture", ["qwen3_moe", "mixtral"])
def test_adapters_of_experts_and_router(
    architecture: str, checkpoint: Checkpoint, open_driver: Open, forwards: Callable[[Driver], int]
) -> None:
    """Held against a model into whose weights the adapter is merged: peft itself no longer names single experts."""
    model = checkpoint(architecture)
    source = open_checkpoint(model)
    description = describe(source.config, source.format, source.shapes())
    random = np.random.default_rng(0)
    layers = {}
    for rule in description.weight_map.rules:
        name = rule.target.removesuffix(".weight")
        if any(part in name for part in ("experts.1.", "experts.3.", "router", "layers.1.attn.o")):
            a, b = (random.normal(0, 0.2, size).astype(np.float32) for size in ((2, rule.shape[1]), (rule.shape[0], 2)))
            layers[name] = LowRank(QTensor.from_array(a), QTensor.from_array(b), 1.5)

    def merged(tensors: Any) -> Any:
        for name, tensor in tensors:
            if (low := layers.get(name.removesuffix(".weight"))) is not None:
                update = low.scale * (low.b.dequantise() @ low.a.dequantise())
                tensor = QTensor.from_array(tensor.dequantise() + update)
            yield name, tensor

    tokens = prompt_of(90, 2)
    driver = open_driver(model)
    driver.backend.load_adapter(Adapter("a", layers))
    wanted = logits_of(open_driver(model, change=merged), tokens)
    found = logits_of(driver, tokens, "a")
    assert difference(found, wanted) < TOLERANCE < difference(logits_of(driver, tokens), wanted)
    rows = [driver.admit(tokens, adapter=name) for name in ("", "a", "")]
    before = forwards(driver)
    outs = driver.run(*(driver.span(row, 90, logits=True) for row in rows))
    assert np.array_equal(outs[rows[1]].logits, found) and forwards(driver) == before + 1


@given(
    spans=st.lists(st.tuples(st.sampled_from(["", "a", "b", "c"]), st.integers(1, 9)), min_size=1, max_size=8),
    multiple=st.sampled_from([4, 8, 12]),
    data=st.data(),
)
def test_groups_hold_each_row_once(spans: list[tuple[str, int]], multiple: int, data: st.DataObject) -> None:
    names, lengths = zip(*spans, strict=True)
    adapters = RowAdapters.of_spans(names, np.array(lengths, np.int64), multiple)
    whose = [name for name, length in spans for _ in range(length)]
    if adapters is None:
        assert set(whose) == {""}
        return
    taken = np.array(data.draw(st.lists(st.integers(0, len(whose) - 1), max_size=20)), np.int64)
    for part, owners in ((adapters, whose), (adapters.take(taken), [whose[i] for i in taken])):
        assert {group.name for group in part.groups} == set(owners) - {""}
        for group in part.groups:
            assert group.rows.tolist() == [i for i, owner in enumerate(owners) if owner == group.name]
            if group.filled is None:
                assert len(group.rows) == len(owners)
            else:
                assert len(group.filled) % multiple == 0 and len(group.filled) - len(group.rows) < multiple
                assert set(group.filled.tolist()) == set(group.rows.tolist())


# ---------------------------------------------------------------- what a backend refuses


def low_rank(rows: int, columns: int, rank: int = 2, value: float = 0.5, scale: float = 1.0) -> LowRank:
    a, b = (np.full(size, value, np.float32) for size in ((rank, columns), (rows, rank)))
    return LowRank(QTensor.from_array(a), QTensor.from_array(b), scale)


@pytest.mark.parametrize(
    ("layer", "low", "kind", "message"),
    [
        ("layers.9.attn.q", low_rank(48, 48), UnsupportedModel, "'layers.9.attn.q' is no linear layer"),
        ("embed", low_rank(97, 48), UnsupportedModel, "'embed' is no linear layer"),
        ("layers.0.attn.q", low_rank(48, 47), WeightsMismatch, r"is not \(48, 48\)"),
        ("layers.0.attn.k", low_rank(48, 48), WeightsMismatch, r"is not \(16, 48\)"),
        ("layers.0.attn.q", low_rank(48, 48, rank=0), WeightsMismatch, r"is not \(48, 48\)"),
        ("layers.0.attn.q", low_rank(48, 48, scale=1e39), UnsupportedModel, "too large for float"),
    ],
)
def test_an_adapter_that_does_not_fit_changes_nothing(
    layer: str, low: LowRank, kind: type[Exception], message: str, llama: Path, open_driver: Open
) -> None:
    driver = open_driver(llama, dtype="float16")
    before = driver.backend.memory()
    good = {"layers.1.mlp.down": low_rank(48, 80)}
    with pytest.raises(kind, match=message):
        driver.backend.load_adapter(Adapter("a", {**good, layer: low}))
    assert driver.backend.memory() == before
    driver.backend.load_adapter(Adapter("a", good))
    assert driver.backend.memory()["adapters"] > before["adapters"] == 0


def test_only_a_loaded_backend_takes_adapters(llama: Path, backend_name: str, open_driver: Open) -> None:
    with pytest.raises(EngineError, match="holds no model"):
        create_backend(backend_name).load_adapter(Adapter("a", {}))
    backend = open_driver(llama).backend
    backend.close()
    with pytest.raises(EngineError, match="closed"):
        backend.load_adapter(Adapter("a", {}))
