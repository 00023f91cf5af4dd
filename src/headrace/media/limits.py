"""What a picture may cost, checked before it is decoded; and whether there is anything to decode it with."""

from __future__ import annotations

from dataclasses import dataclass, fields
from importlib.util import find_spec

from headrace.core.errors import ConfigError, InvalidImage, InvalidParameter

MIB = 2**20
MOST_PIXELS = 89_000_000
"""Above, Pillow itself takes a picture for a bomb."""


@dataclass(frozen=True, slots=True)
class MediaLimits:
    """Bounds of one picture and of how many a request has."""

    max_bytes: int = 20 * MIB
    """Of the file, as it is sent."""
    max_pixels: int = 64_000_000
    """Width times height, as the file's header has them."""
    max_side: int = 16_384
    """Pixels: a picture that is narrow and endless grows when it is resized."""
    max_decoded: int = 96 * MIB
    """Bytes that decoding may hold at once, worked out from the header. Of JPEG files that need more, a half, a quarter
    or an eighth of the size is decoded; others are refused."""
    max_images: int = 32
    """Of one request."""

    def __post_init__(self) -> None:
        for one in fields(self):
            value = getattr(self, one.name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InvalidParameter(one.name, value, "integers from 1")
        if self.max_pixels > MOST_PIXELS:
            raise InvalidParameter("max_pixels", self.max_pixels, f"at most {MOST_PIXELS}")


def check_count(count: int, limits: MediaLimits, field: str) -> None:
    """Raises InvalidImage where a request has more pictures than are allowed."""
    if count > limits.max_images:
        raise InvalidImage(field, f"{count} images", f"at most {limits.max_images}")


def check_bytes(count: int, limits: MediaLimits, field: str) -> None:
    """Raises InvalidImage where a file is empty or too large."""
    if not 1 <= count <= limits.max_bytes:
        raise InvalidImage(field, f"{count} bytes", f"1 to {limits.max_bytes} bytes")


def check_size(width: int, height: int, limits: MediaLimits, field: str) -> None:
    """Raises InvalidImage where a picture is empty or too large."""
    sides = 1 <= width <= limits.max_side and 1 <= height <= limits.max_side
    if not sides or width * height > limits.max_pixels:
        allowed = f"1 to {limits.max_side} pixels on a side, {limits.max_pixels} in all"
        raise InvalidImage(field, f"{width} x {height} pixels", allowed)


def require_pillow() -> None:
    """Raises ConfigError where Pillow is not installed."""
    if find_spec("PIL") is None:
        raise ConfigError("images need Pillow, which is not installed: pip install 'headrace[images]'")
