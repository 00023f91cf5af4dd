"""EncoderCache: what images became, by their hash, within a bound of bytes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection

from torch import Tensor


class EncoderCache:
    """Whose turn is longest ago goes first. What is kept on request may go past the bound."""

    def __init__(self, max_bytes: int) -> None:
        """`max_bytes`: 0 keeps nothing that need not be kept."""
        self.max_bytes = max_bytes
        self.nbytes = 0
        self._rows: OrderedDict[str, Tensor] = OrderedDict()

    def __contains__(self, image_hash: str) -> bool:
        return image_hash in self._rows

    def get(self, image_hash: str) -> Tensor | None:
        """(rows, hidden size) of the decoder, to be read only; its turn is now. None: not there."""
        if image_hash in self._rows:
            self._rows.move_to_end(image_hash)
        return self._rows.get(image_hash)

    def put(self, image_hash: str, rows: Tensor) -> None:
        """Takes in what is not there; `trim` then sees to the bound. `rows` is no part of a larger tensor."""
        assert image_hash not in self._rows
        self._rows[image_hash] = rows
        self.nbytes += rows.nbytes

    def trim(self, kept: Collection[str]) -> None:
        """Forgets until the bound holds, but none of `kept`."""
        for image_hash in [one for one in self._rows if one not in kept]:
            if self.nbytes <= self.max_bytes:
                return
            self.nbytes -= self._rows.pop(image_hash).nbytes
