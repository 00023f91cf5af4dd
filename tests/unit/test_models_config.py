"""A config is untrusted: what is wrong in it is refused in one line that names key, value and what is allowed."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.core.errors import CheckpointError, ModelError, UnsupportedModel
from headrace.core.spec import AttentionSpec, RopeScaling, RopeSpec
from headrace.models.config import ConfigReader, read_dtype
from headrace.models.registry import ARCHITECTURES, describe
from tests.unit.models_cases import LLAMA3, LONG, MOE, SIZES, YARN

Config = dict[str, Any]


def config_of(architecture: str = "Llama", **changes: Any) -> Config:
    moe = MOE if architecture == "Qwen3Moe" else {}
    rotary = {"rotary_dim": 4} if architecture == "GPTJ" else {}
    return {**SIZES, **moe, **rotary, "architectures": [f"{architecture}ForCausalLM"], **changes}


def without(key: str, architecture: str = "Llama") -> Config:
    return {name: value for name, value in config_of(architecture).items() if name != key}


BROKEN: list[tuple[Config, str, str]] = [
    # missing, null, wrong type
    (without("hidden_size"), "hidden_size", "missing"),
    (config_of(vocab_size=None), "vocab_size", "missing"),
    (without("num_experts", "Qwen3Moe"), "num_experts", "missing"),
    (config_of(num_hidden_layers="3"), "num_hidden_layers", "'3'"),
    (config_of(num_hidden_layers=True), "num_hidden_layers", "True"),
    (config_of(hidden_size=24.0), "hidden_size", "24.0"),
    (config_of(tie_word_embeddings="true"), "tie_word_embeddings", "'true'"),
    (config_of(attention_bias=1), "attention_bias", "1"),
    (config_of(hidden_act=7), "hidden_act", "7"),
    (config_of(rope_scaling="linear"), "rope_scaling", "'linear'"),
    (config_of(rope_parameters=[1]), "rope_parameters", "[1]"),
    (config_of(architectures="LlamaForCausalLM"), "architectures", "'LlamaForCausalLM'"),
    (config_of(architectures=[3]), "architectures", "[3]"),
    (config_of(architectures=None), "model_type", "missing"),
    (config_of(architectures=[], model_type=5), "model_type", "5"),
    # out of range
    (config_of(hidden_size=0), "hidden_size", "0"),
    (config_of(hidden_size=-24), "hidden_size", "-24"),
    (config_of(num_hidden_layers=10_001), "num_hidden_layers", "10001"),
    (config_of(vocab_size=10**7 + 1), "vocab_size", "10000001"),
    (config_of(intermediate_size=10**400), "intermediate_size", "…"),
    (config_of(rms_norm_eps=float("nan")), "rms_norm_eps", "nan"),
    (config_of(rms_norm_eps=float("inf")), "rms_norm_eps", "inf"),
    (config_of(rms_norm_eps=0), "rms_norm_eps", "0"),
    (config_of(rms_norm_eps=10**400), "rms_norm_eps", "…"),
    (config_of(rope_theta=-1e4), "rope_theta", "-10000.0"),
    # sizes that do not fit each other
    (config_of(num_key_value_heads=3), "num_key_value_heads", "3"),
    (config_of(hidden_size=25), "hidden_size", "25"),
    (config_of("GPTJ", hidden_size=25), "hidden_size", "25"),
    (config_of("GPTJ", rotary_dim=8), "rotary_dim", "8"),
    (config_of("GPTJ", rotary_dim=3), "rotary_dim", "3"),
    (config_of("Qwen3Moe", num_experts_per_tok=5), "num_experts_per_tok", "5"),
    (config_of("Qwen3Moe", num_experts=60_000), "num_experts", "60000"),
    (config_of("Qwen3Moe", mlp_only_layers=[-1]), "mlp_only_layers", "[-1]"),
    (config_of("Mixtral", num_experts_per_tok=9), "num_experts_per_tok", "9"),
    (config_of("Mixtral", num_local_experts=60_000), "num_local_experts", "60000"),
    (config_of("Mixtral", num_local_experts=0), "num_local_experts", "0"),
    (config_of("Mistral", sliding_window=0), "sliding_window", "0"),
    (config_of("Mistral", sliding_window="none"), "sliding_window", "'none'"),
    (without("num_key_value_heads", "Mistral"), "num_key_value_heads", "missing"),
    (without("num_key_value_heads", "Qwen3"), "num_key_value_heads", "missing"),
    (config_of("Qwen2", layer_types=["full_attention"]), "layer_types", "['full_attention']"),
    (config_of("Qwen2", layer_types=[1, 2, 3]), "layer_types", "[1, 2, 3]"),
    # rotary numbers
    (config_of(rope_scaling={"type": "linear"}), "factor", "missing"),
    (config_of(rope_scaling={"type": "linear", "factor": 0.5}), "factor", "0.5"),
    (config_of(rope_scaling={"type": "linear", "factor": "2"}), "factor", "'2'"),
    (config_of(rope_parameters={**LLAMA3, "high_freq_factor": 1.0}), "high_freq_factor", "1.0"),
    (config_of(rope_parameters={**LLAMA3, "low_freq_factor": None}), "low_freq_factor", "missing"),
    (config_of(rope_parameters={"rope_type": "yarn"}), "factor", "missing"),
    (config_of(rope_parameters={**YARN, "beta_fast": 0.5}), "beta_fast", "0.5"),
    (config_of("Phi3", rope_parameters={**LONG, "short_factor": [1.0]}), "short_factor", "[1.0]"),
    (config_of("Phi3", rope_parameters={**LONG, "long_factor": [1.0, 0, 2]}), "long_factor", "[1.0, 0, 2]"),
    (config_of("Phi3", rope_parameters={"rope_type": "longrope"}), "short_factor", "missing"),
]

UNSUPPORTED: list[tuple[Config, str, str]] = [
    (config_of(architectures=["MambaForCausalLM"]), "architectures", "'MambaForCausalLM'"),
    (config_of(architectures=[], model_type="mamba"), "model_type", "'mamba'"),
    (config_of(hidden_act="quick_gelu"), "hidden_act", "'quick_gelu'"),
    (config_of(dtype="float8_e4m3fn"), "dtype", "'float8_e4m3fn'"),
    (config_of(torch_dtype="float64"), "torch_dtype", "'float64'"),
    (config_of(sliding_window=4096), "sliding_window", "4096"),
    (config_of(rope_interleaved=True), "rope_interleaved", "True"),
    (config_of(partial_rotary_factor=0.5), "partial_rotary_factor", "0.5"),
    (config_of(head_dim=7), "head_dim", "7"),
    (config_of(hidden_size=12), "hidden_size", "12"),
    (config_of(rope_scaling={"type": "mrope", "mrope_section": [1, 1, 1]}), "mrope_section", "unknown"),
    (config_of(rope_scaling={"type": "spiral", "factor": 2.0}), "type", "'spiral'"),
    (config_of(rope_scaling={"type": "linear", "factor": 2.0}, rope_parameters=LLAMA3), "rope_scaling", "linear"),
    (config_of(hidden_size=8, rope_scaling={"type": "dynamic", "factor": 2.0}), "type", "'dynamic'"),
    (config_of("Phi3", rope_scaling={"type": "linear", "factor": 2.0}), "type", "'linear'"),
    (config_of("Phi3", partial_rotary_factor=0.5), "partial_rotary_factor", "0.5"),
    (config_of("Phi3", attention_bias=True), "attention_bias", "True"),
    (
        config_of("Qwen2", layer_types=["full_attention", "chunked_attention", "full_attention"]),
        "layer_types",
        "chunked",
    ),
    (config_of("Qwen2", layer_types=["sliding_attention"] * 3), "sliding_window", "None"),
    (config_of("Gemma3", sliding_window=None), "sliding_window", "None"),
    (config_of("Gemma3", use_bidirectional_attention=True), "use_bidirectional_attention", "True"),
    (config_of("Gemma3", rope_parameters={"rope_type": "default"}), "rope_type", "unknown"),
    (
        config_of("Gemma3", rope_parameters={"full_attention": YARN}, rope_scaling={"type": "linear", "factor": 8.0}),
        "rope_scaling",
        "linear",
    ),
    (config_of("GPTJ", rope_scaling={"type": "linear", "factor": 2.0}), "rope_scaling", "linear"),
    (config_of("Mistral", attention_bias=True), "attention_bias", "True"),
    (config_of("Mistral", mlp_bias=True), "mlp_bias", "True"),
    (config_of("Mixtral", attention_bias=True), "attention_bias", "True"),
    (config_of("Mixtral", norm_topk_prob=False), "norm_topk_prob", "False"),
    (
        config_of("Mistral", layer_types=["sliding_attention", "full_attention", "sliding_attention"]),
        "layer_types",
        "full_attention",
    ),
    (
        config_of("Mistral", sliding_window=None, layer_types=["sliding_attention"] * 3),
        "sliding_window",
        "None",
    ),
    (config_of("Qwen3", layer_types=["sliding_attention"] * 3), "sliding_window", "None"),
]


@pytest.mark.parametrize(("config", "key", "value"), BROKEN, ids=lambda item: item if isinstance(item, str) else "")
def test_broken_config(config: Config, key: str, value: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        describe(config, "hf", {})
    _check_line(str(caught.value), key, value)


@pytest.mark.parametrize(
    ("config", "key", "value"), UNSUPPORTED, ids=lambda item: item if isinstance(item, str) else ""
)
def test_unsupported_config(config: Config, key: str, value: str) -> None:
    with pytest.raises(UnsupportedModel) as caught:
        describe(config, "hf", {})
    _check_line(str(caught.value), key, value)


def _check_line(line: str, key: str, value: str) -> None:
    assert line.startswith("config.json: ") and "\n" not in line and len(line) < 700
    assert key in line and value in line and "allowed: " in line


def test_unknown_architecture_lists_the_known() -> None:
    with pytest.raises(UnsupportedModel, match=r"allowed: LlamaForCausalLM, Qwen2ForCausalLM, .*Qwen3MoeForCausalLM"):
        describe({"architectures": ["GPT9ForCausalLM"]}, "hf", {})
    with pytest.raises(UnsupportedModel, match=r"format is 'onnx', allowed: hf, gguf"):
        describe({}, "onnx", {})


@pytest.mark.parametrize("config", [None, [], "text", 3])
def test_config_that_is_no_object(config: object) -> None:
    with pytest.raises(CheckpointError, match="an object of keys and values"):
        describe(config, "hf", {})  # type: ignore[arg-type]


def test_a_hostile_key_stays_on_the_line() -> None:
    with pytest.raises(UnsupportedModel) as caught:
        describe(config_of(rope_scaling={"line\nbreak" + "x" * 10_000: 1}), "hf", {})
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 700


def test_the_largest_configs_are_described_quickly() -> None:
    started = time.perf_counter()
    description = describe(config_of(num_hidden_layers=10_000, attention_bias=True, mlp_bias=True), "hf", {})
    assert len(description.weight_map.rules) == 3 + 10_000 * 16
    describe(config_of("Qwen3Moe", num_hidden_layers=512, num_experts=128), "hf", {})
    assert time.perf_counter() - started < 20


def test_nulls_are_absent() -> None:
    keys = ("head_dim", "num_key_value_heads", "rope_scaling", "rope_theta", "rms_norm_eps", "attention_bias", "dtype")
    nulls = describe(config_of(**dict.fromkeys(keys)), "hf", {})
    assert nulls == describe({k: v for k, v in config_of().items() if k not in keys}, "hf", {})
    attention = nulls.spec.layers[0].attention
    assert (attention.head_dim, attention.kv_heads, nulls.dtype) == (6, 4, None)


def test_a_missing_key_is_the_default_of_the_architecture() -> None:
    """Each of these defaults is not the one that Llama has (transformers 5.23, the configuration classes)."""

    def attention(architecture: str, **changes: Any) -> AttentionSpec:
        config = {key: value for key, value in config_of(architecture).items() if key not in ("num_key_value_heads",)}
        config = {**config, "hidden_size": 64, "num_attention_heads": 32, **changes}
        return describe(config, "hf", {}).spec.layers[0].attention

    mistral, mixtral, qwen3 = attention("Mistral"), attention("Mixtral"), attention("Qwen3")
    assert (mistral.kv_heads, mistral.window, mistral.rope) == (8, 4096, RopeSpec(2, 1e4))
    assert (mixtral.kv_heads, mixtral.window, mixtral.rope) == (8, None, RopeSpec(2, 1e6))
    assert (qwen3.kv_heads, qwen3.window, qwen3.rope) == (32, None, RopeSpec(128, 1e4))
    # A null is another matter: as many as heads, the width over the heads, no window.
    nulls = attention("Mistral", num_key_value_heads=None, sliding_window=None)
    assert (nulls.kv_heads, nulls.window) == (32, None)
    assert attention("Qwen3", head_dim=None).head_dim == 2


def test_layer_types_of_mistral_may_repeat_the_window() -> None:
    windowed = config_of("Mistral", sliding_window=5, layer_types=["sliding_attention"] * 3)
    assert describe(windowed, "hf", {}) == describe(config_of("Mistral", sliding_window=5), "hf", {})
    full = config_of("Mistral", sliding_window=None, layer_types=["full_attention"] * 3)
    assert describe(full, "hf", {}) == describe(config_of("Mistral", sliding_window=None), "hf", {})


def test_both_spellings_that_agree() -> None:
    linear = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}
    both = describe(
        config_of(rope_parameters=linear, rope_scaling={"type": "linear", "factor": 2}, rope_theta=5e5), "hf", {}
    )
    assert both == describe(config_of(rope_parameters=linear), "hf", {})


def test_rope_numbers_nobody_wrote_are_derived() -> None:
    def scaling(architecture: str, **changes: Any) -> RopeScaling:
        rope = describe(config_of(architecture, **changes), "hf", {}).spec.layers[0].attention.rope
        assert rope is not None and rope.scaling is not None
        return rope.scaling

    yarn = scaling("Llama", rope_scaling={"type": "yarn", "original_max_position_embeddings": 16})
    assert yarn.numbers["factor"] == 4.0
    assert yarn.numbers["attention_factor"] == pytest.approx(1.1386294361119891)  # 0.1 ln 4 + 1
    assert (yarn.numbers["beta_fast"], yarn.numbers["beta_slow"], yarn.numbers["truncate"]) == (32.0, 1.0, 1.0)
    phi3 = scaling("Phi3", rope_parameters={**LONG, "rope_type": "su"}, original_max_position_embeddings=16)
    assert phi3.kind == "longrope"
    assert phi3.numbers["attention_factor"] == pytest.approx(1.5**0.5)  # sqrt(1 + ln 4 / ln 16)


def test_dtype_spellings() -> None:
    for key in ("dtype", "torch_dtype"):
        assert read_dtype(ConfigReader({key: "bfloat16"}, "here")) == "bfloat16"
        assert read_dtype(ConfigReader({key: "torch.float16"}, "here")) == "float16"
    assert read_dtype(ConfigReader({"torch_dtype": "float16", "dtype": "float32"}, "here")) == "float32"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
ROPE_KEYS = sorted({*YARN, *LLAMA3, *LONG, "type", "attention_factor", "mscale", "mscale_all_dim", "truncate"})
KEYS = [
    "head_dim",
    "hidden_act",
    "attention_bias",
    "mlp_bias",
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "sliding_window",
    "partial_rotary_factor",
    "layer_types",
    "max_window_layers",
    "use_sliding_window",
    "sliding_window_pattern",
    "mlp_only_layers",
    "decoder_sparse_step",
    "num_experts",
    "num_local_experts",
    "num_experts_per_tok",
    "norm_topk_prob",
    "rotary_dim",
    "n_inner",
    "query_pre_attn_scalar",
    "final_logit_softcapping",
    "dtype",
]


@given(
    architecture=st.sampled_from(sorted(ARCHITECTURES)),
    changes=st.dictionaries(st.sampled_from([*KEYS, *SIZES]), JSON, max_size=4),
    rope=st.none()
    | st.dictionaries(
        st.sampled_from(ROPE_KEYS), JSON | st.floats(0, 64) | st.sampled_from(["yarn", "llama3", "linear", "dynamic"])
    ),
)
def test_no_config_escapes(architecture: str, changes: Config, rope: Config | None) -> None:
    """Whatever a JSON file holds, the answer is a description or a ModelError of one line."""
    config = config_of(architecture.removesuffix("ForCausalLM"), **changes)
    if rope is not None:
        config["rope_scaling"] = rope
    config = json.loads(json.dumps(config))
    try:
        description = describe(config, "hf", {})
    except ModelError as error:
        assert "\n" not in str(error)
    else:
        assert len(description.spec.layers) == (config["num_hidden_layers"])
