"""Are tokens drawn with the shares that they should have? Many draws with each kind of setting, held against the exact
shares and against those of wrong meanings by Pearson's test:

    python -m tests.robustness.sampling_shares [--draws 200000] [--json FILE]

tests/unit/test_sampling_shares.py does the same with fewer draws: enough for a temperature that is 6 % off. So many
notice one that is 3 % off.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tests.robustness.score import Score, finish
from tests.unit import sampling_oracle as oracle
from tests.unit.sampling_cases import DOUBT, SHARED, drawn_counts, shares_cases

NEAR = (0.97, 1.03)
"""Wrong temperatures, as parts of the right one."""


def judge(name: str, draws: int, score: Score) -> None:
    case, wrongs = shares_cases(name)
    counts = drawn_counts(name, draws)
    fit = oracle.fit(counts, oracle.distribution(case))
    passed = counts.total() == draws and fit > DOUBT
    score.check(f"{name}: p of {counts.total()} draws", f"{fit:.3g}", f"> {DOUBT:g}", passed)
    if name == "temperature":
        sampling = case.sampling
        near = [replace(sampling, temperature=factor * sampling.temperature) for factor in NEAR]
        wrongs += tuple(replace(case, sampling=one) for one in near)
    fits = [oracle.fit(counts, oracle.distribution(wrong)) for wrong in wrongs]
    score.check(f"{name}: p of {len(fits)} wrong meanings, most", f"{max(fits):.3g}", f"< {DOUBT:g}", max(fits) < DOUBT)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=200_000, help="of each setting, at least 1")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    given = parser.parse_args(arguments)
    if given.draws < 1:
        parser.error("--draws: at least 1")
    score = Score("sampling shares")
    for name in SHARED:
        judge(name, given.draws, score)
    return finish(score, given.json)


if __name__ == "__main__":
    sys.exit(main())
