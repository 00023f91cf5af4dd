"""Tiles, their number and order, what stands for them in the prompt, and their name."""

from __future__ import annotations

import hashlib
import io
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from headrace.core.errors import InvalidImage, InvalidParameter
from headrace.core.spec import ImagePromptSpec, TilingSpec
from headrace.media.limits import MediaLimits, check_count
from headrace.media.prepare import prepare, prepare_values
from headrace.media.prompt import image_text
from headrace.media.tiling import choose_grid, cut
from tests.robustness.media_samples import encoded, exif, noise

NVLM = TilingSpec(448, 1, 6, thumbnail=True)
TWELVE = TilingSpec(448, 1, 12, thumbnail=True)
SMALL = TilingSpec(28, 1, 6, thumbnail=True)
LIMITS = MediaLimits()

GOLDEN = [
    *[((side, side), (1, 1, 1), (1, 1, 1)) for side in (448, 300, 500, 633)],
    *[((side, side), (2, 2, 5), (2, 2, 5)) for side in (634, 640, 896, 900)],
    ((1000, 1000), (2, 2, 5), (3, 3, 10)),
    *[(size, (3, 2, 7), (4, 3, 13)) for size in ((640, 480), (800, 600), (1024, 768), (1600, 1200))],
    ((600, 800), (2, 3, 7), (3, 4, 13)),
    *[(size, (2, 1, 3), (4, 2, 9)) for size in ((1280, 720), (1920, 1080))],
    ((672, 448), (3, 2, 7), (3, 2, 7)),
    ((1344, 448), (3, 1, 4), (3, 1, 4)),
    ((2000, 500), (4, 1, 5), (4, 1, 5)),
    ((500, 2000), (1, 4, 5), (1, 4, 5)),
    ((2480, 3508), (2, 3, 7), (2, 3, 7)),
    ((3000, 450), (6, 1, 7), (7, 1, 8)),
]
"""Width and height; columns, rows and tiles of at most 6 and at most 12 (reference: the table of NVLM's notes)."""


@pytest.mark.parametrize(("size", "six", "twelve"), GOLDEN)
def test_grids_and_tiles_of_known_sizes(size: tuple[int, int], six: Any, twelve: Any) -> None:
    for spec, (columns, rows, tiles) in ((NVLM, six), (TWELVE, twelve)):
        assert choose_grid(*size, spec) == (columns, rows)
        assert len(cut(Image.new("L", size), spec)) == tiles


def test_grids_are_those_of_transformers() -> None:
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

    draw = np.random.default_rng(7)
    for index in range(5000):
        top = (700, 2000, 9000)[index % 3]
        width, height = (int(one) for one in draw.integers(1, top, 2))
        if index % 5 == 0:  # Ties are of simple ratios.
            width, height = (448 // 4 * int(one) for one in draw.integers(1, 30, 2))
        least, most = ((1, 6), (1, 12), (1, 1), (2, 9), (1, 40))[index % 5]
        spec = TilingSpec(448, least, most)
        assert choose_grid(width, height, spec) == get_optimal_tiled_canvas((height, width), (448, 448), least, most)


@given(st.integers(1, 9000), st.integers(1, 9000), st.integers(1, 40))
def test_no_grid_is_nearer(width: int, height: int, most: int) -> None:
    columns, rows = choose_grid(width, height, TilingSpec(448, 1, most))
    assert 1 <= columns * rows <= most
    nearest = min(abs(width / height - i / j) for i in range(1, most + 1) for j in range(1, most // i + 1))
    assert abs(width / height - columns / rows) == nearest


def test_tiles_are_cut_row_by_row_and_the_thumbnail_comes_last() -> None:
    picture = noise("RGB", 620, 415)
    tiles = cut(picture, NVLM)
    assert tiles.shape == (7, 448, 448, 3) and tiles.dtype == np.uint8
    whole = picture.resize((3 * 448, 2 * 448), Image.Resampling.BICUBIC)
    for index in range(6):
        left, top = 448 * (index % 3), 448 * (index // 3)
        assert np.array_equal(tiles[index], np.asarray(whole.crop((left, top, left + 448, top + 448))))
    assert np.array_equal(tiles[6], np.asarray(picture.resize((448, 448), Image.Resampling.BICUBIC)))
    assert np.array_equal(tiles, cut(np.asarray(picture), NVLM))


def test_without_thumbnail_and_of_one_tile() -> None:
    picture = noise("RGB", 640, 480)
    assert len(cut(picture, TilingSpec(448, 1, 6))) == 6
    only = cut(picture, TilingSpec(384, 1, 1, thumbnail=True))
    assert np.array_equal(only[0], np.asarray(picture.resize((384, 384), Image.Resampling.BICUBIC))) and len(only) == 1


def test_the_grid_is_that_of_the_picture_as_it_was_sent() -> None:
    half = noise("RGB", 633, 633)
    assert len(cut(half, TWELVE)) == 1
    assert len(cut(half, TWELVE, (1266, 1266))) == 10


def test_grey_is_cut_as_its_colours_would_be() -> None:
    grey = noise("L", 300, 100)
    assert np.array_equal(cut(grey, SMALL), cut(grey.convert("RGB"), SMALL))


# ---------------------------------------------------------------- in whatever form


def test_bytes_pictures_and_arrays_are_one_image() -> None:
    picture = noise("RGB", 90, 61)
    ways = [prepare(one, SMALL, LIMITS) for one in (encoded(picture, "PNG"), picture, np.asarray(picture))]
    ways += [prepare(bytearray(encoded(picture, "PNG")), SMALL, LIMITS)]  # type: ignore[arg-type]
    assert len(set(ways)) == 1
    assert ways[0].pixels == cut(picture, SMALL).tobytes() and not ways[0].normalised
    assert len(ways[0].pixels) == ways[0].tiles * 28 * 28 * 3


def test_a_picture_of_pillow_is_what_its_file_is() -> None:
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"):
        data = encoded(noise(mode), "PNG", exif=exif(6))
        with Image.open(io.BytesIO(data)) as opened:
            assert prepare(opened, SMALL, LIMITS) == prepare(data, SMALL, LIMITS), mode


def test_the_name_says_all_that_the_encoder_sees() -> None:
    picture = noise("RGB", 90, 61)
    base = prepare(picture, SMALL, LIMITS)
    told = f"uint8 {base.tiles} 28 {SMALL.mean} {SMALL.std}\n".encode()
    assert base.hash == hashlib.sha256(told + base.pixels).hexdigest()
    other = TilingSpec(28, 1, 6, thumbnail=True, mean=(0.5, 0.5, 0.5))
    names = {base.hash, prepare(picture, other, LIMITS).hash, prepare(noise("RGB", 91, 61), SMALL, LIMITS).hash}
    values = np.frombuffer(base.pixels, np.uint8).reshape(-1, 3, 28, 28).astype(np.float32)
    assert len(names | {prepare_values(values, SMALL).hash}) == 4


@pytest.mark.parametrize(
    "data",
    [
        *("a.png", None, 5, [1, 2], np.zeros((4, 4)), np.zeros((4, 4), np.uint8), np.zeros((4, 4, 4), np.uint8)),
        *(np.zeros((0, 4, 3), np.uint8), np.zeros((1, 17_000, 3), np.uint8), b"", Image.new("F", (3, 3))),
        Image.new("RGB", (0, 5)),
    ],
    ids=str,
)
def test_what_is_no_picture_is_refused(data: Any) -> None:
    with pytest.raises(InvalidImage, match=r"^picture: got .*allowed: ") as caught:
        prepare(data, SMALL, LIMITS, "picture")
    assert caught.value.code == "invalid_image" and caught.value.status == 400


def test_normalised_values_are_taken_as_they_are() -> None:
    values = np.linspace(-2, 2, 2 * 3 * 28 * 28).reshape(2, 3, 28, 28)
    done = prepare_values(values, SMALL)
    assert (done.tiles, done.normalised) == (2, True)
    assert np.array_equal(np.frombuffer(done.pixels, np.float32), values.astype(np.float32).ravel())
    turned = np.asfortranarray(values.astype(np.float32))
    assert prepare_values(turned, SMALL) == done == prepare_values(values.astype(np.float32), SMALL)


@pytest.mark.parametrize("shape", [(3, 28, 28), (0, 3, 28, 28), (1, 28, 28, 3), (1, 3, 14, 28), (1, 1, 3, 28, 28)])
def test_values_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InvalidImage, match=r"pixel_values: got .*28, 28"):
        prepare_values(np.zeros(shape, np.float32), SMALL)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e300])
def test_values_that_are_not_finite_are_refused(value: float) -> None:
    values = np.zeros((1, 3, 28, 28))
    values[0, 1, 2, 3] = value
    with pytest.raises(InvalidImage, match="finite"):
        prepare_values(values, SMALL)
    with pytest.raises(InvalidImage, match="pixel_values"):
        prepare_values(np.zeros((1, 3, 28, 28), np.uint8), SMALL)


# ---------------------------------------------------------------- limits


def test_limits_name_what_they_refuse() -> None:
    with pytest.raises(InvalidImage, match=r"^messages: got '33 images', allowed: at most 32$"):
        check_count(33, LIMITS, "messages")
    check_count(32, LIMITS, "messages")
    for wrong in ({"max_bytes": 0}, {"max_pixels": 90_000_000}, {"max_side": 1.5}, {"max_images": True}):
        with pytest.raises(InvalidParameter, match=next(iter(wrong))):
            MediaLimits(**wrong)  # type: ignore[arg-type]


# ---------------------------------------------------------------- the prompt's text


TAGS = ImagePromptSpec("<|vision_pad|>", "<Image>", "</Image>", tile_tags=True)
PADS = "<|vision_pad|>" * 256


def test_nvlm_tags_every_tile() -> None:
    assert image_text(TAGS, 1, 256) == f"<Image><tile_global_thumbnail>{PADS}</Image>"
    assert image_text(TAGS, 3, 256) == f"<Image><tile_1>{PADS}<tile_2>{PADS}<tile_global_thumbnail>{PADS}</Image>"
    seven = image_text(TAGS, 7, 256)
    assert seven.count("<|vision_pad|>") == 1792 and seven.count("<tile_") == 7 and "<tile_6>" in seven


def test_internvl_and_open_qwen2vl_have_placeholders_alone() -> None:
    assert image_text(ImagePromptSpec("<C>", "<img>", "</img>"), 3, 2) == "<img><C><C><C><C><C><C></img>"
    assert image_text(ImagePromptSpec("<p>"), 1, 9) == "<p>" * 9


@settings(max_examples=50)
@given(st.integers(1, 13), st.integers(1, 20), st.booleans())
def test_there_are_as_many_placeholders_as_rows(tiles: int, tokens: int, tags: bool) -> None:
    text = image_text(ImagePromptSpec("<P>", "<a>", "</a>", tile_tags=tags), tiles, tokens)
    assert text.count("<P>") == tiles * tokens
