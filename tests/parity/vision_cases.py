"""What the tests of images share: prompts with pictures in them, drivers that take these, and transformers' answers."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from headrace.backends.base import BackendOptions
from headrace.backends.torch.backend import TorchBackend
from headrace.core.spec import ModelSpec, TilingSpec, WeightMap
from headrace.core.types import ImageSpan, RowOut
from headrace.models.registry import describe
from headrace.parallel.mesh import Mesh
from headrace.testing.driver import Driver
from headrace.testing.vision_checkpoints import Kind, tiny_vision_model, token_ids
from headrace.weights.checkpoint import open_checkpoint
from headrace.weights.loader import stream

Logits = NDArray[np.float32]

KINDS: tuple[Kind, ...] = ("internvl_300m_hf", "internvl_6b_hf", "internvl_chat", "nvlm", "open_qwen2vl")
TOKENS = 4
"""Rows of a tile."""
VISION_TOLERANCE = 1e-5
SIZES: dict[str, Any] = {
    "dtype": "float32",
    "threads": 1,
    "block_size": 8,
    "num_blocks": 512,
    "max_rows": 12,
    "max_tokens": 1024,
    "max_model_len": 512,
    "image_cache_bytes": 1 << 20,
}
IMAGE_TEXT: Any = {"initializer_range": 0.15}
"""Logits of a few units: a difference of 1e-5 is then a difference of the arithmetic, and no two are nearly tied."""


@dataclass(frozen=True, slots=True)
class Prompt:
    token_ids: tuple[int, ...]
    images: tuple[ImageSpan, ...] = ()


def pad_of(kind: Kind) -> int:
    pads = ("<IMG_CONTEXT>", "<|vision_pad|>", "<|image_pad|>")
    return next(token_id for text, token_id in token_ids(kind).items() if text in pads)


def text(length: int, seed: int = 0) -> list[int]:
    return [int(i) for i in np.random.default_rng([length, seed]).integers(3, 250, length)]


def picture(tiles: int, side: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng([tiles, side, seed]).integers(0, 256, (tiles, side, side, 3), np.uint8)


def image_span(start: int, length: int, pixels: NDArray[Any]) -> ImageSpan:
    data = np.ascontiguousarray(pixels).tobytes()
    normalised = pixels.dtype == np.float32
    name = hashlib.sha256(bytes(normalised) + data).hexdigest()
    return ImageSpan(start, length, name, len(pixels), data, normalised)


def prompt_of(pad: int, pieces: Iterable[Sequence[int] | NDArray[Any]], tags: int = 0) -> Prompt:
    """Text as ids, and pictures as tiles; between two tiles of a picture stand `tags` ids of text."""
    ids: list[int] = []
    images = []
    for piece in pieces:
        if not isinstance(piece, np.ndarray):
            ids += piece
            continue
        start = len(ids)
        for tile in range(len(piece)):
            ids += text(tags, tile) if tile else []
            ids += [pad] * TOKENS
        images.append(image_span(start, len(ids) - start, piece))
    return Prompt(tuple(ids), tuple(images))


class ImageDriver(Driver):
    """Takes prompts with images."""

    def admit_prompt(self, prompt: Prompt, answer: Sequence[int] = (), **more: Any) -> int:
        """`answer`: what was generated before a preemption."""
        row = self.admit((*prompt.token_ids, *answer), num_prompt=len(prompt.token_ids), **more)
        self._admits[-1] = replace(self._admits[-1], images=prompt.images)
        return row

    def logits(self, prompt: Prompt, chunk: int = 1024, **more: Any) -> Logits:
        """Of every position, alone, in a row of its own."""
        row = self.admit_prompt(prompt, **more)
        found = []
        while (left := len(prompt.token_ids) - self.rows[row].computed) > 0:
            out = self.run(self.span(row, min(chunk, left), sample=False, logits=True))[row]
            assert out.error is None, out.error
            found.append(out.logits)
        self.release(row)
        return np.concatenate(found)

    def answer(self, prompt: Prompt, count: int, chunk: int | None = None) -> list[int]:
        """Greedy, alone."""
        row = self.admit_prompt(prompt)
        first = self.prefill(row, len(prompt.token_ids), chunk)
        assert first.error is None, first.error
        tokens = [*first.tokens, *self.decode([row], count - 1)[row]]
        self.release(row)
        return tokens


def as_is(tensors: Any) -> Any:
    return tensors


@dataclass(slots=True)
class Opened:
    """A checkpoint in the torch backend."""

    backend: TorchBackend
    spec: ModelSpec
    driver: ImageDriver

    @property
    def vision(self) -> Any:
        assert self.backend._loaded is not None
        return self.backend._loaded.decoder.vision


def open_vision(
    path: Path,
    kind: Kind,
    *,
    change: Callable[[Any], Any] = as_is,
    change_spec: Callable[[ModelSpec], ModelSpec] = as_is,
    backend: TorchBackend | None = None,
    **options: Any,
) -> Opened:
    source = open_checkpoint(path)
    spec, weight_map = described(source, kind)
    spec = change_spec(spec)
    backend = backend or TorchBackend()
    tensors = change(stream(source, weight_map))
    capacity = backend.load(spec, tensors, BackendOptions(**(SIZES | options)), Mesh())
    return Opened(backend, spec, ImageDriver(backend, capacity))


def described(source: Any, kind: Kind) -> tuple[ModelSpec, WeightMap]:
    found = describe(source.config, source.format, source.shapes(), token_id=token_ids(kind).get)
    return found.spec, found.weight_map


def first_error(outs: Iterable[RowOut]) -> str | None:
    return next((str(out.error) for out in outs if out.error is not None), None)


# ---------------------------------------------------------------- transformers


def pixel_values(pixels: NDArray[Any], tiling: TilingSpec) -> Tensor:
    """(tiles, 3, side, side) float32, normalised as torchvision does."""
    if pixels.dtype == np.float32:
        return torch.from_numpy(pixels)
    scaled = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    return (scaled - torch.tensor(tiling.mean)[:, None, None]) / torch.tensor(tiling.std)[:, None, None]


@dataclass(slots=True)
class VisionReference:
    """The tiny model of a kind in transformers. Pictures are given beside the ids, in order."""

    kind: Kind
    tiling: TilingSpec
    model: Any = field(init=False)

    def __post_init__(self) -> None:
        self.model = tiny_vision_model(self.kind, text=IMAGE_TEXT)

    def features(self, pixels: NDArray[Any]) -> Tensor:
        """(tiles, patches, width) What the tower makes of a picture."""
        values = pixel_values(pixels, self.tiling)
        with torch.inference_mode():
            if self.kind == "open_qwen2vl":
                return self.model.vision(values, output_hidden_states=True).hidden_states[-2]
            return self.model.model.vision_tower(values).last_hidden_state[:, 1:]

    def rows(self, pixels: NDArray[Any]) -> Tensor:
        """(tiles × tokens, hidden size)"""
        with torch.inference_mode():
            if self.kind != "open_qwen2vl":
                values = pixel_values(pixels, self.tiling)
                return self.model.model.get_image_features(values, return_dict=True).pooler_output.flatten(0, 1)
            features = self.features(pixels)
            grid = int(features.shape[1] ** 0.5)
            images = features.transpose(1, 2).unflatten(2, (grid, grid))
            pooled = torch.nn.AdaptiveAvgPool2d(int(TOKENS**0.5))(images)
            hidden = pooled.flatten(2).transpose(1, 2)
            for part in self.model.projector:
                hidden = part(hidden)
            return hidden.flatten(0, 1)

    def logits(self, prompt: Prompt, pictures: Sequence[NDArray[Any]]) -> Logits:
        return self._first(prompt, pictures).logits[0].numpy()

    def greedy(self, prompt: Prompt, pictures: Sequence[NDArray[Any]], count: int) -> list[int]:
        """A placeholder that is generated is an ordinary token."""
        out = self._first(prompt, pictures)
        decoder = self.model.decoder if self.kind == "open_qwen2vl" else self.model
        tokens: list[int] = []
        while len(tokens) < count:
            tokens.append(int(out.logits[0, -1].argmax()))
            with torch.inference_mode():
                out = decoder(input_ids=torch.tensor([tokens[-1:]]), past_key_values=out.past_key_values)
        return tokens

    def _first(self, prompt: Prompt, pictures: Sequence[NDArray[Any]]) -> Any:
        ids = torch.tensor([prompt.token_ids])
        with torch.inference_mode():
            if self.kind != "open_qwen2vl":
                values = torch.cat([pixel_values(one, self.tiling) for one in pictures]) if pictures else None
                return self.model(input_ids=ids, pixel_values=values, use_cache=True)
            hidden = self.model.decoder.get_input_embeddings()(ids)
            for image, pixels in zip(prompt.images, pictures, strict=True):
                places = [i for i in range(image.start, image.start + image.length) if ids[0, i] == pad_of(self.kind)]
                hidden[0, places] = self.rows(pixels)
            return self.model.decoder(inputs_embeds=hidden, use_cache=True)
