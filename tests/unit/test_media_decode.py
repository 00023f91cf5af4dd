"""Files to pictures: every form, how they lie, what shows through, and what is refused before anything is decoded."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageOps

from headrace.core.errors import ConfigError, InvalidImage
from headrace.media import decode as decode_module
from headrace.media import limits as limits_module
from headrace.media.decode import decode, open_picture
from headrace.media.header import orientation, read_header
from headrace.media.limits import MediaLimits
from tests.robustness import media_fuzz
from tests.robustness.media_samples import (
    canvas,
    chunk,
    chunks_before_end,
    encoded,
    exif,
    mended,
    noise,
    png,
    riff,
    samples,
    sized_jpeg,
)
from tests.robustness.score import Score

LIMITS = MediaLimits()
SAMPLES: Mapping[str, bytes] = samples()


def over_white(rgba: Image.Image) -> NDArray[np.uint8]:
    colours = np.asarray(rgba.convert("RGBA")).astype(np.float64)
    share = colours[..., 3:] / 255
    return np.rint(colours[..., :3] * share + 255 * (1 - share)).astype(np.uint8)


def close(found: NDArray[np.uint8], wanted: NDArray[np.uint8], within: int) -> bool:
    return found.shape == wanted.shape and int(np.abs(found.astype(int) - wanted.astype(int)).max()) <= within


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
def test_png_of_every_mode(mode: str) -> None:
    picture = noise(mode)
    assert close(decode(encoded(picture, "PNG"), LIMITS), over_white(picture), 1)


def test_sixteen_bits_give_their_upper_eight() -> None:
    values = np.arange(0, 65_536, 13, dtype=np.uint16)[:5000].reshape(50, 100)
    data = encoded(Image.fromarray(values), "PNG")
    found = decode(data, LIMITS)
    assert np.array_equal(found, np.repeat((values >> 8).astype(np.uint8)[..., None], 3, axis=2))
    # 1300 is transparent: white, and nothing else is.
    clear = chunks_before_end(data, [(b"tRNS", struct.pack(">H", 1300))])
    assert np.array_equal(np.argwhere((decode(clear, LIMITS) != found).any(axis=2)), [[1, 0]])


@pytest.mark.parametrize("colour", [2, 4, 6])
def test_sixteen_bits_a_colour(colour: int) -> None:
    count = {2: 3, 4: 2, 6: 4}[colour]
    values = np.random.default_rng(3).integers(0, 65_536, (7, 9, count)).astype(">u2")
    if colour in (4, 6):
        values[..., -1] = 65_535
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    clear = chunk(b"tRNS", struct.pack(">HHH", 1, 2, 3)) if colour == 2 else b""
    found = decode(png(9, 7, 16, colour, zlib.compress(rows), clear), LIMITS)
    upper = (values >> 8).astype(np.uint8)
    assert np.array_equal(found, upper[..., :3] if colour != 4 else np.repeat(upper[..., :1], 3, axis=2))


def test_transparent_colours_and_palettes_show_white() -> None:
    picture = Image.new("RGB", (4, 3), (10, 20, 30))
    picture.putpixel((1, 2), (0, 9, 3))
    found = decode(encoded(picture, "PNG", transparency=(0, 9, 3)), LIMITS)
    assert found[2, 1].tolist() == [255, 255, 255] and found[0, 0].tolist() == [10, 20, 30]
    table = noise("P")
    data = encoded(table, "PNG", transparency=bytes(range(0, 160, 10)))
    assert close(decode(data, LIMITS), over_white(Image.open(io.BytesIO(data))), 1)
    flat = Image.new("P", (3, 1), 1)
    flat.putpalette([1, 2, 3, 4, 5, 6])
    flat.putpixel((2, 0), 0)
    assert decode(encoded(flat, "GIF", transparency=0), LIMITS)[0].tolist() == [[4, 5, 6], [4, 5, 6], [255, 255, 255]]


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_jpeg(mode: str) -> None:
    data = encoded(noise(mode), "JPEG", quality=95)
    assert np.array_equal(decode(data, LIMITS), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


def test_webp() -> None:
    clear = noise("RGBA")
    assert close(decode(encoded(clear, "WEBP", lossless=True, exact=True), LIMITS), over_white(clear), 1)
    assert close(decode(encoded(noise("RGB"), "WEBP", quality=100), LIMITS), np.asarray(noise("RGB")), 80)


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG"])
def test_the_first_frame_of_many(form: str) -> None:
    frames = [Image.new("RGB", (20, 10), colour) for colour in ("red", "green", "blue")]
    data = encoded(frames[0], form, save_all=True, append_images=frames[1:], duration=10, lossless=True)
    assert (decode(data, LIMITS) == [255, 0, 0]).all()


@pytest.mark.parametrize(("width", "height"), [(1, 1), (1, 500), (500, 1), (1, 16_384), (2, 3)])
@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF"])
def test_narrow_ones(form: str, width: int, height: int) -> None:
    if form == "WEBP" and height > 16_383:
        return
    assert decode(encoded(Image.new("RGB", (width, height)), form), LIMITS).shape == (height, width, 3)


# ---------------------------------------------------------------- how it lies


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("how", range(1, 9))
def test_exif_turns_it_as_pillow_does(how: int, order: str) -> None:
    picture = noise("RGB", 40, 24)
    for form, options in (("PNG", {}), ("JPEG", {}), ("WEBP", {"lossless": True})):
        data = encoded(picture, form, exif=exif(how, order), **options)
        wanted = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
        assert np.array_equal(decode(data, LIMITS), wanted), form
        assert open_picture(data, LIMITS)[1] == wanted.shape[1::-1]


@given(st.binary(max_size=80), st.sampled_from([b"", b"II*\0\x08\0\0\0", b"MM\0*\0\0\0\x08", b"Exif\0\0MM\0*"]))
def test_exif_that_says_nothing_turns_nothing(more: bytes, start: bytes) -> None:
    assert orientation(start + more) in range(1, 9)
    assert orientation(exif(9)) == orientation(exif(0)) == orientation(b"") == 1


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "0 bytes"),
        (b"x" * 50, "another format"),
        (b"BM" + bytes(60), "another format"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "another format"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "another format"),
        (b"II*\0" + bytes(40), "another format"),
        (b"\xff\xd8", "ends early"),
        (b"\xff\xd8\xff\xe0", "ends early"),
        (b"\x89PNG\r\n\x1a\n", "ends early"),
        (b"GIF89a", "ends early"),
        (b"RIFF\0\0\0\0WEBP", "damaged WebP"),
        (png(0, 5), "0 x 5 pixels"),
        (png(16_385, 5), "16385 x 5 pixels"),
        (png(8001, 8000), "8001 x 8000 pixels"),
        (png(7000, 6000, 8, 6), "7000 x 6000 pixels"),
        (riff((b"VP8X", canvas(2500, 2500))), "2500 x 2500 pixels"),
        (png(4, 4, 8, 2, b"no stream"), "damaged"),
    ],
    ids=lambda one: one if isinstance(one, str) else "",
)
def test_what_is_no_picture_is_refused(data: bytes, said: str) -> None:
    with pytest.raises(InvalidImage, match=rf"^messages: got .*{said}.*, allowed: ") as caught:
        decode(data, LIMITS, "messages")
    assert caught.value.code == "invalid_image"


@pytest.mark.parametrize("name", list(SAMPLES))
def test_a_file_that_ends_early_is_refused(name: str) -> None:
    """But for a last byte or two, which say only that it has ended."""
    data = SAMPLES[name]
    for cut in (len(data) // 4, len(data) // 2, 3 * len(data) // 4):
        if "animated" in name and cut > len(data) // 4:
            continue  # The first frame may be whole.
        with pytest.raises(InvalidImage):
            decode(data[:cut], LIMITS)


def test_sizes_are_refused_before_anything_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_module, "_load", lambda *_: pytest.fail("decoded"))
    for data in (png(60_000, 60_000), sized_jpeg(SAMPLES["jpeg RGB"], 20_000, 9), b"x" * (LIMITS.max_bytes + 1)):
        with pytest.raises(InvalidImage):
            decode(data, LIMITS)


def test_a_header_unlike_its_picture_is_refused() -> None:
    inner = SAMPLES["webp"][12:]
    data = b"RIFF" + struct.pack("<I", 22 + len(inner)) + b"WEBPVP8X" + struct.pack("<I", 10) + canvas(9, 9) + inner
    with pytest.raises(InvalidImage, match="damaged"):
        decode(data, LIMITS)


def test_only_what_makes_the_picture_reaches_a_decoder() -> None:
    """Text, profiles, previews and what phones append are left out; the picture is the same."""
    plain = SAMPLES["jpeg RGB"]
    more = b"\xff\xe2" + struct.pack(">H", 2 + 30) + b"ICC_PROFILE\0".ljust(30, b"x") + b"\xff\xfe\0\x04ab"
    fat = plain[:2] + more + plain[2:] + b"\xff\xd8" + b"\xff\xda" * 500
    assert read_header(fat).file == plain
    assert np.array_equal(decode(fat, LIMITS), decode(plain, LIMITS))
    text = SAMPLES["png text"]
    assert b"zTXt" in text and read_header(text).file == SAMPLES["png RGB"]


def test_the_header_tells_what_decoding_will_hold() -> None:
    held = {"png L": 3, "png LA": 12, "png RGB": 4, "png RGBA": 8, "png P": 5, "png transparent": 12, "jpeg L": 1}
    held |= {"png palette": 9, "jpeg RGB": 4, "jpeg CMYK": 8, "webp": 17, "webp alpha": 17, "gif": 10}
    assert {name: read_header(SAMPLES[name]).pixel_bytes for name in held} == held
    for mode, each in (("RGB", 4 * 4 / 3), ("RGBA", 8)):
        data, needed = encoded(noise(mode, 100, 50), "PNG"), round(each * 5000 + 0.5)
        assert decode(data, MediaLimits(max_decoded=needed)).shape == (50, 100, 3)
        with pytest.raises(InvalidImage, match="takes at most"):
            decode(data, MediaLimits(max_decoded=needed - 10))
    whole = sized_jpeg(SAMPLES["jpeg progressive"], 160, 80)
    assert read_header(whole).coefficients == 160 * 80 * 3 * 2
    frame = SAMPLES["gif"].index(b"\x2c\0\0\0\0")
    larger = SAMPLES["gif"][: frame + 5] + struct.pack("<HH", 300, 200) + SAMPLES["gif"][frame + 9 :]
    assert (read_header(larger).width, read_header(larger).height) == (300, 200)


def test_a_large_jpeg_is_decoded_smaller_within_the_limit() -> None:
    data = encoded(noise("RGB", 400, 300), "JPEG")
    for limit, size in ((700_000, (400, 300)), (300_000, (200, 150)), (50_000, (100, 75)), (12_000, (50, 38))):
        small, true = open_picture(data, MediaLimits(max_decoded=limit))
        assert (small.size, true) == (size, (400, 300))
    with pytest.raises(InvalidImage, match="400 x 300 pixels"):
        decode(data, MediaLimits(max_decoded=5000))
    with pytest.raises(InvalidImage, match="JPEG"):  # The whole picture's coefficients, at whatever size.
        decode(encoded(noise("RGB", 400, 300), "JPEG", progressive=True), MediaLimits(max_decoded=300_000))


def test_scans_are_counted_to_the_end_of_the_picture() -> None:
    steps = SAMPLES["jpeg progressive"]
    last = steps.rindex(b"\xff\xda")
    with pytest.raises(InvalidImage, match="too many scans"):
        decode(steps[:last] + steps[last:-2] * 101 + steps[-2:], LIMITS)
    # A part that holds what looks like an end hides nothing.
    decoy = b"\xff\xfe\0\x04\xff\xd9"
    with pytest.raises(InvalidImage, match="too many scans"):
        decode(steps[:last] + decoy + steps[last:-2] * 101 + steps[-2:], LIMITS)


def test_warnings_of_the_decoder_are_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    def warns(*_: Any) -> None:
        raise Image.DecompressionBombWarning("a bomb")

    monkeypatch.setattr(decode_module, "_load", warns)
    with pytest.raises(InvalidImage, match="PNG file that is damaged"):
        decode(png(4, 4), LIMITS)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(list(SAMPLES)), st.integers(0, 10_000), st.binary(min_size=1, max_size=6), st.booleans())
def test_a_changed_file_gives_a_picture_or_a_refusal(name: str, at: int, change: bytes, mend: bool) -> None:
    data = SAMPLES[name]
    at %= len(data)
    changed = data[:at] + change + data[at + len(change) :]
    try:
        found = decode(mended(changed) if mend else changed, LIMITS)
    except InvalidImage as error:
        assert str(error).startswith("image: got ")
    else:
        assert found.dtype == np.uint8 and found.ndim == 3 and found.shape[2] == 3


def test_many_threads_give_what_one_gives() -> None:
    work = list(SAMPLES.values()) * 4
    alone = [decode(one, LIMITS).tobytes() for one in work]
    with ThreadPoolExecutor(8) as pool:
        assert [one.tobytes() for one in pool.map(lambda one: decode(one, LIMITS), work)] == alone


def test_without_pillow_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits_module, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'headrace\[images\]'"):
        decode(png(4, 4), LIMITS)


def test_a_short_form_of_the_fuzz(capfd: pytest.CaptureFixture[str]) -> None:
    score = Score("media fuzz")
    media_fuzz.attack(score, 150, heavy=False)
    assert score.passed, "\n".join([score.failures, *score.notes, capfd.readouterr().err])
