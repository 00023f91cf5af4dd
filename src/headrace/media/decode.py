"""A file's bytes to a picture. Pillow opens the format that the header told, and no other.

Nothing is decoded before its size, and the memory that decoding takes, are known from the header and within the limits.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from headrace.core.errors import InvalidImage
from headrace.media.header import FORMATS, Header, orientation, read_header
from headrace.media.limits import MIB, MediaLimits, check_bytes, check_size, require_pillow

if TYPE_CHECKING:
    from PIL.Image import Image

SCALES = (1, 2, 4, 8)
"""A JPEG decoder's own: it computes every n-th pixel on each axis, out of the same coefficients."""
STRIP_ROWS = 64
TURNS: Mapping[int, str] = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}
"""What undoes an EXIF orientation."""


def decode(data: bytes, limits: MediaLimits, field: str = "image") -> NDArray[np.uint8]:
    """(height, width, 3), red green blue: the first frame, turned as EXIF says, over white where it is transparent.

    Raises InvalidImage, which names `field`, for what is no picture of the formats, is damaged or too large."""
    picture, _ = open_picture(data, limits, field)
    return np.array(picture.convert("RGB"))


def open_picture(data: bytes, limits: MediaLimits, field: str = "image") -> tuple[Image, tuple[int, int]]:
    """The picture, grey (L) or RGB, and its true (width, height); where a JPEG file would take too much memory, the
    picture is smaller by a power of two. Otherwise as `decode`."""
    require_pillow()
    check_bytes(len(data), limits, field)
    try:
        header = read_header(data)
    except ValueError as error:
        raise InvalidImage(field, str(error), f"an image file: {FORMATS}") from None
    check_size(header.width, header.height, limits, field)
    scale = _scale(header, limits, field)
    try:
        picture = _turned(_plain(_load(header, scale)), header.orientation)
    except Exception as error:  # Decoders of damaged files raise whatever their parts raise, warnings too.
        what = "ends early" if "truncated" in str(error) else "is damaged"
        raise InvalidImage(field, f"a {header.format} file that {what}", "a file that can be decoded") from error
    size = (header.width, header.height)
    return picture, size if header.orientation < 5 else size[::-1]


def plain_picture(image: Image, limits: MediaLimits, field: str = "image") -> Image:
    """Of a picture that Pillow has open: grey or RGB, turned as its EXIF says, over white. Raises InvalidImage."""
    check_size(image.width, image.height, limits, field)
    if image.mode == "F":
        raise InvalidImage(field, "a picture of floating-point numbers", "8 or 16 bits a colour")
    exif = image.info.get("exif")
    try:
        image.load()
        return _turned(_plain(image), orientation(exif) if isinstance(exif, bytes) else 1)
    except Exception as error:
        raise InvalidImage(field, f"a {image.format or image.mode} image", "a picture that can be decoded") from error


def _scale(header: Header, limits: MediaLimits, field: str) -> int:
    """By how much the decoder must make it smaller to stay within the limit of memory."""
    pixels = header.width * header.height
    # Beside the picture, once it is plain, is the same turned, or what resizing makes of it (a third, as measured).
    each = max(header.pixel_bytes, header.plain_bytes * (2 if header.orientation > 1 else 4 / 3))
    needed = 0.0
    for scale in SCALES if header.format == "JPEG" else (1,):
        needed = header.coefficients + each * -(-pixels // scale**2)
        if needed <= limits.max_decoded:
            return scale
    what = f"a {header.format} file of {header.width} x {header.height} pixels"
    allowed = f"what takes at most {limits.max_decoded // MIB} MiB to decode (this: {needed / MIB:.0f} MiB)"
    raise InvalidImage(field, what, allowed)


def _load(header: Header, scale: int) -> Image:
    # Each plug-in is known to Pillow once it is imported; Image.open would import them all to find WebP's.
    from PIL import GifImagePlugin, Image, JpegImagePlugin, PngImagePlugin, WebPImagePlugin  # noqa: F401

    with Image.open(io.BytesIO(header.file), formats=(header.format,)) as image:
        if image.size != (header.width, header.height):
            raise ValueError("the header names another size than the decoder")
        if scale > 1:
            image.draft(image.mode, (header.width // scale, header.height // scale))
        image.load()
        # Leaves the file, and the decoder's own buffers, behind.
        return image.copy() if header.format == "WEBP" else image


def _plain(image: Image) -> Image:
    """Grey or RGB, over white; of 16 bits the upper 8."""
    from PIL import Image as Pillow

    if image.mode.startswith("I"):
        return _upper_bits(image)
    if image.has_transparency_data:
        colours = image if image.mode == "RGBA" else image.convert("RGBA")
        white = Pillow.new("RGB", image.size, "white")
        white.paste(colours, mask=colours)
        return white
    if image.mode in ("L", "RGB"):
        return image
    return image.convert("L" if image.mode == "1" else "RGB")


def _upper_bits(image: Image) -> Image:
    """Of a grey picture of 16 bits, a strip at a time; its transparent value is white."""
    from PIL import Image as Pillow

    grey = Pillow.new("L", image.size)
    transparent = image.info.get("transparency")
    for top in range(0, image.height, STRIP_ROWS):
        bottom = min(top + STRIP_ROWS, image.height)
        values = np.asarray(image.crop((0, top, image.width, bottom))).clip(0, 0xFFFF)
        upper = (values >> 8).astype(np.uint8)
        if isinstance(transparent, int):
            upper[values == transparent] = 255
        grey.paste(Pillow.fromarray(upper), (0, top))
    return grey


def _turned(image: Image, how: int) -> Image:
    from PIL.Image import Transpose

    return image if how not in TURNS else image.transpose(Transpose[TURNS[how]])
