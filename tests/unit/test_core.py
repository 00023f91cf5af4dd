"""Ranges, settings and their reasons: what is refused, and in which words."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any

import pytest

from headrace.core import errors
from headrace.core.config import EngineConfig, Hardware
from headrace.core.docs import field_docs
from headrace.core.errors import (
    BackendUnavailable,
    ConfigError,
    ContextLengthExceeded,
    EmptyPrompt,
    HeadraceError,
    InvalidParameter,
    OutOfMemory,
    shorten,
)
from headrace.core.resolve import resolve
from headrace.core.sizing import kv_bytes_per_block, kv_bytes_per_token, stored_bytes
from headrace.core.spec import (
    AttentionSpec,
    EmbeddingSpec,
    LayerNorms,
    LayerSpec,
    MlpSpec,
    ModelSpec,
    NormSpec,
)
from headrace.core.types import EngineLimits, Request, SamplingParams
from headrace.core.validate import validate

GIB = 2**30
MACHINE = Hardware(cores=2, free_memory_bytes=20 * GIB)


def make_spec(context: int = 8192) -> ModelSpec:
    """The attention of the demo model: 30 layers, 3 KV heads of 64."""
    norm = NormSpec("rms", 1e-5, 576)
    attention = AttentionSpec(heads=9, kv_heads=3, head_dim=64, scale=0.125)
    layer = LayerSpec(attention, MlpSpec(True, "silu", 1536), LayerNorms(norm, None, norm, None))
    return ModelSpec("m", 49152, 576, context, EmbeddingSpec(tied=True), (layer,) * 30, norm)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0), ("max_tokens", -1), ("max_tokens", 1.5), ("max_tokens", True), ("max_tokens", "8"),
        ("min_tokens", -1), ("min_tokens", 129), ("temperature", -0.1), ("temperature", 2.1), ("temperature", math.nan),
        ("temperature", math.inf), ("temperature", "hot"), ("temperature", True), ("top_p", 0), ("top_p", 1.01),
        ("top_p", math.nan), ("top_k", -2), ("top_k", 1.0), ("seed", 2**63), ("seed", -(2**63) - 1), ("seed", 1.5),
        ("stop", ""), ("stop", ["a", ""]), ("stop", 5), ("stop", [5]), ("stop_token_ids", [-1]), ("stop_token_ids", 3),
        ("stop_token_ids", "12"), ("stop_token_ids", [True]), ("logprobs", -1), ("logprobs", 21), ("ignore_eos", 1),
        ("skip_special_tokens", None),
    ],
)  # fmt: skip
def test_sampling_out_of_range(field: str, value: Any) -> None:
    with pytest.raises(InvalidParameter, match=rf"^{field}: got .*, allowed: ") as caught:
        SamplingParams(**{field: value})
    assert caught.value.field == field and "\n" not in str(caught.value)


def test_sampling_in_range() -> None:
    edge = SamplingParams(max_tokens=None, temperature=2, top_p=1, top_k=-1, seed=-(2**63), stop="x", logprobs=20)
    assert edge.stop == ("x",)
    assert SamplingParams(stop=["a", "b"], stop_token_ids=[1, 2]).stop_token_ids == (1, 2)  # type: ignore[arg-type]
    assert SamplingParams(max_tokens=3, min_tokens=3).min_tokens == 3


LIMITS = EngineLimits(vocab_size=100, max_model_len=16)


@pytest.mark.parametrize(
    ("token_ids", "sampling", "error", "words"),
    [
        ((), {}, EmptyPrompt, "no tokens"),
        ((1,) * 16, {}, ContextLengthExceeded, "the prompt has 16, allowed: up to 15"),
        ((1, 100), {}, InvalidParameter, "prompt_token_ids: got 100, allowed: integers from 0 to 99"),
        ((1, -1), {}, InvalidParameter, "prompt_token_ids"),
        ((1, True), {}, InvalidParameter, "prompt_token_ids"),
        ((1,), {"stop_token_ids": [100]}, InvalidParameter, "stop_token_ids: got 100"),
        ((1,) * 10, {"min_tokens": 7}, InvalidParameter, "min_tokens: got 7, allowed: at most 6"),
        ((1,), {"min_tokens": 1, "stop_token_ids": list(range(100))}, InvalidParameter, "stop_token_ids"),
    ],
)
def test_requests_that_cannot_run(
    token_ids: tuple[int, ...], sampling: dict[str, Any], error: type[HeadraceError], words: str
) -> None:
    with pytest.raises(error) as caught:
        validate(Request("r", token_ids, SamplingParams(**sampling)), LIMITS)
    assert words in str(caught.value)


def test_requests_at_the_limit_run() -> None:
    request = Request("r", (99,) * 15, SamplingParams(max_tokens=10**6, min_tokens=1))
    assert validate(request, LIMITS) is None  # type: ignore[func-returns-value]


def test_defaults_have_reasons() -> None:
    resolved = resolve(EngineConfig("demo"), make_spec(), MACHINE)
    assert (resolved.backend, resolved.dtype, resolved.threads) == ("torch", "float32", 2)
    assert (resolved.max_num_seqs, resolved.max_num_batched_tokens, resolved.block_size) == (32, 512, 16)
    assert resolved.max_model_len == 8192
    bytes_of_pool = resolved.num_blocks * 16 * kv_bytes_per_token(make_spec(), "float32")
    assert 4.9 * GIB < bytes_of_pool <= 5 * GIB, "a quarter of free memory"
    chosen = {"backend", "dtype", "threads", "max_num_seqs", "max_num_batched_tokens", "num_blocks", "max_model_len"}
    assert chosen <= resolved.reasons.keys() and all(resolved.reasons.values())


@pytest.mark.parametrize(
    ("settings", "backends", "expected"),
    [
        ({}, ("native", "torch"), ("native", "float32", "stored", "float32")),
        ({}, ("native",), ("native", "float32", "stored", "float32")),
        ({"dtype": "bfloat16"}, ("native",), ("native", "bfloat16", "none", "bfloat16")),
        ({"dtype": "float16"}, ("native",), ("native", "float16", "none", "float32")),
        ({"quant": "int4", "kv_dtype": "int8"}, ("native",), ("native", "float32", "int4", "int8")),
        ({"kv_dtype": "float16", "dtype": "float16"}, ("native", "torch"), ("torch", "float16", "none", "float16")),
        ({"backend": "torch"}, ("native", "torch"), ("torch", "float32", "none", "float32")),
    ],
)  # fmt: skip
def test_what_auto_takes(settings: dict[str, Any], backends: tuple[str, ...], expected: tuple[str, ...]) -> None:
    config = EngineConfig("m", **settings)
    found = resolve(config, make_spec(), Hardware(cores=2, free_memory_bytes=20 * GIB, backends=backends))
    assert (found.backend, found.dtype, found.quant, found.kv_dtype) == expected
    for name in ("backend", "dtype", "quant", "kv_dtype"):
        given = getattr(config, name)
        assert (
            found.reasons[name] == "as set"
            if given != "auto"
            else found.reasons[name].startswith(f"{getattr(found, name)}: ")
        )


def test_nothing_installed_says_both_ways() -> None:
    with pytest.raises(BackendUnavailable) as caught:
        resolve(EngineConfig("m"), make_spec(), Hardware(2, 20 * GIB, backends=()))
    assert "C++20 compiler" in str(caught.value) and "pip install 'headrace[torch]'" in str(caught.value)


def test_bytes_of_stored_weights() -> None:
    assert stored_bytes({}) == 0
    assert stored_bytes({"q4_1": 64, "q6_K": 256, "f32": 3, "q2_K": 256}) == 40 + 210 + 12 + 1024


def test_kv_bytes_of_the_demo_model() -> None:
    assert kv_bytes_per_token(make_spec(), "float32") == 11_520 * 4
    assert kv_bytes_per_token(make_spec(), "bfloat16") == 11_520 * 2
    for dtype in ("float32", "bfloat16", "int8"):
        assert kv_bytes_per_block(make_spec(), dtype, 16, 16) == 16 * kv_bytes_per_token(make_spec(), dtype)
        assert kv_bytes_per_block(make_spec(), dtype, 5, 16) == kv_bytes_per_block(make_spec(), dtype, 16)


def test_a_pool_as_large_as_needed_is_enough() -> None:
    resolved = resolve(EngineConfig("m", max_model_len=64, max_num_seqs=4), make_spec(), MACHINE)
    assert resolved.num_blocks == 4 * 4
    assert "enough for 4 requests of 64 tokens" in resolved.reasons["num_blocks"]


def test_a_small_machine_cuts_the_context() -> None:
    resolved = resolve(EngineConfig("m"), make_spec(), Hardware(1, 100 * 2**20))
    assert resolved.max_model_len == resolved.num_blocks * 16 == 560
    assert "fits the KV cache" in resolved.reasons["max_model_len"]


def test_a_static_batch_fits() -> None:
    assert resolve(EngineConfig("m", policy="static:40"), make_spec(), MACHINE).max_num_seqs == 40
    assert resolve(EngineConfig("m", max_num_seqs=600), make_spec(), MACHINE).max_num_batched_tokens == 600


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"backend": "cuda"}, InvalidParameter, "backend: got 'cuda', allowed: auto, torch, native"),
        ({"backend": "native"}, BackendUnavailable, "native is not installed: install a C++20 compiler"),
        ({"quant": "int8"}, InvalidParameter, "quant: got 'int8', allowed: auto or none on the torch backend"),
        ({"kv_dtype": "int8"}, InvalidParameter, "kv_dtype: got 'int8', allowed: auto, float32 on the torch backend"),
        ({"dtype": "fp8"}, InvalidParameter, "dtype: got 'fp8'"),
        ({"threads": 0}, InvalidParameter, "threads: got 0, allowed: an integer from 1 to 1024"),
        ({"threads": True}, InvalidParameter, "threads"),
        ({"block_size": 0}, InvalidParameter, "block_size"),
        ({"max_num_seqs": -1}, InvalidParameter, "max_num_seqs"),
        ({"prefix_cache": 1}, InvalidParameter, "prefix_cache"),
        ({"max_model_len": 10_000}, ConfigError, "max_model_len: got 10000, allowed: up to the model's 8192"),
        ({"policy": "static:40", "max_num_seqs": 8}, ConfigError, "static:40 needs max_num_seqs ≥ 40, got 8"),
        ({"max_num_batched_tokens": 8}, ConfigError, "max_num_batched_tokens: got 8, allowed: ≥ max_num_seqs (32)"),
        ({"kv_cache_mib": 1, "max_model_len": 8192}, OutOfMemory, "needs 360.0 MiB"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], error: type[HeadraceError], words: str) -> None:
    with pytest.raises(error) as caught:
        resolve(EngineConfig("m", **settings), make_spec(), MACHINE)
    assert words in str(caught.value)


def test_every_setting_and_sampling_field_is_documented() -> None:
    for cls in (EngineConfig, SamplingParams):
        docs = field_docs(cls)
        assert {item.name for item in fields(cls)} == docs.keys()


def test_the_error_tree_is_the_one_that_is_drawn() -> None:
    """Every class stands in the drawing with its status and code, and the codes are distinct."""
    drawing = errors.__doc__ or ""
    classes = [cls for cls in vars(errors).values() if isinstance(cls, type) and issubclass(cls, HeadraceError)]
    codes = [cls.code for cls in classes]
    assert len(set(codes)) == len(codes) == len(classes) >= 16
    for cls in classes:
        line = next(line for line in drawing.splitlines() if line.split() and cls.__name__ in line.split())
        assert str(cls.status) in line.split() and cls.code in line.split()


def test_errors_never_echo_a_whole_input() -> None:
    assert len(shorten("x" * 10**6)) == 64
    assert len(str(InvalidParameter("stop", ["x" * 10**6], "short"))) < 120
