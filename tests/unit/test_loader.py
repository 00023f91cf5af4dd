"""The loader: every name and shape is settled before any tensor is read, and each operation does what it says."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from headrace.core.errors import UnsupportedModel, WeightsMismatch
from headrace.core.spec import WeightMap, WeightRule
from headrace.models.registry import describe
from headrace.weights.checkpoint import Checkpoint, open_checkpoint
from headrace.weights.loader import rope_order, stream
from headrace.weights.qtensor import SCHEMES, QTensor


class Memory(Checkpoint):
    """A checkpoint in memory that notes what is read."""

    format = "hf"
    path = Path("memory")
    config: Mapping[str, object] = {}

    def __init__(self, **held: QTensor | NDArray[Any]) -> None:
        self.held = {
            name: value if isinstance(value, QTensor) else QTensor.from_array(value) for name, value in held.items()
        }
        self.nbytes = sum(tensor.nbytes for tensor in self.held.values())
        self.read: list[str] = []

    def names(self) -> tuple[str, ...]:
        return tuple(self.held)

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: tensor.shape for name, tensor in self.held.items()}

    def tensor(self, name: str) -> QTensor:
        self.read.append(name)
        return self.held[name]

    def drop_pages(self) -> None:
        """Nothing is mapped."""

    def close(self) -> None:
        self.held = {}

    def _identity(self) -> Iterator[bytes]:
        yield b"memory"


def numbers(*shape: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def packed(scheme: str, *shape: int) -> QTensor:
    kind = SCHEMES[scheme]
    size = int(np.prod(shape)) // kind.group * kind.group_bytes
    # Small bytes: every scale is a small finite number.
    return QTensor.from_bytes(scheme, shape, np.random.default_rng(0).integers(0, 60, size, dtype=np.uint8))


def load(checkpoint: Checkpoint, *rules: WeightRule, ignorable: tuple[str, ...] = ()) -> dict[str, QTensor]:
    return dict(stream(checkpoint, WeightMap(rules, ignorable)))


def one(checkpoint: Checkpoint, rule: WeightRule) -> QTensor:
    return load(checkpoint, rule)[rule.target]


# ---------------------------------------------------------------- operations


def test_same_is_the_checkpoints_own_tensor() -> None:
    checkpoint = Memory(a=packed("q4_1", 4, 64))
    assert one(checkpoint, WeightRule(("a",), "t", (4, 64))) is checkpoint.held["a"]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_cat_and_split_rows_keep_the_scheme(scheme: str) -> None:
    whole = packed(scheme, 6, 256)
    checkpoint = Memory(whole=whole, top=whole.rows(0, 2), rest=whole.rows(2, 6))
    made = load(
        checkpoint,
        WeightRule(("top", "rest"), "joined", (6, 256), op="cat_rows"),
        WeightRule(("whole",), "cut", (3, 256), op="split_rows", rows=(1, 4)),
        WeightRule(("whole",), "cut2", (2, 256), op="split_rows", rows=(4, 6)),
    )
    assert {tensor.scheme for tensor in made.values()} == {scheme}
    assert made["joined"].dequantise().tobytes() == whole.dequantise().tobytes()
    assert np.array_equal(made["cut"].dequantise(), whole.dequantise()[1:4])
    assert np.array_equal(made["cut2"].dequantise(), whole.dequantise()[4:6])


def interleave(values: NDArray[Any], heads: int) -> NDArray[Any]:
    """What the converter stores, by its definition: row 2i of a head is HF's row i, row 2i + 1 its i + d/2."""
    stored = np.empty_like(values)
    dim = len(values) // heads
    for head in range(heads):
        for i in range(dim // 2):
            stored[head * dim + 2 * i] = values[head * dim + i]
            stored[head * dim + 2 * i + 1] = values[head * dim + i + dim // 2]
    return stored


def test_rope_order_by_hand() -> None:
    assert rope_order(8, 2).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert rope_order(6, 1).tolist() == [0, 2, 4, 1, 3, 5]


@given(heads=st.integers(1, 5), half=st.integers(1, 6), columns=st.integers(0, 3))
def test_permute_rope_undoes_the_converter(heads: int, half: int, columns: int) -> None:
    shape = (2 * heads * half, 3)[: 2 if columns else 1]
    values = numbers(*shape)
    rule = WeightRule(("q",), "t", shape, op="permute_rope", heads=heads)
    assert np.array_equal(one(Memory(q=interleave(values, heads)), rule).dequantise(), values)


def test_permute_rope_keeps_packed_rows_packed() -> None:
    stored = packed("q4_0", 8, 64)
    made = one(Memory(q=stored), WeightRule(("q",), "t", (8, 64), op="permute_rope", heads=2))
    assert made.scheme == "q4_0"
    assert np.array_equal(interleave(made.dequantise(), 2), stored.dequantise())


@pytest.mark.parametrize("scheme", ["f32", "f16", "bf16"])
def test_transpose(scheme: str) -> None:
    tensor = packed(scheme, 3, 5)
    made = one(Memory(w=tensor), WeightRule(("w",), "t", (5, 3), op="transpose"))
    assert made.scheme == scheme and made.shape == (5, 3)
    assert np.array_equal(made.dequantise(), tensor.dequantise().T)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_take_is_one_expert_and_stays_packed(scheme: str) -> None:
    group = max(SCHEMES[scheme].group, 64)
    whole = packed(scheme, 3, 4, group)
    checkpoint = Memory(w=whole)
    made = load(
        checkpoint,
        *(WeightRule(("w",), f"e{index}", (4, group), op="take", index=index) for index in range(3)),
        WeightRule(("w",), "part", (3, group), op="take", index=2, rows=(1, 4)),
    )
    assert {tensor.scheme for tensor in made.values()} == {scheme}
    assert all(np.shares_memory(made["e1"].planes[name], plane) for name, plane in whole.planes.items())
    values = whole.dequantise()
    assert all(np.array_equal(made[f"e{index}"].dequantise(), values[index]) for index in range(3))
    assert np.array_equal(made["part"].dequantise(), values[2, 1:4])
    assert made["part"].shape == (3, group)


@pytest.mark.parametrize(
    ("shape", "rule", "message"),
    [
        ((4, 6), WeightRule(("w",), "t", (6,), op="take"), r"number 0 is not inside w \(4, 6\)"),
        ((2, 4, 6), WeightRule(("w",), "t", (4, 6), op="take", index=2), "number 2 is not inside"),
        ((2, 4, 6), WeightRule(("w",), "t", (4, 6), op="take", index=-1), "number -1 is not inside"),
        ((2, 4, 6), WeightRule(("w",), "t", (3, 6), op="take", rows=(2, 5)), "rows 2 to 5 are not inside"),
        ((2, 4, 6), WeightRule(("w",), "t", (4, 5), op="take"), r"found \(4, 6\), needed \(4, 5\)"),
    ],
)
def test_take_outside_of_the_source(shape: tuple[int, ...], rule: WeightRule, message: str) -> None:
    checkpoint = Memory(w=numbers(*shape))
    with pytest.raises(WeightsMismatch, match=message):
        load(checkpoint, rule)
    assert not checkpoint.read


@pytest.mark.parametrize("scheme", ["f32", "f16", "bf16"])
def test_reshape_and_take_cols_of_plain_numbers(scheme: str) -> None:
    patch, table, linear = packed(scheme, 4, 3, 2, 2), packed(scheme, 1, 5, 4), packed(scheme, 3, 7)
    made = load(
        Memory(patch=patch, table=table, linear=linear),
        WeightRule(("patch",), "patch", (4, 12), op="reshape"),
        WeightRule(("table",), "table", (5, 4), op="reshape"),
        WeightRule(("linear",), "linear", (3, 4), op="take_cols", rows=(2, 6)),
    )
    assert {tensor.scheme for tensor in made.values()} == {scheme}
    assert [tensor.shape for tensor in made.values()] == [(4, 12), (5, 4), (3, 4)]
    # A patch's numbers channel by channel, row by row.
    assert np.array_equal(made["patch"].dequantise()[1].reshape(3, 2, 2), patch.dequantise()[1])
    assert np.array_equal(made["table"].dequantise(), table.dequantise()[0])
    assert np.array_equal(made["linear"].dequantise(), linear.dequantise()[:, 2:6])


# ---------------------------------------------------------------- names


A = WeightRule(("a",), "t.a", (2, 3))


def test_missing_and_left_over_are_counted_and_five_are_named() -> None:
    checkpoint = Memory(a=numbers(2, 3), **{f"extra{i}": numbers(1) for i in range(7)})
    rules = (A, *(WeightRule((f"gone{i}",), f"t.{i}", (1,)) for i in range(6)))
    with pytest.raises(WeightsMismatch) as caught:
        stream(checkpoint, WeightMap(rules))
    message = str(caught.value)
    assert "6 missing ('gone0', 'gone1', 'gone2', 'gone3', 'gone4' and 1 more)" in message
    assert "7 left over ('extra0', 'extra1', 'extra2', 'extra3', 'extra4' and 2 more)" in message
    assert checkpoint.read == []


def test_ignorable_is_a_full_match() -> None:
    checkpoint = Memory(a=numbers(2, 3), inv_freq=numbers(2), inv_freq_2=numbers(2))
    with pytest.raises(WeightsMismatch, match=r"1 left over \('inv_freq_2'\)"):
        load(checkpoint, A, ignorable=("inv_.req",))
    assert list(load(checkpoint, A, ignorable=("inv_.req", r".*_\d"))) == ["t.a"]
    assert checkpoint.read == ["a"]


def test_a_target_made_twice() -> None:
    with pytest.raises(WeightsMismatch, match=r"1 made twice \('t\.a'\)"):
        load(Memory(a=numbers(2, 3), b=numbers(2, 3)), A, WeightRule(("b",), "t.a", (2, 3)))


def test_a_source_may_be_used_twice() -> None:
    made = load(Memory(a=numbers(2, 3)), A, WeightRule(("a",), "head", (2, 3)))
    assert list(made) == ["t.a", "head"]


# ---------------------------------------------------------------- shapes


def rule(**changes: Any) -> WeightRule:
    return WeightRule(**({"sources": ("w",), "target": "t", "shape": (4, 6)} | changes))


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (rule(shape=(4, 5)), r"t from 'w': found \(4, 6\), needed \(4, 5\)"),
        (rule(shape=(24,)), r"found \(4, 6\), needed \(24,\)"),
        (rule(op="transpose"), r"found \(6, 4\), needed \(4, 6\)"),
        (rule(op="transpose", sources=("v",), shape=(4,)), r"t: transpose needs two dimensions, found \(4,\)"),
        (rule(op="cat_rows", sources=("w", "w")), r"found \(8, 6\), needed \(4, 6\)"),
        (rule(op="cat_rows", sources=("w", "u")), "rows of different lengths cannot be joined"),
        (rule(op="cat_rows", sources=("w", "v")), "rows of different lengths cannot be joined"),
        (rule(op="cat_rows", sources=("s", "s")), r"t: cat_rows needs rows, found a tensor of shape \(\)"),
        (rule(op="split_rows", rows=(0, 2)), r"found \(2, 6\), needed \(4, 6\)"),
        (rule(op="split_rows", rows=(2, 6)), r"t: rows 2 to 6 are not inside w \(4, 6\)"),
        (rule(op="split_rows", rows=(-4, 4)), "rows -4 to 4 are not inside"),
        (rule(op="reshape", shape=(5, 5)), r"t from 'w': found \(4, 6\), needed \(5, 5\)"),
        (rule(op="reshape", sources=("s",), shape=(1,)), r"t: reshape needs rows, found a tensor of shape \(\)"),
        (rule(op="take_cols", rows=(2, 7)), r"t: columns 2 to 7 are not inside w \(4, 6\)"),
        (rule(op="take_cols", sources=("v",), rows=(0, 1)), r"t: columns 0 to 1 are not inside v \(4,\)"),
        (rule(op="take_cols", rows=(0, 3)), r"found \(4, 3\), needed \(4, 6\)"),
        (rule(op="permute_rope", heads=3), "t: 4 rows are not 3 heads of an even size"),
        (rule(op="permute_rope", heads=4), "t: 4 rows are not 4 heads of an even size"),
    ],
)
def test_a_wrong_shape_is_refused_before_any_read(wrong: WeightRule, words: str) -> None:
    checkpoint = Memory(w=numbers(4, 6), u=numbers(4, 5), v=numbers(4), s=QTensor.from_array(np.zeros((), np.float32)))
    with pytest.raises(WeightsMismatch, match=words):
        stream(checkpoint, WeightMap((wrong,), (".*",)))
    assert checkpoint.read == []


@pytest.mark.parametrize(
    ("senseless", "words"),
    [
        (rule(sources=()), "same cannot take 0 sources"),
        (rule(sources=("w", "w")), "same cannot take 2 sources"),
        (rule(op="split_rows"), "split_rows needs `rows`"),
        (rule(op="permute_rope"), "permute_rope needs `heads`"),
        (rule(op="take_cols"), "take_cols needs `rows`"),
        (rule(op="mirror"), "unknown operation 'mirror'"),
    ],
)
def test_a_rule_that_makes_no_sense_is_a_value_error(senseless: WeightRule, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        stream(Memory(w=numbers(4, 6)), WeightMap((senseless,), (".*",)))


@pytest.mark.parametrize(
    ("unable", "words"),
    [
        (rule(sources=("q",), shape=(64, 4), op="transpose"), "t: transpose of q: groups of q8_0 run along rows"),
        (rule(sources=("q",), shape=(256,), op="reshape"), "t: reshape of q: groups of q8_0 run along rows"),
        (rule(sources=("q",), shape=(4, 32), op="take_cols", rows=(0, 32)), "t: take_cols of q: groups of q8_0"),
        (rule(sources=("q", "f"), shape=(8, 64), op="cat_rows"), "t: cat_rows of q, f: parts of different schemes"),
        (rule(sources=("v",), shape=(64,), op="permute_rope", heads=2), r"t: permute_rope of v: q8_0 \(64,\) has no"),
        (rule(sources=("v",), shape=(32,), op="split_rows", rows=(0, 32)), r"t: split_rows of v: q8_0 \(64,\) has no"),
    ],
)
def test_what_a_scheme_cannot_do_is_unsupported(unable: WeightRule, words: str) -> None:
    checkpoint = Memory(q=packed("q8_0", 4, 64), f=numbers(4, 64), v=packed("q8_0", 64))
    with pytest.raises(UnsupportedModel, match=words):
        list(stream(checkpoint, WeightMap((unable,), (".*",))))


# ---------------------------------------------------------------- order, and the demo model


def test_the_stream_is_lazy_and_in_the_order_of_the_file() -> None:
    checkpoint = Memory(a=numbers(1), b=numbers(1), c=numbers(1))
    tensors = stream(checkpoint, WeightMap(tuple(WeightRule((name,), f"t.{name}", (1,)) for name in "cab")))
    assert checkpoint.read == []
    assert next(tensors)[0] == "t.a" and checkpoint.read == ["a"]
    assert [name for name, _ in tensors] == ["t.b", "t.c"]


def test_the_demo_model_streams_packed_and_unpermuted(demo_path: Path) -> None:
    with open_checkpoint(demo_path) as checkpoint:
        description = describe(checkpoint.config, checkpoint.format, checkpoint.shapes())
        made = dict(stream(checkpoint, description.weight_map))
        stored = checkpoint.tensor("blk.0.attn_q.weight")
    assert len(made) == 272 and made["embed.weight"].scheme == "q8_0"
    query = made["layers.0.attn.q.weight"]
    assert query.scheme == stored.scheme == "q4_1"
    assert np.array_equal(interleave(query.dequantise(), 9), stored.dequantise())
