"""Images in prompts (docs/CONTRACTS.md §6): messages or a text with pictures -> token ids, and where each image lies.

The text of a prompt is made whole, then tokenised whole (BPE merges across the borders of tags), then the places of its
images are found in the ids. A template sees a mark for each picture, which what the model reads there then replaces.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, TypeGuard, cast

from headrace.core.config import EngineConfig
from headrace.core.errors import (
    CheckpointError,
    ContextLengthExceeded,
    InvalidImage,
    InvalidParameter,
    TemplateError,
    UnsupportedParameter,
    shorten,
)
from headrace.core.spec import VisionSpec
from headrace.core.types import MAX_PIXEL_BYTES, ImageLimits, ImageSpan

if TYPE_CHECKING:
    from headrace.media.limits import MediaLimits
    from headrace.media.prepare import Prepared

IMAGE_MARK = "<image>"
"""Where an image goes in a text prompt."""
MIB = 2**20
_URL, _OBJECT = "image_url", "image"
"""Types of parts: an image by its address, and one that the caller holds."""
_MAX_DEPTH = 64
_BAR = "\uf8fe"
"""A private character around the marks that a template sees."""


@dataclass(frozen=True, slots=True)
class _Frames:
    """How the models of an architecture are told a conversation."""

    forms: tuple[str, ...]
    """Of `text.chat.FRAMES`; the first where nothing says another."""
    system: str


_NVLM_SYSTEM = "Follow the user's instruction and answer questions."
_INTERNVL_SYSTEM = (
    "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, 是一个有用无害的人工智能助手。"
)
_FRAMES: Mapping[str, _Frames] = {
    "NVLM_D": _Frames(("chatml", "mpt"), _NVLM_SYSTEM),
    "InternVLChatModel": _Frames(("chatml", "mpt"), _INTERNVL_SYSTEM),
    "InternVLForConditionalGeneration": _Frames(("chatml", "mpt"), _INTERNVL_SYSTEM),
    "OpenQwen2VL": _Frames(("train", "cli", "raw"), "You are a helpful assistant."),
}
_MPT_TEMPLATE = "Hermes-2"
"""What InternVL2's configs call the form without newlines."""


def choose_frame(config: Mapping[str, object], form: str) -> tuple[str | None, bool]:
    """(a chat template's source, whether it replaces the checkpoint's own) for a config.json and what
    `EngineConfig.prompt_form` says. Raises InvalidParameter, CheckpointError."""
    architectures = config.get("architectures")
    name = architectures[0] if isinstance(architectures, list) and architectures else None
    frames = _FRAMES.get(name) if isinstance(name, str) else None
    if form != "auto":
        allowed = ("auto", *frames.forms) if frames else ("auto",)
        if form not in allowed:
            raise InvalidParameter("prompt_form", form, f"{', '.join(allowed)} for this model")
    if frames is None:
        return None, False
    from headrace.text.chat import frame

    said = config.get("prompt_form")
    if form == "auto" and said is not None:
        if said not in frames.forms:
            raise CheckpointError(
                f"config.json: prompt_form is {shorten(said)}, allowed: {', '.join(frames.forms)} for this model"
            )
        form = str(said)
    wins = form != "auto"
    if not wins:
        form = "mpt" if config.get("template") == _MPT_TEMPLATE and "mpt" in frames.forms else frames.forms[0]
    return frame(form, frames.system), wins


@dataclass(frozen=True, slots=True)
class Encoded:
    """A prompt as the engine takes it."""

    token_ids: tuple[int, ...]
    images: tuple[ImageSpan, ...] = ()


@dataclass(frozen=True, slots=True)
class ImagePrompt:
    """A text with pictures, or token ids that hold their placeholders already.

    Each `mark` of a text is the place of one picture, in order; a text without any gets them all first, each followed
    by a newline.
    """

    prompt: str | Sequence[int]
    images: Sequence[object]
    """Each: the bytes of a file, a PIL image, a uint8 array (height, width, 3), a pathlib.Path, a URL as image_url has
    it, or what `media.prepare` made."""
    names: Sequence[str] = ()
    """What errors call each; without: images[0], images[1] …"""
    mark: str = IMAGE_MARK
    field: str = "prompt"
    """What errors call the text."""
    add_special_tokens: bool = True
    """Whether the tokenizer puts its own tokens around the text; what a template has made has them."""


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture as it was given, and what errors call it."""

    source: object
    field: str


@dataclass(frozen=True, slots=True)
class Marked:
    """Messages whose pictures are marks in their text."""

    messages: list[Mapping[str, object]]
    pictures: list[Picture]
    nonce: str = field(default_factory=lambda: str(secrets.randbits(64)))
    """In every mark, so that nobody can type one."""

    def mark(self, index: int) -> str:
        return f"{_BAR}{self.nonce}:{index}{_BAR}"

    def fill(self, text: str, shown: Sequence[str]) -> tuple[str, list[int]]:
        """`text` with each mark replaced, and the pictures in the order in which it has them (a template may put one
        message before another). Raises TemplateError unless each is there once."""
        pieces = re.split(f"{_BAR}{self.nonce}:([0-9]+){_BAR}", text)
        order = [int(index) for index in pieces[1::2]]
        if sorted(order) != list(range(len(shown))):
            raise TemplateError("the chat template does not show each image once")
        pieces[1::2] = [shown[index] for index in order]
        return "".join(pieces), order


def is_message_list(prompt: object) -> TypeGuard[Sequence[Mapping[str, object]]]:
    return isinstance(prompt, Sequence) and bool(prompt) and all(isinstance(part, Mapping) for part in prompt)


def image_parts(messages: object) -> Iterator[str]:
    """The field of each image part, such as messages[0].content[1]. What is no message is left for others to refuse."""
    for place, message in enumerate(messages if isinstance(messages, list | tuple) else ()):
        content = message.get("content") if isinstance(message, Mapping) else None
        for index, part in enumerate(content if isinstance(content, list | tuple) else ()):
            if isinstance(part, Mapping) and part.get("type") in (_URL, _OBJECT):
                yield f"messages[{place}].content[{index}]"


def refuse_images(messages: object) -> None:
    """For a model that reads none. Raises UnsupportedParameter naming the first image part."""
    for where in image_parts(messages):
        raise UnsupportedParameter(f"{where}.type", "an image", "text, since this model reads no images")


class ImageReader:
    """Reads the pictures of one model's prompts. Thread-safe."""

    def __init__(self, vision: VisionSpec, config: EngineConfig, max_model_len: int) -> None:
        """Raises InvalidParameter if the folder for images is none."""
        if config.image_folder and not Path(config.image_folder).is_dir():
            raise InvalidParameter("image_folder", config.image_folder, "a folder that exists")
        self._vision = vision
        self._config = config
        self._max_model_len = max_model_len
        tokens, side = vision.projector.tokens, vision.tiling.tile_size
        self.limits = ImageLimits(vision.image_token_id, tokens, side, config.max_images)

    @cached_property
    def _media(self) -> MediaLimits:
        from headrace.media.limits import MediaLimits

        return MediaLimits(max_bytes=self._config.max_image_mib * MIB, max_images=self._config.max_images)

    # ------------------------------------------------------------ prompts

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, object]],
        render: Callable[[Sequence[Mapping[str, object]]], str],
        encode: Callable[[str, bool], Sequence[int]],
    ) -> Encoded:
        """Of messages with image parts. `render`: the chat template; `encode`: text and whether special tokens are
        added -> ids. Raises RequestError."""
        marked = self._mark(messages)
        images = self.prepare(marked.pictures)
        text, order = marked.fill(render(marked.messages), [self.text_of(image) for image in images])
        return self._place(encode(text, False), [images[index] for index in order], "messages")

    def encode_prompt(self, prompt: ImagePrompt, encode: Callable[[str, bool], Sequence[int]]) -> Encoded:
        """`encode`: as in `encode_chat`. Raises RequestError."""
        if not isinstance(prompt.images, list | tuple):
            raise InvalidParameter("images", type(prompt.images).__name__, "a list of images")
        names = [*prompt.names, *(f"images[{index}]" for index in range(len(prompt.names), len(prompt.images)))]
        pictures = [Picture(image, name) for image, name in zip(prompt.images, names, strict=False)]
        if not isinstance(prompt.prompt, Sequence):
            raise InvalidParameter("prompt", prompt.prompt, "text or a list of token ids, beside images")
        if not isinstance(prompt.prompt, str):
            return self._place(prompt.prompt, self.prepare(pictures), "prompt_token_ids")
        texts = self._around(prompt, len(pictures))
        if not pictures:
            return Encoded(tuple(encode(prompt.prompt, prompt.add_special_tokens)))
        images = self.prepare(pictures)
        shown = [self.text_of(image) for image in images]
        text = "".join(part for pair in zip(texts, [*shown, ""], strict=True) for part in pair)
        return self._place(encode(text, prompt.add_special_tokens), images, prompt.field)

    def _around(self, prompt: ImagePrompt, count: int) -> list[str]:
        """The texts before, between and behind the images."""
        assert isinstance(prompt.prompt, str)
        if count:
            self._refuse_typed(prompt.prompt, prompt.field)
        texts = prompt.prompt.split(prompt.mark)
        if len(texts) == 1 and count:
            return ["", *["\n"] * (count - 1), "\n" + prompt.prompt]
        if len(texts) != count + 1:
            allowed = f"{len(texts) - 1}, one for each {prompt.mark} of the prompt"
            raise InvalidParameter("images", f"{count} images", allowed)
        return texts

    # ------------------------------------------------------------ messages

    def _mark(self, messages: Sequence[Mapping[str, object]]) -> Marked:
        """Messages with marks in their images' places; a message's parts become one text, joined with newlines.

        Raises InvalidParameter for a part that is none, and for a placeholder that somebody typed.
        """
        marked = Marked([], [])
        for place, message in enumerate(messages):
            if any(image_parts([message])):
                content = message["content"]
                assert isinstance(content, list | tuple)
                texts = [self._part(part, f"messages[{place}].content[{i}]", marked) for i, part in enumerate(content)]
                message = {**message, "content": "\n".join(texts)}
            marked.messages.append(message)
        self._refuse_typed(list(messages), "messages")
        return marked

    def _part(self, part: object, where: str, marked: Marked) -> str:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if not isinstance(part, Mapping) or kind not in ("text", _URL, _OBJECT):
            raise InvalidParameter(f"{where}.type", kind, f"text, {_URL} or {_OBJECT}")
        value = part.get(str(kind))
        if kind == "text":
            if not isinstance(value, str):
                raise InvalidParameter(f"{where}.text", value, "a string")
            return value
        where = f"{where}.{kind}"
        if kind == _URL:
            if isinstance(value, Mapping):
                value, where = value.get("url"), f"{where}.url"
            if not isinstance(value, str):
                raise InvalidParameter(where, value, "a URL: data:, or http:, https: and file: where they are allowed")
        elif isinstance(value, str):
            raise InvalidParameter(where, value, "bytes, a PIL image, an array or a Path; a URL is for image_url")
        marked.pictures.append(Picture(value, where))
        return marked.mark(len(marked.pictures) - 1)

    def _refuse_typed(self, value: object, where: str, depth: int = 0) -> None:
        """Raises InvalidParameter if a text in `value` spells the placeholder: it would take an image's row."""
        if depth > _MAX_DEPTH:
            return  # no template is given what is as deep as that
        if isinstance(value, str):
            if self._vision.prompt.pad in value:
                at = value.index(self._vision.prompt.pad)
                raise InvalidParameter(where, value[at:], f"text without {self._vision.prompt.pad}, beside images")
        elif isinstance(value, Mapping):
            for name, item in value.items():
                self._refuse_typed(name, where, depth + 1)
                if not (value.get("type") in (_URL, _OBJECT) and name in (_URL, _OBJECT)):
                    self._refuse_typed(item, f"{where}.{name}", depth + 1)
        elif isinstance(value, list | tuple):
            for index, item in enumerate(value):
                self._refuse_typed(item, f"{where}[{index}]", depth + 1)

    # ------------------------------------------------------------ pictures

    def prepare(self, pictures: Sequence[Picture]) -> list[Prepared]:
        """Each picture as tiles. Raises InvalidImage, InvalidParameter, ContextLengthExceeded: as soon as they are too
        many, too large or too long for a prompt."""
        from headrace.media.limits import check_count

        check_count(len(pictures), self._media, "images")
        found: list[Prepared] = []
        tokens = size = 0
        for picture in pictures:
            found.append(self.prepare_one(picture))
            tokens += found[-1].tiles * self._vision.projector.tokens
            size += len(found[-1].pixels)
            if tokens >= self._max_model_len:
                raise ContextLengthExceeded(
                    f"this model's maximum context length is {self._max_model_len} tokens, for prompt and answer "
                    f"together: the images up to {picture.field} alone have {tokens}"
                )
            if size > MAX_PIXEL_BYTES:
                raise InvalidImage(picture.field, f"{size} bytes of pixels up to it", f"up to {MAX_PIXEL_BYTES}")
        return found

    def prepare_one(self, picture: Picture) -> Prepared:
        """Raises InvalidImage, InvalidParameter."""
        from headrace.media.prepare import Prepared, prepare

        config, source, limits = self._config, picture.source, self._media
        if isinstance(source, Prepared):
            return source
        if isinstance(source, Path):
            from headrace.media.source import read_path

            source = read_path(source, limits, picture.field)
        elif isinstance(source, str):
            from headrace.media.source import MediaPolicy, read_image

            folder = Path(config.image_folder) if config.image_folder else None
            policy = MediaPolicy(limits, allow_http=config.allow_image_urls, folder=folder)
            source = read_image(source, policy, picture.field)
        return prepare(cast("bytes", source), self._vision.tiling, limits, picture.field)  # it looks what it is

    def text_of(self, image: Prepared) -> str:
        """What stands in the prompt for an image."""
        from headrace.media.prompt import image_text

        return image_text(self._vision.prompt, image.tiles, self._vision.projector.tokens)

    def _place(self, token_ids: Sequence[int], images: Sequence[Prepared], where: str) -> Encoded:
        """Finds the images' placeholders in the ids. Raises InvalidParameter unless there are as many as rows."""
        pad, each = self._vision.image_token_id, self._vision.projector.tokens
        places = [place for place, token_id in enumerate(token_ids) if token_id == pad]
        wanted = sum(image.tiles for image in images) * each
        if len(places) != wanted:
            raise InvalidParameter(
                where, f"{len(places)} placeholder tokens (id {pad})", f"{wanted}, {each} for each tile of its images"
            )
        spans: list[ImageSpan] = []
        at = 0
        for image in images:
            first, last = places[at], places[at + image.tiles * each - 1]
            at += image.tiles * each
            spans.append(ImageSpan(first, last + 1 - first, image.hash, image.tiles, image.pixels, image.normalised))
        return Encoded(tuple(token_ids), tuple(spans))
