"""Bodies of the TGI routes (text-generation-inference, router of 2026-01): what it takes, how it answers, to the field.

Where a number of a body has no bound of TGI's own, the engine's holds. Names that TGI does not know it ignores; so are
they here, and listed in `TgiRequest.ignored`. null is the same as absent.

For a model that sees, markdown images in `inputs` are images in their places: `![](URL)`, where the URL has a scheme.

Three things that surprise, all TGI's own: a body without `parameters` is sampled and one with `parameters: {}` is not;
`POST /` puts the prompt before the answer unless it is told otherwise; a stop string stays at the end of the text.
"""

from __future__ import annotations

import re
import secrets
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, Literal, cast

from headrace import __version__
from headrace.api.errors import MAX_MESSAGE, cut
from headrace.api.fields import Fields, Unknown
from headrace.api.json import dump
from headrace.api.openai import ApiRequest, last_tokens
from headrace.api.structured import read_tgi_grammar
from headrace.core.errors import (
    ContextLengthExceeded,
    EngineError,
    HeadraceError,
    InvalidParameter,
    TemplateError,
    UnsupportedParameter,
    status_of,
)
from headrace.core.types import EngineLimits, Request, SamplingParams
from headrace.engine.images import Encoded, ImagePrompt, image_parts
from headrace.engine.model import Message, OpenModel
from headrace.text.chat_tools import fit_tools
from headrace.text.sentencepiece import SentencePiece
from headrace.text.spm_normalizer import SPACE
from headrace.text.tokenizer import Tokenizer

Route = Literal["/", "/generate", "/generate_stream"]
MAX_BEST_OF = 2
MAX_STOP = 4
MAX_TOP_N = 5
MAX_CLIENT_BATCH = 4
RESERVED_TOKENS = 1024
"""Of a longer `max_new_tokens` only this much must fit beside the prompt; the answer then ends with the context."""
PREFIX = "parameters."
# Neither part may hold an opening bracket, but for an address of IPv6: no text makes the search go over it twice.
_IMAGE = re.compile(r"!\[[^\[\]]*\]\(([a-zA-Z][a-zA-Z0-9+.-]*:(?://\[[0-9a-fA-F:.]{2,45}\])?[^\s)\[\]]*)\)")
SEEDS = 2**64
"""A seed of TGI is an unsigned integer of 64 bits; the engine has the same bits as a signed one."""


@dataclass(frozen=True, slots=True)
class TgiRequest:
    """What one body asks for."""

    inputs: str
    sampling: SamplingParams
    """`n` is best_of."""
    stream: bool = False
    listed: bool = False
    """The answer is the only element of an array (POST /)."""
    return_full_text: bool = False
    """The prompt stands before the text."""
    details: bool = False
    prefill: bool = False
    """The details have the prompt's tokens."""
    top_n_tokens: int = 0
    truncate: int | None = None
    """Only so many of the prompt's last tokens count."""
    grammar: str = ""
    """In llguidance's own form; empty: none."""
    adapter: str = ""
    ignored: tuple[str, ...] = ()
    """Fields of the body that nothing was done with."""

    @property
    def may_have_images(self) -> bool:
        """False where a model that sees finds none for sure. Costs next to nothing, however long the text is."""
        return "![" in self.inputs and "](" in self.inputs

    def without_inputs(self) -> TgiRequest:
        """All that an answer is made of once its prompt is in ids: images may be megabytes."""
        return self if self.return_full_text else replace(self, inputs="")


def read_generate(
    body: Mapping[str, Any], limits: EngineLimits, route: Route = "/generate", strict: bool = False
) -> TgiRequest:
    """A decoded JSON body as what it asks for. `strict`: a field that TGI does not know is refused.

    Raises RequestError; nothing is tokenised yet.
    """
    unknown = Unknown(strict)
    top = Fields(body, unknown)
    inputs = top.take("inputs")
    if not isinstance(inputs, str) or not inputs:
        raise InvalidParameter("inputs", inputs, "a string of at least one character")
    given = top.take("parameters")
    if given is not None and not isinstance(given, dict):
        raise InvalidParameter("parameters", given, "an object")
    asked = top.flag("stream")
    stream = {"/": asked, "/generate": False, "/generate_stream": True}[route]
    fields = Fields(given or {}, unknown, PREFIX)
    details, prefill = fields.flag("details"), fields.flag("decoder_input_details")
    if prefill and stream:
        raise InvalidParameter(PREFIX + "decoder_input_details", prefill, "false in a stream")
    top_n_tokens = fields.integer("top_n_tokens", 0, MAX_TOP_N) or 0
    sampling = SamplingParams(
        **_choice(fields, stream, fields.flag("do_sample", default=given is None)),
        max_tokens=fields.integer("max_new_tokens", 1, 2**32 - 1),
        stop=_stop(fields.take("stop", [])),
        include_stop_str_in_output=True,
        logprobs=top_n_tokens,
        prompt_logprobs=0 if prefill else None,
    )
    request = TgiRequest(
        inputs=inputs,
        sampling=sampling,
        stream=stream,
        listed=route == "/" and not stream,
        return_full_text=fields.flag("return_full_text", default=route == "/"),
        details=details or prefill,
        prefill=prefill,
        top_n_tokens=top_n_tokens,
        truncate=fields.integer("truncate", 1, limits.max_model_len - 1),
        grammar=read_tgi_grammar(fields.take("grammar")),
        adapter=_adapter(fields.take("adapter_id"), limits),
    )
    fields.finish("parameters", neutral={"watermark": (False,)})
    top.finish("this body")
    return replace(request, ignored=tuple(unknown.names))


def _choice(fields: Fields, stream: bool, do_sample: bool) -> dict[str, Any]:
    """How tokens are chosen, as fields of SamplingParams. Any of the first four turns sampling on."""
    given = {
        "temperature": _number(fields, "temperature", 0, 2, above=True),
        "top_k": fields.integer("top_k", 1, 2**31 - 1),
        "top_p": _number(fields, "top_p", 0, 1, above=True, below=True),
        "typical_p": _number(fields, "typical_p", 0, 1, above=True, below=True),
    }
    given = {name: value for name, value in given.items() if value is not None}
    sampled = do_sample or bool(given)
    best_of = fields.integer("best_of", 1, MAX_BEST_OF) or 1
    seed = fields.integer("seed", 0, SEEDS - 1)
    if best_of > 1 and stream:
        raise InvalidParameter(PREFIX + "best_of", best_of, "1 in a stream")
    if best_of > 1 and not sampled:
        raise InvalidParameter(PREFIX + "best_of", best_of, "1, or more beside do_sample: true")
    if best_of > 1 and seed is not None:
        raise InvalidParameter(PREFIX + "seed", seed, "to leave it out when best_of is above 1")
    found: dict[str, Any] = {"temperature": 1.0, **given, "n": best_of} if sampled else {"n": best_of}
    if sampled and seed is not None:
        found["seed"] = seed if seed < SEEDS // 2 else seed - SEEDS
    penalties = {
        "repetition_penalty": _number(fields, "repetition_penalty", 0, sys.float_info.max, above=True),
        "frequency_penalty": _number(fields, "frequency_penalty", -2, 2),
    }
    return found | {name: value for name, value in penalties.items() if value is not None}


def _number(
    fields: Fields, name: str, low: float, high: float, above: bool = False, below: bool = False
) -> float | None:
    """A number from `low` to `high`; `above`, `below`: without that bound itself."""
    value = fields.take(name)
    if value is None:
        return None
    if (
        type(value) not in (int, float)
        or not low <= value <= high
        or (above and value == low)
        or (below and value == high)
    ):
        lower = f"above {low}" if above else f"from {low}"
        upper = "" if high == sys.float_info.max else f", below {high}" if below else f" up to {high}"
        raise InvalidParameter(PREFIX + name, value, f"a number {lower}{upper}")
    return float(value)


def _stop(value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or len(value) > MAX_STOP or not all(isinstance(one, str) and one for one in value):
        raise InvalidParameter(PREFIX + "stop", value, f"a list of up to {MAX_STOP} strings, none of them empty")
    return tuple(value)


def _adapter(value: object, limits: EngineLimits) -> str:
    if value is None:
        return ""
    if not isinstance(value, str) or value not in limits.adapters:
        allowed = ", ".join(sorted(limits.adapters)) or "none, since no adapter is loaded"
        raise InvalidParameter(PREFIX + "adapter_id", value, allowed)
    return value


def engine_requests(request: TgiRequest, opened: OpenModel, label: str, salt: str = "") -> tuple[Request, ...]:
    """One engine request for each of the answers of which the best is told. Raises RequestError."""
    encoded = _encode(request, opened)
    if request.truncate is not None:
        encoded = last_tokens(encoded, request.truncate, PREFIX + "truncate")
    wanted, room, count = request.sampling.max_tokens, opened.limits.max_model_len, len(encoded.token_ids)
    if wanted is not None and count + min(wanted, RESERVED_TOKENS) > room:
        raise ContextLengthExceeded(f"inputs tokens + max_new_tokens must be at most {room}, got {count} and {wanted}")
    found = opened.requests(label, encoded, request.sampling, adapter=request.adapter)
    return tuple(replace(one, salt=salt, grammar=request.grammar) for one in found)


def _encode(request: TgiRequest, opened: OpenModel) -> Encoded:
    # However long the text is, where only its end is asked for.
    encode = opened.encode_text if request.truncate is None else opened.tokenizer.encode
    if opened.images is not None and request.may_have_images:
        prompt = image_prompt(request.inputs)
        if prompt.images:
            return opened.images.encode_prompt(prompt, encode)
    return Encoded(tuple(encode(request.inputs)))


def image_prompt(inputs: str) -> ImagePrompt:
    """A text with markdown images as one with their places marked. What has no scheme, `![logo](logo.png)`, stays text;
    errors call the images `inputs[0]`, `inputs[1]` …"""
    pieces = _IMAGE.split(inputs)
    mark = f"<{secrets.token_hex(16)}>"  # nobody can type it
    names = [f"inputs[{index}]" for index in range(len(pieces) // 2)]
    return ImagePrompt(mark.join(pieces[::2]), pieces[1::2], names, mark, "inputs")


# ---------------------------------------------------------------- errors

_PREFIX: Mapping[str, str] = {
    "validation": "Input validation error",
    "template_error": "Template error",
    "generation": "Request failed during generation",
    "overloaded": "Model is overloaded",
    "incomplete_generation": "Incomplete generation",
}
_TYPE_OF_STATUS: Mapping[int, str] = {
    400: "validation",
    408: "generation",
    413: "validation",
    415: "validation",
    422: "validation",
    429: "overloaded",
    501: "validation",
    503: "overloaded",
}
"""The type that clients map to what happened. Other statuses, which TGI has no type for, have their code as type."""
MAX_ERROR_BYTES = 4096
MAX_SHORT_MESSAGE = 250
"""Characters of a message whose body would be larger: ASCII JSON may take 12 bytes for each."""


def tgi_error(error: HeadraceError) -> tuple[int, dict[str, str]]:
    """(HTTP status, body) of an error. A fault of the request is 422: some clients take a 400 for another server's."""
    return error_of_code(error.code, str(error))


def error_of_code(code: str, message: str) -> tuple[int, dict[str, str]]:
    """The same of an error that has only a code and a message."""
    status = status_of(code)
    if code in (TemplateError.code, "tool_error", "missing_template_variable"):
        status, kind = 422, code
    elif code in _codes(EngineError):
        status, kind = 424, "generation"
    elif status == 500:
        kind = "incomplete_generation"
    else:
        kind = _TYPE_OF_STATUS.get(status, code)
        status = 422 if status in (400, 501) else status
    text = " ".join(message.split())
    body = {"error": cut(f"{_PREFIX[kind]}: {text}" if kind in _PREFIX else text, MAX_MESSAGE), "error_type": kind}
    if len(dump(body)) > MAX_ERROR_BYTES:
        body["error"] = cut(body["error"], MAX_SHORT_MESSAGE)
    return status, body


def _codes(cls: type[HeadraceError]) -> set[str]:
    return {cls.code}.union(*(_codes(below) for below in cls.__subclasses__()))


# ---------------------------------------------------------------- the server itself


def info_body(model_id: str, limits: EngineLimits, max_concurrent_requests: int, workers: int) -> dict[str, Any]:
    """The body of GET /info."""
    return {
        "model_id": model_id,
        "model_sha": None,
        "model_pipeline_tag": "text-generation" if limits.images is None else "image-text-to-text",
        "max_concurrent_requests": max_concurrent_requests,
        "max_best_of": MAX_BEST_OF,
        "max_stop_sequences": MAX_STOP,
        "max_input_tokens": limits.max_model_len - 1,
        "max_total_tokens": limits.max_model_len,
        "validation_workers": workers,
        "max_client_batch_size": MAX_CLIENT_BATCH,
        "router": "text-generation-router",
        "version": __version__,
        "sha": None,
        "docker_label": None,
    }


def prompt_headers(compute_type: str, characters: int) -> dict[str, str]:
    """Headers of every answer. `characters`: of the prompt."""
    return {"x-compute-type": compute_type, "x-compute-characters": str(characters)}


def compute_headers(
    *, total_s: float, validation_s: float, queue_s: float, prompt_tokens: int, generated_tokens: int
) -> dict[str, str]:
    """Headers of a whole answer beside those; times in whole milliseconds, but for x-compute-time, in seconds.

    `total_s`: from the first byte of the request to the answer, of it `validation_s` before it was queued and `queue_s`
    before it was run; the rest is inference.
    """
    inference_s = max(0.0, total_s - validation_s - queue_s)
    times_s = {
        "x-total-time": total_s,
        "x-validation-time": validation_s,
        "x-queue-time": queue_s,
        "x-inference-time": inference_s,
        "x-time-per-token": inference_s / max(1, generated_tokens),
    }
    return {
        "x-compute-time": f"{total_s:.9f}",
        **{name: str(int(seconds * 1000)) for name, seconds in times_s.items()},
        "x-prompt-tokens": str(prompt_tokens),
        "x-generated-tokens": str(generated_tokens),
    }


# ---------------------------------------------------------------- tokens of a text


def read_tokenize(body: Mapping[str, Any], strict: bool = False) -> tuple[str, tuple[str, ...]]:
    """(text, names of ignored fields) of a body `{"inputs"}`; its `parameters` play no part. Raises RequestError."""
    unknown = Unknown(strict)
    fields = Fields(body, unknown)
    text = fields.take("inputs")
    if not isinstance(text, str):
        raise InvalidParameter("inputs", text, "a string")
    fields.finish("this body", inert=frozenset({"parameters"}))
    return text, tuple(unknown.names)


def chat_tokenize_body(request: ApiRequest, tokenizer: Tokenizer) -> dict[str, Any]:
    """What a chat is to the model: its template's text, and the tokens of that. Raises RequestError, EngineError."""
    messages = cast("Sequence[Message]", request.prompts[0])
    for where in image_parts(messages):
        raise UnsupportedParameter(f"{where}.type", "image_url", "text: an image's tokens are no part of a text")
    described = [tool.described() for tool in request.tools] if request.tool_choice.mode != "none" else []
    messages, shown = fit_tools(tokenizer.chat_template or "", messages, described)
    text = tokenizer.render(messages, tools=shown, **request.variables)
    return {"tokenize_response": tokenize_body(tokenizer, text, add_special_tokens=False), "templated_text": text}


def tokenize_body(tokenizer: Tokenizer, text: str, add_special_tokens: bool = True) -> list[dict[str, Any]]:
    """Each token with the slice of the text that it stands for, `start` and `stop` in bytes of its UTF-8.

    What the tokenizer adds stands for nothing: "" at 0. Where a tokenizer changes the text before it splits it, so that
    tokens have no slices, all have that, as with TGI. Raises RequestError.
    """
    ids = tokenizer.encode(text, add_special_tokens)
    data = text.encode()
    if isinstance(tokenizer.raw, SentencePiece):
        spans = _piece_spans(tokenizer.raw, ids, tokenizer.encode(text, False), data)
    else:
        spans = list(tokenizer.raw.encode(text, add_special_tokens=add_special_tokens).offsets)
        if len(data) != len(text):
            starts = [0, *accumulate(len(char.encode()) for char in text)]
            spans = [(starts[start], starts[stop]) for start, stop in spans]
    return [
        {"id": token_id, "text": data[start:stop].decode(errors="replace"), "start": start, "stop": stop}
        for token_id, (start, stop) in zip(ids, spans, strict=True)
    ]


def _piece_spans(
    raw: SentencePiece, ids: Sequence[int], plain_ids: Sequence[int], data: bytes
) -> list[tuple[int, int]]:
    """Where the pieces of a text lie, if they spell it to the byte; else nowhere. `plain_ids`: without additions."""
    nowhere = [(0, 0)] * len(ids)
    added = next((at for at in range(len(ids) + 1) if ids[at : at + len(plain_ids)] == plain_ids), 0)
    spans: list[tuple[int, int]] = []
    at, fresh = 0, True
    for token_id in plain_ids:
        token = raw.id_to_token(token_id) or ""
        byte = raw.byte_values.get(token)
        special = token in raw.special
        spelled = token.replace(SPACE, " ").encode() if byte is None and not special else token.encode()
        if byte is not None:
            spelled = bytes([byte])
        elif fresh and not special and raw.drops_first_space and spelled.startswith(b" "):
            spelled = spelled[1:]  # the space that is put before a text, and after a special token
        if not data.startswith(spelled, at):
            return nowhere
        spans.append((at, at + len(spelled)))
        at += len(spelled)
        fresh = special
    return [*nowhere[:added], *spans, *nowhere[added + len(spans) :]] if at == len(data) else nowhere
