"""Fields of a ModelSpec that no described family sets: their specs are made here, by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from headrace.core.spec import HeadSpec, LayerNorms, LayerSpec, ModelSpec, NormSpec, WeightMap
from headrace.models import gemma3, llama
from headrace.models.config import ConfigReader
from headrace.models.mapping import LLAMA_NORMS, llama_like_map
from headrace.weights.qtensor import QTensor
from tests.parity.cases import longrope, rope
from tests.parity.common import TOLERANCE, Checkpoint, Open, all_logits, difference, prompt_of

Change = Callable[[ModelSpec, Mapping[str, Any]], ModelSpec]
Read = Callable[[Mapping[str, Any]], tuple[ModelSpec, WeightMap]]


def reader(change: Change, norms: Mapping[str, str] = LLAMA_NORMS) -> Read:
    """Llama's description of a config, changed."""

    def read(config: Mapping[str, Any]) -> tuple[ModelSpec, WeightMap]:
        spec, _ = llama.describe(ConfigReader({**config, "sliding_window": None}, "config.json"))
        spec = change(spec, config)
        return spec, llama_like_map(spec, norms)

    return read


def as_gemma2(spec: ModelSpec, config: Mapping[str, Any]) -> ModelSpec:
    norm = NormSpec("rms", config["rms_norm_eps"], config["hidden_size"], unit_offset=True)
    plain = spec.layers[0]
    attention = replace(
        plain.attention, scale=config["query_pre_attn_scalar"] ** -0.5, softcap=config["attn_logit_softcapping"]
    )
    windows = [config["sliding_window"] if kind == "sliding_attention" else None for kind in config["layer_types"]]
    mlp = replace(plain.mlp, activation="gelu_tanh")
    return replace(
        spec,
        embedding=replace(spec.embedding, scale=config["hidden_size"] ** 0.5),
        layers=tuple(
            LayerSpec(replace(attention, window=window), mlp, LayerNorms(norm, norm, norm, norm)) for window in windows
        ),
        final_norm=norm,
        head=HeadSpec(softcap=config["final_logit_softcapping"]),
    )


def as_granite(spec: ModelSpec, config: Mapping[str, Any]) -> ModelSpec:
    layers = tuple(
        replace(
            one,
            attention=replace(one.attention, scale=config["attention_multiplier"]),
            residual_scale=config["residual_multiplier"],
        )
        for one in spec.layers
    )
    embedding = replace(spec.embedding, scale=config["embedding_multiplier"])
    return replace(spec, embedding=embedding, layers=layers, head=HeadSpec(scale=1 / config["logits_scaling"]))


READERS = {"gemma2": reader(as_gemma2, gemma3.NORMS), "granite": reader(as_granite)}


@pytest.mark.parametrize("family", READERS)
@pytest.mark.parametrize("chunk", [512, 7])
def test_gemma2_and_granite(family: str, chunk: int, checkpoint: Checkpoint, open_driver: Open, reference: Any) -> None:
    path, tokens = checkpoint(family), prompt_of(150)
    driver = open_driver(path, read=READERS[family])
    assert difference(all_logits(driver, tokens, chunk), reference(path).logits(tokens)) < TOLERANCE
    assert driver.generate(prompt_of(11, 5), 64) == reference(path).greedy(prompt_of(11, 5), 64)


@pytest.mark.parametrize("family", READERS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_gemma2_and_granite_in_low_precision(
    family: str, dtype: str, checkpoint: Checkpoint, open_driver: Open, reference: Any
) -> None:
    path, tokens = checkpoint(family), prompt_of(80)
    wanted = reference(path).logits(tokens)
    theirs = np.abs(reference(path, dtype).logits(tokens) - wanted).mean()
    ours = np.abs(all_logits(open_driver(path, read=READERS[family], dtype=dtype), tokens) - wanted).mean()
    assert 0 < ours < 1.5 * theirs < 0.1 * wanted.std()


def test_layers_of_differing_heads(checkpoint: Checkpoint, open_driver: Open) -> None:
    """Key heads that are there three times over, in one layer: the same model, with 6 key heads instead of 2."""

    def widen(spec: ModelSpec, _: Mapping[str, Any]) -> ModelSpec:
        first, second = spec.layers
        return replace(spec, layers=(first, replace(second, attention=replace(second.attention, kv_heads=6))))

    def repeat(tensors: Iterator[tuple[str, QTensor]]) -> Iterator[tuple[str, QTensor]]:
        for name, tensor in tensors:
            if name in ("layers.1.attn.k.weight", "layers.1.attn.v.weight"):
                heads = tensor.dequantise().reshape(2, 8, 48)
                tensor = QTensor.from_array(np.repeat(heads, 3, axis=0).reshape(48, 48))
            yield name, tensor

    def read(config: Mapping[str, Any]) -> tuple[ModelSpec, WeightMap]:
        plain, weight_map = llama.describe(ConfigReader(config, "config.json"))
        return widen(plain, config), weight_map

    path, tokens = checkpoint("llama"), prompt_of(150)
    plain, wider = open_driver(path), open_driver(path, read=read, change=repeat)
    wanted = all_logits(wider, tokens)
    assert difference(all_logits(plain, tokens), wanted) < TOLERANCE
    assert np.array_equal(all_logits(wider, tokens, 7), wanted)
    assert wider.generate(prompt_of(11, 5), 30) == plain.generate(prompt_of(11, 5), 30)


def test_dynamic_rope_past_the_original_context(checkpoint: Checkpoint, open_driver: Open, reference: Any) -> None:
    """The base is fixed for max_model_len: what transformers gives a sequence of exactly that length."""
    dynamic = rope("dynamic", rope_theta=1000.0, factor=4.0)
    path, tokens = checkpoint("llama", max_position_embeddings=64, **dynamic), prompt_of(150)
    wanted = reference(path).logits(tokens)
    assert difference(all_logits(open_driver(path, max_model_len=150), tokens, 33), wanted) < TOLERANCE
    longer = all_logits(open_driver(path, max_model_len=200), tokens)
    assert difference(longer, wanted) > 0.01, "another length, another base"


def test_longrope_has_one_set_of_factors(checkpoint: Checkpoint, open_driver: Open, reference: Any) -> None:
    """Which one is a matter of max_model_len: not of how long a sequence is at the moment."""
    path = checkpoint("phi3", **longrope(4, 100))
    beyond = prompt_of(101)
    inside = beyond[:100]
    short, long = open_driver(path, max_model_len=100), open_driver(path, max_model_len=101)
    assert difference(all_logits(short, inside, 13), reference(path).logits(inside)) < TOLERANCE
    wanted = reference(path).logits(beyond)
    assert difference(all_logits(long, beyond, 13), wanted) < TOLERANCE
    assert difference(all_logits(long, inside), wanted[:100]) < TOLERANCE
    assert difference(all_logits(short, inside), wanted[:100]) > 0.01


def test_nan_is_not_hidden_by_soft_caps(checkpoint: Checkpoint, open_driver: Open) -> None:
    """Gemma 2 caps its scores and its logits: a cap of NaN would be a number."""

    def poisoned(tensors: Iterator[tuple[str, QTensor]]) -> Iterator[tuple[str, QTensor]]:
        for name, tensor in tensors:
            if name == "embed.weight":
                values = tensor.dequantise().copy()
                values[60] = np.nan
                tensor = QTensor.from_array(values)
            yield name, tensor

    driver = open_driver(checkpoint("gemma2"), read=READERS["gemma2"], change=poisoned)
    good, last, first = driver.admit([3, 4, 5]), driver.admit([3, 4, 60]), driver.admit([60, 4, 5])
    outs = driver.run(*(driver.span(row, 3) for row in (good, last, first)))
    assert outs[good].error is None
    for row in (last, first):
        error = outs[row].error
        assert error is not None and error.code == "nan_logits"
