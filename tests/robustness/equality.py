"""Do all greedy methods give the same answers? Random requests of mixed lengths that arrive at random times, and each
method against `serial`:

    python -m tests.robustness.equality --requests 100 --tokens 64

Methods of ours that promise the base's own arithmetic must give every token of it. Outside engines that are set up in
the user's cache are held against it too: where each of their answers first leaves it, and how large the base's margin
between its two likeliest tokens is there. Nothing is required of those.
"""

from __future__ import annotations

import argparse
import gc
import random
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace

from headrace.cli.compare import peer_cache
from headrace.compare.methods import BASE, Method
from headrace.compare.methods.bench import Bench
from headrace.compare.methods.outside import make_outside
from headrace.compare.methods.registry import is_outside, make_method
from headrace.compare.peers import ENGINES
from headrace.compare.score import loader, measure_epsilon, score
from headrace.compare.verdict import RequestVerdict, Verdict, divergences, method_verdict
from headrace.compare.workloads import Workload, WorkloadRequest
from headrace.core.config import EngineConfig
from headrace.core.errors import HeadraceError, InvalidParameter
from headrace.engine.model import OpenModel

OURS = (BASE, "fused", "static:4", "window:50", "dataloader:8", "threads:4", "instances:2", "no-kv-cache")
SHORT = frozenset({"no-kv-cache"})
"""Every token costs as much as the whole sequence before it: answers of a quarter of the tokens."""
LONGEST_PROMPT = 160
FIRST_ID = 1000
"""Below are special tokens and single bytes."""
SPREAD_S = 0.01
"""Mean time between arrivals."""
SHOWN = 5


def work(count: int, most_tokens: int, vocab_size: int, seed: int) -> Workload:
    """Prompts of 1 to LONGEST_PROMPT random tokens, answers of 1 to `most_tokens`, or to their natural end."""
    draw = random.Random(seed)
    requests, arrival_s = [], 0.0
    for _ in range(count):
        # Lengths spread over their orders of magnitude: as many short prompts as long ones.
        length = round(LONGEST_PROMPT ** draw.random())
        token_ids = tuple(draw.randrange(FIRST_ID, vocab_size) for _ in range(length))
        requests.append(WorkloadRequest(token_ids, draw.randint(1, most_tokens), arrival_s))
        arrival_s += draw.expovariate(1 / SPREAD_S)
    return Workload("random", tuple(requests), seed=seed)


def short(workload: Workload, most_tokens: int) -> Workload:
    """The same requests with shorter answers."""
    most = max(1, most_tokens // 4)
    cut = tuple(replace(one, max_tokens=min(one.max_tokens, most)) for one in workload.requests)
    return replace(workload, requests=cut)


@dataclass(frozen=True, slots=True)
class Expected:
    """The base's answers."""

    outputs: Sequence[tuple[int, ...]]
    margins: Sequence[Sequence[float]]
    epsilon: float

    def verdicts(self, workload: Workload, outputs: Sequence[tuple[int, ...]]) -> tuple[RequestVerdict, ...]:
        """Of the answers to a piece of the work, whose beginnings the base's answers have."""
        lengths = [one.max_tokens for one in workload.requests]
        expected = [ids[:most] for ids, most in zip(self.outputs, lengths, strict=False)]
        known = [values[:most] for values, most in zip(self.margins, lengths, strict=False)]
        return divergences(expected, outputs, known, self.epsilon)


def run(method: Method, workload: Workload) -> Sequence[tuple[int, ...]]:
    try:
        method.start(workload)
        return method.run(workload).outputs
    finally:
        method.close()


def tell(method: Method, verdicts: Sequence[RequestVerdict], seconds: float) -> None:
    print(f"{seconds:7.0f} s  {method.name}: {method_verdict(verdicts)}", flush=True)
    differing = [one for one in verdicts if one.kind is not Verdict.IDENTICAL]
    for one in differing[:SHOWN]:
        print(f"           request {one.question + 1}: {one}")
    if len(differing) > SHOWN:
        print(f"           and {len(differing) - SHOWN} more")


def expect(opened: OpenModel, bench: Bench, workload: Workload) -> Expected:
    """Runs the base, and finds the margins of its answers and their ε."""
    outputs = run(make_method(BASE, bench), workload)
    bench.close()
    gc.collect()
    known = list(zip(workload.prompts, outputs, strict=True))
    load = loader(opened, opened.config, max(len(prompt) + len(output) for prompt, output in known))
    scores = score(known, opened.config.block_size, load, None)
    epsilon = measure_epsilon(opened, opened.config, known)
    print(f"{len(outputs)} answers of {sum(map(len, outputs))} tokens by {BASE}; {epsilon}", flush=True)
    return Expected(outputs, [one.margins for one in scores], epsilon.value)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--requests", type=int, default=100)
    parser.add_argument("--tokens", type=int, default=64, help="of the longest answer")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--seed", type=int, default=6)
    outside = [f"{name}:{next(iter(one.files))}" for name, one in ENGINES.items()]
    every = ",".join([*OURS, *outside])
    parser.add_argument("--methods", default=every, help=f"default: {every}")
    given = parser.parse_args()
    began = time.monotonic()
    broken: list[str] = []
    ran = 0
    config = EngineConfig(
        given.model, threads=given.threads, max_model_len=LONGEST_PROMPT + given.tokens, prefix_cache=False
    )
    with closing(OpenModel(config)) as opened:
        bench = Bench(opened)
        workload = work(given.requests, given.tokens, opened.spec.vocab_size, given.seed)
        print(f"{given.model}: {opened.config.backend}, weights {opened.config.quant}, {opened.config.threads} threads")
        expected = expect(opened, bench, workload)
        for name in given.methods.split(","):
            is_ours = not is_outside(name)
            part = short(workload, given.tokens) if name in SHORT else workload
            try:
                method = make_method(name, bench) if is_ours else make_outside(name, bench, peer_cache("native"))
                outputs = run(method, part)
            except HeadraceError as error:
                # A method that is not there is no failure of equality; one of ours that fails is.
                if is_ours and not isinstance(error, InvalidParameter):
                    broken.append(name)
                print(f"{time.monotonic() - began:7.0f} s  {name}: did not run: {error}", flush=True)
                continue
            verdicts = expected.verdicts(part, outputs)
            tell(method, verdicts, time.monotonic() - began)
            ran += method.exact
            if method.exact and any(one.kind is not Verdict.IDENTICAL for one in verdicts):
                broken.append(name)
        bench.close()
    said = "same arithmetic: identical" if not broken else f"NOT identical: {', '.join(broken)}"
    print(f"{ran} methods of ours on {given.requests} requests: {said}")
    return 1 if broken or not ran else 0


if __name__ == "__main__":
    sys.exit(main())
