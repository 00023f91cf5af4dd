"""RequestTable: what a plan's spans turn into, and what a broken plan is told."""

from __future__ import annotations

import numpy as np
import pytest

from headrace.backends.rows import RequestTable
from headrace.core.errors import EngineError
from headrace.core.types import Admit, RowStep, SamplingParams, StepPlan

GREEDY = SamplingParams()


def table() -> RequestTable:
    return RequestTable(max_rows=4, max_model_len=20, block_size=4, num_blocks=10, vocab_size=1000)


def admit(row: int, *token_ids: int, num_prompt: int | None = None) -> Admit:
    return Admit(row, token_ids, len(token_ids) if num_prompt is None else num_prompt, GREEDY, frozenset({9, 2}))


def applied(rows: RequestTable, *steps: RowStep, admits: tuple[Admit, ...] = (), release: tuple[int, ...] = ()) -> None:
    rows.apply(StepPlan(0, steps, admits, release))


def test_a_batch_by_hand() -> None:
    rows = table()
    steps = (
        RowStep(2, 0, 5, new_blocks=(7, 3), sample=True),
        RowStep(0, 4, 2, new_blocks=(5, 1, 8), drafts=(60, 61), sample=False),
    )
    applied(rows, *steps, admits=(admit(2, 20, 21, 22, 23, 24), admit(0, 10, 11, 12, 13, 14, 15)))
    with pytest.raises(EngineError, match="row 0 has drafts but does not sample"):
        rows.batch(steps)
    steps = (steps[0], RowStep(0, 4, 2, drafts=(60, 61), sample=True))
    batch = rows.batch(steps)
    assert batch.token_ids.tolist() == [20, 21, 22, 23, 24, 14, 15, 60, 61]
    assert batch.positions.tolist() == [0, 1, 2, 3, 4, 4, 5, 6, 7]
    assert batch.slots.tolist() == [28, 29, 30, 31, 12, 4, 5, 6, 7]
    assert batch.starts.tolist() == [0, 5] and batch.lengths.tolist() == [5, 4] and batch.contexts.tolist() == [5, 8]
    assert batch.block_tables.tolist() == [[7, 3, 10], [5, 1, 8]]
    assert batch.logit_positions.tolist() == [4, 6, 7, 8]
    assert batch.logit_starts.tolist() == [0, 1] and batch.logit_counts.tolist() == [1, 3]
    assert rows.slots(0, 3, 9).tolist() == [23, 4, 5, 6, 7, 32]


def test_logits_of_every_position_or_none() -> None:
    rows = table()
    steps = (RowStep(1, 0, 3, new_blocks=(0,), logits=True), RowStep(3, 0, 1, new_blocks=(4,)))
    applied(rows, *steps, admits=(admit(1, 5, 6, 7, 8), admit(3, 1, 2)))
    batch = rows.batch(steps)
    assert batch.logit_positions.tolist() == [0, 1, 2] and batch.logit_counts.tolist() == [3, 0]
    only = rows.batch(steps[1:])
    assert only.logit_positions.tolist() == [] and only.token_ids.tolist() == [1]


def test_sampled_tokens_are_known_afterwards() -> None:
    rows = table()
    applied(rows, RowStep(0, 0, 2, new_blocks=(0,)), admits=(admit(0, 5, 6, num_prompt=1),))
    rows.append(0, (7, 8))
    batch = rows.batch([RowStep(0, 2, 2, sample=True)])
    assert batch.token_ids.tolist() == [7, 8]
    sampling = rows.row(0).sampling
    assert sampling.num_prompt == 1 and sampling.stop_ids.tolist() == [2, 9]
    rows.append(0, range(100))
    assert rows.row(0).num_tokens == 20, "what no plan can compute is dropped"


def test_fresh_blocks_are_those_not_wholly_before_the_start() -> None:
    rows = table()
    step = RowStep(0, 8, 1, new_blocks=(3, 4, 5))
    plan = StepPlan(0, (step,), (admit(0, *range(12)),))
    rows.apply(plan)
    assert rows.fresh_blocks(plan).tolist() == [5]
    later = StepPlan(1, (RowStep(0, 9, 3), RowStep(1, 6, 1, new_blocks=(6, 7))), (admit(1, *range(7)),))
    rows.apply(later)
    assert rows.fresh_blocks(later).tolist() == [7]


def test_release_comes_before_admit() -> None:
    rows = table()
    applied(rows, RowStep(0, 0, 4, new_blocks=(1,)), admits=(admit(0, 1, 2, 3, 4),))
    applied(rows, RowStep(0, 0, 1, new_blocks=(2,)), admits=(admit(0, 9),), release=(0,))
    batch = rows.batch([RowStep(0, 0, 1)])
    assert batch.token_ids.tolist() == [9] and batch.block_tables.tolist() == [[2]]
    applied(rows, release=(0,))
    with pytest.raises(EngineError, match="row 0, where no request is"):
        rows.batch([RowStep(0, 0, 1)])


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (StepPlan(0, (RowStep(1, 0, 1),)), "row 1, where no request is"),
        (StepPlan(0, (RowStep(7, 0, 1),)), "row 7, where no request is"),
        (StepPlan(0, (), release=(1,)), "row 1, where no request is"),
        (StepPlan(0, (), (admit(0, 1),)), "row 0 is not free"),
        (StepPlan(0, (), (admit(4, 1),)), "row 4 is not free"),
        (StepPlan(0, (), (admit(1),)), "0 prompt tokens of 0"),
        (StepPlan(0, (), (admit(1, 5, num_prompt=2),)), "2 prompt tokens of 1"),
        (StepPlan(0, (), (admit(1, *range(21)),)), "prompt tokens of 21"),
        (StepPlan(0, (RowStep(0, 0, 1, new_blocks=(10,)),)), "a block outside 0 … 9"),
        (StepPlan(0, (RowStep(0, 0, 1, new_blocks=(0, 1, 2, 3, 4, 5)),)), "more blocks than the longest"),
        (StepPlan(0, (RowStep(0, 0, 0, new_blocks=(0,)),)), "the plan wants 0 to 0"),
        (StepPlan(0, (RowStep(0, 2, 2, new_blocks=(0,)),)), "has 3 tokens, the plan wants 2 to 4"),
        (StepPlan(0, (RowStep(0, 0, 2, sample=True, new_blocks=(0,)),)), "cannot sample after token 2 of 3"),
        (StepPlan(0, (RowStep(0, 2, 1, (4, 5), (0,), sample=True),)), "1 blocks for 5 tokens"),
    ],
)
def test_broken_plans(plan: StepPlan, message: str) -> None:
    rows = table()
    applied(rows, admits=(admit(0, 1, 2, 3),))
    with pytest.raises(EngineError, match=message):
        rows.apply(plan)
        rows.batch(plan.rows)


def test_arrays_are_what_kernels_take() -> None:
    rows = table()
    applied(rows, RowStep(0, 0, 1, new_blocks=(0,)), admits=(admit(0, 1),))
    batch = rows.batch([RowStep(0, 0, 1, sample=True)])
    assert batch.adapters == ("",)
    for name in set(batch.__slots__) - {"adapters", "images", "unfinished_images"}:
        array = getattr(batch, name)
        assert array.dtype == np.int64 and array.flags.c_contiguous, name
