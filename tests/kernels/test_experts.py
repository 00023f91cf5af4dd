"""Routing, grouping and the experts' products in Triton, against plain loops over tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from headrace.backends.torch import ops
from headrace.backends.torch.kernels import experts
from headrace.backends.torch.kernels.experts import block_rows, experts_mlp
from headrace.backends.torch.kernels.routing import group_by_expert, most_blocks, route
from headrace.core.errors import EngineError

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": functional.relu,
}
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3}
"""‖got − wanted‖ ÷ ‖wanted‖."""


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a kernel does not write is NaN, or an index that is far outside."""
    empty, new_empty = torch.empty, Tensor.new_empty

    def poison(tensor: Tensor) -> Tensor:
        return tensor.fill_(torch.nan if tensor.is_floating_point() else 2**30)

    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: poison(empty(*args, **kwargs)))
    monkeypatch.setattr(Tensor, "new_empty", lambda *args, **kwargs: poison(new_empty(*args, **kwargs)))


# ---------------------------------------------------------------- route


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize(("num_experts", "count"), [(4, 1), (5, 2), (8, 2), (9, 3), (128, 8), (1, 1)])
def test_a_route_is_the_reference_s(num_experts: int, count: int, normalise: bool) -> None:
    torch.manual_seed(num_experts)
    scores = torch.randn(7, num_experts + 3)[:, :num_experts] * 4
    weights, chosen = route(scores, count, normalise)
    wanted_weights, wanted_chosen = ops.route(scores, count, normalise)
    assert chosen.dtype == torch.int32 and torch.equal(chosen.long(), wanted_chosen)
    torch.testing.assert_close(weights, wanted_weights, rtol=1e-6, atol=1e-9)


def test_equal_scores_go_to_the_lowest_id() -> None:
    infinite = float("-inf")
    scores = torch.tensor([[1.0, 2, 2, 2, 0], [3, 3, 3, 3, 3], [infinite, 0, infinite, -0.0, infinite]])
    weights, chosen = route(scores, 3, True)
    assert chosen.tolist() == [[1, 2, 3], [0, 1, 2], [1, 3, 0]]
    torch.testing.assert_close(weights[1:], torch.tensor([[1 / 3] * 3, [0.5, 0.5, 0.0]]))


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # of the interpreter
@pytest.mark.parametrize("fault", [[float("nan")], [float("inf")], [float("nan")] * 6])
def test_a_row_that_is_not_finite_shows_it_and_harms_no_other(fault: list[float]) -> None:
    torch.manual_seed(0)
    scores = torch.randn(5, 6)
    whole_weights, whole_chosen = route(scores, 2, True)
    scores[3, -len(fault) :] = torch.tensor(fault)
    weights, chosen = route(scores, 2, True)
    assert weights[3].isnan().all() and len(set(chosen[3].tolist())) == 2 and set(chosen[3].tolist()) <= set(range(6))
    others = [0, 1, 2, 4]
    assert torch.equal(weights[others], whole_weights[others]) and torch.equal(chosen[others], whole_chosen[others])


def test_rows_of_padding_are_routed_nowhere() -> None:
    scores = torch.randn(6, 5)
    scores[4:] = torch.nan
    weights, chosen = route(scores, 2, False, count=torch.tensor([4], dtype=torch.int32))
    assert (chosen[4:] == -1).all() and (weights[4:] == 0).all()
    assert torch.equal(chosen[:4], route(scores[:4], 2, False)[1])


@pytest.mark.parametrize("count", [0, 6])
def test_more_experts_than_there_are_cannot_be_chosen(count: int) -> None:
    with pytest.raises(EngineError, match=f"{count} of 5 experts"):
        route(torch.zeros(2, 5), count, True)


# ---------------------------------------------------------------- groups


def check_groups(chosen: Tensor, num_experts: int, rows: int) -> None:
    """Every pair in one block of its expert, in order; full blocks but for each expert's last."""
    groups = group_by_expert(chosen, num_experts, rows)
    flat = chosen.flatten().tolist()
    wanted = []
    for expert in range(num_experts):
        pairs = [pair for pair, one in enumerate(flat) if one == expert]
        for start in range(0, len(pairs), rows):
            part = pairs[start : start + rows]
            wanted.append((expert, part + [-1] * (rows - len(part))))
    count = int(groups.experts[0])
    assert count == len(wanted) <= groups.most_blocks
    got = zip(groups.experts[1 : 1 + count].tolist(), groups.pairs.view(-1, rows)[:count].tolist(), strict=True)
    assert list(got) == wanted


@settings(max_examples=12, deadline=None)
@given(st.data())
def test_every_pair_is_in_a_block_of_its_expert(data: st.DataObject) -> None:
    num_experts = data.draw(st.integers(1, 5))
    ids = st.integers(-1, num_experts)  # the last is no expert
    chosen = data.draw(st.lists(st.tuples(ids, ids), min_size=1, max_size=70))
    check_groups(torch.tensor(chosen, dtype=torch.int32), num_experts, data.draw(st.sampled_from([1, 2, 16])))


@pytest.mark.parametrize("tokens", [512, 1100])
def test_many_pairs_are_counted_in_parts(tokens: int) -> None:
    chosen = torch.randint(-1, 3, (tokens, 2), generator=torch.Generator().manual_seed(tokens), dtype=torch.int32)
    check_groups(chosen, 3, 128)


@given(st.lists(st.integers(0, 300), min_size=1, max_size=40), st.sampled_from([1, 16, 64, 128]))
def test_there_is_room_for_all_blocks(sizes: list[int], rows: int) -> None:
    """And no more than needed: one expert with most of the pairs and the others with one each fill it."""
    most = most_blocks(sum(sizes), len(sizes), rows)
    assert sum(-(-size // rows) for size in sizes) <= most
    begun = min(sum(sizes), len(sizes))
    assert begun == 0 or most == begun - 1 + -(-(sum(sizes) - begun + 1) // rows)


def test_choices_of_another_type_are_refused() -> None:
    with pytest.raises(EngineError, match="contiguous int32"):
        group_by_expert(torch.zeros(3, 2, dtype=torch.int64), 4, 16)
    with pytest.raises(EngineError, match="contiguous int32"):
        group_by_expert(torch.zeros(3, 4, dtype=torch.int32)[:, :2], 4, 16)


# ---------------------------------------------------------------- experts


@dataclass(frozen=True, slots=True, eq=False)
class Case:
    x: Tensor
    weights: Tensor
    chosen: Tensor
    up: Tensor
    down: Tensor
    biases: tuple[Tensor, Tensor] | None
    activation: str
    gated: bool

    def run(self, invariant: bool = False) -> Tensor:
        return experts_mlp(
            self.x,
            self.weights,
            self.chosen,
            self.up,
            self.down,
            self.biases,
            self.activation,
            self.gated,
            invariant=invariant,
        )

    def take(self, *tokens: int) -> Case:
        rows = list(tokens)
        return replace(self, x=self.x[rows], weights=self.weights[rows], chosen=self.chosen[rows])


def case(
    tokens: int,
    num_experts: int,
    choices: int,
    hidden: int,
    inner: int,
    dtype: torch.dtype = torch.float32,
    activation: str = "silu",
    gated: bool = True,
    biased: bool = False,
) -> Case:
    torch.manual_seed(tokens + 10 * num_experts)
    weights, chosen = route(torch.randn(tokens, num_experts), choices, True)
    rows = inner * (2 if gated else 1)
    return Case(
        x=torch.randn(tokens, hidden).to(dtype),
        weights=weights,
        chosen=chosen,
        up=(torch.randn(num_experts, rows, hidden) * hidden**-0.5).to(dtype),
        down=(torch.randn(num_experts, hidden, inner) * inner**-0.5).to(dtype),
        biases=(torch.randn(num_experts, rows).to(dtype), torch.randn(num_experts, hidden).to(dtype))
        if biased
        else None,
        activation=activation,
        gated=gated,
    )


def wanted(case: Case) -> Tensor:
    """A loop over tokens and choices in float64, rounded to x's type where `ops` rounds -> float64."""
    dtype, act = case.x.dtype, ACTIVATIONS[case.activation]

    def rounded(x: Tensor) -> Tensor:
        return x.to(dtype).double()

    mixed = torch.zeros(case.x.shape, dtype=torch.float64)
    for token, row in enumerate(case.x.double()):
        for choice, expert in enumerate(case.chosen[token].tolist()):
            if not 0 <= expert < len(case.up):
                continue
            up_bias, down_bias = (0, 0) if case.biases is None else (bias[expert] for bias in case.biases)
            inner = rounded(case.up[expert].double() @ row + up_bias)
            if case.gated:
                gate, up = inner.chunk(2)
                inner = rounded(rounded(act(gate)) * up)
            else:
                inner = rounded(act(inner))
            mixed[token] += (
                rounded(case.down[expert].double() @ inner + down_bias) * case.weights[token, choice].double()
            )
    return mixed


def check(case: Case, got: Tensor) -> None:
    assert got.dtype == case.x.dtype and got.shape == case.x.shape
    right = wanted(case)
    error = float((got.double() - right).norm() / right.norm())
    assert error < TOLERANCE[case.x.dtype]  # NaN is not


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("tokens", "num_experts", "choices", "hidden", "inner"),
    [(1, 4, 1, 128, 32), (5, 9, 3, 40, 33), (9, 5, 2, 131, 17)],
)
def test_experts_are_those_of_a_loop(
    tokens: int, num_experts: int, choices: int, hidden: int, inner: int, dtype: torch.dtype
) -> None:
    one = case(tokens, num_experts, choices, hidden, inner, dtype)
    check(one, one.run())


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gated", [True, False])
def test_each_activation_with_and_without_a_gate_and_biases(activation: str, gated: bool) -> None:
    for biased in (True, False):
        one = case(6, 4, 2, 35, 21, torch.float16, activation, gated, biased)
        check(one, one.run())


@pytest.mark.parametrize(("tokens", "rows", "gated"), [(17, 64, True), (65, 64, False), (129, 128, True)])
def test_blocks_grow_with_the_rows_of_an_expert(tokens: int, rows: int, gated: bool) -> None:
    one = case(tokens, 4, 2, 40, 30, torch.float16, gated=gated)
    assert block_rows(2 * tokens, 4, torch.float16, invariant=False) == rows
    check(one, one.run())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_all_tokens_may_want_the_same_expert(dtype: torch.dtype) -> None:
    one = case(19, 6, 1, 24, 18, dtype)
    one.chosen.fill_(4)
    check(one, one.run())


def exact(tokens: int, dtype: torch.dtype, activation: str = "relu") -> Case:
    """All sums are exact here: the bits hang on where they are rounded alone (float16: from 2048 on, before ÷ 64)."""
    one = case(tokens, 4, 2, 72, 24, dtype, activation)
    x, up = torch.randint(-32, 33, (tokens, 72)), torch.randint(-32, 33, (4, 48, 72)) / 64
    down = functional.one_hot(torch.randint(0, 24, (4, 72)), 24)
    return replace(one, x=x.to(dtype), up=up.to(dtype), down=down.to(dtype))


@pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")  # of the interpreter
@pytest.mark.parametrize(("activation", "same"), [("relu", 1.0), ("silu", 0.97)])
def test_rounding_is_that_of_the_reference(activation: str, same: float) -> None:
    """`same`: torch's exponential may round otherwise now and then."""
    one = exact(6, torch.float16, activation)
    right = torch.zeros(6, 72)
    for token in range(6):
        for choice, expert in enumerate(one.chosen[token].tolist()):
            inner = ops.gated((one.up[expert].double() @ one.x[token].double()).half()[None], activation)[0]
            right[token] += inner[one.down[expert].argmax(1)].float() * one.weights[token, choice]
    assert float((one.run() == right.half()).float().mean()) >= same


def test_rows_of_padding_give_zeros_and_are_not_read() -> None:
    one = case(9, 5, 2, 24, 18)
    right = one.take(*range(6)).run(invariant=True)
    one.chosen[6:] = torch.tensor([[-1, -1], [5, -1], [-1, 99]])
    one.x[6:], one.weights[6:] = torch.nan, torch.nan
    got = one.run(invariant=True)
    assert torch.equal(got[:6], right) and (got[6:] == 0).all()
    one.chosen.fill_(-1)
    assert (one.run() == 0).all()


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # of the interpreter
@pytest.mark.parametrize("fault", [float("nan"), float("inf")])
def test_a_faulty_token_harms_no_other(fault: float) -> None:
    one = case(8, 4, 2, 24, 18, torch.float16)
    whole = one.run()
    one.x[3, 5] = fault
    got = one.run()
    assert got[3].isnan().any()
    others = [0, 1, 2, 4, 5, 6, 7]
    assert torch.equal(got[others], whole[others])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_with_one_cut_a_token_s_bits_do_not_depend_on_its_company(dtype: torch.dtype) -> None:
    """The sums are exact, for the interpreter's products have an order of their own for each place of a row."""
    assert len({block_rows(pairs, 8, dtype, invariant=True) for pairs in (1, 65, 10**3, 10**6)}) == 1
    one = exact(40, dtype)
    together = one.run(invariant=True)
    order = torch.randperm(40).tolist()
    assert torch.equal(one.take(*order).run(invariant=True), together[order])
    assert torch.equal(one.take(31).run(invariant=True)[0], together[31])


def test_rows_of_x_may_lie_apart() -> None:
    one = case(5, 4, 2, 24, 18)
    wide = torch.full((5, 31), torch.nan)
    wide[:, 3:27] = one.x
    assert torch.equal(replace(one, x=wide[:, 3:27]).run(), one.run())


def test_no_tokens_no_answers() -> None:
    one = case(2, 4, 2, 24, 18).take()
    weights, chosen = route(torch.zeros(0, 4), 2, True)
    assert replace(one, weights=weights, chosen=chosen).run().shape == (0, 24)


def test_what_does_not_fit_is_refused() -> None:
    one = case(3, 4, 2, 24, 18, biased=True)
    assert one.biases is not None
    faults = {
        "up .* down": replace(one, up=one.up[:, :-2].contiguous()),
        "3 rows": replace(one, chosen=one.chosen[:2].contiguous()),
        "torch.float16": replace(one, x=one.x.half()),
        "lie together": replace(one, down=one.down.transpose(1, 2).contiguous().transpose(1, 2)),
        "got .*tanh.*, allowed: silu": replace(one, activation="tanh"),
        "bias": replace(one, biases=(one.biases[0][:, 1:], one.biases[1])),
    }
    for fault, faulty in faults.items():
        with pytest.raises(EngineError, match=fault):
            faulty.run()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("gated", [True, False])
def test_tiles_fit_into_shared_memory(dtype: torch.dtype, gated: bool) -> None:
    for rows in (16, 64, 128):
        cut = experts.tiles(rows, gated, dtype)
        assert cut.rows == rows and cut.columns % 2 == 0
        assert cut.stages * (cut.rows + cut.columns) * cut.depth * dtype.itemsize <= 163 * 1024
