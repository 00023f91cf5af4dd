"""`headrace compare demo`, whole: the command, the model, both verdicts, both reports."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from headrace.cli.main import main

SMALL = ("--max-model-len", "512", "--max-num-seqs", "4")


@pytest.mark.demo
def test_compare_demo(demo_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = ("--json", str(tmp_path / "out.json"), "--html", str(tmp_path / "out.html"))
    methods = ("--methods", "fused,static:2", "--max-tokens", "6", "--repeats", "1")
    assert main(["compare", "demo", *SMALL, *methods, *files]) == 0

    found = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert list(found["methods"]) == ["serial", "fused", "static:2"]
    for result in found["methods"].values():
        assert result["verdict"] == "identical"
        assert result["outputs"] == found["methods"]["serial"]["outputs"]
        assert len(result["outputs"]) == 4 and all(1 <= len(output) <= 6 for output in result["outputs"])
        assert result["seconds"]["median"] > 0 and len(result["seconds"]["all"]) == 1
        assert result["same_model"]["top1_agreement"] == 1 and result["same_model"]["verdict"] == "lossless"
        assert result["computed_tokens"] == found["methods"]["serial"]["computed_tokens"]
    assert found["methods"]["fused"]["iterations"] < found["methods"]["serial"]["iterations"]
    assert found["model"]["path"] == str(demo_path)
    assert found["workload"]["chat_template"] is True and len(found["workload"]["prompt_token_ids"]) == 4

    out, err = capsys.readouterr()
    assert "\x1b" not in out and err == ""
    assert out.index("question 4: valid parentheses") < out.index("identical") < out.index("Measured: ")
    assert str(tmp_path / "out.html") in out
    html = (tmp_path / "out.html").read_text(encoding="utf-8")
    assert html.startswith("<!DOCTYPE html>") and html.count("<svg") == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.html", "out.json"]


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (("--methods", "serial,threads"), "methods: got 'threads', allowed: "),
        (("--repeats", "0"), "repeats: got 0, allowed: "),
        (("--max-tokens", "0"), "max_tokens: got 0, allowed: "),
        (("--html", "/proc/report.html"), "html: got '/proc/report.html', allowed: "),
        (("--json", "x", "--html", "x"), "html: got 'x', allowed: another file than --json"),
    ],
)
def test_what_is_wrong_is_said_before_the_model_is_opened(
    flags: tuple[str, ...],
    complaint: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["compare", "no-such-model", *flags]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"headrace: error: {complaint}") and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
