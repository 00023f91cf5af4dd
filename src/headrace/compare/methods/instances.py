"""A model instance a request: engine processes with a copy of the weights each, fed from one queue."""

from __future__ import annotations

import selectors
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from headrace.compare.methods import Outcome
from headrace.compare.methods.bench import Bench, beside_text, kv_bytes, same_settings
from headrace.compare.methods.rows import Answer, open_answers, tokens_kept
from headrace.compare.workloads import Workload
from headrace.core.config import EngineConfig, ResolvedConfig
from headrace.core.errors import BackendUnavailable, EngineError, OutOfMemory
from headrace.core.resolve_cuda import card_use, usable_bytes
from headrace.core.sizing import blocks_for, card_budget
from headrace.core.types import ErrorEvent, TokenEvent
from headrace.engine.hardware import probe_hardware

if TYPE_CHECKING:
    from headrace.compare.methods.engine_process import Instance

MOST = 32
"""Processes; the study's largest number of instances."""
FREE_SHARE = 0.9
"""Of the memory that is free once the first instance is there, what the others may take."""


class InstancesMethod:
    """Processes that are started before the timing. Each has all threads and answers one request at a time."""

    exact = True

    def __init__(self, name: str, instances: int | None, bench: Bench) -> None:
        """`instances`: None: one a request, at most `MOST`."""
        self.name = name
        self.config: ResolvedConfig | None = bench.opened.config
        self._bench = bench
        self._asked = instances
        self._instances: list[Instance] = []
        self.description = self._describe(
            "one process a request" if instances is None else f"{instances} processes", ""
        )

    def start(self, workload: Workload) -> float:
        """Starts one process after the other. Raises OutOfMemory where not even one fits, EngineError where one cannot
        start, BackendUnavailable where a package is missing."""
        opened = self._bench.opened
        wanted = self._asked or len(workload.requests)
        count, cap = (MOST, f"; {wanted} were wanted, {MOST} is the most") if wanted > MOST else (wanted, "")
        blocks = blocks_for(tokens_kept(opened, workload), opened.config.block_size)
        self._check_memory(kv_bytes(opened, blocks))
        settings = same_settings(opened, 1, blocks_for(opened.config.max_model_len, opened.config.block_size))
        began = time.monotonic()
        try:
            before = self._free_bytes()
            self._add(settings)
            free = self._free_bytes()
            if opened.config.device == "cpu":
                each = self._instances[0].rss_bytes + kv_bytes(opened, blocks)
                fitting = 1 + int(free * FREE_SHARE) // each
            else:
                each = max(before - free, self._bench.backend[0].memory()["weights"])
                fitting = 1 + instances_beside(free, self._card_bytes(), each)
            if fitting < count:
                cap = f"; {wanted} were wanted, one takes {each / 1e6:.0f} MB and {free / 1e6:.0f} MB were free"
            for _ in range(min(count, fitting) - 1):
                self._add(settings)
        except BaseException:
            self.close()
            raise
        count = len(self._instances)
        self.description = self._describe(f"{count} process{'es' if count > 1 else ''}", cap)
        return time.monotonic() - began

    def run(self, workload: Workload) -> Outcome:
        """Ends every process if a request fails, or one of them ends."""
        if not self._instances:
            raise EngineError(f"{self.name}: its processes have ended")
        try:
            return self._run(open_answers(self._bench.opened, workload, self.name))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        instances, self._instances = self._instances, []
        for instance in instances:
            instance.kill()
        for instance in instances:
            instance.close()

    def _run(self, answers: Sequence[Answer]) -> Outcome:
        instances = self._instances
        waiting = deque(answers)
        idle = deque(instances)
        live: dict[str, Answer] = {}
        for instance in instances:
            instance.forget_peak()
        cpu_s = _cpu_s(instances)
        with selectors.DefaultSelector() as selector:
            for instance in instances:
                selector.register(instance.socket, selectors.EVENT_READ, instance)
            began_s = time.monotonic()
            while waiting or live:
                while waiting and idle and waiting[0].arrival_s <= time.monotonic() - began_s:
                    answer = waiting.popleft()
                    live[answer.request.id] = answer
                    idle.popleft().submit(answer.request)
                timeout_s = None
                if waiting and idle:
                    timeout_s = max(0.0, began_s + waiting[0].arrival_s - time.monotonic())
                for key, _ in selector.select(timeout_s):
                    idle += [key.data] * _take(key.data, live, began_s)
        requests = tuple(answer.run() for answer in answers)
        return Outcome(
            requests=requests,
            seconds=max(one.end_s for one in requests),
            # Alone in its engine, a request is never preempted: every token but the last is computed, and once.
            computed_tokens=sum(len(answer.known) - 1 for answer in answers),
            cpu_s=_cpu_s(instances) - cpu_s,
            peak_rss_bytes=sum(instance.peak_rss_bytes for instance in instances),
        )

    def _add(self, settings: EngineConfig) -> None:
        try:
            from headrace.compare.methods.engine_process import Instance
        except ModuleNotFoundError as error:
            if error.name != "msgspec":
                raise
            raise BackendUnavailable(
                f"{self.name} needs the msgspec package: pip install 'headrace[compare]'"
            ) from error
        number = len(self._instances) + 1
        instance = Instance(f"{self.name}: instance {number}", settings, self._bench.opened.eos_token_ids)
        self._instances.append(instance)
        instance.wait_ready()

    def _check_memory(self, cache_bytes: int) -> None:
        """The system would end the whole comparison where it runs out of memory."""
        backend, _ = self._bench.backend
        opened = self._bench.opened
        on_cpu = opened.config.device == "cpu"
        needed, free = backend.memory()["weights"] + cache_bytes if on_cpu else self._card_bytes(), self._free_bytes()
        if needed > free:
            raise OutOfMemory(
                f"{self.name}: another copy of the model takes {needed / 1e6:.0f} MB, {free / 1e6:.0f} MB are free"
                f"{beside_text(opened)}"
            )

    def _free_bytes(self) -> int:
        """Of the memory that the model is in; of a GPU's what an engine that starts now may take."""
        hardware = probe_hardware()
        if self._bench.opened.config.device == "cpu":
            return hardware.free_memory_bytes
        if hardware.gpu is None:
            raise BackendUnavailable(f"{self.name}: {hardware.no_gpu}")
        return usable_bytes(hardware.gpu)

    def _card_bytes(self) -> int:
        """What an instance asks of the GPU when it starts."""
        opened = self._bench.opened
        use = replace(card_use(opened.config), max_num_seqs=1)
        cache = kv_bytes(opened, blocks_for(use.max_model_len, use.block_size))
        return card_budget(opened.spec, use, opened.stored).total + cache

    def _describe(self, count: str, cap: str) -> str:
        return f"{count}, each with its own copy of the model and one request at a time, first come first served{cap}"


def instances_beside(free: int, asked: int, each: int) -> int:
    """How many more start where `free` bytes are left, one asks for `asked` of them at its start, and takes `each`."""
    return 1 + (free - asked) // each if free >= asked else 0


def _take(instance: Instance, live: dict[str, Answer], began_s: float) -> int:
    """What a process has sent; returns how many requests ended with it."""
    events = instance.events()
    elapsed_s = time.monotonic() - began_s
    ended = 0
    for event in events:
        if isinstance(event, ErrorEvent):
            raise EngineError(f"{event.request_id} failed ({event.code}): {event.message}")
        if isinstance(event, TokenEvent):
            for token_id in event.token_ids:
                live[event.request_id].take(token_id, elapsed_s)
        else:
            answer = live.pop(event.request_id)
            assert answer.reason == event.reason
            ended += 1
    return ended


def _cpu_s(instances: Sequence[Instance]) -> float:
    """Processor time of the processes and of this one, which feeds them."""
    return time.process_time() + sum(instance.cpu_s for instance in instances)
