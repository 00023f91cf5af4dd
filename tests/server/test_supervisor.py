"""The engine's process as the server sees it: real processes on the demo model."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from headrace.core.config import EngineConfig
from headrace.core.errors import CodedError, NotReady
from headrace.core.types import ErrorEvent, Event, FinishEvent, Request, SamplingParams
from headrace.engine import supervisor as module
from headrace.engine.supervisor import Supervisor

ASKED = SamplingParams(max_tokens=8, ignore_eos=True)


@asynccontextmanager
async def supervised() -> AsyncIterator[Supervisor]:
    one = Supervisor(EngineConfig("demo", threads=1), frozenset({2}), 0.1)
    await one.start()
    try:
        yield one
    finally:
        await one.close()


async def until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)


def engine_pid(one: Supervisor) -> int:
    assert one._process is not None
    return one._process.pid


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def awaited() -> None:
        await test()

    asyncio.run(awaited())


def test_a_sink_that_raises_fails_alone(demo_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        async with supervised() as one:
            heard: list[Event] = []
            broken: list[Event] = []

            def breaks(event: Event) -> None:
                broken.append(event)
                raise RuntimeError("on purpose")

            one.submit(Request("broken", (1, 2, 3), ASKED), breaks)
            one.submit(Request("sound", (1, 2, 3), ASKED), heard.append)
            await until(lambda: bool(heard) and isinstance(heard[-1], FinishEvent))
            assert len(broken) == 2 and isinstance(broken[1], ErrorEvent) and broken[1].code == "engine_fault"
            assert (one.live, one.restarts) == (0, 0) and one.ready

    run(test)
    assert "on purpose" in caplog.text


def test_an_engine_that_is_killed_is_replaced_and_its_requests_are_told(demo_path: Path) -> None:
    async def test() -> None:
        async with supervised() as one:
            heard: list[Event] = []
            one.submit(Request("a", (1, 2, 3), SamplingParams(max_tokens=4000, ignore_eos=True)), heard.append)
            await until(lambda: bool(heard))
            os.kill(engine_pid(one), signal.SIGKILL)
            await until(lambda: isinstance(heard[-1], ErrorEvent))
            assert isinstance(heard[-1], ErrorEvent) and "signal 9" in heard[-1].message
            assert not one.ready
            with pytest.raises(NotReady):
                one.submit(Request("b", (1, 2, 3), ASKED), heard.append)
            await until(lambda: one.ready)
            answer: list[Event] = []
            one.submit(Request("c", (1, 2, 3), ASKED), answer.append)
            await until(lambda: bool(answer) and isinstance(answer[-1], FinishEvent))
            assert one.restarts == 1

    run(test)


def test_an_engine_that_hangs_while_it_loads_is_replaced(demo_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOAD_S", 1.0)

    async def test() -> None:
        async with supervised() as one:
            one._load_s = 0.3
            os.kill(engine_pid(one), signal.SIGKILL)
            first = engine_pid(one)
            await until(lambda: engine_pid(one) != first)
            hanging = engine_pid(one)
            os.kill(hanging, signal.SIGSTOP)
            await until(lambda: one.ready and engine_pid(one) != hanging, 60)

    run(test)


def test_a_model_that_cannot_be_loaded_is_told_with_its_own_code(tmp_path: Path) -> None:
    async def test() -> None:
        one = Supervisor(EngineConfig(str(tmp_path)), frozenset(), 0.1)
        with pytest.raises(CodedError) as caught:
            await one.start()
        await one.close()
        assert caught.value.code == "model_not_found" and caught.value.status == 404

    run(test)
