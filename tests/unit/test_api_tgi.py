"""TGI's wire format: what is read and what is refused, errors, headers, and the tokens of a text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import decoders, models, pre_tokenizers, processors

from headrace.api.openai import read_chat
from headrace.api.tgi import (
    MAX_ERROR_BYTES,
    Route,
    TgiRequest,
    chat_tokenize_body,
    compute_headers,
    engine_requests,
    error_of_code,
    info_body,
    prompt_headers,
    read_generate,
    read_tokenize,
    tgi_error,
    tokenize_body,
)
from headrace.core.config import EngineConfig
from headrace.core.errors import (
    ContextLengthExceeded,
    DeadlineExceeded,
    EmptyPrompt,
    EngineError,
    HeadraceError,
    InvalidJson,
    InvalidParameter,
    NonFiniteLogits,
    NotReady,
    OutOfMemory,
    QueueFull,
    RequestError,
    ShuttingDown,
    TemplateError,
    Unauthorized,
    UnknownParameter,
    UnsupportedMediaType,
    UnsupportedModel,
    UnsupportedParameter,
)
from headrace.core.types import EngineLimits, Request, SamplingParams
from headrace.engine.model import OpenModel
from headrace.text.parts import TokenizerParts
from headrace.text.tokenizer import Tokenizer, load_tokenizer
from tests.unit.batch_cases import write_tokenizer
from tests.unit.sentencepiece_cases import train
from tests.unit.test_api_openai import Folder
from tests.unit.test_sentencepiece import build

LIMITS = EngineLimits(1000, 2048, frozenset({"poet"}))
GREEDY = SamplingParams(max_tokens=None, include_stop_str_in_output=True, logprobs=0)


def read(route: Route = "/generate", strict: bool = False, /, **parameters: object) -> TgiRequest:
    return read_generate({"inputs": "Hi", "parameters": parameters}, LIMITS, route, strict)


# ---------------------------------------------------------------- reading


def test_defaults() -> None:
    """Without `parameters` it is sampled, with empty ones it is not; the length is the rest of the context."""
    assert read().sampling == GREEDY
    for body in ({"inputs": "Hi"}, {"inputs": "Hi", "parameters": None}):
        assert read_generate(body, LIMITS).sampling == SamplingParams(
            max_tokens=None, temperature=1.0, include_stop_str_in_output=True, logprobs=0
        )


@pytest.mark.parametrize(("name", "value"), [("temperature", 0.5), ("top_k", 3), ("top_p", 0.5), ("typical_p", 0.9)])
def test_one_sampler_turns_sampling_on(name: str, value: float) -> None:
    sampling = read(do_sample=False, **{name: value}).sampling
    assert sampling.temperature == (value if name == "temperature" else 1.0)
    assert getattr(sampling, name) == value
    assert read(do_sample=True).sampling.temperature == 1.0


def test_every_field_arrives() -> None:
    request = read(
        best_of=None, temperature=0.7, repetition_penalty=1.2, frequency_penalty=-2, top_k=5, top_p=0.9, typical_p=0.8,
        do_sample=True, max_new_tokens=9, return_full_text=True, stop=["a", "\n"], truncate=4, watermark=False,
        details=True, decoder_input_details=True, seed=7, top_n_tokens=5, adapter_id="poet",
    )  # fmt: skip
    assert request == TgiRequest(
        "Hi",
        SamplingParams(
            max_tokens=9, temperature=0.7, repetition_penalty=1.2, frequency_penalty=-2.0, top_k=5, top_p=0.9,
            typical_p=0.8, stop=("a", "\n"), include_stop_str_in_output=True, seed=7, logprobs=5, prompt_logprobs=0,
        ),
        return_full_text=True, details=True, prefill=True, top_n_tokens=5, truncate=4, adapter="poet",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("temperature", [0, -1, 0.0, 2.5, True, "1", 10**400, [1]]),
        ("repetition_penalty", [0, -0.1, 10**400, "x"]),
        ("frequency_penalty", [-2.1, 2.1, False]),
        ("top_k", [0, -1, 1.0, 2**31, True]),
        ("top_p", [0, 1, 1.0, 1.5, -0.5]),
        ("typical_p", [0, 1, 2]),
        ("max_new_tokens", [0, -1, 1.5, 2**32]),
        ("stop", ["a", [""], ["a"] * 5, [1], {"a": 1}]),
        ("truncate", [0, 2048, "3"]),
        ("seed", [-1, 2**64, 0.0]),
        ("top_n_tokens", [-1, 6]),
        ("best_of", [0, 3]),
        ("details", [1, "true"]),
        ("decoder_input_details", [0]),
        ("do_sample", ["yes"]),
        ("return_full_text", [1]),
        ("adapter_id", ["nobody", 3, ""]),
    ],
)
def test_out_of_bounds(name: str, bad: list[object]) -> None:
    for value in bad:
        with pytest.raises(InvalidParameter, match=rf"^parameters\.{name}: got .*, allowed: "):
            read(**{name: value})


def test_bounds_themselves() -> None:
    read(temperature=2, repetition_penalty=1e-9, frequency_penalty=2, top_k=2**31 - 1, max_new_tokens=2**32 - 1)
    read(stop=["a"] * 4, truncate=2047, top_n_tokens=0, best_of=1, top_p=0.999, typical_p=1e-9)
    read(temperature=None, stop=None, details=None, grammar=None)


@pytest.mark.parametrize("inputs", ["", None, 3, ["a"], {}])
def test_inputs(inputs: object) -> None:
    with pytest.raises(InvalidParameter, match=r"^inputs: "):
        read_generate({"inputs": inputs}, LIMITS)
    with pytest.raises(InvalidParameter, match=r"^parameters: "):
        read_generate({"inputs": "a", "parameters": [1]}, LIMITS)


def test_seeds_are_unsigned() -> None:
    for seed in (0, 2**63 - 1, 2**63, 2**64 - 1):
        inside = read(seed=seed, do_sample=True).sampling.seed
        assert inside is not None
        assert inside % 2**64 == seed
    assert read(seed=3).sampling.seed is None  # greedy: the draw depends on nothing


def test_best_of() -> None:
    assert read(best_of=2, do_sample=True).sampling.n == 2
    with pytest.raises(InvalidParameter, match="best_of: got 2, allowed: 1, or more beside do_sample"):
        read(best_of=2)
    with pytest.raises(InvalidParameter, match="seed: got 1, allowed: to leave it out"):
        read(best_of=2, do_sample=True, seed=1)
    with pytest.raises(InvalidParameter, match="best_of: got 2, allowed: 1 in a stream"):
        read("/generate_stream", best_of=2, do_sample=True)
    with pytest.raises(InvalidParameter, match="decoder_input_details: got True, allowed: false in a stream"):
        read("/generate_stream", decoder_input_details=True)


def test_routes_differ() -> None:
    def asked(route: Route, **body: object) -> tuple[bool, bool, bool]:
        request = read_generate({"inputs": "a", **body}, LIMITS, route)
        return request.stream, request.listed, request.return_full_text

    assert asked("/") == (False, True, True)
    assert asked("/", stream=True) == (True, False, True)
    assert asked("/", parameters={"return_full_text": False}) == (False, True, False)
    assert asked("/generate", stream=True) == (False, False, False)
    assert asked("/generate_stream", stream=False) == (True, False, False)


def test_grammars() -> None:
    assert read(grammar={"type": "regex", "value": "a+"}).grammar
    assert read().grammar == ""
    with pytest.raises(InvalidParameter, match="grammar"):
        read(grammar={"type": "regex", "value": 3})


def test_unknown_fields_are_named_or_refused() -> None:
    body = {"inputs": "a", "model": "m", "parameters": {"num_beams": 4, "né\n": 1, "top_k": None}}
    assert set(read_generate(body, LIMITS).ignored) == {"model", "parameters.num_beams", "parameters.n??"}
    with pytest.raises(UnknownParameter, match="num_beams"):
        read_generate(body, LIMITS, strict=True)
    with pytest.raises(UnsupportedParameter, match=r"parameters\.watermark: got True"):
        read(watermark=True)


# ---------------------------------------------------------------- requests of the engine


@pytest.fixture(scope="module")
def opened(demo_path: Path) -> Any:
    model = OpenModel(EngineConfig(model=str(demo_path), max_model_len=64))
    yield model
    model.close()


@pytest.mark.demo
def test_engine_requests(opened: OpenModel) -> None:
    def requests(text: str, **parameters: object) -> tuple[Request, ...]:
        body = {"inputs": text, "parameters": parameters}
        return engine_requests(read_generate(body, opened.limits), opened, "id", "salt")

    (one,) = requests("Hello there, you", max_new_tokens=3)
    assert (one.id, one.salt, one.grammar, one.adapter) == ("id", "salt", "", "")
    assert one.token_ids == opened.encode("Hello there, you")
    assert requests("Hello there, you", truncate=2)[0].token_ids == one.token_ids[-2:]
    first, second = requests("Hello", best_of=2, do_sample=True)
    assert (first.id, second.id) == ("id/0", "id/1")
    assert first.sampling.seed != second.sampling.seed is not None
    # What is asked for must fit beside the prompt, up to 1024 tokens of it.
    count = len(one.token_ids)
    assert requests("Hello there, you", max_new_tokens=64 - count)
    with pytest.raises(ContextLengthExceeded, match=f"at most 64, got {count} and {65 - count}"):
        requests("Hello there, you", max_new_tokens=65 - count)
    with pytest.raises(ContextLengthExceeded):
        requests("word " * 80)
    assert requests("word " * 80, truncate=63)


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("error", "status", "kind", "prefix"),
    [
        (InvalidParameter("inputs", "", "a string"), 422, "validation", "Input validation error: inputs: "),
        (InvalidJson("not JSON"), 422, "validation", "Input validation error: "),
        (ContextLengthExceeded("long"), 422, "validation", "Input validation error: "),
        (EmptyPrompt("empty"), 422, "validation", "Input validation error: "),
        (UnsupportedModel("no such thing"), 422, "validation", "Input validation error: "),
        (TemplateError("bad"), 422, "template_error", "Template error: "),
        (Unauthorized("no key"), 401, "unauthorized", "no key"),
        (UnsupportedMediaType("text"), 415, "validation", "Input validation error: "),
        (QueueFull("128 wait"), 429, "overloaded", "Model is overloaded: 128"),
        (DeadlineExceeded("late"), 408, "generation", "Request failed during generation: "),
        (EngineError("broke"), 424, "generation", "Request failed during generation: "),
        (NonFiniteLogits("nan"), 424, "generation", "Request failed during generation: "),
        (OutOfMemory("full"), 424, "generation", "Request failed during generation: "),
        (HeadraceError("odd"), 500, "incomplete_generation", "Incomplete generation: "),
        (NotReady("loading"), 503, "overloaded", "Model is overloaded: "),
        (ShuttingDown("bye"), 503, "overloaded", "Model is overloaded: "),
    ],
)
def test_errors(error: HeadraceError, status: int, kind: str, prefix: str) -> None:
    found, body = tgi_error(error)
    assert (found, body["error_type"]) == (status, kind)
    assert body["error"].startswith(prefix)
    assert list(body) == ["error", "error_type"]
    assert error_of_code(error.code, str(error)) == (status, body)


def test_no_fault_of_a_request_is_400() -> None:
    pending: list[type[HeadraceError]] = [HeadraceError]
    while pending:
        cls = pending.pop()
        pending += cls.__subclasses__()
        status, body = error_of_code(cls.code, "why")
        assert status != 400
        assert body["error_type"]
        if issubclass(cls, RequestError) and cls.status == 400:
            assert status == 422


def test_errors_are_short() -> None:
    status, body = tgi_error(InvalidParameter("inputs", "\U0001f600" * 9000, "\U0001f600" * 9000))
    assert status == 422
    assert len(json.dumps(body)) <= MAX_ERROR_BYTES
    assert "\n" not in tgi_error(TemplateError("two\nlines"))[1]["error"]


# ---------------------------------------------------------------- headers, info, tokens


def test_headers() -> None:
    headers = compute_headers(total_s=1.25, validation_s=0.125, queue_s=0.25, prompt_tokens=3, generated_tokens=4)
    assert headers == {
        "x-compute-time": "1.250000000",
        "x-total-time": "1250",
        "x-validation-time": "125",
        "x-queue-time": "250",
        "x-inference-time": "875",
        "x-time-per-token": "218",
        "x-prompt-tokens": "3",
        "x-generated-tokens": "4",
    }
    assert prompt_headers("native", 1) == {"x-compute-type": "native", "x-compute-characters": "1"}


def test_info() -> None:
    info = info_body("m", LIMITS, 160, 2)
    assert list(info) == [
        *("model_id", "model_sha", "model_pipeline_tag", "max_concurrent_requests", "max_best_of"),
        *("max_stop_sequences", "max_input_tokens", "max_total_tokens", "validation_workers", "max_client_batch_size"),
        *("router", "version", "sha", "docker_label"),
    ]
    assert (info["max_input_tokens"], info["max_total_tokens"], info["model_id"]) == (2047, 2048, "m")


@pytest.fixture(scope="module")
def with_bos() -> Tokenizer:
    """Bytes as tokens, and a <s> that the tokenizer puts before every text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = RawTokenizer(models.BPE({token: i for i, token in enumerate(["<s>", *alphabet])}, []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens(["<s>"])
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return Tokenizer(TokenizerParts(raw, frozenset(), 0, {}, None), "tokenizer.json")


def test_offsets_are_bytes(with_bos: Tokenizer) -> None:
    found = tokenize_body(with_bos, "aéb<s>")
    assert [(one["text"], one["start"], one["stop"]) for one in found] == [
        *(("", 0, 0), ("a", 0, 1), ("é", 1, 3), ("é", 1, 3), ("b", 3, 4), ("<s>", 4, 7))
    ]
    assert [one["id"] for one in found] == with_bos.encode("aéb<s>")
    assert list(found[0]) == ["id", "text", "start", "stop"]
    assert tokenize_body(with_bos, "", add_special_tokens=False) == []
    with pytest.raises(RequestError, match="surrogate"):
        tokenize_body(with_bos, "\ud800")


def test_tokens_of_a_chat(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    tokenizer = load_tokenizer(Folder(tmp_path, {}))  # type: ignore[arg-type]
    body = chat_tokenize_body(read_chat({"messages": [{"role": "user", "content": "Hé"}]}), tokenizer)
    tokenizer.close()
    assert list(body) == ["tokenize_response", "templated_text"]
    assert body["templated_text"] == "<|user|>Hé</s><|assistant|>"
    assert [one["text"] for one in body["tokenize_response"]] == ["<|user|>", "H", "é", "é", "</s>", "<|assistant|>"]
    assert body["tokenize_response"][-1]["stop"] == len(body["templated_text"].encode())


@given(text=st.text(max_size=30))
def test_slices_are_the_texts_own(with_bos: Tokenizer, text: str) -> None:
    data = text.encode()
    found = tokenize_body(with_bos, text)
    assert all(data[one["start"] : one["stop"]].decode() == one["text"] for one in found)
    covered = {at for one in found for at in range(one["start"], one["stop"])}
    assert covered == set(range(len(data)))


@pytest.mark.parametrize("text", ["the fox", " the  fox ", "日本", "a\u2028b", "", "the</s> fox", "</s>the", "x" * 50])
def test_offsets_of_sentencepiece(text: str) -> None:
    tokenizer = build(train("llama"))
    found = tokenize_body(tokenizer, text)
    assert [one["id"] for one in found] == tokenizer.encode(text)
    assert found[0] == {"id": tokenizer.bos_token_id, "text": "", "start": 0, "stop": 0}
    data = text.encode()
    assert b"".join(data[one["start"] : one["stop"]] for one in found) == data
    assert [one["start"] for one in found[2:]] == [one["stop"] for one in found[1:-1]]


def test_a_text_that_is_changed_before_it_is_split_has_no_offsets() -> None:
    found = tokenize_body(build(train("collapse")), "the   fox ")
    assert found
    assert all((one["text"], one["start"], one["stop"]) == ("", 0, 0) for one in found)


def test_reading_tokenize() -> None:
    assert read_tokenize({"inputs": "a", "parameters": {"x": 1}, "other": 2}) == ("a", ("other",))
    assert read_tokenize({"inputs": ""}) == ("", ())
    with pytest.raises(InvalidParameter, match=r"^inputs: "):
        read_tokenize({"inputs": 3})
    with pytest.raises(UnknownParameter, match="other"):
        read_tokenize({"inputs": "a", "other": 2}, strict=True)
