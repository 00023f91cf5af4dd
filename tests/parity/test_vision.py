"""Images through the torch backend: transformers' features, rows, logits and tokens, whatever the step looks like."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import InternVLVisionConfig
from transformers.models.internvl.modeling_internvl import InternVLVisionEmbeddings

from headrace.backends.torch.parameters import Slots
from headrace.backends.torch.vision.encoder import Encoder, resized
from headrace.core.spec import ModelSpec
from headrace.testing.vision_checkpoints import Kind, tiny_vision_checkpoint
from headrace.weights.qtensor import QTensor
from tests.parity.vision_cases import (
    IMAGE_TEXT,
    KINDS,
    TOKENS,
    VISION_TOLERANCE,
    ImageDriver,
    Opened,
    Prompt,
    VisionReference,
    image_span,
    open_vision,
    pad_of,
    picture,
    prompt_of,
    text,
)

Folder = Callable[[Kind], Path]
Pixels = NDArray[Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    @cache
    def make(kind: Kind) -> Path:
        return tiny_vision_checkpoint(tmp_path_factory.mktemp(kind), kind, text=IMAGE_TEXT)

    return make


@pytest.fixture(scope="module")
def opened(folder: Folder) -> Callable[[Kind], Opened]:
    """Each kind once: what tests leave in it is what a running engine leaves."""
    return cache(lambda kind: open_vision(folder(kind), kind))


@pytest.fixture(scope="module")
def reference() -> Callable[[Opened, Kind], VisionReference]:
    @cache
    def make(kind: Kind, tiling: Any) -> VisionReference:
        return VisionReference(kind, tiling)

    def find(model: Opened, kind: Kind) -> VisionReference:
        assert model.spec.vision is not None
        return make(kind, model.spec.vision.tiling)

    return find


def side_of(model: Opened) -> int:
    assert model.spec.vision is not None
    return model.spec.vision.tiling.tile_size


def mixed_prompts(kind: Kind, side: int) -> list[tuple[Prompt, list[Pixels]]]:
    """Text alone; one tile; three tiles with tags between; seven; two pictures, the first of them seen before."""
    pad = pad_of(kind)
    one, three, seven = (picture(tiles, side) for tiles in (1, 3, 7))
    made: list[tuple[list[Any], int]] = [
        ([text(19)], 0),
        ([one, text(11)], 0),
        ([text(9), three, text(5)], 3),
        ([text(3), seven, text(8)], 2),
        ([text(4), one, text(6), three], 1),
    ]
    return [
        (prompt_of(pad, pieces, tags), [piece for piece in pieces if isinstance(piece, np.ndarray)])
        for pieces, tags in made
    ]


def apart(found: Any, wanted: Any) -> float:
    assert found.shape == wanted.shape
    return float(np.abs(np.asarray(found) - np.asarray(wanted)).max())


# ---------------------------------------------------------------- transformers' numbers


@pytest.mark.parametrize("kind", KINDS)
def test_features_and_rows(kind: Kind, opened: Any, reference: Any) -> None:
    model: Opened = opened(kind)
    theirs: VisionReference = reference(model, kind)
    pixels = picture(3, side_of(model))
    normalised = np.random.default_rng(1).normal(0, 1, (2, 3, side_of(model), side_of(model))).astype(np.float32)
    for given in (pixels, normalised):
        span = image_span(0, 1, given)
        assert apart(model.vision.encode(span), theirs.rows(given)) < VISION_TOLERANCE
    with torch.inference_mode():
        for tile, wanted in zip(normalised, theirs.features(normalised), strict=True):
            assert apart(model.vision.encoder(torch.from_numpy(tile)), wanted) < VISION_TOLERANCE


@pytest.mark.parametrize("kind", KINDS)
def test_spliced_logits(kind: Kind, opened: Any, reference: Any) -> None:
    model: Opened = opened(kind)
    theirs: VisionReference = reference(model, kind)
    for prompt, pictures in mixed_prompts(kind, side_of(model)):
        assert apart(model.driver.logits(prompt), theirs.logits(prompt, pictures)) < VISION_TOLERANCE


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_tokens(kind: Kind, opened: Any, reference: Any, folder: Folder) -> None:
    """32 of each prompt: alone, in chunks, all in one batch, again out of the cache, without one, and preempted."""
    model: Opened = opened(kind)
    theirs: VisionReference = reference(model, kind)
    cases = mixed_prompts(kind, side_of(model))
    wanted = [theirs.greedy(prompt, pictures, 32) for prompt, pictures in cases]
    prompts = [prompt for prompt, _ in cases]
    driver = model.driver
    assert [driver.answer(prompt, 32) for prompt in prompts] == wanted
    assert [driver.answer(prompt, 32, chunk=5) for prompt in prompts] == wanted
    assert in_one_batch(driver, prompts, 7) == wanted
    uncached = open_vision(folder(kind), kind, image_cache_bytes=0)
    assert in_one_batch(uncached.driver, prompts, 3) == wanted
    assert not uncached.vision.cache.nbytes
    assert in_one_batch(uncached.driver, prompts, 1024, preempt=True) == wanted
    uncached.backend.close()


def in_one_batch(driver: ImageDriver, prompts: Sequence[Prompt], chunk: int, preempt: bool = False) -> list[list[int]]:
    """32 tokens of each, all prompts side by side in chunks; `preempt`: rows leave after 9 tokens and come back."""
    answers: list[list[int]] = [[] for _ in prompts]
    rows = [driver.admit_prompt(prompt) for prompt in prompts]
    lengths = [len(prompt.token_ids) for prompt in prompts]
    while min(map(len, answers)) < 32:
        steps = []
        for i, row in enumerate(rows):
            left = lengths[i] - driver.rows[row].computed
            size = min(chunk, left) if left > 0 else 1
            steps.append(driver.span(row, size, sample=left <= size))
        outs = driver.run(*steps)
        for i, row in enumerate(rows):
            assert outs[row].error is None, outs[row].error
            answers[i] += outs[row].tokens
        if preempt and min(map(len, answers)) == 9:
            preempt = False
            for row in rows:
                driver.release(row)
            rows = [driver.admit_prompt(one, answer) for one, answer in zip(prompts, answers, strict=True)]
            lengths = [len(one.token_ids) + len(answer) for one, answer in zip(prompts, answers, strict=True)]
    for row in rows:
        driver.release(row)
    return [answer[:32] for answer in answers]


@pytest.mark.parametrize("kind", ["internvl_300m_hf", "open_qwen2vl"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision(kind: Kind, dtype: str, folder: Folder, opened: Any) -> None:
    """A tower that rounds strays a little; one that had lost its pixels would stray as far as the rows are long."""
    exact: Opened = opened(kind)
    model = open_vision(folder(kind), kind, dtype=dtype)
    span = image_span(0, 1, picture(2, side_of(model)))
    found, wanted = model.vision.encode(span), exact.vision.encode(span)
    assert found.dtype == getattr(torch, dtype)
    assert 0 < (found.float() - wanted).abs().mean() < 0.05 * wanted.std()
    model.backend.close()


def test_stored_positions_are_resized(opened: Any) -> None:
    """For tiles of another size than the tower was trained on."""
    theirs = InternVLVisionEmbeddings(
        InternVLVisionConfig(hidden_size=12, num_attention_heads=2, image_size=28, patch_size=7)
    )
    theirs.position_embeddings.data.normal_()
    theirs.cls_token.data.normal_()
    spec = opened("nvlm").spec.vision.encoder
    slots = Slots(torch.float32)
    encoder = Encoder(replace(spec, tile_size=42, patch_size=7, stored_grid=4, hidden_size=12, layers=0), slots)
    tensors = {
        "vision.patch.weight": theirs.patch_embeddings.projection.weight.flatten(1),
        "vision.patch.bias": theirs.patch_embeddings.projection.bias,
        "vision.class_token": theirs.cls_token.flatten(),
        "vision.positions": theirs.position_embeddings[0],
    }
    slots.fill((name, QTensor.from_array(one.detach().numpy())) for name, one in tensors.items())
    encoder.finish()
    pixels = torch.randn(3, 42, 42)
    with torch.inference_mode():
        assert apart(encoder(pixels), theirs(pixels[None])[0, 1:]) < VISION_TOLERANCE
    positions = torch.randn(16, 3)
    assert torch.allclose(resized(positions, 4, 4), positions, atol=1e-6)


# ---------------------------------------------------------------- the same bits


@pytest.mark.parametrize(
    ("kind", "dtype", "threads"),
    [("nvlm", "float32", 1), ("internvl_300m_hf", "float32", 2), ("open_qwen2vl", "bfloat16", 1)],
)
def test_bits_depend_on_the_row_alone(kind: Kind, dtype: str, threads: int, folder: Folder) -> None:
    """Logits of a prompt with two pictures: whole, in chunks that end within them, in company that has the same and
    other pictures, out of the cache and without one."""
    model = open_vision(folder(kind), kind, dtype=dtype, threads=threads, image_cache_bytes=3000)
    driver, pad, side = model.driver, pad_of(kind), side_of(model)
    mine = prompt_of(pad, [text(5), picture(3, side), text(4), picture(2, side), text(7)], tags=2)
    others = [
        prompt_of(pad, [text(2), picture(2, side), text(3)]),
        prompt_of(pad, [text(9)]),
        prompt_of(pad, [picture(5, side, 9), text(3)]),
        prompt_of(pad, [picture(3, side), picture(1, side), text(2)], tags=1),
    ]
    alone = driver.logits(mine)
    for chunk in (9, 7, 1) if threads == 1 else (9,):  # two threads wait for one another on a busy machine
        assert np.array_equal(driver.logits(mine, chunk), alone)
    for chunk in (11, 64) if threads == 1 else (64,):
        rows = [driver.admit_prompt(other) for other in others[:2]]
        row = driver.admit_prompt(mine)
        rows += [driver.admit_prompt(other) for other in others[2:]]
        found = []
        while (left := len(mine.token_ids) - driver.rows[row].computed) > 0:
            steps = [driver.span(row, min(chunk, left), sample=False, logits=True)]
            for other, its in zip(rows, others, strict=True):
                rest = len(its.token_ids) - driver.rows[other].computed
                steps.append(driver.span(other, min(6, rest) if rest > 0 else 1, sample=rest <= 6))
            outs = driver.run(*steps)
            assert all(out.error is None for out in outs.values())
            found.append(outs[row].logits)
        assert np.array_equal(np.concatenate(found), alone)
        for gone in (row, *rows):
            driver.release(gone)
    model.backend.close()


def test_a_prefix_hit_may_begin_inside_an_image(opened: Any) -> None:
    model: Opened = opened("nvlm")
    driver, side = model.driver, side_of(model)
    size = driver.capacity.block_size
    prompt = prompt_of(pad_of("nvlm"), [text(3), picture(3, side, 5), text(6)], tags=3)
    alone = driver.logits(prompt)
    row = driver.admit_prompt(prompt)
    driver.prefill(row, len(prompt.token_ids))
    blocks = driver.rows[row].blocks
    for shared in (1, 2, 3):
        hit = driver.admit_prompt(prompt, shared=blocks[:shared])
        assert driver.rows[hit].computed == shared * size
        out = driver.run(driver.span(hit, len(prompt.token_ids) - shared * size, logits=True))[hit]
        assert out.error is None and np.array_equal(out.logits, alone[shared * size :])
        driver.rows[hit].blocks = driver.rows[hit].blocks[shared:]
        driver.release(hit)
    driver.release(row)


# ---------------------------------------------------------------- what an image's rows are not


def test_the_embedding_scale_does_not_touch_images(folder: Folder, opened: Any) -> None:
    """A model whose embedding is scaled by 2 gives what one gives whose table is twice as large: the rows of images are
    those of both."""

    def scaled(spec: ModelSpec) -> ModelSpec:
        return replace(spec, embedding=replace(spec.embedding, scale=2.0))

    def doubled(tensors: Any) -> Any:
        for name, tensor in tensors:
            if name == "embed.weight":
                tensor = type(tensor).from_array(2 * tensor.dequantise())
            yield name, tensor

    kind: Kind = "internvl_300m_hf"
    prompt = prompt_of(pad_of(kind), [text(4), picture(2, side_of(opened(kind))), text(4)])
    first = open_vision(folder(kind), kind, change_spec=scaled)
    second = open_vision(folder(kind), kind, change=doubled)
    assert np.array_equal(first.driver.logits(prompt), second.driver.logits(prompt))
    first.backend.close()
    second.backend.close()


def test_a_placeholder_outside_an_image_is_a_token(opened: Any) -> None:
    model: Opened = opened("nvlm")
    pad = pad_of("nvlm")
    typed = [*text(3), pad, *text(2)]
    plain = model.driver.logits(Prompt(tuple(typed)))
    beside = prompt_of(pad, [typed, picture(1, side_of(model)), [pad]])
    assert np.array_equal(model.driver.logits(beside)[: len(typed)], plain)


# ---------------------------------------------------------------- dummy heads


def test_dummy_heads_change_nothing(folder: Folder, tmp_path: Path) -> None:
    """NVLM-D's tower is stored with heads of zeros behind the real ones. What is in those of q and k is of no matter,
    and without them the bits are the same."""
    from safetensors.numpy import load_file, save_file

    tensors = load_file(folder("nvlm") / "model.safetensors")
    real, stored, heads = 40, 56, 7
    assert tensors["vision_model.encoder.layers.0.attn.qkv.weight"].shape == (3 * stored, real)
    other, cut = dict(tensors), dict(tensors)
    random = np.random.default_rng(3)
    for name, tensor in tensors.items():
        if ".attn.qkv." in name:
            parts = tensor.reshape(3, stored, -1)
            other[name] = parts.copy()
            other[name][:2, real:] = random.normal(0, 9, parts[:2, real:].shape)
            other[name][2, real:] = 0.0
            other[name] = other[name].reshape(tensor.shape)
            cut[name] = np.ascontiguousarray(parts[:, :real]).reshape(3 * real, *tensor.shape[1:])
        elif name.endswith(("q_norm.weight", "k_norm.weight")):
            cut[name] = np.ascontiguousarray(tensor[:real])
        elif name.endswith("attn.proj.weight"):
            cut[name] = np.ascontiguousarray(tensor[:, :real])
    assert heads * 8 == stored
    found = []
    for index, changed in enumerate((tensors, other, cut)):
        path = tmp_path / str(index)
        path.mkdir()
        save_file(changed, path / "model.safetensors")
        (path / "config.json").write_bytes((folder("nvlm") / "config.json").read_bytes())
        model = open_vision(path, "nvlm")
        found.append(model.vision.encode(image_span(0, TOKENS, picture(2, side_of(model)))))
        model.backend.close()
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
