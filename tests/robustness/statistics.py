"""Does `headrace compare` claim a difference where there is none, and find one of 10 %? Real runs on a real clock.

In each trial three methods run in rounds as a comparison runs them, on a workload of some tens of milliseconds: fused,
fused again under another name, and fused slowed on purpose, which spins for a tenth of its own measured time in every
run. At a level of 1 %, 100 trials of 10 pairs may claim at most 3 differences of fused from itself, and must find the
slowed one in at least 95. The same is tried with planted noise in tests/unit/test_compare_statistics.py.

    python -m tests.robustness.statistics [--trials 100] [--pairs 10]
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from headrace.compare.measure import Claim, run_rounds, time_method
from headrace.compare.methods import Outcome
from headrace.compare.methods.admission import AdmissionMethod
from headrace.compare.methods.bench import Bench
from headrace.compare.statistics import ENOUGH
from headrace.compare.workloads import Workload, WorkloadRequest
from headrace.core.config import EngineConfig
from headrace.core.errors import HeadraceError
from headrace.engine.model import OpenModel
from tests.robustness.score import Score, finish

SLOWED = 0.10
"""Share of its own time that the slowed method spins."""
ALARMS, FOUND = 0.03, 0.95
"""Of the trials, at most and at least."""
REQUESTS, PROMPT, ANSWER = 2, 8, 6
"""Of the workload: requests, tokens of each prompt and of each answer."""


class Again(AdmissionMethod):
    """Fused under another name."""

    def __init__(self, name: str, bench: Bench) -> None:
        super().__init__(name, "fused", bench)


class Slowed(Again):
    """Fused, and then nothing useful for a tenth of the time that it took."""

    def run(self, workload: Workload) -> Outcome:
        outcome = super().run(workload)
        began = time.monotonic()
        while (spun_s := time.monotonic() - began) < SLOWED * outcome.seconds:
            pass
        return replace(outcome, seconds=outcome.seconds + spun_s)


def tiny() -> Workload:
    prompts = [tuple(range(100 + PROMPT * index, 100 + PROMPT * (index + 1))) for index in range(REQUESTS)]
    return Workload("tiny", tuple(WorkloadRequest(prompt, ANSWER) for prompt in prompts), ignore_eos=True)


def fail(name: str, error: HeadraceError) -> None:
    raise error


def measure(model: str, trials: int, pairs: int, score: Score) -> None:
    opened = OpenModel(EngineConfig(model, prefix_cache=False, threads=1, max_model_len=64, max_num_seqs=REQUESTS))
    bench = Bench(opened)
    methods = [Again("fused", bench), Again("again", bench), Slowed("slowed", bench)]
    workload = tiny()
    claims: dict[str, Counter[Claim]] = {"again": Counter(), "slowed": Counter()}
    ratios: dict[str, list[float]] = {"again": [], "slowed": []}
    p_values: list[float] = []
    seconds: list[float] = []
    try:
        for method in methods:
            method.start(workload)
        for index in range(trials):
            # Each takes each place equally often: rounds rotate, and trials begin with another one.
            turned = methods[index % 3 :] + methods[: index % 3]
            runs = run_rounds(turned, workload, pairs, lambda text: None, fail)
            seconds += [outcome.seconds for outcome in runs["fused"]]
            for name, claimed in claims.items():
                timing = time_method(runs[name], runs["fused"])
                assert timing.evidence is not None
                claimed[timing.claim] += 1
                ratios[name].append(timing.evidence.ratio)
                if name == "again":
                    p_values.append(timing.evidence.p_value)
    finally:
        bench.close()
        opened.close()
    seconds.sort()
    score.note(
        f"{trials} trials of {pairs} pairs; a round's run of fused: median {seconds[len(seconds) // 2] * 1e3:.1f} ms, "
        f"from {seconds[0] * 1e3:.1f} to {seconds[-1] * 1e3:.1f}"
    )
    for name, found in ratios.items():
        found.sort()
        score.note(f"fused / {name}: median ratio {found[len(found) // 2]:.3f}, from {found[0]:.3f} to {found[-1]:.3f}")
    below = sum(value <= 0.1 for value in p_values)
    score.note(f"p ≤ 0.1 of fused against itself: {below} of {trials} (about a tenth is expected)")
    alarms = trials - claims["again"][Claim.SAME]
    found_slow = claims["slowed"][Claim.SLOWER]
    most, least = math.ceil(ALARMS * trials), math.floor(FOUND * trials)
    score.check("claims of a difference from itself", f"{alarms} of {trials}", f"≤ {most}", alarms <= most)
    score.check("slowed by 10 %, and found", f"{found_slow} of {trials}", f"≥ {least}", found_slow >= least)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=100, help="at least 1")
    parser.add_argument("--pairs", type=int, default=10, help=f"rounds of a trial, at least {ENOUGH}")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    given = parser.parse_args(arguments)
    if given.trials < 1 or given.pairs < ENOUGH:
        parser.error(f"--trials: at least 1, --pairs: at least {ENOUGH}")
    score = Score("statistics")
    measure(given.model, given.trials, given.pairs, score)
    return finish(score, given.json)


if __name__ == "__main__":
    sys.exit(main())
