"""`headrace compare MODEL --workload image6` whole, on a tiny model that sees: every method gives serial's tokens."""

from __future__ import annotations

import gc
import hashlib
import json
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from headrace.backends.torch.vision.images import Vision
from headrace.cli.main import main
from headrace.compare.methods.bench import Bench
from headrace.compare.methods.registry import make_method
from headrace.compare.pictures import NAMES
from headrace.compare.workload_spec import WorkloadOptions, read_workload
from headrace.compare.workloads import Workload, WorkloadRequest
from headrace.core.config import EngineConfig
from headrace.core.types import ImageSpan
from headrace.engine.model import OpenModel
from headrace.testing.checkpoints import tiny_checkpoint
from headrace.testing.vision_checkpoints import tiny_vision_checkpoint

SMALL = ("--max-model-len", "512", "--max-num-seqs", "4", "--threads", "1", "--kv-cache-mib", "16")
ROUND = ("--workload", "image6", "--max-tokens", "5", "--repeats", "1")
METHODS = (
    "static:3",
    "window:5",
    "dataloader",
    "threads:3",
    "instances:1",
    "no-kv-cache",
    "plain-attention",
    "fused",
)


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tiny_vision_checkpoint(tmp_path_factory.mktemp("models") / "seeing", "internvl_300m_hf")
    # What writes it imports hundreds of thousands of objects: no run need look through them for garbage.
    gc.collect()
    gc.freeze()
    return path


def told(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def test_all_methods_and_the_same_again_from_the_manifest(
    seeing: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = ("--json", str(tmp_path / "out.json"), "--manifest", str(tmp_path / "work.json"))
    page = ("--html", str(tmp_path / "out.html"))
    methods = ("--methods", ",".join((*METHODS, "llama.cpp", "url:http://127.0.0.1:9")))
    assert main(["compare", str(seeing), *SMALL, *ROUND, *methods, *files, *page]) == 0
    found = told(tmp_path / "out.json")
    assert list(found["methods"]) == ["serial", *METHODS]
    assert {one["verdict"] for one in found["methods"].values()} == {"identical"}
    assert all(len(output) <= 5 for output in found["methods"]["serial"]["outputs"])
    refused = {one["name"]: one["reason"] for one in found["failures"]}
    assert list(refused) == ["llama.cpp", "url:http://127.0.0.1:9"]
    assert all("workload image6 has images" in reason for reason in refused.values())
    # The methods' float32 is the reference's: scored with the same pictures, every token is the likeliest.
    assert {one["same_model"]["verdict"] for one in found["methods"].values()} == {"lossless"}
    manifest = told(tmp_path / "work.json")
    assert [one["images"][0]["source"] for one in manifest["requests"]] == [f"picture:{name}" for name in NAMES]
    assert found["workload"]["sha256"] == manifest["sha256"]
    out = capsys.readouterr().out
    assert "request 1: a meme" in out and "identical" in out

    again = ("--workload", str(tmp_path / "work.json"), "--repeats", "1", "--methods", "serial")
    assert main(["compare", str(seeing), *SMALL, *again, "--json", str(tmp_path / "again.json")]) == 0
    second = told(tmp_path / "again.json")
    assert second["methods"]["serial"]["outputs"] == found["methods"]["serial"]["outputs"]
    assert second["workload"]["sha256"] == manifest["sha256"]


def test_a_certificate_holds_until_a_picture_is_another(
    seeing: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "certificate.json"
    made = ("--methods", "fused", "--num-requests", "2", "--certificate", str(path))
    assert main(["compare", str(seeing), *SMALL, *ROUND, *made]) == 0
    capsys.readouterr()
    assert main(["compare", str(seeing), "--threads", "1", "--check", str(path)]) == 0
    assert "Holds: run again" in capsys.readouterr().out

    found = told(path)
    found["workload"]["requests"][0]["images"][0]["hash"] = "ab" * 32
    path.write_text(json.dumps(found), encoding="utf-8")
    assert main(["compare", str(seeing), "--threads", "1", "--check", str(path)]) == 1
    out = capsys.readouterr().out
    assert "workload.requests.0 (changed in the file)" in out and "was not run again" in out


def inverted(span: ImageSpan) -> ImageSpan:
    pixels = bytes(255 - one for one in span.pixels)
    return replace(span, pixels=pixels, hash=hashlib.sha256(pixels).hexdigest())


def test_pictures_decide_answers(seeing: Path) -> None:
    """A method that lost the pictures on its way would pass the comparison of a method that lost them too."""
    config = EngineConfig(str(seeing), threads=1, prefix_cache=False, max_num_seqs=4, max_model_len=512)
    with closing(OpenModel(config)) as opened, closing(Bench(opened)) as bench:
        asked = read_workload("image6", opened, WorkloadOptions(max_tokens=8, num_requests=4))
        requests: list[WorkloadRequest] = []
        for one in asked.requests:
            requests += [
                one,
                replace(one, images=tuple(map(inverted, one.images))),
                replace(one, images=(), sources=()),
            ]
        for name in ("serial", "threads:3"):
            with closing(make_method(name, bench)) as method:
                mixed = Workload("mixed", tuple(requests), ignore_eos=True)
                method.start(mixed)
                outputs = method.run(mixed).outputs
            assert outputs[::3] != outputs[1::3], name
            assert outputs[::3] != outputs[2::3], name


def test_every_run_encodes_every_picture(seeing: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Encoded images are kept by their hash: a method would be faster for having run after another."""
    encoded: list[ImageSpan] = []
    encode = Vision.encode
    monkeypatch.setattr(Vision, "encode", lambda self, image: encoded.append(image) or encode(self, image))
    config = EngineConfig(str(seeing), threads=1, prefix_cache=False, max_num_seqs=4, max_model_len=512)
    with closing(OpenModel(config)) as opened, closing(Bench(opened)) as bench:
        asked = read_workload("image6", opened, WorkloadOptions(max_tokens=2, num_requests=8))
        for name in ("serial", "serial", "fused", "dataloader", "threads", "no-kv-cache"):
            encoded.clear()
            with closing(make_method(name, bench)) as method:
                method.start(asked)
                method.run(asked)
            # What keeps nothing from token to token sees the picture anew for each of its two.
            pixels = [one.images[0].pixels for one in asked.requests] * (2 if name == "no-kv-cache" else 1)
            assert sorted(one.pixels for one in encoded) == sorted(pixels), name


def test_a_model_that_reads_no_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    blind = tiny_checkpoint(tmp_path / "blind")
    capsys.readouterr()
    assert main(["compare", str(blind), "--max-model-len", "96", *ROUND]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "workload: got 'image6'" in err and "this model reads no images" in err
