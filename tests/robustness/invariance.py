"""Do an answer's bits depend on what runs beside it? 100 prompts in batches of 1 to 32, in chunks, with and without the
prefix cache, and preempted:

    python -m tests.robustness.invariance --threads 2

Every run must give the same tokens and the same bytes of log-probabilities as the first one, in which each prompt runs
alone and whole. Half of the prompts are sampled, a third shares its first 32 tokens.
"""

from __future__ import annotations

import argparse
import random
import struct
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from headrace import LLM, Completion, SamplingParams

BATCHES = (1, 2, 3, 5, 8, 13, 32)
CHUNKS = (None, 48, 33)
"""Tokens of a step; None: as many as any prompt has. At least one for each row of the batch."""
SMALL_POOL_MIB: Mapping[str, int] = {"float32": 7, "bfloat16": 4, "int8": 2}
"""Of the demo model's keys and values: 159 to 182 tokens, three or four prompts."""
MODEL_LEN = 64


@dataclass(frozen=True, slots=True)
class Run:
    """Settings that must not be seen in the answers."""

    batch: int
    chunk: int | None
    cache: bool
    preempted: bool = False
    """The pool of blocks is too small for the batch."""

    def settings(self, kv_dtype: str) -> dict[str, Any]:
        return {
            "max_model_len": MODEL_LEN,
            "max_num_seqs": self.batch,
            "max_num_batched_tokens": max(self.batch, self.chunk or 512),
            "prefix_cache": self.cache,
            "kv_cache_mib": SMALL_POOL_MIB[kv_dtype] if self.preempted else 256,
        }

    def __str__(self) -> str:
        chunk = "whole" if self.chunk is None else f"{max(self.batch, self.chunk)} tokens"
        pool = ", preempted" if self.preempted else ""
        return f"batch {self.batch}, {chunk}, cache {'on' if self.cache else 'off'}{pool}"


def runs(batches: Sequence[int] = BATCHES) -> Iterator[Run]:
    for batch in batches:
        for chunk in CHUNKS:
            for cache in (False, True):
                yield Run(batch, chunk, cache)
        if batch > 3:
            yield from (Run(batch, 33, cache, preempted=True) for cache in (False, True))


def work(count: int, num_tokens: int, vocab: int = 40_000) -> tuple[list[list[int]], list[SamplingParams]]:
    draw = random.Random(4)
    shared = [draw.randrange(1000, vocab) for _ in range(32)]
    prompts, sampling = [], []
    for index in range(count):
        own = [draw.randrange(1000, vocab) for _ in range(draw.randint(2, 44))]
        prompts.append(shared + own[:12] if index % 3 == 0 else own)
        drawn = {"temperature": 1.0, "top_p": 0.9, "seed": index} if index % 2 else {}
        sampling.append(SamplingParams(max_tokens=num_tokens, ignore_eos=True, logprobs=2, **drawn))
    return prompts, sampling


def bits(answers: Sequence[Completion]) -> list[bytes]:
    """Tokens and log-probabilities of each answer."""
    out = []
    for one in answers:
        if one.error is not None:
            raise SystemExit(f"prompt {one.index}: {one.error}")
        numbers = [entry.logprob for entry in one.logprobs or ()]
        numbers += [value for entry in one.logprobs or () for _, value in entry.top]
        ids = [*one.token_ids, *(i for entry in one.logprobs or () for i, _ in entry.top)]
        out.append(struct.pack(f"<{len(ids)}i{len(numbers)}d", *ids, *numbers))
    return out


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    for name in ("backend", "dtype", "quant", "kv-dtype"):
        parser.add_argument(f"--{name}", default="auto")
    given = parser.parse_args()
    fixed = {name: getattr(given, name) for name in ("backend", "dtype", "quant", "kv_dtype", "threads")}
    prompts, sampling = work(given.prompts, given.tokens)
    wanted: list[bytes] = []
    wrong = preemptions = hits = 0
    kv_dtype = "float32"
    began = time.monotonic()
    all_runs = list(runs())
    for run in all_runs:
        with LLM(given.model, **fixed, **run.settings(kv_dtype)) as llm:
            answers = llm.generate(prompts, sampling)
            found = bits(answers)
            preemptions += llm.stats.preemptions
            hits += sum(one.cached_tokens > 0 for one in answers)
            if not wanted:
                config = llm.config
                kv_dtype = config.kv_dtype
                print(f"{config.backend}, {config.dtype}, weights {config.quant}, keys and values {config.kv_dtype}")
        wanted = wanted or found
        differing = sum(one != other for one, other in zip(found, wanted, strict=True))
        wrong += differing
        print(f"{time.monotonic() - began:7.0f} s  {run}: {differing} of {len(prompts)} differ", flush=True)
    distinct = len(set(wanted))
    print(
        f"{len(all_runs)} runs of {len(prompts)} prompts: {wrong} answers differ; {preemptions} preemptions, "
        f"{hits} prefix hits, {distinct} distinct answers"
    )
    return 1 if wrong or not preemptions or not hits or distinct < len(prompts) else 0


if __name__ == "__main__":
    sys.exit(main())
