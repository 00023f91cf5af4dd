"""What each backend refuses, and how it starts and ends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from headrace.backends.base import Backend, BackendOptions
from headrace.core.errors import ConfigError, EngineError, HeadraceError, OutOfMemory, UnsupportedModel, WeightsMismatch
from headrace.core.spec import (
    AttentionSpec,
    EmbeddingSpec,
    LayerSpec,
    ModelSpec,
    MoeSpec,
    NormSpec,
    RopeScaling,
    RopeSpec,
    WeightMap,
)
from headrace.core.types import Capacity, RowStep, StepPlan
from headrace.models.registry import describe
from headrace.parallel.mesh import Mesh
from headrace.testing.driver import Driver
from headrace.weights.checkpoint import Checkpoint, open_checkpoint
from headrace.weights.loader import stream
from headrace.weights.qtensor import QTensor
from tests.parity.common import BACKENDS, create_backend

OPTIONS = BackendOptions("float32", 1, 8, 16, 4, 64, 64)
CAPACITY = Capacity(OPTIONS.num_blocks, OPTIONS.block_size, OPTIONS.max_rows, OPTIONS.max_tokens)
Tiny = tuple[Checkpoint, ModelSpec, WeightMap]
Load = Callable[..., Backend]
Change = Callable[[dict[str, QTensor]], list[tuple[str, QTensor]]]


@pytest.fixture(scope="module")
def tiny(checkpoint: Callable[..., Path]) -> Tiny:
    source = open_checkpoint(checkpoint("llama"))
    description = describe(source.config, source.format, source.shapes())
    return source, description.spec, description.weight_map


@pytest.fixture(params=BACKENDS)
def load(request: pytest.FixtureRequest, tiny: Tiny) -> Load:
    """Loads a new backend; `change` may alter the tensors on their way."""
    source, own, weight_map = tiny

    def load_one(
        spec: ModelSpec | None = None,
        mesh: Mesh | None = None,
        change: Change = lambda tensors: list(tensors.items()),
        **options: Any,
    ) -> Backend:
        backend = create_backend(request.param)
        tensors = iter(change(dict(stream(source, weight_map))))
        backend.load(spec or own, tensors, replace(OPTIONS, **options), mesh or Mesh())
        return backend

    return load_one


# ---------------------------------------------------------------- what it refuses


def with_attention(**change: Any) -> Callable[[ModelSpec], ModelSpec]:
    return lambda spec: with_layer(attention=replace(spec.layers[0].attention, **change))(spec)


def with_layer(**change: Any) -> Callable[[ModelSpec], ModelSpec]:
    return lambda spec: replace(spec, layers=(spec.layers[0], replace(spec.layers[1], **change)))


def with_mlp(**change: Any) -> Callable[[ModelSpec], ModelSpec]:
    return lambda spec: with_layer(mlp=replace(spec.layers[0].mlp, **change))(spec)


def with_norms(**change: Any) -> Callable[[ModelSpec], ModelSpec]:
    return lambda spec: with_layer(norms=replace(spec.layers[0].norms, **change))(spec)


NORM = NormSpec("rms", 1e-6, 48)
MOE = MoeSpec(4, 2, 8, True)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (with_attention(q_norm=NORM), "attention.q_norm or k_norm over all heads"),
        (with_attention(k_norm=NORM), "attention.q_norm or k_norm over all heads"),
        (with_attention(alibi=True), "attention.alibi"),
        (with_attention(kv_heads=4), "attention.heads that kv_heads does not divide"),
        (with_attention(rope=RopeSpec(16, 1e4)), "attention.rope"),
        (with_attention(rope=RopeSpec(8, 1e4, scaling=RopeScaling("ntk"))), "rope.scaling"),
        (with_mlp(activation="relu2"), "mlp.activation"),
        (with_mlp(experts=MOE, bias=True), "mlp.experts with biases"),
        (with_mlp(experts=replace(MOE, shared_intermediate=8)), "mlp.experts.shared_intermediate"),
        (with_norms(pre_attn=None), "norms.pre_attn = none"),
        (with_norms(pre_mlp=None), "norms.pre_mlp = none"),
        (with_layer(parallel=True), "norms beside pre_attn in a parallel layer"),
        (lambda spec: replace(spec, embedding=EmbeddingSpec(False, 1.0, (2, 64))), "embedding.learned_positions"),
        (lambda spec: replace(spec, layers=()), "layers"),
    ],
)
def test_a_field_it_does_not_run_is_named(
    tiny: Tiny, load: Load, change: Callable[[ModelSpec], ModelSpec], field: str
) -> None:
    with pytest.raises(UnsupportedModel, match=field):
        load(change(tiny[1]))


def test_every_field_of_attention_and_layer_is_known_here() -> None:
    """A field added to the spec must be honoured or refused: this list is a reminder."""
    assert set(AttentionSpec.__slots__) == {
        *("heads", "kv_heads", "head_dim", "scale", "qkv_bias", "o_bias", "q_norm", "k_norm", "rope", "window"),
        *("softcap", "alibi"),
    }
    assert set(LayerSpec.__slots__) == {"attention", "mlp", "norms", "parallel", "residual_scale"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: list(t.items())[1:], "did not come"),
        (lambda t: [*t.items(), next(iter(t.items()))], "came twice"),
        (lambda t: [*t.items(), ("layers.9.attn.q.weight", t["layers.0.attn.q.weight"])], "is not part of the model"),
        (lambda t: [(n, q.rows(0, 3) if n == "embed.weight" else q) for n, q in t.items()], r"shape \(3, 48\)"),
    ],
)
def test_every_tensor_comes_once(load: Load, change: Change, message: str) -> None:
    with pytest.raises(WeightsMismatch, match=message):
        load(change=change)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (UnsupportedModel, {"mesh": Mesh(tp=2)}, "2 × 1 ranks"),
        (UnsupportedModel, {"mesh": Mesh(pp=2)}, "1 × 2 ranks"),
        (ConfigError, {"dtype": "float8"}, "dtype: got 'float8'"),
        (OutOfMemory, {"num_blocks": 1 << 44}, "do not fit in memory"),
    ],
)
def test_options_it_cannot_honour(load: Load, kind: type[HeadraceError], options: dict[str, Any], message: str) -> None:
    with pytest.raises(kind, match=message):
        load(**options)


# ---------------------------------------------------------------- from load to close


@pytest.mark.parametrize("name", BACKENDS)
def test_before_load(name: str) -> None:
    backend = create_backend(name)
    with pytest.raises(EngineError, match="holds no model"):
        backend.submit(StepPlan(0, ()))
    assert backend.probe()["device"] == "cpu", "needs no model"
    backend.close()
    with pytest.raises(EngineError, match="closed"):
        backend.submit(StepPlan(0, ()))


def test_life(tiny: Tiny, load: Load) -> None:
    backend = load()
    with pytest.raises(EngineError, match="already holds a model"):
        backend.load(tiny[1], iter(()), OPTIONS, Mesh())
    with pytest.raises(EngineError, match="result\\(\\) without a plan"):
        backend.result()
    backend.submit(StepPlan(7, ()))
    with pytest.raises(EngineError, match="before the result of plan 7"):
        backend.submit(StepPlan(8, ()))
    assert backend.result().step == 7
    assert "float32" in backend.explain()
    backend.close()
    backend.close()
    for call in (backend.result, backend.explain, backend.memory, lambda: backend.submit(StepPlan(9, ()))):
        with pytest.raises(EngineError, match="closed"):
            call()
    with pytest.raises(EngineError, match="closed"):
        backend.load(tiny[1], iter(()), OPTIONS, Mesh())


def test_memory(tiny: Tiny, load: Load) -> None:
    """What the weights and the KV cache take; the native backend fills rows up to 16."""
    backend = load()
    memory = backend.memory()
    weights = 4 * sum(int(np.prod(rule.shape)) for rule in tiny[2].rules)
    kv_cache = 2 * OPTIONS.num_blocks * 2 * 8 * (8 + 8) * 4
    if backend.name == "torch":
        kv_cache += 2 * 2 * 8 * (8 + 8) * 4  # a block for rows that fill up a batch
    else:
        weights += 4 * 48 * (112 - 97) * 2
        kv_cache = 2 * OPTIONS.num_blocks * 2 * 16 * (8 + 16) * 4
    assert (memory["weights"], memory["kv_cache"], memory["adapters"]) == (weights, kv_cache, 0)
    assert memory["workspace"] > 0


def test_a_backend_that_failed_to_load_can_be_loaded(tiny: Tiny, load: Load) -> None:
    """And two hold their models side by side."""
    source, spec, weight_map = tiny
    other, backend = load(), create_backend(load().name)
    with pytest.raises(WeightsMismatch):
        backend.load(spec, iter(()), OPTIONS, Mesh())
    backend.load(spec, stream(source, weight_map), OPTIONS, Mesh())
    wanted = Driver(other, CAPACITY).generate([3, 4, 5], 20)
    other.close()
    assert Driver(backend, CAPACITY).generate([3, 4, 5], 20) == wanted


def test_seconds_by_phase(load: Load) -> None:
    backend = load()
    driver = Driver(backend, CAPACITY)
    driver.submit(driver.span(driver.admit([3, 4, 5]), 3))
    seconds = backend.result().seconds
    assert set(seconds) == {"prepare", "forward", "sample"} and all(value > 0 for value in seconds.values())


def test_a_plan_that_breaks_the_protocol(load: Load) -> None:
    backend = load()
    with pytest.raises(EngineError, match="row 3, where no request is"):
        backend.submit(StepPlan(0, (RowStep(3, 0, 1),)))


def test_a_grammar_mask_for_each_draft(load: Load) -> None:
    """One vocabulary's bits for each position: only id 5, then only id 6, then only id 7."""
    driver = Driver(load(), CAPACITY)
    row = driver.admit([3, 4])
    masks = b"".join((1 << token).to_bytes(13, "little") for token in (5, 6, 7))
    (out,) = driver.run(replace(driver.span(row, 2, drafts=(5, 6)), mask=masks)).values()
    assert out.tokens == (5, 6, 7) and out.accepted == 2
    (out,) = driver.run(replace(driver.span(row, 1), mask=b"\x01")).values()
    assert out.error is not None and "13 needed" in out.error.message
