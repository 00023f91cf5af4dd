"""Two kinds of rows of stage kernels: whether a kernel is right, and how fast it is beside the card and the library."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import torch
from benchmarks.gpu_check.bench import Bench
from benchmarks.gpu_check.clock import Run
from benchmarks.gpu_check.rows import Case, Figure, Target
from torch import Tensor

TOLERANCES: Mapping[torch.dtype, float] = {
    torch.float32: 2e-5,
    torch.float16: 2e-3,
    torch.bfloat16: 1.2e-2,
}
"""Largest ‖out − reference‖ ÷ ‖reference‖ of an operation with a few roundings to the type, reference in float64."""
EXACT = 0.0
"""A tolerance: the numbers are to be the same."""


@dataclass(frozen=True, slots=True, eq=False)
class Pair:
    """What a kernel gave, and what it means."""

    label: str
    out: Tensor
    reference: Tensor
    tolerance: float | None = None
    """None: that of out's type."""

    @property
    def excess(self) -> float:
        """Error ÷ tolerance: above 1 it is wrong. NaN only where the reference has it."""
        if self.out.shape != self.reference.shape:
            return float("inf")
        tolerance = TOLERANCES[self.out.dtype] if self.tolerance is None else self.tolerance
        out, reference = self.out.double(), self.reference.double().to(self.out.device)
        nan = torch.isnan(reference)
        if not torch.equal(torch.isnan(out), nan):
            return float("inf")
        out, reference = out.masked_fill(nan, 0.0), reference.masked_fill(nan, 0.0)
        if tolerance == EXACT:
            return 0.0 if torch.equal(out, reference) else float("inf")
        error = torch.linalg.vector_norm(out - reference) / torch.linalg.vector_norm(reference).clamp_min(1e-30)
        return float(error) / tolerance


Pairs = Callable[[torch.dtype], Iterable[Pair]]


def dtypes(bench: Bench) -> tuple[torch.dtype, ...]:
    """The interpreter computes no bfloat16."""
    if bench.dry:
        return (torch.float32, torch.float16)
    return (torch.bfloat16, torch.float16, torch.float32)


def few(bench: Bench, dtype: torch.dtype) -> bool:
    """Whether a few shapes do: other types than bfloat16 are what the interpreter proves, and compiling takes time."""
    return not bench.dry and dtype != torch.bfloat16


def right(bench: Bench, name: str, what: str, pairs: Pairs, only: Sequence[torch.dtype] | None = None) -> Case:
    """`pairs`: of one type; `only`: those of the types that the kernel is for."""
    return Case(f"{name}: right", what, lambda: _right(bench, pairs, only), Target(1.0, most=True), 8, judged_dry=True)


def _right(bench: Bench, pairs: Pairs, only: Sequence[torch.dtype] | None) -> Figure:
    excess: dict[str, float] = {}
    for dtype in dtypes(bench) if only is None else [one for one in dtypes(bench) if one in only]:
        torch.manual_seed(bench.seed)
        for pair in pairs(dtype):
            excess[f"{str(dtype).removeprefix('torch.')} {pair.label}"] = pair.excess
    worst = max(excess, key=lambda label: excess[label])
    wrong = {label: one for label, one in excess.items() if not one <= 1}
    note = f"worst: {worst}" + (f"; wrong: {', '.join(wrong)}" if wrong else "")
    return Figure(list(excess.values()), "of tol.", 1.0, excess[worst], note, {"wrong": wrong})


def fast(
    bench: Bench,
    name: str,
    what: str,
    make: Callable[[], Run],
    *,
    nbytes: float = 0.0,
    flops: float = 0.0,
    set_bytes: float = 0.0,
    share: float | None = None,
    most_us: float | None = None,
    others: Mapping[str, Callable[[], Run]] | None = None,
) -> Case:
    """`make`: one call on buffers of its own. `nbytes`, `flops`: what a call must move and compute: the larger of both
    times is its bound. `set_bytes`: of one set of buffers (nbytes, if 0). `share`: of the bound that must be reached;
    `most_us`: in place of it, a time. `others`: the same by a library."""
    target = None if share is None and most_us is None else Target(1.0, most=True) if most_us else Target(share or 0.0)

    def run() -> Figure:
        sets = bench.clock.sets(int(set_bytes or nbytes))
        seconds = bench.clock.seconds([make() for _ in range(sets)])
        bound = max(nbytes / bench.read_Bps, flops / bench.matmul_flops if flops else 0.0)
        mine = median(seconds)
        ratio = mine * 1e6 / most_us if most_us else bound / mine if bound else None
        library = {key: _library(bench, other, sets) for key, other in (others or {}).items()}
        notes = [f"{nbytes / mine / 1e9:.0f} GB/s"] if nbytes else []
        notes += [f"{flops / mine / 1e12:.1f} TFLOP/s"] if flops else []
        notes += [f"{key}: {one if isinstance(one, str) else f'{one:.2f} µs'}" for key, one in library.items()]
        samples = [1e6 * one for one in seconds]
        return Figure(samples, "µs", 1e6 * bound or None, ratio, "; ".join(notes), {"library": library})

    return Case(f"{name}: fast", what, run, target, 8)


def _library(bench: Bench, make: Callable[[], Run], sets: int) -> float | str:
    """µs, or why there is no time: a library's fault is not the kernel's."""
    try:
        return 1e6 * median(bench.clock.seconds([make() for _ in range(sets)]))
    except Exception as error:  # told in the row
        return f"{type(error).__name__}: {str(error)[:120]}"


def randn(bench: Bench, *shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    """Normal numbers on the device."""
    return (torch.randn(*shape, device=bench.clock.device) * scale).to(dtype)


def poisoned(bench: Bench, *shape: int, dtype: torch.dtype) -> Tensor:
    """What a kernel is to overwrite, or must not read."""
    if not dtype.is_floating_point:
        return torch.full(shape, -77, dtype=dtype, device=bench.clock.device)
    return torch.full(shape, float("nan"), device=bench.clock.device).to(dtype)


def ints(bench: Bench, values: Sequence[int]) -> Tensor:
    """int32 on the device."""
    return torch.tensor(values, dtype=torch.int32, device=bench.clock.device)


def elements(dtype: torch.dtype, *counts: int) -> int:
    """Bytes of so many numbers."""
    return sum(counts) * dtype.itemsize
