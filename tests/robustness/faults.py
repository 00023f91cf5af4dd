"""One request of eight makes a step raise, run out of memory, or answer with NaN: only it fails, on the real kernels.

    python -m tests.robustness.faults --steps 200

For each of so many random steps (which request, which of its tokens, before or after the backend's own work), on the
demo model, in three engines: a roomy one; one whose pool of blocks is too small for eight; one whose steps are kept
short. The others' tokens and log-probabilities are to be those of a run of their own, to the last bit, and the request
that failed is to be answered like that when it is asked again.
"""

from __future__ import annotations

import argparse
import random
import struct
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from headrace.core.config import EngineConfig
from headrace.core.types import ErrorEvent, Event, Request, SamplingParams, TokenEvent
from headrace.engine.core import FAULT, EngineCore
from headrace.engine.model import OpenModel
from headrace.testing.faulty import KINDS, PLACES, Fault, FaultyBackend

BATCH = 8
PROMPTS = 24
TOKENS = 16
VOCAB = 40_000
ENGINES: Mapping[str, tuple[dict[str, Any], float | None]] = {
    "roomy": ({"kv_cache_mib": 64}, None),
    "small pool": ({"kv_cache_mib": 4, "max_num_batched_tokens": 33}, None),
    "short steps": ({"kv_cache_mib": 64}, 0.02),
}
"""Settings, and the wanted seconds of a step."""
CODES = {"exception": ("engine_fault", FAULT), "memory": ("engine_fault", FAULT), "nan": ("nan_logits", "injected")}


@dataclass
class Engine:
    """A core whose backend can be made to fail."""

    core: EngineCore
    backend: FaultyBackend
    bits: dict[str, bytes] = field(default_factory=dict)
    """Tokens and log-probabilities of each request, as they came."""
    errors: dict[str, ErrorEvent] = field(default_factory=dict)
    steps: int = 0

    @classmethod
    def start(cls, settings: Mapping[str, Any], step_seconds: float | None, threads: int) -> Engine:
        config = EngineConfig(
            "demo", backend="native", threads=threads, max_model_len=96, max_num_seqs=BATCH, **settings
        )
        opened = OpenModel(config)
        core, _ = opened.start(step_seconds=step_seconds)
        backend = core._backend = FaultyBackend(core._backend)
        return cls(core, backend)

    def run(self, requests: Sequence[Request]) -> None:
        """All of them, to their ends."""
        self.bits, self.errors, self.steps = {request.id: b"" for request in requests}, {}, 0
        for request in requests:
            self.core.submit(request)
        while self.core.has_work:
            self.steps += 1
            for event in self.core.step():
                self.take(event)
        self.core._scheduler.check_integrity()
        if self.core.stats.leaks or self.core.engine_stats().blocks_used:
            raise SystemExit("blocks were lost")

    def take(self, event: Event) -> None:
        if isinstance(event, ErrorEvent):
            self.errors[event.request_id] = event
        elif isinstance(event, TokenEvent):
            numbers = [value for one in event.logprobs for value in (one.logprob, *(v for _, v in one.top))]
            ids = [*event.token_ids, *(i for one in event.logprobs for i, _ in one.top)]
            self.bits[event.request_id] += struct.pack(f"<{len(ids)}i{len(numbers)}d", *ids, *numbers)


@dataclass
class Row:
    """A line of the table."""

    cases: int = 0
    alone: int = 0
    """Cases in which the chosen request failed, with the right code, and no other."""
    others: int = 0
    same: int = 0
    """Of the others' answers, those with the bits of a run of their own."""
    again: int = 0
    """Cases in which the request was answered rightly when asked again."""
    most_raised: int = 0
    most_extra: int = 0
    """Steps beyond those of the same eight requests without a fault."""

    @property
    def passed(self) -> bool:
        return self.cases == self.alone == self.again and self.others == self.same == self.cases * (BATCH - 1)


def make_prompts() -> tuple[list[tuple[int, ...]], list[SamplingParams]]:
    draw = random.Random(15)
    shared = [draw.randrange(1000, VOCAB) for _ in range(32)]
    prompts, sampling = [], []
    for index in range(PROMPTS):
        own = [draw.randrange(1000, VOCAB) for _ in range(draw.randint(2, 40))]
        prompts.append(tuple(shared + own if index % 3 == 0 else own))
        drawn = {"temperature": 1.0, "top_p": 0.9, "seed": index} if index % 2 else {}
        sampling.append(SamplingParams(max_tokens=TOKENS, ignore_eos=True, logprobs=2, **drawn))
    return prompts, sampling


def try_fault(engine: Engine, case: int, kind: str, row: Row, wanted: Sequence[bytes]) -> None:
    """One fault, in eight requests drawn at random."""
    prompts, sampling = make_prompts()
    draw = random.Random(f"{case}/{kind}")
    chosen = draw.sample(range(PROMPTS), BATCH)
    # A salt of its own: nothing is cached yet, and every token of a prompt is computed.
    requests = [Request(f"r{i}", prompts[i], sampling[i], salt=str(case)) for i in chosen]
    engine.backend.faults.clear()
    engine.run([Request(f"r{i}", prompts[i], sampling[i], salt=f"{case} without") for i in chosen])
    usual, raised = engine.steps, engine.backend.resets
    victim = draw.choice(chosen)
    # A prompt's first blocks may be computed by another that begins alike; its last token never is.
    first = 32 if victim % 3 == 0 else 0
    fault = Fault(prompts[victim], draw.randrange(first, len(prompts[victim]) + TOKENS - 1), kind, draw.choice(PLACES))
    engine.backend.faults.append(fault)
    engine.run(requests)
    if not fault.fired:
        raise SystemExit(f"case {case}: the fault never came")
    row.cases += 1
    failed = {name: (error.code, error.message) for name, error in engine.errors.items()}
    row.alone += failed == {f"r{victim}": CODES[kind]}
    row.others += BATCH - 1
    row.same += sum(engine.bits[f"r{i}"] == wanted[i] for i in chosen if i != victim)
    row.most_raised = max(row.most_raised, engine.backend.resets - raised)
    row.most_extra = max(row.most_extra, engine.steps - usual)
    engine.backend.faults.clear()
    engine.run([next(request for request in requests if request.id == f"r{victim}")])
    row.again += engine.bits[f"r{victim}"] == wanted[victim]


def solo(threads: int) -> list[bytes]:
    """Every prompt's answer, alone, in an engine that never failed."""
    engine = Engine.start(ENGINES["roomy"][0] | {"prefix_cache": False}, None, threads)
    found = []
    for index, (prompt, sampling) in enumerate(zip(*make_prompts(), strict=True)):
        engine.run([Request(f"r{index}", prompt, sampling)])
        found.append(engine.bits[f"r{index}"])
    engine.core.close()
    if len(set(found)) < PROMPTS:
        raise SystemExit("the prompts do not tell the answers apart")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args(arguments)
    began = time.monotonic()
    wanted = solo(given.threads)
    table = {(kind, name): Row() for name in ENGINES for kind in KINDS}
    preemptions = 0
    for number, (name, (settings, step_seconds)) in enumerate(ENGINES.items()):
        engine = Engine.start(settings, step_seconds, given.threads)
        for case in range(number, given.steps, len(ENGINES)):
            kind = KINDS[case // len(ENGINES) % len(KINDS)]
            try_fault(engine, case, kind, table[kind, name], wanted)
        preemptions += engine.core.stats.preemptions
        engine.core.close()
    heads = (("", 24), ("steps", 6), ("only it failed", 16), ("others identical", 20), ("again right", 13))
    print("".join(f"{head:>{width}}" for head, width in (*heads, ("raised", 8), ("extra", 7))))
    for (kind, name), row in table.items():
        print(
            f"{name + ', ' + kind:<24}{row.cases:>6}{row.alone:>16}{f'{row.same} of {row.others}':>20}{row.again:>13}"
            f"{row.most_raised:>8}{row.most_extra:>7}  {'pass' if row.passed else 'FAIL'}"
        )
    cases = sum(row.cases for row in table.values())
    passed = all(row.passed for row in table.values()) and cases == given.steps
    print(
        f"{cases} faults in batches of {BATCH}, {preemptions} preemptions, {time.monotonic() - began:.0f} s: "
        f"{'pass' if passed else 'FAIL'} (raised, extra: at most so many steps a fault)"
    )
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
