"""A picture, in whatever form it comes, to the tiles that the encoder sees, and their name."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from headrace.core.errors import InvalidImage
from headrace.core.spec import TilingSpec
from headrace.media.decode import open_picture, plain_picture
from headrace.media.limits import MediaLimits, check_size
from headrace.media.tiling import cut

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True, slots=True)
class Prepared:
    """Fields as of `core.types.ImageSpan`, which this becomes once its place in the prompt is known."""

    tiles: int
    pixels: bytes = field(repr=False)
    hash: str
    normalised: bool = False


def prepare(
    data: bytes | Image | NDArray[np.uint8], tiling: TilingSpec, limits: MediaLimits, field: str = "image"
) -> Prepared:
    """`data`: a file's bytes, a PIL image, or a uint8 array (height, width, 3). Raises InvalidImage, naming `field`."""
    if isinstance(data, bytes | bytearray | memoryview):
        picture, size = open_picture(bytes(data), limits, field)
        tiles = cut(picture, tiling, size)
    elif isinstance(data, np.ndarray):
        if data.dtype != np.uint8 or data.ndim != 3 or data.shape[2] != 3:
            raise InvalidImage(field, f"a {data.dtype} array of {data.shape}", "a uint8 array (height, width, 3)")
        check_size(data.shape[1], data.shape[0], limits, field)
        tiles = cut(np.ascontiguousarray(data), tiling)
    elif _is_pillow(data):
        tiles = cut(plain_picture(data, limits, field), tiling)
    else:
        raise InvalidImage(field, type(data).__name__, "bytes, a PIL image or a uint8 array (height, width, 3)")
    pixels = tiles.tobytes()
    return Prepared(len(tiles), pixels, _name("uint8", len(tiles), tiling, pixels))


def prepare_values(pixel_values: NDArray[Any], tiling: TilingSpec, field: str = "pixel_values") -> Prepared:
    """Of values that are normalised already: floating point (tiles, 3, side, side), as model code has them.

    Raises InvalidImage for another shape, and for numbers that are not finite in float32.
    """
    side = tiling.tile_size
    known = isinstance(pixel_values, np.ndarray) and np.issubdtype(pixel_values.dtype, np.floating)
    if not known or pixel_values.ndim != 4 or pixel_values.shape[1:] != (3, side, side) or not len(pixel_values):
        shape = getattr(pixel_values, "shape", type(pixel_values).__name__)
        raise InvalidImage(field, str(shape), f"a floating-point array (tiles, 3, {side}, {side})")
    with np.errstate(over="ignore"):
        values = np.ascontiguousarray(pixel_values, dtype=np.float32)
    if not np.isfinite(values).all():
        raise InvalidImage(field, "numbers that are not finite", "finite numbers")
    pixels = values.tobytes()
    return Prepared(len(values), pixels, _name("float32", len(values), tiling, pixels), normalised=True)


def _is_pillow(data: object) -> bool:
    if find_spec("PIL") is None:
        return False
    from PIL.Image import Image

    return isinstance(data, Image)


def _name(form: str, tiles: int, tiling: TilingSpec, pixels: bytes) -> str:
    """SHA-256 (hex) of all that decides what the encoder makes of the pixels."""
    found = hashlib.sha256(f"{form} {tiles} {tiling.tile_size} {tiling.mean} {tiling.std}\n".encode())
    found.update(pixels)
    return found.hexdigest()
