"""Verdicts, scoring and files of `headrace compare`, on planted figures and on backends computed by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest

from headrace.compare.advice import advice_of, model_text
from headrace.compare.document import document
from headrace.compare.questions import TEXT4
from headrace.compare.report import page
from headrace.compare.score import CHUNK, Known, kl_divergence, margins, plans, reference_of, score
from headrace.compare.verdict import LOSSLESS_MEAN_KL, first_difference, percent, same_arithmetic, same_model
from headrace.core.errors import EngineError, InvalidParameter
from headrace.core.resolve import precision_text
from headrace.pages.files import ReportFile
from tests.unit.compare_cases import MARGIN, OUTPUTS, TableBackend, comparison, outcome, scored, workload

VOCAB = 61
NASTY = "<script>alert('x')</script> & \"quotes\" \x1b[31mred\x00 [bold]no markup[/bold]"


def rounds(seconds: list[float], outputs=OUTPUTS, together: bool = True):
    return tuple(outcome(outputs, value, together) for value in seconds)


class TestSameArithmetic:
    def verdict(self, *outputs):
        return same_arithmetic(OUTPUTS, outputs, [scored(output).margins for output in OUTPUTS])

    def test_identical(self) -> None:
        assert self.verdict(OUTPUTS, OUTPUTS) is None

    def test_a_planted_flip_is_found_where_it_is(self) -> None:
        found = self.verdict(OUTPUTS, ((5, 6, 7, 8), (9, 10, 12)))
        assert found is not None
        assert (found.round, found.question, found.token, found.margin) == (1, 1, 2, MARGIN)
        assert str(found) == "first divergence at token 3 of question 2, logit margin 0.25"

    def test_the_earliest_token_wins(self) -> None:
        found = self.verdict(((5, 6, 7, 9), (9, 11, 11)))
        assert found is not None and (found.question, found.token) == (1, 1)

    def test_an_answer_that_ends_early_or_goes_on_differs(self) -> None:
        shorter = self.verdict(((5, 6, 7), (9, 10, 11)))
        longer = self.verdict(((5, 6, 7, 8), (9, 10, 11, 12)))
        assert shorter is not None and (shorter.question, shorter.token, shorter.margin) == (0, 3, MARGIN)
        assert longer is not None and (longer.question, longer.token, longer.margin) == (1, 3, None)
        assert first_difference((), ()) is None


class TestSameModel:
    def test_lossless_needs_every_token_and_a_tiny_kl(self) -> None:
        assert same_model(OUTPUTS, [scored(output) for output in OUTPUTS]).lossless
        assert same_model(OUTPUTS, [scored(output, kl=LOSSLESS_MEAN_KL) for output in OUTPUTS]).lossless
        lossy = same_model(OUTPUTS, [scored(output, kl=2e-6) for output in OUTPUTS])
        assert not lossy.lossless and lossy.mean_kl == pytest.approx(2e-6)

    def test_a_token_fp32_would_not_choose(self) -> None:
        found = same_model(OUTPUTS, [scored(OUTPUTS[0]), scored(OUTPUTS[1], argmax=(9, 3, 11))])
        assert not found.lossless
        assert found.positions == 7 and found.top1_agreement == 6 / 7
        assert found.divergence is not None and (found.divergence.question, found.divergence.token) == (1, 1)

    def test_percent_never_rounds_up_to_all(self) -> None:
        assert (percent(1.0), percent(0.99999), percent(0.5)) == ("100 %", "99.9 %", "50.0 %")


class TestScore:
    def test_kl_against_an_independent_computation(self) -> None:
        rng = np.random.default_rng(1)
        p, q = (rng.normal(0, 5, (4, 33)).astype(np.float32) for _ in range(2))
        p[0] += 1e4  # softmax does not care
        for row_p, row_q, found in zip(p, q, kl_divergence(p, q), strict=True):
            shift_p, shift_q = float(row_p.max()), float(row_q.max())
            weight_p = [math.exp(float(value) - shift_p) for value in row_p]
            weight_q = [math.exp(float(value) - shift_q) for value in row_q]
            sum_p, sum_q = math.fsum(weight_p), math.fsum(weight_q)
            expected = math.fsum(
                a / sum_p * math.log((a / sum_p) / (b / sum_q)) for a, b in zip(weight_p, weight_q, strict=True)
            )
            assert found == pytest.approx(expected, rel=1e-9)
        assert kl_divergence(p, p) == [0.0] * 4
        two_sided = np.array([[0.0, 0.0]], np.float32), np.array([[0.0, math.log(3)]], np.float32)
        assert kl_divergence(*two_sided) == pytest.approx([0.5 * math.log(4 / 3)])

    def test_margins(self) -> None:
        assert margins(np.array([[1, 5, 3], [2, 2, 0]], np.float32)) == [2.0, 0.0]
        assert margins(np.zeros((2, 1), np.float32)) == [0.0, 0.0]

    @pytest.mark.parametrize(("num_prompt", "num_output"), [(1, 1), (1, 3), (5, 1), (64, 65), (65, 64), (130, 200)])
    def test_plans_cover_every_position_once(self, num_prompt: int, num_output: int) -> None:
        known = plans(range(num_prompt), range(num_output), 16, 7, release=True)
        computed, wanted, blocks = [], [], []
        for number, plan in enumerate(known):
            (row,) = plan.rows
            assert plan.step == 7 + number and row.length <= CHUNK
            assert bool(plan.admit) == bool(plan.release) == (number == 0)
            span = range(row.start, row.start + row.length)
            computed += span
            wanted += [position for position in span if row.logits]
            blocks += row.new_blocks
        assert computed == list(range(num_prompt + num_output - 1))
        assert wanted == list(range(num_prompt - 1, num_prompt + num_output - 1))
        assert blocks == list(range(-(-len(computed) // 16)))

    def test_two_models_are_told_apart_position_by_position(self) -> None:
        rng = np.random.default_rng(2)
        table = rng.normal(0, 3, (11, 11))
        other = table + rng.normal(0, 0.5, (11, 11))
        known: list[Known] = [((1, 2, 3), tuple(rng.integers(0, 11, 150).tolist())), ((4,), (5, 6))]
        loaded = []

        def load(values: np.ndarray) -> TableBackend:
            assert all(backend.closed for backend in loaded), "two models in memory at once"
            loaded.append(TableBackend(values))
            return loaded[-1]

        found = score(known, 16, lambda: load(other), lambda: load(table))
        for (prompt, output), one in zip(known, found, strict=True):
            before = [*prompt[-1:], *output[:-1]]
            rows, own_rows = table[before].astype(np.float32), other[before].astype(np.float32)
            assert one.kl == pytest.approx(kl_divergence(rows, own_rows))
            assert one.argmax == tuple(rows.argmax(axis=1))
            assert one.margins == tuple(margins(own_rows)) and one.fp32_margins == tuple(margins(rows))
        assert max(backend.largest_span for backend in loaded) == CHUNK
        assert [backend.closed for backend in loaded] == [True, True]

    def test_one_run_serves_both_where_the_arithmetic_is_the_reference(self) -> None:
        table = np.random.default_rng(3).normal(size=(7, 7))
        (one,) = score([((1,), (2, 3))], 16, lambda: TableBackend(table), None)
        assert one.kl == (0.0, 0.0) and one.margins == one.fp32_margins

    def test_failures_are_coded(self) -> None:
        table = np.zeros((7, 7))
        with pytest.raises(EngineError, match="nan_logits"):
            score([((1,), (2, 3))], 16, lambda: TableBackend(table, poison=2), None)
        table[1, 1] = np.nan
        with pytest.raises(EngineError, match="not finite"):
            score([((1,), (2, 3))], 16, lambda: TableBackend(table), None)

    @pytest.mark.parametrize(
        ("backend", "dtype", "quant", "kv_dtype", "precision"),
        [
            ("native", "float32", "stored", "float32", "weights as stored, float32 KV cache"),
            ("native", "float32", "none", "int8", "float32, int8 KV cache"),
            ("native", "float32", "int4", "float32", "weights rounded to int4, float32 KV cache"),
            ("torch", "bfloat16", "none", "bfloat16", "bfloat16"),
        ],
    )
    def test_the_reference_is_the_same_backend_in_fp32(
        self, planted, backend: str, dtype: str, quant: str, kv_dtype: str, precision: str
    ) -> None:
        config = replace(planted.config, backend=backend, dtype=dtype, quant=quant, kv_dtype=kv_dtype)
        assert config != reference_of(config) == reference_of(reference_of(config))
        reference = reference_of(config)
        assert (reference.backend, reference.dtype, reference.quant) == (backend, "float32", "none")
        assert reference.kv_dtype == "float32" and reference.block_size == config.block_size
        assert precision_text(config) == precision and precision_text(reference) == "float32"
        of = replace(planted, config=config)
        said = model_text(of)
        assert f"through the {backend} backend twice" in said and f"as measured ({precision})" in said
        assert ("8 bits" in said) == (quant != "none")
        assert f"{backend}, {precision}" in page(of, advice_of(of))
        assert document(of, advice_of(of))["same_model"]["reference"] == f"{backend} float32, float32 KV cache"


@pytest.fixture
def planted():
    other = ((5, 6, 7, 8), (9, 10, 12))
    runs = {
        "serial": rounds([3.0, 3.1, 3.2], together=False),
        "fused": rounds([1.0, 1.1, 1.0]),
        "static:2": rounds([1.5, 1.4, 1.5], other),
    }
    texts = {"serial": (NASTY, "same"), "fused": (NASTY, "same"), "static:2": (NASTY, "another </pre><b>x</b>")}
    return comparison(runs, texts, kl=1e-3)


class TestWorkload:
    def test_the_workload_hash_covers_prompts_and_length(self) -> None:
        hashes = {workload(2).sha256, workload(3).sha256, workload(2, max_tokens=5).sha256}
        assert len(hashes) == 3 and workload(2).sha256 in hashes

    def test_the_questions_are_the_studys(self) -> None:
        text = "\n\n".join(question.text for question in TEXT4)
        assert sha256(text.encode()).hexdigest() == "1b6e6933f10b87c7a6a80cf0ccf70d234ec324a54e93d06bc4abb4d187e2e3ea"
        assert "more than  $\\lfloor n / 2 \\rfloor$  times" in TEXT4[1].text
        assert TEXT4[3].text.count("\n") == 3


class TestFiles:
    def test_whole_or_not_at_all(self, tmp_path: Path) -> None:
        target = tmp_path / "report.json"
        target.write_text("old")
        file = ReportFile("json", str(target))
        assert [path.name for path in tmp_path.iterdir()] == ["report.json"] and target.read_text() == "old"
        file.write("new")
        assert [path.name for path in tmp_path.iterdir()] == ["report.json"] and target.read_text() == "new"

    def test_a_link_stays_a_link(self, tmp_path: Path) -> None:
        (tmp_path / "link").symlink_to(tmp_path / "real")
        ReportFile("json", str(tmp_path / "link")).write("x")
        assert (tmp_path / "link").is_symlink() and (tmp_path / "real").read_text() == "x"

    @pytest.mark.parametrize("path", ["", "{0}", "{0}/none/x", "/dev/null", "{0}/" + "x" * 300, "{0}/a\0b", "/proc/x"])
    def test_a_path_that_cannot_be_is_refused_before_the_work(self, tmp_path: Path, path: str) -> None:
        with pytest.raises(InvalidParameter, match=r"^html: got"):
            ReportFile("html", path.format(tmp_path))
        assert list(tmp_path.iterdir()) == []
