"""From events to a Completion: detokenising, stop strings, times. One `Answer` a request."""

from __future__ import annotations

from dataclasses import dataclass

from headrace.core.errors import HeadraceError
from headrace.core.types import ErrorEvent, FinishEvent, FinishReason, Request, TokenEvent, TokenLogprobs
from headrace.text.detokenize import Detokenizer
from headrace.text.stop import StopStrings
from headrace.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class RequestFailure:
    """Why one request failed; the others are not touched by it."""

    code: str
    message: str


@dataclass(frozen=True, slots=True)
class Completion:
    """The answer to one prompt. Either `error` is set, or `finish_reason` is stop or length."""

    index: int
    """Which prompt of the call this answers."""
    choice: int
    """Which of the `n` answers to it this is."""
    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    """Generated tokens, with the token that ended them, if one did."""
    text: str
    """Without the stop string or the token that ended it, unless that was asked for."""
    finish_reason: str | None
    seed: int | None = None
    """What the draw depended on: asked for with n = 1, it gives this answer again. None for a greedy one."""
    logprobs: tuple[TokenLogprobs, ...] | None = None
    """One a token, where asked for."""
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    """One a token of the prompt, where asked for; None for the first, which nothing precedes."""
    cached_tokens: int = 0
    """Prompt tokens whose KV was reused."""
    queue_s: float | None = None
    """Seconds from arrival to joining the running batch."""
    ttft_s: float | None = None
    """Seconds from arrival (queueing included) to the first token."""
    latency_s: float | None = None
    """Seconds from arrival to the end."""
    decode_tokens_per_s: float | None = None
    """(tokens - 1) / (last token - first token)."""
    error: RequestFailure | None = None


@dataclass(frozen=True, slots=True)
class Delta:
    """What is new of an answer."""

    text: str
    token_ids: tuple[int, ...]
    """A token may come before its text does: half a character waits, and what a stop string may take back."""
    logprobs: tuple[TokenLogprobs, ...]
    """One a token, where asked for."""


class Answer:
    """Collects one request's events."""

    def __init__(
        self, index: int, request: Request, tokenizer: Tokenizer | None, arrival_s: float, choice: int = 0
    ) -> None:
        """Without a tokenizer the text stays empty."""
        sampling = request.sampling
        self.index = index
        self.choice = choice
        self.request = request
        self._detokenizer = None if tokenizer is None else Detokenizer(tokenizer, sampling.skip_special_tokens)
        self._stops = StopStrings(sampling.stop, sampling.include_stop_str_in_output)
        self._silent: frozenset[int] = frozenset()
        """Tokens that end the answer and are no part of its text. None comes before the end: the engine masks them for
        as long as the answer has to go on."""
        if tokenizer is not None and not sampling.include_stop_str_in_output:
            eos_ids = frozenset[int]() if sampling.ignore_eos else tokenizer.eos_token_ids
            self._silent = eos_ids.union(sampling.stop_token_ids)
        self._arrival_s = arrival_s
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprobs] = []
        self._prompt_logprobs: tuple[TokenLogprobs, ...] = ()
        self._text: list[str] = []
        self._told = 0
        """Tokens that are in the text."""
        self._taken = 0
        self._taken_tokens = 0
        self._first_s: float | None = None
        self._last_s: float | None = None
        self._stopped = False

    def tokens(self, event: TokenEvent) -> int | None:
        """Takes new tokens. Returns the answer's length in tokens once a stop string is complete in its text."""
        if self._stopped:
            return None
        if self._first_s is None:
            self._first_s = event.time_s
            self._prompt_logprobs = event.prompt_logprobs
        self._last_s = event.time_s
        if not self.request.sampling.stop:
            # Text can wait until somebody asks for it: between two steps it would only keep the next one waiting.
            self._token_ids += event.token_ids
            self._logprobs += event.logprobs
            return None
        for index, token_id in enumerate(event.token_ids):
            self._token_ids.append(token_id)
            self._logprobs.extend(event.logprobs[index : index + 1])
            self._make_text()
            if self._stopped:
                return len(self._token_ids)
        return None

    def _make_text(self) -> None:
        """Of the tokens that are not in the text yet."""
        if self._detokenizer is None or self._told == len(self._token_ids):
            return
        new = self._token_ids[self._told :]
        self._told = len(self._token_ids)
        if new[-1] in self._silent:
            new.pop()
        text, self._stopped = self._stops.push(self._detokenizer.push(new))
        self._text.append(text)

    def take_text(self) -> str:
        """New text since the last call, safe to show: no half characters, nothing a stop string may take back."""
        self._make_text()
        new = "".join(self._text[self._taken :])
        self._taken = len(self._text)
        return new

    def take(self) -> Delta:
        """What is new since the last call; after `end`, the rest. Joined, all of them are the Completion."""
        start, self._taken_tokens = self._taken_tokens, len(self._token_ids)
        return Delta(self.take_text(), tuple(self._token_ids[start:]), tuple(self._logprobs[start:]))

    @property
    def num_tokens(self) -> int:
        """Tokens so far."""
        return len(self._token_ids)

    @property
    def prompt_logprobs(self) -> tuple[TokenLogprobs | None, ...] | None:
        """Of the prompt's tokens, where asked for; complete with the first token of the answer."""
        if self.request.sampling.prompt_logprobs is None:
            return None
        return (None, *self._prompt_logprobs)

    def end(self, event: FinishEvent | ErrorEvent) -> Completion:
        """The terminal event: nothing comes after it."""
        error = RequestFailure(event.code, event.message) if isinstance(event, ErrorEvent) else None
        self._make_text()
        if not self._stopped and self._detokenizer is not None:
            text, self._stopped = self._stops.push(self._detokenizer.finish())
            self._text.append(text)
            if not self._stopped:
                self._text.append(self._stops.finish())
        count = len(self._token_ids)
        rate = None
        if self._first_s is not None and self._last_s is not None and self._last_s > self._first_s:
            rate = (count - 1) / (self._last_s - self._first_s)
        sampling = self.request.sampling
        reason = None if isinstance(event, ErrorEvent) else str(event.reason)
        if reason is not None and self._stopped:
            # The engine may have come to the limit before it heard of the stop string, or at the same token.
            reason = str(FinishReason.STOP)
        joined_s = None if isinstance(event, ErrorEvent) else event.joined_s
        return Completion(
            index=self.index,
            choice=self.choice,
            prompt_token_ids=self.request.token_ids,
            token_ids=tuple(self._token_ids),
            text="".join(self._text),
            finish_reason=reason,
            seed=sampling.seed,
            logprobs=None if sampling.logprobs is None else tuple(self._logprobs),
            prompt_logprobs=self.prompt_logprobs,
            cached_tokens=0 if isinstance(event, ErrorEvent) else event.cached_tokens,
            queue_s=None if joined_s is None else joined_s - self._arrival_s,
            ttft_s=None if self._first_s is None else self._first_s - self._arrival_s,
            latency_s=event.time_s - self._arrival_s,
            decode_tokens_per_s=rate,
            error=error,
        )


def refused(index: int, error: HeadraceError, choice: int = 0) -> Completion:
    """The completion of a request that never reached the engine."""
    return Completion(index, choice, (), (), "", None, error=RequestFailure(error.code, str(error)))
