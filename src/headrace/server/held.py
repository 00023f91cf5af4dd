"""Memory that requests hold beside their tokens: long bodies while they are read, pixels until the answer is complete.

Law: what all of them hold together stays below one bound, however many there are and however slowly their bodies come.
Who finds no room left is refused at once (429) rather than kept waiting: requests that wait for one another's memory,
each with a part of its own, would wait for ever.
"""

from __future__ import annotations

from starlette.requests import Request
from starlette.types import Message, Receive

from headrace.core.errors import BodyTooLarge, HeadraceError, QueueFull

FREE_BYTES = 64 * 1024
"""Of a body, not counted: so much of it the connection holds anyway."""
WHILE_READ = 6
"""Most bytes in memory for each byte of a body that is read and parsed: the body, its text (four bytes a character
where one is an emoji), the values in that. Measured with 48 MiB: 3 where all is ASCII, 4 with Chinese, 6 with emoji."""
RETRY_S = 1.0
MIB = 2**20


class Room:
    """A bound on bytes. All methods belong to one event loop."""

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes = most_bytes
        self.held_bytes = 0
        """By all holders together."""


class Hold:
    """One request's share of a room. What it holds now is said anew with each `set`; `close` gives it back."""

    def __init__(self, room: Room) -> None:
        self._room = room
        self.num_bytes = 0

    def set(self, num_bytes: int) -> None:
        """Raises BodyTooLarge for more than the whole room, QueueFull where others leave too little of it; the hold is
        then as before."""
        room = self._room
        if num_bytes > room.most_bytes:
            raise BodyTooLarge(
                f"body: with its images it takes {num_bytes // MIB} MiB of memory, allowed: {room.most_bytes // MIB} "
                "(max_held_mib)"
            )
        held_bytes = room.held_bytes + num_bytes - self.num_bytes
        if num_bytes > self.num_bytes and held_bytes > room.most_bytes:
            others = (room.held_bytes - self.num_bytes) // MIB
            raise QueueFull(
                f"long bodies and images of other requests take {others} MiB already, allowed: "
                f"{room.most_bytes // MIB} (max_held_mib)",
                retry_after_s=RETRY_S,
            )
        room.held_bytes, self.num_bytes = held_bytes, num_bytes

    def reading(self, request: Request) -> Request:
        """The same request; what is read of its body is held. Raises as `set` at once where its length is told and
        there is no room for that now, later where there is none left."""
        length = request.headers.get("content-length", "")
        if length.isascii() and length.isdigit():
            self.set(_while_read(int(length)))
            self.set(0)  # a body that was told of and does not come takes nothing from the others
        return Request(request.scope, self._counted(request.receive))

    def _counted(self, receive: Receive) -> Receive:
        num_bytes = 0

        async def counted() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            try:
                self.set(_while_read(num_bytes))
            except HeadraceError:
                self.close()  # at once: of bodies that came together, the others are to have its share
                raise
            return message

        return counted

    def parsed(self) -> None:
        """The body is whole, and only its values are left of it."""
        self.set(self.num_bytes // WHILE_READ)

    def close(self) -> None:
        """Idempotent."""
        self.set(0)


def _while_read(num_bytes: int) -> int:
    return WHILE_READ * max(0, num_bytes - FREE_BYTES)
