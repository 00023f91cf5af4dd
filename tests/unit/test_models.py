"""Every architecture's description against transformers: names, shapes, counts, numbers, and what they compute."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.core.spec import WeightRule
from headrace.models.registry import ARCHITECTURES, MODEL_TYPES, Description, describe
from tests.unit.models_cases import CASES, SIZES, apply_map, build, frequencies, old_spelling, run_spec, save

ONE_WINDOW = ("Phi3ForCausalLM", "MistralForCausalLM", "MixtralForCausalLM")


def ignorable(description: Description, name: str) -> bool:
    return any(re.fullmatch(pattern, name) for pattern in description.weight_map.ignorable)


def shape_by_op(rule: WeightRule, shapes: dict[str, tuple[int, ...]]) -> tuple[int, ...]:
    (first,) = (shapes[source] for source in rule.sources)
    if rule.op == "split_rows":
        assert rule.rows is not None and 0 <= rule.rows[0] < rule.rows[1] <= first[0]
        return (rule.rows[1] - rule.rows[0], *first[1:])
    assert rule.op == "same"
    return first


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    yield


@pytest.mark.parametrize("case", CASES)
def test_description_is_the_model(case: str, tmp_path: Path) -> None:
    model = build(case)
    config, tensors = save(model, tmp_path)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    description = describe(config, "hf", shapes)
    rules = description.weight_map.rules

    sources = {source for rule in rules for source in rule.sources}
    assert sources <= shapes.keys()
    assert all(ignorable(description, name) for name in shapes.keys() - sources)
    assert len({rule.target for rule in rules}) == len(rules)
    assert [rule.shape for rule in rules] == [shape_by_op(rule, shapes) for rule in rules]
    assert sum(math.prod(rule.shape) for rule in rules) == model.num_parameters()
    assert description.dtype == "float32"

    # Longer than every window and every original context of the cases.
    token_ids = torch.randint(0, SIZES["vocab_size"], (21,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted = model(token_ids[None]).logits[0]
        got = run_spec(description.spec, apply_map(description.weight_map, tensors), token_ids)
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
        wanted = model(token_ids[None, :6]).logits[0]
        got = run_spec(description.spec, apply_map(description.weight_map, tensors), token_ids[:6])
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_old_spelling_is_the_same_model(case: str, tmp_path: Path) -> None:
    build(case).config.save_pretrained(tmp_path)
    config = {**transformers.AutoConfig.from_pretrained(tmp_path).to_dict(), "dtype": "bfloat16"}
    old = old_spelling(config)
    assert "rope_parameters" not in old and "dtype" not in old
    new = describe({**config, "architectures": None}, "hf", {})
    assert describe({**old, "architectures": []}, "hf", {}) == new
    assert new.dtype == "bfloat16"


@pytest.mark.parametrize("case", [case for case in CASES if not case.startswith("gptj")])
def test_numbers_are_what_transformers_computed(case: str) -> None:
    model = build(case)
    architecture = type(model).__name__
    spec = describe({**model.config.to_dict(), "architectures": [architecture], "dtype": None}, "hf", {}).spec
    assert (spec.vocab_size, spec.hidden_size) == (model.config.vocab_size, model.config.hidden_size)
    assert (spec.context, len(spec.layers)) == (model.config.max_position_embeddings, model.config.num_hidden_layers)
    assert spec.embedding.tied == model.config.tie_word_embeddings
    rotary = model.model.rotary_emb
    for layer, theirs in zip(spec.layers, model.model.layers, strict=True):
        attention = layer.attention
        assert attention.scale == theirs.self_attn.scaling
        assert attention.head_dim == theirs.self_attn.head_dim
        assert layer.norms.pre_attn is not None
        eps = getattr(theirs.input_layernorm, "variance_epsilon", None) or theirs.input_layernorm.eps
        assert layer.norms.pre_attn.eps == eps
        window = model.config.sliding_window if architecture in ONE_WINDOW else None
        assert attention.window == getattr(theirs.self_attn, "sliding_window", window)
        assert attention.rope is not None
        inv_freq, factor = frequencies(attention.rope, length=1)
        kind = f"{theirs.self_attn.layer_type}_" if architecture == "Gemma3ForCausalLM" else ""
        torch.testing.assert_close(inv_freq, getattr(rotary, f"{kind}original_inv_freq"), rtol=1e-6, atol=0)
        assert factor == pytest.approx(getattr(rotary, f"{kind}attention_scaling"), rel=1e-12)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_sizes(data: st.DataObject) -> None:
    """Names, shapes and counts of the models that transformers builds (without memory) for random sizes."""
    family, config_class = data.draw(
        st.sampled_from(
            [
                ("Llama", transformers.LlamaConfig),
                ("Qwen2", transformers.Qwen2Config),
                ("Phi3", transformers.Phi3Config),
                ("Mistral", transformers.MistralConfig),
                ("Qwen3", transformers.Qwen3Config),
            ]
        )
    )
    kv_heads, group, half = (data.draw(st.integers(1, 5)) for _ in range(3))
    changes = {
        "vocab_size": data.draw(st.integers(1, 300)),
        "hidden_size": kv_heads * group * half * 2,
        "num_attention_heads": kv_heads * group,
        "num_key_value_heads": kv_heads,
        "intermediate_size": data.draw(st.integers(1, 99)),
        "num_hidden_layers": data.draw(st.integers(1, 4)),
        "tie_word_embeddings": data.draw(st.booleans()),
    }
    if family in ("Llama", "Mistral", "Qwen3"):
        changes["head_dim"] = 2 * data.draw(st.integers(1, 9))
    if family == "Llama":
        changes["attention_bias"], changes["mlp_bias"] = data.draw(st.booleans()), data.draw(st.booleans())
    config = config_class(**{**SIZES, **changes})
    with torch.device("meta"):
        model = getattr(transformers, f"{family}ForCausalLM")(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    description = describe({**config.to_dict(), "architectures": [f"{family}ForCausalLM"]}, "hf", shapes)
    rules = description.weight_map.rules
    assert {source for rule in rules for source in rule.sources} == {
        name for name in shapes if not ignorable(description, name)
    }
    assert [rule.shape for rule in rules] == [shape_by_op(rule, shapes) for rule in rules]
    assert sum(math.prod(rule.shape) for rule in rules) == model.num_parameters()


def test_attention_softcap_of_gemma3_is_said() -> None:
    config = build("gemma3").config.to_dict() | {"attn_logit_softcapping": 50.0, "architectures": ["Gemma3ForCausalLM"]}
    layers = describe(config, "hf", {}).spec.layers
    assert {layer.attention.softcap for layer in layers} == {50.0}


@pytest.mark.parametrize(
    ("architecture", "name"),
    [
        ("LlamaForCausalLM", "model.layers.7.self_attn.rotary_emb.inv_freq"),
        ("LlamaForCausalLM", "model.rotary_emb.inv_freq"),
        ("LlamaForCausalLM", "lm_head.weight"),
        ("GPTJForCausalLM", "transformer.h.3.attn.masked_bias"),
        ("GPTJForCausalLM", "transformer.h.3.attn.bias"),
    ],
)
def test_leftovers_that_may_be(architecture: str, name: str) -> None:
    config = {**SIZES, "architectures": [architecture], "tie_word_embeddings": True, "rotary_dim": 4}
    description = describe(config, "hf", {})
    assert ignorable(description, name)
    assert not ignorable(description, "model.layers.7.self_attn.q_proj.weight")
    untied = describe({**config, "tie_word_embeddings": False}, "hf", {})
    assert not ignorable(untied, "lm_head.weight")


@pytest.mark.parametrize("case", CASES)
def test_shards_cut_what_a_rank_computes_alone(case: str, tmp_path: Path) -> None:
    config, _ = save(build(case), tmp_path)
    for rule in describe(config, "hf", {}).weight_map.rules:
        owner, part = rule.target.split(".")[-2:]
        if owner in ("q", "k", "v", "gate", "up", "embed", "head"):
            assert rule.shard == "rows", rule
        elif owner in ("o", "down"):
            assert rule.shard == ("cols" if part == "weight" else "none"), rule
        else:
            assert rule.shard == "none", rule


def test_both_tables_know_the_same_models() -> None:
    assert set(ARCHITECTURES.values()) == set(MODEL_TYPES.values())
    for name in ARCHITECTURES:
        config_class = getattr(transformers, name).config_class
        assert ARCHITECTURES[name] is MODEL_TYPES[config_class.model_type]
