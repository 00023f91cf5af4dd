"""serial with attention that holds the whole matrix of scores: what tiles of it are worth."""

from __future__ import annotations

from headrace.compare.methods import Outcome
from headrace.compare.methods.admission import play
from headrace.compare.methods.bench import Bench
from headrace.compare.workloads import Workload
from headrace.core.config import ResolvedConfig
from headrace.core.errors import ConfigError
from headrace.sched.policy import parse_policy


class PlainAttentionMethod:
    """The bench's own model and engine, on torch, with another attention for as long as it runs."""

    exact = False

    def __init__(self, name: str, bench: Bench) -> None:
        self.name = name
        self.config: ResolvedConfig | None = bench.opened.config
        self._bench = bench
        most = bench.opened.config.max_num_batched_tokens
        self.description = (
            "one request at a time, its attention not in tiles: each head's scores of all queries of a step (up to "
            f"{most}) with all keys are in memory at once"
        )

    def start(self, workload: Workload) -> float:
        """Raises ConfigError on another backend than torch, and on a GPU."""
        config = self._bench.opened.config
        if config.device != "cpu":
            raise ConfigError(
                f"{self.name}: on a GPU attention is one kernel, in tiles, and has no form without them: compare with "
                "--backend torch --device cpu"
            )
        backend = config.backend
        if backend != "torch":
            raise ConfigError(
                f"{self.name}: the {backend} backend has no attention but its tiled kernel, without the whole matrix: "
                "compare with --backend torch, where it and serial run in the same type"
            )
        _ = self._bench.backend
        return self._bench.load_s

    def run(self, workload: Workload) -> Outcome:
        from headrace.backends.torch.backend import TorchBackend

        bench = self._bench
        backend, _ = bench.backend
        assert isinstance(backend, TorchBackend)
        core = bench.core
        core.use_policy(parse_policy("serial"))
        tiled, backend.query_tile = backend.query_tile, None
        try:
            return play(core, workload, self.name, bench.clock, bench.sleep)
        finally:
            backend.query_tile = tiled

    def close(self) -> None:
        """Nothing is the method's own."""
