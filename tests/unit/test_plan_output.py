"""Output of `headrace plan`: text, JSON and pages of planted documents say everything and cut nothing."""

from __future__ import annotations

import argparse
import io
import json
import math
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.cli import plan as command
from headrace.cli.main import build_parser, main
from headrace.pages.chart_axes import NARROW, WIDE
from headrace.pages.plain import clean
from headrace.pages.terminal import console
from headrace.plan.document import Column, Document, Plot, Quantity, Series, Table
from headrace.plan.json import as_json, plain
from headrace.plan.numbers import column_texts, interval_text, is_number, number_text, source_text, value_text
from headrace.plan.page import page
from headrace.plan.plots import MOST_POINTS, chart, has_points, undrawn
from headrace.plan.text import MOST_ROWS, UNTOLD, show
from tests.unit.test_compare_report import check_drawing

NASTY = "<script>alert('x')</script> & \x1b[31mred [bold]no markup[/bold]"
COMMAND = "nvidia-smi -i 0,1,2,3 -lgc 1275,1275 " + "and words that make it longer than a terminal is wide " * 3

ROOF = Plot(
    "Roofline",
    "FLOP/byte",
    "FLOP/s",
    [
        Series("ceiling", [(0.01, 0.2e9), (8, 160e9), (1000, 160e9)]),
        Series("int8", [(0.01, 0.2e9), (20, 400e9), (1000, 400e9)], "dashed"),
        Series("GEMV", [(0.5, 8e9)], "dots"),
    ],
    log_x=True,
    log_y=True,
)


def planted() -> Document:
    quantities = [
        Quantity("parameters", 6_738_415_616, "", "Σ rows · columns", "Llama 2, table 1"),
        Quantity("weights", 13_476_831_232, "B", "2 · parameters", "sizing"),
        Quantity("time to first token", 0.1234567, "s", "roofline", NASTY, "calibrated", 0.08, 0.2),
        Quantity("energy", None, "J", note="no meter"),
        Quantity(NASTY, -14_728.31, "$/year", "kWh · price", "energy"),
    ]
    columns = [Column("streams"), Column("rate", "tokens/s", "n / ITL", "a paper, §3"), Column("device")]
    rows = [[n, n / (0.01 + 0.0007 * n), NASTY] for n in (1, 2, 4)]
    long = Table("long", [Column("n")], [[n] for n in range(MOST_ROWS + 7)])
    return Document(
        f"Plan of {NASTY}",
        quantities,
        [Table("throughput", columns, rows, ["A note."]), long, Table("empty", columns, [])],
        [ROOF, Plot("nothing", "x", "y", [Series("none", [])])],
        ["A sentence about all of it.", COMMAND],
        {"limit": math.inf, "counts": np.arange(3), "one": np.float32(0.5)},
    )


def shown(document: Document, explain: bool = False, width: int = 100) -> str:
    stream = io.StringIO()
    show(document, console(stream, width), explain)
    return stream.getvalue()


class TestNumbers:
    @pytest.mark.parametrize(
        ("value", "text"),
        [
            (None, "–"),
            ("(80,245)", "(80,245)"),
            (245_760, "245,760"),
            (0, "0"),
            (0.0, "0"),
            (-0.0, "0"),
            (7.136, "7.136"),
            (645.76, "645.76"),
            (0.2924, "0.2924"),
            (4.389, "4.389"),
            (0.29243218, "0.29243"),
            (1857.3, "1,857.3"),
            (99_999.7, "100,000"),
            (123_456.7, "123,457"),
            (-14_728.31, "-14,728"),
            (6.5e14, "650,000,000,000,000"),
            (1.5e18, "1.5e18"),
            (0.0001, "0.0001"),
            (0.000012, "1.2e-5"),
            (math.inf, "∞"),
            (-math.inf, "-∞"),
            (math.nan, "not a number"),
        ],
    )
    def test_one(self, value: Any, text: str) -> None:
        assert number_text(value) == text

    @given(st.floats(-1e300, 1e300))
    def test_a_number_is_read_back_to_its_digits(self, value: float) -> None:
        read = float(number_text(value).replace(",", ""))
        assert read == pytest.approx(value, rel=5.1e-4, abs=1e-300)

    def test_a_column_has_the_same_decimals(self) -> None:
        assert column_texts([93.4579, 175.4386, 1.5]) == ["93.46", "175.44", "1.50"]
        assert column_texts([1, 2.5, None, "–", 0]) == ["1.0", "2.5", "–", "–", "0"]
        assert column_texts([13.2153, 0.9911, 74.0056]) == ["13.215", "0.991", "74.006"]
        assert column_texts([1, 1000]) == ["1", "1,000"]

    def test_a_column_of_many_sizes_is_left_as_it_is(self) -> None:
        assert column_texts([1e-3, 12_345_678.9]) == ["0.001", "12,345,679"]
        assert column_texts([0.218, 6300.219]) == ["0.218", "6,300"]

    @given(st.lists(st.one_of(st.floats(), st.integers(), st.none(), st.text(max_size=3)), max_size=6))
    def test_any_column(self, values: list[Any]) -> None:
        assert len(column_texts(values)) == len(values)

    def test_bytes_are_also_told_in_a_larger_unit(self) -> None:
        assert value_text(Quantity("a", 13_476_831_232, "B")) == "13,476,831,232 B (12.55 GiB)"
        assert value_text(Quantity("a", 245_760, "B")) == "245,760 B"
        assert value_text(Quantity("a", None, "B")) == "–"

    def test_money_has_cents(self) -> None:
        assert value_text(Quantity("a", 6.7, "$/h")) == "6.70 $/h"
        assert value_text(Quantity("a", -14_728.31, "$/year")) == "-14,728.31 $/year"
        assert value_text(Quantity("a", 0.45572, "$ per million tokens")) == "0.45572 $ per million tokens"
        assert column_texts([1.01, 6.7, None], "USD/h") == ["1.01", "6.70", "–"]

    def test_interval(self) -> None:
        assert interval_text(Quantity("a", 1.0, low=0.08, high=0.2)) == "0.08 to 0.2"
        assert interval_text(Quantity("a", 1.0)) == ""
        assert interval_text(Quantity("a", 1.0, high=0.5)) == "– to 0.5"

    @pytest.mark.parametrize(
        ("quantity", "text"),
        [
            (Quantity("a", 0.0072969, "s", low=0.00365, high=0.0146), "0.0073 s"),
            (Quantity("a", 4581.2, "tokens/s", low=2290.4, high=9162.2), "4,580 tokens/s"),
            (Quantity("a", 657_602_250.3, "B", low=6.4e8, high=6.7e8), "658,000,000 B (628 MiB)"),
            (Quantity("a", 38.312, "GB/s", basis="measured"), "38.3 GB/s"),
            (Quantity("a", 32_768, "KiB", basis="measured"), "32,768 KiB"),
            (Quantity("a", math.nan, "s", low=math.nan, high=math.inf), "not a number s"),
        ],
    )
    def test_what_is_unsure_has_three_digits(self, quantity: Quantity, text: str) -> None:
        assert value_text(quantity) == text

    def test_spaces_and_joiners_of_other_scripts_are_text(self) -> None:
        assert clean("東京\u3000駅 1\xa0000 می\u200cروم") == "東京\u3000駅 1\xa0000 می\u200cروم"
        assert clean("\x1b[2J\u202e\u200b\x9b") == "\N{REPLACEMENT CHARACTER}[2J" + "\N{REPLACEMENT CHARACTER}" * 3


class TestText:
    def test_everything_is_there(self) -> None:
        told = shown(planted())
        for piece in ("6,738,415,616", "12.55 GiB", "0.08 to 0.2", "calibrated", "[1] no meter", "A note.", "93.5"):
            assert piece in told, piece
        assert "7 more rows" in told and "(no rows)" in told and "Roofline; nothing" in told
        assert "n / ITL" not in told
        assert "\x1b" not in told and "[bold]no markup" in told

    def test_a_command_stays_one_line(self) -> None:
        assert COMMAND.strip() in shown(planted(), width=60).splitlines()[-1]

    def test_explain_names_formula_and_source_of_every_number(self) -> None:
        told = shown(planted(), explain=True)
        for piece in ("formula: Σ rows · columns", "source: Llama 2, table 1", "rate, tokens/s: n / ITL [a paper, §3]"):
            assert piece in told, piece
        assert told.count("formula:") == told.count("source:") == len(planted().quantities)

    @pytest.mark.parametrize("width", [40, 80, 200])
    def test_no_column_is_lost_where_it_is_narrow(self, width: int) -> None:
        columns = [Column(f"column{n}", "unit") for n in range(12)]
        told = shown(Document("wide", tables=[Table("wide", columns, [[n * 1000.5 for n in range(12)]])]), width=width)
        assert all(f"column{n}" in told for n in range(12)) and "11,006" in told
        assert max(map(len, told.splitlines())) <= width

    def test_what_names_a_row_is_repeated_where_it_is_narrow(self) -> None:
        columns = [Column("quantity"), Column("machine"), *(Column(f"column{n}") for n in range(4))]
        rows = [["ITL", "ours", 1, 2, 3, 4], ["ITL", "theirs", 5, 6, 7, 8]]
        told = shown(Document("d", tables=[Table("t", columns, rows, named_by=2)]), width=40)
        assert told.count("theirs") == told.count("ours") == 2

    def test_an_empty_document(self) -> None:
        assert shown(Document("nothing"), explain=True).startswith("nothing")


class TestJson:
    def test_all_of_it(self) -> None:
        found = json.loads(as_json(planted()))
        assert found["quantities"][0]["value"] == 6_738_415_616
        assert found["quantities"][2]["low"] == 0.08 and found["quantities"][2]["source"] == NASTY
        assert found["tables"][1]["rows"][-1] == [MOST_ROWS + 6]
        assert found["plots"][0]["series"][0]["points"][1] == [8, 160e9]
        assert found["data"] == {"limit": "inf", "counts": [0, 1, 2], "one": 0.5}
        assert found["schema"] == 1

    def test_what_is_no_data_is_refused(self) -> None:
        with pytest.raises(TypeError, match="object"):
            plain({"a": object()})


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()
        self.open: list[str] = []
        self.words = ""

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.seen.add(tag)
        self.open += [] if tag == "meta" else [tag]
        assert not {name for name, _ in attrs} & {"src", "href", "onload", "onclick"}

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.seen.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data


class TestPage:
    def test_it_is_whole_and_safe(self) -> None:
        html = page(planted(), ("model", NASTY))
        tags = Tags()
        tags.feed(html)
        assert not tags.open and "script" not in tags.seen and "\x1b" not in html
        for piece in (
            "Σ rows · columns",
            "Source: Llama 2, table 1",
            "12.55 GiB",
            "n / ITL",
            "Nothing to draw",
            COMMAND,
        ):
            assert piece in tags.words, piece
        assert html.count("<svg") == 2

    def test_what_no_axis_has_a_place_for_is_told(self) -> None:
        plot = Plot("p", "x", "y", [Series("a", [(1, 1), (2, math.nan), (3, 0), (4, 2)])], log_y=True)
        assert undrawn(plot) == 2
        assert "2 points have no place on these axes." in page(Document("d", plots=[plot]), ("a",))


numbers = st.one_of(
    st.floats(-1e6, 1e6), st.floats(), st.sampled_from([0.0, 1e-300, 1e-99, 1e99, 5e-324, 1.0, 1e9, 1e9 + 1, -3.0])
)
series = st.builds(
    Series,
    st.text(st.characters(codec="utf-8"), max_size=60),
    st.lists(st.tuples(numbers, numbers), max_size=6),
    st.sampled_from(["line", "dots", "steps", "dashed"]),
)
plots = st.builds(
    Plot,
    st.text(max_size=20),
    st.text(st.characters(codec="utf-8"), max_size=80),
    st.text(st.characters(codec="utf-8"), max_size=80),
    st.lists(series, max_size=9),
    st.booleans(),
    st.booleans(),
)


class TestPlots:
    @pytest.mark.parametrize("width", [WIDE, NARROW])
    def test_planted(self, width: float) -> None:
        drawing = chart(ROOF, width)
        check_drawing(drawing)
        root = ElementTree.fromstring(drawing)
        strokes = [one.attrib for one in root.iter("path") if one.attrib["class"].startswith("curve")]
        # Two lines and their two keys; the dashed one is dashed in both.
        assert len(strokes) == 4 and sum("stroke-dasharray" in one for one in strokes) == 2
        assert len(list(root.iter("circle"))) == 2
        assert "100G" in [one.text for one in root.iter("text")]

    @given(plots, st.sampled_from([WIDE, NARROW]))
    @settings(max_examples=60, deadline=None)
    def test_any_plot_is_drawn_within_its_frame(self, plot: Plot, width: float) -> None:
        if not has_points(plot):
            assert undrawn(plot) == sum(len(one.points) for one in plot.series)
            return
        drawing = chart(plot, width)
        check_drawing(drawing)
        root = ElementTree.fromstring(drawing)
        _, _, wide, high = map(float, root.attrib["viewBox"].split())
        for one in root.iter("circle"):
            assert 0 <= float(one.attrib["cx"]) <= wide and 0 <= float(one.attrib["cy"]) <= high

    def test_a_long_name_of_the_key_goes_on_in_the_next_line(self) -> None:
        name = "int8 × int8 or int4: memory 32 GB/s, peak 605 GFLOP/s"
        drawing = chart(Plot("p", "x", "y", [Series(name, [(0, 1), (1, 2)]), Series("b", [(0, 2)])]), NARROW)
        check_drawing(drawing)
        texts = [one.text or "" for one in ElementTree.fromstring(drawing).iter("text")]
        assert any(f"{one} {other}" == name for one, other in pairwise(texts))

    def test_a_spike_among_many_points_stays(self) -> None:
        points = [(float(x), 1000.0 if x == 12_345 else 1.0) for x in range(50_000)]
        drawing = chart(Plot("p", "x", "y", [Series("a", points)]), WIDE)
        d = max((one.attrib["d"] for one in ElementTree.fromstring(drawing).iter("path")), key=len)
        heights = [float(one.split()[1]) for one in d[1:].split("L")]
        assert len(heights) <= MOST_POINTS + 2
        assert min(heights) < min(heights[0], heights[-1]) - 200

    def test_steps_keep_their_height(self) -> None:
        drawing = chart(Plot("p", "x", "y", [Series("a", [(0, 0), (1, 5), (2, 3)], "steps")]), WIDE)
        d = next(one.attrib["d"] for one in ElementTree.fromstring(drawing).iter("path"))
        assert d.count("H") == d.count("V") == 2

    def test_a_line_breaks_where_a_point_is_missing(self) -> None:
        points = [(0, 1), (1, 2), (2, math.nan), (3, 2), (4, 1)]
        drawing = chart(Plot("p", "x", "y", [Series("a", points)]), WIDE)
        # Two stretches, and the key.
        assert len(list(ElementTree.fromstring(drawing).iter("path"))) == 3


class TestCommand:
    @pytest.fixture(autouse=True)
    def _planted_question(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A question of our own: only what is asked is imported, and what is asked is what answers."""
        from headrace.cli import plan_energy as planted_module

        def add_arguments(parser: argparse.ArgumentParser) -> None:
            parser.add_argument("--rows", type=int, default=3)

        def document(arguments: argparse.Namespace) -> Document:
            return Document(f"{arguments.rows} rows", planted().quantities)

        monkeypatch.setattr(planted_module, "add_arguments", add_arguments)
        monkeypatch.setattr(planted_module, "document", document)

    def test_flags_before_and_after_the_question(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["plan", "energy", "--rows", "4", "--json"]) == 0
        after = capsys.readouterr().out
        assert main(["plan", "--json", "energy", "--rows", "4"]) == 0
        assert capsys.readouterr().out == after
        assert json.loads(after)["title"] == "4 rows"

    def test_text_and_page(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        path = tmp_path / "plan.html"
        assert main(["plan", "energy", "--explain", "--html", str(path)]) == 0
        out = capsys.readouterr().out
        assert "formula: Σ rows" in out and f"Written: {path}" in out
        assert "6,738,415,616" in path.read_text(encoding="utf-8")

    def test_a_page_that_cannot_be_written_is_told_before_the_work(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["plan", "energy", "--html", "/no/such/folder/a.html"]) == 2
        done = capsys.readouterr()
        assert not done.out and done.err.startswith("headrace: error: html: got")

    @pytest.mark.parametrize(
        ("words", "said"),
        [([], "nothing asked; one of probe, model"), (["--accuracy", "energy"], "got energy beside it")],
    )
    def test_what_is_asked_must_be_clear(self, words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["plan", *words]) == 2
        assert said in capsys.readouterr().err

    def test_accuracy_of_a_user_without_records(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
        assert main(["plan", "--accuracy"]) == 0
        assert "Nothing is stored yet" in capsys.readouterr().out
        assert not list(tmp_path.iterdir())

    def test_an_unknown_question_names_the_known(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit):
            build_parser().parse_args(["plan", "weather"])
        assert "'probe', 'model'" in capsys.readouterr().err.replace("probe, model", "'probe', 'model'")


@pytest.mark.parametrize("question", command.QUESTIONS)
def test_every_question_has_its_help(question: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["plan", question, "--help"])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert f"usage: headrace plan {question}" in out and "--explain" in out


@pytest.mark.parametrize(
    "words",
    [
        "model llama-3-8b --device H100 --long-context",
        "serving --preset melange-example",
        "energy --preset nvlm-study",
        "energy --rent-per-hour 2 --tokens-per-s 1000 --price 30000 --kw 1",
        "overlap",
        "offload --preset opt-30b",
        "training llama-2-7b --zero 3",
        "power --hours 0.5",
    ],
)
def test_every_number_has_a_formula_and_a_source(words: str) -> None:
    arguments = build_parser().parse_args(["plan", *words.split()])
    document: Document = arguments.document(arguments)
    assert document.quantities
    for one in document.quantities:
        assert one.formula and source_text(one), one.name
    for table in document.tables:
        assert all(len(row) == len(table.columns) for row in table.rows), table.title
        for index, column in enumerate(table.columns[table.named_by :], table.named_by):
            if any(is_number(row[index]) for row in table.rows):
                assert column.formula and column.source, (table.title, column.name)
    told = shown(document, explain=True)
    assert told.count("formula: ") == len(document.quantities) and UNTOLD not in told
    assert json.loads(as_json(document))["title"] == document.title
