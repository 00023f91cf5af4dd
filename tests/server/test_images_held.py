"""The bound on what long bodies and images hold, and how long anybody waits for an image."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.requests import Request

from headrace.core.errors import BodyTooLarge, ClientGone, DeadlineExceeded, HeadraceError, InvalidParameter, QueueFull
from headrace.core.types import EngineLimits, ImageLimits, ImageSpan
from headrace.core.types import Request as EngineRequest
from headrace.engine.model import OpenModel
from headrace.server.config import ServeConfig
from headrace.server.held import FREE_BYTES, MIB, WHILE_READ, Hold, Room
from headrace.server.metrics import ServerMetrics
from headrace.server.service import IMAGE_WORKERS, Service

# ---------------------------------------------------------------- the room


def test_a_hold_says_what_it_holds_now() -> None:
    room = Room(100)
    one, two = Hold(room), Hold(room)
    one.set(60)
    two.set(40)
    with pytest.raises(QueueFull, match=r"max_held_mib") as caught:
        two.set(41)
    assert caught.value.retry_after_s > 0
    assert (room.held_bytes, two.num_bytes) == (100, 40), "a refusal changes nothing"
    one.set(59)
    two.set(41)
    with pytest.raises(BodyTooLarge, match=r"^body: .*max_held_mib"):
        two.set(101)
    one.close()
    one.close()
    assert room.held_bytes == 41
    two.close()
    assert room.held_bytes == 0


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 120)), max_size=40))
def test_the_bound_holds(steps: list[tuple[int, int]]) -> None:
    room = Room(100)
    holds = [Hold(room) for _ in range(4)]
    for index, num_bytes in steps:
        before = room.held_bytes - holds[index].num_bytes
        try:
            holds[index].set(num_bytes)
        except HeadraceError:
            assert before + num_bytes > 100
        assert room.held_bytes == sum(hold.num_bytes for hold in holds) <= 100
    for hold in holds:
        hold.close()
    assert room.held_bytes == 0


def body_of(pieces: list[bytes], length: int | None = None) -> Request:
    """A request whose body comes in these pieces."""
    left = list(pieces)

    async def receive() -> dict[str, object]:
        return {"type": "http.request", "body": left.pop(0), "more_body": bool(left)}

    headers = [] if length is None else [(b"content-length", str(length).encode())]
    return Request({"type": "http", "method": "POST", "headers": headers, "state": {}}, receive)


def test_a_body_is_counted_as_it_comes() -> None:
    room = Room(WHILE_READ * 100)
    hold = Hold(room)
    seen: list[int] = []

    async def read() -> None:
        async for _ in hold.reading(body_of([b"x" * FREE_BYTES, b"x" * 10, b"x" * 90])).stream():
            seen.append(room.held_bytes)

    asyncio.run(read())
    assert seen == [0, WHILE_READ * 10, WHILE_READ * 100, WHILE_READ * 100]
    hold.parsed()
    assert room.held_bytes == 100, "its values are left"


def test_a_body_that_is_told_of_takes_nothing_yet() -> None:
    """Otherwise clients that tell of long bodies and send nothing would keep everybody out."""
    room = Room(WHILE_READ * 100)
    Hold(room).reading(body_of([b""], FREE_BYTES + 100))
    assert room.held_bytes == 0
    with pytest.raises(BodyTooLarge):
        Hold(room).reading(body_of([b""], FREE_BYTES + 101))
    Hold(room).set(1)
    with pytest.raises(QueueFull):
        Hold(room).reading(body_of([b""], FREE_BYTES + 100))


def test_of_bodies_that_come_together_as_many_are_read_as_fit() -> None:
    """Each grows beside the others until there is no room: who is refused then makes room for those left."""
    room = Room(3 * WHILE_READ * 100 + 50)
    refused = 0

    async def read() -> None:
        nonlocal refused
        hold = Hold(room)
        try:
            async for _ in hold.reading(body_of([b"x" * FREE_BYTES, *[b"x"] * 100])).stream():
                await asyncio.sleep(0)
        except QueueFull:
            refused += 1
            assert hold.num_bytes == 0

    async def run() -> None:
        await asyncio.gather(*(read() for _ in range(8)))

    asyncio.run(run())
    assert refused == 5 and room.held_bytes == 3 * WHILE_READ * 100


# ---------------------------------------------------------------- the settings


def test_bodies_have_room_for_images() -> None:
    assert ServeConfig().max_body_bytes == 2 * MIB
    assert ServeConfig().with_images(1, 3).max_body_bytes == 6 * MIB
    assert ServeConfig().with_images(32, 20).max_body_bytes == 66 * MIB
    assert ServeConfig(max_body_mib=5).with_images(32, 20).max_body_bytes == 5 * MIB


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_held_mib", 15),
        ("max_held_mib", 2**21),
        ("max_held_mib", 64.5),
        ("max_body_mib", 0),
        ("max_body_mib", True),
    ],
)
def test_settings_out_of_range(name: str, value: Any) -> None:
    with pytest.raises(InvalidParameter, match=f"^{name}: got"):
        ServeConfig(**{name: value})


# ---------------------------------------------------------------- time


class Client:
    """A client that waits for its answer until it is told to leave."""

    def __init__(self) -> None:
        self._left = asyncio.Event()
        self.request = Request({"type": "http", "method": "POST", "headers": [], "state": {}}, self._receive)

    def leave(self) -> None:
        self._left.set()

    async def _receive(self) -> dict[str, object]:
        await self._left.wait()
        return {"type": "http.disconnect"}


def service_of(limits: EngineLimits) -> Service:
    opened = SimpleNamespace(limits=limits, requested=SimpleNamespace(max_image_mib=20), adapters={}, vocabulary=None)
    identity = SimpleNamespace(served=("m",), system_fingerprint="fp")
    metrics = ServerMetrics("m", 100)
    return Service(cast("OpenModel", opened), ServeConfig(), cast("Any", None), metrics, cast("Any", identity))


SEEING = EngineLimits(100, 100, images=ImageLimits(7, 4, 28, 32))


@pytest.fixture
def slow() -> Any:
    """What an image that does not come is: it blocks until the test ends."""
    released = threading.Event()
    yield lambda: released.wait(60)
    released.set()


def test_the_settings_are_the_models() -> None:
    assert service_of(SEEING).settings.max_body_bytes == 66 * MIB
    assert service_of(EngineLimits(100, 100)).settings.max_body_bytes == 2 * MIB


@pytest.mark.parametrize("body", [b'{"a": "%s"}', b'{"a": "%s"'])
def test_what_a_request_holds_ends_with_its_task(body: bytes) -> None:
    whole = body % (b"x" * FREE_BYTES * 2)

    async def run() -> None:
        service = service_of(SEEING)

        async def request() -> None:
            await service.read_json(body_of([whole[:FREE_BYTES], whole[FREE_BYTES:]]))
            assert service.room.held_bytes == len(whole) - FREE_BYTES
            raise ValueError  # whatever goes wrong then

        await asyncio.gather(asyncio.create_task(request()), return_exceptions=True)
        await asyncio.sleep(0)
        assert service.room.held_bytes == 0

    asyncio.run(run())


def test_pixels_count_for_each_answer() -> None:
    async def run() -> None:
        service = service_of(SEEING)
        http = body_of([b""])
        hold = http.scope["state"]["hold"] = Hold(service.room)
        one = EngineRequest("a", (7,), images=(ImageSpan(0, 1, "0" * 64, pixels=b"x" * 1000),))
        service._hold_pixels([one], http, kept_bytes=5)
        assert hold.num_bytes == 1005
        service.room.most_bytes = 1999
        with pytest.raises(BodyTooLarge):
            service._hold_pixels([one, one], http, kept_bytes=0)
        assert 'code="body_too_large"} 2' in service.metrics.text()

    asyncio.run(run())


def test_nobody_waits_for_the_images_of_others(slow: Callable[[], Any]) -> None:
    async def run() -> None:
        service = service_of(SEEING)
        clients = [Client() for _ in range(IMAGE_WORKERS + 2)]
        waiting = [asyncio.create_task(service.prepare(slow, images=client.request)) for client in clients]
        await asyncio.sleep(0)
        assert await service.work(lambda: "text") == "text"
        assert service._preparing == len(clients)
        # A client that leaves frees its place at once, whether its images are being fetched or not.
        for client in clients:
            client.leave()
        for one in waiting:
            with pytest.raises(ClientGone):
                await one
        assert service._preparing == 0
        text = service.metrics.text()
        assert f'request_success_total{{model_name="m",engine="0",finished_reason="abort"}} {len(clients)}' in text

    asyncio.run(run())


def test_a_deadline_does_not_wait_for_an_image(slow: Callable[[], Any]) -> None:
    async def run() -> None:
        service = service_of(SEEING)
        with pytest.raises(DeadlineExceeded, match=r"0\.05 s"):
            await service.prepare(slow, timeout_s=0.05, images=Client().request)
        assert service._preparing == 0
        assert 'request_errors_total{model_name="m",engine="0",code="deadline_exceeded"} 1' in service.metrics.text()

    asyncio.run(run())


def test_what_was_not_begun_is_never_done(slow: Callable[[], Any]) -> None:
    done: list[int] = []

    async def run() -> None:
        service = service_of(SEEING)
        busy = [Client() for _ in range(IMAGE_WORKERS)]
        tasks = [asyncio.create_task(service.prepare(slow, images=client.request)) for client in busy]
        await asyncio.sleep(0)
        with pytest.raises(DeadlineExceeded):
            await service.prepare(lambda: done.append(1) or (), timeout_s=0.05, images=Client().request)  # type: ignore[func-returns-value]
        for one in tasks:
            one.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(run())
    assert done == []
