"""Driver for headrace itself, so that it is measured as its peers are: `python -m headrace.compare.own_driver`.

Speaks the protocol of `headrace.compare.drivers`. A task's `settings` are those of `EngineConfig`; requests go through
the engine's client one by one as they arrive, and are timed as their events come out.
"""

from __future__ import annotations

import math
import time
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from headrace import __version__
from headrace.compare.drivers.serve import Asked, Run, serve
from headrace.core.config import EngineConfig
from headrace.core.errors import EngineError
from headrace.core.types import ErrorEvent, FinishEvent, SamplingParams, TokenEvent
from headrace.engine.client import InProcessClient
from headrace.engine.llm import make_config
from headrace.engine.model import OpenModel

LIBRARIES = ("torch", "numpy")


class Engine:
    def load(self, task: dict[str, Any]) -> dict[str, Any]:
        """Raises HeadraceError."""
        settings = {
            "threads": int(task["threads"]),
            "max_model_len": int(task["max_len"]),
            "max_num_seqs": int(task["max_requests"]),
            **task.get("settings", {}),
            "prefix_cache": False,
        }
        config: EngineConfig = make_config(str(task["model"]), settings)
        self._opened = OpenModel(config)
        core, _ = self._opened.start()
        self._client = InProcessClient(core)
        self._count = 0
        resolved = self._opened.config
        return {
            "versions": {"headrace": __version__} | {name: found for name in LIBRARIES if (found := installed(name))},
            "weights_bytes": weights_bytes(self._opened),
            "scheduling": "continuous",
            "settings": settings | {"backend": resolved.backend, "dtype": resolved.dtype},
        }

    def run(self, run: Run) -> None:
        """Raises EngineError if a request fails."""
        live: dict[str, Asked] = {}
        while live or run.waiting:
            for asked in run.arrived() if live else run.wait():
                live[self._submit(asked, run)] = asked
            for event in self._client.poll():
                if isinstance(event, ErrorEvent):
                    raise EngineError(f"a request failed ({event.code}): {event.message}")
                if isinstance(event, TokenEvent):
                    run.take(live[event.request_id], event.token_ids)
                elif isinstance(event, FinishEvent):
                    del live[event.request_id]

    def _submit(self, asked: Asked, run: Run) -> str:
        self._count += 1
        seed = run.seed + self._count if run.temperature > 0 else None
        sampling = SamplingParams(
            max_tokens=asked.max_tokens, temperature=run.temperature, top_p=run.top_p, seed=seed, ignore_eos=True
        )
        request = self._opened.request(f"peer-{self._count}", asked.token_ids, sampling, time.monotonic())
        self._client.submit(request)
        return request.id


def weights_bytes(opened: OpenModel) -> int:
    """What a step of one row reads: the torch backend holds every weight in its dtype, others as the file packs it."""
    if opened.config.backend != "torch":
        return opened.checkpoint.nbytes
    size = 4 if opened.config.dtype == "float32" else 2
    return size * sum(math.prod(shape) for shape in opened.checkpoint.shapes().values())


def installed(package: str) -> str | None:
    """Its version, without importing it."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    serve(Engine())
