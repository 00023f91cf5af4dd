"""InternVL 2, 2.5 and 3: InternViT, pixel shuffle and a projector of two layers before a Qwen2, Llama or Qwen3 decoder.

Two layouts of one model: `InternVLChatModel`, as it was published, and `InternVLForConditionalGeneration`, as
transformers converts it. NVLM-D is a variation of the first (`nvlm.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from headrace.core.spec import EncoderSpec, ImagePromptSpec, Merge, ModelSpec, TilingSpec, VisionSpec, WeightMap
from headrace.models import intern_vit, vision
from headrace.models.config import ACTIVATIONS, ConfigReader
from headrace.models.vision import Shapes, TokenId

PROMPT = ImagePromptSpec(pad="<IMG_CONTEXT>", before="<img>", after="</img>")
TEMPLATES = ("Hermes-2", "internlm2-chat", "internvl2_5")
"""Names of the chat frames that these models are published with."""
VERSIONS: Mapping[str, Merge] = {"v1": "shuffle_v1", "v2": "shuffle_v2"}
MAX_TILES = 64
BICUBIC = 3
"""Pillow's number for it, as image processors write it."""
BODY, HEAD = "language_model.model.", "language_model.lm_head."
"""Of the decoder's names as published, and as transformers 4 writes them (newer versions too, into files)."""


def describe_chat(config: ConfigReader, shapes: Shapes, token_id: TokenId | None) -> tuple[ModelSpec, WeightMap]:
    """InternVLChatModel. Raises CheckpointError, UnsupportedModel."""
    decoder = vision.read_decoder(vision.read_table(config, "llm_config"), shapes, f"{HEAD}weight")
    check_chat(config, TEMPLATES)
    encoder = read_encoder(config, shapes)
    seeing = VisionSpec(
        encoder=encoder,
        projector=vision.shuffle_projector(encoder, read_version(config), decoder.hidden_size, bias=True),
        tiling=read_tiling(config, encoder.tile_size),
        prompt=PROMPT,
        image_token_id=vision.read_image_token(config, PROMPT.pad, token_id, decoder.vocab_size),
    )
    spec = replace(decoder, name="internvl", vision=seeing)
    return spec, chat_map(config, spec, seeing)


def describe_transformers(
    config: ConfigReader, shapes: Shapes, token_id: TokenId | None
) -> tuple[ModelSpec, WeightMap]:
    """InternVLForConditionalGeneration. Raises CheckpointError, UnsupportedModel."""
    older = any(name.startswith(BODY) for name in shapes)
    outer, body, head = ("", BODY, HEAD) if older else ("model.", "model.language_model.", "lm_head.")
    text = vision.read_table(config, "text_config")
    # Older configs say nothing outside of text_config, where a missing key means nothing either: what is stored counts.
    says = next((table for table in (config, text) if table.has("tie_word_embeddings")), None)
    tied = says is None or says.get_bool("tie_word_embeddings", True)
    decoder = vision.read_decoder(text, shapes, f"{head}weight", tied)

    tower = vision.read_table(config, "vision_config")
    stored = intern_vit.read_layers(tower)
    config.require("vision_feature_select_strategy", "default")
    encoder = intern_vit.read_transformers(tower, intern_vit.read_depth(config, "vision_feature_layer", stored))
    intern_vit.check_tile(encoder, tower, "image_size")
    config.require("downsample_ratio", vision.DOWNSAMPLE)
    activation = config.get_choice("projector_hidden_act", ACTIVATIONS, "gelu")
    projector = vision.shuffle_projector(encoder, "shuffle_v2", decoder.hidden_size, True, activation)
    config.require("image_seq_length", projector.tokens)
    seeing = VisionSpec(
        encoder=encoder,
        projector=projector,
        # What the processor does where nothing else is said; config.json has no word of it.
        tiling=TilingSpec(encoder.tile_size, min_tiles=1, max_tiles=12, thumbnail=True),
        prompt=PROMPT,
        image_token_id=vision.read_image_token(config, PROMPT.pad, token_id, decoder.vocab_size),
    )
    spec = replace(decoder, name="internvl", vision=seeing)

    inner = vision.decoder_map(spec, body, head)
    linear = f"{outer}multi_modal_projector"
    names = (f"{linear}.linear_1", f"{linear}.linear_2", f"{linear}.layer_norm")
    rules = (
        *inner.rules,
        *intern_vit.transformers_rules(encoder, f"{outer}vision_tower"),
        *vision.projector_rules(projector, spec.hidden_size, *names),
    )
    unused = intern_vit.unused_blocks(encoder, stored, f"{outer}vision_tower.encoder.layer".replace(".", r"\."))
    return spec, WeightMap(rules, (*inner.ignorable, *unused))


def with_processor(spec: ModelSpec, processor: ConfigReader) -> ModelSpec:
    """The same model with pictures cut as transformers' image processor of the checkpoint does. `crop_to_patches` says
    nothing there: InternVL's processor cuts, whatever it is. Raises CheckpointError, UnsupportedModel."""
    seeing = spec.vision
    assert seeing is not None
    tiling = seeing.tiling
    if (size := processor.find_table("size")) is not None:
        size.require("height", tiling.tile_size)
        size.require("width", tiling.tile_size)
    for key in ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb"):
        processor.require(key, True)
    processor.require("resample", BICUBIC)
    least = processor.get_int("min_patches", tiling.min_tiles, high=MAX_TILES)
    most = processor.get_int("max_patches", max(tiling.max_tiles, least), low=least, high=MAX_TILES)
    mean, std = (
        processor.get_floats(key, 3) if processor.has(key) else default
        for key, default in (("image_mean", tiling.mean), ("image_std", tiling.std))
    )
    tiling = replace(tiling, min_tiles=least, max_tiles=most, mean=_three(mean), std=_three(std))
    return replace(spec, vision=replace(seeing, tiling=tiling))


def _three(values: tuple[float, ...]) -> tuple[float, float, float]:
    red, green, blue = values
    return red, green, blue


# ---------------------------------------------------------------- what NVLM-D shares


def check_chat(config: ConfigReader, templates: tuple[str, ...]) -> None:
    """Refuses what would be another model, or have other names. A chat frame with a name that is not among `templates`
    is one: its markers may be other tokens."""
    if config.has("template"):
        config.get_choice("template", dict.fromkeys(templates))
    config.require("downsample_ratio", vision.DOWNSAMPLE)
    config.require("pad2square", False)
    config.require("use_backbone_lora", 0)
    config.require("use_llm_lora", 0)


def read_version(config: ConfigReader) -> Merge:
    """Of the pixel shuffle: v1 where the config does not say, as in the published class."""
    return config.get_choice("ps_version", VERSIONS, "v1")


def read_encoder(config: ConfigReader, shapes: Shapes) -> EncoderSpec:
    """The tower, for tiles of `force_image_size`, up to `select_layer`."""
    tower = vision.read_table(config, "vision_config")
    depth = intern_vit.read_depth(config, "select_layer", intern_vit.read_layers(tower))
    tile = config.find_int("force_image_size", high=intern_vit.MAX_TILE)
    spec = intern_vit.read_published(tower, tile, depth, shapes.get("vision_model.encoder.layers.0.attn.qkv.weight"))
    where, key = (tower, "image_size") if tile is None else (config, "force_image_size")
    return intern_vit.check_tile(spec, where, key)


def read_tiling(config: ConfigReader, tile: int) -> TilingSpec:
    """How a picture is cut; the defaults are those of the published class."""
    if not config.get_bool("dynamic_image_size", False):
        return TilingSpec(tile)
    least = config.get_int("min_dynamic_patch", 1, high=MAX_TILES)
    return TilingSpec(
        tile,
        min_tiles=least,
        max_tiles=config.get_int("max_dynamic_patch", max(6, least), low=least, high=MAX_TILES),
        thumbnail=config.get_bool("use_thumbnail", False),
    )


def chat_map(config: ConfigReader, spec: ModelSpec, seeing: VisionSpec) -> WeightMap:
    """`vision_model`, `mlp1`, `language_model`."""
    inner = vision.decoder_map(spec, BODY, HEAD)
    rules = (
        *inner.rules,
        *intern_vit.published_rules(seeing.encoder, "vision_model"),
        *vision.projector_rules(seeing.projector, spec.hidden_size, "mlp1.1", "mlp1.3", "mlp1.0"),
    )
    stored = intern_vit.read_layers(vision.read_table(config, "vision_config"))
    unused = intern_vit.unused_blocks(seeing.encoder, stored, r"vision_model\.encoder\.layers")
    return WeightMap(rules, (*inner.ignorable, *unused))
