"""Streams of the OpenAI routes as server-sent events.

Law: the chunks of a choice, joined, are its entry in `answer_body`, however its tokens come. Both are made of the
functions of `api/answers.py`; a stream only adds when.

Where nothing but text is told (no log-probabilities, tools, token ids or running usage), an event is that text between
two pieces of bytes made beforehand: this runs for every token of every stream.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any

from headrace.api.answers import (
    Stamp,
    call_object,
    chat_scores,
    echo,
    finish_reason,
    heading,
    prompt_fields,
    text_scores,
    usage,
    usage_of,
)
from headrace.api.errors import error_object
from headrace.api.json import dump, quote
from headrace.api.openai import ApiRequest
from headrace.api.tokens import Offsets, TokenNames
from headrace.api.tool_parsers import CallStart, Part, TextPart, ToolParser
from headrace.core.types import TokenLogprobs
from headrace.engine.answer import Answer, Completion, Delta
from headrace.text.tokenizer import Tokenizer

PING = b": ping\n\n"
"""A comment, which clients skip: it shows them and what stands between that a silent stream is alive."""
DONE = b"data: [DONE]\n\n"


class StreamWriter:
    """The events of one body, as bytes to send; empty where there is nothing to say.

    `start`, then for each choice any number of `delta` and one `end`, then `finish`. `error` ends it at any point.
    """

    def __init__(
        self,
        request: ApiRequest,
        stamp: Stamp,
        tokenizer: Tokenizer | None,
        parsers: Sequence[ToolParser] | None = None,
    ) -> None:
        """`tokenizer` and `parsers`: as in `answer_body`."""
        self._request = request
        self._stamp = stamp
        self._tokenizer = tokenizer
        self._names = TokenNames(tokenizer, request.tokens_as_ids)
        self._chat = request.kind == "chat"
        self._heading = heading(request, stamp, streamed=True)
        self._prompt_tokens = 0
        self._output_tokens = 0
        tells_more = (parsers, request.sampling.logprobs) != (None, None) or request.return_token_ids
        self._only_text = not (tells_more or request.continuous_usage)
        self._choices = [
            self._choice(index, None if parsers is None else parsers[index]) for index in range(request.choices)
        ]

    def start(self, answers: Sequence[Answer]) -> bytes:
        """Before anything else: a chat says whose turn it is. `answers`: of all choices; their prompts are counted."""
        self._prompt_tokens = sum(len(one.request.token_ids) for one in answers[:: self._request.sampling.n])
        if not self._chat:
            return b""
        turn = {"role": "assistant", "content": ""}
        return b"".join(self._event([self._entry(choice, turn)]) for choice in self._choices)

    def delta(self, index: int, answer: Answer) -> bytes:
        """What is new of a choice, however many tokens: one event (more only where a tool call begins)."""
        choice = self._choices[index]
        if choice.plain:
            text = answer.take_text()
            return choice.before + quote(text).encode() + choice.after if text else b""
        if not answer.num_tokens:
            return b""
        return self._prompt(choice, answer) + self._news(choice, answer.take(), final=False)

    def end(self, index: int, answer: Answer, completion: Completion) -> bytes:
        """The rest of a choice, and a chunk that says why it ended. Raises EngineError on an end no client knows."""
        choice = self._choices[index]
        rest = self._prompt(choice, answer) + self._news(choice, answer.take(), final=True)
        last = self._entry(choice, {} if self._chat else "", finish=finish_reason(completion, choice.called))
        return rest + self._event([last])

    def finish(self, completions: Sequence[Completion]) -> bytes:
        """After the end of every choice."""
        if not self._request.stream_usage:
            return DONE
        return _sse({**self._heading, "choices": [], "usage": usage(self._request, completions)}) + DONE

    def error(self, code: str, message: str) -> bytes:
        """In place of everything that is still to come."""
        return _sse({"error": error_object(code, message)}) + DONE

    def _choice(self, index: int, parser: ToolParser | None) -> _Choice:
        request, most = self._request, self._request.sampling.logprobs
        scores = None
        if most is not None and not self._chat:
            scores = _TextScores(self._tokenizer, request.sampling.skip_special_tokens, self._names, most)
        choice = _Choice(index, parser, scores)
        prompt_told = request.return_token_ids or request.prompt_logprobs is not None
        choice.owes_prompt = index == 0 and prompt_told if self._chat else request.echo or prompt_told
        choice.plain = self._only_text and not choice.owes_prompt
        if self._only_text:
            template = self._event([self._entry(choice, {"content": ""} if self._chat else "")])
            choice.before, _, choice.after = template.rpartition(b'""')
        return choice

    def _prompt(self, choice: _Choice, answer: Answer) -> bytes:
        """What is told of a prompt: with the first tokens, for its log-probabilities come with them."""
        if not choice.owes_prompt:
            return b""
        choice.owes_prompt = False
        choice.plain = self._only_text
        request, token_ids, logprobs = self._request, answer.request.token_ids, answer.prompt_logprobs
        fields = prompt_fields(request, token_ids, logprobs, self._names)
        if self._chat:
            return self._event([self._entry(choice, {})], **fields)
        text, scores = "", None
        if request.echo:
            text, scores = echo(request, choice.index, token_ids, logprobs, self._tokenizer, self._names)
            if choice.scores is not None:
                choice.scores.echoed = len(text)
        return self._event([self._entry(choice, text, scores) | fields])

    def _news(self, choice: _Choice, new: Delta, final: bool) -> bytes:
        self._output_tokens += len(new.token_ids)
        said: list[object] = [new.text] if new.text else []
        if choice.parser is not None:
            parts = choice.parser.push(new.text) if new.text else []
            said = list(self._say(choice, [*parts, *choice.parser.finish()] if final else parts))
        elif self._chat:
            said = [{"content": text} for text in said]
        scores = self._scores(choice, new, final)
        token_ids = list(new.token_ids) if self._request.return_token_ids else []
        if not said and (scores is not None or token_ids):
            said = [{} if self._chat else ""]
        entries = [self._entry(choice, one) for one in said]
        if entries:
            entries[0]["logprobs"] = scores
        if token_ids:
            entries[0]["token_ids"] = token_ids
        return b"".join(self._event([entry]) for entry in entries)

    def _say(self, choice: _Choice, parts: Iterable[Part]) -> Iterable[dict[str, Any]]:
        """Deltas of what a parser found: neighbours of one kind together, the beginning of a call alone."""
        for _, group in groupby(parts, key=_place):
            first, *others = group
            if isinstance(first, CallStart):
                choice.called = True
                call = call_object(self._stamp, choice.index, first)
                yield {"tool_calls": [{"index": first.index, **call}]}
                continue
            text = first.text + "".join(part.text for part in others if not isinstance(part, CallStart))
            if not text:
                continue
            if isinstance(first, TextPart):
                yield {"content": text}
            else:
                yield {"tool_calls": [{"index": first.index, "function": {"arguments": text}}]}

    def _scores(self, choice: _Choice, new: Delta, final: bool) -> dict[str, Any] | None:
        most = self._request.sampling.logprobs
        if choice.scores is not None:
            return choice.scores.push(new, final)
        if most is None or not new.token_ids:
            return None
        return chat_scores(self._names, new.token_ids, new.logprobs, most)

    def _entry(
        self, choice: _Choice, said: object, scores: dict[str, Any] | None = None, finish: str | None = None
    ) -> dict[str, Any]:
        """A choice in a chunk; `said`: its delta (chat) or text."""
        what = "delta" if self._chat else "text"
        return {"index": choice.index, what: said, "logprobs": scores, "finish_reason": finish}

    def _event(self, entries: list[dict[str, Any]], **fields: object) -> bytes:
        chunk = {**self._heading, "choices": entries, **fields}
        if self._request.continuous_usage:
            chunk["usage"] = usage_of(self._prompt_tokens, self._output_tokens)
        return _sse(chunk)


class _Choice:
    """How far one choice is told."""

    __slots__ = ("after", "before", "called", "index", "owes_prompt", "parser", "plain", "scores")

    def __init__(self, index: int, parser: ToolParser | None, scores: _TextScores | None) -> None:
        self.index = index
        self.parser = parser
        self.scores = scores
        self.owes_prompt = False
        """Whether something is still to be told of its prompt."""
        self.plain = False
        """Whether all that is to come is text, between `before` and `after`."""
        self.before = self.after = b""
        self.called = False
        """Whether a tool call has begun."""


class _TextScores:
    """Log-probabilities of a completion's tokens. Each waits until the text before its token is out: where a stop
    string cuts that text, the tokens of the stop string begin at the cut."""

    def __init__(self, tokenizer: Tokenizer | None, skip_special_tokens: bool, names: TokenNames, most: int) -> None:
        self._offsets = Offsets(tokenizer, skip_special_tokens)
        self._names = names
        self._most = most
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprobs] = []
        self._starts: list[int] = []
        self._length = 0
        """Characters of the answer that are out."""
        self.echoed = 0
        """Characters of the prompt before them."""

    def push(self, new: Delta, final: bool) -> dict[str, Any] | None:
        """`logprobs` of a chunk, None if they are of no token."""
        self._token_ids += new.token_ids
        self._logprobs += new.logprobs
        self._starts += self._offsets.push(new.token_ids)
        self._length += len(new.text)
        count = len(self._starts) if final else bisect_right(self._starts, self._length)
        if not count:
            return None
        starts = [self.echoed + min(start, self._length) for start in self._starts[:count]]
        found = text_scores(self._names, self._token_ids[:count], self._logprobs[:count], starts, self._most)
        for waiting in (self._token_ids, self._logprobs, self._starts):
            del waiting[:count]
        return found


def _place(part: Part) -> tuple[type[Part], int | None]:
    return type(part), None if isinstance(part, TextPart) else part.index


def _sse(value: dict[str, Any]) -> bytes:
    return f"data: {dump(value)}\n\n".encode()
