"""TGI's answers: their exact shape, and that a stream says what a whole answer says."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from tokenizers import pre_tokenizers

from headrace.api.answers import LOWEST
from headrace.api.tgi import TgiRequest, read_generate
from headrace.api.tgi_answers import TgiStream, best_of, generate_body
from headrace.core.errors import EngineError
from headrace.core.types import EngineLimits, FinishEvent, FinishReason, Request, SamplingParams, TokenEvent
from headrace.core.types import TokenLogprobs as Scored
from headrace.engine.answer import Answer, Completion
from headrace.text.tokenizer import Tokenizer
from tests.unit.test_api_tgi import GREEDY, LIMITS, read
from tests.unit.test_detokenize import DECODERS, ids_of, make


@dataclass
class Opened:
    """What a stream needs of an opened model."""

    tokenizer: Tokenizer
    eos_token_ids: frozenset[int]
    limits: EngineLimits = field(default_factory=lambda: LIMITS)


def byte_level() -> Opened:
    """A token is a byte; 256 spells " the", 261 is the special <s>, which ends an answer."""
    tokenizer = make("byte_level")
    return Opened(tokenizer, frozenset({token_id(tokenizer, "<s>")}))


def token_id(tokenizer: Tokenizer, token: str) -> int:
    found = tokenizer.raw.token_to_id(token)
    assert found is not None
    return found


def spelled(text: str) -> list[int]:
    """Ids of `byte_level`."""
    table = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
    return [token_id(make("byte_level"), char) for char in table[0][0]] if text else []


def scored(token_id: int) -> Scored:
    """Logprobs of a token: its own and two alternatives, the last of them impossible."""
    return Scored(-token_id / 8, ((token_id, -token_id / 8), (0, float("-inf"))))


@dataclass
class Told:
    completion: Completion
    events: list[dict[str, Any]]
    raw: bytes


def tell(
    request: TgiRequest,
    opened: Opened,
    ids: list[int],
    prompt: tuple[int, ...] = (1,),
    cuts: tuple[int, ...] = (),
    late_end: bool = False,
    seed: int | None = None,
) -> Told:
    """Plays the engine: the tokens up to the one that ends the answer, then its end; and takes the stream of it.
    `late_end`: the stream hears of the last token before it hears of the end."""
    sampling = request.sampling
    asked = Request("r", prompt, SamplingParams(**{**_fields(sampling), "n": 1, "seed": seed}))
    answer = Answer(0, asked, opened.tokenizer, 0.0)
    stream = TgiStream(request, asked, opened)  # type: ignore[arg-type]
    most = min(sampling.max_tokens or 2**32, LIMITS.max_model_len - len(prompt))
    ids = ids[:most]
    end = next((at + 1 for at, one in enumerate(ids) if one in opened.eos_token_ids), None)
    ids, reason = (ids[:end], FinishReason.STOP) if end else (ids, FinishReason.LENGTH)
    raw = stream.start([answer])
    bounds = [0, *sorted({cut % (len(ids) + 1) for cut in cuts} - {0, len(ids)}), len(ids)]
    for low, high in pairwise(bounds):
        scores = tuple(map(scored, ids[low:high]))
        told = (None, *map(scored, prompt[1:]))[1:] if low == 0 else ()
        if answer.tokens(TokenEvent("r", tuple(ids[low:high]), scores, 1.0 + low, told)) is not None:  # type: ignore[arg-type]
            reason = FinishReason.STOP
            late_end = True
            break
        if high < len(ids):
            raw += stream.delta(0, answer)
    if late_end:
        raw += stream.delta(0, answer)
    completion = answer.end(FinishEvent("r", reason, len(prompt), answer.num_tokens, 0, 9.0))
    raw += stream.end(0, answer, completion) + stream.finish([completion])
    assert raw.endswith(b"\n\n")
    events = raw.decode("ascii").removesuffix("\n\n").split("\n\n")
    assert all(event.startswith("data:{") and "\n" not in event for event in events)
    return Told(completion, [json.loads(event.removeprefix("data:")) for event in events], raw)


def _fields(sampling: SamplingParams) -> dict[str, Any]:
    return {name: getattr(sampling, name) for name in SamplingParams.__dataclass_fields__}


def whole(request: TgiRequest, opened: Opened, *completions: Completion) -> Any:
    return generate_body(request, completions, opened.tokenizer, opened.eos_token_ids)


def test_the_shape_of_a_whole_answer() -> None:
    opened = byte_level()
    (eos,) = opened.eos_token_ids
    ids = [256, *spelled("n"), eos]
    prompt = tuple(spelled("Hé"))
    bare = tell(read(), opened, ids, prompt).completion
    assert whole(read(), opened, bare) == {"generated_text": " then"}
    request = read(decoder_input_details=True, top_n_tokens=1)
    body = whole(request, opened, tell(request, opened, ids, prompt).completion)
    n = ids[1]
    tokens = [
        {"id": 256, "text": " the", "logprob": -32.0, "special": False},
        {"id": n, "text": "n", "logprob": -n / 8, "special": False},
        {"id": eos, "text": "<s>", "logprob": -eos / 8, "special": True},
    ]
    assert json.dumps(body) == json.dumps(
        {
            "generated_text": " then",
            "details": {
                "finish_reason": "eos_token",
                "generated_tokens": 3,
                "seed": None,
                "prefill": [
                    {"id": prompt[0], "text": "H", "logprob": None},
                    {"id": prompt[1], "text": "\ufffd", "logprob": -prompt[1] / 8},
                    {"id": prompt[2], "text": "\ufffd", "logprob": -prompt[2] / 8},
                ],
                "tokens": tokens,
                "top_tokens": [[token] for token in tokens],
            },
        }
    )


def test_full_text_and_the_array() -> None:
    opened = byte_level()
    request = read_generate({"inputs": "Hi", "parameters": {}}, LIMITS, "/")
    told = tell(request, opened, spelled("!"), tuple(spelled("Hi")))
    assert whole(request, opened, told.completion) == [{"generated_text": "Hi!"}]
    streamed = tell(read("/", return_full_text=True), opened, spelled("!"), tuple(spelled("Hi")))
    assert streamed.events[-1]["generated_text"] == "Hi!"
    assert streamed.events[-1]["token"]["text"] == "!"


def test_why_it_ended() -> None:
    opened = byte_level()
    (eos,) = opened.eos_token_ids

    def reason(ids: list[int], **parameters: object) -> str:
        request = read(details=True, **parameters)
        told = tell(request, opened, ids)
        details = whole(request, opened, told.completion)["details"]
        assert told.events[-1]["details"]["finish_reason"] == details["finish_reason"]
        return str(details["finish_reason"])

    assert reason(spelled("abc"), max_new_tokens=3) == "length"
    assert reason([*spelled("ab"), eos]) == "eos_token"
    assert reason([*spelled("ab"), eos], stop=["c"]) == "eos_token"
    assert reason([*spelled("ab"), eos], max_new_tokens=3) == "length"  # TGI looks at the length first
    assert reason(spelled("abc"), stop=["x", "b"]) == "stop_sequence"


def test_an_end_that_no_client_knows() -> None:
    opened = byte_level()
    completion = Completion(0, 0, (1,), tuple(spelled("a")), "a", "abort", logprobs=(scored(1),))
    with pytest.raises(EngineError, match="'abort'"):
        whole(read(), opened, completion)


def test_a_stop_string_stays_and_what_follows_it_goes() -> None:
    """The token that completes it may say more than it: that is left out of its text too."""
    opened = byte_level()
    the = [*spelled("a"), 256, *spelled("z")]  # "a", " the", "z"
    request = read(stop=["t"], details=True)
    told = tell(request, opened, the)
    body = whole(request, opened, told.completion)
    assert body["generated_text"] == "a t"
    assert [token["text"] for token in body["details"]["tokens"]] == ["a", " t"]
    assert [event["token"]["text"] for event in told.events] == ["a", " t"]
    assert told.events[-1]["generated_text"] == "a t"


def test_the_best_of_two() -> None:
    opened = byte_level()
    request = read(best_of=2, do_sample=True, details=True, top_n_tokens=1)
    low = tell(request, opened, spelled("zz"), seed=-1).completion
    high = tell(request, opened, [3], seed=5).completion
    assert best_of([low, high]) is high
    assert best_of([high, high]) is high
    body = whole(request, opened, low, high)
    assert list(body["details"]) == [
        *("finish_reason", "generated_tokens", "seed", "prefill", "tokens", "best_of_sequences", "top_tokens")
    ]
    assert body["details"]["seed"] == 5
    (other,) = body["details"]["best_of_sequences"]
    assert other["generated_text"] == "zz"
    assert other["seed"] == 2**64 - 1
    assert list(other) == [
        *("generated_text", "finish_reason", "generated_tokens", "seed", "prefill", "tokens", "top_tokens")
    ]


def test_numbers_that_json_lacks() -> None:
    opened = byte_level()
    request = read(details=True, top_n_tokens=5)
    ids = [0, 1]
    told = tell(request, opened, ids)
    worst = Completion(0, 0, (1,), (0,), told.completion.text[:1], "length", logprobs=(Scored(float("-inf")),))
    assert whole(request, opened, worst)["details"]["tokens"][0]["logprob"] == LOWEST
    assert told.events[0]["top_tokens"][1]["logprob"] == LOWEST


# ---------------------------------------------------------------- streams


def test_the_bytes_of_a_stream() -> None:
    opened = byte_level()
    a, b = spelled("ab")
    request = read("/generate_stream", max_new_tokens=2, details=True)
    assert tell(request, opened, [a, b], (1, 2)).raw.decode() == (
        f'data:{{"index":1,"token":{{"id":{a},"text":"a","logprob":{-a / 8},"special":false}},'
        '"generated_text":null,"details":null}\n\n'
        f'data:{{"index":2,"token":{{"id":{b},"text":"b","logprob":{-b / 8},"special":false}},'
        '"generated_text":"ab","details":{"finish_reason":"length","generated_tokens":2,"seed":null,"input_length":2}}\n\n'
    )
    request = read("/generate_stream", max_new_tokens=1, top_n_tokens=1)
    assert tell(request, opened, [a]).raw.decode() == (
        f'data:{{"index":1,"token":{{"id":{a},"text":"a","logprob":{-a / 8},"special":false}},'
        f'"top_tokens":[{{"id":{a},"text":"a","logprob":{-a / 8},"special":false}}],'
        '"generated_text":"a","details":null}\n\n'
    )


def test_characters_that_split_lines_are_escaped() -> None:
    opened = byte_level()
    text = "a\u2028b\u2029c\x85d\r\n\x1e"
    told = tell(read("/generate_stream"), opened, spelled(text))
    assert len(told.raw.decode().splitlines()) == 2 * len(told.events)
    assert told.events[-1]["generated_text"] == text
    # The three bytes of U+2028 are three tokens; the last of them has the character.
    assert [event["token"]["text"] for event in told.events[:5]] == ["a", "", "", "\u2028", "b"]


def test_half_a_character_at_the_end() -> None:
    opened = byte_level()
    (eos,) = opened.eos_token_ids
    half = spelled("é")[:1]
    told = tell(read("/generate_stream"), opened, [*spelled("a"), *half])
    assert [event["token"]["text"] for event in told.events] == ["a", "\ufffd"]
    told = tell(read("/generate_stream"), opened, [*half, eos])
    assert [event["token"]["text"] for event in told.events] == ["", "\ufffd<s>"]
    assert told.events[-1]["generated_text"] == "\ufffd"


def test_a_token_that_may_be_the_last_waits_for_the_end() -> None:
    """Even where the stream hears of the token first, every token is told once and the last has the text."""
    opened = byte_level()
    (eos,) = opened.eos_token_ids
    for ids, parameters in (([*spelled("ab"), eos], {}), (spelled("abc"), {"max_new_tokens": 3})):
        told = tell(read("/generate_stream", **parameters), opened, ids, late_end=True)  # type: ignore[arg-type]
        assert [event["index"] for event in told.events] == [1, 2, 3]
        assert [event["generated_text"] is None for event in told.events] == [True, True, False]


def test_an_end_that_no_token_shows_has_an_event_of_its_own() -> None:
    opened = byte_level()
    told = tell(read("/generate_stream"), opened, spelled("ab"), late_end=True)
    assert [event["token"]["text"] for event in told.events] == ["a", "b", ""]
    assert told.events[-1]["generated_text"] == "ab"


def test_an_error_ends_a_stream() -> None:
    opened = byte_level()
    asked = Request("r", (1,), GREEDY)
    stream = TgiStream(read("/generate_stream"), asked, opened)  # type: ignore[arg-type]
    assert stream.error("engine_fault", "it\nbroke") == (
        b'data:{"error":"Request failed during generation: it broke","error_type":"generation"}\n\n'
    )


STOPS = st.lists(st.sampled_from([" ", "a", "the", "é", "\ufffd", "ab", " t", "日本"]), max_size=3, unique=True)


@pytest.mark.parametrize("name", DECODERS)
@given(data=st.data())
def test_a_stream_says_what_a_whole_answer_says(name: str, data: st.DataObject) -> None:
    tokenizer = make(name)
    eos = token_id(tokenizer, "<s>")
    opened = Opened(tokenizer, frozenset({eos}))
    ids = data.draw(ids_of(name)) + data.draw(st.sampled_from([[], [eos]]))
    assume(ids)
    prompt = tuple(data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), min_size=1, max_size=3)))
    most = data.draw(st.sampled_from([None, 1, 2, 5]))
    parameters = {"stop": data.draw(STOPS), "max_new_tokens": most, "details": True, "top_n_tokens": 2}
    cuts = tuple(data.draw(st.lists(st.integers(0, 40), max_size=6)))
    told = tell(read("/generate_stream", **parameters), opened, ids, prompt, cuts)  # type: ignore[arg-type]
    request = read(**parameters)  # type: ignore[arg-type]
    body = whole(request, opened, told.completion)
    details = body["details"]
    count = details["generated_tokens"]
    assert [event["index"] for event in told.events] == list(range(1, count + 1))
    assert [event["token"] for event in told.events] == details["tokens"]
    assert [event["top_tokens"] for event in told.events] == details["top_tokens"]
    assert [event["generated_text"] for event in told.events] == [None] * (count - 1) + [body["generated_text"]]
    assert told.events[-1]["details"]["finish_reason"] == details["finish_reason"]
    assert body["generated_text"].lstrip(" ") == told.completion.text.lstrip(" ")
    plain = "".join(token["text"] for token in details["tokens"] if not token["special"])
    last = details["tokens"][-1]
    if last["special"]:  # what the end left of a character stands before it
        plain += last["text"].removesuffix(tokenizer.tokens([last["id"]], False)[0])
    assert plain == body["generated_text"]


@pytest.mark.parametrize("name", ["metaspace", "spm", "none"])
def test_the_text_goes_on_from_the_prompt(name: str) -> None:
    """Alone, a first token "▁a" would lose its space, and the prompt and the answer would run into each other."""
    tokenizer = make(name)
    opened = Opened(tokenizer, frozenset())
    a, b = (token_id(tokenizer, token) for token in ("▁a", "b"))
    request = read(details=True)
    for prompt, expected in (((b,), " "), ((token_id(tokenizer, "<s>"),), "")):
        completion = tell(request, opened, [a, b], prompt).completion
        body = whole(request, opened, completion)
        assert body["generated_text"] == expected + completion.text
        assert "".join(token["text"] for token in body["details"]["tokens"]) == body["generated_text"]
