"""Small pictures in every form that is taken, and files that are meant to cost their decoder dear."""

from __future__ import annotations

import io
import random
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

PNG_START = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class Bomb:
    what: str
    data: bytes
    refused: bool
    """Must be; the others may also be decoded, at no more cost."""


def encoded(image: Image.Image, form: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def noise(mode: str, width: int = 61, height: int = 37, seed: int = 0) -> Image.Image:
    """A picture of soft colours with some noise, in a mode of Pillow's."""
    rows, columns = np.mgrid[:height, :width]
    colours = np.stack([rows * 5, columns * 3, rows + columns, 255 - rows * 4], axis=-1)
    colours = colours + np.random.default_rng(seed).integers(0, 40, (height, width, 4))
    rgba = Image.fromarray((colours % 256).astype(np.uint8))
    if mode == "I;16":
        return Image.fromarray((colours[..., 0] * 200 % 65_536).astype(np.uint16))
    return rgba.convert("RGB").quantize(16) if mode == "P" else rgba.convert(mode)


def exif(orientation: int, order: str = "<") -> bytes:
    """With nothing but how the picture lies."""
    start = b"II*\0" if order == "<" else b"MM\0*"
    return b"Exif\0\0" + start + struct.pack(order + "IHHHIHHI", 8, 1, 0x0112, 3, 1, orientation, 0, 0)


def samples() -> Mapping[str, bytes]:
    """By name: good files, each in another form."""
    frames = [noise("P", seed=seed) for seed in range(3)]
    colours = [noise("RGBA", seed=seed) for seed in range(3)]
    found = {f"jpeg {mode}": encoded(noise(mode), "JPEG") for mode in ("L", "RGB", "CMYK")}
    found |= {f"jpeg {one}": encoded(noise("RGB"), "JPEG", exif=exif(one)) for one in (3, 6, 8)}
    found["jpeg progressive"] = encoded(noise("RGB"), "JPEG", progressive=True, subsampling=0)
    found["jpeg restarts"] = encoded(noise("RGB"), "JPEG", restart_marker_blocks=2, optimize=True)
    found |= {f"png {mode}": encoded(noise(mode), "PNG") for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")}
    found["png transparent"] = encoded(noise("RGB"), "PNG", transparency=(0, 9, 3))
    found["png palette"] = encoded(noise("P"), "PNG", transparency=bytes(range(0, 160, 10)))
    found["png exif"] = encoded(noise("RGB"), "PNG", exif=exif(5, ">"))
    found["png animated"] = encoded(colours[0], "PNG", save_all=True, append_images=colours[1:])
    found["png text"] = chunks_before_end(
        found["png RGB"], [(b"tEXt", b"a\0b"), (b"zTXt", b"a\0\0" + zlib.compress(b"c"))]
    )
    found["webp"] = encoded(noise("RGB"), "WEBP")
    found["webp alpha"] = encoded(noise("RGBA"), "WEBP", exif=exif(6))
    found["webp lossless"] = encoded(noise("RGBA"), "WEBP", lossless=True)
    found["webp animated"] = encoded(colours[0], "WEBP", save_all=True, append_images=colours[1:])
    found["gif"] = encoded(frames[0], "GIF")
    found["gif transparent"] = encoded(frames[0], "GIF", transparency=3, interlace=True, comment=b"x" * 300)
    found["gif animated"] = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    return found


# ---------------------------------------------------------------- changes


def mutated(draw: random.Random, data: bytes, others: list[bytes]) -> bytes:
    """One to four changes: bits, bytes, numbers, cuts, repetitions, parts of others. Checksums of PNG often fit."""
    out = bytearray(data)
    for _ in range(draw.choice((1, 1, 1, 2, 3, 4))):
        if not out:
            break
        at = draw.choice((draw.randrange(len(out)), draw.randrange(min(len(out), 80))))
        more = draw.randint(1, 64)
        changes: tuple[Callable[[], None], ...] = (
            lambda at=at: out.__setitem__(at, out[at] ^ 1 << draw.randrange(8)),  # type: ignore[misc]
            lambda at=at: out.__setitem__(at, draw.choice((0, 1, 0x7F, 0x80, 0xFF, draw.randrange(256)))),  # type: ignore[misc]
            lambda at=at: out.__setitem__(
                slice(at, at + 2), draw.choice((b"\0\0", b"\xff\xff", b"\0\x01", b"\x7f\xff"))
            ),  # type: ignore[misc]
            lambda at=at: out.__setitem__(
                slice(at, at + 4), draw.choice((b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff"))
            ),  # type: ignore[misc]
            lambda at=at: out.__delitem__(slice(at, None)),  # type: ignore[misc]
            lambda at=at, more=more: out.__delitem__(slice(at, at + more)),  # type: ignore[misc]
            lambda at=at, more=more: out.__setitem__(slice(at, at), bytes(out[at : at + more]) * draw.randint(1, 50)),  # type: ignore[misc]
            lambda at=at, more=more: out.__setitem__(slice(at, at), draw.randbytes(more)),  # type: ignore[misc]
            lambda at=at: out.__setitem__(slice(at, None), draw.choice(others)[at:]),  # type: ignore[misc]
        )
        draw.choice(changes)()
    return mended(bytes(out)) if draw.random() < 0.7 else bytes(out)


def mended(data: bytes) -> bytes:
    """A PNG with checksums that fit, as far as its chunks can be told; other files as they are."""
    if not data.startswith(PNG_START):
        return data
    out, at = bytearray(data), 8
    while at + 12 <= len(out):
        (length,) = struct.unpack_from(">I", out, at)
        if at + 12 + length > len(out):
            break
        struct.pack_into(">I", out, at + 8 + length, zlib.crc32(out[at + 4 : at + 8 + length]))
        at += 12 + length
    return bytes(out)


# ---------------------------------------------------------------- bombs


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def chunks_before_end(png: bytes, more: list[tuple[bytes, bytes]]) -> bytes:
    """Chunks put in after the header."""
    return png[:33] + b"".join(chunk(*one) for one in more) + png[33:]


def png(width: int, height: int, depth: int = 8, colour: int = 2, body: bytes = b"", *before: bytes) -> bytes:
    """Of that size, as its header has it, with a stream of a few bytes or the one given."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = body or zlib.compress(bytes(1000))
    return PNG_START + chunk(b"IHDR", header) + b"".join(before) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def zeros(count: int) -> bytes:
    """A zlib stream of so many zeros."""
    stream = zlib.compressobj(1)
    piece = bytes(2**20)
    parts = [stream.compress(piece[: min(2**20, count - at)]) for at in range(0, count, 2**20)]
    return b"".join(parts) + stream.flush()


def sized_jpeg(data: bytes, width: int, height: int) -> bytes:
    """A JPEG file whose header has another size."""
    at = next(i for i in range(len(data)) if data[i : i + 2] in (b"\xff\xc0", b"\xff\xc2"))
    return data[: at + 5] + struct.pack(">HH", height, width) + data[at + 9 :]


def riff(*parts: tuple[bytes, bytes]) -> bytes:
    body = b"WEBP" + b"".join(kind + struct.pack("<I", len(one)) + one + b"\0" * (len(one) & 1) for kind, one in parts)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def canvas(width: int, height: int, flags: int = 0) -> bytes:
    return bytes([flags, 0, 0, 0]) + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")


def bombs(heavy: bool = True) -> Iterator[Bomb]:
    """`heavy`: with those that are as large as they say, which take seconds to make."""
    sizes = (65_535, 65_535), (2**31 - 1, 2**31 - 1), (16_385, 16), (1, 2**31 - 1), (2**31 - 1, 1), (16_384, 16_384)
    for width, height in (*sizes, (100_000, 1), (0, 0), (0, 10), (2**32 - 1, 1), (8001, 8000)):
        yield Bomb(f"png of {width} x {height}", png(width, height), True)
    for depth, colour in ((8, 6), (16, 6), (16, 2), (16, 4), (8, 2)):
        yield Bomb(f"png of type {colour}, {depth} bits", png(7000, 7000, depth, colour), True)
    yield Bomb("png with unknown colours", png(50, 50, 8, 5), True)
    good = samples()
    start, flood = good["png RGB"], zeros(200 << 20)
    yield Bomb("png: text", chunks_before_end(start, [(b"zTXt", b"a\0\0" + flood)]), False)
    yield Bomb("png: texts", chunks_before_end(start, [(b"iTXt", b"a\0\1\0\0\0" + flood)] * 3), False)
    yield Bomb("png: colours", chunks_before_end(start, [(b"iCCP", b"a\0\0" + flood)]), False)
    yield Bomb("png: 100,000 texts", chunks_before_end(start, [(b"tEXt", b"a\0b")] * 100_000), True)
    yield Bomb("png: empty parts", chunks_before_end(start, [(b"IDAT", b"")] * 100_000), True)
    looped = b"MM\0*" + struct.pack(">IH", 8, 65_535) + b"\x01" * 700_000
    yield Bomb("png: endless exif", chunks_before_end(start, [(b"eXIf", looped)]), False)
    frame = struct.pack(">IIIIIHHBB", 0, 2**31 - 1, 2**31 - 1, 0, 0, 1, 1, 0, 0)
    yield Bomb(
        "png: frames", chunks_before_end(start, [(b"acTL", struct.pack(">II", 2**31 - 1, 0)), (b"fcTL", frame)]), False
    )
    yield Bomb("png: a stream beyond the picture", png(50, 50, 8, 2, flood), False)
    yield from _jpegs(good)
    yield from _webps(good)
    yield from _gifs(good)
    yield Bomb("nothing", b"", True)
    yield Bomb("too many bytes", start + bytes(20 << 20), True)
    if heavy:
        yield from _heavy()


def _jpegs(good: Mapping[str, bytes]) -> Iterator[Bomb]:
    for name, width, height in (
        ("RGB", 65_500, 65_500),
        ("RGB", 65_535, 1),
        ("L", 8001, 8000),
        ("RGB", 0, 9),
        ("RGB", 9, 0),
    ):
        yield Bomb(f"jpeg {name} of {width} x {height}", sized_jpeg(good[f"jpeg {name}"], width, height), True)
    steps = good["jpeg progressive"]
    yield Bomb("jpeg: coefficients of a large picture", sized_jpeg(steps, 8000, 8000), True)
    last = steps.rindex(b"\xff\xda")
    yield Bomb("jpeg: 10,000 scans", steps[:last] + steps[last:-2] * 10_000 + steps[-2:], True)
    plain = good["jpeg RGB"]
    yield Bomb("jpeg: a million parts", plain[:2] + b"\xff\xfe\0\x02" * 1_000_000 + plain[2:], True)
    yield Bomb(
        "jpeg: much beside the picture", plain[:2] + (b"\xff\xe1\xff\xff" + b"x" * 65_533) * 200 + plain[2:], False
    )
    yield Bomb("jpeg: endless fill", plain[:2] + b"\xff" * (5 << 20), True)
    again = b"Exif\0\0MM\0*" + struct.pack(">IHHHII", 8, 60_000, 0x8769, 4, 1, 8)
    looped = plain[:2] + b"\xff\xe1" + struct.pack(">H", 2 + len(again)) + again + plain[2:]
    yield Bomb("jpeg: exif that names itself", looped, False)
    at = plain.index(b"\xff\xc0")
    yield Bomb("jpeg: two frames", plain[:at] + plain[at : at + 19] + sized_jpeg(plain, 8000, 8000)[at:], True)


def _webps(good: Mapping[str, bytes]) -> Iterator[Bomb]:
    for width, height in ((16_384, 16_384), (2**24, 2**24), (2**24, 1), (4000, 4000)):
        yield Bomb(f"webp of {width} x {height}", riff((b"VP8X", canvas(width, height))), True)
    packed = struct.pack("<BI", 0x2F, 16_383 | 16_383 << 14)
    yield Bomb("webp, lossless, 16384 x 16384", riff((b"VP8L", packed + bytes(100))), True)
    yield Bomb("webp, lossy, 16383 x 16383", riff((b"VP8 ", b"\0\0\0\x9d\x01\x2a\xff\x3f\xff\x3f" + bytes(100))), True)
    inner = good["webp"][12:]
    yield Bomb("webp: a canvas unlike its frame", b"RIFF" + struct.pack("<I", 22 + len(inner)) + b"WEBPVP8X"
               + struct.pack("<I", 10) + canvas(9, 9) + inner, True)  # fmt: skip
    yield Bomb("webp: a million parts", riff((b"VP8X", canvas(9, 9, 8)), *[(b"JUNK", b"")] * 1_000_000), True)


def _gifs(good: Mapping[str, bytes]) -> Iterator[Bomb]:
    data = good["gif"]
    yield Bomb("gif of 65535 x 65535", data[:6] + b"\xff" * 4 + data[10:], True)
    at = data.index(b"\x2c\0\0\0\0")
    yield Bomb("gif: a frame larger than its screen", data[: at + 5] + b"\xff" * 4 + data[at + 9 :], True)
    yield Bomb("gif: 20,000 frames", data[:-1] + data[at:-1] * 20_000 + b";", False)
    comment = b"\x21\xfe" + b"\x01x" * 1_000_000 + b"\0"
    yield Bomb("gif: a million parts", data[:at] + comment + data[at:], True)
    yield Bomb("gif of no size", data[:6] + bytes(4) + data[10 : at + 5] + bytes(4) + data[at + 9 :], True)


def _heavy() -> Iterator[Bomb]:
    wide = Image.linear_gradient("L").resize((8000, 8000))
    yield Bomb("jpeg, 64 million pixels", encoded(wide.convert("RGB"), "JPEG"), False)
    yield Bomb("jpeg, 64 million pixels, to turn", encoded(wide.convert("CMYK"), "JPEG", exif=exif(6)), False)
    yield Bomb(
        "jpeg, 24 million pixels in steps",
        encoded(wide.convert("RGB").crop((0, 0, 6000, 4000)), "JPEG", progressive=True),
        False,
    )
    yield Bomb("png, 64 million grey pixels", encoded(wide, "PNG", compress_level=1), False)
    yield Bomb(
        "png, 19 million pixels", encoded(wide.convert("RGB").crop((0, 0, 4340, 4340)), "PNG", compress_level=1), False
    )
    yield Bomb("png, a strip", encoded(wide.resize((1150, 16_384)).convert("RGB"), "PNG", compress_level=1), False)
    yield Bomb(
        "png, 12 million pixels over white", encoded(wide.convert("RGBA").crop((0, 0, 4096, 3000)), "PNG"), False
    )
    yield Bomb("png, 16 bits", encoded(Image.fromarray(np.zeros((5800, 5800), np.uint16)), "PNG"), False)
    yield Bomb("png, 1 bit of 256 million pixels", png(16_000, 16_000, 1, 0, zeros(16_000 * 2001)), True)
    yield Bomb(
        "webp, 5.8 million pixels",
        encoded(wide.resize((2400, 2430)).convert("RGBA"), "WEBP", lossless=True, method=0),
        False,
    )
    yield Bomb("gif, 10 million pixels", encoded(wide.resize((3170, 3170)).convert("P"), "GIF", transparency=3), False)
