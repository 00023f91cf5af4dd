"""The command `headrace batch`: what it says, and its exit status."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from headrace.batch.run import Report
from headrace.cli.batch import Signals, summary
from headrace.cli.main import main
from tests.unit.batch_cases import call, read_jsonl, tiny_model, write_lines


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model") / "tiny")


def test_it_answers_and_knows_its_answer_again(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With the real backend; stdout stays empty."""
    source = write_lines(tmp_path / "in.jsonl", [call("a", max_tokens=3), call("b", max_tokens=0), call("c", n=2)])
    out = tmp_path / "out.jsonl"
    assert main(["batch", str(model), str(source), str(out)]) == 0
    told = capsys.readouterr()
    assert told.out == "" and told.err.startswith("3 lines: 2 ok, 1 failed\nthis run: ")
    assert [one["custom_id"] for one in read_jsonl(out)] == ["a", "c"]
    assert read_jsonl(tmp_path / "out.errors.jsonl")[0]["response"]["body"]["error"]["param"] == "max_tokens"
    assert main(["batch", str(model), str(source), str(out)]) == 0
    assert capsys.readouterr().err == f"{out}: already complete (3 lines)\n"


@pytest.mark.parametrize("case", ["no input", "empty input", "no model", "out exists", "no folder"])
def test_what_a_user_gets_wrong_is_one_line(
    case: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = write_lines(tmp_path / "in.jsonl", [call("a")]), tmp_path / "out.jsonl"
    if case == "no input":
        source.unlink()
    elif case == "empty input":
        source.write_text("")
    elif case == "no model":
        model = tmp_path / "none"
    elif case == "out exists":
        out.write_text("mine")
    else:
        out = tmp_path / "none" / "out.jsonl"
    assert main(["batch", str(model), str(source), str(out)]) == 2
    told = capsys.readouterr()
    assert told.out == "" and len(told.err.splitlines()) == 1 and told.err.startswith("headrace: error: ")
    assert not (tmp_path / "out.jsonl.journal").exists()


def test_a_folder_that_cannot_be_written(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_lines(tmp_path / "in.jsonl", [call("a")])

    def refuse(path: Path, *_: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("headrace.batch.journal.os.open", refuse)
    assert main(["batch", str(model), str(source), str(tmp_path / "out.jsonl")]) == 1
    assert "out.jsonl.journal: Permission denied; what is done is kept: put that right" in capsys.readouterr().err


def test_the_first_signal_waits_for_the_step_and_the_second_does_not() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with Signals() as signals:
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.caught == signal.SIGTERM
        assert signal.getsignal(signal.SIGTERM) == before
    with pytest.raises(KeyboardInterrupt), Signals() as signals:
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.caught == signal.SIGINT
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_summary_of_a_run_that_went_on() -> None:
    report = Report(
        100, done_before=40, ok=69, failed=1, again=7, cut_bytes=12, output_tokens=50, run_s=2.0, interrupted=True
    )
    told = list(summary(report, Path("out.jsonl")))
    assert told == [
        "the journal's last 12 bytes were not whole: cut, what they held was computed again",
        "100 lines: 69 ok, 1 failed, 40 of them by earlier runs, 7 begun more than once",
        "this run: 0 prompt tokens, 50 answer tokens in 2.0 s (25 tokens/s), after 0.0 s of loading",
        "interrupted with 30 lines to go; the same command goes on from here",
    ]
    over = Report(2, ok=2, cut_bytes=9, started_over=True)
    assert "could not be read from its beginning on (9 bytes): started over" in next(summary(over, Path("o")))
