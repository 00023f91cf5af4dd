"""The engine's process with a meter: CPU time of its thread inside the backend, and outside. For `serve_speed`.

It is started as `headrace.engine.process` is; the figures go into the file that SERVE_SPEED_METER names, as three
float64 (CPU seconds in the backend, CPU seconds of the thread in all, tokens), after every step.
"""

from __future__ import annotations

import mmap
import os
import struct
import sys
import time
from pathlib import Path
from typing import Any

import headrace.engine.model as engine_model
from headrace.engine import process

LAYOUT = struct.Struct("<ddd")
VARIABLE = "SERVE_SPEED_METER"


class Metered:
    """A backend that notes how long it takes."""

    def __init__(self, inner: Any, memory: mmap.mmap) -> None:
        self._inner = inner
        self._memory = memory
        self._seconds = 0.0
        self._tokens = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def submit(self, plan: Any) -> None:
        began = time.thread_time()
        self._inner.submit(plan)
        self._seconds += time.thread_time() - began

    def result(self) -> Any:
        began = time.thread_time()
        found = self._inner.result()
        now = time.thread_time()
        self._seconds += now - began
        self._tokens += sum(len(row.tokens) for row in found.rows)
        LAYOUT.pack_into(self._memory, 0, self._seconds, now, self._tokens)
        return found


def main() -> int:
    path = Path(os.environ[VARIABLE])
    with path.open("r+b") as file:
        memory = mmap.mmap(file.fileno(), LAYOUT.size)
    make = engine_model.create_backend
    engine_model.create_backend = lambda *asked: Metered(make(*asked), memory)  # type: ignore[assignment, return-value]
    return process.main(sys.argv[1:])


if __name__ == "__main__":
    code = main()
    sys.stderr.flush()
    os._exit(code)
