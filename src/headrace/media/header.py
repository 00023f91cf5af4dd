"""What a file says of its picture before anything of it is decoded, and the file without what makes no pixels.

The formats are told by their first bytes, whatever anybody calls them. Text, colour profiles, previews and further
frames are left out, so that no decoder reads them. Every loop ends: a file has so many parts at most.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from typing import Literal

Format = Literal["JPEG", "PNG", "WEBP", "GIF"]
FORMATS = "JPEG, PNG, WebP or GIF"
MOST_PARTS = 65_536
MOST_SCANS = 100
"""Of a JPEG file: each goes over the whole picture again, however few bytes it has."""

PNG_START = b"\x89PNG\r\n\x1a\n"
PNG_KEPT = frozenset((b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"))
JPEG_FRAMES: frozenset[int] = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
JPEG_ALONE, JPEG_END, JPEG_SCAN, JPEG_EXIF = 0x01, 0xD9, 0xDA, 0xE1
JPEG_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
"""Of a part; the others stand among a scan's own bytes."""
JPEG_LEFT_OUT = frozenset((*range(0xE1, 0xEE), 0xEF, 0xFE))
"""Metadata: all but JFIF's and Adobe's, which say what the colours are."""
WEBP_BYTES = 17
"""Of memory a pixel, as measured: the decoder keeps two canvases, and its picture is copied twice on its way out."""


@dataclass(frozen=True, slots=True)
class Header:
    format: Format
    width: int
    height: int
    """As stored: before it is turned as EXIF says."""
    pixel_bytes: int
    """Bytes a pixel that decoding holds, at most, until it is grey or RGB."""
    plain_bytes: int
    """Bytes a pixel of what comes out: 1 grey, 4 RGB."""
    file: bytes
    """With only what makes the picture."""
    orientation: int = 1
    """EXIF's, 1 to 8."""
    coefficients: int = 0
    """Bytes that a JPEG decoder holds of the whole picture, at whatever size it is decoded."""


def read_header(data: bytes) -> Header:
    """Of a file. Raises ValueError: what it is, where it is none of the formats or its parts do not fit together."""
    try:
        if data.startswith(b"\xff\xd8"):
            return _jpeg(data)
        if data.startswith(PNG_START):
            return _png(data)
        if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
            return _webp(data)
        if data[:6] in (b"GIF87a", b"GIF89a"):
            return _gif(data)
    except (IndexError, struct.error):
        raise ValueError("a file that ends early") from None
    raise ValueError("a file of another format")


def orientation(exif: bytes) -> int:
    """1 to 8, what EXIF data says of how the picture lies; 1 (as it is) where it says nothing that can be read."""
    exif = exif.removeprefix(b"Exif\0\0")
    order = {b"II": "<", b"MM": ">"}.get(exif[:2])
    if order is None:
        return 1
    try:
        (start,) = struct.unpack_from(order + "I", exif, 4)
        (count,) = struct.unpack_from(order + "H", exif, start)
        for at in range(start + 2, start + 2 + 12 * count, 12):
            tag, kind, _, value = struct.unpack_from(order + "HHIH", exif, at)
            if tag == 0x0112:
                return value if kind == 3 and 1 <= value <= 8 else 1
    except struct.error:
        pass
    return 1


def _jpeg(data: bytes) -> Header:
    at = 2
    kept: list[bytes | memoryview] = [data[:2]]
    exif = b""
    frame: tuple[int, bytes] | None = None
    for _ in range(MOST_PARTS):
        while data[at] == 0xFF and data[at + 1] == 0xFF:
            at += 1
        marker = data[at + 1]
        if data[at] != 0xFF or marker in (0x00, 0x01) or 0xD0 <= marker <= 0xD9:
            raise ValueError("a damaged JPEG")
        (length,) = struct.unpack_from(">H", data, at + 2)
        segment = data[at : at + 2 + length]
        if length < 2 or len(segment) < 2 + length:
            raise ValueError("a JPEG that ends early")
        if marker in JPEG_FRAMES:
            if frame is not None:
                raise ValueError("a damaged JPEG")
            frame = (marker, segment[4:])
        if marker == JPEG_SCAN:
            break
        if marker == JPEG_EXIF and segment[4:10] == b"Exif\0\0" and not exif:
            exif = segment[10:]
        if marker not in JPEG_LEFT_OUT:
            kept.append(segment)
        at += 2 + length
    else:
        raise ValueError("a JPEG of too many parts")
    if frame is None:
        raise ValueError("a damaged JPEG")
    kept.append(memoryview(data)[at : _jpeg_end(data, at)])
    return _jpeg_header(*frame, parts_in_scan=data[at + 4], exif=exif, file=b"".join(kept))


def _jpeg_end(data: bytes, at: int) -> int:
    """Where the picture ends whose first scan is at `at`; what phones put behind it is none of it."""
    scans = 0
    for _ in range(MOST_PARTS):
        found = JPEG_MARKER.search(data, at)
        if found is None:
            return len(data)
        marker, at = data[found.start() + 1], found.end()
        if marker == JPEG_END:
            return at
        if marker != JPEG_ALONE:
            scans += marker == JPEG_SCAN
            (length,) = struct.unpack_from(">H", data, at)
            at += max(2, length)
        if scans > MOST_SCANS:
            raise ValueError("a JPEG of too many scans")
    raise ValueError("a JPEG of too many parts")


def _jpeg_header(marker: int, frame: bytes, *, parts_in_scan: int, exif: bytes, file: bytes) -> Header:
    """Of the frame's segment: (precision, height, width, components, (name, sampling, table) of each)."""
    _, height, width, components = struct.unpack_from(">BHHB", frame)
    sampling = [(one >> 4, one & 15) for one in frame[7 : 6 + 3 * components : 3]]
    if components not in (1, 3, 4) or len(sampling) != components or not all(a and b for a, b in sampling):
        raise ValueError("a damaged JPEG")
    progressive = marker in (0xC2, 0xC6, 0xCA, 0xCE)
    coefficients = 0
    if progressive or parts_in_scan < components:
        across, down = max(a for a, _ in sampling), max(b for _, b in sampling)
        columns, rows = -(-width // (8 * across)), -(-height // (8 * down))
        coefficients = sum(columns * a * rows * b * 64 * 2 for a, b in sampling)
    held, plain = {1: (1, 1), 3: (4, 4), 4: (8, 4)}[components]
    return Header("JPEG", width, height, held, plain, file, orientation(exif), coefficients)


def _png(data: bytes) -> Header:
    at = len(PNG_START)
    width, height, depth, colour = struct.unpack_from(">IIBB", data, at + 8)
    if data[at : at + 8] != b"\0\0\0\rIHDR":
        raise ValueError("a damaged PNG")
    kept, exif, transparent = [memoryview(PNG_START)], b"", False
    for _ in range(MOST_PARTS):
        (length,) = struct.unpack_from(">I", data, at)
        kind, end = data[at + 4 : at + 8], at + 12 + length
        if end > len(data):
            raise ValueError("a PNG that ends early")
        if kind == b"tRNS" and colour == 2 and depth == 16:
            # Pillow keeps the upper bits of such colours, and the one that is transparent whole.
            kind = b""
        if kind == b"eXIf":
            exif = data[at + 8 : end - 4]
        transparent = transparent or kind == b"tRNS"
        if kind in PNG_KEPT:
            kept.append(memoryview(data)[at:end])
        at = end
        if kind == b"IEND":
            break
    else:
        raise ValueError("a PNG of too many parts")
    # Grey, RGB, palette, grey with alpha, RGBA: with alpha, the picture is held as RGBA and again over white.
    held = {0: (3, 9), 2: (4, 12), 3: (5, 9), 4: (12, 12), 6: (8, 8)}.get(colour)
    if held is None:
        raise ValueError("a damaged PNG")
    plain = 1 if colour == 0 and not transparent else 4
    return Header("PNG", width, height, held[transparent], plain, b"".join(kept), orientation(exif))


def _webp(data: bytes) -> Header:
    kind, start = data[12:16], 20
    exif = b""
    if kind == b"VP8 ":
        if data[start + 3 : start + 6] != b"\x9d\x01\x2a":
            raise ValueError("a damaged WebP")
        width, height = (one & 0x3FFF for one in struct.unpack_from("<HH", data, start + 6))
    elif kind == b"VP8L":
        signature, packed = struct.unpack_from("<BI", data, start)
        if signature != 0x2F:
            raise ValueError("a damaged WebP")
        width, height = (packed & 0x3FFF) + 1, (packed >> 14 & 0x3FFF) + 1
    elif kind == b"VP8X":
        packed = int.from_bytes(data[start + 4 : start + 10].ljust(6, b"\xff"), "little")
        width, height = (packed & 0xFFFFFF) + 1, (packed >> 24) + 1
        exif = _webp_exif(data)
    else:
        raise ValueError("a damaged WebP")
    return Header("WEBP", width, height, WEBP_BYTES, 4, data, orientation(exif))


def _webp_exif(data: bytes) -> bytes:
    at = 12
    for _ in range(MOST_PARTS):
        if at + 8 > len(data):
            return b""
        (length,) = struct.unpack_from("<I", data, at + 4)
        if data[at : at + 4] == b"EXIF":
            return data[at + 8 : at + 8 + length]
        at += 8 + length + (length & 1)
    raise ValueError("a WebP of too many parts")


def _gif(data: bytes) -> Header:
    """Of the screen, or of what its first frame makes of it."""
    width, height, flags = struct.unpack_from("<HHB", data, 6)
    at = 13 + (3 * 2 ** ((flags & 7) + 1) if flags & 0x80 else 0)
    inside = False
    for _ in range(MOST_PARTS):
        if inside:  # An extension: blocks of up to 255 bytes, then an empty one.
            inside = data[at] > 0
            at += 1 + data[at]
        elif data[at] == 0x2C:
            left, top, across, down = struct.unpack_from("<HHHH", data, at + 1)
            return Header("GIF", max(width, left + across), max(height, top + down), 10, 4, data)
        elif data[at] == 0x21:
            inside, at = True, at + 2
        else:
            raise ValueError("a GIF without a picture")
    raise ValueError("a GIF of too many parts")
