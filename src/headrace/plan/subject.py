"""Which model a plan is about: its description, from a config.json, a checkpoint's headers or a known name. No weights
are read, and none are fetched."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from headrace.core.errors import ModelNotFound, shorten
from headrace.core.spec import ModelSpec
from headrace.models.registry import describe
from headrace.text.tokenizer import has_tokenizer
from headrace.weights.checkpoint import Checkpoint, locate, open_checkpoint, read_image_processor, read_json
from headrace.weights.hub import HubId, parse_hub_id

PLACEHOLDER = 0
"""Stands for the id of an image's token, which only a tokenizer knows; no size depends on it."""
NVLM_RANKS = 8
"""NVLM-D's tower is stored with its heads filled up to a multiple of it, though no key of its config says so."""
NVLM_QKV = "vision_model.encoder.layers.0.attn.qkv.weight"


def _llama(
    hidden: int, layers: int, heads: tuple[int, int], inner: int, vocab: int, context: int, tied: bool
) -> dict[str, object]:
    """`heads`: of queries, of keys."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "intermediate_size": inner,
        "vocab_size": vocab,
        "max_position_embeddings": context,
        "tie_word_embeddings": tied,
        "hidden_act": "silu",
        "torch_dtype": "bfloat16",
    }


def _qwen2(hidden: int, layers: int, heads: tuple[int, int], inner: int, vocab: int, tied: bool) -> dict[str, object]:
    return {**_llama(hidden, layers, heads, inner, vocab, 32_768, tied), "architectures": ["Qwen2ForCausalLM"]}


KNOWN: Mapping[str, Mapping[str, object]] = {
    "smollm2-135m": _llama(576, 30, (9, 3), 1536, 49_152, 8192, True),
    "llama-2-7b": _llama(4096, 32, (32, 32), 11_008, 32_000, 4096, False),
    "llama-2-70b": _llama(8192, 80, (64, 8), 28_672, 32_000, 4096, False),
    "llama-3-8b": _llama(4096, 32, (32, 8), 14_336, 128_256, 8192, False),
    "yi-34b-200k": _llama(7168, 60, (56, 8), 20_480, 64_000, 200_000, False),
    "qwen2.5-1.5b": _qwen2(1536, 28, (12, 2), 8960, 151_936, True),
    "qwen2-72b": _qwen2(8192, 80, (64, 8), 29_568, 152_064, False),
    "nvlm-d-72b": {
        "architectures": ["NVLM_D"],
        "model_type": "NVLM_D",
        "downsample_ratio": 0.5,
        "dynamic_image_size": True,
        "force_image_size": 448,
        "use_thumbnail": True,
        "max_dynamic_patch": 6,
        "ps_version": "v2",
        "torch_dtype": "bfloat16",
        "llm_config": _qwen2(8192, 80, (64, 8), 29_568, 152_064, False),
        "vision_config": {
            "hidden_size": 3200,
            "intermediate_size": 12_800,
            "num_hidden_layers": 45,
            "num_attention_heads": 25,
            "image_size": 448,
            "patch_size": 14,
            "norm_type": "rms_norm",
            "qkv_bias": False,
            "qk_normalization": True,
            "hidden_act": "gelu",
        },
    },
}
"""Published configs, as far as sizes depend on them."""


@dataclass(frozen=True, slots=True)
class Subject:
    """A model to plan for."""

    name: str
    spec: ModelSpec
    source: str
    """Where its sizes come from."""
    dtype: str | None = None
    """float32, bfloat16 or float16 of its plain weights; None: not said."""
    nbytes: int | None = None
    """Of the checkpoint's weights; None: there is only a config."""
    layers: Mapping[str, int] = field(default_factory=dict)
    """Of the checkpoint: scheme -> numbers in the weights of its layers."""
    head: str = ""
    """Scheme of what gives the logits: the head, or a tied embedding."""
    table: str = ""
    """Scheme of the embedding."""
    has_text: bool = True
    """Whether a tokenizer comes with it; taken for granted where there is only a config."""


def read_subject(model: str) -> Subject:
    """`model`: one of `KNOWN`, a config.json, a folder with one (with weights or without), a .gguf file, `demo`, or a
    Hub id, of which only the config is fetched. A file or folder wins over a known name.

    Raises ModelError: where a key is missing, it says which.
    """
    path = Path(model)
    known = KNOWN.get(model.lower())
    if known is not None and not path.exists():
        return _of_config(known, model.lower(), "published config", None)
    if path.suffix == ".json" and path.is_file():
        return _of_folder(path.parent, path)
    if (path / "config.json").is_file() and not any(path.glob("*.safetensors*")):
        return _of_folder(path, path / "config.json")
    if not path.exists() and (hub_id := parse_hub_id(model)) is not None:
        return _of_config(read_json(hub_config(hub_id)), str(hub_id), f"{hub_id}, config.json", None)
    try:
        found = locate(model)
    except ModelNotFound as error:
        raise ModelNotFound(f"{error}; or a config.json, or one of {', '.join(KNOWN)}") from error
    with closing(open_checkpoint(found)) as checkpoint:
        return _of_checkpoint(checkpoint, model)


def _of_folder(folder: Path, config: Path) -> Subject:
    processor = folder / "preprocessor_config.json"
    seen = read_json(processor) if processor.is_file() else None
    return _of_config(read_json(config), folder.resolve().name, str(config), seen)


def _of_config(config: Mapping[str, object], name: str, source: str, processor: Mapping[str, object] | None) -> Subject:
    made = describe(config, "hf", _stored_shapes(config), token_id=lambda _: PLACEHOLDER, processor=processor)
    return Subject(name, made.spec, source, made.dtype)


def _stored_shapes(config: Mapping[str, object]) -> dict[str, tuple[int, ...]]:
    """What describe() would find out from NVLM-D's tensors: how many heads are stored."""
    tower = config.get("vision_config")
    if config.get("model_type") != "NVLM_D" or not isinstance(tower, Mapping):
        return {}
    hidden, heads = tower.get("hidden_size"), tower.get("num_attention_heads")
    if not isinstance(hidden, int) or not isinstance(heads, int) or heads < 1:
        return {}
    stored = -(-heads // NVLM_RANKS) * NVLM_RANKS
    return {NVLM_QKV: (3 * stored * (hidden // heads), hidden)}


def _of_checkpoint(checkpoint: Checkpoint, name: str) -> Subject:
    shapes = checkpoint.shapes()
    made = describe(
        *(checkpoint.config, checkpoint.format, shapes, checkpoint.vector),
        token_id=lambda _: PLACEHOLDER,
        processor=read_image_processor(checkpoint),
    )
    layers: Counter[str] = Counter()
    ends: dict[str, str] = {}
    for tensor, shape in shapes.items():
        if len(shape) < 2:
            continue
        scheme = checkpoint.tensor(tensor).scheme
        part = _part(tensor)
        if part == "layer":
            layers[scheme] += math.prod(shape)
        else:
            ends[part] = scheme
    table = ends.get("table", "")
    return Subject(
        *(name, made.spec, checkpoint.origin, made.dtype, checkpoint.nbytes),
        *(dict(layers), ends.get("head", table), table, has_tokenizer(checkpoint)),
    )


def _part(tensor: str) -> str:
    """layer, table (embedding) or head, by a tensor's name in a GGUF file or a Hugging Face folder."""
    if tensor.startswith("output.") or "lm_head" in tensor:
        return "head"
    return "table" if any(word in tensor for word in ("token_embd", "embed_tokens", "wte.")) else "layer"


def hub_config(hub_id: HubId, *, endpoint: str | None = None, cache_dir: Path | None = None) -> Path:
    """config.json alone of a repository. `endpoint`, `cache_dir`: instead of the client's own settings. Raises
    ModelNotFound."""
    import huggingface_hub
    from huggingface_hub import errors

    faults: Any = errors
    try:
        found = huggingface_hub.hf_hub_download(
            hub_id.name, "config.json", revision=hub_id.revision, endpoint=endpoint, cache_dir=cache_dir
        )
    except (OSError, ValueError, faults.HfHubHTTPError, faults.HTTPError) as error:
        reason = shorten(" ".join(str(error).split()), 160)
        raise ModelNotFound(f"model {hub_id}: its config.json cannot be fetched: {reason}") from error
    return Path(found)
