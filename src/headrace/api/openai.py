"""Bodies of POST /v1/chat/completions and /v1/completions, read strictly.

A field is one of four kinds. Honoured: it shapes the answer. Inert (`INERT`): clients send it, it never has an effect
on an answer. Unsupported (`NEUTRAL`): it would have an effect that this version does not carry out, so only the values
that ask for nothing pass. Everything else is unknown: refused, or left aside and named. null is the same as absent.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, Literal, cast

from headrace.api.errors import cut
from headrace.api.fields import Fields, Unknown, check_unicode, refuse_unsupported
from headrace.api.messages import read_messages
from headrace.api.structured import read_grammar
from headrace.api.tool_parsers import ToolParser, make_parser
from headrace.api.tools import (
    MARKERS,
    MISTRAL_MARKERS,
    ToolChoice,
    ToolSpec,
    read_tool_choice,
    read_tools,
    tool_grammar,
    tool_style,
)
from headrace.core.errors import InvalidParameter, ModelNotFound, UnsupportedParameter, shorten
from headrace.core.types import MAX_INT, MAX_LOGPROBS, Request, SamplingParams
from headrace.engine.images import Encoded, Picture, image_parts, refuse_images
from headrace.engine.model import Message, OpenModel, Prompt
from headrace.text.chat_tools import fit_tools
from headrace.text.tokenizer import Tokenizer

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
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "moderation": (),
    "web_search_options": (),
    "reasoning_effort": (),
    "include_reasoning": (True,),
    "thinking_token_budget": (-1,),
    "verbosity": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_decoding_backend": (),
    "grammar": (),
    "suffix": ("",),
    "prompt_embeds": (),
    "continue_final_message": (False,),
    "use_beam_search": (False,),
    "length_penalty": (1, 1.0),
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
    *("allowed_token_ids", "bad_words", "typical_p"),
)
"""Fields that SamplingParams takes, and checks, under the same name."""
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
    tools: tuple[ToolSpec, ...] = ()
    """Functions that the model may call (chat)."""
    tool_choice: ToolChoice = field(default_factory=ToolChoice)
    parallel_tool_calls: bool = True
    """Whether one answer may hold several calls."""
    grammar: str = ""
    """What each answer must be a word of, in llguidance's form; empty: anything. That of calls is not in it: it depends
    on the model."""
    truncate_prompt_tokens: int | None = None
    """Only so many tokens of a prompt are kept, the last ones; -1: as many as leave room for the answer."""
    ignored: tuple[str, ...] = ()
    """Names of fields that no route knows, in printable ASCII."""
    salt: str = ""
    priority: int = 0
    timeout_s: float | None = None

    @property
    def choices(self) -> int:
        """How many answers."""
        return len(self.prompts) * self.sampling.n

    @property
    def has_images(self) -> bool:
        """Whether any message has an image among its parts."""
        return self.kind == "chat" and any(any(image_parts(messages)) for messages in self.prompts)

    def without_messages(self) -> ApiRequest:
        """All that an answer is made of once its prompt is in ids: images may be megabytes."""
        return replace(self, prompts=((),) * len(self.prompts)) if self.kind == "chat" else self


def read_body(kind: Kind, body: Mapping[str, Any], strict: bool = True) -> ApiRequest:
    """A decoded JSON body as what it asks for. Raises RequestError; nothing is tokenised yet.

    `strict`: refuse fields that no route knows; otherwise they are named in `ignored`.
    """
    return (read_chat if kind == "chat" else read_completions)(body, strict)


def read_chat(body: Mapping[str, Any], strict: bool = True) -> ApiRequest:
    """A body of /v1/chat/completions. Raises RequestError."""
    unknown = Unknown(strict)
    fields = Fields(body, unknown)
    check_unicode(body)
    messages = read_messages(fields.take("messages"), unknown)
    older, max_tokens = (fields.integer(name, 1, MAX_INT) for name in ("max_tokens", "max_completion_tokens"))
    max_tokens = older if max_tokens is None else max_tokens
    wanted = fields.flag("logprobs")
    top = fields.integer("top_logprobs", 0, MAX_LOGPROBS)
    if top is not None and not wanted:
        raise InvalidParameter("top_logprobs", top, "a number only beside logprobs: true")
    variables = _variables(fields)
    tools = read_tools(fields.take("tools"), unknown)
    choice = read_tool_choice(fields.take("tool_choice"), tools, unknown)
    parallel = fields.flag("parallel_tool_calls", True)
    refuse_unsupported({"echo": fields.take("echo", False)}, {"echo": (False,)})
    refuse_unsupported({"add_special_tokens": fields.flag("add_special_tokens")}, {"add_special_tokens": (False,)})
    request = _common(
        fields,
        unknown,
        "chat",
        (messages,),
        max_tokens=max_tokens,
        logprobs=(top or 0) if wanted else None,
        variables=variables,
        tools=tools,
        tool_choice=choice,
        parallel_tool_calls=parallel,
    )
    if request.grammar and choice.mode != "none":
        name = "response_format" if body.get("response_format") is not None else "structured_outputs"
        raise InvalidParameter(name, body[name], "one that leaves the answer free beside tools, or tool_choice: none")
    return request


def read_completions(body: Mapping[str, Any], strict: bool = True) -> ApiRequest:
    """A body of /v1/completions. Raises RequestError."""
    unknown = Unknown(strict)
    fields = Fields(body, unknown)
    check_unicode(body)
    return _common(
        fields,
        unknown,
        "completions",
        _prompts(fields.take("prompt")),
        max_tokens=fields.take("max_tokens", COMPLETION_MAX_TOKENS),
        logprobs=fields.integer("logprobs", 0, MAX_LOGPROBS),
        echo=fields.flag("echo"),
        add_special_tokens=fields.flag("add_special_tokens", True),
    )


def _common(
    fields: Fields,
    unknown: Unknown,
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
    truncate = fields.integer("truncate_prompt_tokens", -1, 2**31 - 1)
    if truncate == 0 or (truncate is not None and echo):
        allowed = "to leave it out beside echo" if echo else "-1, or a number of tokens from 1 on"
        raise InvalidParameter("truncate_prompt_tokens", truncate, allowed)
    stream, usage, continuous = _stream(fields, unknown)
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
        grammar=_grammar(fields),
        truncate_prompt_tokens=truncate,
        **form,
    )
    fields.finish("this body", INERT, NEUTRAL)
    return replace(request, ignored=tuple(unknown.names))


def _grammar(fields: Fields) -> str:
    """Of `response_format` and `structured_outputs`; empty where they leave the answer free. Raises RequestError."""
    return read_grammar(fields.take("response_format"), fields.take("structured_outputs"))


def _stream(fields: Fields, unknown: Unknown) -> tuple[bool, bool, bool]:
    """(stream, usage in a last chunk, usage in every chunk)."""
    stream = fields.flag("stream")
    options = fields.take("stream_options")
    if options is None:
        return stream, False, False
    if not isinstance(options, dict):
        raise InvalidParameter("stream_options", options, "an object")
    if not stream:
        raise InvalidParameter("stream_options", options, "an object only beside stream: true")
    inside = Fields(options, unknown, "stream_options.")
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


def _variables(fields: Fields) -> dict[str, object]:
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
    continued = fields.flag("continue_final_message")
    prompted = fields.flag("add_generation_prompt", not continued)
    if continued:
        if prompted:
            raise InvalidParameter("add_generation_prompt", True, "false beside continue_final_message: true")
        variables["continue_final_message"] = True
    if not prompted:
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
    tool_parser: str = "auto",
) -> tuple[Request, ...]:
    """One engine request a choice, numbered prompt × n + i; their ids begin with `label`. `now`: what the template's
    clock says, the machine's own time if None. `tool_parser`: how the model writes calls (`api.tools.tool_style`).
    Raises RequestError."""
    grammar = request.grammar or _call_grammar(request, opened, tool_parser)
    sampling = request.sampling
    if request.tools and request.tool_choice.mode != "none":
        style = tool_style(opened.tokenizer.chat_template, tool_parser)
        if _special_ids(opened.tokenizer, MARKERS[style]):
            sampling = replace(sampling, skip_special_tokens=False)
    found: list[Request] = []
    for index, prompt in enumerate(request.prompts):
        encoded = _truncated(request, opened, _encode(request, opened, prompt, now))
        for one in opened.requests(f"{label}/{index}", encoded, sampling, arrival_s, adapter):
            deadline_s = None if request.timeout_s is None else arrival_s + request.timeout_s
            found.append(
                replace(one, salt=request.salt, priority=request.priority, deadline_s=deadline_s, grammar=grammar)
            )
    return tuple(found)


def _encode(request: ApiRequest, opened: OpenModel, prompt: Prompt, now: datetime | None) -> Prompt:
    if request.kind == "chat":
        messages = cast("Sequence[Message]", prompt)
        described = [tool.described() for tool in request.tools] if request.tool_choice.mode != "none" else []
        shown = None
        if described or any(message["role"] == "tool" or "tool_calls" in message for message in messages):
            seen = _seen(messages, opened)
            messages, shown = fit_tools(opened.tokenizer.chat_template or "", seen, described)
        return opened.encode_chat(messages, now=now, tools=shown, **request.variables)
    if isinstance(prompt, str) and not request.add_special_tokens:
        return opened.encode_text(prompt, add_special_tokens=False)
    return prompt


def _seen(messages: Sequence[Message], opened: OpenModel) -> Sequence[Message]:
    """Messages with their images as tiles: what is wrong with one names its message as the client counts them, before
    others are put between them for tools."""
    if opened.images is None:
        refuse_images(messages)
        return messages
    places = [
        (part["image_url"]["url"], f"messages[{place}].content[{index}].image_url.url")
        for place, message in enumerate(messages)
        for index, part in enumerate(_parts(message))
        if part["type"] == "image_url"
    ]
    found = iter(opened.images.prepare([Picture(url, where) for url, where in places]))

    def shown(part: Mapping[str, Any]) -> Mapping[str, Any]:
        return {"type": "image", "image": next(found)} if part["type"] == "image_url" else part

    return [{**one, "content": [shown(part) for part in parts]} if (parts := _parts(one)) else one for one in messages]


def _parts(message: Message) -> Sequence[Mapping[str, Any]]:
    """Those of its content; none where that is a text."""
    content = message.get("content")
    return content if isinstance(content, list) else ()


def _truncated(request: ApiRequest, opened: OpenModel, prompt: Prompt) -> Prompt:
    most = request.truncate_prompt_tokens
    if most is None:
        return prompt
    if most < 0:
        longest, answer = opened.limits.max_model_len, request.sampling.max_tokens or 1
        most = longest - answer if answer < longest else longest - 1  # a longer answer is cut anyway
    # However long it is: what is asked for is its end.
    if isinstance(prompt, str):
        return opened.tokenizer.encode(prompt)[-most:]
    return last_tokens(opened.encode_prompt(prompt), most, "truncate_prompt_tokens")


def last_tokens(encoded: Encoded, most: int, name: str) -> Encoded:
    """The last `most` ids of a prompt, ≥ 1, and the images that are whole in them. Raises InvalidParameter, naming the
    field `name`, where the cut would go through an image."""
    gone = max(0, len(encoded.token_ids) - most)
    for image in encoded.images:
        if image.start < gone < image.start + image.length:
            least = len(encoded.token_ids) - image.start
            raise InvalidParameter(name, most, f"a number that cuts through no image, such as {least}")
    images = tuple(replace(image, start=image.start - gone) for image in encoded.images if image.start >= gone)
    return Encoded(encoded.token_ids[gone:], images)


def _call_grammar(request: ApiRequest, opened: OpenModel, tool_parser: str) -> str:
    """The grammar of the calls that the body requires; empty if it requires none."""
    if request.tool_choice.mode not in ("required", "named"):
        return ""
    style = tool_style(opened.tokenizer.chat_template, tool_parser)
    markers = _special_ids(opened.tokenizer, MISTRAL_MARKERS) if style == "mistral" else {}
    return tool_grammar(request.tools, request.tool_choice, style, request.parallel_tool_calls, markers)


def call_parsers(request: ApiRequest, opened: OpenModel, tool_parser: str = "auto") -> list[ToolParser] | None:
    """What reads the calls out of each choice; None where no tools are offered."""
    if not request.tools:
        return None
    style = tool_style(opened.tokenizer.chat_template, tool_parser)
    tools, choice, parallel = request.tools, request.tool_choice, request.parallel_tool_calls
    return [make_parser(style, tools, choice, parallel) for _ in range(request.choices)]


def _special_ids(tokenizer: Tokenizer, texts: Sequence[str]) -> dict[str, int]:
    """Those of the texts that are special tokens, which no text of an answer shows."""
    found: dict[str, int] = {}
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=False)
        if len(ids) == 1 and not tokenizer.tokens(ids, skip_special_tokens=True):
            found[text] = ids[0]
    return found
