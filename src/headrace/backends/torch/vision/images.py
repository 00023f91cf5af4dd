"""Vision: images of a step -> rows of the decoder, encoded or out of the cache, put over the placeholders' own.

An image is computed whole when a step first meets one of its placeholders, and never for placeholders whose keys and
values the prefix cache has.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from headrace.backends.rows import Batch, ImagePart
from headrace.backends.torch.parameters import Slots
from headrace.backends.torch.vision.cache import EncoderCache
from headrace.backends.torch.vision.encoder import CHANNELS, Encoder
from headrace.backends.torch.vision.projector import Projector
from headrace.core.errors import EngineError, shorten
from headrace.core.spec import TilingSpec, VisionSpec
from headrace.core.types import ImageSpan


class Vision:
    """The vision side of a model. Not thread-safe."""

    def __init__(self, spec: VisionSpec, hidden_size: int, slots: Slots, cache_bytes: int) -> None:
        """The weights come through `slots`, and then `finish` is called. `hidden_size`: the decoder's; `cache_bytes`:
        of encoded images that are kept for whoever brings them again."""
        self.spec = spec
        self.cache = EncoderCache(cache_bytes)
        self._hidden_size = hidden_size
        self._dtype = slots.dtype
        self._device = slots.device
        self.encoder = Encoder(spec.encoder, slots)
        self.projector = Projector(spec.projector, hidden_size, slots)

    def finish(self) -> None:
        """Once all weights are there."""
        self.encoder.finish()

    def splice(self, batch: Batch, hidden_TH: Tensor) -> None:
        """Overwrites the hidden states of the batch's placeholders with their images' rows.

        Raises EngineError for pixels that are not those of the image's tiles.
        """
        by_hash: dict[str, list[ImagePart]] = {}
        for part in batch.images:
            by_hash.setdefault(part.image.hash, []).append(part)
        # Those that are there first: what the others bring may push them out.
        for image_hash in sorted(by_hash, key=lambda one: one not in self.cache):
            parts = by_hash[image_hash]
            known = image_hash in self.cache
            rows = self.rows(parts[0].image)
            if not known:
                self.cache.trim(batch.unfinished_images)
            _put(rows, parts, hidden_TH)

    def rows(self, image: ImageSpan) -> Tensor:
        """(tiles × tokens, hidden size), out of the cache or into it. Raises EngineError."""
        rows = self.cache.get(image.hash)
        if rows is None:
            rows = self.encode(image)
            self.cache.put(image.hash, rows)
        return rows

    @torch.inference_mode()
    def encode(self, image: ImageSpan) -> Tensor:
        """(tiles × tokens, hidden size). Raises EngineError."""
        tokens = self.spec.projector.tokens
        tiles = _tiles(image, self.spec.tiling)
        rows = torch.empty(len(tiles) * tokens, self._hidden_size, dtype=self._dtype, device=self._device)
        for index, one in enumerate(tiles):
            pixels = torch.from_numpy(_normalised(one, image, self.spec.tiling)).to(self._device)
            rows[index * tokens : (index + 1) * tokens] = self.projector(self.encoder(pixels))
        return rows


def _put(rows: Tensor, parts: Sequence[ImagePart], hidden_TH: Tensor) -> None:
    for part in parts:
        stop = part.first + len(part.places)
        if stop > len(rows):
            raise EngineError(f"image {shorten(part.image.hash)} has {len(rows)} rows, the prompt has places for more")
        hidden_TH.index_copy_(0, torch.from_numpy(part.places).to(hidden_TH.device), rows[part.first : stop])


def _tiles(image: ImageSpan, tiling: TilingSpec) -> NDArray[np.generic]:
    """(tiles, side, side, 3) uint8, or (tiles, 3, side, side) float32: a view of the pixels."""
    side, dtype = tiling.tile_size, np.dtype(np.float32 if image.normalised else np.uint8)
    needed = image.tiles * CHANNELS * side * side * dtype.itemsize
    if len(image.pixels) != needed:
        raise EngineError(
            f"image {shorten(image.hash)}: {len(image.pixels)} bytes of pixels, {image.tiles} tiles have {needed}"
        )
    shape = (CHANNELS, side, side) if image.normalised else (side, side, CHANNELS)
    return np.frombuffer(image.pixels, dtype).reshape(image.tiles, *shape)


def _normalised(tile: NDArray[np.generic], image: ImageSpan, tiling: TilingSpec) -> NDArray[np.float32]:
    """(3, side, side) float32 of its own: (x ÷ 255 − mean) ÷ std, unless that was done."""
    if image.normalised:
        return np.array(tile, np.float32)
    mean, std = (np.array(numbers, np.float32) for numbers in (tiling.mean, tiling.std))
    normalised: NDArray[np.float32] = (tile.astype(np.float32) / np.float32(255) - mean) / std
    return np.ascontiguousarray(normalised.transpose(2, 0, 1))
