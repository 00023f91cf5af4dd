"""The best placement of weights, cache and hidden states: FlexGen's linear programme, then whole units.

For each block the nine shares are a linear programme (FlexGen, §4.3). The best of its solutions bounds what whole units
can reach, so blocks are tried in the order of their bounds, in integers, until no bound is better than what is found.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

from headrace.core.errors import BackendUnavailable, InvalidParameter
from headrace.plan.offload import (
    PARTS,
    TIERS,
    Block,
    Machine,
    Policy,
    Shares,
    Task,
    Times,
    decode_busy,
    decode_sums,
    memory,
    prefill_busy,
    prefill_sums,
    times,
)
from headrace.plan.quiet import quiet

GB = 10**9
ROWS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128)
BATCHES = (1, 2, 3, 4, 6, 8, 12, 16)
HIDDEN_ON_DISK = 8
"""Its place among the shares: no runtime keeps hidden states there, and nor does FlexGen's."""
NEAR = 1e-6
"""Part by which a solver's answer may be off."""
SOLVER_SECONDS = 5.0
INSTALL = "scipy is not installed; it solves the placement: pip install 'headrace[plan]'"
SHARES = 9
_NOTHING: Shares = (0.0,) * SHARES


@dataclass(frozen=True, slots=True)
class Placement:
    block: Block
    policy: Policy
    times: Times
    bound: float
    """Tokens/s of the best that shares of any size could reach with this block."""


@dataclass(frozen=True, slots=True)
class Search:
    best: Placement
    by_block: Sequence[tuple[Block, float]]
    """Tokens/s that shares of any size reach, for every block that fits."""
    tried: Sequence[Block]
    """Those that do not fit too."""


def units(task: Task, block: Block) -> tuple[int, int, int]:
    """Into how many wholes weights, cache and hidden states are dealt out: layers; heads of a batch; batches."""
    return task.layers, block.rows * task.load.cache_parts, block.batches


def blocks(sequences: int | None) -> tuple[Block, ...]:
    """All that hold so many sequences; None: a table from 1 to 2048."""
    if sequences is None:
        return tuple(Block(rows, batches) for rows in ROWS for batches in BATCHES)
    return tuple(
        Block(sequences // batches, batches) for batches in range(1, sequences + 1) if sequences % batches == 0
    )


def search(task: Task, machine: Machine, sequences: int | None = None) -> Search:
    """Raises InvalidParameter where nothing fits, with the memory that is missing; BackendUnavailable without scipy."""
    tried = [(block, relaxed(task, machine, block)) for block in blocks(sequences)]
    fitting = [(block, found.throughput) for block, found in tried if found is not None]
    if not fitting:
        raise _too_small(task, machine, Block(1, sequences) if sequences else Block(1))
    best: Placement | None = None
    for block, limit in sorted(fitting, key=lambda item: -item[1]):
        if best is not None and limit <= best.times.throughput * (1 + NEAR):
            break
        policy = _solve(task, machine, block, units(task, block))
        if policy is None:
            continue
        found = Placement(block, policy, times(task, machine.rates, block, policy), limit)
        if best is None or found.times.throughput > best.times.throughput:
            best = found
    if best is None:
        raise _too_small(task, machine, fitting[0][0])
    return Search(best, sorted(fitting, key=lambda item: item[0].sequences), [block for block, _ in tried])


def relaxed(task: Task, machine: Machine, block: Block) -> Times | None:
    """Times of the best shares of any size; None where the block does not fit."""
    policy = _solve(task, machine, block, None)
    return None if policy is None else times(task, machine.rates, block, policy)


def value_of_more(task: Task, machine: Machine, found: Search, more: float = GB) -> dict[str, float]:
    """Tokens/s that `more` bytes of each tier add, by the linear programme, the block chosen anew."""
    base = max(throughput for _, throughput in found.by_block)
    gains = {}
    for index, tier in enumerate(TIERS):
        if not machine.memory[index]:
            continue
        grown = list(machine.memory)
        grown[index] += more
        larger = replace(machine, memory=(grown[0], grown[1], grown[2]))
        reached = [relaxed(task, larger, block) for block in found.tried]
        gains[tier] = max(0.0, max(one.throughput for one in reached if one is not None) - base)
    return gains


def fits(task: Task, machine: Machine, block: Block, policy: Policy) -> bool:
    peaks = memory(task, block, policy.shares)
    return all(
        max(peaks[tier].values()) <= room * (1 + NEAR) or not (room or any(policy.shares[index::3]))
        for index, (tier, room) in enumerate(zip(TIERS, machine.memory, strict=True))
    )


# ---------------------------------------------------------------- the programme


def _affine(function: Callable[[Shares], Mapping[str, float]]) -> dict[str, tuple[list[float], float]]:
    """name -> (nine slopes, constant) of a function that is affine in the shares: read off its values."""
    base = function(_NOTHING)
    ones = [function([float(i == j) for j in range(SHARES)]) for i in range(SHARES)]
    return {name: ([one[name] - at_zero for one in ones], at_zero) for name, at_zero in base.items()}


def _sum_rows(
    busy: Mapping[str, tuple[list[float], float]], sums: Sequence[Sequence[str]]
) -> list[tuple[list[float], float]]:
    found = []
    for names in sums:
        slopes = [sum(busy[name][0][index] for name in names) for index in range(SHARES)]
        found.append((slopes, sum(busy[name][1] for name in names)))
    return found


def _solve(task: Task, machine: Machine, block: Block, wholes: tuple[int, int, int] | None) -> Policy | None:
    """The best shares, in wholes where they are given; None where nothing fits."""
    found = _programme(task, machine, block, wholes, may_overflow=False)
    if found is None:
        return None
    counts = found[:SHARES]
    shares = []
    for part in range(len(PARTS)):
        three = [max(0.0, count) for count in counts[3 * part : 3 * part + 3]]
        if wholes is not None:
            three = [float(round(count)) for count in three]
        total = sum(three)
        shares.append((three[0] / total, three[1] / total, three[2] / total))
    return Policy(*shares)


def _programme(
    task: Task, machine: Machine, block: Block, wholes: tuple[int, int, int] | None, may_overflow: bool
) -> Sequence[float] | None:
    """Columns: nine counts, the seconds of a layer in prefill and in decode (in units of the longest), and the bytes
    by which each tier overflows (in units of GB); the last are what is made small where they are allowed."""
    np, optimize = _solver()
    rates = machine.rates
    whole = [float(count) for count in (wholes or (1, 1, 1)) for _ in TIERS]
    pre = _sum_rows(_affine(lambda x: prefill_busy(task, rates, block, x)), prefill_sums(rates.overlap))
    post = _sum_rows(_affine(lambda x: decode_busy(task, rates, block, x)), decode_sums(rates.overlap))
    longest = max(abs(number) for slopes, constant in (*pre, *post) for number in (*slopes, constant))
    width = SHARES + 2 + len(TIERS)
    rows, most = [], []
    for column, several in ((SHARES, pre), (SHARES + 1, post)):
        for slopes, constant in several:
            row = [slope / one / longest for slope, one in zip(slopes, whole, strict=True)] + [0.0] * (width - SHARES)
            row[column] = -1.0
            rows.append(row)
            most.append(-constant / longest)
    for index, (tier, room) in enumerate(zip(TIERS, machine.memory, strict=True)):
        if not room:
            continue
        for slopes, constant in _affine(_of_tier(task, block, tier)).values():
            row = [slope / one / GB for slope, one in zip(slopes, whole, strict=True)] + [0.0] * (width - SHARES)
            row[SHARES + 2 + index] = -1.0
            rows.append(row)
            most.append((room - constant) / GB)
    sums = [[float(column // 3 == part) for column in range(width)] for part in range(len(PARTS))]
    totals = [whole[3 * part] for part in range(len(PARTS))]
    upper = [0.0 if not machine.memory[i % 3] or i == HIDDEN_ON_DISK else one for i, one in enumerate(whole)]
    upper += [np.inf, np.inf, *([np.inf if may_overflow and room else 0.0 for room in machine.memory])]
    cost = [0.0] * SHARES + [1.0, task.output - 1.0] + [0.0] * len(TIERS)
    if may_overflow:
        # Rather a larger disk than a larger host, and rather that than a larger device.
        cost = [0.0] * (SHARES + 2) + [1e4, 1e2, 1.0]
    with quiet():
        found = optimize.milp(
            cost,
            integrality=[int(wholes is not None)] * SHARES + [0] * (width - SHARES),
            bounds=optimize.Bounds(np.zeros(width), np.array(upper)),
            constraints=[
                optimize.LinearConstraint(np.array(rows), -np.inf, np.array(most)),
                optimize.LinearConstraint(np.array(sums), totals, totals),
            ],
            options={"time_limit": SOLVER_SECONDS},
        )
    return None if found.x is None else [float(value) for value in found.x]


def _solver() -> tuple[Any, Any]:
    """numpy and scipy.optimize; neither is imported before it is used."""
    try:
        return import_module("numpy"), import_module("scipy.optimize")
    except ImportError as error:
        raise BackendUnavailable(INSTALL) from error


def _of_tier(task: Task, block: Block, tier: str) -> Callable[[Shares], Mapping[str, float]]:
    return lambda shares: memory(task, block, shares)[tier]


def _up(gigabytes: float) -> float:
    """To whole megabytes, so that what is named is enough."""
    return math.ceil(gigabytes * 1000) / 1000


def _too_small(task: Task, machine: Machine, block: Block) -> InvalidParameter:
    """Names the tier that is too small, and by how much: for the fewest sequences that were asked for."""
    found = _programme(task, machine, block, units(task, block), may_overflow=True)
    assert found is not None, "with room for everything anything fits"
    # What may be filled is a share of what there is; a disk is taken as it is given.
    scale = [machine.share, machine.share, 1.0]
    missing = [count / one for count, one in zip(found[SHARES + 2 :], scale, strict=True)]
    index = next((i for i, count in enumerate(missing) if count > NEAR), len(TIERS) - 1)
    room = machine.memory[index] / scale[index] / GB
    shown = f"at least {_up(room + missing[index]):.3f} GB for {block.sequences} sequence"
    shown += f"{'s' * (block.sequences > 1)} of {task.prompt} + {task.output} tokens"
    others = [f"{_up(missing[i]):.3f} GB more of {TIERS[i]}" for i in range(index + 1, len(TIERS)) if missing[i] > NEAR]
    return InvalidParameter(f"{TIERS[index]}_memory", round(room, 3), " and ".join([shown, *others]))
