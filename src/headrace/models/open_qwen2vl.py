"""Open-Qwen2VL: SigLIP, an average pool over its patches and two linear layers before a Qwen2 decoder.

It is published as a pickle; this is the folder that comes of its conversion: config.json with the three parts' sizes,
tensors under the names they have in the pickle, its three tables before them.
"""

from __future__ import annotations

import math
from dataclasses import replace

from headrace.core.spec import ImagePromptSpec, ModelSpec, ProjectorSpec, TilingSpec, VisionSpec, WeightMap
from headrace.models import intern_vit, siglip, vision
from headrace.models.config import ConfigReader
from headrace.models.vision import Shapes, TokenId

PROMPT = ImagePromptSpec(pad="<|image_pad|>")
"""The published code has an id below zero in the prompt; Qwen2.5's vocabulary has a token for the purpose."""
PROMPT_FORMS = ("train", "cli", "raw")
HALF = (0.5, 0.5, 0.5)
TOWER = "vision_backbone.featurizer"
PROJECTOR = "projector.mlp_projector"


def describe(config: ConfigReader, shapes: Shapes, token_id: TokenId | None) -> tuple[ModelSpec, WeightMap]:
    """Raises CheckpointError, UnsupportedModel."""
    backbone = "llm_backbone.llm." if any(name.startswith("llm_backbone.llm.") for name in shapes) else "llm_backbone."
    body, head = f"{backbone}model.", f"{backbone}lm_head."
    decoder = vision.read_decoder(vision.read_table(config, "text_config"), shapes, f"{head}weight")
    if config.has("prompt_form"):
        config.get_choice("prompt_form", dict.fromkeys(PROMPT_FORMS))

    tower = vision.read_table(config, "vision_config")
    stored = intern_vit.read_layers(tower)
    # The features are those of a block by its number, before the one behind it and without the last norm.
    encoder = siglip.read(tower, tower.get_int("feature_block", stored - 2, low=0, high=stored - 1) + 1)
    projector = _read_projector(vision.read_table(config, "projector"), encoder.hidden_size, encoder.grid, decoder)
    seeing = VisionSpec(
        encoder=encoder,
        projector=projector,
        tiling=TilingSpec(encoder.tile_size, mean=HALF, std=HALF),
        prompt=PROMPT,
        image_token_id=vision.read_image_token(config, PROMPT.pad, token_id, decoder.vocab_size),
    )
    spec = replace(decoder, name="open_qwen2vl", vision=seeing)

    inner = vision.decoder_map(spec, body, head)
    rules = (
        *inner.rules,
        *siglip.rules(encoder, TOWER),
        *vision.projector_rules(projector, spec.hidden_size, f"{PROJECTOR}.0", f"{PROJECTOR}.2"),
    )
    return spec, WeightMap(rules, (*inner.ignorable, *siglip.ignorable(encoder, stored, TOWER.replace(".", r"\."))))


def _read_projector(config: ConfigReader, width: int, grid: int, decoder: ModelSpec) -> ProjectorSpec:
    config.require("type", "avgpool")
    config.require("layers", 2)
    tokens = config.get_int("query_num", high=grid * grid)
    if math.isqrt(tokens) ** 2 != tokens:
        config.bad("query_num", f"the square of a number from 1 to {grid}")
    return ProjectorSpec("average_pool", tokens, width, decoder.hidden_size, bias=True)
