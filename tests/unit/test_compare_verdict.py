"""The verdict on each answer of a method, and the ε below which a margin is a tie."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.backends.base import Backend
from headrace.compare.score import PROBE_ANSWERS, PROBE_TOKENS, measure_epsilon, order_noise, other_order
from headrace.compare.verdict import (
    Epsilon,
    RequestVerdict,
    Verdict,
    divergences,
    first_difference,
    method_verdict,
    same_arithmetic,
    worst_of_rounds,
)
from headrace.engine.model import OpenModel
from headrace.testing.checkpoints import tiny_checkpoint
from tests.unit.certificate_cases import open_tiny
from tests.unit.compare_cases import OUTPUTS, TableBackend

EPSILON = 0.1
MARGINS = ((0.5, 0.05, 0.5, 0.5), (0.5, 0.5, 0.5))
"""Of OUTPUTS: the second token of the first answer is nearly tied."""

answers = st.lists(st.lists(st.integers(0, 3), max_size=5), min_size=1, max_size=4)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("models") / "tiny")


class TestDivergences:
    def kinds(self, *outputs: tuple[int, ...]) -> list[str]:
        return [str(one) for one in divergences(OUTPUTS, outputs, MARGINS, EPSILON)]

    def test_a_planted_flip_is_reported_with_its_position_and_margin(self) -> None:
        assert self.kinds(*OUTPUTS) == ["identical", "identical"]
        found = self.kinds((5, 0, 7, 8), (9, 10, 0))
        assert found == ["near-tie at token 2 (margin 0.05 < ε 0.1)", "different at token 3 (margin 0.5 ≥ ε 0.1)"]

    def test_only_the_first_difference_counts(self) -> None:
        assert self.kinds((5, 0, 0, 0), OUTPUTS[1])[0].startswith("near-tie at token 2")
        assert self.kinds((0, 0, 7, 8), OUTPUTS[1])[0].startswith("different at token 1")

    def test_an_ending_is_a_difference(self) -> None:
        assert self.kinds((5,), (9, 10, 11, 12)) == [
            "near-tie at token 2 (margin 0.05 < ε 0.1)",
            "different at token 4 (the reference has ended)",
        ]

    def test_without_epsilon_nothing_is_a_near_tie(self) -> None:
        (found, _) = divergences(OUTPUTS, ((5, 0, 7, 8), OUTPUTS[1]), MARGINS)
        assert found.kind is Verdict.DIFFERENT and str(found) == "different at token 2 (margin 0.05, ε 0)"
        tied = RequestVerdict(0, 0, margin=0.0, epsilon=0.0)
        assert tied.kind is Verdict.DIFFERENT

    def test_a_margin_of_epsilon_is_no_near_tie(self) -> None:
        assert RequestVerdict(0, 0, margin=0.1, epsilon=0.1).kind is Verdict.DIFFERENT

    def test_answers_that_do_not_belong_together_are_refused(self) -> None:
        with pytest.raises(ValueError, match="argument"):
            divergences(OUTPUTS, OUTPUTS[:1], MARGINS, EPSILON)

    @given(answers, st.data())
    def test_against_the_definition(self, reference: list[list[int]], data: st.DataObject) -> None:
        outputs = [data.draw(st.just(one) | st.lists(st.integers(0, 3), max_size=5)) for one in reference]
        margins = [[data.draw(st.floats(0, 0.2)) for _ in one] for one in reference]
        verdicts = divergences(reference, outputs, margins, EPSILON)
        for question, (expected, output, one) in enumerate(zip(reference, outputs, verdicts, strict=True)):
            assert one.question == question and one.token == first_difference(expected, output)
            if expected == output:
                assert one.kind is Verdict.IDENTICAL
                continue
            assert one.token is not None and expected[: one.token] == output[: one.token]
            near = one.token < len(expected) and margins[question][one.token] < EPSILON
            assert one.kind is (Verdict.NEAR_TIE if near else Verdict.DIFFERENT)
        whole = method_verdict(verdicts)
        assert whole.identical + whole.near_ties + whole.different == whole.answers == len(reference)
        assert (whole.kind is Verdict.IDENTICAL) == (same_arithmetic(reference, [outputs], margins) is None)
        assert (whole.kind is Verdict.DIFFERENT) == (whole.different > 0) and whole.worst in verdicts


class TestMethodVerdict:
    def test_the_worst_answer_decides_and_all_are_counted(self) -> None:
        same, near = RequestVerdict(0, epsilon=0.1), RequestVerdict(1, 7, 0.01, 0.1)
        late, early = RequestVerdict(2, 5, 0.4, 0.1), RequestVerdict(3, 2, None, 0.1)
        assert str(method_verdict([same, same])) == "identical: 2 of 2 answers"
        told = "near-tie: of 2 answers 1 near-tie, 1 identical; question 2: near-tie at token 8 (margin 0.01 < ε 0.1)"
        assert str(method_verdict([same, near])) == told
        told = (
            "different: of 4 answers 2 different, 1 near-tie, 1 identical; question 4: different at token 3 "
            "(the reference has ended)"
        )
        assert str(method_verdict([near, late, early, same])) == told

    def test_of_several_rounds_the_worst_counts(self) -> None:
        flips = [OUTPUTS, ((5, 0, 7, 8), OUTPUTS[1]), ((5, 6, 7, 0), OUTPUTS[1])]
        rounds = [divergences(OUTPUTS, outputs, MARGINS, EPSILON) for outputs in flips]
        first, second = worst_of_rounds(rounds)
        assert (first.kind, first.token, first.round) == (Verdict.DIFFERENT, 3, 2)
        assert (second.kind, second.question, second.round) == (Verdict.IDENTICAL, 1, 0)


class TestEpsilon:
    def test_the_largest_difference_is_found(self) -> None:
        rng = np.random.default_rng(3)
        table = rng.normal(0, 3, (61, 61)).astype(np.float32)
        moved = table.copy()
        moved[7] += 0.5  # foretells nothing
        moved[9, 4] -= 0.25
        known = [((7, 9), (4, 1)), ((1, 2, 3), (5,))]

        def noise(other: np.ndarray) -> float:
            backends: list[Backend] = [TableBackend(table), TableBackend(other)]
            return order_noise(known, 16, lambda: backends[0], lambda: backends[1])

        assert noise(table) == 0
        assert noise(moved) == pytest.approx(0.25)

    def test_native_kernels_are_held_against_others_that_sum_in_another_order(self, tiny: Path) -> None:
        opened = open_tiny(tiny, backend="native", dtype="float32")
        prompts = [tuple(range(3, 3 + length)) for length in (80, 5, 6, *[4] * 9)]
        lengths = (PROBE_TOKENS + 9, 1, 0, *[2] * 9)
        known = [(prompt, tuple(range(20, 20 + length))) for prompt, length in zip(prompts, lengths, strict=True)]
        with opened.checkpoint:
            found = measure_epsilon(opened, opened.config, known)
        assert 1e-7 < found.value < 1e-3, "float32 sums in another order"
        assert found.positions == PROBE_TOKENS + 1 + 2 * (PROBE_ANSWERS - 2), "those with tokens, the first ones, cut"
        assert "portable" in found.source and "kernels" in found.source
        assert str(found).startswith("ε = ") and str(found).endswith(f"{found.source}, {found.positions} positions)")

    def test_the_other_order_is_never_the_same_one(self, tiny: Path) -> None:
        for used in ("auto", "portable"):
            opened = open_tiny(tiny, backend="native", instruction_set=used)
            with opened.checkpoint:
                found = other_order(opened.config)
            assert found is not None
            other, _ = found
            assert (other.instruction_set == "portable") != (used == "portable")
            assert (other.backend, other.kv_dtype, other.quant) == ("native", "float32", opened.config.quant)

    def test_torch_in_float32_is_held_against_the_native_kernels(self, tiny: Path) -> None:
        opened = open_tiny(tiny, backend="torch")
        with opened.checkpoint:
            found = measure_epsilon(opened, opened.config, [((3, 4, 5), (6, 7, 8, 9))])
        assert 0 < found.value < 1e-3 and found.source == "the torch backend against the native one"

    def test_where_there_is_no_other_order_nothing_is_claimed(self, tiny: Path) -> None:
        opened = open_tiny(tiny, backend="torch", dtype="bfloat16")
        with opened.checkpoint:
            found = measure_epsilon(opened, opened.config, [((3, 4, 5), (6, 7))])
            assert found == Epsilon(0.0, 0, "no second order of summation here for torch bfloat16")
            assert str(found) == "ε not measured (no second order of summation here for torch bfloat16)"

    def test_what_cannot_be_measured_says_why(self, tiny: Path, tmp_path: Path) -> None:
        opened: OpenModel = open_tiny(tiny, backend="native")
        with opened.checkpoint:
            assert (
                measure_epsilon(opened, opened.config, [((3,), ())]).source == "there are no answers to measure it on"
            )
            opened.checkpoint.path = tmp_path / "gone"
            found = measure_epsilon(opened, opened.config, [((3,), (4,))])
            assert (found.value, found.positions) == (0.0, 0) and "no such folder or file" in found.source
