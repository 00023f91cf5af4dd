"""Rows, slots and blocks moved by Triton, against torch's indexing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from headrace.backends.torch import ops
from headrace.backends.torch.kernels.embed import embed, put_blocks, take_rows
from headrace.core.errors import EngineError

NO_TOKEN = -3
"""A negative code where a failed row's token would be."""


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def apart(x: Tensor) -> Tensor:
    """The same rows, with NaN beside each."""
    wide = torch.full((len(x), x.shape[1] + 6), torch.nan, dtype=x.dtype)[:, 3:-3]
    return wide.copy_(x)


# ---------------------------------------------------------------- embed


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [5, 64, 1500])
def test_a_token_known_or_still_on_the_device_gets_its_row(width: int, dtype: torch.dtype) -> None:
    weight = apart(torch.randn(11, width).to(dtype))
    last = int32(4, 10, NO_TOKEN, 11)
    ids, rows = int32(0, -1, 10, -1, -1, -1, 7), int32(-1, 1, 99, 0, 2, 3, 0)
    assert torch.equal(embed(ids, last, rows, weight), weight[[0, 10, 10, 4, 0, 0, 7]])


@pytest.mark.parametrize("token", [11, 2**31 - 1, -2, -(2**31)])
def test_an_id_that_no_vocabulary_has_reads_row_0(token: int) -> None:
    weight = torch.randn(11, 8)
    assert torch.equal(embed(int32(token, 3), int32(5), int32(0, 0), weight), weight[[0, 3]])
    assert torch.equal(embed(int32(-1, 3), int32(token), int32(0, 0), weight), weight[[0, 3]])


@pytest.mark.parametrize("row", [-1, 2, 2**31 - 1])
def test_a_row_that_is_none_is_not_read(row: int) -> None:
    weight = torch.randn(11, 8)
    last = int32(5, 6, 7, 8)[:2]
    assert torch.equal(embed(int32(-1), last, int32(row), weight), weight[:1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_the_scale_is_rounded_before_it_multiplies(dtype: torch.dtype) -> None:
    weight = torch.randn(9, 40).to(dtype)
    ids = int32(8, 1, 5)
    wanted = ops.scale(ops.embed(ids.long(), weight), 3072**0.5)
    assert torch.equal(embed(ids, int32(0), int32(0, 0, 0), weight, 3072**0.5), wanted)


# ---------------------------------------------------------------- rows and tables


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [5, 1100])
def test_rows_are_taken_and_padding_is_zero(width: int, dtype: torch.dtype) -> None:
    x = apart(torch.randn(6, width).to(dtype))
    x[0], x[4] = torch.nan, torch.inf
    got = take_rows(x, int32(5, -1, 2, 2, -1))
    assert torch.equal(got, torch.stack([x[5], torch.zeros_like(x[1]), x[2], x[2], torch.zeros_like(x[1])]))


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_blocks_go_to_their_places_and_nothing_else_changes(data: st.DataObject) -> None:
    rows, places = 5, 70
    chosen = data.draw(st.lists(st.tuples(st.integers(0, rows - 1), st.integers(0, places - 1)), unique=True))
    pool = torch.arange((rows + 2) * (places + 4), dtype=torch.int32).view(rows + 2, places + 4)
    tables, wanted = pool[1:-1, 2:-2], pool.clone()
    padding = data.draw(st.integers(0, 3))
    for i, (row, place) in enumerate(chosen):
        wanted[row + 1, place + 2] = -i
    pairs = [(row, place, -i) for i, (row, place) in enumerate(chosen)] + [(-1, 3, 7)] * padding
    columns = [int32(*column) for column in zip(*pairs, strict=True)] if pairs else [int32()] * 3
    put_blocks(tables, *columns)
    assert torch.equal(pool, wanted)


def test_more_blocks_than_one_program_takes() -> None:
    tables = torch.zeros(3, 200, dtype=torch.int32)
    flat = torch.randperm(600)[:513].int()
    put_blocks(tables, flat // 200, flat % 200, flat)
    wanted = torch.zeros(600, dtype=torch.int32)
    wanted[flat.long()] = flat
    assert torch.equal(tables.view(-1), wanted)


# ---------------------------------------------------------------- edges


def test_nothing_to_do() -> None:
    weight, none = torch.randn(4, 8), int32()
    assert embed(none, int32(0), none, weight).shape == (0, 8)
    assert take_rows(weight, none).shape == (0, 8)
    table = torch.ones(2, 2, dtype=torch.int32)
    put_blocks(table, none, none, none)
    assert (table == 1).all()


def test_what_does_not_fit_is_refused() -> None:
    weight, one, two = torch.randn(4, 8), int32(0), int32(0, 1)
    with pytest.raises(EngineError, match="embed: 1 tokens"):
        embed(one, one, two, weight)
    with pytest.raises(EngineError, match="take_rows"):
        take_rows(weight.T, one)
    with pytest.raises(EngineError, match="put_blocks: 1 rows"):
        put_blocks(torch.zeros(2, 2, dtype=torch.int32), one, one, two)
