"""Any OpenAI-compatible server at an address: every request goes there when it arrives, and is streamed back.

One thread and one event loop; each request has a connection of its own, so that none waits for another; the time that
it takes to open counts as the server's. Prompts go out as token ids, and token ids are wanted back (`Way`).
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from headrace.api.json import dump, read_object
from headrace.compare.http_stream import BrokenStream, Response, Server
from headrace.compare.methods import Outcome, RequestRun, refuse_images
from headrace.compare.methods.bench import Bench
from headrace.compare.workloads import Workload, WorkloadRequest
from headrace.core.config import ResolvedConfig
from headrace.core.errors import EngineError, InvalidJson, shorten
from headrace.engine.model import OpenModel
from headrace.text.detokenize import Detokenizer

SCHEME = "url:"
MODELS, COMPLETIONS = "/v1/models", "/v1/completions"
PROBE_TOKENS = 2
REFUSED = frozenset({400, 422})
"""A body has a field that the server does not take."""
MAX_SAID = 400
"""Characters of what a server says of an error."""
_TOKEN = "token_id:"


@dataclass(frozen=True, slots=True)
class Way:
    """How a server's token ids are come by."""

    fields: Mapping[str, object]
    """Of the body."""
    told: str
    """For the description."""
    salted: bool = False
    """Whether each request has a `cache_salt` of its own: no cache of prefixes has its prompt then."""


IDS = Way({"return_token_ids": True}, "token ids are as it tells them", salted=True)
"""vLLM and headrace."""
SCORES = Way(
    {"logprobs": 1, "return_tokens_as_token_ids": True, "cache_prompt": False},
    "token ids are as it tells them beside log-probabilities, which take it some time",
)
"""Older vLLM; llama.cpp, whose cache of prompts the last one switches off."""
TEXT = Way(
    {"stream_options": {"include_usage": True}},
    "it tells no token ids: they are its text, encoded again, which gives as many as it counted",
)
WAYS = (IDS, SCORES, TEXT)


class UrlMethod:
    """Runs workloads on a server that is already there."""

    config: ResolvedConfig | None = None
    exact = False

    def __init__(self, name: str, bench: Bench, api_key: str = "") -> None:
        """`name`: url:http://HOST[:PORT][/PATH] or https. `api_key`: for the header Authorization; empty: none. Raises
        ConfigError, which repeats no secret."""
        self.name = name
        self._server = Server(name.removeprefix(SCHEME), api_key)
        self.description = f"the server at {self._server.url}"
        self._opened = bench.opened
        self._model = ""
        self._way = IDS
        self._takes_ignore_eos = True
        self._ends_early = False
        """Whether it ended an answer by itself although it was told not to."""

    def start(self, workload: Workload) -> float:
        """Finds out what the server serves and tells. Returns 0, for it is loaded already. Raises EngineError, and
        ConfigError for images: these a server takes in chat messages only, of which it makes a prompt of its own."""
        refuse_images(self.name, workload, "a server is asked in token ids here, and those hold none")
        asyncio.run(self._start(workload))
        self._describe(workload)
        return 0.0

    def run(self, workload: Workload) -> Outcome:
        """Raises EngineError where the server cannot be reached, refuses a request, breaks off, or gives an answer
        whose token ids cannot be known."""
        outcome = asyncio.run(self._run(workload))
        if workload.ignore_eos:
            pairs = zip(outcome.requests, workload.requests, strict=True)
            self._ends_early |= any(len(one.token_ids) < asked.max_tokens for one, asked in pairs)
            self._describe(workload)
        return outcome

    def close(self) -> None:
        """Nothing is the method's own: its connections end with their requests."""

    async def _start(self, workload: Workload) -> None:
        with self._naming(MODELS):
            async with self._server.exchange("GET", MODELS) as response:
                body = await response.whole()
        if response.status != 200:
            raise EngineError(f"{self.name}: {MODELS} answers {response.status}: {_said(body)}")
        self._model = self._first_model(body)
        shortest = min(workload.requests, key=lambda one: len(one.token_ids))
        probe = WorkloadRequest(shortest.token_ids, min(PROBE_TOKENS, shortest.max_tokens))
        refusal: _Refusal | None = None
        for takes in (True, False) if workload.ignore_eos else (True,):
            for way in WAYS:
                self._way, self._takes_ignore_eos = way, takes
                try:
                    answer = await self._ask(probe, "a first request", workload.ignore_eos, time.monotonic())
                except _Refusal as error:
                    refusal = error
                    continue
                if answer.tells_ids or way is TEXT:
                    return
        assert refusal is not None
        raise refusal

    def _first_model(self, body: bytes) -> str:
        try:
            model = read_object(body.decode(errors="replace"))["data"][0]["id"]
        except (InvalidJson, KeyError, IndexError, TypeError):
            model = None
        if not isinstance(model, str) or not model:
            raise EngineError(f"{self.name}: {MODELS} names no model: not an OpenAI-compatible server, or another path")
        return model

    async def _run(self, workload: Workload) -> Outcome:
        began_s = time.monotonic()

        async def one(index: int, asked: WorkloadRequest) -> _Answer:
            await asyncio.sleep(max(0.0, began_s + asked.arrival_s - time.monotonic()))
            return await self._ask(asked, f"request {index + 1}", workload.ignore_eos, began_s)

        tasks = [asyncio.create_task(one(index, asked)) for index, asked in enumerate(workload.requests)]
        try:
            answers = await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        # Not sooner: it takes time, in which no token would be seen.
        requests = tuple(answer.finish(self._opened, self._way) for answer in answers)
        return Outcome(requests, seconds=max(one.end_s for one in requests))

    async def _ask(self, asked: WorkloadRequest, what: str, ignore_eos: bool, began_s: float) -> _Answer:
        """One request, from its first byte to its last."""
        body: dict[str, object] = {
            "model": self._model,
            "prompt": list(asked.token_ids),
            "max_tokens": asked.max_tokens,
            "temperature": 0,
            "stream": True,
            **({"ignore_eos": True} if ignore_eos and self._takes_ignore_eos else {}),
            **self._way.fields,
            **({"cache_salt": secrets.token_hex(8)} if self._way.salted else {}),
        }
        answer = _Answer(asked, f"{self.name}: {what}", began_s)
        with self._naming(what):
            async with self._server.exchange("POST", COMPLETIONS, dump(body).encode()) as response:
                await _check(response, answer.what)
                async for event in response.events():
                    if event == "[DONE]":
                        break
                    answer.take(event, self._opened.spec.vocab_size)
        if not answer.reason:
            raise EngineError(f"{answer.what}: the stream ended before the answer did")
        return answer

    @contextmanager
    def _naming(self, what: str) -> Iterator[None]:
        """What goes wrong on the way is an EngineError."""
        try:
            yield
        except (OSError, BrokenStream) as error:
            said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            raise EngineError(f"{self.name}: {what}: {_one_line(said) or type(error).__name__}") from error

    def _describe(self, workload: Workload) -> None:
        notes = [f"the server at {self._server.url}, model {shorten(self._model)}, already running", self._way.told]
        if workload.ignore_eos and not self._takes_ignore_eos:
            notes.append("it refuses ignore_eos: answers may be shorter than they should be")
        elif self._ends_early:
            notes.append("it ended answers although it was told to go on (ignore_eos)")
        caches = "" if self._way.salted else ", caches"
        notes.append(f"not controlled: its weights and their precision, threads, scheduling{caches}")
        self.description = "; ".join(notes)


class _Refusal(EngineError):
    """The server does not take a body as it is."""


@dataclass(slots=True)
class _Answer:
    """What has come of one request."""

    asked: WorkloadRequest
    what: str
    """Begins its errors."""
    began_s: float
    token_ids: list[int] = field(default_factory=list)
    token_s: list[float] = field(default_factory=list)
    tells_ids: bool = False
    texts: list[tuple[float, str]] = field(default_factory=list)
    """Pieces of the text, and when each came."""
    reason: str = ""
    counted: int | None = None
    """Tokens of the answer, as the server counts them."""
    end_s: float = 0.0

    def take(self, event: str, vocab_size: int) -> None:
        """Raises EngineError for an event that is none, or tells of an error."""
        now_s = time.monotonic() - self.began_s
        try:
            data = read_object(event)
        except InvalidJson as error:
            raise EngineError(f"{self.what}: an event cannot be read: {error}") from None
        if data.get("error"):
            raise EngineError(f"{self.what}: failed: {_message(data)}")
        try:
            usage = data.get("usage")
            self.counted = int(usage["completion_tokens"]) if usage else self.counted
            for choice in data["choices"]:
                new = told_ids(choice)
                self.tells_ids |= new is not None
                self._extend(new or [], now_s, vocab_size)
                if choice["text"]:
                    self.texts.append((now_s, str(choice["text"])))
                self.reason = str(choice.get("finish_reason") or self.reason)
                self.end_s = now_s
        except (KeyError, TypeError, ValueError) as error:
            raise EngineError(f"{self.what}: an event lacks what a completion has ({type(error).__name__})") from None
        if self.reason not in ("", "stop", "length"):
            raise EngineError(f"{self.what}: ended with {shorten(self.reason)}, allowed: stop, length")

    def _extend(self, token_ids: Sequence[int], now_s: float, vocab_size: int) -> None:
        if any(not 0 <= token_id < vocab_size for token_id in token_ids):
            raise EngineError(f"{self.what}: token ids from outside the vocabulary: the server has another model")
        self.token_ids += token_ids
        self.token_s += [now_s] * len(token_ids)

    def finish(self, opened: OpenModel, way: Way) -> RequestRun:
        """The whole of it. Raises EngineError where its token ids cannot be known."""
        if way is TEXT:
            self._encode(opened)
        ends = opened.eos_token_ids
        told = bool(self.token_ids) and self.token_ids[-1] in ends
        if self.reason == "stop" and not told and len(ends) == 1:
            # Some servers keep the token to themselves that ends an answer.
            self.token_ids += ends
            self.token_s.append(self.end_s)
        if len(self.token_ids) > self.asked.max_tokens:
            raise EngineError(f"{self.what}: {len(self.token_ids)} tokens came, {self.asked.max_tokens} were asked for")
        return RequestRun(tuple(self.token_ids), self.reason, self.asked.arrival_s, tuple(self.token_s), self.end_s)

    def _encode(self, opened: OpenModel) -> None:
        """Token ids of the text; each was there once the text was there that it ends."""
        text = "".join(piece for _, piece in self.texts)
        found = opened.tokenizer.encode(text, False)
        possible = (len(found), len(found) + 1) if self.reason == "stop" else (len(found),)
        if self.counted not in possible or opened.tokenizer.decode(found, False) != text:
            counted = "it does not count its tokens" if self.counted is None else f"it counted {self.counted} tokens"
            raise EngineError(
                f"{self.what}: the server tells no token ids, and they cannot be found again: {counted}, its text "
                f"gives {len(found)}"
            )
        self.token_ids = found
        self.token_s = list(self._times(Detokenizer(opened.tokenizer, False)))

    def _times(self, detokenizer: Detokenizer) -> Iterator[float]:
        sizes = accumulate(len(piece) for _, piece in self.texts)
        arrived = list(zip(sizes, (when for when, _ in self.texts), strict=True))
        length = 0
        for token_id in self.token_ids:
            length += len(detokenizer.push([token_id]))
            yield next((when for size, when in arrived if size >= length), self.end_s)


def told_ids(choice: Mapping[str, Any]) -> list[int] | None:
    """Token ids in a choice of a chunk; None: it tells none. Raises KeyError, TypeError or ValueError where they cannot
    be read.

    `token_ids` is vLLM's and ours; tokens spelled token_id:N are vLLM's log-probabilities; `content[].id` llama.cpp's.
    """
    if choice.get("token_ids") is not None:
        return [int(one) for one in choice["token_ids"]]
    logprobs = choice.get("logprobs")
    if not logprobs:
        return None
    if logprobs.get("content"):
        content: Sequence[Mapping[str, Any]] = logprobs["content"]
        return [int(one["id"]) for one in content] if all("id" in one for one in content) else None
    tokens: Sequence[str] = logprobs.get("tokens") or ()
    if not tokens or not all(one.startswith(_TOKEN) for one in tokens):
        return None
    return [int(one.removeprefix(_TOKEN)) for one in tokens]


async def _check(response: Response, what: str) -> None:
    """Whether events are to come. Raises EngineError."""
    if response.status != 200:
        message = f"{what}: answers {response.status}: {_said(await response.whole())}"
        raise _Refusal(message) if response.status in REFUSED else EngineError(message)
    kind = response.headers.get("content-type", "")
    if not kind.startswith("text/event-stream"):
        raise EngineError(f"{what}: the answer is {shorten(kind)}, not a stream of events")


def _said(body: bytes) -> str:
    """What a server says of an error, on one line."""
    text = body.decode(errors="replace")
    try:
        return _message(read_object(text))
    except InvalidJson:
        return _one_line(text) or "nothing more"


def _message(data: Mapping[str, Any]) -> str:
    """Of an error in OpenAI's form, TGI's or FastAPI's."""
    error = data.get("error", data)
    said = error.get("message") or error.get("detail") or error if isinstance(error, dict) else error
    return _one_line(str(said))


def _one_line(text: str) -> str:
    """Without what could move a terminal's cursor."""
    words = " ".join(text.split())[:MAX_SAID]
    return "".join(one if one.isprintable() else "\N{REPLACEMENT CHARACTER}" for one in words)
