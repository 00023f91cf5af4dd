"""Rows of sampling on the device: equal to the numpy specification on thousands of random rows, and its time."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import numpy as np
import torch
from benchmarks.gpu_check.bench import Bench
from benchmarks.gpu_check.clock import Run
from benchmarks.gpu_check.rows import Case
from benchmarks.gpu_check.tools import EXACT, Pair, fast, poisoned, randn, right
from torch import Tensor

from headrace.backends.sampling import Position, RowSampling
from headrace.backends.sampling import sample as specification
from headrace.core.types import RowError, SamplingParams

BATCH = 500
"""Rows of one call."""
GREEDY_US, RANDOM_US = 30.0, 150.0
"""Of 32 rows × 128k: what a step of an 8B model can spare."""


def cases(bench: Bench) -> list[Case]:
    only = [torch.float32]
    filtered = SamplingParams(temperature=0.8, top_k=50, top_p=0.9, seed=1)
    return [
        right(
            bench,
            "sampling",
            "the tokens of backends/sampling.py, rows of every kind",
            lambda dtype: _tokens(bench),
            only,
        ),
        _time(bench, "greedy, 32 × 128256", SamplingParams(), GREEDY_US),
        _time(bench, "temperature, 32 × 128256", SamplingParams(temperature=1.0, seed=1), RANDOM_US),
        _time(bench, "top-k 50, top-p 0.9, 32 × 128256", filtered, RANDOM_US),
        _time(bench, "flat, top-p 0.999, 32 × 128256", SamplingParams(temperature=2.0, top_p=0.999, seed=1), None),
    ]


def _tokens(bench: Bench) -> Iterator[Pair]:
    """10,000 rows of a small vocabulary, some of large ones; NaN, infinities, ties and all filters among them."""
    numbers = random.Random(bench.seed)
    plan = [(61, 8)] if bench.dry else [(2003, BATCH)] * 18 + [(32003, BATCH)] * 2 + [(128256, 100)]
    for index, (vocab, rows) in enumerate(plan):
        logits = _logits(bench, rows, vocab)
        asked = [_params(numbers) for _ in range(rows)]
        places = [numbers.choice((0, 1, 7, 1000, 2**33)) for _ in range(rows)]
        ours, theirs = _ours(bench, logits, asked, places), _theirs(logits, asked, places)
        yield Pair(f"{index}: {rows}×{vocab}", ours, theirs, EXACT)


def _logits(bench: Bench, rows: int, vocab: int) -> Tensor:
    """Peaky, flat, tied, with masks; a few rows that cannot be sampled."""
    logits = randn(bench, rows, vocab, dtype=torch.float32)
    kinds = torch.arange(rows, device=logits.device)
    logits *= torch.tensor([0.0, 0.1, 1.0, 3.0, 10.0], device=logits.device)[kinds % 5][:, None]
    logits = torch.where((kinds % 3 == 0)[:, None], (logits * 4).round() / 4, logits)
    logits = logits.masked_fill((kinds % 7 == 0)[:, None] & (torch.rand_like(logits) < 0.5), -torch.inf)
    broken = rows // 8
    logits[broken, vocab // 2], logits[2 * broken + 1, 0], logits[3 * broken + 2] = float("nan"), torch.inf, -torch.inf
    return logits


def _params(numbers: random.Random) -> SamplingParams:
    return SamplingParams(
        temperature=numbers.choice((0.0, 0.3, 0.7, 1.0, 2.0)),
        top_k=numbers.choice((0, 0, 1, 5, 40)),
        top_p=numbers.choice((1.0, 1.0, 0.1, 0.9, 0.999)),
        min_p=numbers.choice((0.0, 0.0, 0.05, 0.5)),
        seed=numbers.randrange(-(2**63), 2**63),
    )


def _ours(bench: Bench, logits: Tensor, asked: list[SamplingParams], places: list[int]) -> Tensor:
    """Tokens; -2 for whatever is no token."""
    run, tokens = _sampler(bench, logits, asked, places)
    run()
    return torch.where(tokens < 0, -2, tokens).cpu()


def _sampler(bench: Bench, logits: Tensor, asked: list[SamplingParams], places: list[int]) -> tuple[Run, Tensor]:
    from headrace.backends.torch.kernels import sampling as kernels

    device = bench.clock.device
    given = [kernels.row_of(one, place) for one, place in zip(asked, places, strict=True)]
    draws = kernels.Draws(
        floats=torch.tensor([floats for floats, _ in given], dtype=torch.float64, device=device),
        ints=torch.tensor([ints for _, ints in given], dtype=torch.int64, device=device),
    )
    tokens = poisoned(bench, len(asked), dtype=torch.int32)
    workspace = kernels.make_workspace(*logits.shape, device)
    return lambda: kernels.sample(logits, draws, tokens, workspace), tokens


def _theirs(logits: Tensor, asked: list[SamplingParams], places: list[int]) -> Tensor:
    """A position's number is the length of the answer so far: the ids themselves are not looked at here."""
    rows = [RowSampling(one, -place, (), logits.shape[1]) for one, place in zip(asked, places, strict=True)]
    positions = [Position(row, np.zeros(0, np.int64)) for row in rows]
    found = specification(logits.cpu().numpy(), positions)
    return torch.tensor([-2 if isinstance(one, RowError) else one.token for one in found])


def _time(bench: Bench, label: str, sampling: SamplingParams, most_us: float | None) -> Case:
    rows, vocab = (2, 61) if bench.dry else (32, 128256)
    flat = label.startswith("flat")

    def make() -> Run:
        logits = randn(bench, rows, vocab, dtype=torch.float32, scale=0.1 if flat else 3.0)
        return _sampler(bench, logits, [sampling] * rows, list(range(rows)))[0]

    def argmax() -> Run:
        logits = randn(bench, rows, vocab, dtype=torch.float32, scale=3.0)
        return lambda: logits.argmax(dim=-1)

    def softmax_draw() -> Run:
        logits = randn(bench, rows, vocab, dtype=torch.float32, scale=3.0)
        return lambda: torch.softmax(logits, dim=-1)

    others: dict[str, Callable[[], Run]] = {"torch argmax": argmax} if sampling.temperature == 0 else {}
    if sampling.temperature > 0:
        others["torch softmax alone"] = softmax_draw
    return fast(
        bench,
        f"sampling, {label}",
        "float32 logits read once",
        make,
        nbytes=4.0 * rows * vocab,
        most_us=most_us,
        others=others,
    )
