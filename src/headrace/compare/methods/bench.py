"""The one loaded model that all methods of ours share, one after the other."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cached_property

from headrace.backends.base import Backend
from headrace.core.types import Capacity
from headrace.engine.core import EngineCore
from headrace.engine.model import OpenModel


class Bench:
    """Loads the model when it is first asked for. While one method runs, no other may."""

    def __init__(self, opened: OpenModel, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock`: the engine's."""
        self.opened = opened
        self.clock = clock
        self.load_s = 0.0
        """Seconds that loading took."""
        self._loaded: tuple[Backend, Capacity] | None = None

    @cached_property
    def backend(self) -> tuple[Backend, Capacity]:
        """For methods that need no engine: no row is in use. Raises ModelError or EngineError."""
        began = time.monotonic()
        self._loaded = self.opened.load_backend(self.opened.config.backend, self.opened.options())
        self.load_s = time.monotonic() - began
        return self._loaded

    @cached_property
    def core(self) -> EngineCore:
        """An engine on that backend, without work. Raises ModelError or EngineError."""
        return self.opened.engine(*self.backend, clock=self.clock)

    def close(self) -> None:
        """Frees the weights. Idempotent."""
        loaded, self._loaded = self._loaded, None
        if loaded is not None:
            loaded[0].close()
