"""The torch backend's vision side in parts: how patches are merged, what is kept, which places are an image's, and that
the largest model can be built."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from headrace.backends.rows import RequestTable
from headrace.backends.support import refuse_unsupported
from headrace.backends.torch.build import PLAIN, build
from headrace.backends.torch.parameters import Slots
from headrace.backends.torch.vision.cache import EncoderCache
from headrace.backends.torch.vision.encoder import patches
from headrace.backends.torch.vision.projector import average_pool, shuffle_v1, shuffle_v2
from headrace.core.errors import EngineError, UnsupportedModel
from headrace.core.spec import ModelSpec, NormSpec, VisionSpec
from headrace.core.types import Admit, ImageSpan, RowStep, SamplingParams, StepPlan
from headrace.models.registry import Description, describe
from tests.unit.vision_cases import NVLM_D

# ---------------------------------------------------------------- merging


def published_shuffle(x: Tensor, version: str) -> Tensor:
    """By views and permutations, as InternVL writes it; (N, W, H, C)."""
    count, width, height, channels = x.shape
    x = x.view(count, width, height // 2, channels * 2).permute(0, 2, 1, 3).contiguous()
    x = x.view(count, height // 2, width // 2, channels * 4)
    return x if version == "v1" else x.permute(0, 2, 1, 3).contiguous()


@pytest.mark.parametrize(("version", "ours"), [("v1", shuffle_v1), ("v2", shuffle_v2)])
@pytest.mark.parametrize(("grid", "width"), [(2, 1), (4, 3), (6, 5), (32, 8)])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_pixel_shuffle(version: str, ours: Callable[[Tensor], Tensor], grid: int, width: int, count: int) -> None:
    x = torch.randn(count, grid, grid, width)
    for tile, wanted in zip(x, published_shuffle(x, version), strict=True):
        assert torch.equal(ours(tile.flatten(0, 1)), wanted.flatten(0, 1))


def test_pixel_shuffle_by_hand() -> None:
    x = torch.arange(16.0)[:, None]
    assert shuffle_v2(x).tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    assert shuffle_v1(x).tolist() == [[0, 1, 4, 5], [8, 9, 12, 13], [2, 3, 6, 7], [10, 11, 14, 15]]


@pytest.mark.parametrize(("grid", "side"), [(27, 12), (27, 27), (24, 12), (5, 2), (7, 1)])
def test_average_pool(grid: int, side: int) -> None:
    x = torch.randn(grid * grid, 6)
    wanted = torch.nn.AdaptiveAvgPool2d(side)(x.T.reshape(1, 6, grid, grid))[0].flatten(1).T
    found = average_pool(x, side)
    assert torch.equal(found, wanted)
    image = x.view(grid, grid, 6)
    for i, j in ((0, 0), (side - 1, side // 2)):
        rows, columns = (slice(k * grid // side, -(-(k + 1) * grid // side)) for k in (i, j))
        assert torch.allclose(found.view(side, side, 6)[i, j], image[rows, columns].mean((0, 1)), atol=1e-6)


# ---------------------------------------------------------------- patches


@pytest.mark.parametrize(("side", "size"), [(28, 7), (30, 7), (14, 14), (27, 14)])
def test_patches_are_a_convolution(side: int, size: int) -> None:
    """Whose step is its size: what is left over is not seen."""
    pixels, weight = torch.randn(3, side, side), torch.randn(5, 3, size, size)
    wanted = torch.nn.functional.conv2d(pixels[None], weight, stride=size)[0].flatten(1).T
    assert torch.allclose(patches(pixels, size) @ weight.flatten(1).T, wanted, atol=1e-4)


# ---------------------------------------------------------------- the cache


@settings(max_examples=40)
@given(
    st.integers(0, 6),
    st.lists(st.tuples(st.sampled_from("abcdefgh"), st.sets(st.sampled_from("abcdefgh"), max_size=3)), max_size=40),
)
def test_the_cache_is_an_lru_within_its_bound(most: int, asked: list[tuple[str, set[str]]]) -> None:
    """Against a list, for images of one size: latest last; none of those that must be kept goes."""
    cache, latest = EncoderCache(most * 8), list[str]()
    for name, kept in asked:
        assert (name in cache) == (name in latest)
        if cache.get(name) is None:
            cache.put(name, torch.zeros(1, 2))
        latest = [*(one for one in latest if one != name), name]
        cache.trim(kept)
        for one in [one for one in latest if one not in kept]:
            if len(latest) > most:
                latest.remove(one)
        assert cache.nbytes == 8 * len(latest) and {one for one in "abcdefgh" if one in cache} == set(latest)
        assert cache.nbytes <= cache.max_bytes or kept.issuperset(latest)


# ---------------------------------------------------------------- whose places are whose

PAD = 9


def table() -> RequestTable:
    vision = nvlm().vision
    assert vision is not None
    small = replace(vision, image_token_id=PAD, projector=replace(vision.projector, tokens=2))
    return RequestTable(4, 40, 4, 20, 100, small)


def admit(row: int, ids: list[int], *images: ImageSpan, num_prompt: int | None = None) -> Admit:
    prompt = len(ids) if num_prompt is None else num_prompt
    return Admit(row, tuple(ids), prompt, SamplingParams(), images=images)


IDS = [1, PAD, 2, PAD, PAD, 3, 4, PAD, PAD, 5, 6, PAD]
"""Two tiles with a tag between, a picture of one tile; what is not in an image is a token like another."""
FIRST, SECOND = ImageSpan(3, 5, "first", 1), ImageSpan(7, 2, "second", 1)


def test_places_of_an_images_rows() -> None:
    rows = table()
    two = ImageSpan(1, 4, "two", 1)
    with pytest.raises(EngineError, match="row 0 has 3 placeholders for an image of 2 rows"):
        rows.apply(StepPlan(0, (), (admit(0, IDS, two),)))
    first = ImageSpan(3, 2, "first")
    plan = StepPlan(1, (RowStep(0, 0, 4, new_blocks=(1,)),), (admit(0, IDS, first, SECOND), admit(1, [7, 8])))
    rows.apply(plan)
    batch = rows.batch(plan.rows)
    assert [(one.image.hash, one.places.tolist(), one.first) for one in batch.images] == [("first", [3], 0)]
    assert batch.unfinished_images == {"first"}
    steps = (RowStep(1, 0, 2, new_blocks=(4,)), RowStep(0, 4, 4, new_blocks=(2,)))
    rows.apply(StepPlan(2, steps))
    batch = rows.batch(steps)
    assert [(one.image.hash, one.places.tolist(), one.first) for one in batch.images] == [
        ("first", [2], 1),
        ("second", [5], 0),
    ]
    assert batch.unfinished_images == {"second"}
    rows.apply(StepPlan(3, (), release=(0,)))
    assert not rows.unfinished_images()


def test_tags_between_placeholders_have_no_rows() -> None:
    rows = table()
    ids = [PAD, PAD, 3, 4, PAD, PAD, PAD]
    plan = StepPlan(
        0, (RowStep(2, 1, 5, new_blocks=(1, 2)),), (admit(2, ids, ImageSpan(0, 6, "image", 2), num_prompt=6),)
    )
    rows.apply(plan)
    (part,) = rows.batch(plan.rows).images
    assert part.places.tolist() == [0, 3, 4] and part.first == 1, "the prefix cache had the first of four"
    assert not rows.unfinished_images()
    rows.append(2, [PAD])
    later = (RowStep(2, 6, 2, sample=True, drafts=(PAD,)),)
    rows.apply(StepPlan(1, later))
    assert not rows.batch([replace(later[0], drafts=())]).images, "a placeholder that was generated is a token"


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (ImageSpan(7, 2, "x", 2), "2 placeholders for an image of 4 rows"),
        (ImageSpan(5, 2, "x", 0), "0 placeholders for an image of 0 rows"),
        (ImageSpan(-1, 3, "x"), "an image from -1 to 2, not within its prompt"),
        (ImageSpan(3, -1, "x"), "an image from 3 to 2, not within its prompt"),
        (ImageSpan(8, 4, "x"), "an image from 8 to 12, not within its prompt"),
    ],
)
def test_broken_images(image: ImageSpan, message: str) -> None:
    rows = table()
    with pytest.raises(EngineError, match=message):
        rows.apply(StepPlan(0, (), (admit(0, IDS, image, num_prompt=11),)))


def test_images_without_a_model_that_sees() -> None:
    rows = RequestTable(4, 40, 4, 20, 100)
    with pytest.raises(EngineError, match="the model reads none"):
        rows.apply(StepPlan(0, (), (admit(0, IDS, SECOND),)))


# ---------------------------------------------------------------- NVLM-D-72B


def nvlm_description() -> Description:
    shapes = {
        "vision_model.encoder.layers.0.attn.qkv.weight": (3 * 32 * 128, 3200),
        "language_model.lm_head.weight": (152064, 8192),
    }
    return describe(NVLM_D, "hf", shapes, token_id={"<|vision_pad|>": 151654}.get)


def nvlm() -> ModelSpec:
    return nvlm_description().spec


def test_the_full_model_builds_on_the_meta_device() -> None:
    """All names and shapes are those that the weight map makes, and no memory is taken."""
    description = nvlm_description()
    refuse_unsupported(description.spec, "torch")
    slots = Slots(torch.bfloat16, torch.device("meta"))
    parts = build(description.spec, slots, PLAIN, 4, 0)
    assert {name: hole.shape for name, hole in slots.holes.items()} == {
        rule.target: rule.shape for rule in description.weight_map.rules
    }
    assert all(linear.weight.is_meta for linear in slots.linears) and parts.embedding.is_meta
    # 79.380 B with the seven heads of zeros (the published number), which are not loaded.
    dummies = 45 * (4 * 7 * 128 * 3200 + 2 * 7 * 128)
    assert sum(math.prod(hole.shape) for hole in slots.holes.values()) + dummies == 79_379_593_344
    assert parts.vision is not None and not any(name.startswith("vision") for name in parts.places)


# ---------------------------------------------------------------- what is refused


def encoder_with(**values: Any) -> Callable[[VisionSpec], VisionSpec]:
    return lambda vision: replace(vision, encoder=replace(vision.encoder, **values))


def projector_with(**values: Any) -> Callable[[VisionSpec], VisionSpec]:
    return lambda vision: replace(vision, projector=replace(vision.projector, **values))


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (encoder_with(layers=0), "vision.encoder.layers below 1"),
        (encoder_with(activation="swish"), "vision.encoder.activation"),
        (encoder_with(qk_norm=NormSpec("rms", 1e-6, 128)), "vision.encoder.qk_norm by head"),
        (encoder_with(tile_size=434), "vision.encoder.tile_size other than the tiling's"),
        (projector_with(activation="swish"), "vision.projector.activation"),
        (projector_with(tokens=225), "vision.projector.tokens that its merge does not give"),
        (projector_with(tokens=0), "vision.projector.tokens that its merge does not give"),
        (projector_with(merge="average_pool", tokens=143, width=3200), "vision.projector.tokens that its merge"),
        (projector_with(merge="average_pool", tokens=33 * 33, width=3200), "vision.projector.tokens that its merge"),
        (projector_with(merge="average_pool", tokens=144), "vision.projector.width that its merge does not give"),
        (projector_with(width=3200), "vision.projector.width that its merge does not give"),
    ],
)
def test_what_is_not_run_is_refused(change: Callable[[VisionSpec], VisionSpec], field: str) -> None:
    spec = nvlm()
    assert spec.vision is not None
    with pytest.raises(UnsupportedModel, match=f"the torch backend does not run {field}"):
        refuse_unsupported(replace(spec, vision=change(spec.vision)), "torch")


def test_the_native_backend_reads_no_images() -> None:
    with pytest.raises(UnsupportedModel, match="the native backend does not run vision"):
        refuse_unsupported(nvlm(), "native")
    pooled = projector_with(merge="average_pool", tokens=1024, width=3200)
    spec = nvlm()
    assert spec.vision is not None
    refuse_unsupported(replace(spec, vision=pooled(spec.vision)), "torch")
