"""TGI's routes against a real server: its clients unchanged, and what a raw connection sees."""

from __future__ import annotations

import asyncio
import http.client
import json
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import huggingface_hub.constants
import pytest
from huggingface_hub import AsyncInferenceClient, InferenceClient
from huggingface_hub.errors import ValidationError

PROMPT = "The capital of France is"
CHAT = {"messages": [{"role": "user", "content": "Say héllo."}]}


@pytest.fixture(autouse=True)
def own_server_is_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests ask no hub for anything, and that switch of theirs refuses every host; here the only one is our own."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)


@pytest.fixture(scope="module")
def client(server_url: str) -> InferenceClient:
    return InferenceClient(model=server_url, timeout=60)


class Answer:
    """What a raw connection got."""

    def __init__(self, response: http.client.HTTPResponse) -> None:
        self.status = response.status
        self.headers = {name.lower(): value for name, value in response.getheaders()}
        self.data = response.read()

    @property
    def json(self) -> Any:
        return json.loads(self.data)

    @property
    def events(self) -> list[Any]:
        assert self.headers["content-type"].startswith("text/event-stream")
        parts = self.data.decode("ascii").removesuffix("\n\n").split("\n\n")
        return [json.loads(part.removeprefix("data:")) for part in parts if not part.startswith(":")]


def ask(url: str, method: str, path: str, body: object = None, **headers: str) -> Answer:
    parts = urlsplit(url)
    assert parts.hostname is not None
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=60)
    data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    try:
        connection.request(method, path, data, {"content-type": "application/json", **headers})
        return Answer(connection.getresponse())
    finally:
        connection.close()


def generate(url: str, path: str = "/generate", inputs: object = PROMPT, **parameters: object) -> Answer:
    return ask(url, "POST", path, {"inputs": inputs, "parameters": {"max_new_tokens": 6, **parameters}})


# ---------------------------------------------------------------- huggingface_hub


def test_text_generation(client: InferenceClient, server_url: str) -> None:
    expected = generate(server_url).json["generated_text"]
    assert client.text_generation(PROMPT, max_new_tokens=6, return_full_text=False) == expected
    # As TGI: at `/` the prompt stands before the text unless that is declined.
    assert client.text_generation(PROMPT, max_new_tokens=6) == PROMPT + expected


def test_text_generation_with_details(client: InferenceClient) -> None:
    output = client.text_generation(
        PROMPT, details=True, decoder_input_details=True, top_n_tokens=2, max_new_tokens=6, return_full_text=False
    )
    details = output.details
    assert details is not None
    assert (details.finish_reason, details.generated_tokens, details.seed) == ("length", 6, None)
    assert "".join(token.text for token in details.tokens) == output.generated_text
    assert "".join(token.text for token in details.prefill) == PROMPT
    assert details.prefill[0].logprob is None
    assert all(one.logprob < 0 for one in details.prefill[1:])
    assert details.top_tokens is not None
    for token, top in zip(details.tokens, details.top_tokens, strict=True):
        first, second = (dict(one) for one in top)  # the client leaves lists in lists as they came
        assert first["logprob"] >= second["logprob"]
        assert first == {"id": token.id, "text": token.text, "logprob": token.logprob, "special": False}  # greedy


def test_text_generation_stream(client: InferenceClient, server_url: str) -> None:
    whole = generate(server_url, details=True).json
    pieces = list(client.text_generation(PROMPT, stream=True, max_new_tokens=6))
    assert "".join(pieces) == whole["generated_text"]
    outputs = list(client.text_generation(PROMPT, stream=True, details=True, max_new_tokens=6, return_full_text=False))
    assert [one.index for one in outputs] == list(range(1, 7))
    assert [one.token.id for one in outputs] == [token["id"] for token in whole["details"]["tokens"]]
    assert [one.generated_text for one in outputs] == [None] * 5 + [whole["generated_text"]]
    end = outputs[-1].details
    assert end is not None
    assert (end.finish_reason, end.generated_tokens) == ("length", 6)
    assert end.input_length == len(PROMPT.split())
    assert all(one.details is None for one in outputs[:-1])


async def _stream(url: str) -> list[str]:
    async with AsyncInferenceClient(model=url, timeout=60) as client:
        return [piece async for piece in await client.text_generation(PROMPT, stream=True, max_new_tokens=6)]


def test_the_asynchronous_client(server_url: str) -> None:
    assert "".join(asyncio.run(_stream(server_url))) == generate(server_url).json["generated_text"]


def test_chat_completion(client: InferenceClient) -> None:
    messages = CHAT["messages"]
    whole = client.chat_completion(messages, max_tokens=6, temperature=0, seed=1)
    assert 1 <= whole.usage.completion_tokens <= 6
    chunks = client.chat_completion(messages, max_tokens=6, temperature=0, seed=1, stream=True)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content


@pytest.mark.parametrize("stream", [False, True])
def test_errors_are_typed(client: InferenceClient, stream: bool) -> None:
    with pytest.raises(ValidationError, match=r"Input validation error: parameters\.top_p: got 1\.5"):
        list(client.text_generation(PROMPT, top_p=1.5, stream=stream))
    with pytest.raises(ValidationError, match="inputs"):
        list(client.text_generation("", stream=stream))
    with pytest.raises(ValidationError, match="tokens"):
        list(client.text_generation("word " * 20_000, stream=stream))


def test_a_grammar_holds(client: InferenceClient) -> None:
    text = client.text_generation(
        "A date:", grammar={"type": "regex", "value": "[0-9]{4}-[0-9]{2}"}, max_new_tokens=20, return_full_text=False
    )
    year, month = text.split("-")
    assert (len(year), len(month)) == (4, 2)
    number = {"type": "integer", "minimum": 1, "maximum": 9}
    schema = {"properties": {"n": number}, "required": ["n"], "additionalProperties": False}
    text = client.text_generation(
        'As JSON: {"n": 3}. Again: ',
        grammar={"type": "json", "value": schema},
        max_new_tokens=60,
        return_full_text=False,
    )
    assert 1 <= json.loads(text)["n"] <= 9


# ---------------------------------------------------------------- the wire


def test_bodies(server_url: str) -> None:
    plain = generate(server_url)
    assert plain.status == 200
    assert list(plain.json) == ["generated_text"]
    listed = generate(server_url, "/", return_full_text=False)
    assert listed.json == [plain.json]
    details = generate(server_url, details=True).json["details"]
    assert list(details) == ["finish_reason", "generated_tokens", "seed", "prefill", "tokens"]
    assert details["prefill"] == []


def test_headers(server_url: str) -> None:
    answer = generate(server_url)
    whole_numbers = ("total", "validation", "queue", "inference")
    times = [int(answer.headers[f"x-{name}-time"]) for name in whole_numbers]
    assert abs(times[0] - sum(times[1:])) <= 3
    assert 0 < float(answer.headers["x-compute-time"]) < 60
    assert int(answer.headers["x-time-per-token"]) <= times[3]
    assert answer.headers["x-compute-characters"] == str(len(PROMPT))
    assert answer.headers["x-prompt-tokens"] == str(len(PROMPT.split()))
    assert answer.headers["x-generated-tokens"] == "6"
    assert answer.headers["x-compute-type"]
    stream = generate(server_url, "/generate_stream")
    assert stream.headers["x-accel-buffering"] == "no"
    assert stream.headers["x-compute-characters"] == str(len(PROMPT))


def test_a_stream_says_what_the_whole_says(server_url: str) -> None:
    asked: list[dict[str, object]] = [
        {},
        {"top_n_tokens": 3},
        {"seed": 2**64 - 1, "temperature": 1.5},
        {"seed": 5, "top_k": 40, "max_new_tokens": 30, "stop": [" the", ",", "."]},
        {"seed": 11, "do_sample": True, "temperature": 2, "max_new_tokens": 40},
    ]
    for parameters in asked:
        whole = generate(server_url, details=True, **parameters).json
        stream = generate(server_url, "/generate_stream", details=True, **parameters)
        assert b"[DONE]" not in stream.data
        events = stream.events
        assert [event["token"] for event in events] == whole["details"]["tokens"]
        assert events[-1]["generated_text"] == whole["generated_text"]
        assert events[-1]["details"]["seed"] == whole["details"]["seed"] == parameters.get("seed")
        assert events[-1]["details"]["finish_reason"] == whole["details"]["finish_reason"]
        if "top_n_tokens" in parameters:
            assert [event["top_tokens"] for event in events] == whole["details"]["top_tokens"]
        else:
            assert "top_tokens" not in events[0]


def test_a_body_without_parameters_is_sampled_and_one_with_empty_ones_is_not(server_url: str) -> None:
    def told(**body: object) -> set[str]:
        asked = {"inputs": "Once", **body}
        parts = [_beginning(server_url, asked) for _ in range(4)]
        return set(parts)

    assert len(told(parameters={})) == 1
    assert len(told()) > 1


def _beginning(url: str, body: object) -> str:
    """The first tokens of a stream, whose end is not waited for."""
    parts = urlsplit(url)
    assert parts.hostname is not None
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=60)
    try:
        connection.request("POST", "/generate_stream", json.dumps(body), {"content-type": "application/json"})
        response = connection.getresponse()
        return "".join(event["token"]["text"] for event in _first(response, 12))
    finally:
        connection.close()


def _first(response: http.client.HTTPResponse, count: int) -> Iterator[Any]:
    while count:
        line = response.readline().decode()
        assert line, "the stream ended"
        if line.startswith("data:"):
            count -= 1
            event = json.loads(line.removeprefix("data:"))
            yield event
            if event["generated_text"] is not None:
                return


def test_best_of(server_url: str) -> None:
    body = generate(server_url, best_of=2, do_sample=True, details=True, temperature=2).json
    details = body["details"]
    (other,) = details["best_of_sequences"]

    def mean(sequence: Any) -> float:
        return sum(token["logprob"] for token in sequence["tokens"]) / len(sequence["tokens"])

    assert mean(details) >= mean(other)
    again = generate(server_url, details=True, temperature=2, seed=other["seed"]).json
    assert again["generated_text"] == other["generated_text"]


def test_truncate(server_url: str) -> None:
    whole = generate(server_url, inputs="of France is").json
    cut = generate(server_url, inputs="Nothing at all: of France is", truncate=3, return_full_text=True).json
    assert generate(server_url, inputs=" of France is").json != whole  # the space makes other tokens
    assert cut["generated_text"].startswith("Nothing at all: of France is")
    assert cut["generated_text"].endswith(generate(server_url, inputs=" of France is").json["generated_text"])


@pytest.mark.parametrize(
    ("path", "body", "status", "kind"),
    [
        ("/generate", {"inputs": ""}, 422, "validation"),
        ("/generate", {}, 422, "validation"),
        ("/generate", b"{", 422, "validation"),
        ("/generate", b"[]", 422, "validation"),
        ("/generate", {"inputs": "a", "parameters": {"watermark": True}}, 422, "validation"),
        ("/generate", {"inputs": "a", "parameters": {"best_of": 2}}, 422, "validation"),
        ("/generate", {"inputs": "a", "parameters": {"max_new_tokens": 10**9, "stop": ["a"] * 5}}, 422, "validation"),
        ("/generate_stream", {"inputs": "a", "parameters": {"decoder_input_details": True}}, 422, "validation"),
        ("/", {"inputs": "a", "stream": "yes"}, 422, "validation"),
        ("/generate", {"inputs": "a" * 3_000_000}, 413, "validation"),
        ("/tokenize", {"inputs": 3}, 422, "validation"),
    ],
)
def test_refusals(server_url: str, path: str, body: object, status: int, kind: str) -> None:
    answer = ask(server_url, "POST", path, body)
    assert (answer.status, answer.json["error_type"]) == (status, kind)
    assert list(answer.json) == ["error", "error_type"]
    assert len(answer.data) <= 4096


def test_unknown_fields_are_named(server_url: str) -> None:
    body = {"inputs": "a", "model": "m", "parameters": {"max_new_tokens": 1, "num_beams": 2}}
    answer = ask(server_url, "POST", "/generate", body)
    assert answer.status == 200
    assert set(answer.headers["x-headrace-ignored"].split(",")) == {"model", "parameters.num_beams"}


def test_info(server_url: str) -> None:
    info = ask(server_url, "GET", "/info").json
    assert list(info) == [
        *("model_id", "model_sha", "model_pipeline_tag", "max_concurrent_requests", "max_best_of"),
        *("max_stop_sequences", "max_input_tokens", "max_total_tokens", "validation_workers", "max_client_batch_size"),
        *("router", "version", "sha", "docker_label"),
    ]
    assert info["max_input_tokens"] < info["max_total_tokens"]
    assert ask(server_url, "POST", "/info", {}).status == 405


def test_tokens(server_url: str) -> None:
    text = "Ünïcode text"
    found = ask(server_url, "POST", "/tokenize", {"inputs": text}).json
    data = text.encode()
    assert all(list(one) == ["id", "text", "start", "stop"] for one in found)
    assert all(data[one["start"] : one["stop"]].decode() == one["text"] for one in found)
    assert found[-1]["stop"] == len(data)
    posted = ask(server_url, "POST", "/chat_tokenize", CHAT)
    assert posted.json == ask(server_url, "GET", "/chat_tokenize", CHAT).json
    assert "Say héllo." in posted.json["templated_text"]
    assert posted.json["tokenize_response"][0]["text"] == "<|im_start|>"
