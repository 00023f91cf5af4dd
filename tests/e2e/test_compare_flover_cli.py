"""`headrace compare MODEL --workload flover:N`, whole: the command, its files, what it refuses."""

from __future__ import annotations

import csv
import gc
import json
from pathlib import Path

import pytest

from headrace.cli.main import main
from headrace.testing.checkpoints import tiny_checkpoint

SMALL = ("--max-model-len", "72", "--threads", "1", "--kv-cache-mib", "8", "--repeats", "1")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tiny_checkpoint(tmp_path_factory.mktemp("flover") / "tiny")
    # What writes it imports hundreds of thousands of objects: no run need look through them for garbage.
    gc.collect()
    gc.freeze()
    return str(path)


def test_an_experiment_by_the_command(tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Experiment 7 with nobody beside: the one that starts no other process. The context cuts its lengths."""
    files = ("--json", "out.json", "--html", "out.html", "--csv", "tables")
    arguments = [str(tmp_path / value) if not value.startswith("--") else value for value in files]
    assert main(["compare", tiny, "--workload", "flover:7", *SMALL, *arguments]) == 0

    found = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert found["experiment"] == 7 and list(found["methods"]) == ["fused"]
    assert found["checks"] and all(check["holds"] for check in found["checks"])
    html = (tmp_path / "out.html").read_text(encoding="utf-8")
    assert html.startswith("<!DOCTYPE html>") and "Published: TensorRT-LLM / Flover, read off bars" in html
    tables = sorted((tmp_path / "tables").iterdir())
    assert tables and all(len(list(csv.reader(table.read_text("utf-8").splitlines()))) > 1 for table in tables)
    out = capsys.readouterr().out
    assert "Experiment 7 of Flover" in out and str(tmp_path / "out.html") in out and "published 512 tokens, ours" in out
    assert "No other engine ran here: only our own half of the experiment was measured." in " ".join(out.split())


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--workload", "flover:8"), "workload: got 'flover:8', allowed: flover:1 to flover:7"),
        (("--workload", "flover:3", "--max-tokens", "9"), "max_tokens: got 9, allowed: to leave it out with flover:N"),
        (("--workload", "flover:3", "--certificate", "x.json"), "certificate: got 'x.json', allowed: to leave it out"),
        (("--workload", "flover:7", "--max-model-len", "71"), "max_model_len: got 71, allowed: at least 72"),
    ],
)
def test_what_an_experiment_refuses(
    tiny: str, flags: tuple[str, ...], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", tiny, *SMALL, *flags]) == 2
    assert told in capsys.readouterr().err


def test_a_comparison_without_a_tokenizer(tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Answers are shown as ids; a break-even rate that cannot be looked for is not passed over."""
    work = ("--workload", "synthetic", "--num-requests", "2", "--prompt-length", "8", "--output-length", "4")
    asked = ("--methods", "fused", "--break-even", "1:2", "--ttft-s", "0.000001", "--repeats", "3")
    assert main(["compare", tiny, *SMALL[:-2], *work, *asked]) == 0
    out = capsys.readouterr().out
    assert "token ids " in out and "Break-even in mean latency: not looked for, since no second method is left." in out
