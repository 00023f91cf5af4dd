"""Images through HTTP: a real server on a tiny model that sees, and the clients that people have."""

from __future__ import annotations

import base64
import http.client
import io
import json
import socket
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
from huggingface_hub import InferenceClient
from openai import BadRequestError, OpenAI
from PIL import Image

from headrace.server.held import FREE_BYTES, WHILE_READ
from headrace.server.schemas_requests import PIXEL
from headrace.testing.vision_checkpoints import TILE, tiny_vision_checkpoint
from tests.server.conftest import Running, serving
from tests.server.openai_cases import joined, strict_client

ROWS = 4
"""Placeholders of a tile."""
AROUND = 2
"""Tokens beside them: `<img>` and `</img>`."""
HELD_MIB = 16
QUESTION = "What is in the image?"


def picture(colour: str, size: tuple[int, int] = (TILE, TILE), kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    image = Image.new("RGB", size, colour)
    image.putpixel((0, 0), (0, 0, 0))
    image.save(file, kind)
    return file.getvalue()


def data_url(data: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


RED, BLUE = data_url(picture("red")), data_url(picture("blue"))
WIDE = data_url(picture("green", (2 * TILE, TILE)))
"""Two tiles and a thumbnail."""


def image(url: str, **more: object) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url, **more}}


def text(words: str = QUESTION) -> dict[str, Any]:
    return {"type": "text", "text": words}


def user(*parts: dict[str, Any]) -> list[Any]:
    return [{"role": "user", "content": list(parts)}]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_vision_checkpoint(tmp_path_factory.mktemp("model") / "tiny", "internvl_chat")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the server may read images."""
    path = tmp_path_factory.mktemp("images")
    (path / "red.png").write_bytes(picture("red"))
    return path


@pytest.fixture(scope="module")
def seeing(checkpoint: Path, folder: Path) -> Iterator[Running]:
    flags = ("--threads", "1", "--image-folder", str(folder), "--max-images", "4", "--max-held-mib", str(HELD_MIB))
    with serving(checkpoint, *flags, "--served-model-name", "tiny") as running:
        yield running


@pytest.fixture(scope="module")
def client(seeing: Running) -> OpenAI:
    return strict_client(seeing.url)


@pytest.fixture(autouse=True)
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients of the hub take offline mode to forbid the loopback address too."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)


def ask(seeing: Running, path: str, body: object = None, headers: dict[str, str] | None = None) -> tuple[int, Any]:
    connection = http.client.HTTPConnection(*seeing.address, timeout=60)
    try:
        data = None if body is None else json.dumps(body).encode()
        sent = {"content-type": "application/json", **(headers or {})}
        connection.request("GET" if body is None else "POST", path, data, sent)
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    finally:
        connection.close()


def told(client: OpenAI, messages: list[Any], **fields: Any) -> str:
    """The greedy answer. Random weights stop nowhere, so that it has 8 tokens."""
    asked = {"model": "tiny", "max_tokens": 8, "temperature": 0, "extra_body": {"ignore_eos": True}, **fields}
    completion = client.chat.completions.create(messages=messages, **asked)
    return completion.choices[0].message.content or ""


def count(seeing: Running, messages: list[Any]) -> int:
    status, found = ask(seeing, "/tokenize", {"messages": messages})
    assert status == 200, found
    assert found["count"] == len(found["tokens"])
    return int(found["count"])


# ---------------------------------------------------------------- OpenAI's chat


def test_an_image_is_seen(client: OpenAI) -> None:
    red = told(client, user(image(RED), text()))
    assert red == told(client, user(image(RED), text())), "again, from the caches"
    assert red != told(client, user(image(BLUE), text()))
    assert red != told(client, user(text()))


def test_images_are_told_in_their_order(client: OpenAI, seeing: Running) -> None:
    one, other = user(image(RED), text(), image(BLUE)), user(image(BLUE), text(), image(RED))
    assert count(seeing, one) == count(seeing, other)
    assert told(client, one) != told(client, other)
    # Between parts there is a newline: a chat in one text, and one in two messages of which the first has an image.
    history = [*user(image(RED), text()), {"role": "assistant", "content": "red"}, *user(text("And now?"))]
    assert told(client, history) != told(client, [*user(image(BLUE), text()), *history[1:]])


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP"])
def test_formats(client: OpenAI, kind: str) -> None:
    assert told(client, user(image(data_url(picture("red", kind=kind), kind.lower()), detail="high"), text()))


def test_the_tokens_of_images_are_counted(client: OpenAI, seeing: Running) -> None:
    one = count(seeing, user(image(RED), text()))
    assert count(seeing, user(image(WIDE), text())) == one + 2 * ROWS
    assert count(seeing, user(image(RED), image(RED), text())) == one + ROWS + AROUND + 1, "and a newline between them"
    asked = {"model": "tiny", "max_tokens": 1, "messages": user(image(WIDE), text())}
    usage = client.chat.completions.create(**asked).usage  # type: ignore[call-overload]
    assert usage.prompt_tokens == one + 2 * ROWS


def test_a_stream_says_the_same(client: OpenAI) -> None:
    messages = user(image(RED), text(), image(WIDE))
    asked = {"model": "tiny", "messages": messages, "max_tokens": 8, "temperature": 0}
    chunks = list(client.chat.completions.create(stream=True, extra_body={"ignore_eos": True}, **asked))  # type: ignore[call-overload]
    assert joined(chunks) == told(client, messages)


def test_several_answers_and_a_cut_prompt(client: OpenAI, seeing: Running) -> None:
    asked = {"model": "tiny", "messages": user(image(RED), text()), "max_tokens": 4, "seed": 3}
    completion = client.chat.completions.create(n=3, **asked)  # type: ignore[call-overload]
    assert len(completion.choices) == 3
    cut = client.chat.completions.create(extra_body={"truncate_prompt_tokens": 5}, **asked)  # type: ignore[call-overload]
    assert cut.usage.prompt_tokens == 5
    length = count(seeing, user(image(RED), text()))
    with pytest.raises(BadRequestError) as caught:
        for most in range(length - 12, length):  # one of these goes through the image
            client.chat.completions.create(extra_body={"truncate_prompt_tokens": most}, **asked)  # type: ignore[call-overload]
    assert caught.value.param == "truncate_prompt_tokens"


def test_other_addresses(client: OpenAI, seeing: Running, folder: Path) -> None:
    red = told(client, user(image(RED), text()))
    assert told(client, user({"type": "image_url", "image_url": RED}, text())) == red
    assert told(client, user(image(f"file://{folder}/red.png"), text())) == red
    body = {"messages": user(image(RED, detail="low"), text()), "max_tokens": 1}
    connection = http.client.HTTPConnection(*seeing.address, timeout=60)
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"content-type": "application/json"})
    response = connection.getresponse()
    assert response.status == 200 and response.read()
    assert response.getheader("x-headrace-ignored") == "messages[0].content[0].image_url.detail"
    connection.close()


BAD = {
    "no image": (image(data_url(b"hello")), "invalid_image"),
    "half an image": (image(data_url(picture("red", (200, 200))[:80])), "invalid_image"),
    "no base64": (image("data:image/png;base64,?"), "invalid_image"),
    "empty": (image(""), None),
    "private address": (image("http://127.0.0.1/a.png"), None),
    "address": (image("https://example.org/a.png"), None),
    "outside of the folder": (image("file:///etc/passwd"), None),
    "a path": (image("/etc/passwd"), None),
    "another scheme": (image("ftp://example.org/a.png"), None),
}


@pytest.mark.parametrize("name", BAD)
def test_an_image_that_is_refused(name: str, client: OpenAI) -> None:
    part, code = BAD[name]
    with pytest.raises(BadRequestError) as caught:
        told(client, user(text(), image(RED), part))
    assert caught.value.code == code or code is None
    assert caught.value.param is not None
    assert caught.value.param.startswith("messages[0].content[2].image_url")


def test_too_many_images(client: OpenAI) -> None:
    with pytest.raises(BadRequestError, match="at most 4"):
        told(client, user(*[image(RED)] * 5))


def test_a_prompt_that_images_make_too_long(client: OpenAI) -> None:
    many = data_url(picture("red", (6 * TILE, 2 * TILE)))
    with pytest.raises(BadRequestError) as caught:
        told(client, [*user(*[image(many)] * 4), *user(text("a b c d " * 1000))])
    assert caught.value.code == "context_length_exceeded"


def test_a_typed_placeholder_takes_no_images_row(client: OpenAI) -> None:
    with pytest.raises(BadRequestError) as caught:
        told(client, user(image(RED), text("<IMG_CONTEXT>")))
    assert str(caught.value.param).startswith("messages")


# ---------------------------------------------------------------- TGI


def test_markdown_images(seeing: Running) -> None:
    client = InferenceClient(model=seeing.url, timeout=60)

    def told(prompt: str) -> str:
        return str(client.text_generation(prompt, max_new_tokens=8, return_full_text=False))

    red = told(f"![]({RED}){QUESTION}")
    assert red == told(f"![a red square]({RED}){QUESTION}")
    assert red != told(f"![]({BLUE}){QUESTION}")
    streamed = client.text_generation(f"![]({RED}){QUESTION}", max_new_tokens=8, return_full_text=False, stream=True)
    assert red == "".join(streamed)
    chat: Any = client.chat_completion(user(image(RED), text()), max_tokens=8, temperature=0)
    assert chat.choices[0].message.content != ""
    full = client.text_generation(f"![]({RED}){QUESTION}", max_new_tokens=8, return_full_text=True)
    assert full == f"![]({RED}){QUESTION}{red}"


def test_markdown_images_are_counted(seeing: Running) -> None:
    def length(inputs: str) -> int:
        body = {"inputs": inputs, "parameters": {"max_new_tokens": 1, "decoder_input_details": True}}
        status, found = ask(seeing, "/generate", body)
        assert status == 200, found
        return len(found["details"]["prefill"])

    assert length(f"![]({RED})") == ROWS + AROUND
    assert length(f"![]({WIDE})![]({RED})") == 4 * ROWS + 2 * AROUND
    assert length(f"a![]({WIDE})b![]({RED})c") == 4 * ROWS + 2 * AROUND + 3
    # Without an image a placeholder is a token like others; a name without a scheme is no image.
    assert length("<IMG_CONTEXT>![logo](logo.png)") == length("![logo](logo.png)") + 1


@pytest.mark.parametrize("url", ["data:image/png;base64,AAAA", "http://127.0.0.1/a.png", "file:///etc/passwd"])
def test_a_markdown_image_that_is_refused(seeing: Running, url: str) -> None:
    status, found = ask(seeing, "/generate", {"inputs": f"![]({RED}) and ![]({url})"})
    assert status == 422 and found["error_type"] == "validation"
    assert "inputs[1]" in found["error"]


def test_what_the_server_tells_of_itself(seeing: Running) -> None:
    assert ask(seeing, "/info")[1]["model_pipeline_tag"] == "image-text-to-text"
    document = ask(seeing, "/openapi.json")[1]
    shown = json.dumps(document["components"]["schemas"]["Message"])
    assert PIXEL in shown and "image_url" in shown
    body = {"messages": user(image(PIXEL)), "max_tokens": 1}
    assert ask(seeing, "/v1/chat/completions", body)[0] == 200, "the example of the document is taken"


# ---------------------------------------------------------------- bounds


def post_head(length: int) -> bytes:
    return (
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n" % length
    )


def held_bytes(seeing: Running) -> float:
    """What the server's metrics say."""
    with urllib.request.urlopen(f"{seeing.url}/metrics", timeout=30) as answer:
        lines = answer.read().decode().splitlines()
    return float(next(line for line in lines if line.startswith("headrace:request_held_bytes")).rpartition(" ")[2])


def test_slow_uploads_leave_room(seeing: Running, client: OpenAI) -> None:
    """Each byte of a body that is read counts six times: three of these would be too many."""
    length = 2 * 2**20
    slow = [socket.create_connection(seeing.address, timeout=30) for _ in range(2)]
    try:
        for one, sent in zip(slow, (length - 1, 600_000), strict=True):
            one.sendall(post_head(length) + b'{"a": "' + b"x" * (sent - 7))
        # The server reads them in its own time: until then a third body would find room.
        read = WHILE_READ * (length - 1 + 600_000 - 2 * FREE_BYTES)
        for _ in range(200):
            if held_bytes(seeing) == read:
                break
            time.sleep(0.05)
        assert held_bytes(seeing) == read
        # A third body finds none, though the second has only begun to come.
        messages = user(text("x" * length))
        status, found = ask(seeing, "/v1/chat/completions", {"messages": messages})
        assert (status, found["error"]["code"]) == (429, "queue_full") and "max_held_mib" in found["error"]["message"]
        assert told(client, user(image(RED), text())), "others go on"
    finally:
        for one in slow:
            one.close()
    for _ in range(100):  # the room is free again once the server has seen that they are gone
        status, found = ask(seeing, "/v1/chat/completions", {"messages": messages})
        if status != 429:
            break
        time.sleep(0.05)
    assert (status, found["error"]["code"]) == (400, "context_length_exceeded")


def test_a_body_that_will_never_find_room(seeing: Running) -> None:
    with socket.create_connection(seeing.address, timeout=30) as one:
        one.sendall(post_head(5 * 2**20))
        assert one.recv(100).startswith(b"HTTP/1.1 413 ")


def test_a_model_that_reads_none(server_url: str) -> None:
    """The demo model, in the server of all tests."""
    client = strict_client(server_url)
    with pytest.raises(BadRequestError) as caught:
        client.chat.completions.create(model="demo", messages=user(text(), image(RED)), max_tokens=1)
    assert (caught.value.code, caught.value.param) == ("unsupported_parameter", "messages[0].content[1].type")
    hub = InferenceClient(model=server_url, timeout=60)
    assert hub.text_generation(f"![]({RED[:60]})", max_new_tokens=1, return_full_text=True).startswith("![](data:")
