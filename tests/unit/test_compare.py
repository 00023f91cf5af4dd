"""Verdicts, statistics and reports of `headrace compare`, on planted figures and on backends computed by hand."""

from __future__ import annotations

import io
import json
import math
import random
from dataclasses import replace
from hashlib import sha256
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from headrace.compare.advice import advise, model_text
from headrace.compare.document import document
from headrace.compare.files import ReportFile
from headrace.compare.measure import Claim, batching_bound, judge, time_method
from headrace.compare.questions import TEXT4
from headrace.compare.report import page
from headrace.compare.score import CHUNK, Known, is_reference, kl_divergence, margins, plans, reference_of, score
from headrace.compare.table import console, show, show_written
from headrace.compare.verdict import LOSSLESS_MEAN_KL, first_difference, percent, same_arithmetic, same_model
from headrace.core.errors import EngineError, InvalidParameter
from headrace.core.resolve import precision_text
from tests.unit.compare_cases import MARGIN, OUTPUTS, TableBackend, comparison, outcome, scored, workload

VOCAB = 61
NASTY = "<script>alert('x')</script> & \"quotes\" \x1b[31mred\x00 [bold]no markup[/bold]"


def rounds(seconds: list[float], outputs=OUTPUTS, together: bool = True):
    return tuple(outcome(outputs, value, together) for value in seconds)


class TestStatistics:
    def test_clear_differences_are_claimed(self) -> None:
        assert judge([3.0, 3.1, 3.0], [1.0, 1.1, 1.0]) is Claim.FASTER
        assert judge([1.0, 1.1, 1.0], [3.0, 3.1, 3.0]) is Claim.SLOWER
        # Every pair says faster; with three rounds the times must not overlap either, with five the pairs are enough.
        assert judge([1.0, 2.0, 3.0], [0.9, 1.9, 2.9]) is Claim.SAME
        assert judge([1.0, 2.0, 3.0, 4.0, 5.0], [0.9, 1.9, 2.9, 3.9, 4.9]) is Claim.FASTER

    def test_one_round_against_is_enough_to_claim_nothing(self) -> None:
        assert judge([3.0] * 9 + [1.0], [1.0] * 9 + [1.01]) is Claim.SAME

    def test_equal_times_are_no_difference(self) -> None:
        assert judge([1.0] * 5, [1.0] * 5) is Claim.SAME
        assert judge([0.0] * 5, [0.0] * 5) is Claim.SAME

    def test_few_rounds_tell_nothing(self) -> None:
        assert judge([9.0], [1.0]) is Claim.TOO_FEW
        assert judge([9.0, 9.0], [1.0, 1.0]) is Claim.TOO_FEW

    @pytest.mark.parametrize("repeats", [3, 4, 5, 8])
    def test_a_method_against_itself_is_called_faster_in_at_most_5_percent(self, repeats: int) -> None:
        rng = random.Random(7)
        trials = 4000
        times = lambda: [rng.lognormvariate(0, 0.05) for _ in range(repeats)]  # noqa: E731
        claims = sum(judge(times(), times()) is Claim.FASTER for _ in range(trials))
        assert claims / trials <= 0.06

    def test_figures(self) -> None:
        base, other = rounds([4.0, 6.0, 5.0]), rounds([2.0, 2.0, 1.0])
        timing = time_method(other, base)
        assert timing.ratios == (2.0, 3.0, 5.0)
        assert (timing.ratio.median, timing.ratio.low, timing.ratio.high) == (3.0, 2.0, 5.0)
        assert timing.output_tokens_per_s == 7 / 2
        assert time_method(base, base).claim is Claim.BASE
        assert batching_bound([10, 10, 10, 10]) == 4
        assert batching_bound([20, 10]) == 1.5


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
        assert not is_reference(config) and is_reference(reference_of(config))
        reference = reference_of(config)
        assert (reference.backend, reference.dtype, reference.quant) == (backend, "float32", "none")
        assert reference.kv_dtype == "float32" and reference.block_size == config.block_size
        assert precision_text(config) == precision and precision_text(reference) == "float32"
        of = replace(planted, config=config)
        said = model_text(of)
        assert f"through the {backend} backend twice" in said and f"as measured ({precision})" in said
        assert ("8 bits" in said) == (quant != "none")
        assert f"{backend}, {precision}" in page(of)
        assert document(of)["same_model"]["reference"] == f"{backend} float32, float32 KV cache"


class TestAdvice:
    def advice(self, **runs):
        planted = comparison({name.replace("_", ":"): outcomes for name, outcomes in runs.items()})
        return advise(planted.methods, planted.bound)

    def test_the_fastest_identical_method(self) -> None:
        slow = rounds([3.0, 3.1, 3.2])
        found = self.advice(serial=slow, fused=rounds([1.0, 1.1, 1.0]), static_4=rounds([2.0, 2.1, 2.0]))
        assert found.method == "fused" and "2.95 times" not in found.headline and "times as fast" in found.headline
        assert "bound" in found.sentences[0] and "1.75" in found.sentences[0]
        found = self.advice(serial=slow, fused=rounds([2.0, 2.1, 2.0]), static_4=rounds([1.0, 1.1, 1.0]))
        assert found.method == "static:4"

    def test_ties_go_to_fused_and_are_named(self) -> None:
        found = self.advice(
            serial=rounds([3.0, 3.1, 3.2]), static_4=rounds([1.0, 1.1, 1.0]), fused=rounds([1.0, 1.1, 1.01])
        )
        assert found.method == "fused"
        assert any("No significant difference between fused and static:4" in line for line in found.sentences)

    def test_a_faster_method_with_other_tokens_is_out(self) -> None:
        wrong = ((5, 6, 7, 8), (9, 10, 12))
        found = self.advice(serial=rounds([3.0, 3.1, 3.2]), fused=rounds([1.0, 1.0, 1.0], wrong))
        assert found.method == "serial"
        assert any("fused is out" in line and "token 3 of question 2" in line for line in found.sentences)

    def test_no_difference_too_few_and_alone(self) -> None:
        same = self.advice(serial=rounds([1.0, 1.1, 1.2]), fused=rounds([1.1, 1.0, 1.15]))
        assert same.method == "serial" and "no significant difference" in same.sentences[0]
        few = self.advice(serial=rounds([3.0]), fused=rounds([1.0]))
        assert "1 round" in few.headline and "No advice" in few.sentences[0]
        assert self.advice(serial=rounds([3.0])).method == "serial"


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


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []
        self.open: list[str] = []
        self.outside: list[str] = []

    def handle_starttag(self, tag, attrs) -> None:
        self.seen.append(tag)
        if tag not in ("meta", "rect", "line"):
            self.open.append(tag)
        self.outside += [value for name, value in attrs if name in ("src", "href", "xlink:href", "onload") and value]

    def handle_startendtag(self, tag, attrs) -> None:
        self.seen.append(tag)

    def handle_endtag(self, tag) -> None:
        assert self.open.pop() == tag


class TestReports:
    def test_html_escapes_and_stands_alone(self, planted) -> None:
        html = page(planted)
        tags = Tags()
        tags.feed(html)
        assert tags.open == [] and tags.outside == []
        assert tags.seen.count("svg") == 2 and "script" not in tags.seen and "b" not in tags.seen
        assert "&lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt;" in html
        assert "text &lt;b&gt;0&lt;/b&gt;" in html
        assert "\x1b" not in html and "\x00" not in html and "url(" not in html and "@import" not in html
        assert html.count("&lt;script&gt;") == 1, "an answer that is the same is shown once"
        assert "another &lt;/pre&gt;" in html
        assert "3.307" in html and "208" not in html, "the study's ratios, never its seconds"
        assert "first divergence at token 3 of question 2" in html

    def test_json_has_what_was_promised(self, planted) -> None:
        text = json.dumps(document(planted), allow_nan=False)
        found = json.loads(text)
        assert {"methods", "model", "workload", "config", "machine", "load_s", "repeats"} <= found.keys()
        serial, other = found["methods"]["serial"], found["methods"]["static:2"]
        assert serial["verdict"] == "identical" and other["verdict"] == "different"
        assert serial["seconds"]["median"] == 3.1 and serial["seconds"]["all"] == [3.0, 3.1, 3.2]
        assert serial["outputs"] == [list(output) for output in OUTPUTS]
        assert serial["output_tokens_per_s"] == pytest.approx(7 / 3.1)
        assert other["divergence"] == {"question": 1, "token": 2, "round": 0, "margin": MARGIN}
        assert other["same_model"]["mean_kl_nats"] == pytest.approx(1e-3)
        assert other["same_model"]["verdict"] == "lossy"
        assert found["model"]["path"] == "/models/planted.gguf" and len(found["model"]["fingerprint"]) == 64
        asked = found["workload"]["manifest"]["requests"]
        assert [one["token_ids"] for one in asked] == [[1, 2, 3], [1, 2, 4]]
        assert len(found["workload"]["sha256"]) == 64 and found["workload"]["max_tokens"] == 4
        assert found["config"]["reasons"] == {"threads": "as set"}
        assert found["recommendation"]["method"] == "fused"

    @pytest.mark.parametrize("width", [80, 100, 120])
    def test_terminal_text(self, planted, width: int) -> None:
        stream = io.StringIO()
        show(planted, console(stream, width))
        show_written("/tmp/a [b] \x1b.html", console(stream, width))
        text = stream.getvalue()
        assert "\x1b" not in text and "\x00" not in text
        assert max(map(len, text.splitlines())) <= width
        assert "[bold]no markup[/bold]" in text
        assert text.count("no markup") == 1 and text.count("another </pre>") == 1
        assert text.index("question 1: title 0") < text.index("iden") < text.index("Use fused")
        assert "Written: /tmp/a [b] \N{REPLACEMENT CHARACTER}.html" in text

    def test_one_method_only(self, planted) -> None:
        alone = replace(planted, methods=planted.methods[:1])
        stream = io.StringIO()
        show(alone, console(stream))
        assert "nothing to compare" in stream.getvalue()
        assert "measured alone" in page(alone)
        assert list(document(alone)["methods"]) == ["serial"]

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
