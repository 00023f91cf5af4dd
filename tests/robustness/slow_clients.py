"""Clients that send or read as slowly as they can: they are cut off in time, hold little memory, and slow nobody down.

    python -m tests.robustness.slow_clients [--short] [--url URL] [--json FILE]

Some send a byte of a header now and then and never end; some read a byte a second; some never read. What lies unread,
and when it stopped flowing, is read from the kernel's table of sockets: the server must be on this machine. Each
event carries the model's name, which is a long one here, so that answers do not fit the sockets' buffers. What slow
clients do to others is measured once their answers are computed: until then it is the work they ask for that costs.
"""

from __future__ import annotations

import asyncio
import socket
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tests.robustness.http_load import (
    ANSWER,
    COMPLETIONS,
    Address,
    Outcome,
    answer_body,
    ask,
    figures,
    memory_bytes,
    percentile,
    request_bytes,
    until,
    until_free,
)
from tests.robustness.score import Score, Target, run_script

DRIP_S = 0.5
"""Between two bytes of a header that never ends."""
LATE_S = 1.0
MOST_BYTES = 256 * 1024
RECEIVE_BUFFER = 4096
WITNESSES = 4
LOOK_S = 0.2
TCP_TABLE = Path("/proc/net/tcp")
ESTABLISHED = "01"
MODEL_NAME = "m" * 1500


@dataclass(frozen=True, slots=True)
class Size:
    dripping: int
    trickling: int
    deaf: int
    answer_tokens: int
    """Of an answer that is read slowly."""
    header_s: float
    write_s: float
    witness_tokens: int
    witness_rounds: int


FULL = Size(200, 50, 50, 200, 10.0, 30.0, 200, 3)
SHORT = Size(40, 4, 4, 200, 2.0, 3.0, 60, 1)


# ---------------------------------------------------------------- headers that never end


async def drip(address: Address) -> tuple[float, int]:
    """(seconds until the server ended it, the status it said)"""
    reader, writer = await asyncio.open_connection(*address)
    began_s = time.monotonic()

    async def write() -> None:
        writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\nx-slow: ")
        while True:
            await asyncio.sleep(DRIP_S)
            writer.write(b"a")

    writing = asyncio.create_task(write())
    try:
        answer = await asyncio.wait_for(reader.read(), 120)
        seconds = time.monotonic() - began_s
    except (OSError, TimeoutError):
        answer, seconds = b"", time.monotonic() - began_s
    finally:
        writing.cancel()
        writer.transport.abort()
    return seconds, int(answer.split(b" ", 2)[1]) if answer.startswith(b"HTTP/1.1 ") else 0


# ---------------------------------------------------------------- answers that are not read


class Unread:
    """Connections whose answers lie unread, or nearly: when each stopped flowing, and when the server let go of it."""

    def __init__(self, target: Target, size: Size) -> None:
        address = target.address
        self._port = f":{address[1]:04X}"
        self._trickling = size.trickling
        self._sockets: list[socket.socket] = []
        # A server from outside has a short name.
        more = {} if target.pid else {"logprobs": 20}
        body = answer_body("Slowly", size.answer_tokens, stream=True, **more)
        for _ in range(size.trickling + size.deaf):
            sock = socket.socket()
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER)
            sock.connect(address)
            sock.sendall(request_bytes(COMPLETIONS, body))
            self._sockets.append(sock)
        self._by_port = {sock.getsockname()[1]: index for index, sock in enumerate(self._sockets)}
        count = len(self._sockets)
        self.stopped_s = [0.0] * count
        """When the kernel's queue grew for the last time."""
        self.ended_s = [0.0] * count
        self.queued = [0] * count
        """Most bytes that the kernel held for it, on the server's side."""

    async def watch(self, limit_s: float) -> None:
        """Until the server has let go of all of them."""
        read_s = time.monotonic()
        until_s = read_s + limit_s
        while not all(self.ended_s) and time.monotonic() < until_s:
            now_s = time.monotonic()
            queues = self._queues()
            for index, ended_s in enumerate(self.ended_s):
                if index not in queues:
                    self.ended_s[index] = ended_s or now_s
                elif queues[index] > self.queued[index]:
                    self.queued[index], self.stopped_s[index] = queues[index], now_s
            if now_s - read_s >= 1:
                read_s = now_s
                self._read_a_byte()
            await asyncio.sleep(LOOK_S)

    def _queues(self) -> dict[int, int]:
        """Unsent bytes of the server's ends that are open."""
        found = {}
        for line in TCP_TABLE.read_text().splitlines()[1:]:
            _, local, remote, state, queues, *_ = line.split()
            if local.endswith(self._port) and state == ESTABLISHED:
                index = self._by_port.get(int(remote.rpartition(":")[2], 16))
                if index is not None:
                    found[index] = int(queues.partition(":")[0], 16)
        return found

    def _read_a_byte(self) -> None:
        for sock, ended_s in zip(self._sockets[: self._trickling], self.ended_s, strict=False):
            if not ended_s:
                with suppress(OSError):  # nothing there, or just ended
                    sock.recv(1, socket.MSG_DONTWAIT)

    def close(self) -> None:
        for sock in self._sockets:
            sock.close()


# ---------------------------------------------------------------- those who are not slow


async def witnesses(address: Address, size: Size) -> list[float]:
    """Seconds between two tokens of clients that read as fast as they can."""
    gaps: list[float] = []
    for _ in range(size.witness_rounds):
        outcomes: list[Outcome] = await asyncio.gather(
            *(ask(address, answer_body(f"Quick {n}", size.witness_tokens, stream=True)) for n in range(WITNESSES))
        )
        if any(outcome.ending != ANSWER for outcome in outcomes):
            return [float("inf")]
        gaps += [gap for outcome in outcomes for gap in outcome.gaps_s]
    return gaps


async def computed(target: Target) -> float:
    """Seconds until nothing is left to compute; the answers may lie unread."""

    async def idle() -> bool:
        found = await figures(target.address)
        return found["num_requests_running"] + found["num_requests_waiting"] == 0

    return await until(idle, 300)


async def measure(target: Target, score: Score, short: bool) -> None:
    size = SHORT if short else FULL
    score.note(
        f"{size.dripping} that never end their headers, {size.trickling} that read a byte a second, {size.deaf} that "
        f"never read; header timeout {size.header_s:g} s, write timeout {size.write_s:g} s"
    )
    alone = await witnesses(target.address, size)
    await headers_that_never_end(target, score, size, alone, short)
    await unread_answers(target, score, size, alone, short)
    score.at_most("nothing held at the end", await until_free(target.address), 0.25)
    score.zero("engine restarts", (await figures(target.address)).get("engine_restarts_total", 0))


def compare(score: Score, what: str, gaps: Sequence[float], alone: Sequence[float], short: bool) -> None:
    """p99 of time between tokens beside that without slow clients; a short form has too few tokens for 1.2."""
    ratio = percentile(gaps, 0.99) / percentile(alone, 0.99)
    score.note(
        f"time between tokens, p99: {1000 * percentile(alone, 0.99):.1f} ms alone, "
        f"{1000 * percentile(gaps, 0.99):.1f} ms beside them; p50 {1000 * percentile(alone, 0.5):.1f} and "
        f"{1000 * percentile(gaps, 0.5):.1f} ms"
    )
    score.at_most(what, ratio, 3 if short else 1.2, "times")


async def headers_that_never_end(target: Target, score: Score, size: Size, alone: Sequence[float], short: bool) -> None:
    memory = memory_bytes(target.pid) if target.pid else 0
    dripping = [asyncio.create_task(drip(target.address)) for _ in range(size.dripping)]
    await asyncio.sleep(0.3)
    gaps = await witnesses(target.address, size)
    grown = (memory_bytes(target.pid) - memory) / size.dripping if target.pid else 0
    found = await asyncio.gather(*dripping)
    worst = max(abs(seconds - size.header_s) for seconds, _ in found)
    score.at_most("headers: cut off this far from the header timeout", worst, LATE_S)
    score.zero("headers: without 408", sum(status != 408 for _, status in found), len(found))
    if target.pid:
        score.at_most("headers: memory of each", grown / 1024, MOST_BYTES / 1024, "KiB")
    compare(score, "headers: others' time between tokens, p99", gaps, alone, short)


async def unread_answers(target: Target, score: Score, size: Size, alone: Sequence[float], short: bool) -> None:
    memory = memory_bytes(target.pid) if target.pid else 0
    unread = Unread(target, size)
    watching = asyncio.create_task(unread.watch(3 * size.write_s + 120))
    try:
        score.note(f"their answers were computed after {await computed(target):.1f} s")
        grown = (memory_bytes(target.pid) - memory) / len(unread.queued) if target.pid else 0
        gaps = await witnesses(target.address, size)
        await watching
    finally:
        watching.cancel()
        unread.close()
    stalls = [
        (ended - stopped if ended else float("inf"))
        for ended, stopped in zip(unread.ended_s, unread.stopped_s, strict=True)
    ]
    trickled, deaf = stalls[: size.trickling], stalls[size.trickling :]
    for who, seconds in (("a byte a second", trickled), ("never read", deaf)):
        score.note(f"{who}: ended {min(seconds):.1f}–{max(seconds):.1f} s after the answer stopped flowing")
        worst = max(abs(one - size.write_s) for one in seconds)
        score.at_most(f"{who}: cut off this far from the write timeout", worst, LATE_S + LOOK_S)
    most = max(unread.queued) + max(0.0, grown)
    score.note(f"of each: {max(unread.queued) / 1024:.0f} KiB in the kernel, {grown / 1024:.0f} KiB in the process")
    if target.pid:
        score.at_most("unread: memory of each", most / 1024, MOST_BYTES / 1024, "KiB")
    compare(score, "unread: others' time between tokens, p99", gaps, alone, short)


def flags(short: bool) -> Sequence[str]:
    times = (f"--header-timeout={SHORT.header_s}", f"--write-timeout={SHORT.write_s}") if short else ()
    return (f"--served-model-name={MODEL_NAME}", *times)


def main(arguments: Sequence[str] | None = None) -> int:
    return run_script("slow clients", __doc__, measure, flags, arguments)


if __name__ == "__main__":
    sys.exit(main())
