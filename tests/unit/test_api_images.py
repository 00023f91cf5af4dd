"""Images in the bodies of the routes: what is read, what is refused and in which words. No image is looked at here."""

from __future__ import annotations

import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.api.errors import error_body
from headrace.api.openai import ApiRequest, last_tokens, read_body, read_chat
from headrace.api.tgi import TgiRequest, chat_tokenize_body, image_prompt, info_body, read_generate
from headrace.core.errors import InvalidParameter, RequestError, UnsupportedParameter
from headrace.core.types import EngineLimits, ImageLimits, ImageSpan
from headrace.engine.images import Encoded

URL = "data:image/png;base64,AAAA"
PART: dict[str, Any] = {"type": "image_url", "image_url": {"url": URL}}
TEXT = {"type": "text", "text": "What is this?"}
PAD = 7


def chat(*parts: object, strict: bool = True, **fields: object) -> ApiRequest:
    return read_chat({"messages": [{"role": "user", "content": list(parts)}], **fields}, strict)


def content(request: ApiRequest) -> Any:
    message: Any = request.prompts[0][0]
    return message["content"]


# ---------------------------------------------------------------- OpenAI's parts


def test_parts_keep_their_order() -> None:
    other = {"type": "image_url", "image_url": {"url": "https://example.org/b.png"}}
    assert content(chat(PART, TEXT, other, TEXT)) == [PART, TEXT, other, TEXT]
    assert content(chat({"type": "image_url", "image_url": URL})) == [PART], "the URL alone will do"
    messages = [{"role": "user", "content": [PART]}, {"role": "assistant", "content": [TEXT, PART]}]
    assert [message["content"] for message in read_chat({"messages": messages}).prompts[0]] == [[PART], [TEXT, PART]]  # type: ignore[index, union-attr, call-overload]


@pytest.mark.parametrize("detail", ["auto", "high", None])
def test_a_detail_that_asks_for_what_is_done_anyway(detail: str | None) -> None:
    request = chat({"type": "image_url", "image_url": {"url": URL, "detail": detail}}, strict=True)
    assert content(request) == [PART] and request.ignored == ()


def test_low_detail_is_set_aside_and_named() -> None:
    part = {"type": "image_url", "image_url": {"url": URL, "detail": "low"}}
    request = chat(TEXT, part, strict=False)
    assert content(request) == [TEXT, PART]
    assert request.ignored == ("messages[0].content[1].image_url.detail",)
    with pytest.raises(UnsupportedParameter, match=r"detail: got 'low', which is not supported; allowed: auto, high$"):
        chat(TEXT, part, strict=True)


def test_unknown_fields_are_named() -> None:
    image = {"url": URL, "format": "image/png"}
    request = chat({**PART, "image_url": image, "uuid": "a", "text": None}, strict=False)
    assert content(request) == [PART]
    assert request.ignored == ("messages[0].content[0].uuid", "messages[0].content[0].image_url.format")


@pytest.mark.parametrize(
    ("part", "code", "field"),
    [
        ({"type": "image_url"}, "invalid_parameter", ""),
        ({"type": "image_url", "image_url": None}, "invalid_parameter", ""),
        ({"type": "image_url", "text": "a"}, "invalid_parameter", ""),
        ({"type": "image_url", "image_url": 5}, "invalid_parameter", ".image_url"),
        ({"type": "image_url", "image_url": [URL]}, "invalid_parameter", ".image_url"),
        ({"type": "image_url", "image_url": {}}, "invalid_parameter", ".image_url.url"),
        ({"type": "image_url", "image_url": {"url": None}}, "invalid_parameter", ".image_url.url"),
        ({"type": "image_url", "image_url": {"url": ["a"]}}, "invalid_parameter", ".image_url.url"),
        ({"type": "image_url", "image_url": {"url": URL, "detail": "most"}}, "invalid_parameter", ".image_url.detail"),
        ({"type": "image_url", "image_url": {"url": URL, "detail": 1}}, "invalid_parameter", ".image_url.detail"),
        ({"type": "image_url", "image_url": {"url": URL, "colour": 1}}, "unknown_parameter", ".image_url.colour"),
        ({**PART, "colour": 1}, "unknown_parameter", ".colour"),
        ({"type": "input_image", "image_url": URL}, "unsupported_parameter", ".type"),
        ({"type": "image", "image": "/etc/passwd"}, "unsupported_parameter", ".type"),
        ({"type": "video_url", "video_url": {"url": URL}}, "unsupported_parameter", ".type"),
        ({"type": ["image_url"], "image_url": URL}, "invalid_parameter", ""),
        ({"type": "text", "text": {"url": URL}}, "invalid_parameter", ""),
    ],
)  # fmt: skip
def test_bad_parts(part: object, code: str, field: str) -> None:
    with pytest.raises(RequestError) as caught:
        chat(TEXT, part)
    error = error_body(caught.value)["error"]
    assert (error["code"], error["param"]) == (code, f"messages[0].content[1]{field}")


def test_a_tool_returns_text() -> None:
    call = {"role": "assistant", "tool_calls": [{"id": "a", "function": {"name": "f"}}]}
    answer = {"role": "tool", "tool_call_id": "a", "content": [TEXT, PART]}
    with pytest.raises(UnsupportedParameter, match=r"^messages\[2\]\.content\[1\]\.type: got 'image_url'"):
        read_chat({"messages": [{"role": "user", "content": "x"}, call, answer]})


def test_a_request_knows_whether_it_has_images() -> None:
    assert chat(TEXT, PART).has_images
    assert not chat(TEXT).has_images
    assert not read_body("completions", {"prompt": ["a", "b"]}).has_images


def test_an_answer_needs_no_messages() -> None:
    request = chat(PART, n=3)
    left = request.without_messages()
    assert left.choices == 3 and URL not in repr(left) and left.sampling == request.sampling
    text = read_body("completions", {"prompt": ["a", "b"], "echo": True})
    assert text.without_messages() == text, "a prompt may be told with its answer"


# ---------------------------------------------------------------- only a prompt's end


def encoded(*pieces: int) -> Encoded:
    """Ids: a number is so many of text, a negative one an image of so many placeholders."""
    ids: list[int] = []
    images = []
    for piece in pieces:
        if piece < 0:
            images.append(ImageSpan(len(ids), -piece, f"{len(images)}" * 64))
        ids += [PAD] * -piece if piece < 0 else [1] * piece
    return Encoded(tuple(ids), tuple(images))


def test_the_end_of_a_prompt_keeps_whole_images() -> None:
    prompt = encoded(3, -4, 2, -4, 1)
    assert last_tokens(prompt, 14, "f") == last_tokens(prompt, 99, "f") == prompt
    assert last_tokens(prompt, 11, "f").images[0].start == 0
    kept = last_tokens(prompt, 7, "f")
    assert kept.token_ids == prompt.token_ids[-7:]
    assert [(one.start, one.length, one.hash[0]) for one in kept.images] == [(2, 4, "1")]
    assert last_tokens(prompt, 1, "f") == Encoded((1,))
    with pytest.raises(InvalidParameter, match=r"^f: got 10, allowed: .* such as 11$"):
        last_tokens(prompt, 10, "f")


@given(st.lists(st.integers(-5, 5).filter(bool), min_size=1, max_size=8), st.integers(1, 40))
def test_what_is_cut_off_is_counted(pieces: list[int], most: int) -> None:
    prompt = encoded(*pieces)
    try:
        kept = last_tokens(prompt, most, "f")
    except InvalidParameter:
        cut = len(prompt.token_ids) - most
        assert any(one.start < cut < one.start + one.length for one in prompt.images)
        return
    assert kept.token_ids == prompt.token_ids[-most:]
    assert sum(one.length for one in kept.images) == kept.token_ids.count(PAD)
    for one in kept.images:
        assert set(kept.token_ids[one.start : one.start + one.length]) == {PAD}


# ---------------------------------------------------------------- TGI's markdown


def marked(inputs: str) -> tuple[list[str], list[object]]:
    """(the texts around the images, the images)"""
    prompt = image_prompt(inputs)
    assert isinstance(prompt.prompt, str)
    assert [f"inputs[{index}]" for index in range(len(prompt.images))] == list(prompt.names)
    return prompt.prompt.split(prompt.mark), list(prompt.images)


@pytest.mark.parametrize(
    ("inputs", "texts", "urls"),
    [
        (f"![]({URL})What is this?", ["", "What is this?"], [URL]),
        (f"A ![a cat]({URL}) and\n![]({URL}b)", ["A ", " and\n", ""], [URL, URL + "b"]),
        ("![](https://example.org/a.png?b=(c)", ["", ""], ["https://example.org/a.png?b=(c"]),
        ("![](http://[2001:db8::1]:80/a)x", ["", "x"], ["http://[2001:db8::1]:80/a"]),
        ("![](file:///a/b.png)", ["", ""], ["file:///a/b.png"]),
        ("![](ftp:x)", ["", ""], ["ftp:x"]),  # which address is taken is for others to say
        ("![logo](logo.png) ![](./a:b) [a](https://x)", ["![logo](logo.png) ![](./a:b) [a](https://x)"], []),
        ('![](data:a "title")![](data:a b)![](data:', ['![](data:a "title")![](data:a b)![](data:'], []),
        ("![[a]](data:x) ! [](data:x) ![]( data:x)", ["![[a]](data:x) ! [](data:x) ![]( data:x)"], []),
        ("<image>![](data:a)<image>", ["<image>", "<image>"], ["data:a"]),
        ("x![](data:a)![](data:b)![](data:c)", ["x", "", "", ""], ["data:a", "data:b", "data:c"]),
    ],
)
def test_markdown_images(inputs: str, texts: list[str], urls: list[str]) -> None:
    assert marked(inputs) == (texts, urls)
    assert TgiRequest(inputs, None).may_have_images or not urls  # type: ignore[arg-type]


@given(st.lists(st.sampled_from(["![", "](", ")", "data:", "a", "[", "]", "!", " ", "https://x/", "\n"]), max_size=30))
def test_no_text_is_lost(pieces: list[str]) -> None:
    inputs = "".join(pieces)
    texts, urls = marked(inputs)
    left = inputs
    for text, url in zip(texts, [*urls, None], strict=True):
        assert left.startswith(text)
        left = left[len(text) :]
        if url is not None:
            assert left.startswith("![") and str(url) in left
            left = left[left.index(f"]({url})") + len(f"]({url})") :]
    assert left == ""


@pytest.mark.parametrize("piece", ["![", "![a", "![](", "![](a", "![](a:", "![](a://[", "![](data:x", "!", "[", "](a:"])
def test_hostile_texts_take_linear_time(piece: str) -> None:
    """A bound that a search which begins anew at each piece passes by far."""
    inputs = piece * (2**20 // len(piece))

    def seconds() -> float:
        began = time.process_time()
        image_prompt(inputs)
        return time.process_time() - began

    assert min(seconds() for _ in range(2)) < 0.5


def test_an_answer_has_the_inputs_only_where_asked_for() -> None:
    limits = EngineLimits(100, 100)
    body = {"inputs": f"![]({URL})x"}
    assert read_generate(body, limits, "/generate").without_inputs().inputs == ""
    assert read_generate(body, limits, "/").without_inputs().inputs == body["inputs"]


def test_what_the_server_tells_of_itself() -> None:
    def tag(images: ImageLimits | None) -> object:
        return info_body("m", EngineLimits(100, 100, images=images), 1, 1)["model_pipeline_tag"]

    assert tag(None) == "text-generation"
    assert tag(ImageLimits(PAD, 4, 28, 32)) == "image-text-to-text"


def test_the_tokens_of_an_image_are_no_slices_of_a_text() -> None:
    with pytest.raises(UnsupportedParameter, match=r"^messages\[0\]\.content\[1\]\.type: got 'image_url'"):
        chat_tokenize_body(chat(TEXT, PART), None)  # type: ignore[arg-type]
