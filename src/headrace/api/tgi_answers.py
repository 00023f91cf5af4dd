"""Answers of the TGI routes: bodies and streams, from completions.

Law: the `text` of an answer's tokens, special ones left out, joined, is `generated_text` (without the prompt), whole or
streamed; only half a character that the end leaves goes to the token that ends it, special or not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from headrace.api.answers import LOWEST
from headrace.api.json import dump, quote
from headrace.api.tgi import SEEDS, TgiRequest, error_of_code
from headrace.core.errors import EngineError
from headrace.core.types import Request, TokenLogprobs
from headrace.engine.answer import Answer, Completion
from headrace.engine.model import OpenModel
from headrace.text.detokenize import Detokenizer
from headrace.text.stop import StopStrings
from headrace.text.tokenizer import Tokenizer


class _Vocabulary:
    """Tokens by themselves: how each is spelled outside any text, and whether it is special."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, tuple[str, bool]] = {}

    def look_up(self, token_id: int) -> tuple[str, bool]:
        """(its text, whether it is special)"""
        if (found := self._known.get(token_id)) is None:
            tokenizer = self._tokenizer
            special = tokenizer.tokens([token_id], False) != tokenizer.tokens([token_id], True)
            found = self._known[token_id] = (tokenizer.decode([token_id], skip_special_tokens=False), special)
        return found

    def entry(self, token_id: int, logprob: float) -> dict[str, Any]:
        """A token that stands beside the text: an alternative."""
        text, special = self.look_up(token_id)
        return {"id": token_id, "text": text, "logprob": max(logprob, LOWEST), "special": special}


class _Texts:
    """The text of each token of one answer, as it comes.

    A token that leaves a character unfinished has the text "", and the character goes to the token that completes it.
    The text goes on from the prompt's last token: a first token "▁there" reads " there", where the tokens by
    themselves (`Completion.text`) would read "there".
    """

    def __init__(self, vocabulary: _Vocabulary, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        self._vocabulary = vocabulary
        self._text = self._alone = Detokenizer(tokenizer)
        if tokenizer.decoder_rules.kind != "byte_level" and prompt:
            self._text = _after(tokenizer, prompt[-1])
        self._surplus = self._length = 0
        self.alone = ""
        """The last token's part of `Completion.text`, stop strings aside."""

    def push(self, token_id: int) -> tuple[str, bool]:
        """(the token's text, whether it is special)"""
        text = self._text.push((token_id,))
        self.alone = text if self._text is self._alone else self._alone.push((token_id,))
        self._surplus += len(text) - len(self.alone)
        self._length += len(text)
        spelled, special = self._vocabulary.look_up(token_id)
        return (spelled if special else text), special

    def end(self, text: str, special: bool, completion: Completion) -> tuple[str, str]:
        """(the last token's text, the whole text), with what was held back, without what lies past a stop string."""
        rest = self._text.finish()
        if self._text is not self._alone:
            self._surplus += len(rest) - len(self._alone.finish())
        past = self._length + len(rest) - self._surplus - len(completion.text)
        before, after = (rest, text) if special else (text + rest, "")
        return before[: max(0, len(before) - max(0, past))] + after, " " * self._surplus + completion.text


def _after(tokenizer: Tokenizer, token_id: int) -> Detokenizer:
    """A detokenizer in the middle of a text, after this token; at the start of one if the token leaves half a
    character."""
    found, probe = Detokenizer(tokenizer), Detokenizer(tokenizer)
    probe.push((token_id,))
    if not probe.finish():
        found.push((token_id,))
    return found


def _finish_reason(request: TgiRequest, completion: Completion, eos_token_ids: frozenset[int]) -> str:
    if completion.finish_reason not in ("stop", "length") or not completion.token_ids:
        raise EngineError(f"an answer ended with {completion.finish_reason!r}, which no client knows")
    most = request.sampling.max_tokens
    if completion.finish_reason == "length" or (most is not None and len(completion.token_ids) >= most):
        return "length"
    by_text = request.sampling.stop and completion.token_ids[-1] not in eos_token_ids
    return "stop_sequence" if by_text else "eos_token"


def _seed(request: TgiRequest, completion: Completion) -> int | None:
    sampled = request.sampling.temperature > 0 and completion.seed is not None
    return completion.seed % SEEDS if sampled and completion.seed is not None else None


# ---------------------------------------------------------------- whole answers


def generate_body(
    request: TgiRequest, completions: Sequence[Completion], tokenizer: Tokenizer, eos_token_ids: frozenset[int]
) -> dict[str, Any] | list[dict[str, Any]]:
    """The body of a whole answer. `completions`: one for each of `engine_requests`, none of them failed.

    Raises EngineError on an end that no client knows.
    """
    vocabulary = _Vocabulary(tokenizer)
    best = best_of(completions)
    told = _sequence(request, best, vocabulary, tokenizer, eos_token_ids)
    text = told.pop("generated_text")
    body: dict[str, Any] = {"generated_text": text}
    if request.details:
        top_tokens = told.pop("top_tokens", None)
        if len(completions) > 1:
            others = [one for one in completions if one is not best]
            told["best_of_sequences"] = [
                _sequence(request, one, vocabulary, tokenizer, eos_token_ids) for one in others
            ]
        if top_tokens is not None:
            told["top_tokens"] = top_tokens
        body["details"] = told
    return [body] if request.listed else body


def best_of(completions: Sequence[Completion]) -> Completion:
    """The one with the highest mean log-probability a token, the first of equals."""
    return max(completions, key=_mean_logprob)


def _mean_logprob(completion: Completion) -> float:
    scored = completion.logprobs or ()
    return sum(max(one.logprob, LOWEST) for one in scored) / len(scored) if scored else LOWEST


def _sequence(
    request: TgiRequest,
    completion: Completion,
    vocabulary: _Vocabulary,
    tokenizer: Tokenizer,
    eos_token_ids: frozenset[int],
) -> dict[str, Any]:
    """One answer, as `best_of_sequences` has it."""
    texts = _Texts(vocabulary, tokenizer, completion.prompt_token_ids)
    reason = _finish_reason(request, completion, eos_token_ids)
    pushed = [texts.push(token_id) for token_id in completion.token_ids]
    last, generated = texts.end(*pushed[-1], completion)
    pushed[-1] = (last, pushed[-1][1])
    scored = completion.logprobs or ()
    found: dict[str, Any] = {
        "generated_text": request.inputs + generated if request.return_full_text else generated,
        "finish_reason": reason,
        "generated_tokens": len(completion.token_ids),
        "seed": _seed(request, completion),
        "prefill": [],
        "tokens": [
            {"id": token_id, "text": text, "logprob": max(one.logprob, LOWEST), "special": special}
            for token_id, (text, special), one in zip(completion.token_ids, pushed, scored, strict=True)
        ],
    }
    if request.prefill:
        pairs = zip(completion.prompt_token_ids, completion.prompt_logprobs or (), strict=True)
        found["prefill"] = [
            {"id": token_id, "text": vocabulary.look_up(token_id)[0], "logprob": one and max(one.logprob, LOWEST)}
            for token_id, one in pairs
        ]
    if request.top_n_tokens:
        found["top_tokens"] = [_top(request, one, vocabulary) for one in scored]
    return found


def _top(request: TgiRequest, scored: TokenLogprobs, vocabulary: _Vocabulary) -> list[dict[str, Any]]:
    return [vocabulary.entry(*pair) for pair in scored.top[: request.top_n_tokens]]


# ---------------------------------------------------------------- streams


class TgiStream:
    """The events of /generate_stream: one a token, the last with the whole text. No `[DONE]`."""

    def __init__(self, request: TgiRequest, engine_request: Request, opened: OpenModel) -> None:
        """`engine_request`: the only one of `engine_requests`. Raises RequestError for a model without a tokenizer."""
        self._request = request
        self._input_length = len(engine_request.token_ids)
        self._eos_token_ids = opened.eos_token_ids
        self._vocabulary = _Vocabulary(opened.tokenizer)
        self._texts = _Texts(self._vocabulary, opened.tokenizer, engine_request.token_ids)
        self._stops = StopStrings(request.sampling.stop)
        room = opened.limits.max_model_len - self._input_length
        self._most = room if request.sampling.max_tokens is None else min(room, request.sampling.max_tokens)
        self._count = 0
        self._held: tuple[int, str, bool, TokenLogprobs] | None = None
        """The last token, where it may be the answer's last: its event then has the whole text."""

    def start(self, answers: Sequence[Answer]) -> bytes:
        """Nothing comes before the first token."""
        return b""

    def delta(self, index: int, answer: Answer) -> bytes:
        """The events of new tokens."""
        new = answer.take()
        return "".join([self._push(*pair) for pair in zip(new.token_ids, new.logprobs, strict=True)]).encode()

    def end(self, index: int, answer: Answer, completion: Completion) -> bytes:
        """The events of the rest. Raises EngineError on an end that no client knows."""
        new = answer.take()
        pairs = list(zip(new.token_ids, new.logprobs, strict=True))
        data = "".join(
            [self._push(*pair, last=left == 1) for left, pair in zip(range(len(pairs), 0, -1), pairs, strict=True)]
        )
        reason = _finish_reason(self._request, completion, self._eos_token_ids)
        if self._held is None:  # it ended for no reason that its tokens show: they are all told, so one more ends it
            scored = (completion.logprobs or (TokenLogprobs(0.0),))[-1]
            self._held = (completion.token_ids[-1], "", False, scored)
            self._count += 1
        token_id, text, special, scored = self._held
        self._held = None
        text, generated = self._texts.end(text, special, completion)
        details = {
            "finish_reason": reason,
            "generated_tokens": len(completion.token_ids),
            "seed": _seed(self._request, completion),
            "input_length": self._input_length,
        }
        full = self._request.inputs + generated if self._request.return_full_text else generated
        told = dump(details) if self._request.details else "null"
        end = f'"generated_text":{quote(full)},"details":{told}'
        return (data + self._event(token_id, text, special, scored, end)).encode()

    def finish(self, completions: Sequence[Completion]) -> bytes:
        """Nothing comes after the last token."""
        return b""

    def error(self, code: str, message: str) -> bytes:
        """Ends a stream that has begun."""
        return f"data:{dump(error_of_code(code, message)[1])}\n\n".encode()

    def _push(self, token_id: int, scored: TokenLogprobs, last: bool = False) -> str:
        """A new token. Returns the events that are now certain; that of the `last` is not."""
        told = ""
        if self._held is not None:
            told, self._held = self._event(*self._held), None
        text, special = self._texts.push(token_id)
        self._count += 1
        stopped = bool(self._request.sampling.stop) and self._stops.push(self._texts.alone)[1]
        if last or stopped or token_id in self._eos_token_ids or self._count >= self._most:
            self._held = (token_id, text, special, scored)
            return told
        return told + self._event(token_id, text, special, scored)

    def _event(
        self,
        token_id: int,
        text: str,
        special: bool,
        scored: TokenLogprobs,
        end: str = '"generated_text":null,"details":null',
    ) -> str:
        """One event; `end`: its last fields."""
        top = (
            f'"top_tokens":{dump(_top(self._request, scored, self._vocabulary))},' if self._request.top_n_tokens else ""
        )
        flag = "true" if special else "false"
        token = f'{{"id":{token_id},"text":{quote(text)},"logprob":{max(scored.logprob, LOWEST)!r},"special":{flag}}}'
        return f'data:{{"index":{self._count},"token":{token},{top}{end}}}\n\n'
