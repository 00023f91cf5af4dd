"""Engines from outside: each in a process and an environment of its own, asked through its driver (`drivers`)."""

from __future__ import annotations

import shlex
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

from headrace.compare.methods import Outcome, RequestRun, refuse_images
from headrace.compare.methods.bench import Bench
from headrace.compare.methods.rows import padded_tokens, tokens_kept
from headrace.compare.peer_setup import READY, PeerCache
from headrace.compare.peers import ENGINES, PeerProcess, PeerSpec, driver_command, driver_environment, parse_spec
from headrace.compare.workloads import Workload
from headrace.core.config import ResolvedConfig
from headrace.core.errors import EngineError
from headrace.weights.checkpoint import Checkpoint

LOAD_S = 900.0
"""Most seconds of loading; an engine that compiles needs some minutes."""
RUN_S = 3600.0
"""Most seconds of a run, from the last arrival."""


class OutsideMethod:
    """Runs workloads on an engine that was set up in the user's cache folder."""

    config: ResolvedConfig | None = None
    exact = False

    def __init__(self, spec: PeerSpec, bench: Bench, peers: PeerCache | None) -> None:
        """`peers`: where engines are set up; None: nowhere."""
        self.name = spec.name
        self.description = f"{spec.engine}, an outside engine; weights: {spec.precision}"
        self._spec = spec
        self._bench = bench
        self._peers = peers
        self._process: PeerProcess | None = None

    def start(self, workload: Workload) -> float:
        """Raises EngineError where it is not set up (the message has the command that does it) or does not load, and
        ConfigError or ModelError for a model or a workload that outside engines are not given."""
        self.close()
        refuse_images(self.name, workload, "outside engines are asked in token ids, and their drivers take no pixels")
        opened = self._bench.opened
        command, environment, path = self._prepared()
        began = time.monotonic()
        self._process = PeerProcess(self.name, command, environment)
        try:
            loaded = self._process.ask(
                {
                    "op": "load",
                    "model": path,
                    "precision": self._spec.precision,
                    "threads": opened.config.threads,
                    "max_len": tokens_kept(opened, workload),
                    "padded_len": padded_tokens(opened, workload),
                    "max_requests": min(len(workload.requests), opened.config.max_num_seqs),
                    "settings": dict(self._spec.settings),
                },
                LOAD_S,
            )
            self.description = self._describe(loaded)
        except BaseException:
            self.close()
            raise
        return time.monotonic() - began

    def run(self, workload: Workload) -> Outcome:
        """Raises EngineError if the engine fails or its driver dies, with its last words."""
        assert self._process is not None
        task = self._task(workload)
        answer = self._process.ask(task, RUN_S + workload.requests[-1].arrival_s)
        try:
            return _outcome(workload, answer, frozenset(task["eos_token_ids"]))
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise EngineError(f"{self.name}: its driver's answer cannot be read: {type(error).__name__}") from error

    def close(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.close()

    def _prepared(self) -> tuple[list[str], Mapping[str, str], str]:
        """Command and environment of the driver, and the model's file for it."""
        model, spec = self._bench.opened.requested.model, self._spec
        if self._peers is None:
            raise EngineError(f"{self.name}: there is no folder for outside engines")
        # First what can be said of the model: a setup would be in vain.
        self._peers.source(model)
        python = self._peers.python(ENGINES[spec.engine].driver)
        if not (python.parent.parent / READY).exists():
            setup = f"headrace compare --setup {spec.engine} {shlex.quote(model)}"
            raise EngineError(f"{self.name}: {spec.engine} is not set up here; run: {setup}")
        path = self._peers.peer_file(model, spec)
        threads = self._bench.opened.config.threads
        environment = driver_environment(self._peers.environment, self._peers.isa, threads)
        return driver_command(spec, python), environment, str(path)

    def _task(self, workload: Workload) -> dict[str, Any]:
        opened = self._bench.opened
        ends = frozenset() if workload.ignore_eos else opened.eos_token_ids
        requests = [
            {
                "id": str(index),
                "token_ids": list(asked.token_ids),
                "max_tokens": min(asked.max_tokens, opened.limits.max_model_len - len(asked.token_ids)),
                "at_s": asked.arrival_s,
            }
            for index, asked in enumerate(workload.requests)
        ]
        return {
            "op": "run",
            "requests": requests,
            "sampling": {"temperature": 0.0},
            "ignore_eos": not ends,
            "eos_token_ids": sorted(ends),
        }

    def _describe(self, loaded: Mapping[str, Any]) -> str:
        """Engine, version, precision, scheduling, and what could not be controlled."""
        assert self._peers is not None
        engine, config = ENGINES[self._spec.engine], self._bench.opened.config
        versions = ", ".join(f"{package} {version}" for package, version in loaded["versions"].items())
        if loaded["scheduling"] == "static":
            scheduling = "static batches: what arrives while one runs makes the next"
        else:
            scheduling = "continuous batching"
        if engine.compiled:
            isa = f"compiled for {'this machine' if self._peers.isa == 'native' else self._peers.isa}"
        else:
            told = f" ({loaded['isa']})" if loaded.get("isa") else ""
            isa = f"not controlled: the instruction set it uses{told}"
        return (
            f"{self._spec.engine} ({versions}), an outside engine; weights: {self._spec.precision}; "
            f"threads: {config.threads}; {scheduling}; {isa}"
            + ("; on the CPU, while ours are on a GPU" if config.device == "cuda" else "")
        )


def make_outside(name: str, bench: Bench, peers: PeerCache | None = None) -> OutsideMethod:
    """The engine of that name, ENGINE[:PRECISION][,NAME=VALUE…], not started. Without a precision: the one nearest to
    the checkpoint's weights. `peers`: where engines are set up. Raises InvalidParameter."""
    return OutsideMethod(parse_spec(name, stored_as(bench.opened.checkpoint), "methods"), bench, peers)


def stored_as(checkpoint: Checkpoint) -> str:
    """The kind (q4_1, f32 …) in which most bytes of the checkpoint's matrices are stored."""
    sizes: Counter[str] = Counter()
    for name, shape in checkpoint.shapes().items():
        if len(shape) > 1:
            tensor = checkpoint.tensor(name)
            sizes[tensor.scheme] += tensor.nbytes
    return max(sizes, key=sizes.__getitem__, default="f32")


def _outcome(workload: Workload, answer: Mapping[str, Any], ends: frozenset[int]) -> Outcome:
    """Of a driver's answer to `run`; an answer that ended with one of `ends` ended by itself."""
    requests = tuple(
        RequestRun(
            token_ids=tuple(one["token_ids"]),
            finish_reason="stop" if one["token_ids"][-1] in ends else "length",
            arrival_s=asked.arrival_s,
            token_s=tuple(one["token_s"]),
            end_s=one["token_s"][-1],
        )
        for asked, one in zip(workload.requests, answer["requests"], strict=True)
    )
    return Outcome(
        requests=requests,
        seconds=max(one.end_s for one in requests),
        cpu_s=float(answer["cpu_s"]),
        peak_rss_bytes=int(answer["peak_rss_bytes"]),
    )
