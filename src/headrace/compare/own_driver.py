"""Driver for headrace itself, so that it is measured as its peers are: `python -m headrace.compare.own_driver`.

Speaks the protocol of `headrace.compare.drivers`. A task's `settings` are those of `EngineConfig`; requests go through
the engine's client one by one as they arrive, and are timed as their events come out.
"""

from __future__ import annotations

import time
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from headrace import __version__
from headrace.backends.base import Backend, BackendOptions
from headrace.compare.drivers.serve import Asked, Run, serve
from headrace.core.errors import EngineError
from headrace.core.types import Capacity, ErrorEvent, FinishEvent, SamplingParams, TokenEvent
from headrace.engine.client import InProcessClient
from headrace.engine.llm import make_config
from headrace.engine.model import OnProgress, OpenModel

LIBRARIES = ("torch", "numpy")
SHOWN = ("backend", "dtype", "quant", "kv_dtype", "threads", "max_num_batched_tokens", "num_blocks")
"""Settings as they were resolved."""


class WatchedModel(OpenModel):
    """Keeps what its backend says of itself once it is loaded."""

    weights_bytes = 0
    explained = ""

    def load_backend(
        self, name: str, options: BackendOptions, on_progress: OnProgress | None = None
    ) -> tuple[Backend, Capacity]:
        backend, capacity = super().load_backend(name, options, on_progress)
        self.weights_bytes = backend.memory()["weights"]
        self.explained = backend.explain().partition("\n")[0]
        return backend, capacity


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
        self._opened = WatchedModel(make_config(str(task["model"]), settings))
        core, _ = self._opened.start()
        self._client = InProcessClient(core)
        self._count = 0
        resolved = self._opened.config
        return {
            "versions": {"headrace": __version__} | {name: found for name in LIBRARIES if (found := installed(name))},
            "weights_bytes": self._opened.weights_bytes,
            "scheduling": "continuous",
            "settings": settings | {name: getattr(resolved, name) for name in SHOWN},
            "isa": self._opened.explained,
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
            max_tokens=asked.max_tokens,
            temperature=run.temperature,
            top_p=run.top_p,
            seed=seed,
            ignore_eos=True,
            stop_token_ids=tuple(sorted(run.ends)),
        )
        request = self._opened.request(f"peer-{self._count}", asked.token_ids, sampling, time.monotonic())
        self._client.submit(request)
        return request.id


def installed(package: str) -> str | None:
    """Its version, without importing it."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    serve(Engine())
