"""What stands in a prompt's text for a picture."""

from __future__ import annotations

from headrace.core.spec import ImagePromptSpec


def image_text(spec: ImagePromptSpec, tiles: int, tokens_per_tile: int) -> str:
    """The text of one image: for each tile its tag, where the model has tags, and `tokens_per_tile` placeholders.

    NVLM calls the last tile the thumbnail, also where it is the only one.
    """
    pads = spec.pad * tokens_per_tile
    tags = [""] * tiles
    if spec.tile_tags:
        tags = [*(f"<tile_{number}>" for number in range(1, tiles)), "<tile_global_thumbnail>"]
    return spec.before + "".join(tag + pads for tag in tags) + spec.after
