"""What the routes share: the opened model, the engine, who may come in, and the run of one body's requests."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, TypeVar

from starlette.requests import Request as HttpRequest

from headrace.api.answers import Stamp
from headrace.core.errors import (
    ClientGone,
    DeadlineExceeded,
    HeadraceError,
    InvalidParameter,
    NotReady,
    QueueFull,
    ShuttingDown,
)
from headrace.core.types import Request
from headrace.engine.answer import Completion
from headrace.engine.identity import ModelIdentity
from headrace.engine.model import OpenModel
from headrace.engine.supervisor import Supervisor
from headrace.server.config import ServeConfig
from headrace.server.held import Hold, Room
from headrace.server.limits import read_json
from headrace.server.metrics import ServerMetrics
from headrace.server.run import OnEnd, Run
from headrace.server.traces import Traces, traced
from headrace.text.grammar_worker import GrammarChecker

MIN_RETRY_S, MAX_RETRY_S = 1, 60
"""What `Retry-After` says."""
RATE_SAMPLES = 10
TIMEOUT_HEADER = "x-request-timeout"
IMAGE_WORKERS = 4
"""Threads that fetch and decode images: a large one takes some 128 MiB meanwhile, and a slow address only waits."""
SAMPLE_S = 1.0
"""Between two looks at the meters and the engine's counts."""

T = TypeVar("T")


class DrainRate:
    """Requests that end in a second while others wait for their place; 0: not known. Idle times say nothing of it."""

    def __init__(self) -> None:
        self.value = 0.0
        self._before: tuple[float, int] | None = None

    def sample(self, now_s: float, ended: int, is_queued: bool) -> None:
        """To be called once a second. Averaged over about `RATE_SAMPLES` of them."""
        if not is_queued:
            self._before = None
            return
        if self._before is not None:
            then_s, then = self._before
            rate = (ended - then) / max(1e-6, now_s - then_s)
            self.value += (rate - self.value) / RATE_SAMPLES if self.value else rate
        self._before = (now_s, ended)


class Service:
    """One server's state. Lives in one event loop."""

    def __init__(
        self,
        opened: OpenModel,
        settings: ServeConfig,
        supervisor: Supervisor,
        metrics: ServerMetrics,
        identity: ModelIdentity,
        traces: Traces | None = None,
    ) -> None:
        self.opened = opened
        if (seen := opened.limits.images) is not None:
            settings = settings.with_images(seen.most, opened.requested.max_image_mib)
        self.settings = settings
        self.room = Room(settings.max_held_mib * 2**20)
        self.supervisor = supervisor
        self.metrics = metrics
        self.traces = traces
        self.grammars = GrammarChecker(opened.vocabulary)
        self.limits = opened.limits
        names = tuple(name for name in identity.served if name not in opened.adapters)
        self.served = tuple(settings.served_model_name) or names
        """Names of the model; the first is its own."""
        self.created = int(time.time())
        self.fingerprint = identity.system_fingerprint
        self.draining = False
        self._ending: asyncio.Event = asyncio.Event()
        self._preparing = 0
        self._drained = DrainRate()
        # Templates and long texts are not for the loop that every stream waits on.
        self._workers = ThreadPoolExecutor(2, thread_name_prefix="headrace-prepare")
        # Nor are images for the threads that every text waits for.
        self._image_workers = ThreadPoolExecutor(IMAGE_WORKERS, thread_name_prefix="headrace-images")
        # A grammar may take its whole second. Those that wait for one another here are told so by the checker.
        self._checkers = ThreadPoolExecutor(8, thread_name_prefix="headrace-grammars")

    # ------------------------------------------------------------ bodies

    async def read_json(self, request: HttpRequest) -> dict[str, Any]:
        """A request's body. Raises RequestError, BodyTooLarge, QueueFull."""
        hold = Hold(self.room)
        request.scope.setdefault("state", {})["hold"] = hold
        # The task of a request ends with the last byte of its answer, or without one.
        task = asyncio.current_task()
        assert task is not None
        task.add_done_callback(lambda _: hold.close())
        try:
            body = await read_json(hold.reading(request), self.settings.max_body_bytes)
        except QueueFull as error:
            self.metrics.rejected(error.code)
            raise
        hold.parsed()
        return body

    def request_id(self, request: HttpRequest) -> str:
        """128 random bits, those of the answer's header x-request-id."""
        return str(request.scope["state"]["request_id"])

    def stamp(self, request_id: str, model: str) -> Stamp:
        return Stamp(request_id, int(time.time()), model, self.fingerprint)

    def salt(self, request: HttpRequest) -> str:
        """Of the caller's key: prompts of different keys share no block of the prefix cache."""
        return str(request.scope.get("state", {}).get("key_salt", ""))

    def timeout_s(self, request: HttpRequest, asked_s: float | None) -> float | None:
        """The request's own limit: of its body, else of the header X-Request-Timeout. Raises InvalidParameter."""
        if asked_s is not None or (text := request.headers.get(TIMEOUT_HEADER)) is None:
            return asked_s
        try:
            value = float(text)
        except ValueError:
            value = 0.0
        if not 0 < value <= 86_400:
            raise InvalidParameter(TIMEOUT_HEADER, text, "seconds above 0, up to 86400")
        return value

    # ------------------------------------------------------------ who comes in

    def admit(self, count: int) -> None:
        """Raises ShuttingDown, NotReady or QueueFull before any work is done for `count` requests."""
        if self.draining:
            self.metrics.rejected(ShuttingDown.code, count)
            raise ShuttingDown("the server is shutting down")
        if not self.supervisor.ready:
            self.metrics.rejected(NotReady.code, count)
            raise NotReady("the engine is not ready", retry_after_s=MIN_RETRY_S)
        seats = self.opened.config.max_num_seqs
        room = seats + self.settings.max_queued
        if count > room:
            raise InvalidParameter("n", count, f"prompts × n up to {room}, all that run and wait on this server")
        live = self.supervisor.live + self._preparing
        wait_s = (live + count - seats) / self._drained.value if self._drained.value else 0.0
        if live + count > room or wait_s > self.settings.queue_timeout:
            self.metrics.rejected(QueueFull.code, count)
            raise QueueFull(
                f"{max(0, live - seats)} requests wait already, allowed: {self.settings.max_queued}, and no longer "
                f"than {self.settings.queue_timeout:g} s",
                retry_after_s=min(MAX_RETRY_S, max(MIN_RETRY_S, wait_s / 2)),
            )

    async def prepare(
        self,
        make: Callable[[], tuple[Request, ...]],
        count: int = 1,
        timeout_s: float | None = None,
        images: HttpRequest | None = None,
    ) -> tuple[Request, ...]:
        """Makes the requests of one body (template, tokenising) off the event loop; `make` may raise RequestError.

        `count`: how many they will be. `images`: the client's request where it has images, which may take long: they
        have threads of their own, and neither a client that leaves nor a deadline waits for them. Raises ClientGone,
        DeadlineExceeded.
        """
        self.metrics.received(count)
        began_s = time.monotonic()
        self._preparing += count
        try:
            if images is None:
                requests = await self.work(make)
            else:
                requests = await self._in_time(self.work(make, images=True), images, timeout_s)
            if grammar := requests[0].grammar:
                loop = asyncio.get_running_loop()
                grammar = await loop.run_in_executor(self._checkers, self.grammars.check, grammar)
                requests = tuple(replace(one, grammar=grammar) for one in requests)
        except ClientGone:
            for _ in range(count):
                self.metrics.aborted()
            raise
        except HeadraceError as error:
            self.metrics.failed(error.code)
            raise
        finally:
            self._preparing -= count
        if timeout_s is not None and time.monotonic() > began_s + timeout_s:
            raise _too_late(timeout_s)
        join_by_s = began_s + self.settings.queue_timeout
        deadline_s = None if timeout_s is None else began_s + timeout_s
        return tuple(replace(one, arrival_s=began_s, join_by_s=join_by_s, deadline_s=deadline_s) for one in requests)

    async def work(self, make: Callable[[], T], images: bool = False) -> T:
        """Runs something that takes long off the event loop. `images`: it looks at some."""
        workers = self._image_workers if images else self._workers
        return await asyncio.get_running_loop().run_in_executor(workers, make)

    async def _in_time(self, work: Awaitable[T], http: HttpRequest, timeout_s: float | None) -> T:
        """Waits for work. Without its client, or past its deadline, work that has not begun is never done, and what
        comes of other work is dropped. Raises ClientGone, DeadlineExceeded."""
        working, gone = asyncio.ensure_future(work), asyncio.create_task(until_gone(http))
        try:
            await asyncio.wait([working, gone], timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
            if working.done():
                return working.result()
            if gone.done():
                raise ClientGone("the client closed the connection")
            raise _too_late(timeout_s)
        finally:
            working.cancel()
            gone.cancel()

    def run(
        self, requests: Sequence[Request], http: HttpRequest | None = None, operation: str = "", kept_bytes: int = 0
    ) -> Run:
        """Gives the requests to the engine. `http`: the client's; `operation`: for a trace; `kept_bytes`: so much of
        the body the answer repeats. Raises NotReady, ShuttingDown, and where there is no room for the pixels QueueFull
        or BodyTooLarge."""
        if self._ending.is_set():
            raise ShuttingDown("the server is shutting down")
        if http is not None:
            self._hold_pixels(requests, http, kept_bytes)
        tokenizer = self.opened.tokenizer if self.opened.has_text else None
        on_end = None if http is None else self._tracing(http, operation)
        return Run(self.supervisor, self.metrics, requests, tokenizer, on_end)

    def _hold_pixels(self, requests: Sequence[Request], http: HttpRequest, kept_bytes: int) -> None:
        """From now on the engine holds them, once for each answer; the rest of the body is not needed any more."""
        hold: Hold = http.scope["state"]["hold"]
        try:
            hold.set(kept_bytes + sum(len(image.pixels) for one in requests for image in one.images))
        except HeadraceError as error:
            for _ in requests:
                self.metrics.failed(error.code)
            raise

    def _tracing(self, http: HttpRequest, operation: str) -> OnEnd | None:
        """What sends the spans of a body's answers, if traces are asked for."""
        traces = self.traces
        if traces is None:
            return None
        arrival_ns = time.time_ns()
        headers = {name: value for name, value in http.headers.items() if name in ("traceparent", "tracestate")}

        def end(request: Request, completion: Completion) -> None:
            traces.request(traced(request, completion, operation, self.served[0], arrival_ns), headers)

        return end

    async def whole(self, request: HttpRequest, run: Run) -> list[Completion]:
        """Waits for a run; a client that goes away ends it. Raises the error of a request that failed, ClientGone."""
        gone = asyncio.create_task(until_gone(request))
        answered = asyncio.create_task(run.whole())
        try:
            await asyncio.wait([gone, answered], return_when=asyncio.FIRST_COMPLETED)
            if not answered.done():
                raise ClientGone("the client closed the connection")
            return answered.result()
        finally:
            run.close()
            for task in (gone, answered):
                task.cancel()

    # ------------------------------------------------------------ state

    @property
    def ready(self) -> bool:
        return not self.draining and self.supervisor.ready

    async def sample(self) -> None:
        """Once a second, as long as the server runs: meters and counts, so that little is lost if the engine ends."""
        while True:
            await asyncio.sleep(SAMPLE_S)
            self.metrics.sample()
            is_queued = self.supervisor.live > self.opened.config.max_num_seqs
            self._drained.sample(time.monotonic(), self.metrics.ended, is_queued)
            await self.refresh()

    async def refresh(self) -> None:
        """Brings up to date what is counted elsewhere: by the engine, which is asked, and by this service's room."""
        self.metrics.engine(await self.supervisor.stats(), self.supervisor.restarts)
        self.metrics.held(self.room.held_bytes)

    def live(self) -> Mapping[str, object]:
        """What the page shows beside the chat."""
        live = self.supervisor.live
        running = min(live, self.opened.config.max_num_seqs)
        return {
            "running": running,
            "waiting": live - running + self._preparing,
            "tokens_per_s": self.metrics.tokens_per_s(),
            "model": self.served[0],
            "ready": self.ready,
        }

    async def drain(self) -> None:
        """No more requests; those that run get their time, then an error each."""
        self.draining = True
        until_s = time.monotonic() + self.settings.drain
        while (self.supervisor.live or self._preparing) and time.monotonic() < until_s and not self._ending.is_set():
            await asyncio.sleep(0.02)
        self.end()

    def end(self) -> None:
        """Ends every request now."""
        self.draining = True
        self._ending.set()
        self.supervisor.fail_all(ShuttingDown("the server is shutting down"))

    async def close(self) -> None:
        """Ends the engine. Idempotent."""
        await self.supervisor.close()
        self.grammars.close()
        if self.traces is not None:
            await asyncio.to_thread(self.traces.close)
        for pool in (self._workers, self._image_workers, self._checkers):
            pool.shutdown(wait=False, cancel_futures=True)
        self.opened.close()


def _too_late(timeout_s: float | None) -> DeadlineExceeded:
    return DeadlineExceeded(f"not finished by its deadline of {timeout_s or 0:g} s")


async def until_gone(request: HttpRequest) -> None:
    """Returns when the client has closed the connection. The body was read before."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
