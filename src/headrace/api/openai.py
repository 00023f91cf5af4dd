"""Bodies of POST /v1/chat/completions and /v1/completions, read strictly.

A field is one of four kinds. Honoured: it shapes the answer. Inert (`INERT`): clients send it, it never has an effect
on an answer. Unsupported (`NEUTRAL`): it would have an effect that this version does not carry out, so only the values
that ask for nothing pass. Everything else is unknown and refused. null is the same as absent.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, Literal

from headrace.api.errors import cut
from headrace.core.errors import InvalidParameter, ModelNotFound, UnknownParameter, UnsupportedParameter, shorten
from headrace.core.types import MAX_LOGPROBS, Request, SamplingParams
from headrace.engine.model import OpenModel, Prompt

Kind = Literal["chat", "completions"]
URLS: Mapping[str, Kind] = {"/v1/chat/completions": "chat", "/v1/completions": "completions"}
COMPLETION_MAX_TOKENS = 16
"""The length of a completion that names none (the default of the OpenAI route)."""
MAX_CHOICES = 1024
"""Most answers to one body: prompts × n."""

INERT = frozenset(
    {"user", "metadata", "store", "service_tier", "safety_identifier", "request_id"}
    | {"prompt_cache_key", "prompt_cache_options", "prompt_cache_retention"}
)
NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "moderation": (),
    "web_search_options": (),
    "reasoning_effort": (),
    "include_reasoning": (True,),
    "thinking_token_budget": (-1,),
    "verbosity": (),
    "structured_outputs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_decoding_backend": (),
    "grammar": (),
    "suffix": ("",),
    "prompt_embeds": (),
    "truncate_prompt_tokens": (),
    "continue_final_message": (False,),
    "use_beam_search": (False,),
    "length_penalty": (1, 1.0),
    "typical_p": (1, 1.0),
    "watermark": (False,),
    "spaces_between_special_tokens": (True,),
    "logits_processors": ([],),
    "mm_processor_kwargs": ({},),
    "images": ([],),
}
"""Field -> the values of it that ask for nothing; every other value is refused as unsupported."""

ONE_TO_ONE = (
    *("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "seed"),
    *("stop", "stop_token_ids", "include_stop_str_in_output", "ignore_eos", "skip_special_tokens", "min_tokens", "n"),
    *("allowed_token_ids", "bad_words"),
)
"""Fields that SamplingParams takes, and checks, under the same name."""
ROLES = ("system", "developer", "user", "assistant")
MESSAGE_FIELDS = frozenset({"role", "content", "name", "reasoning", "reasoning_content", "thinking"})
MESSAGE_NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "refusal": (),
    "audio": (),
    "tool_calls": ([],),
    "function_call": (),
    "tool_call_id": (),
}
RESERVED_VARIABLES = frozenset(
    {"messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "tokenize", "now"}
)
_TOKEN_ID = re.compile(r"[0-9]{1,10}", re.ASCII)


@dataclass(frozen=True, slots=True)
class ApiRequest:
    """What one body asks for."""

    kind: Kind
    model: str | None
    prompts: tuple[Prompt, ...]
    """Messages (chat: one conversation), texts or token ids (completions)."""
    sampling: SamplingParams
    """For each prompt; `n` answers to each."""
    variables: Mapping[str, object] = field(default_factory=dict)
    """For the chat template: `chat_template_kwargs`, `documents`, `add_generation_prompt`."""
    add_special_tokens: bool = True
    """Whether a text prompt gets the tokenizer's own beginning (completions)."""
    echo: bool = False
    """The prompt stands before each answer (completions)."""
    prompt_logprobs: int | None = None
    """Log-probabilities of the prompt, in the field of this name."""
    return_token_ids: bool = False
    tokens_as_ids: bool = False
    """Tokens in log-probabilities are spelled `token_id:5`."""
    stream: bool = False
    stream_usage: bool = False
    """A last chunk has the usage."""
    continuous_usage: bool = False
    """Every chunk has the usage."""
    salt: str = ""
    priority: int = 0
    timeout_s: float | None = None

    @property
    def choices(self) -> int:
        """How many answers."""
        return len(self.prompts) * self.sampling.n


class _Fields:
    """The fields of a body; what nobody has taken is refused at the end."""

    def __init__(self, body: Mapping[str, Any]) -> None:
        self._left = {name: value for name, value in body.items() if value is not None}

    def take(self, name: str, default: Any = None) -> Any:
        return self._left.pop(name, default)

    def flag(self, name: str, default: bool = False) -> bool:
        value = self.take(name, default)
        if not isinstance(value, bool):
            raise InvalidParameter(name, value, "true or false")
        return value

    def integer(self, name: str, low: int, high: int) -> int | None:
        value = self.take(name)
        if value is not None and (type(value) is not int or not low <= value <= high):
            raise InvalidParameter(name, value, f"an integer from {low} to {high}")
        return value

    def text(self, name: str, most: int) -> str | None:
        value = self.take(name)
        if value is not None and (not isinstance(value, str) or not value or len(value) > most):
            raise InvalidParameter(name, value, f"a string of 1 to {most} characters")
        return value

    def finish(self, where: str) -> None:
        """Raises UnsupportedParameter or UnknownParameter for what is left."""
        left = {name: value for name, value in self._left.items() if name not in INERT}
        refuse_unsupported(left, NEUTRAL)
        for name in left:
            if name not in NEUTRAL:
                raise UnknownParameter(name, where)


def refuse_unsupported(fields: Mapping[str, Any], neutral: Mapping[str, tuple[object, ...]], prefix: str = "") -> None:
    """Raises UnsupportedParameter for a field of `neutral` with another value than those that ask for nothing."""
    for name, value in fields.items():
        values = neutral.get(name)
        if values is not None and not any(type(value) is type(one) and value == one for one in values):
            allowed = " or ".join(["to leave it out", *(repr(one) for one in values)])
            raise UnsupportedParameter(prefix + name, value, allowed)


def read_body(kind: Kind, body: Mapping[str, Any]) -> ApiRequest:
    """A decoded JSON body as what it asks for. Raises RequestError; nothing is tokenised yet."""
    return read_chat(body) if kind == "chat" else read_completions(body)


def read_chat(body: Mapping[str, Any]) -> ApiRequest:
    """A body of /v1/chat/completions. Raises RequestError."""
    fields = _Fields(body)
    messages = _messages(fields.take("messages"))
    max_tokens = fields.take("max_tokens")
    max_tokens = fields.take("max_completion_tokens", max_tokens)
    wanted = fields.flag("logprobs")
    top = fields.integer("top_logprobs", 0, MAX_LOGPROBS)
    if top is not None and not wanted:
        raise InvalidParameter("top_logprobs", top, "a number only beside logprobs: true")
    variables = _variables(fields)
    refuse_unsupported({"echo": fields.take("echo", False)}, {"echo": (False,)})
    refuse_unsupported({"add_special_tokens": fields.flag("add_special_tokens")}, {"add_special_tokens": (False,)})
    return _common(
        fields, "chat", (messages,), max_tokens=max_tokens, logprobs=(top or 0) if wanted else None, variables=variables
    )


def read_completions(body: Mapping[str, Any]) -> ApiRequest:
    """A body of /v1/completions. Raises RequestError."""
    fields = _Fields(body)
    return _common(
        fields,
        "completions",
        _prompts(fields.take("prompt")),
        max_tokens=fields.take("max_tokens", COMPLETION_MAX_TOKENS),
        logprobs=fields.integer("logprobs", 0, MAX_LOGPROBS),
        echo=fields.flag("echo"),
        add_special_tokens=fields.flag("add_special_tokens", True),
    )


def _common(
    fields: _Fields,
    kind: Kind,
    prompts: tuple[Prompt, ...],
    *,
    max_tokens: object,
    logprobs: int | None,
    echo: bool = False,
    **form: Any,
) -> ApiRequest:
    """What both routes read alike; `form`: fields of ApiRequest that only one of them has."""
    prompt_logprobs = fields.integer("prompt_logprobs", 0, MAX_LOGPROBS)
    scored = [one for one in (prompt_logprobs, logprobs if echo else None) if one is not None]
    given: dict[str, Any] = {"temperature": 1.0, "max_tokens": max_tokens, "logprobs": logprobs}
    given["prompt_logprobs"] = max(scored, default=None)
    given["logit_bias"] = _logit_bias(fields.take("logit_bias", {}))
    given |= {name: value for name in ONE_TO_ONE if (value := fields.take(name)) is not None}
    sampling = SamplingParams(**given)
    best_of = fields.integer("best_of", 1, 2**31)
    if best_of is not None and best_of != sampling.n:
        raise UnsupportedParameter("best_of", best_of, f"n ({sampling.n}), or to leave it out")
    if len(prompts) * sampling.n > MAX_CHOICES:
        raise InvalidParameter("n", sampling.n, f"prompts × n up to {MAX_CHOICES}")
    stream, usage, continuous = _stream(fields)
    request = ApiRequest(
        kind=kind,
        model=fields.text("model", 1024),
        prompts=prompts,
        sampling=sampling,
        echo=echo,
        prompt_logprobs=prompt_logprobs,
        return_token_ids=fields.flag("return_token_ids"),
        tokens_as_ids=fields.flag("return_tokens_as_token_ids"),
        stream=stream,
        stream_usage=usage,
        continuous_usage=continuous,
        salt=fields.text("cache_salt", 1024) or "",
        priority=fields.integer("priority", -(2**31), 2**31 - 1) or 0,
        timeout_s=_timeout(fields.take("timeout")),
        **form,
    )
    fields.finish("this body")
    return request


def _stream(fields: _Fields) -> tuple[bool, bool, bool]:
    """(stream, usage in a last chunk, usage in every chunk)."""
    stream = fields.flag("stream")
    options = fields.take("stream_options")
    if options is None:
        return stream, False, False
    if not isinstance(options, dict):
        raise InvalidParameter("stream_options", options, "an object")
    if not stream:
        raise InvalidParameter("stream_options", options, "an object only beside stream: true")
    inside = _Fields(options)
    usage, continuous = inside.flag("include_usage"), inside.flag("continuous_usage_stats")
    inside.take("include_obfuscation")  # padding against eavesdroppers; there is none here
    inside.finish("stream_options")
    return stream, usage or continuous, continuous


def _timeout(value: object) -> float | None:
    if value is None:
        return None
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 < value <= 86_400 or not math.isfinite(value):  # type: ignore[operator, arg-type]
        raise InvalidParameter("timeout", value, "seconds above 0, up to 86400")
    return float(value)  # type: ignore[arg-type]


def _logit_bias(value: object) -> dict[int, object]:
    if not isinstance(value, dict):
        raise InvalidParameter("logit_bias", value, "{token id: number from -100 to 100}")
    for key in value:
        if not _TOKEN_ID.fullmatch(key):
            raise InvalidParameter("logit_bias", key, "token ids as keys")
    return {int(key): bias for key, bias in value.items()}


def _prompts(value: object) -> tuple[Prompt, ...]:
    """Each of the four forms as a tuple of texts or of token ids."""
    if isinstance(value, str):
        return (value,)
    if isinstance(value, list) and value:
        if all(isinstance(one, str) for one in value):
            return tuple(value)
        if _are_ids(value):
            return (tuple(value),)
        if all(isinstance(one, list) and one and _are_ids(one) for one in value):
            return tuple(tuple(one) for one in value)
    raise InvalidParameter("prompt", value, "a string, token ids, or a list of strings or of lists of token ids")


def _are_ids(values: Iterable[object]) -> bool:
    return all(type(value) is int for value in values)


def _messages(value: object) -> tuple[Mapping[str, object], ...]:
    if not isinstance(value, list) or not value:
        raise InvalidParameter("messages", value, "a list of at least one message")
    return tuple(_message(message, f"messages[{i}]") for i, message in enumerate(value))


def _message(message: object, where: str) -> Mapping[str, object]:
    if not isinstance(message, dict):
        raise InvalidParameter(where, message, "an object with role and content")
    given = {name: value for name, value in message.items() if value is not None}
    role = given.get("role")
    if role in ("tool", "function"):
        raise UnsupportedParameter(f"{where}.role", role, ", ".join(ROLES))
    if role not in ROLES:
        raise InvalidParameter(f"{where}.role", role, ", ".join(ROLES))
    refuse_unsupported(given, MESSAGE_NEUTRAL, prefix=f"{where}.")
    for name, value in given.items():
        if name not in MESSAGE_FIELDS and name not in MESSAGE_NEUTRAL:
            raise UnknownParameter(f"{where}.{cut(name)}", "a message")
        if name != "content" and name in MESSAGE_FIELDS and not isinstance(value, str):
            raise InvalidParameter(f"{where}.{name}", value, "a string")
    _check_content(given.get("content"), f"{where}.content")
    return {name: value for name, value in given.items() if name in MESSAGE_FIELDS}


def _check_content(content: object, where: str) -> None:
    if isinstance(content, str):
        return
    if not isinstance(content, list) or not content:
        raise InvalidParameter(where, content, "a string, or a list of text parts")
    for i, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(kind, str) and kind != "text":
            raise UnsupportedParameter(f"{where}[{i}].type", kind, "text")
        if not isinstance(part, dict) or set(part) != {"type", "text"} or not isinstance(part["text"], str):
            raise InvalidParameter(f"{where}[{i}]", part, 'an object {"type": "text", "text": …}')


def _variables(fields: _Fields) -> dict[str, object]:
    """What the chat template is given. A client brings no template: it would run here, on everyone's machine."""
    template = fields.take("chat_template")
    if template is not None:
        raise UnsupportedParameter("chat_template", template, "the model's own template, so to leave it out")
    given = fields.take("chat_template_kwargs", {})
    if not isinstance(given, dict):
        raise InvalidParameter("chat_template_kwargs", given, "an object")
    for name in given:
        if name in RESERVED_VARIABLES or "template" in name:
            raise UnsupportedParameter(f"chat_template_kwargs.{cut(name)}", given[name], "other variables")
    variables = {name: value for name, value in given.items() if not name.endswith("_token")}
    if len(variables) != len(given):
        name = next(name for name in given if name not in variables)
        raise UnsupportedParameter(f"chat_template_kwargs.{cut(name)}", given[name], "the model's own special tokens")
    if (documents := fields.take("documents")) is not None:
        if not isinstance(documents, list) or not all(isinstance(one, dict) for one in documents):
            raise InvalidParameter("documents", documents, "a list of objects")
        variables["documents"] = documents
    if not fields.flag("add_generation_prompt", True):
        variables["add_generation_prompt"] = False
    return variables


def check_model(request: ApiRequest, served: Sequence[str]) -> str:
    """The model that a body names, the first of `served` where it names none. Raises ModelNotFound."""
    if request.model is None:
        return served[0]
    if request.model not in served:
        raise ModelNotFound(f"model: got {shorten(request.model)}, allowed: {', '.join(served)}")
    return request.model


def engine_requests(
    request: ApiRequest,
    opened: OpenModel,
    label: str,
    arrival_s: float = 0.0,
    adapter: str = "",
    now: datetime | None = None,
) -> tuple[Request, ...]:
    """One engine request a choice, numbered prompt × n + i; their ids begin with `label`. `now`: what the template's
    clock says, the machine's own time if None. Raises RequestError."""
    found: list[Request] = []
    for index, prompt in enumerate(request.prompts):
        ids = _encode(request, opened, prompt, now)
        for one in opened.requests(f"{label}/{index}", ids, request.sampling, arrival_s, adapter):
            deadline_s = None if request.timeout_s is None else arrival_s + request.timeout_s
            found.append(replace(one, salt=request.salt, priority=request.priority, deadline_s=deadline_s))
    return tuple(found)


def _encode(request: ApiRequest, opened: OpenModel, prompt: Prompt, now: datetime | None) -> Prompt:
    if request.kind == "chat":
        return opened.tokenizer.chat(prompt, now=now, **request.variables)  # type: ignore[arg-type]
    if isinstance(prompt, str) and not request.add_special_tokens:
        return opened.tokenizer.encode(prompt, add_special_tokens=False)
    return prompt
