"""Reports of `headrace compare`, on planted figures: the page, the terminal, JSON and CSV say everything and cut
nothing."""

from __future__ import annotations

import csv
import io
import itertools
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.compare import study
from headrace.compare.advice import advise
from headrace.compare.cells import range_text, seconds_text
from headrace.compare.certificate import tokens_sha256
from headrace.compare.charts import Measured, Quantiles, ratio_chart, seconds_chart, strip_chart
from headrace.compare.csv_files import COLUMNS, INDEX, CsvFolder
from headrace.compare.curves import (
    FEW_ROWS,
    MOST_CURVES,
    Curve,
    Panel,
    in_flight_chart,
    progress_chart,
    shown_requests,
    thinned,
    timeline_chart,
    token_points,
)
from headrace.compare.document import SCHEMA, document
from headrace.compare.figures import Spread
from headrace.compare.methods import Iteration, Outcome, RequestRun
from headrace.compare.report import page
from headrace.compare.runner import Comparison, Failure
from headrace.compare.table import show
from headrace.core.errors import InvalidParameter
from headrace.pages.chart_axes import NARROW, WIDE, Axis, fitted, from_zero, short_text, text_width
from headrace.pages.terminal import console, show_written
from tests.unit.compare_cases import MARGIN, OUTPUTS, comparison, outcome

NASTY = "<script>alert('x')</script> & \"quotes\" \x1b[31mred\x00 [bold]no markup[/bold]"
LONG = "url:http://a-host-with-a-long-name.example.org:8000/v1/with/a/path?model=some-model-0.5b-instruct"
NAMES = ("serial", "dataloader:8", "threads:4", "window:350", "instances:4", "fused", "fused-int8", "llama.cpp", "vllm")
OTHER = ((5, 6, 7, 8), (9, 10, 12))
WHY = "no environment; make one: headrace compare --setup openvino"
FAILURE = Failure("openvino", "OpenVINO GenAI", f"openvino: {WHY}")


def rounds(seconds: list[float], outputs=OUTPUTS, together: bool = True) -> tuple[Outcome, ...]:
    return tuple(outcome(outputs, value, together) for value in seconds)


@pytest.fixture
def planted() -> Comparison:
    runs = {
        "serial": rounds([3.0, 3.1, 3.2], together=False),
        "fused": rounds([1.0, 1.1, 1.0]),
        "static:2": rounds([1.5, 1.4, 1.5], OTHER),
    }
    texts = {"serial": (NASTY, "same"), "fused": (NASTY, "same"), "static:2": (NASTY, "another </pre><b>x</b>")}
    return replace(comparison(runs, texts, kl=1e-3), failures=(FAILURE,))


def many(names: tuple[str, ...], count: int, tokens: int = 5, repeats: int = 3) -> Comparison:
    """`count` requests, some methods without iterations, all with energy."""
    outputs = tuple(tuple(range(number, number + 1 + number % tokens)) for number in range(count))
    runs = {}
    for place, name in enumerate(names):
        found = []
        for number in range(repeats):
            run = outcome(outputs, 9.0 / (1 + place) + 0.01 * number, together=place > 0)
            requests = tuple(
                replace(one, token_s=tuple(at + 0.001 * place * k for k, at in enumerate(one.token_s)))
                for one in run.requests
            )
            source = "estimated" if place % 2 else "rapl"
            told = () if name.startswith(("llama", "vllm")) else run.iterations
            found.append(replace(run, requests=requests, iterations=told, joules={source: 3e2 + place}))
        runs[name] = tuple(found)
    return comparison(runs)


def paged(of: Comparison) -> str:
    return page(of, advise(of.methods, of.bound))


def told(of: Comparison) -> dict[str, Any]:
    return document(of, advise(of.methods, of.bound))


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []
        self.open: list[str] = []
        self.outside: list[str] = []

    def handle_starttag(self, tag, attrs) -> None:
        self.seen.append(tag)
        if tag != "meta":
            self.open.append(tag)
        self.outside += [value for name, value in attrs if name in ("src", "href", "xlink:href", "onload") and value]

    def handle_startendtag(self, tag, attrs) -> None:
        self.seen.append(tag)

    def handle_endtag(self, tag) -> None:
        assert self.open.pop() == tag


def texts_of(drawing: str) -> list[tuple[float, float, float, str]]:
    """(left, right, baseline, text) of every text that is not turned."""
    found = []
    for one in ElementTree.fromstring(drawing).iter("text"):
        if "transform" not in one.attrib:
            kinds = one.attrib["class"].split()
            size = 12.0 if "value" in kinds else 13.0
            width = text_width(one.text or "", size, "name" in kinds)
            x = float(one.attrib["x"]) - {"start": 0.0, "middle": 0.5, "end": 1.0}[one.attrib["text-anchor"]] * width
            found.append((x, x + width, float(one.attrib["y"]), one.text or ""))
    return found


def check_drawing(drawing: str) -> None:
    """Every text lies within the figure, and no two overlap."""
    box = [float(part) for part in ElementTree.fromstring(drawing).attrib["viewBox"].split()]
    found = texts_of(drawing)
    for left, right, y, said in found:
        assert left >= -0.5 and right <= box[2] + 0.5, said
        assert 8 <= y <= box[3], said
    for index, (left, right, y, said) in enumerate(found):
        for other_left, other_right, other_y, other in found[index + 1 :]:
            apart = right <= other_left + 0.5 or other_right <= left + 0.5 or abs(y - other_y) >= 11
            assert apart, (said, other)


names = st.one_of(st.sampled_from(NAMES), st.just(LONG), st.text(st.characters(codec="utf-8"), min_size=1, max_size=30))
times = st.one_of(st.just(0.0), st.floats(1e-9, 1e5))
widths = st.sampled_from([WIDE, NARROW])


class TestCharts:
    @given(st.lists(st.tuples(names, st.tuples(times, times, times).map(sorted)), min_size=1, max_size=10), widths)
    def test_bars(self, found, width: float) -> None:
        check_drawing(seconds_chart([Measured(name, mid, low, high) for name, (low, mid, high) in found], width))

    @given(
        st.lists(st.tuples(names, st.floats(0.01, 100), st.lists(st.floats(0.1, 50), max_size=2)), max_size=9).filter(
            bool
        ),
        st.floats(1, 256),
        widths,
    )
    def test_ratios(self, found, bound: float, width: float) -> None:
        measured = [Measured(name, ratio, ratio * 0.9, ratio * 1.1) for name, ratio, _ in found]
        check_drawing(ratio_chart(measured, [row for *_, row in found], bound, width))

    @given(
        st.lists(st.tuples(names, st.lists(times, min_size=6, max_size=6).map(sorted)), min_size=1, max_size=10), widths
    )
    def test_strips(self, found, width: float) -> None:
        check_drawing(strip_chart([Quantiles(name, *values) for name, values in found], "time between tokens", width))

    @given(st.lists(st.tuples(names, times, st.integers(0, 10**6)), min_size=1, max_size=MOST_CURVES + 2), widths)
    def test_curves(self, found, width: float) -> None:
        curves = [Curve(name, ((end / 2, count // 2), (end, count))) for name, end, count in found]
        check_drawing(progress_chart(curves, width))

    @given(st.lists(st.tuples(names, st.lists(st.integers(1, 300), min_size=1)), min_size=1, max_size=8), widths)
    def test_in_flight(self, found, width: float) -> None:
        runs = [(name, [Iteration(0.1, one, one) for one in values]) for name, values in found]
        check_drawing(in_flight_chart(runs, max(max(values) for _, values in found), width))

    @given(names, st.lists(st.tuples(times, times, times).map(sorted), min_size=1, max_size=300), st.booleans(), widths)
    def test_timeline(self, name: str, found, last: bool, width: float) -> None:
        requests = tuple(RequestRun((1,), "length", arrival, (first,), end) for arrival, first, end in found)
        shown = shown_requests(len(requests), 1)
        drawing = timeline_chart(Panel(name, requests, "bar", last), shown, max(one.end_s for one in requests), width)
        check_drawing(drawing)
        assert drawing.count('class="wait"') == len(shown)

    def test_a_run_in_no_time_and_an_answer_of_one_token(self) -> None:
        for width in (WIDE, NARROW):
            check_drawing(seconds_chart([Measured("serial", 0.0, 0.0, 0.0)], width))
            check_drawing(strip_chart([Quantiles("serial", 0, 0, 0, 0, 0, 0)], "time between tokens", width))
            check_drawing(progress_chart([Curve("serial", ((0.0, 1),))], width))
            check_drawing(progress_chart([Curve("serial", ((0.0, 0),))], width))

    def test_lines_of_neighbours_differ_in_colour_and_dash(self) -> None:
        drawing = progress_chart([Curve(str(n), ((n + 1.0, 5),)) for n in range(MOST_CURVES)], WIDE)
        drawn = re.findall(r'class="curve (s\d)" d="[^"]*"(?: stroke-dasharray="([^"]*)")?', drawing)
        assert len(set(drawn)) == MOST_CURVES
        assert all(a[0] != b[0] and a[1] != b[1] for a, b in itertools.pairwise(drawn))

    @given(st.floats(1e-6, 1e9), st.floats(150, 800))
    def test_linear_ticks_are_round_and_apart(self, high: float, length: float) -> None:
        ticks = from_zero([high], 0, length).ticks()
        steps = [after - before for (before, _), (after, _) in itertools.pairwise(ticks)]
        assert ticks[0][0] == 0 and ticks[-1][0] <= high * 1.001
        assert len({label for _, label in ticks}) == len(ticks)
        assert all(step == pytest.approx(steps[0]) for step in steps)
        assert all(float(label) == pytest.approx(value, rel=1e-6) for value, label in ticks)
        assert all(step / high * length >= 55 for step in steps)

    @given(st.floats(1e-6, 1e3), st.floats(1.5, 1e9))
    def test_logarithmic_ticks_are_within(self, low: float, wide: float) -> None:
        axis = Axis(0, 500, low, low * wide, log=True)
        assert all(-0.5 <= axis(value) <= 500.5 for value, _ in axis.ticks())
        assert axis(0.0) == 0 and axis(low * wide * 2) == 500

    def test_thinning_keeps_both_ends(self) -> None:
        points = [(float(n), n) for n in range(1001)]
        kept = thinned(points, 100)
        assert kept[0] == points[0] and kept[-1] == points[-1] and len(kept) <= 101
        assert thinned(points[:3]) == points[:3]

    def test_points_count_every_token_once(self) -> None:
        requests = (
            RequestRun((1, 2, 3), "length", 0.0, (1.0, 2.0, 2.0), 2.0),
            RequestRun((4,), "stop", 0.0, (2.0,), 2.0),
            RequestRun((), "stop", 0.0, (), 3.0),
        )
        assert token_points(Outcome(requests, 3.0)) == ((1.0, 1), (2.0, 4))
        assert token_points(Outcome(requests[2:], 3.0)) == ((3.0, 0),)

    def test_which_requests_a_timeline_shows(self) -> None:
        assert shown_requests(32, 10) == list(range(32))
        shown = shown_requests(200, 10)
        assert shown[0] == 0 and shown[-1] == 199 and len(set(shown)) == len(shown) == 40
        assert len(shown_requests(200, 100)) == FEW_ROWS

    def test_figures_as_text(self) -> None:
        found = [short_text(value) for value in (0, 0.000123, 0.0123, 0.5, 6.0, 46.85, 4683.2)]
        assert found == ["0", "1.2e-04", "0.0123", "0.500", "6.00", "46.9", "4683"]
        assert [seconds_text(value) for value in (0.01234, 1.5, 12.345, 123.45)] == [
            "0.0123",
            "1.500",
            "12.35",
            "123.5",
        ]
        assert (range_text(Spread(1, 1, 1)), range_text(Spread(2, 1, 3))) == ("", "1.000–3.000")
        assert fitted("short", 500) == "short" and fitted("\x1b[31m", 500) == "\N{REPLACEMENT CHARACTER}[31m"
        shorter = fitted(LONG, 150)
        assert text_width(shorter) <= 150 and shorter.startswith("url:") and shorter.endswith("uct") and "…" in shorter


class TestPage:
    def test_it_escapes_and_stands_alone(self, planted) -> None:
        html = paged(planted)
        tags = Tags()
        tags.feed(html)
        assert tags.open == [] and tags.outside == []
        assert "script" not in tags.seen and "b" not in tags.seen
        assert html.count('<svg class="wide"') == html.count('<svg class="narrow"') == 8
        assert "&lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt;" in html
        assert "text &lt;b&gt;0&lt;/b&gt;" in html
        assert "\x1b" not in html and "\x00" not in html and "url(" not in html and "@import" not in html
        assert html.count("&lt;script&gt;") == 1, "an answer that is the same is shown once"
        assert "another &lt;/pre&gt;" in html

    def test_it_says_what_was_found(self, planted) -> None:
        html = paged(planted)
        assert f"margin {MARGIN}" in html and "below ε is a near-tie" in html
        assert "different: 1 of 2" in html and "token 3, req. 2" in html
        assert f">{WHY}<" in html and FAILURE.description in html
        for ratio in ("3.307", "1.065", "1.111", "1.515", "0.762", "37.2", "41.3"):
            assert f">{ratio}<" in html
        assert not re.search(r"208\.|187\.8|63\.07|35\.94", html), "the study's ratios, never its seconds"
        assert all(caveat[:40] in html.replace("&#x27;", "'") for caveat in study.CAVEATS)
        assert "static:2 2.1" in html or "static:2 2.0" in html

    @pytest.mark.parametrize("count", [1, 4, 32, 200])
    @pytest.mark.parametrize("number", [1, 3, 9])
    def test_every_size_is_legible(self, number: int, count: int) -> None:
        html = paged(many(NAMES[:number], count, repeats=1))
        drawings = re.findall(r"<svg.*?</svg>", html, re.DOTALL)
        assert len(drawings) >= 2 * 4
        for drawing in drawings:
            check_drawing(drawing)
        left = count > len(shown_requests(count, number))
        assert ("requests are drawn, evenly chosen" in html) == left
        assert ("more requests, and every token id, are in the JSON report" in html) == (count > 9)

    def test_long_names_and_answers_of_one_token(self) -> None:
        alone = many(("serial", LONG), 3, tokens=1)
        html = paged(alone)
        assert LONG in html, "whole in the tables"
        for drawing in re.findall(r"<svg.*?</svg>", html, re.DOTALL):
            check_drawing(drawing)
        assert "nothing between its tokens to measure" in html

    def test_figures_that_nobody_tells_have_no_row(self, planted) -> None:
        html = paged(planted)
        assert "cost a request" not in html and "processor seconds" not in html and "requests a minute" in html
        assert "joules a run" in paged(many(NAMES[:2], 2))


def shown(of: Comparison, width: int) -> str:
    stream = io.StringIO()
    show(of, advise(of.methods, of.bound), console(stream, width))
    return stream.getvalue()


class TestTerminal:
    @pytest.mark.parametrize("width", [60, 80, 100, 120, 200])
    def test_everything_is_there_and_nothing_cut(self, width: int) -> None:
        of = replace(many(NAMES, 4), failures=(FAILURE,))
        text = shown(of, width)
        lines = text.splitlines()
        copied = [line for line in lines if line.startswith("Start it with: ")]
        assert len(copied) == 1 and all(len(line) <= width for line in lines if line not in copied)
        assert "…" not in text
        words = " ".join(text.split())
        for heading in ("seconds", "interval", "arithmetic", "model", "tokens/s", "TTFT", "ITL", "joules"):
            assert heading in words
        above = text.partition("openvino did not run")[0].splitlines()
        tables = sum(line.startswith("method ") for line in above)
        for name in NAMES:
            assert sum(line.startswith(name + " ") for line in above) == tables, "each table begins with the names"
        assert f"openvino did not run: {WHY}" in words
        assert (tables == 1) == (width >= 120)
        assert words.count("estimated") == 4

    @pytest.mark.parametrize("width", [80, 100, 120])
    def test_answers_then_figures_then_advice(self, planted, width: int) -> None:
        text = shown(planted, width)
        assert "\x1b" not in text and "\x00" not in text and max(map(len, text.splitlines())) <= width
        assert "[bold]no markup[/bold]" in text
        assert text.count("no markup") == 1 and text.count("another </pre>") == 1
        assert text.index("request 1: title 0") < text.index("identical") < text.index("Use fused")
        assert "different: 1 of 2" in text and "token 3, req. 2" in text and f"margin {MARGIN}" in text

    def test_a_path_is_one_line(self) -> None:
        stream = io.StringIO()
        show_written("/tmp/a [b] \x1b.html", console(stream, 20))
        assert stream.getvalue() == "Written: /tmp/a [b] \N{REPLACEMENT CHARACTER}.html\n"

    def test_a_command_stays_whole_to_be_copied(self, planted) -> None:
        command = f"headrace serve {'x' * 90} --policy fused"
        advice = replace(advise(planted.methods, planted.bound), command=command)
        advice = replace(advice, sentences=(*advice.sentences, f"Start it with: {command}"))
        stream = io.StringIO()
        show(planted, advice, console(stream, 80))
        assert f"Start it with: {command}\n" in stream.getvalue()
        assert f"<pre>{command}</pre>" in page(planted, advice)

    def test_a_long_name_goes_on_in_the_next_line(self) -> None:
        text = shown(many(("serial", LONG), 2), 80)
        column = "".join(line[:20] for line in text[text.index("method") :].splitlines() if line[:20].strip())
        assert LONG in column

    def test_many_answers_and_long_ones_are_told_in_short(self) -> None:
        of = many(NAMES[:2], 9)
        of = replace(of, texts=dict.fromkeys(NAMES[:2], ("x" * 5000,) * 9))
        text = shown(of, 100)
        assert "(4200 more characters)" in text.replace("\n", "") and "Answers to 5 more requests" in text

    def test_the_study_stands_beside_its_own_workload(self, planted) -> None:
        assert "thread pool" not in shown(planted, 80)
        of = replace(planted, workload=replace(planted.workload, name="text4"))
        words = " ".join(shown(of, 80).split())
        assert "static batch 3.31 static:2 2.1" in words or "static batch 3.31 static:2 2.0" in words
        assert "thread pool 1.06 not measured" in words and "vLLM 37.2 fused" in words
        assert "longest ≤ 4 1.75" in words and "never seconds" in words
        pictures = replace(planted, workload=replace(planted.workload, name="image6"))
        words = " ".join(shown(pictures, 80).split())
        assert "static batch 1.51" in words and "vLLM" not in words.partition("never seconds")[0].partition("study")[0]

    def test_one_method_only(self, planted) -> None:
        alone = replace(planted, methods=planted.methods[:1])
        assert "nothing to compare" in shown(alone, 100)
        html = paged(alone)
        assert "measured alone" in html and "Times as fast" not in html
        assert list(told(alone)["methods"]) == ["serial"]


class TestStudy:
    def test_its_ratios_are_those_of_its_seconds(self) -> None:
        pairs = (
            (208.60, 63.07), (187.80, 56.76), (208.60, 195.93), (187.80, 177.3), (208.60, 187.80), (63.07, 56.76),
            (195.93, 177.3), (35.94, 23.72), (35.94, 47.18), (187.80, 5.05), (208.60, 5.05),
        )  # fmt: skip
        for published, (base, other) in zip(study.TABLE, pairs, strict=True):
            assert study.ratio_text(published.ratio) == study.ratio_text(base / other), published.what

    def test_a_slowdown_is_turned_round(self) -> None:
        runs = {"serial": rounds([2.0] * 3), "plain-attention": rounds([3.0] * 3), "vllm:fp32,x=1": rounds([1.0] * 3)}
        found = {published.what: ours for published, ours in study.rows(comparison(runs))}
        assert found["flash attention on against off, one by one"] == [("plain-attention", pytest.approx(1.5))]
        assert found["vLLM against one by one with flash attention"] == [("vllm:fp32,x=1", pytest.approx(2.0))]


class TestDocument:
    def test_it_has_everything(self, planted) -> None:
        found = json.loads(json.dumps(told(planted), allow_nan=False))
        assert found["schema"] == SCHEMA == 2
        serial, other = found["methods"]["serial"], found["methods"]["static:2"]
        assert serial["verdict"] == "identical" and other["verdict"] == "different"
        assert serial["seconds"]["median"] == 3.1 and serial["seconds"]["all"] == [3.0, 3.1, 3.2]
        assert serial["outputs"] == [list(output) for output in OUTPUTS]
        assert serial["output_sha256"] == [tokens_sha256(output) for output in OUTPUTS]
        assert serial["output_tokens_per_s"] == pytest.approx(7 / 3.1)
        assert other["divergence"] == {"question": 1, "token": 2, "round": 0, "margin": MARGIN}
        assert [one["verdict"] for one in other["divergences"]] == ["identical", "different"]
        assert other["divergences"][1]["margin"] == MARGIN and other["answers"]["different"] == 1
        assert other["same_model"]["mean_kl_nats"] == pytest.approx(1e-3)
        assert other["same_model"]["verdict"] == "lossy"
        assert other["ratio_to_serial"]["evidence"]["pairs"] == 3 and serial["ratio_to_serial"]["evidence"] is None
        assert serial["figures"]["ttft"]["p95"].keys() == {"median", "min", "max"}
        assert serial["figures"]["joules"] is None and serial["figures"]["energy_source"] == ""
        assert found["failures"] == [{"name": "openvino", "description": FAILURE.description, "reason": FAILURE.reason}]
        assert found["model"]["path"] == "/models/planted.gguf" and len(found["model"]["fingerprint"]) == 64
        asked = found["workload"]["manifest"]["requests"]
        assert [one["token_ids"] for one in asked] == [[1, 2, 3], [1, 2, 4]]
        assert found["workload"]["prompt_sha256"] == [tokens_sha256(one["token_ids"]) for one in asked]
        assert len(found["workload"]["sha256"]) == 64 and found["workload"]["max_tokens"] == 4
        assert found["config"]["reasons"] == {"threads": "as set"}
        assert found["recommendation"]["method"] == "fused"

    def test_rounds_have_their_times_and_only_other_tokens_again(self) -> None:
        runs = {"serial": rounds([3.0, 3.1]), "fused": (outcome(OUTPUTS, 1.0), outcome(OTHER, 1.0))}
        found = told(comparison(runs))["methods"]
        for name, outcomes in runs.items():
            for one_round, run in zip(found[name]["rounds"], outcomes, strict=True):
                times_told = [tuple(one["token_s"]) for one in one_round["requests"]]
                assert times_told == [one.token_s for one in run.requests]
                assert len(one_round["iterations"]) == 10 and one_round["seconds"] == run.seconds
        assert [one["token_ids"] for one in found["serial"]["rounds"][1]["requests"]] == [None, None]
        assert [one["token_ids"] for one in found["fused"]["rounds"][1]["requests"]] == [None, [9, 10, 12]]


def table(folder: Path, name: str) -> list[dict[str, str]]:
    with (folder / name).open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        found = list(reader)
        assert reader.fieldnames == [column for column, _ in COLUMNS[name]]
    assert all(None not in row and None not in row.values() for row in found), "every row has every cell"
    return found


class TestCsv:
    def test_every_table(self, planted, tmp_path: Path) -> None:
        folder = tmp_path / "csv"
        checked = CsvFolder("csv", str(folder))
        assert list(tmp_path.iterdir()) == [], "nothing is left of the look at it"
        checked.write(planted)
        assert sorted(path.name for path in folder.iterdir()) == sorted([*COLUMNS, INDEX])
        methods = table(folder, "methods.csv")
        assert [(row["method"], row["round"]) for row in methods[:4]] == [
            ("serial", "1"), ("serial", "2"), ("serial", "3"), ("fused", "1")
        ]  # fmt: skip
        assert float(methods[3]["ratio_to_serial"]) == 3.0 and methods[3]["joules"] == ""
        assert [row["identical"] for row in methods[::3]] == ["true", "true", "false"]
        requests = table(folder, "requests.csv")
        assert len(requests) == 3 * 3 * 2
        assert {row["output_tokens"] for row in requests if row["request"] == "1"} == {"4"}
        for row in requests:
            assert float(row["arrival_s"]) <= float(row["first_token_s"]) <= float(row["end_s"])

    def test_progress_and_completions_rise_to_all(self, tmp_path: Path) -> None:
        CsvFolder("csv", str(tmp_path)).write(many(NAMES[:3], 6))
        for file, count in (("progress.csv", "tokens"), ("completions.csv", "completed")):
            rows = table(tmp_path, file)
            for name in NAMES[:3]:
                own = [row for row in rows if row["method"] == name]
                assert [float(row["t_s"]) for row in own] == sorted(float(row["t_s"]) for row in own)
                assert [int(row[count]) for row in own] == sorted(int(row[count]) for row in own)
                assert float(own[-1]["fraction"]) == 1 and {row["round"] for row in own} == {"2"}
        index = list(csv.reader((tmp_path / INDEX).read_text(encoding="utf-8").splitlines()))
        assert index[0] == ["file", "column", "meaning"] and all(meaning for _, _, meaning in index)
        assert len(index) == 1 + sum(map(len, COLUMNS.values()))

    @pytest.mark.parametrize("path", ["", "{0}/file", "{0}/none/deeper", "/proc/x", "{0}/a\0b", "{0}/" + "x" * 300])
    def test_a_folder_that_cannot_be_is_refused_before_the_work(self, tmp_path: Path, path: str) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(InvalidParameter, match=r"^csv: got"):
            CsvFolder("csv", path.format(tmp_path))
        assert [one.name for one in tmp_path.iterdir()] == ["file"]
