"""What Hugging Face code says of loading, generating and placing, in headrace's words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from headrace.core.config import EngineConfig
from headrace.core.errors import HeadraceError, InvalidParameter, UnsupportedParameter
from headrace.core.types import SamplingParams
from headrace.engine.hf_arguments import NEW_TOKENS, TOP_K, Generation, engine_config
from headrace.engine.split_model import placement_text, split_model

# ---------------------------------------------------------------- generation_config


def sampling(config: object = None, ends: tuple[int, ...] = (), **more: object) -> SamplingParams:
    return Generation(config, more).sampling(ends)


def test_what_the_published_code_passes() -> None:
    assert sampling({"max_new_tokens": 1024, "do_sample": False}) == SamplingParams(max_tokens=1024)
    assert sampling({"num_beams": 1, "max_new_tokens": 512, "do_sample": False}) == SamplingParams(max_tokens=512)
    assert sampling(None) == SamplingParams(max_tokens=NEW_TOKENS)
    assert sampling({"max_new_tokens": 9}, max_new_tokens=7, min_new_tokens=3) == SamplingParams(
        max_tokens=7, min_tokens=3
    )


def test_sampling_fields() -> None:
    given = {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05}
    expected = SamplingParams(max_tokens=20, temperature=0.7, top_p=0.8, top_k=20, repetition_penalty=1.05)
    assert sampling(given) == expected
    assert sampling({"do_sample": True}) == SamplingParams(max_tokens=20, temperature=1.0, top_k=TOP_K)
    assert sampling({"do_sample": True, "top_k": 0, "min_p": 0.1, "typical_p": 0.9}) == SamplingParams(
        max_tokens=20, temperature=1.0, min_p=0.1, typical_p=0.9
    )
    greedy = sampling({"do_sample": False, "temperature": 0.7, "top_p": 0.8})
    assert greedy.temperature == 0 and greedy.top_p == 0.8
    assert sampling(bad_words_ids=[[3], [4, 5]]).bad_words_ids == ((3,), (4, 5))


def test_what_ends_an_answer() -> None:
    assert sampling(ends=(7,)) == SamplingParams(max_tokens=20, stop_token_ids=(7,))
    own = SamplingParams(max_tokens=20, stop_token_ids=(5, 6, 7), ignore_eos=True)
    assert sampling({"eos_token_id": [5, 6]}, (7, 6)) == own
    assert sampling(eos_token_id=5).stop_token_ids == (5,)
    assert Generation({"pad_token_id": 3}).pad_token_id == 3 and Generation().pad_token_id is None


def test_a_generation_config_of_transformers() -> None:
    from transformers import GenerationConfig

    assert sampling(GenerationConfig()) == SamplingParams(max_tokens=20)
    whole = GenerationConfig(
        max_new_tokens=5, do_sample=True, temperature=0.5, top_k=3, eos_token_id=[1, 2], pad_token_id=0
    )
    assert sampling(whole) == SamplingParams(
        max_tokens=5, temperature=0.5, top_k=3, stop_token_ids=(1, 2), ignore_eos=True
    )
    with pytest.raises(UnsupportedParameter, match="num_beams: got 4"):
        sampling(GenerationConfig(num_beams=4))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_beams", 2),
        ("num_beams", True),
        ("num_return_sequences", 3),
        ("use_cache", False),
        ("no_repeat_ngram_size", 2),
        ("output_scores", True),
        ("return_dict_in_generate", True),
        ("output_hidden_states", True),
        ("max_length", 20),
        ("streamer", object()),
        ("stop_strings", ["a"]),
        ("penalty_alpha", 0.6),
        ("anything", 1),
    ],
)
def test_what_is_not_carried_out_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(UnsupportedParameter, match=rf"{field}: got .*not supported; allowed: ") as caught:
        sampling({field: value})
    assert caught.value.code == "unsupported_parameter"
    assert sampling({field: None}) == SamplingParams(max_tokens=20)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens: got 0, allowed: an integer ≥ 1"),
        ({"max_new_tokens": 1.5}, "max_new_tokens: got 1.5"),
        ({"max_new_tokens": True}, "max_new_tokens: got True"),
        ({"max_new_tokens": 4, "min_new_tokens": 5}, "min_new_tokens: got 5, allowed: up to max_new_tokens, 4"),
        ({"do_sample": 1}, "do_sample: got 1"),
        ({"do_sample": True, "temperature": 0}, "temperature: got 0, allowed: above 0 where do_sample is true"),
        ({"do_sample": True, "temperature": "hot"}, "temperature: got 'hot'"),
        ({"do_sample": False, "temperature": -1}, "temperature: got -1"),
        ({"top_p": 2}, "top_p: got 2"),
        ({"eos_token_id": "x"}, "eos_token_id: got 'x'"),
        ({"eos_token_id": [1, -1]}, "eos_token_id"),
        ({"pad_token_id": -1}, "pad_token_id: got -1"),
        ("greedy", "generation_config: got 'greedy'"),
        ({1: 2}, "generation_config"),
    ],
)
def test_what_cannot_be_is_refused_by_name(config: object, message: str) -> None:
    with pytest.raises(InvalidParameter) as caught:
        sampling(config)
    assert message in str(caught.value)


# ---------------------------------------------------------------- from_pretrained


def test_loading_arguments() -> None:
    study = {
        "torch_dtype": torch.bfloat16,
        "low_cpu_mem_usage": True,
        "use_flash_attn": False,
        "trust_remote_code": True,
        "device_map": "auto",
    }
    assert engine_config("folder", study) == EngineConfig("folder", dtype="bfloat16")
    assert engine_config(Path("a/b"), {"dtype": "float16", "use_safetensors": True}) == EngineConfig(
        "a/b", dtype="float16"
    )
    assert engine_config("m", {"torch_dtype": None, "device_map": None, "load_in_8bit": False}) == EngineConfig("m")
    assert engine_config("m", {"torch_dtype": "auto", "dtype": "auto"}) == EngineConfig("m")
    assert engine_config("org/name", {"revision": "abc"}).model == "org/name@abc"
    assert engine_config("org/name", {"revision": None}).model == "org/name"
    assert engine_config("m", {"device_map": split_model(80, 1)}) == EngineConfig("m")
    own = engine_config("m", {"threads": 2, "max_num_seqs": 4, "policy": "serial"})
    assert own == EngineConfig("m", threads=2, max_num_seqs=4, policy="serial")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"device_map": split_model(80, 6)}, "device_map: got"),
        ({"device_map": "balanced"}, "device_map: got 'balanced'"),
        ({"device_map": {}}, "device_map"),
        ({"trust_remote_code": "yes"}, "trust_remote_code: got 'yes', which is not supported; allowed: true or false"),
        ({"load_in_8bit": True}, "load_in_8bit: got True"),
        ({"use_safetensors": False}, "use_safetensors: got False"),
        ({"tp_plan": "auto"}, "tp_plan: got 'auto'"),
        ({"attn_implementation": "eager"}, "attn_implementation"),
        ({"model": "other"}, "model: got 'other'"),
        ({"torch_dtype": torch.float64}, "torch_dtype: got torch.float64, allowed: auto, float32"),
        ({"torch_dtype": "int8"}, "torch_dtype: got 'int8'"),
        ({"torch_dtype": "float32", "dtype": "float16"}, "dtype"),
        ({"revision": 3}, "revision: got 3"),
    ],
)
def test_loading_arguments_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(HeadraceError) as caught:
        engine_config("org/name", arguments)
    assert caught.value.status == 400 and message in str(caught.value)


def test_a_folder_has_no_revision(tmp_path: Path) -> None:
    with pytest.raises(InvalidParameter, match="revision: got 'main', allowed: none for a folder"):
        engine_config(str(tmp_path), {"revision": "main"})
    with pytest.raises(InvalidParameter, match="pretrained_model_name_or_path: got 3"):
        engine_config(3, {})


# ---------------------------------------------------------------- split_model

PUBLISHED = {2: [27, 54], 3: [16, 32, 32], 4: [12, 23, 23, 23], 5: [9, *[18] * 4], 6: [8, *[15] * 5]} | {
    7: [7, *[13] * 6],
    8: [6, *[11] * 7],
}
"""Layers on each GPU, as published: the last GPUs have names for more layers than there are."""


@pytest.mark.parametrize("gpus", PUBLISHED)
def test_split_model_is_the_published_placement(gpus: int) -> None:
    named = [gpu for gpu, count in enumerate(PUBLISHED[gpus]) for _ in range(count)]
    assert len(named) >= 80
    expected = {f"language_model.model.layers.{layer}": named[layer] for layer in range(80)}
    for name in ("vision_model", "mlp1"):
        expected[name] = 0
    for name in ("model.tok_embeddings", "model.embed_tokens", "output", "model.norm", "model.rotary_emb", "lm_head"):
        expected[f"language_model.{name}"] = 0
    expected["language_model.model.layers.79"] = 0
    assert split_model("NVLM-D-72B", gpus) == expected
    assert split_model(80, gpus) == split_model("nvidia/NVLM-D-72B", gpus) == expected


def test_the_six_gpus_of_the_study() -> None:
    placed = split_model("NVLM-D-72B", 6)
    layers = [[home for name, home in placed.items() if ".layers." in name].count(gpu) for gpu in range(6)]
    assert layers == [9, 15, 15, 15, 15, 11]
    assert placement_text("NVLM-D-72B", 6).splitlines() == [
        "GPU 0: 9 layers (0-7, 79), vision tower, projector, embedding, final norm, head",
        "GPU 1: 15 layers (8-22)",
        "GPU 2: 15 layers (23-37)",
        "GPU 3: 15 layers (38-52)",
        "GPU 4: 15 layers (53-67)",
        "GPU 5: 11 layers (68-78)",
    ]


def test_split_model_of_other_models(tmp_path: Path) -> None:
    assert set(split_model(24, 1).values()) == {0}
    assert placement_text(2, 4).splitlines()[1:] == ["GPU 1: 0 layers", "GPU 2: 0 layers", "GPU 3: 0 layers"]
    (tmp_path / "config.json").write_text(json.dumps({"llm_config": {"num_hidden_layers": 24}}))
    assert split_model(tmp_path, 2) == split_model(str(tmp_path), 2) == split_model(24, 2)
    (tmp_path / "config.json").write_text(json.dumps({"num_hidden_layers": 10}))
    assert split_model(tmp_path, 3) == split_model(10, 3)
    (tmp_path / "config.json").write_text(json.dumps({"llm_config": {}}))
    with pytest.raises(InvalidParameter, match="num_hidden_layers: got None"):
        split_model(tmp_path, 3)


@pytest.mark.parametrize(
    ("model", "gpus", "field"),
    [
        (0, 2, "model"),
        (10**9, 2, "model"),
        (True, 2, "model"),
        ("no-such-model", 2, "model"),
        (None, 2, "model"),
        (80, 0, "num_gpus"),
        (80, True, "num_gpus"),
        (80, 2.0, "num_gpus"),
        (80, "2", "num_gpus"),
    ],
)
def test_split_model_refuses_by_name(model: Any, gpus: Any, field: str) -> None:
    for call in (split_model, placement_text):
        with pytest.raises(InvalidParameter, match=f"^{field}: got "):
            call(model, gpus)
