"""The laws of an image's span (docs/CONTRACTS.md §6), held against a request before any work."""

from __future__ import annotations

from dataclasses import replace

import pytest

from headrace.core import types
from headrace.core.config import EngineConfig, Hardware
from headrace.core.errors import BackendUnavailable, ConfigError, InvalidImage, InvalidParameter
from headrace.core.resolve import check_config, choose_backend
from headrace.core.types import EngineLimits, ImageLimits, ImageSpan, Request
from headrace.core.validate import validate

PAD, TAG, SIDE, TOKENS = 7, 3, 2, 2
LIMITS = EngineLimits(100, 64, images=ImageLimits(PAD, TOKENS, SIDE, most=3))
IDS = (1, PAD, PAD, TAG, PAD, PAD, 2, PAD, PAD, 5, PAD)
"""An image of two tiles with a tag between them, one of a tile, and a placeholder that is an ordinary token."""
HASH = "0123456789abcdef" * 4
TWO = ImageSpan(1, 5, HASH, 2, bytes(2 * SIDE * SIDE * 3))
ONE = ImageSpan(7, 2, HASH, 1, bytes(SIDE * SIDE * 3))


def check(*images: ImageSpan, limits: EngineLimits = LIMITS) -> None:
    validate(Request("r", IDS, images=images), limits)


def test_what_may_run() -> None:
    check()
    check(TWO)
    check(TWO, ONE)
    check(ONE)
    check(replace(ONE, pixels=bytes(4 * SIDE * SIDE * 3), normalised=True))
    check(limits=EngineLimits(100, 64))


@pytest.mark.parametrize(
    ("images", "words"),
    [
        ((ONE, TWO), "images[1].start: got 1, allowed: an integer ≥ 9"),
        ((TWO, TWO), "images[1].start: got 1, allowed: an integer ≥ 6"),
        ((replace(TWO, start=-1),), "images[0].start: got -1, allowed: an integer ≥ 0"),
        ((replace(TWO, start=True),), "images[0].start: got True"),
        ((replace(TWO, length=0),), "images[0].length: got 0, allowed: an integer ≥ 1"),
        ((replace(TWO, tiles=0),), "images[0].tiles: got 0, allowed: an integer ≥ 1"),
        ((replace(ONE, length=5),), "images[0].length: got 5, allowed: up to the prompt's end, 11"),
        ((replace(TWO, tiles=3),), "images[0]: got '4 placeholder tokens', allowed: 6, 2 for each of its 3 tiles"),
        ((replace(TWO, length=4),), "images[0]: got '3 placeholder tokens', allowed: 4"),
        ((replace(TWO, start=0, length=6),), "images[0]: got '0 to 5', allowed: a span from its first placeholder"),
        ((replace(ONE, length=3),), "images[0]: got '7 to 9', allowed: a span from its first placeholder to its last"),
        ((replace(ONE, pixels=b""),), "images[0].pixels: got '0 bytes', allowed: 12 for its tiles"),
        ((replace(ONE, normalised=True),), "images[0].pixels: got '12 bytes', allowed: 48 for its tiles"),
        ((TWO, replace(ONE, hash="")), "images[1].hash: got '', allowed: 64 hexadecimal digits"),
        ((replace(ONE, hash=HASH.upper()),), "images[0].hash"),
    ],
)
def test_spans_that_break_a_law(images: tuple[ImageSpan, ...], words: str) -> None:
    with pytest.raises(InvalidParameter) as caught:
        check(*images)
    assert words in str(caught.value)


def test_too_many_and_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidImage, match="images: got '4 images', allowed: at most 3"):
        check(*[ONE] * 4)
    monkeypatch.setattr("headrace.core.validate.MAX_PIXEL_BYTES", 35)
    with pytest.raises(InvalidImage, match="images: got '36 bytes of pixels', allowed: up to 35 in one request"):
        check(TWO, ONE)
    assert types.MAX_PIXEL_BYTES == 2**27


def test_a_model_that_reads_none() -> None:
    with pytest.raises(InvalidParameter, match="images: got 1, allowed: none, since this model reads no images"):
        check(ONE, limits=EngineLimits(100, 64))


# ---------------------------------------------------------------- settings


def test_models_that_see_run_on_torch() -> None:
    both, native = Hardware(2, 2**30, ("native", "torch")), Hardware(2, 2**30, ("native",))
    assert choose_backend(EngineConfig("m"), both, sees=True) == ("torch", "the one that reads images")
    assert choose_backend(EngineConfig("m"), both)[0] == "native"
    assert choose_backend(EngineConfig("m", backend="torch"), both, sees=True) == ("torch", "")
    with pytest.raises(BackendUnavailable, match=r"reads images, which needs the backend torch: pip install"):
        choose_backend(EngineConfig("m"), native, sees=True)
    with pytest.raises(BackendUnavailable, match="torch is not installed"):
        choose_backend(EngineConfig("m", backend="torch"), native, sees=True)
    with pytest.raises(ConfigError, match="backend: got 'native', allowed for a model that reads images: auto, torch"):
        choose_backend(EngineConfig("m", backend="native"), both, sees=True)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_images", 0),
        ("max_images", 1025),
        ("max_image_mib", True),
        ("max_image_mib", 0),
        ("allow_image_urls", "yes"),
        ("image_folder", None),
        ("image_folder", "a\0b"),
        ("prompt_form", "other"),
    ],
)
def test_settings_out_of_range(field: str, value: object) -> None:
    with pytest.raises(InvalidParameter, match=f"^{field}: got .*, allowed: "):
        check_config(EngineConfig("m", **{field: value}))  # type: ignore[arg-type]
