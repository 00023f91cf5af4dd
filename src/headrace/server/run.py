"""One body's requests in the engine: events in, texts and completions out."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from headrace.core.errors import CodedError, HeadraceError
from headrace.core.types import Event, Request, TokenEvent
from headrace.engine.answer import Answer, Completion
from headrace.engine.supervisor import Supervisor
from headrace.server.metrics import Finished, ServerMetrics
from headrace.text.tokenizer import Tokenizer

OnEnd = Callable[[Request, Completion], None]
"""Hears of each answer's end."""


class Run:
    """Ends its requests when it is closed before they are done."""

    def __init__(
        self,
        supervisor: Supervisor,
        metrics: ServerMetrics,
        requests: Sequence[Request],
        tokenizer: Tokenizer | None,
        on_end: OnEnd | None = None,
    ) -> None:
        """Raises NotReady while there is no engine."""
        self.requests = [replace(request, images=()) for request in requests]
        """Without their images: the engine has these."""
        self.answers = [Answer(i, request, tokenizer, request.arrival_s, i) for i, request in enumerate(self.requests)]
        self.completions: list[Completion | None] = [None] * len(requests)
        self._supervisor = supervisor
        self._metrics = metrics
        self._on_end = on_end
        self._left = len(requests)
        self._closed = False
        self._changed: dict[int, None] = {}
        self._waiter: asyncio.Future[None] | None = None
        self._heeds_tokens = True
        self._last_s: list[float | None] = [None] * len(requests)
        self._shares = [metrics.begin(len(request.token_ids), len(request.images)) for request in requests]
        try:
            for index, request in enumerate(requests):
                supervisor.submit(request, partial(self._take, index))
        except BaseException:
            self.close()
            raise

    def _take(self, index: int, event: Event) -> None:
        answer = self.answers[index]
        if isinstance(event, TokenEvent):
            last_s, self._last_s[index] = self._last_s[index], event.time_s
            share = self._shares[index]
            if last_s is None:
                self._metrics.first_token(event.time_s - self.requests[index].arrival_s, share)
            self._metrics.tokens(len(event.token_ids), None if last_s is None else event.time_s - last_s, share)
            if (num_output := answer.tokens(event)) is not None:
                self._supervisor.finish(event.request_id, num_output)
            if not self._heeds_tokens:
                return
        else:
            self.completions[index] = completion = answer.end(event)
            self._left -= 1
            self._record(index, completion)
        self._changed[index] = None
        self.wake()

    def _record(self, index: int, completion: Completion) -> None:
        request, share = self.requests[index], self._shares[index]
        if completion.error is not None:
            self._metrics.failed(completion.error.code, share)
        else:
            queue_s = completion.queue_s or 0.0
            self._metrics.finished(Finished.of(completion, queue_s, request.sampling.max_tokens), share)
        if self._on_end is not None:
            self._on_end(request, completion)

    def wake(self) -> None:
        """Lets `changes` return."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def changes(self) -> list[int]:
        """The choices with something new since the last call, in order of their news; empty after a mere `wake`."""
        if not self._changed and self._left:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
            self._waiter = None
        changed, self._changed = list(self._changed), {}
        return changed

    @property
    def done(self) -> bool:
        """Whether every choice has its completion."""
        return self._left == 0

    @property
    def failure(self) -> HeadraceError | None:
        """The first failed choice's error."""
        failed = next((one.error for one in self.completions if one is not None and one.error is not None), None)
        return None if failed is None else CodedError(failed.code, failed.message)

    async def whole(self) -> list[Completion]:
        """Waits for all of them. Raises the error of one that failed."""
        self._heeds_tokens = False
        while not self.done:
            await self.changes()
            if (failure := self.failure) is not None:
                self.close()
                raise failure
        if (failure := self.failure) is not None:
            raise failure
        return [one for one in self.completions if one is not None]

    def close(self) -> None:
        """Aborts what is unfinished. Idempotent."""
        if self._closed or self.done:
            return
        self._closed = True
        for request, completion, share in zip(self.requests, self.completions, self._shares, strict=True):
            if completion is None:
                self._supervisor.abort(request.id)
                self._metrics.aborted(share)
