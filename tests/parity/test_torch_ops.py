"""The torch backend's operations: each against transformers' own, and the premises of batch invariance."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import Gemma2Config, LlamaConfig, Phi3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.gemma2.modeling_gemma2 import Gemma2Attention
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward as attend_gemma2
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.models.gptj.modeling_gptj import apply_rotary_pos_emb as rotate_gptj
from transformers.models.gptj.modeling_gptj import create_sinusoidal_positions

from headrace.backends.rope import rope_frequencies
from headrace.backends.torch import ops, rope
from headrace.backends.torch.moe import group_by_expert
from headrace.core.spec import NormSpec, RopeSpec
from headrace.models.config import ConfigReader
from headrace.models.rope import read_rope

# ---------------------------------------------------------------- operations


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_embeddings_are_scaled_as_gemma_does(dtype: torch.dtype) -> None:
    theirs = Gemma3TextScaledWordEmbedding(9, 48, 0, embed_scale=3072**0.5).to(dtype)
    ids = torch.arange(9)
    assert torch.equal(ops.scale(ops.embed(ids, theirs.weight), 3072**0.5), theirs(ids))


def test_layer_norm() -> None:
    x, weight, bias = torch.randn(5, 24) * 3 + 1, torch.randn(24), torch.randn(24)
    spec = NormSpec("layer", 1e-5, 24, bias=True)
    wanted = torch.nn.functional.layer_norm(x, (24,), weight, bias, 1e-5)
    assert torch.allclose(ops.norm(x, weight, bias, spec), wanted, atol=1e-6)


def test_interleaved_and_partial_rope_are_gptjs() -> None:
    x = torch.randn(7, 3, 16)
    positions = torch.tensor([0, 1, 2, 9, 30, 31, 5])
    cos, sin = rope.rope_table(RopeSpec(8, 10_000.0, interleaved=True), 32, torch.float32)
    angles = create_sinusoidal_positions(32, 8)[positions]
    sines, cosines = angles[None, :, :4], angles[None, :, 4:]
    wanted = torch.cat((rotate_gptj(x[None, ..., :8], sines, cosines)[0], x[..., 8:]), dim=-1)
    assert torch.allclose(rope.apply_rope(x, cos[positions], sin[positions], True), wanted, atol=1e-6)


ROUTERS = ((8, 4096), (128, 2048), (7, 48), (1, 16))
"""Experts × hidden size."""


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_products_do_not_show_how_many_rows_there_are(threads: int) -> None:
    """The premise of batch invariance, for shapes of real models and every number of rows that can come."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    multiple = ops.row_multiple(threads)
    try:
        with torch.inference_mode():
            for rows, columns in ((960, 576), (576, 1536), (97, 48), (1100, 300), *ROUTERS):
                weight, x = ops.pack(torch.randn(rows, columns)), torch.randn(60 * multiple, columns)
                whole = ops.linear(x, weight, None)
                for count, first in itertools.product((1, 2, 3, 7, 16, 31), (0, 5)):
                    part = slice(first, first + count * multiple)
                    assert torch.equal(ops.linear(x[part].contiguous(), weight, None), whole[part])
    finally:
        torch.set_num_threads(before)


# ---------------------------------------------------------------- rotary embeddings

LLAMA31 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
QWEN_YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 32768}
YARN_KEYS = QWEN_YARN | {"beta_fast": 16.0, "beta_slow": 2.0, "mscale": 0.7, "mscale_all_dim": 1.2, "truncate": False}
PHI_FACTORS = {
    "short_factor": [1.0 + 0.01 * i for i in range(48)],
    "long_factor": [1.1 + 1.3 * i for i in range(48)],
    "original_max_position_embeddings": 4096,
}
ROPES: dict[str, tuple[dict[str, Any], int]] = {
    "linear": ({"rope_type": "linear", "rope_theta": 1e4, "factor": 2.5}, 131072),
    "llama3": (LLAMA31, 131072),
    "yarn": (QWEN_YARN, 131072),
    "yarn, every key": (YARN_KEYS, 131072),
    "yarn, attention factor": (QWEN_YARN | {"attention_factor": 0.8}, 131072),
    "yarn, a step for a ramp": (QWEN_YARN | {"beta_fast": 2.0, "beta_slow": 2.0, "truncate": False}, 131072),
    "dynamic, within": ({"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}, 131072),
    "dynamic, a little past": ({"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}, 131073),
    "dynamic, far past": ({"rope_type": "dynamic", "rope_theta": 1e4, "factor": 8.0}, 1_000_000),
    "longrope, within": ({"rope_type": "longrope", "rope_theta": 1e4, **PHI_FACTORS}, 4096),
    "longrope, past": ({"rope_type": "longrope", "rope_theta": 1e4, **PHI_FACTORS}, 4097),
}


@pytest.mark.parametrize("name", ROPES)
def test_frequencies_are_transformers(name: str) -> None:
    """With sizes of real models; a model that is to run `max_model_len` tokens, against a sequence of that length."""
    table, max_model_len = ROPES[name]
    sizes: dict[str, Any] = {"hidden_size": 3072, "num_attention_heads": 32, "max_position_embeddings": 131072}
    if table["rope_type"] == "longrope":
        config = Phi3Config(**sizes, original_max_position_embeddings=4096, rope_parameters=dict(table))
    else:
        config = LlamaConfig(**sizes, rope_parameters=dict(table))
    wanted, magnitude = ROPE_INIT_FUNCTIONS[table["rope_type"]](config, torch.device("cpu"), seq_len=max_model_len)
    spec = read_rope(ConfigReader({**sizes, "rope_parameters": table}, "config"), 96, 131072)
    torch.testing.assert_close(torch.from_numpy(rope_frequencies(spec, max_model_len)), wanted, rtol=2e-6, atol=0.0)
    cos, sin = rope.rope_table(spec, 16, torch.float32)
    assert float(cos[0].max()) == pytest.approx(magnitude) and float(sin[0].abs().max()) == 0.0


# ---------------------------------------------------------------- activations


@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
@pytest.mark.parametrize(("threads", "width"), [(1, 77), (1, 96), (3, 1000), (4, 4801), (4, 5000)])
def test_an_activation_does_not_show_where_a_row_lies(activation: str, threads: int, width: int) -> None:
    """4 threads and 16 rows of 5000: three of the threads get a share, which ends within a row."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        rows = ops.row_multiple(threads)
        x = torch.randn(5 * rows, 2 * width) * 3
        for gated in (False, True):
            given = x if gated else x[:, :width].contiguous()
            function: Callable[[Tensor, str], Tensor] = ops.gated if gated else ops.activate
            whole = function(given, activation)
            for first in (0, rows, 3):
                part = given[first : first + rows].clone()
                assert torch.equal(function(part, activation), whole[first : first + rows])
        plain = ops.ACTIVATIONS[activation](x[:, :width])
        assert torch.allclose(ops.activate(x[:, :width].contiguous(), activation), plain, atol=5e-6)
    finally:
        torch.set_num_threads(before)


# ---------------------------------------------------------------- soft caps


def test_softcap() -> None:
    x = torch.randn(3, 50) * 40
    assert torch.allclose(ops.softcap(x, 30.0), torch.tanh(x / 30.0) * 30.0, atol=1e-5)
    assert ops.softcap(x.bfloat16(), 30.0).dtype == torch.float32


def test_capped_attention_is_gemma2s() -> None:
    config = Gemma2Config(hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
    module = Gemma2Attention(config, 0).eval()
    q, k, v = torch.randn(1, 4, 64, 16), torch.randn(1, 2, 64, 16), torch.randn(1, 2, 64, 16)
    hidden = torch.ones(64, 64, dtype=torch.bool).triu(1)
    mask = torch.zeros(1, 1, 64, 64).masked_fill(hidden, -torch.inf)
    wanted = attend_gemma2(module, q, k, v, mask, scaling=0.7, softcap=2.0)[0]  # (1, tokens, heads, head dim)
    grouped = q.view(2, 2, 64, 16).transpose(1, 2).reshape(2, 128, 16)  # a KV head's queries: token by token
    found = ops.attention(grouped, k[0], v[0], hidden.repeat_interleave(2, 0)[None], 0.7, 2.0)
    assert torch.allclose(found.view(2, 64, 2, 16).permute(1, 0, 2, 3).reshape(64, 4, 16), wanted[0], atol=1e-5)
    uncapped = ops.attention(grouped, k[0], v[0], hidden.repeat_interleave(2, 0)[None], 0.7)
    assert (found - uncapped).abs().max() > 0.1


# ---------------------------------------------------------------- experts


@pytest.mark.parametrize("normalise", [True, False])
def test_route(normalise: bool) -> None:
    scores = torch.randn(50, 9)
    weights, experts = ops.route(scores, 4, normalise)
    chances = torch.softmax(scores, -1)
    for token in range(50):
        best = chances[token].sort(descending=True)
        assert experts[token].tolist() == best.indices[:4].tolist()
        total = best.values[:4].sum() if normalise else 1.0
        assert torch.allclose(weights[token], best.values[:4] / total)


@pytest.mark.parametrize(("tokens", "choices", "experts", "multiple"), [(1, 1, 1, 4), (7, 3, 5, 4), (300, 8, 128, 8)])
def test_every_choice_has_a_row_of_its_expert(tokens: int, choices: int, experts: int, multiple: int) -> None:
    generator = np.random.default_rng(tokens)
    chosen = np.stack([generator.permutation(experts)[:choices] for _ in range(tokens)])
    groups = group_by_expert(chosen, experts, multiple)
    assert {expert for expert, _, _ in groups.spans} == set(chosen.ravel().tolist()), "the others cost nothing"
    expert_of = np.full(len(groups.tokens), -1)
    for (expert, start, stop), following in itertools.zip_longest(groups.spans, groups.spans[1:]):
        wanted = int((chosen == expert).sum())
        assert stop - start == math.ceil(wanted / multiple) * multiple
        assert stop == (following[1] if following else len(groups.tokens))
        expert_of[start:stop] = expert
    assert (expert_of[groups.places] == chosen).all()
    assert (groups.tokens[groups.places] == np.arange(tokens)[:, None]).all()
    assert len(np.unique(groups.places)) == chosen.size
