"""Answer bodies of the OpenAI routes, from completions. Key order is fixed, so equal answers are equal bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from headrace.api.openai import ApiRequest
from headrace.api.tokens import TokenNames, offsets, prompt_text
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
) -> dict[str, Any]:
    """The body of a whole answer: `chat.completion` or `text_completion`.

    `completions`: one a choice, in the order of `api.openai.engine_requests`, none of them failed. `tokenizer`: None
    for a model without one (its texts are empty). `cached_tokens`: whether the usage says how many prompt tokens were
    reused, which depends on what ran before.
    """
    chat = request.kind == "chat"
    names = TokenNames(tokenizer, request.tokens_as_ids)
    make = _chat_choice if chat else _text_choice
    body: dict[str, Any] = {
        "id": f"{'chatcmpl' if chat else 'cmpl'}-{stamp.id}",
        "object": "chat.completion" if chat else "text_completion",
        "created": stamp.created,
        "model": stamp.model,
        "system_fingerprint": stamp.system_fingerprint,
        "choices": [make(request, index, one, tokenizer, names) for index, one in enumerate(completions)],
        "usage": usage(request, completions, cached_tokens),
    }
    if chat and request.return_token_ids:
        body["prompt_token_ids"] = list(completions[0].prompt_token_ids)
    if chat and request.prompt_logprobs is not None:
        body["prompt_logprobs"] = _prompt_logprobs(request.prompt_logprobs, completions[0], names)
    return body


def usage(request: ApiRequest, completions: Sequence[Completion], cached_tokens: bool = True) -> dict[str, Any]:
    """Tokens of a body's answers; a prompt counts once, however many answers it has.

    The token that ended an answer counts: it was computed.
    """
    firsts = completions[:: request.sampling.n]
    prompt = sum(len(one.prompt_token_ids) for one in firsts)
    output = sum(len(one.token_ids) for one in completions)
    counts: dict[str, Any] = {
        "prompt_tokens": prompt,
        "completion_tokens": output,
        "total_tokens": prompt + output,
    }
    if cached_tokens:
        counts["prompt_tokens_details"] = {"cached_tokens": sum(one.cached_tokens for one in firsts)}
    counts["completion_tokens_details"] = {"reasoning_tokens": 0}
    return counts


def _finish_reason(completion: Completion) -> str:
    if completion.finish_reason not in ("stop", "length"):
        raise EngineError(f"an answer ended with {completion.finish_reason!r}, which no client knows")
    return completion.finish_reason


def _chat_choice(
    request: ApiRequest, index: int, completion: Completion, tokenizer: Tokenizer | None, names: TokenNames
) -> dict[str, Any]:
    choice: dict[str, Any] = {
        "index": index,
        "message": {"role": "assistant", "content": completion.text, "refusal": None, "reasoning": None},
        "logprobs": None,
        "finish_reason": _finish_reason(completion),
    }
    if (most := request.sampling.logprobs) is not None:
        pairs = zip(completion.token_ids, completion.logprobs or (), strict=True)
        content = [_chat_logprob(names, token_id, scored, most) for token_id, scored in pairs]
        choice["logprobs"] = {"content": content, "refusal": None}
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
    prompt = request.prompts[index // request.sampling.n]
    text, before, plain = completion.text, "", False
    if request.echo:
        before, plain = prompt_text(tokenizer, completion.prompt_token_ids, prompt if isinstance(prompt, str) else None)
        text = before + text
    choice: dict[str, Any] = {
        "index": index,
        "text": text,
        "logprobs": None,
        "finish_reason": _finish_reason(completion),
    }
    if (most := request.sampling.logprobs) is not None:
        skip = request.sampling.skip_special_tokens
        starts = [len(before) + start for start in offsets(tokenizer, completion.token_ids, skip)]
        ids, scored = list(completion.token_ids), list[TokenLogprobs | None](completion.logprobs or ())
        if request.echo:
            starts = offsets(tokenizer, completion.prompt_token_ids, plain) + starts
            ids = [*completion.prompt_token_ids, *ids]
            scored = [*(completion.prompt_logprobs or ()), *scored]
        choice["logprobs"] = {
            "tokens": [names.name(token_id) for token_id in ids],
            "token_logprobs": [None if one is None else max(one.logprob, LOWEST) for one in scored],
            "top_logprobs": [_top(names, *pair, most) for pair in zip(ids, scored, strict=True)],
            "text_offset": [min(start, len(text)) for start in starts],
        }
    if request.return_token_ids:
        choice["prompt_token_ids"] = list(completion.prompt_token_ids)
        choice["token_ids"] = list(completion.token_ids)
    if request.prompt_logprobs is not None:
        choice["prompt_logprobs"] = _prompt_logprobs(request.prompt_logprobs, completion, names)
    return choice


def _top(names: TokenNames, token_id: int, scored: TokenLogprobs | None, most: int) -> dict[str, float] | None:
    """The likeliest tokens, best first, and the one that is there. Of two with the same name the likelier stays."""
    if scored is None:
        return None
    found: dict[str, float] = {}
    for one_id, logprob in (*scored.top[:most], (token_id, scored.logprob)):
        found.setdefault(names.name(one_id), max(logprob, LOWEST))
    return found


def _prompt_logprobs(most: int, completion: Completion, names: TokenNames) -> list[dict[str, Any] | None]:
    """For each prompt token {id: logprob, rank (null: not among the likeliest asked for), decoded_token}; as vLLM."""
    found: list[dict[str, Any] | None] = []
    for token_id, scored in zip(completion.prompt_token_ids, completion.prompt_logprobs or (), strict=True):
        if scored is None:
            found.append(None)
            continue
        ranked = [(one_id, logprob, rank) for rank, (one_id, logprob) in enumerate(scored.top[:most], 1)]
        if all(one_id != token_id for one_id, _, _ in ranked):
            ranked.append((token_id, scored.logprob, None))  # type: ignore[arg-type]
        found.append(
            {
                str(one_id): {"logprob": max(logprob, LOWEST), "rank": rank, "decoded_token": names.name(one_id)}
                for one_id, logprob, rank in ranked
            }
        )
    return found
