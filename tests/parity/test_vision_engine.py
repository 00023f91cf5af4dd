"""Images through the engine and its scheduler, and what becomes of rows whose images are bad."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from headrace.backends import ranges
from headrace.core.errors import EngineError, UnsupportedModel, WeightsMismatch
from headrace.core.types import (
    Capacity,
    EngineLimits,
    ErrorEvent,
    FinishEvent,
    ImageLimits,
    ImageSpan,
    Request,
    SamplingParams,
    TokenEvent,
)
from headrace.engine.client import InProcessClient
from headrace.engine.core import EngineCore
from headrace.sched.policy import parse_policy
from headrace.sched.prefix import PrefixCache
from headrace.sched.scheduler import Scheduler
from headrace.testing.vision_checkpoints import Kind, tiny_vision_checkpoint
from headrace.weights.lora import Adapter, LowRank
from headrace.weights.qtensor import QTensor
from tests.parity.vision_cases import (
    IMAGE_TEXT,
    SIZES,
    TOKENS,
    Opened,
    Prompt,
    image_span,
    open_vision,
    pad_of,
    picture,
    prompt_of,
    text,
)

KIND: Kind = "nvlm"
PAD = pad_of(KIND)
SIDE = 28
LONGEST = 128
GREEDY = SamplingParams(max_tokens=16, ignore_eos=True)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_vision_checkpoint(tmp_path_factory.mktemp("model"), KIND, text=IMAGE_TEXT)


@pytest.fixture
def opened(path: Path) -> Iterator[Opened]:
    model = open_vision(path, KIND)
    yield model
    model.backend.close()


@cache
def prompts() -> tuple[Prompt, ...]:
    """Text, and pictures of 1, 3 and 7 tiles; the last two begin alike, up to a tile that differs."""
    seven = picture(7, SIDE)
    other = seven.copy()
    other[2] = other[0]
    return tuple(
        prompt_of(PAD, pieces, tags=2)
        for pieces in (
            [text(21)],
            [picture(1, SIDE), text(9)],
            [text(6), picture(3, SIDE), text(5), picture(1, SIDE), text(4)],
            [text(17), seven, text(3)],
            [text(17), other, text(3)],
        )
    )


def engine(model: Opened, *, blocks: int = 512, max_tokens: int = 1024, prefix_cache: bool = False) -> EngineCore:
    capacity = Capacity(blocks, SIZES["block_size"], SIZES["max_rows"], max_tokens)
    cache_ = PrefixCache(blocks, capacity.block_size, "tiny", prefix_cache)
    scheduler = Scheduler(capacity, LONGEST, frozenset(), parse_policy("fused"), cache_)
    limits = EngineLimits(model.spec.vocab_size, LONGEST, images=ImageLimits(PAD, TOKENS, SIDE, most=8))
    return EngineCore(model.backend, scheduler, limits)


def answers(core: EngineCore, asked: tuple[Prompt, ...]) -> tuple[list[list[int] | str], list[int]]:
    """Each prompt's tokens or its error's code, and how many of its tokens came out of the prefix cache."""
    client = InProcessClient(core)
    for index, prompt in enumerate(asked):
        client.submit(Request(str(index), prompt.token_ids, GREEDY, prompt.images))
    tokens: list[list[int] | str] = [[] for _ in asked]
    cached = [0] * len(asked)
    while events := client.poll():
        for event in events:
            index = int(event.request_id)
            found = tokens[index]
            if isinstance(event, TokenEvent):
                assert isinstance(found, list)
                found += event.token_ids
            elif isinstance(event, ErrorEvent):
                tokens[index] = event.code
            elif isinstance(event, FinishEvent):
                cached[index] = event.cached_tokens
    return tokens, cached


@pytest.fixture(scope="module")
def wanted(path: Path) -> list[list[int]]:
    """Each alone."""
    model = open_vision(path, KIND)
    found = [model.driver.answer(prompt, 16) for prompt in prompts()]
    model.backend.close()
    return found


@pytest.mark.parametrize("max_tokens", [1024, 24])
@pytest.mark.parametrize("image_cache_bytes", [0, 1 << 20])
def test_every_way_gives_the_same_tokens(
    path: Path, wanted: list[list[int]], max_tokens: int, image_cache_bytes: int
) -> None:
    """A batch of them, twice over: the second time out of the prefix cache, which tells pictures apart that differ in
    the third of seven tiles; then with so few blocks that rows are preempted."""
    model = open_vision(path, KIND, image_cache_bytes=image_cache_bytes)
    core = engine(model, max_tokens=max_tokens, prefix_cache=True)
    assert wanted[3] != wanted[4]
    found, _ = answers(core, prompts())
    assert found == wanted
    found, cached = answers(core, prompts())
    assert found == wanted and all(count > 0 for count in cached[1:])
    scarce = engine(model, blocks=17, max_tokens=max_tokens)
    found, _ = answers(scarce, prompts())
    assert found == wanted and scarce.stats.preemptions > 0
    model.backend.close()


# ---------------------------------------------------------------- the cache


def test_an_image_is_encoded_once(opened: Opened) -> None:
    driver, encoded = opened.driver, counting(opened)
    first = prompt_of(PAD, [text(4), picture(3, SIDE), text(3)])
    second = prompt_of(PAD, [picture(3, SIDE), picture(2, SIDE), picture(3, SIDE), text(3)])
    rows = [driver.admit_prompt(one) for one in (first, second)]
    outs = driver.run(*(driver.span(row, len(one.token_ids)) for row, one in zip(rows, (first, second), strict=True)))
    assert all(out.error is None for out in outs.values()) and sorted(encoded) == [2, 3]
    driver.answer(first, 2, chunk=3)
    assert sorted(encoded) == [2, 3]
    opened.backend.reset()
    assert opened.vision.cache.nbytes == 5 * TOKENS * opened.spec.hidden_size * 4


def test_images_behind_a_prefix_are_not_encoded(opened: Opened) -> None:
    driver, encoded = opened.driver, counting(opened)
    prompt = prompt_of(PAD, [picture(4, SIDE), text(5)])  # two blocks, and some text
    driver.answer(prompt, 1)
    opened.vision.cache.max_bytes = 0
    opened.vision.cache.trim(())
    row = driver.admit_prompt(prompt)
    driver.prefill(row, 16)
    hit = driver.admit_prompt(prompt, shared=driver.rows[row].blocks[:2])
    encoded.clear()
    driver.run(driver.span(hit, 5))
    assert not encoded


def test_a_row_within_an_image_keeps_it(path: Path) -> None:
    """Though nothing may be kept: until the row is through, or gone."""
    model = open_vision(path, KIND, image_cache_bytes=0)
    driver, encoded, cache_ = model.driver, counting(model), model.vision.cache
    prompt = prompt_of(PAD, [text(2), picture(3, SIDE), text(4)])
    row = driver.admit_prompt(prompt)
    driver.run(driver.span(row, 2, sample=False))
    assert not cache_.nbytes and not encoded
    for size, kept in ((1, True), (6, True), (4, True), (1, False)):
        other = prompt_of(PAD, [picture(2, SIDE, size), text(1)])
        beside = driver.admit_prompt(other)
        driver.run(driver.span(row, size, sample=False), driver.span(beside, 9))
        driver.release(beside)
        assert (cache_.nbytes > 0) == kept
    assert sorted(encoded) == [2, 2, 2, 2, 3]
    again = driver.admit_prompt(prompt)
    driver.run(driver.span(again, 5, sample=False))
    assert cache_.nbytes
    driver.release(again)
    driver.run(driver.span(row, 4))
    assert not cache_.nbytes
    model.backend.close()


def counting(model: Opened) -> list[int]:
    """Tiles of each image that is encoded from now on."""
    encoded: list[int] = []
    encode = model.vision.encode

    def counted(image: ImageSpan) -> Any:
        encoded.append(image.tiles)
        return encode(image)

    model.vision.encode = counted
    return encoded


# ---------------------------------------------------------------- what goes wrong


def test_a_bad_image_costs_one_row(opened: Opened) -> None:
    """Too few pixels, and pixels that are no numbers: the others' bits are as if these had not been there."""
    driver = opened.driver
    good = prompts()[1:3]
    alone = [driver.logits(prompt) for prompt in good]
    short = prompt_of(PAD, [text(2), picture(2, SIDE, 7), text(3)])
    image = short.images[0]
    name = hashlib.sha256(b"short").hexdigest()
    short = Prompt(short.token_ids, (replace(image, pixels=image.pixels[:-1], hash=name),))
    values = np.random.default_rng(0).normal(0, 1, (1, 3, SIDE, SIDE)).astype(np.float32)
    values[0, 1, 3, 4] = np.nan
    sick = prompt_of(PAD, [text(2), values, text(3)])
    for _ in range(2):
        rows = [driver.admit_prompt(one) for one in (short, good[0], sick, good[1])]
        lengths = [len(one.token_ids) for one in (short, good[0], sick, good[1])]
        outs = driver.run(*(driver.span(row, size, logits=True) for row, size in zip(rows, lengths, strict=True)))
        errors = [outs[row].error for row in rows]
        assert errors[0] is not None and "bytes of pixels, 2 tiles have 4704" in errors[0].message
        assert errors[2] is not None and errors[2].code == "nan_logits"
        for row, wanted in zip((rows[1], rows[3]), alone, strict=True):
            assert outs[row].error is None and np.array_equal(outs[row].logits, wanted)
        for row in rows:
            driver.release(row)


def test_hashes_that_lie_about_the_size_cost_one_row(opened: Opened) -> None:
    driver = opened.driver
    honest = prompt_of(PAD, [picture(1, SIDE), text(3)])
    driver.answer(honest, 1)
    liar = prompt_of(PAD, [picture(2, SIDE), text(3)])
    liar = Prompt(liar.token_ids, (replace(liar.images[0], hash=honest.images[0].hash),))
    row = driver.admit_prompt(liar)
    out = driver.run(driver.span(row, len(liar.token_ids)))[row]
    assert out.error is not None and "has 4 rows, the prompt has places for more" in out.error.message


def test_a_model_that_reads_no_images_is_told(path: Path) -> None:
    def blind(spec: Any) -> Any:
        return replace(spec, vision=None)

    def text_only(tensors: Any) -> Any:
        return ((name, one) for name, one in tensors if not name.startswith(("vision.", "projector.")))

    with pytest.raises(WeightsMismatch, match=r"tensor '(vision|projector)\..*' is not part of the model"):
        open_vision(path, KIND, change_spec=blind)
    with pytest.raises(WeightsMismatch, match=r"did not come, the first is projector\.down\.weight"):
        open_vision(path, KIND, change=text_only)
    model = open_vision(path, KIND, change=text_only, change_spec=blind)
    model.driver.admit_prompt(prompts()[1])
    with pytest.raises(EngineError, match="admitted with an image, and the model reads none"):
        model.driver.submit()
    assert "mages" not in model.backend.explain() and model.backend.memory()["encoder_cache"] == 0
    model.backend.close()


def test_adapters_are_for_the_decoder(opened: Opened) -> None:
    matrix = QTensor.from_array(np.ones((40, 1), np.float32))
    low = LowRank(QTensor.from_array(np.ones((1, 40), np.float32)), matrix, 1.0)
    with pytest.raises(UnsupportedModel, match=r"'vision\.layers\.0\.attn\.o' is no linear layer"):
        opened.backend.load_adapter(Adapter("a", {"vision.layers.0.attn.o": low}))


# ---------------------------------------------------------------- what it says of itself


def test_explain_memory_and_ranges(opened: Opened) -> None:
    backend, driver = opened.backend, opened.driver
    assert "tile by tile through 3 blocks of width 40, shuffle_v2" in backend.explain()
    assert backend.memory()["encoder_cache"] == 1 << 20
    prompt = prompts()[2]
    backend.profile(True)
    driver.answer(prompt, 3)
    backend.profile(False)
    assert [one.name for one in backend.take_ranges()].count(ranges.VISION) == 1, "of three steps one meets images"


def test_pixels_may_be_normalised_already(opened: Opened) -> None:
    """The same picture either way: rows that differ by a rounding at most."""
    assert opened.spec.vision is not None
    tiling, pixels = opened.spec.vision.tiling, picture(2, SIDE)
    values = (pixels.astype(np.float32) / 255 - np.float32(tiling.mean)) / np.float32(tiling.std)
    given = np.ascontiguousarray(values.transpose(0, 3, 1, 2).astype(np.float32))
    ours, theirs = (opened.vision.encode(image_span(0, 8, one)) for one in (pixels, given))
    assert np.abs((ours - theirs).numpy()).max() < 1e-5
