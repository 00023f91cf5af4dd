"""Prompts with pictures: the whole text that is tokenised, the ids, and where the images' rows lie."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from headrace.core.config import EngineConfig
from headrace.core.errors import (
    CheckpointError,
    ContextLengthExceeded,
    InvalidImage,
    InvalidParameter,
    RequestError,
    TemplateError,
    UnsupportedParameter,
)
from headrace.core.spec import EncoderSpec, ImagePromptSpec, NormSpec, ProjectorSpec, TilingSpec, VisionSpec
from headrace.core.types import EngineLimits, Request, SamplingParams
from headrace.core.validate import validate
from headrace.engine.images import Encoded, ImagePrompt, ImageReader, choose_frame, image_parts, refuse_images
from headrace.testing.tiny_tokenizer import write_tiny_tokenizer
from headrace.text.tokenizer import Tokenizer, load_tokenizer
from headrace.weights.checkpoint import Checkpoint

TILE, TOKENS = 28, 4
NVLM = ImagePromptSpec("<|vision_pad|>", "<Image>", "</Image>", tile_tags=True)
INTERNVL = ImagePromptSpec("<IMG_CONTEXT>", "<img>", "</img>")
OPEN_QWEN2VL = ImagePromptSpec("<|image_pad|>")
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<s>")
NVLM_SYSTEM = "Follow the user's instruction and answer questions."
P = "<|vision_pad|>" * TOKENS
C = "<IMG_CONTEXT>" * TOKENS
Q = "<|image_pad|>" * TOKENS
ONE = f"<Image><tile_global_thumbnail>{P}</Image>"
THREE = f"<Image><tile_1>{P}<tile_2>{P}<tile_global_thumbnail>{P}</Image>"
SEVEN = f"<Image><tile_1>{P}<tile_2>{P}<tile_3>{P}<tile_4>{P}<tile_5>{P}<tile_6>{P}<tile_global_thumbnail>{P}</Image>"
SIZES: Mapping[int, tuple[int, int]] = {1: (TILE, TILE), 3: (2 * TILE, TILE), 7: (3 * TILE, 2 * TILE)}
"""Tiles, the thumbnail among them -> width and height of a picture that has so many."""


class Model:
    """What `OpenModel` does with prompts, without a model."""

    def __init__(self, folder: Path, prompt: ImagePromptSpec, frame: str | None, **settings: Any) -> None:
        config: Mapping[str, object] = {}
        checkpoint = SimpleNamespace(path=folder, format="hf", config=config)
        self.tokenizer: Tokenizer = load_tokenizer(cast("Checkpoint", checkpoint))
        if frame is not None:
            self.tokenizer.chat_template = frame
        norm = NormSpec("layer", 1e-6, 32, bias=True)
        encoder = EncoderSpec(TILE, 7, 32, 2, 4, 8, 56, "gelu", norm, qkv_bias=True)
        vision = VisionSpec(
            encoder,
            ProjectorSpec("shuffle_v2", TOKENS, 128, 64, bias=False),
            TilingSpec(TILE, 1, 6, thumbnail=True),
            prompt,
            self.tokenizer.raw.token_to_id(prompt.pad) or 0,
        )
        self.reader = ImageReader(vision, EngineConfig("m", **settings), 512)
        self.limits = EngineLimits(self.tokenizer.vocab_size, 512, images=self.reader.limits)
        self.texts: list[str] = []

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        self.texts.append(text)
        return self.tokenizer.encode(text, add_special_tokens)

    def chat(self, messages: Sequence[Mapping[str, object]]) -> tuple[str, Encoded]:
        encoded = self.reader.encode_chat(messages, self.tokenizer.render, self.encode)
        return self._checked(encoded)

    def complete(self, prompt: str | Sequence[int], *images: object, **settings: Any) -> tuple[str, Encoded]:
        return self._checked(self.reader.encode_prompt(ImagePrompt(prompt, images, **settings), self.encode))

    def _checked(self, encoded: Encoded) -> tuple[str, Encoded]:
        text = self.texts[-1] if self.texts else ""
        if self.texts:
            assert encoded.token_ids == tuple(self.tokenizer.encode(text, False)), "of the whole string"
        validate(Request("r", encoded.token_ids, SamplingParams(), encoded.images), self.limits)
        return text, encoded


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    write_tiny_tokenizer(path, (*SPECIAL, NVLM.pad, INTERNVL.pad, OPEN_QWEN2VL.pad), chat_template=False)
    return path


def framed(architecture: str, form: str = "auto", **config: object) -> str:
    source, _ = choose_frame({"architectures": [architecture], **config}, form)
    assert source is not None
    return source


@pytest.fixture(scope="module")
def nvlm(folder: Path) -> Iterator[Model]:
    model = Model(folder, NVLM, framed("NVLM_D"))
    yield model
    model.tokenizer.close()


def picture(tiles: int, seed: int = 0) -> NDArray[np.uint8]:
    width, height = SIZES[tiles]
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def image(tiles: int, seed: int = 0) -> dict[str, object]:
    return {"type": "image", "image": picture(tiles, seed)}


def text(value: str) -> dict[str, object]:
    return {"type": "text", "text": value}


def user(*parts: object) -> dict[str, object]:
    return {"role": "user", "content": list(parts)}


def data_url(tiles: int) -> str:
    import base64

    file = io.BytesIO()
    Image.fromarray(picture(tiles)).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


# ---------------------------------------------------------------- golden strings

HEAD = f"<|im_start|>system\n{NVLM_SYSTEM}<|im_end|>\n<|im_start|>user\n"
TAIL = "<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        (["Hi."], "Hi."),
        ([1, "Why?"], f"{ONE}\nWhy?"),
        ([3, "Why?"], f"{THREE}\nWhy?"),
        ([7, "Why?"], f"{SEVEN}\nWhy?"),
        ([3, 1, "Compare."], f"{THREE}\n{ONE}\nCompare."),
        (["Left:", 1, "Right:", 3, "Compare."], f"Left:\n{ONE}\nRight:\n{THREE}\nCompare."),
    ],
)
def test_nvlm_golden(nvlm: Model, parts: list[int | str], expected: str) -> None:
    message = user(*(image(one) if isinstance(one, int) else text(one) for one in parts))
    found, encoded = nvlm.chat([message])
    assert found == HEAD + expected + TAIL
    assert [one.tiles for one in encoded.images] == [one for one in parts if isinstance(one, int)]


def test_nvlm_with_history_and_both_forms(folder: Path) -> None:
    messages = [
        user(image(1), text("First?")),
        {"role": "assistant", "content": "An answer."},
        user(text("And now?"), image(3)),
    ]
    chatml, mpt = Model(folder, NVLM, framed("NVLM_D")), Model(folder, NVLM, framed("NVLM_D", "mpt"))
    said = (f"{ONE}\nFirst?", "An answer.", f"And now?\n{THREE}")
    first, answer, second = said
    assert chatml.chat(messages)[0] == (
        f"{HEAD}{first}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n<|im_start|>user\n{second}{TAIL}"
    )
    assert mpt.chat(messages)[0] == (
        f"<|im_start|>system\n{NVLM_SYSTEM}<|im_end|><|im_start|>user\n{first}<|im_end|>"
        f"<|im_start|>assistant\n{answer}<|im_end|><|im_start|>user\n{second}<|im_end|><|im_start|>assistant\n"
    )
    own = [{"role": "system", "content": "Be brief."}, *messages]
    assert chatml.chat(own)[0].startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n<Image>")
    for model in (chatml, mpt):
        model.tokenizer.close()


def test_internvl_golden(folder: Path) -> None:
    system = (
        "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, 是一个有用无害的人工智能助手。"
    )
    for template, end in (("Hermes-2", ""), ("internvl2_5", "\n")):
        model = Model(folder, INTERNVL, framed("InternVLChatModel", template=template))
        found, encoded = model.chat([user(image(3), image(1), text("Both?"))])
        assert found == (
            f"<|im_start|>system\n{system}<|im_end|>{end}<|im_start|>user\n<img>{C}{C}{C}</img>\n<img>{C}</img>\nBoth?"
            f"<|im_end|>{end}<|im_start|>assistant\n"
        )
        first, second = encoded.images
        assert (first.length, second.length) == (3 * TOKENS, TOKENS)
        model.tokenizer.close()


def test_open_qwen2vl_forms(folder: Path) -> None:
    ids = {}
    head = "<s><|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    history = [user(image(1), text(" First? ")), {"role": "assistant", "content": "Yes."}, user(text("Sure?"))]
    for form, end in (("train", "\n"), ("cli", "")):
        model = Model(folder, OPEN_QWEN2VL, framed("OpenQwen2VL", form))
        found, encoded = model.chat([user(image(1), text("Describe the image. "))])
        assert found == f"{head}{Q}\nDescribe the image.<|im_end|>assistant{end}"
        ids[form] = encoded.token_ids
        assert model.chat(history)[0] == (
            f"{head}{Q}\n First?<|im_end|>assistant\nYes.<|im_end|>\n<|im_start|>user\nSure?<|im_end|>assistant{end}"
        )
        with pytest.raises(TemplateError, match="take turns"):
            model.chat([history[0], history[0]])
        model.tokenizer.close()
    newline = model.tokenizer.encode("\n", False)
    assert ids["train"] == (*ids["cli"], *newline), "exactly one difference, at the end"
    raw = Model(folder, OPEN_QWEN2VL, framed("OpenQwen2VL", "raw"))
    assert raw.chat([user(image(1), text("Describe the image."))])[0] == f"<s>{Q}\nDescribe the image."
    with pytest.raises(TemplateError, match="one user message"):
        raw.chat(history)
    raw.tokenizer.close()


# ---------------------------------------------------------------- which frame


def test_frames_are_chosen() -> None:
    assert choose_frame({"architectures": ["LlamaForCausalLM"]}, "auto") == (None, False)
    assert choose_frame({}, "auto") == (None, False)
    assert choose_frame({"architectures": ["NVLM_D"], "template": "chatml"}, "auto")[1] is False, (
        "its own template wins"
    )
    assert choose_frame({"architectures": ["NVLM_D"]}, "mpt")[1] is True, "unless a form is asked for"
    trained, wins = choose_frame({"architectures": ["OpenQwen2VL"], "prompt_form": "train"}, "auto")
    assert wins and trained == framed("OpenQwen2VL")
    assert choose_frame({"architectures": ["OpenQwen2VL"], "prompt_form": "train"}, "cli")[0] != trained
    with pytest.raises(InvalidParameter, match="prompt_form: got 'mpt', allowed: auto, train, cli, raw for this model"):
        choose_frame({"architectures": ["OpenQwen2VL"]}, "mpt")
    with pytest.raises(InvalidParameter, match="prompt_form: got 'chatml', allowed: auto for this model"):
        choose_frame({"architectures": ["Qwen2ForCausalLM"]}, "chatml")
    with pytest.raises(CheckpointError, match="prompt_form is 'none', allowed: train, cli, raw"):
        choose_frame({"architectures": ["OpenQwen2VL"], "prompt_form": "none"}, "auto")


# ---------------------------------------------------------------- raw texts and ids


def test_places_in_a_text(nvlm: Model) -> None:
    assert nvlm.complete("Why?", picture(1))[0] == f"{ONE}\nWhy?"
    assert nvlm.complete("Why?", picture(1), picture(3))[0] == f"{ONE}\n{THREE}\nWhy?"
    assert nvlm.complete("<image>\nWhy?", picture(1))[0] == f"{ONE}\nWhy?"
    assert nvlm.complete("A <image> B<image>", picture(3), picture(1))[0] == f"A {THREE} B{ONE}"
    assert nvlm.complete("A % <image>", picture(1), mark="%")[0] == f"A {ONE} <image>"
    assert nvlm.complete("none") == ("none", Encoded(tuple(nvlm.tokenizer.encode("none"))))
    alone = "<|vision_pad|> is an ordinary token where there are no images"
    assert nvlm.complete(alone)[1].token_ids == tuple(nvlm.tokenizer.encode(alone))
    for prompt, count in (("<image> <image>", 1), ("<image>", 2), ("<image>", 0)):
        words = f"images: got '{count} images', allowed: {prompt.count('<image>')}, one for each <image> of the prompt"
        with pytest.raises(InvalidParameter, match=words):
            nvlm.complete(prompt, *[picture(1)] * count)


def test_ids_that_hold_placeholders(nvlm: Model) -> None:
    _, whole = nvlm.complete("A <image> B <image>", picture(3), picture(1, seed=1))
    nvlm.texts.clear()
    assert nvlm.complete(whole.token_ids, picture(3), picture(1, seed=1))[1] == whole
    for images, found in (([picture(3)], 16), ([], 16), ([picture(7)], 16)):
        with pytest.raises(
            InvalidParameter, match=rf"prompt_token_ids: got '{found} placeholder tokens \(id [0-9]+\)'"
        ):
            nvlm.complete(whole.token_ids, *images)
    with pytest.raises(InvalidParameter, match="prompt: got 5, allowed: text or a list"):
        nvlm.complete(cast("str", 5), picture(1))


def test_spans_hold_the_pixels_in_order(nvlm: Model) -> None:
    _, encoded = nvlm.complete("A <image> B <image> C", picture(3), picture(1, seed=1))
    pad = nvlm.reader.limits.token_id
    first, second = encoded.images
    assert first.pixels[: 3 * TILE] == picture(3)[0, :TILE].tobytes() and first.hash != second.hash
    assert second.pixels == picture(1, seed=1).tobytes()
    inside = encoded.token_ids[first.start : first.start + first.length]
    assert inside.count(pad) == 3 * TOKENS and inside[0] == inside[-1] == pad
    assert len(inside) > 3 * TOKENS, "tags between the tiles"
    assert nvlm.complete("Other <image>", picture(3))[1].images[0].hash == first.hash


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("message", "field"),
    [
        (user(image(1), text("see <|vision_pad|>")), "messages[0].content[1].text"),
        ({"role": "user", "content": "<|vision_pad|>"}, "messages[0].content"),
        ({"role": "user", "content": "x", "name": "<|vision_pad|>"}, "messages[0].name"),
        ({"role": "assistant", "content": "", "tool_calls": [{"<|vision_pad|>": 1}]}, "messages[0].tool_calls[0]"),
    ],
)
def test_typed_placeholders(nvlm: Model, message: dict[str, object], field: str) -> None:
    with pytest.raises(InvalidParameter, match=r"allowed: text without <\|vision_pad\|>, beside images") as caught:
        nvlm.chat([message, user(image(1))])
    assert caught.value.field == field
    with pytest.raises(InvalidParameter, match="prompt: got"):
        nvlm.complete("a <|vision_pad|>", picture(1))


def test_a_placeholder_that_the_template_writes_is_found(folder: Path) -> None:
    model = Model(folder, NVLM, "{{ '<|vision_pad|>' + messages[0]['content'] }}")
    with pytest.raises(InvalidParameter, match="messages: got '5 placeholder tokens"):
        model.chat([user(image(1))])
    model.tokenizer.close()


@pytest.mark.parametrize(
    ("part", "field", "words"),
    [
        ("text", "messages[0].content[1].type", "got None, allowed: text, image_url or image"),
        (
            {"type": "input_audio"},
            "messages[0].content[1].type",
            "got 'input_audio', allowed: text, image_url or image",
        ),
        ({"type": "text"}, "messages[0].content[1].text", "a string"),
        ({"type": "image_url"}, "messages[0].content[1].image_url", "a URL"),
        ({"type": "image_url", "image_url": {"url": 5}}, "messages[0].content[1].image_url.url", "a URL"),
        ({"type": "image", "image": "cat.png"}, "messages[0].content[1].image", "a URL is for image_url"),
        ({"type": "image", "image": b"no picture"}, "messages[0].content[1].image", "got"),
        ({"type": "image", "image": Path("/nowhere/x.png")}, "messages[0].content[1].image", "a regular file"),
        ({"type": "image", "image": Path("/dev/zero")}, "messages[0].content[1].image", "a regular file"),
        ({"type": "image_url", "image_url": "data:image/png;base64,AAAA"}, "messages[0].content[1].image_url", "got"),
        (
            {"type": "image_url", "image_url": {"url": "file:///etc/hostname"}},
            "messages[0].content[1].image_url.url",
            "begin with data:$",
        ),
        (
            {"type": "image_url", "image_url": {"url": "http://127.0.0.1/"}},
            "messages[0].content[1].image_url.url",
            "begin with data:$",
        ),
    ],
)
def test_parts_that_are_none(nvlm: Model, part: object, field: str, words: str) -> None:
    with pytest.raises(InvalidParameter, match=words) as caught:
        nvlm.chat([user(image(1), part)])
    assert caught.value.field == field and "\n" not in str(caught.value)


def test_too_many_and_too_long(folder: Path, nvlm: Model) -> None:
    few = Model(folder, NVLM, framed("NVLM_D"), max_images=2)
    with pytest.raises(InvalidImage, match="images: got '3 images', allowed: at most 2"):
        few.chat([user(*[image(1)] * 3)])
    few.tokenizer.close()
    with pytest.raises(ContextLengthExceeded, match=r"the images up to images\[18\] alone have 532"):
        nvlm.complete("x", *[picture(7)] * 30)
    small = Model(folder, NVLM, framed("NVLM_D"), max_image_mib=1)
    with pytest.raises(InvalidImage):
        small.complete("x", b"\0" * (2**20 + 1))
    path = folder / "large"
    path.write_bytes(b"\0" * (2**20 + 1))
    with pytest.raises(InvalidImage, match="1 to 1048576 bytes"):
        small.complete("x", path)


def test_models_that_read_no_images() -> None:
    messages = [{"role": "user", "content": "Hi"}, user(text("x"), {"type": "image_url", "image_url": "data:,"})]
    assert list(image_parts(messages)) == ["messages[1].content[1]"]
    with pytest.raises(UnsupportedParameter, match=r"^messages\[1\].content\[1\].type: .* this model reads no images"):
        refuse_images(messages)
    for odd in (None, 5, "text", [5], [{"content": [None, 5]}]):
        refuse_images(odd)


# ---------------------------------------------------------------- ways to give a picture


def test_every_form_of_a_picture_is_the_same(nvlm: Model, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(picture(3)).save(path)
    forms = [picture(3), Image.fromarray(picture(3)), path, path.read_bytes(), data_url(3)]
    assert len({nvlm.complete("x", form)[1] for form in forms}) == 1
    address = {"type": "image_url", "image_url": {"url": data_url(3), "detail": "high"}}
    plain = {"type": "image_url", "image_url": data_url(3)}
    assert nvlm.chat([user(address)]) == nvlm.chat([user(plain)]) == nvlm.chat([user(image(3))])


def test_a_folder_of_pictures(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    Image.fromarray(picture(3)).save(tmp_path / "a.png")
    model = Model(folder, NVLM, framed("NVLM_D"), image_folder=str(tmp_path))
    part = {"type": "image_url", "image_url": {"url": (tmp_path / "a.png").as_uri()}}
    assert model.chat([user(part)]) == model.chat([user(image(3))])
    model.tokenizer.close()


# ---------------------------------------------------------------- templates


def test_templates_that_move_or_drop_a_message(folder: Path) -> None:
    last_first = Model(folder, NVLM, "{% for m in messages | reverse %}{{ m['content'] | trim }};{% endfor %}")
    found, encoded = last_first.chat([user(text("a"), image(1)), user(image(3), text("b"))])
    assert found == f"{THREE}\nb;a\n{ONE};"
    assert [one.tiles for one in encoded.images] == [3, 1], "in the order of their rows"
    for source in ("{{ messages[0]['content'] }}", "{% for m in messages %}{{ m['content'] * 2 }}{% endfor %}"):
        model = Model(folder, NVLM, source)
        with pytest.raises(TemplateError, match="does not show each image once"):
            model.chat([user(image(1)), user(image(1))])
        model.tokenizer.close()
    last_first.tokenizer.close()


TEXTS = st.text(st.sampled_from("a<>|_:0123456789\uf8fe\n %image\\{}"), max_size=12)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(TEXTS | st.sampled_from([1, 3]), min_size=1, max_size=5), min_size=1, max_size=3))
def test_text_stays_as_it_is(nvlm: Model, messages: list[list[str | int]]) -> None:
    """Whatever is typed, also what a mark is made of."""
    shown = {1: ONE, 3: THREE}
    content = [user(*(image(one) if isinstance(one, int) else text(one) for one in parts)) for parts in messages]
    wanted = ["\n".join(shown[one] if isinstance(one, int) else one for one in parts) for parts in messages]
    try:
        found, encoded = nvlm.chat([*content, user(image(1))])
    except RequestError as error:  # a text may be too long, or no text at all
        assert not isinstance(error, InvalidParameter)
        return
    turns = "".join(f"<|im_start|>user\n{one}<|im_end|>\n" for one in [*wanted, ONE])
    assert found == f"<|im_start|>system\n{NVLM_SYSTEM}<|im_end|>\n{turns}<|im_start|>assistant\n"
    flat = [one for parts in messages for one in parts if isinstance(one, int)]
    assert [one.tiles for one in encoded.images] == [*flat, 1]
