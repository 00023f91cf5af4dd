"""`headrace compare demo`, whole: the command, the model, both verdicts, both reports."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from headrace.cli.main import main
from headrace.compare.score import loader, margins, reference_of, score
from headrace.core.config import EngineConfig
from headrace.engine.model import OpenModel
from headrace.testing.checkpoints import tiny_checkpoint

SMALL = ("--max-model-len", "512", "--max-num-seqs", "4", "--threads", "1")


@pytest.mark.demo
def test_compare_demo(demo_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = ("--json", str(tmp_path / "out.json"), "--html", str(tmp_path / "out.html"))
    methods = ("--methods", "fused", "--max-tokens", "4", "--repeats", "1")
    assert main(["compare", "demo", *SMALL, *methods, *files]) == 0

    found = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert list(found["methods"]) == ["serial", "fused"]
    for result in found["methods"].values():
        assert result["verdict"] == "identical"
        assert result["outputs"] == found["methods"]["serial"]["outputs"]
        assert len(result["outputs"]) == 4 and all(1 <= len(output) <= 4 for output in result["outputs"])
        assert result["seconds"]["median"] > 0 and len(result["seconds"]["all"]) == 1
        assert result["same_model"]["top1_agreement"] > 0.8 and 1e-5 < result["same_model"]["mean_kl_nats"] < 0.05
        assert result["same_model"]["verdict"] == "lossy", "activations of 8 bits"
        assert result["computed_tokens"] == found["methods"]["serial"]["computed_tokens"]
    assert found["methods"]["fused"]["iterations"] < found["methods"]["serial"]["iterations"]
    assert found["same_model"]["reference"] == "native float32, float32 KV cache"
    assert (found["config"]["backend"], found["config"]["quant"]) == ("native", "stored")
    assert found["model"]["path"] == str(demo_path)
    assert found["workload"]["chat_template"] is True and len(found["workload"]["manifest"]["requests"]) == 4

    out, err = capsys.readouterr()
    assert "\x1b" not in out and err == ""
    assert out.index("request 4: valid parentheses") < out.index("identical") < out.index("Measured: ")
    assert str(tmp_path / "out.html") in out
    html = (tmp_path / "out.html").read_text(encoding="utf-8")
    assert (
        html.startswith("<!DOCTYPE html>") and html.count('<svg class="wide"') == html.count('<svg class="narrow"') > 5
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.html", "out.json"]


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_scores_of_a_tiny_model_are_those_of_transformers(backend: str, tmp_path: Path) -> None:
    """Prompt and output are longer than a chunk, so that its seams are crossed."""
    path = tiny_checkpoint(tmp_path / "tiny")
    rng = np.random.default_rng(0)
    prompts = [tuple(rng.integers(3, 97, length).tolist()) for length in (70, 1)]
    outputs = [tuple(rng.integers(3, 97, length).tolist()) for length in (90, 3)]
    expected = []
    model = LlamaForCausalLM.from_pretrained(path, dtype=torch.float32)
    for prompt, output in zip(prompts, outputs, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + output])).logits[0, len(prompt) - 1 : -1]
        expected.append(logits.numpy())

    opened = OpenModel(EngineConfig(str(path), backend=backend, dtype="bfloat16", threads=1, kv_cache_mib=1))
    known = list(zip(prompts, outputs, strict=True))
    own, fp32 = (loader(opened, config, 160) for config in (opened.config, reference_of(opened.config)))
    with opened.checkpoint:
        alone, both = score(known, 16, fp32, None), score(known, 16, own, fp32)
    for logits, one, two in zip(expected, alone, both, strict=True):
        assert one.argmax == two.argmax == tuple(logits.argmax(axis=1))
        assert one.margins == pytest.approx(margins(logits), abs=1e-3)
        assert one.fp32_margins == two.fp32_margins == one.margins
        assert set(one.kl) == {0.0}
        assert len(two.kl) == len(logits) and 1e-7 < np.mean(two.kl) < 0.1


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (("--methods", "serial,nonsense"), "methods: got 'nonsense', allowed: "),
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
