"""Quantised checkpoints end to end, through the engine's own way of opening a model: logits equal to transformers'.

compressed-tensors and fp8 folders are written by their own packages and read back by transformers; GPTQ and AWQ folders
are written from the formats' layouts (`quantised_cases.py`), next to a plain folder of what their numbers mean.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compressed_tensors import ModelCompressor
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    apply_quantization_config,
)
from compressed_tensors.quantization.utils import calculate_qparams
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, CompressedTensorsConfig, PreTrainedModel

from headrace import LLM
from headrace.core.config import EngineConfig
from headrace.core.errors import UnsupportedModel
from headrace.engine.model import OpenModel
from headrace.testing.checkpoints import tiny_checkpoint
from tests.e2e.stored import logits_of, stored_is_near
from tests.unit.quantised_cases import Made, awq_layer, fp8_layer, gptq_layer

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
TOKENS = [5, 17, 3, 80, 41, 9, 2, 2, 60, 33, 12, 1, 90, 55, 7, 28, 71, 4]
TOLERANCE = 1e-4
"""Of the largest logit."""
NEAR = 0.1
"""Nats. Weights as stored meet int8 activations; these models' weights are so wide that roundings show tenfold."""
# transformers says that arguments given at load time win over the file's.
OVERRIDE = "ignore:You passed `quantization_config` or equivalent"


def check(path: Path, model: PreTrainedModel) -> None:
    """The logits in float32 on both backends, those with the weights as stored, and the tokens that a user gets."""
    model.eval()
    if model.dtype != torch.float32:
        model.float()
    with torch.inference_mode():
        expected = model(torch.tensor([TOKENS])).logits[0].numpy()
        ids = model.generate(
            torch.tensor([TOKENS]), attention_mask=torch.ones(1, len(TOKENS)), max_new_tokens=12, do_sample=False
        )
    for backend in ("native", "torch"):
        found = logits_of(path, TOKENS, backend)
        assert found.shape == expected.shape
        assert np.abs(found - expected).max() / np.abs(expected).max() < TOLERANCE, backend
    stored_is_near(path, model, NEAR)
    with LLM(str(path), dtype="float32", threads=1) as llm:
        (answer,) = llm.generate([TOKENS], max_tokens=12, ignore_eos=True)
    assert list(answer.token_ids)[: len(ids[0]) - len(TOKENS)] == ids[0, len(TOKENS) :].tolist()


# ---------------------------------------------------------------- written by compressed-tensors


def calibrate(module: torch.nn.Module, args: QuantizationArgs) -> None:
    """Scales and zeros of the weights' own least and largest values."""
    weight = module.weight.data
    rows, columns = weight.shape
    height, width = {
        "tensor": (rows, columns),
        "channel": (1, columns),
        "group": (1, args.group_size),
        "block": args.block_structure,
    }[args.strategy]
    blocks = weight.reshape(rows // height, height, columns // width, width).transpose(1, 2).flatten(2)
    scale, zero = calculate_qparams(blocks.amin(-1), blocks.amax(-1), args)
    module.weight_scale.data.copy_(scale.reshape(module.weight_scale.shape))
    module.weight_zero_point.data.copy_(zero.reshape(module.weight_zero_point.shape))


def write_compressed(path: Path, *schemes: QuantizationScheme, dtype: str = "float32") -> Path:
    dense = tiny_checkpoint(path / "dense", dtype=dtype, **SIZES)
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=getattr(torch, dtype))
    groups = {f"group_{index}": scheme for index, scheme in enumerate(schemes)}
    apply_quantization_config(
        model, QuantizationConfig(config_groups=groups, ignore=["re:.*lm_head"]), show_progress=False
    )
    for module in model.modules():
        scheme = getattr(module, "quantization_scheme", None)
        if scheme is not None:
            calibrate(module, scheme.weights)
            if hasattr(module, "input_scale"):
                module.input_scale.data.fill_(0.05)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(path / "packed")
    compressor.update_config(path / "packed")
    return path / "packed"


def scheme(target: str = "Linear", activations: dict[str, Any] | None = None, **args: Any) -> QuantizationScheme:
    inputs = None if activations is None else QuantizationArgs(**activations)
    return QuantizationScheme(targets=[target], weights=QuantizationArgs(**args), input_activations=inputs)


W4_SYMMETRIC = {"num_bits": 4, "strategy": "group", "group_size": 32}
W4_ASYMMETRIC = W4_SYMMETRIC | {"symmetric": False}
W8_CHANNEL = {"num_bits": 8, "strategy": "channel"}
FP8_CHANNEL = {"num_bits": 8, "type": "float", "strategy": "channel"}
FP8_TENSOR = FP8_CHANNEL | {"strategy": "tensor"}
FP8_BLOCK = {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [32, 32]}
DYNAMIC_INT8 = {"num_bits": 8, "strategy": "token", "dynamic": True}
DYNAMIC_FP8 = DYNAMIC_INT8 | {"type": "float"}
STATIC_FP8 = {"num_bits": 8, "type": "float", "strategy": "tensor"}


@pytest.mark.filterwarnings(OVERRIDE)
@pytest.mark.parametrize(
    ("schemes", "form"),
    [
        ([scheme(**W4_SYMMETRIC)], "pack-quantized"),
        ([scheme(**W4_ASYMMETRIC)], "pack-quantized"),
        ([scheme(**W8_CHANNEL)], "pack-quantized"),
        ([scheme(activations=DYNAMIC_INT8, **W8_CHANNEL)], "int-quantized"),
        ([scheme(**FP8_CHANNEL)], "naive-quantized"),
        ([scheme(activations=DYNAMIC_FP8, **FP8_CHANNEL)], "float-quantized"),
        ([scheme(activations=STATIC_FP8, **FP8_TENSOR)], "float-quantized"),
        ([scheme(**FP8_BLOCK)], "naive-quantized"),
    ],
    ids=["w4", "w4-asymmetric", "w8", "w8a8", "fp8-weights", "fp8-dynamic", "fp8-static", "fp8-block"],
)  # fmt: skip
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_compressed_tensors(schemes: list[QuantizationScheme], form: str, dtype: str, tmp_path: Path) -> None:
    path = write_compressed(tmp_path, *schemes, dtype=dtype)
    assert json.loads((path / "config.json").read_text())["quantization_config"]["format"] == form
    # In the checkpoint's own type: that is what its scales, and so its weights, are rounded to.
    reading = CompressedTensorsConfig(dequantize=True)
    check(path, AutoModelForCausalLM.from_pretrained(path, dtype="auto", quantization_config=reading))


def test_two_groups_and_transformers_own_way_to_load(tmp_path: Path) -> None:
    path = write_compressed(tmp_path, scheme(r"re:.*mlp\..*", **W4_SYMMETRIC), scheme(r"re:.*attn\..*", **W8_CHANNEL))
    check(path, AutoModelForCausalLM.from_pretrained(path, dtype="float32"))


def test_w8a8_is_run_nearer_to_the_plain_model_and_says_so(tmp_path: Path) -> None:
    """Its own arithmetic rounds what goes into each layer; headrace does not, and the notes say that."""
    path = write_compressed(tmp_path, scheme(activations=DYNAMIC_INT8, **W8_CHANNEL))
    models = [AutoModelForCausalLM.from_pretrained(one, dtype="float32") for one in (path, tmp_path / "dense")]
    with torch.inference_mode():
        rounded, plain = (model.eval()(torch.tensor([TOKENS])).logits[0].numpy() for model in models)
    found = logits_of(path, TOKENS, "torch")
    assert np.square(found - plain).mean() < 0.8 * np.square(rounded - plain).mean()
    with OpenModel(EngineConfig(model=str(path))).checkpoint as checkpoint:
        assert ["does not round them" in note for note in checkpoint.notes] == [True]


# ---------------------------------------------------------------- GPTQ, AWQ and fp8

Layer = Callable[[NDArray[np.float32], int], Made]
PROJECTIONS = r"model\.layers\..*_proj\.weight"


def write_pair(
    path: Path, dense: Path, layer: Layer, *, chosen: str = PROJECTIONS, zero_biases: bool = False
) -> tuple[Path, Path]:
    """A quantised folder, and a plain one of what its numbers mean."""
    packed: dict[str, torch.Tensor] = {}
    plain: dict[str, torch.Tensor] = {}
    config = json.loads((dense / "config.json").read_text())
    for index, (name, weight) in enumerate(sorted(load_file(dense / "model.safetensors").items())):
        if not re.fullmatch(chosen, name):
            packed[name] = plain[name] = weight
            continue
        made = layer(weight.float().numpy(), index)
        module = name.removesuffix(".weight")
        packed |= {f"{module}.{part}": tensor.contiguous() for part, tensor in made.tensors.items()}
        if zero_biases:
            packed[f"{module}.bias"] = torch.zeros(len(weight), dtype=torch.float16)
        plain[name] = torch.from_numpy(np.ascontiguousarray(made.weight))
        config["quantization_config"] = made.config
    for folder, tensors in (("packed", packed), ("plain", plain)):
        (path / folder).mkdir()
        save_file(tensors, path / folder / "model.safetensors", {"format": "pt"})
        (path / folder / "config.json").write_text(json.dumps(config))
        config.pop("quantization_config", None)
    return path / "packed", path / "plain"


def gptq(**options: Any) -> Layer:
    return lambda weight, seed: gptq_layer(*weight.shape, weight=weight, seed=seed, **options)


@pytest.mark.parametrize(
    ("layer", "architecture", "zero_biases"),
    [
        (gptq(symmetric=True), "llama", False),
        (gptq(version="gptq_v2", sorted_columns=True), "llama", False),
        (gptq(sorted_columns=True, group=16), "qwen2", False),
        (gptq(bits=8, group=64, kind="BF16"), "llama", True),
        (gptq(group=-1), "llama", False),
        (gptq(group=48), "qwen2", False),
        (lambda weight, seed: awq_layer(*weight.shape, weight=weight, seed=seed), "llama", True),
        (lambda weight, seed: awq_layer(*weight.shape, weight=weight, seed=seed, group=64), "qwen2", False),
    ],
    ids=["gptq", "gptq-v2-sorted", "gptq-sorted", "gptq-8", "gptq-rows", "gptq-uneven", "awq", "awq-64"],
)  # fmt: skip
def test_gptq_and_awq(layer: Layer, architecture: str, zero_biases: bool, tmp_path: Path) -> None:
    dense = tiny_checkpoint(tmp_path / "dense", architecture, **SIZES)
    packed, plain = write_pair(tmp_path, dense, layer, zero_biases=zero_biases)
    check(packed, AutoModelForCausalLM.from_pretrained(plain, dtype="float32"))


@pytest.mark.parametrize("block", [(32, 32), (16, 64), (128, 128)], ids=str)
def test_fp8_of_blocks(block: tuple[int, int], tmp_path: Path) -> None:
    dense = tiny_checkpoint(tmp_path / "dense", "qwen3", **SIZES | {"head_dim": 16})
    layer: Layer = lambda weight, seed: fp8_layer(*weight.shape, block, weight=weight, seed=seed)  # noqa: E731
    packed, plain = write_pair(tmp_path, dense, layer)
    check(packed, AutoModelForCausalLM.from_pretrained(plain, dtype="float32"))
    if block == (32, 32):
        # Without a GPU transformers dequantises too; it wants whole blocks.
        check(packed, AutoModelForCausalLM.from_pretrained(packed, dtype="float32"))


@pytest.mark.parametrize("architecture", ["phi3", "mixtral", "qwen3_moe"])
def test_fused_layers_and_experts(architecture: str, tmp_path: Path) -> None:
    dense = tiny_checkpoint(tmp_path / "dense", architecture, **SIZES)
    chosen = r"model\.layers\..*(_proj|\.w[123])\.weight"
    packed, plain = write_pair(tmp_path, dense, gptq(sorted_columns=True, group=8), chosen=chosen)
    check(packed, AutoModelForCausalLM.from_pretrained(plain, dtype="float32"))


def test_a_quantised_head_and_a_layer_left_plain(tmp_path: Path) -> None:
    dense = tiny_checkpoint(tmp_path / "dense", **SIZES | {"vocab_size": 96})
    chosen = r"lm_head\.weight|model\.layers\.1\..*_proj\.weight"
    packed, plain = write_pair(tmp_path, dense, gptq(), chosen=chosen)
    check(packed, AutoModelForCausalLM.from_pretrained(plain, dtype="float32"))


def test_an_unknown_method_is_refused_by_name(tmp_path: Path) -> None:
    dense = tiny_checkpoint(tmp_path / "dense", **SIZES)
    config = json.loads((dense / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (dense / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModel, match="'bitsandbytes', allowed: gptq, awq, compressed-tensors, fp8"):
        OpenModel(EngineConfig(model=str(dense)))
