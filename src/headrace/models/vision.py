"""What the descriptions of models that see have in common: the decoder inside, the placeholder token, the projector."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

from headrace.core.errors import CheckpointError, UnsupportedModel, shorten
from headrace.core.spec import (
    Activation,
    EncoderSpec,
    Merge,
    ModelSpec,
    NormSpec,
    ProjectorSpec,
    WeightMap,
    WeightRule,
)
from headrace.models import llama, mapping, names, qwen2, qwen3
from headrace.models.config import ConfigReader, read_architecture

Shapes = Mapping[str, tuple[int, ...]]
TokenId = Callable[[str], int | None]
"""The id of a token by its text, or None where the tokenizer has no such token."""

DECODERS: Mapping[str, Callable[[ConfigReader], tuple[ModelSpec, WeightMap]]] = {
    "Qwen2ForCausalLM": qwen2.describe,
    "LlamaForCausalLM": llama.describe,
    "Qwen3ForCausalLM": qwen3.describe,
}
MODEL_TYPES: Mapping[str, str] = {"qwen2": "Qwen2ForCausalLM", "llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}
"""For decoders that name no architecture."""
TOKEN_KEYS = ("image_token_id", "image_token_index", "img_context_token_id")
TRAINED = (
    ("model.", "lm_head."),
    ("language_model.model.", "language_model.lm_head."),
    ("model.language_model.", "lm_head."),
)
"""How names of the decoder's body and head begin in a LoRA adapter: of the decoder alone, or of a model that sees."""
DOWNSAMPLE = 0.5
"""Of each side of the grid, by pixel shuffle: four patches become one row."""
PROJECTOR_EPS = 1e-5
"""Of the norm before the projector: what torch takes where nobody says."""


def read_table(config: ConfigReader, key: str) -> ConfigReader:
    """A nested object that must be there."""
    return config.find_table(key) or config.bad(key, "an object of keys and values")


def read_decoder(config: ConfigReader, shapes: Shapes, head: str, tied: bool | None = None) -> ModelSpec:
    """The language model that `config` describes.

    `head`: name of its head's weight in the checkpoint: one that is stored is used, whatever the config says, as
    transformers does. `tied`: what the config around it says of the head; None: nothing, the decoder's own counts.
    Raises CheckpointError, UnsupportedModel.
    """
    name = read_architecture(config)
    key = "architectures" if name is not None else "model_type"
    if name is None:
        word = config.find_str(key) or config.bad(key, "a name")
        name = MODEL_TYPES.get(word, word)
    if name not in DECODERS:
        raise UnsupportedModel(f"{config.where}: {key} is {shorten(name)}, allowed: {', '.join(DECODERS)}")
    spec, _ = DECODERS[name](config)
    tied = spec.embedding.tied if tied is None else tied
    return replace(spec, embedding=replace(spec.embedding, tied=tied and head not in shapes))


def decoder_map(spec: ModelSpec, body: str, head: str) -> WeightMap:
    """The decoder's map where its names begin otherwise: `body` stands for `model.`, `head` for `lm_head.`."""

    def renamed(name: str, dot: str) -> str:
        ours, theirs = ("model.", body) if name.startswith(f"model{dot}") else ("lm_head.", head)
        return theirs.replace(".", dot) + name.removeprefix(ours.replace(".", dot))

    plain = mapping.llama_like_map(spec)
    rules = (replace(rule, sources=tuple(renamed(name, ".") for name in rule.sources)) for rule in plain.rules)
    return WeightMap(tuple(rules), tuple(renamed(pattern, r"\.") for pattern in plain.ignorable))


def adapter_map(spec: ModelSpec) -> WeightMap:
    """What LoRA adapters name: the decoder's layers, under each of the names that training programs give them."""
    rules = {rule.sources: rule for body, head in TRAINED for rule in decoder_map(spec, body, head).rules}
    return WeightMap(tuple(rules.values()))


def read_image_token(config: ConfigReader, text: str, token_id: TokenId | None, vocab: int) -> int:
    """The placeholder's id: from the config, else what `token_id` says of its `text`. Raises CheckpointError."""
    key = config.first_of(*TOKEN_KEYS)
    if config.has(key):
        return config.get_int(key, low=0, high=vocab - 1)
    found = token_id(text) if token_id is not None else None
    if found is None:
        raise CheckpointError(
            f"{config.where}: {key} is missing, and the tokenizer has no token {shorten(text)}, allowed: one of them"
        )
    if not 0 <= found < vocab:
        raise CheckpointError(f"tokenizer: token {shorten(text)} is {found}, allowed: integers from 0 to {vocab - 1}")
    return found


def projector_rules(
    spec: ProjectorSpec, hidden: int, up: str, down: str, norm: str | None = None
) -> Iterator[WeightRule]:
    """`up`, `down`, `norm`: the checkpoint's names of the two linear layers and of the norm before them."""
    if norm is not None and spec.norm is not None:
        yield from mapping.norm(norm, f"{names.PROJECTOR}.norm", spec.norm)
    yield from mapping.linear(up, f"{names.PROJECTOR}.up", spec.intermediate, spec.width, spec.bias, "rows")
    yield from mapping.linear(down, f"{names.PROJECTOR}.down", hidden, spec.intermediate, spec.bias, "cols")


def shuffle_projector(
    encoder: EncoderSpec, version: Merge, intermediate: int, bias: bool, activation: Activation = "gelu"
) -> ProjectorSpec:
    """InternVL's and NVLM's: pixel shuffle by a half, norm, linear, activation, linear. The grid's side is even."""
    width = 4 * encoder.hidden_size
    return ProjectorSpec(
        merge=version,
        tokens=(encoder.grid // 2) ** 2,
        width=width,
        intermediate=intermediate,
        bias=bias,
        activation=activation,
        norm=NormSpec("layer", PROJECTOR_EPS, width, bias=True),
    )
