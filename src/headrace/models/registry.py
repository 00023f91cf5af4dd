"""From a checkpoint's config to its description: the one entrance of this package."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from headrace.core.errors import UnsupportedModel, shorten
from headrace.core.spec import ModelSpec, WeightMap
from headrace.models import (
    gemma3,
    gguf,
    gptj,
    internvl,
    llama,
    mistral,
    mixtral,
    nvlm,
    open_qwen2vl,
    phi3,
    qwen2,
    qwen3,
    qwen3_moe,
    vision,
)
from headrace.models.config import ConfigReader, read_architecture, read_dtype
from headrace.models.experts import read_transformers_names
from headrace.models.gguf_rope import ReadVector
from headrace.models.vision import Shapes, TokenId

Describe = Callable[[ConfigReader], tuple[ModelSpec, WeightMap]]
DescribeVision = Callable[[ConfigReader, Shapes, TokenId | None], tuple[ModelSpec, WeightMap]]

ARCHITECTURES: Mapping[str, Describe] = {
    "LlamaForCausalLM": llama.describe,
    "Qwen2ForCausalLM": qwen2.describe,
    "Gemma3ForCausalLM": gemma3.describe,
    "Phi3ForCausalLM": phi3.describe,
    "GPTJForCausalLM": gptj.describe,
    "Qwen3MoeForCausalLM": qwen3_moe.describe,
    "MistralForCausalLM": mistral.describe,
    "Qwen3ForCausalLM": qwen3.describe,
    "MixtralForCausalLM": mixtral.describe,
}

MODEL_TYPES: Mapping[str, Describe] = {
    "llama": llama.describe,
    "qwen2": qwen2.describe,
    "gemma3_text": gemma3.describe,
    "phi3": phi3.describe,
    "gptj": gptj.describe,
    "qwen3_moe": qwen3_moe.describe,
    "mistral": mistral.describe,
    "qwen3": qwen3.describe,
    "mixtral": mixtral.describe,
}
"""For configs that name no architecture."""

VISION: Mapping[str, DescribeVision] = {
    "InternVLForConditionalGeneration": internvl.describe_transformers,
    "InternVLChatModel": internvl.describe_chat,
    "NVLM_D": nvlm.describe,
    "OpenQwen2VL": open_qwen2vl.describe,
}
"""Models that see: described with what the checkpoint holds, and with the tokenizer where the config is silent."""

VISION_MODEL_TYPES: Mapping[str, DescribeVision] = {
    "internvl": internvl.describe_transformers,
    "internvl_chat": internvl.describe_chat,
    "NVLM_D": nvlm.describe,
    "open_qwen2vl": open_qwen2vl.describe,
}


@dataclass(frozen=True, slots=True)
class Description:
    """A checkpoint's model as data, before any tensor is read."""

    spec: ModelSpec
    weight_map: WeightMap
    dtype: str | None
    """float32, float16 or bfloat16 as the config says; None where it does not say, and for GGUF."""
    adapter_map: WeightMap
    """Of the architecture's Hugging Face checkpoints, whatever this one is: what LoRA adapters name, in that order of
    rows. Of a model that sees it is the decoder's."""


def describe(
    config: Mapping[str, object],
    format: str,
    shapes: Shapes,
    read_vector: ReadVector | None = None,
    token_id: TokenId | None = None,
    processor: Mapping[str, object] | None = None,
) -> Description:
    """`format` "hf": `config` is config.json; "gguf": the file's metadata, and the tensors present say what is tied.

    `shapes`: by the checkpoint's own tensor names, (rows, columns). `read_vector`: `Checkpoint.vector`, for the few
    numbers that GGUF keeps in tensors and not in the metadata; without it a file that has such numbers is refused.
    `token_id`: the tokenizer's id of a token by its text; asked only by models that see and whose config does not name
    the id of their placeholder (NVLM-D, InternVLChatModel), which are refused without it. `processor`: what the
    checkpoint says of its image processor; None: nothing.
    Raises UnsupportedModel for an architecture or a value headrace does not run, CheckpointError for a broken config.
    """
    if format == "hf":
        images = None if processor is None else ConfigReader(processor, "preprocessor_config.json")
        return _describe_hf(ConfigReader(config, "config.json"), shapes, token_id, images)
    if format != "gguf":
        raise UnsupportedModel(f"format is {shorten(format)}, allowed: hf, gguf")
    metadata = ConfigReader(config, "GGUF metadata")
    name = metadata.find_str("general.architecture") or metadata.bad("general.architecture", "a name")
    _require_known(metadata, "general.architecture", name, gguf.ARCHITECTURES)
    spec, weight_map, adapter_map = gguf.describe(metadata, name, shapes, read_vector)
    return Description(spec, weight_map, None, adapter_map)


def _describe_hf(
    config: ConfigReader, shapes: Shapes, token_id: TokenId | None, processor: ConfigReader | None
) -> Description:
    key, known, seeing = "architectures", ARCHITECTURES, VISION
    name = read_architecture(config)
    if name is None:
        key, known, seeing = "model_type", MODEL_TYPES, VISION_MODEL_TYPES
        name = config.find_str(key) or config.bad(key, "a name")
    _require_known(config, key, name, {**known, **seeing})
    # A quantization_config changes no name and no shape: the checkpoint presents its packed weights as plain ones.
    if name in seeing:
        spec, weight_map = seeing[name](config, shapes, token_id)
        # What the other models' own code does with a picture, config.json says.
        if processor is not None and seeing[name] is internvl.describe_transformers:
            spec = internvl.with_processor(spec, processor)
        return Description(spec, weight_map, read_dtype(config), vision.adapter_map(spec))
    spec, weight_map = known[name](config)
    return Description(spec, read_transformers_names(weight_map, shapes), read_dtype(config), weight_map)


def _require_known(config: ConfigReader, key: str, name: str, known: Mapping[str, object]) -> None:
    if name not in known:
        raise UnsupportedModel(f"{config.where}: {key} is {shorten(name)}, allowed: {', '.join(known)}")
