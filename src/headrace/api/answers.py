"""Answer bodies of the OpenAI routes, from completions. Key order is fixed, so equal answers are equal bytes.

What a whole answer and a stream (`api/stream.py`) have in common is said once, here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from headrace.api.openai import ApiRequest
from headrace.api.tokens import Offsets, TokenNames, prompt_text
from headrace.api.tool_parsers import CallArguments, CallStart, TextPart, ToolParser
from headrace.core.errors import EngineError
from headrace.core.types import TokenLogprobs
from headrace.engine.answer import Completion
from headrace.text.tokenizer import Tokenizer

LOWEST = -9999.0
"""Stands for minus infinity, which JSON cannot say."""


@dataclass(frozen=True, slots=True)
class Stamp:
    """What the body says of itself."""

    id: str
    """Without the prefix of its kind."""
    created: int
    """Seconds since 1970."""
    model: str
    system_fingerprint: str


def answer_body(
    request: ApiRequest,
    stamp: Stamp,
    completions: Sequence[Completion],
    tokenizer: Tokenizer | None,
    cached_tokens: bool = True,
    parsers: Sequence[ToolParser] | None = None,
) -> dict[str, Any]:
    """The body of a whole answer: `chat.completion` or `text_completion`.

    `completions`: one a choice, in the order of `api.openai.engine_requests`, none of them failed. `tokenizer`: None
    for a model without one (its texts are empty). `cached_tokens`: whether the usage says how many prompt tokens were
    reused, which depends on what ran before. `parsers`: a fresh one a choice, where a chat has tools.
    """
    names = TokenNames(tokenizer, request.tokens_as_ids)
    body = heading(request, stamp, streamed=False)
    if request.kind == "chat":
        body["choices"] = [
            _chat_choice(request, stamp, index, one, None if parsers is None else parsers[index], names)
            for index, one in enumerate(completions)
        ]
    else:
        body["choices"] = [_text_choice(request, index, one, tokenizer, names) for index, one in enumerate(completions)]
    body["usage"] = usage(request, completions, cached_tokens)
    if request.kind == "chat":
        body |= prompt_fields(request, completions[0].prompt_token_ids, completions[0].prompt_logprobs, names)
    return body


def heading(request: ApiRequest, stamp: Stamp, streamed: bool) -> dict[str, Any]:
    """What a body, or every chunk of a stream, begins with."""
    kind, prefix = "text_completion", "cmpl"
    if request.kind == "chat":
        kind, prefix = "chat.completion.chunk" if streamed else "chat.completion", "chatcmpl"
    return {
        "id": f"{prefix}-{stamp.id}",
        "object": kind,
        "created": stamp.created,
        "model": stamp.model,
        "system_fingerprint": stamp.system_fingerprint,
    }


def usage(request: ApiRequest, completions: Sequence[Completion], cached_tokens: bool = True) -> dict[str, Any]:
    """Tokens of a body's answers; a prompt counts once, however many answers it has.

    The token that ended an answer counts: it was computed.
    """
    firsts = completions[:: request.sampling.n]
    return usage_of(
        prompt=sum(len(one.prompt_token_ids) for one in firsts),
        output=sum(len(one.token_ids) for one in completions),
        cached=sum(one.cached_tokens for one in firsts) if cached_tokens else None,
    )


def usage_of(prompt: int, output: int, cached: int | None = None) -> dict[str, Any]:
    """The `usage` object of these numbers of tokens; `cached`: None where it is not told."""
    counts: dict[str, Any] = {
        "prompt_tokens": prompt,
        "completion_tokens": output,
        "total_tokens": prompt + output,
    }
    if cached is not None:
        counts["prompt_tokens_details"] = {"cached_tokens": cached}
    counts["completion_tokens_details"] = {"reasoning_tokens": 0}
    return counts


def finish_reason(completion: Completion, called: bool = False) -> str:
    """Why an answer ended, as clients know it; `called`: it holds tool calls. Raises EngineError on any other end."""
    if completion.finish_reason not in ("stop", "length"):
        raise EngineError(f"an answer ended with {completion.finish_reason!r}, which no client knows")
    return "tool_calls" if called and completion.finish_reason == "stop" else completion.finish_reason


def call_object(stamp: Stamp, choice: int, call: CallStart) -> dict[str, Any]:
    """A tool call without its arguments. Its id is made of where it stands: the same, streamed or not."""
    digest = hashlib.sha256(f"{stamp.id}/{choice}/{call.index}".encode()).hexdigest()
    return {"id": f"call_{digest[:24]}", "type": "function", "function": {"name": call.name, "arguments": ""}}


def prompt_fields(
    request: ApiRequest,
    token_ids: Sequence[int],
    logprobs: Sequence[TokenLogprobs | None] | None,
    names: TokenNames,
) -> dict[str, Any]:
    """What is told of a prompt beside the answer, where asked for."""
    found: dict[str, Any] = {}
    if request.return_token_ids:
        found["prompt_token_ids"] = list(token_ids)
    if (most := request.prompt_logprobs) is not None:
        pairs = zip(token_ids, logprobs or (), strict=True)
        found["prompt_logprobs"] = [_prompt_logprob(names, *pair, most) for pair in pairs]
    return found


def chat_scores(
    names: TokenNames, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs], most: int
) -> dict[str, Any]:
    """`logprobs` of a chat's choice."""
    pairs = zip(token_ids, logprobs, strict=True)
    return {"content": [_chat_logprob(names, *pair, most) for pair in pairs], "refusal": None}


def text_scores(
    names: TokenNames,
    token_ids: Sequence[int],
    logprobs: Sequence[TokenLogprobs | None],
    starts: Sequence[int],
    most: int,
) -> dict[str, list[Any]]:
    """`logprobs` of a completion's choice; `starts`: where the tokens begin in its text, in characters."""
    return {
        "tokens": [names.name(token_id) for token_id in token_ids],
        "token_logprobs": [None if one is None else max(one.logprob, LOWEST) for one in logprobs],
        "top_logprobs": [_top(names, *pair, most) for pair in zip(token_ids, logprobs, strict=True)],
        "text_offset": list(starts),
    }


def echo(
    request: ApiRequest,
    index: int,
    token_ids: Sequence[int],
    logprobs: Sequence[TokenLogprobs | None] | None,
    tokenizer: Tokenizer | None,
    names: TokenNames,
) -> tuple[str, dict[str, list[Any]] | None]:
    """The prompt of a choice as text, and its `logprobs` where asked for."""
    prompt = request.prompts[index // request.sampling.n]
    text, plain = prompt_text(tokenizer, token_ids, prompt if isinstance(prompt, str) else None)
    if (most := request.sampling.logprobs) is None:
        return text, None
    starts = [min(start, len(text)) for start in Offsets(tokenizer, plain).push(token_ids)]
    return text, text_scores(names, token_ids, logprobs or (), starts, most)


def _chat_choice(
    request: ApiRequest,
    stamp: Stamp,
    index: int,
    completion: Completion,
    parser: ToolParser | None,
    names: TokenNames,
) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": completion.text, "refusal": None, "reasoning": None}
    calls: list[dict[str, Any]] = []
    if parser is not None:
        texts: list[str] = []
        for part in (*parser.push(completion.text), *parser.finish()):
            if isinstance(part, TextPart):
                texts.append(part.text)
            elif isinstance(part, CallArguments):
                calls[part.index]["function"]["arguments"] += part.text
            else:
                calls.append(call_object(stamp, index, part))
        message["content"] = "".join(texts) or (None if calls else "")
    if calls:
        message["tool_calls"] = calls
    choice: dict[str, Any] = {
        "index": index,
        "message": message,
        "logprobs": None,
        "finish_reason": finish_reason(completion, bool(calls)),
    }
    if (most := request.sampling.logprobs) is not None:
        choice["logprobs"] = chat_scores(names, completion.token_ids, completion.logprobs or (), most)
    if request.return_token_ids:
        choice["token_ids"] = list(completion.token_ids)
    return choice


def _chat_logprob(names: TokenNames, token_id: int, scored: TokenLogprobs, most: int) -> dict[str, Any]:
    def entry(one_id: int, logprob: float) -> dict[str, Any]:
        return {"token": names.name(one_id), "logprob": max(logprob, LOWEST), "bytes": list(names.data(one_id))}

    top = [entry(one_id, logprob) for one_id, logprob in scored.top[:most]]
    return {**entry(token_id, scored.logprob), "top_logprobs": top}


def _text_choice(
    request: ApiRequest, index: int, completion: Completion, tokenizer: Tokenizer | None, names: TokenNames
) -> dict[str, Any]:
    prompt_ids, prompt_logprobs = completion.prompt_token_ids, completion.prompt_logprobs
    before, told = "", None
    if request.echo:
        before, told = echo(request, index, prompt_ids, prompt_logprobs, tokenizer, names)
    text = before + completion.text
    choice: dict[str, Any] = {
        "index": index,
        "text": text,
        "logprobs": None,
        "finish_reason": finish_reason(completion),
    }
    if (most := request.sampling.logprobs) is not None:
        offsets = Offsets(tokenizer, request.sampling.skip_special_tokens)
        starts = [min(len(before) + start, len(text)) for start in offsets.push(completion.token_ids)]
        scores = text_scores(names, completion.token_ids, completion.logprobs or (), starts, most)
        choice["logprobs"] = scores if told is None else {key: told[key] + scores[key] for key in scores}
    if request.return_token_ids:
        choice["token_ids"] = list(completion.token_ids)
    return choice | prompt_fields(request, prompt_ids, prompt_logprobs, names)


def _top(names: TokenNames, token_id: int, scored: TokenLogprobs | None, most: int) -> dict[str, float] | None:
    """The likeliest tokens, best first, and the one that is there. Of two with the same name the likelier stays."""
    if scored is None:
        return None
    found: dict[str, float] = {}
    for one_id, logprob in (*scored.top[:most], (token_id, scored.logprob)):
        found.setdefault(names.name(one_id), max(logprob, LOWEST))
    return found


def _prompt_logprob(
    names: TokenNames, token_id: int, scored: TokenLogprobs | None, most: int
) -> Mapping[str, Mapping[str, Any]] | None:
    """Of a prompt's token {id: logprob, rank (null: not among the likeliest asked for), decoded_token}; as vLLM."""
    if scored is None:
        return None
    ranked: list[tuple[int, float, int | None]] = [
        (one_id, logprob, rank) for rank, (one_id, logprob) in enumerate(scored.top[:most], 1)
    ]
    if all(one_id != token_id for one_id, _, _ in ranked):
        ranked.append((token_id, scored.logprob, None))
    return {
        str(one_id): {"logprob": max(logprob, LOWEST), "rank": rank, "decoded_token": names.name(one_id)}
        for one_id, logprob, rank in ranked
    }
