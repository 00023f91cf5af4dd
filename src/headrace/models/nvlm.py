"""NVLM-D: InternViT-6B before a Qwen2 decoder, in InternVL's published layout, with tags in the text for the tiles.

Three things are its own. The decoder's `model_type` says llama, its `architectures` what it is. The tower's heads are
followed by heads of zeros (`EncoderSpec.dummy_heads`). The projector has no biases, and the decoder's intermediate size
in its middle.
"""

from __future__ import annotations

from dataclasses import replace

from headrace.core.spec import ImagePromptSpec, ModelSpec, VisionSpec, WeightMap
from headrace.models import internvl, vision
from headrace.models.config import ConfigReader
from headrace.models.vision import Shapes, TokenId

PROMPT = ImagePromptSpec(pad="<|vision_pad|>", before="<Image>", after="</Image>", tile_tags=True)
TEMPLATES = ("chatml",)


def describe(config: ConfigReader, shapes: Shapes, token_id: TokenId | None) -> tuple[ModelSpec, WeightMap]:
    """Raises CheckpointError, UnsupportedModel."""
    llm = vision.read_table(config, "llm_config")
    # Llama's words, beside an architecture that has no such choice.
    llm.require("attention_bias", True)
    llm.require("mlp_bias", False)
    decoder = vision.read_decoder(llm, shapes, f"{internvl.HEAD}weight")
    internvl.check_chat(config, TEMPLATES)
    encoder = internvl.read_encoder(config, shapes)
    middle = llm.get_int("intermediate_size")
    seeing = VisionSpec(
        encoder=encoder,
        projector=vision.shuffle_projector(encoder, internvl.read_version(config), middle, bias=False),
        tiling=internvl.read_tiling(config, encoder.tile_size),
        prompt=PROMPT,
        image_token_id=vision.read_image_token(config, PROMPT.pad, token_id, decoder.vocab_size),
    )
    spec = replace(decoder, name="nvlm_d", vision=seeing)
    return spec, internvl.chat_map(config, spec, seeing)
