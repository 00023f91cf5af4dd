"""The one loaded model that all methods of ours share, one after the other."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from headrace.backends.base import Backend
from headrace.compare.methods.rows import Rows, padded_tokens
from headrace.compare.workloads import Workload
from headrace.core.config import EngineConfig
from headrace.core.resolve import MIB, NATIVE_LANES
from headrace.core.sizing import blocks_for, kv_bytes_per_block
from headrace.core.types import Capacity
from headrace.engine.core import EngineCore
from headrace.engine.model import OpenModel


class Bench:
    """Loads the model when it is first asked for. While one method runs, no other may.

    It is run by an engine (`core`) or by nobody (`rows`), never by both: whoever comes finds a backend without rows.
    """

    def __init__(
        self,
        opened: OpenModel,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """`clock`: the engine's; `sleep`: on that clock."""
        # Methods that plan by themselves write into blocks that a prefix cache would take for its own.
        assert not opened.config.prefix_cache
        self.opened = opened
        self.clock = clock
        self.sleep = sleep
        self.load_s = 0.0
        """Seconds that loading took."""
        self._loaded: tuple[Backend, Capacity] | None = None
        self._core: EngineCore | None = None

    @property
    def backend(self) -> tuple[Backend, Capacity]:
        """Raises ModelError or EngineError."""
        if self._loaded is None:
            began = time.monotonic()
            self._loaded = self.opened.load_backend(self.opened.config.backend, self.opened.options())
            self.load_s = time.monotonic() - began
        return self._loaded

    @property
    def core(self) -> EngineCore:
        """An engine on that backend, without work. Raises ModelError or EngineError."""
        if self._core is None or self._core.error is not None:
            backend, capacity = self.backend
            if self._core is not None:
                # An engine that ended in a fault: the next method is not to suffer from it.
                backend.reset()
            self._core = self.opened.engine(backend, capacity, clock=self.clock)
        return self._core

    @contextmanager
    def rows(self) -> Iterator[Rows]:
        """The backend without an engine, for methods that plan by themselves; all rows are free before and after.

        Raises ModelError or EngineError.
        """
        backend, capacity = self.backend
        self._core = None
        backend.reset()
        try:
            yield Rows(backend, capacity)
        finally:
            backend.reset()

    def close(self) -> None:
        """Frees the weights; what is asked for later is loaded anew. Idempotent."""
        loaded, self._loaded, self._core = self._loaded, None, None
        if loaded is not None:
            loaded[0].close()


def share_card(opened: OpenModel, workload: Workload) -> None:
    """On a GPU, cuts the KV cache that `opened` is going to have to what the workload fills at most (every request
    padded to the longest prompt and answer), and one request of `max_model_len`: by itself it would have all that is
    left of the GPU, and a method with an engine of its own none. A size that the user has set stays."""
    config = opened.config
    if config.device != "cuda" or opened.requested.kv_cache_mib is not None:
        return
    rows = min(config.max_num_seqs, len(workload.requests))
    padded = min(padded_tokens(opened, workload), config.max_model_len)
    # One more each: who joins needs room for every running request's next block.
    filled = rows * (blocks_for(padded, config.block_size) + 1)
    wanted = max(filled, blocks_for(config.max_model_len, config.block_size))
    if wanted < config.num_blocks:
        why = f"{wanted}: what this workload fills; methods with engines of their own need room on the GPU too"
        opened.config = replace(config, num_blocks=wanted, reasons={**config.reasons, "num_blocks": why})


def kv_bytes(opened: OpenModel, num_blocks: int) -> int:
    """Of so many blocks of the KV cache, as this model's engine keeps them."""
    config = opened.config
    lanes = NATIVE_LANES if config.backend == "native" else 1
    return num_blocks * kv_bytes_per_block(opened.spec, config.kv_dtype, config.block_size, lanes)


def beside_text(opened: OpenModel) -> str:
    """What makes the engines that share a GPU smaller, after the reason why one has no room; empty on a CPU."""
    if opened.config.device == "cpu":
        return ""
    return f"; a --max-model-len below {opened.config.max_model_len} makes every engine's KV cache smaller"


def same_settings(opened: OpenModel, max_num_seqs: int, num_blocks: int) -> EngineConfig:
    """What gives another engine the arithmetic of this one, and so many rows and blocks, however much memory is free by
    then. `num_blocks`: at least what `max_model_len` tokens take; no more of them than the rows can fill are made."""
    config = opened.config
    return replace(
        opened.requested,
        model=str(opened.checkpoint.path),
        backend=config.backend,
        device=config.device,
        dtype=config.dtype,
        quant=config.quant,
        kv_dtype=config.kv_dtype,
        threads=config.threads,
        max_model_len=config.max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        kv_cache_mib=math.ceil(kv_bytes(opened, num_blocks) / MIB),
    )
