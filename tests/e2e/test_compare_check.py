"""A certificate of the demo model, made with two threads and checked with one and with two."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from headrace.compare.certificate import tokens_sha256
from headrace.compare.check import Kind, check, engine_settings
from headrace.compare.workloads import Workload, WorkloadRequest
from headrace.core.config import EngineConfig
from headrace.engine.model import OpenModel
from tests.unit.certificate_cases import make, open_tiny

QUESTIONS = ("The capital of France is", "def add(a, b):\n", "1, 2, 3,")


@pytest.fixture(scope="module")
def certificate_path(demo_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    opened = open_tiny(demo_path, threads=2, backend="native")
    requests = tuple(WorkloadRequest(opened.encode(text), 5 + index, text=text) for index, text in enumerate(QUESTIONS))
    found = make(opened, Workload("short", requests))
    path = tmp_path_factory.mktemp("certificates") / "certificate.json"
    path.write_text(json.dumps(found, allow_nan=False), encoding="utf-8")
    return path


@pytest.mark.demo
@pytest.mark.parametrize("threads", [1, 2])
def test_made_with_two_threads_it_holds_with_one_and_with_two(
    demo_path: Path, certificate_path: Path, threads: int
) -> None:
    said: list[str] = []
    result = check(
        str(certificate_path),
        lambda one: OpenModel(EngineConfig(str(demo_path), **engine_settings(one), threads=threads)),
        said.append,
    )
    assert [(one.part, one.kind) for one in result.differences] == (
        [("machine.threads", Kind.SETTING)] if threads == 1 else []
    )
    assert result.status == 0 and result.ran and result.same_class
    assert said == [f"hashing {demo_path.name}", "running again: serial", "running again: fused"]


@pytest.mark.demo
def test_what_the_demo_certifies(demo_path: Path, certificate_path: Path) -> None:
    found: dict[str, Any] = json.loads(certificate_path.read_text(encoding="utf-8"))
    (file,) = found["weights"]["files"]
    assert (file["name"], file["bytes"]) == (demo_path.name, demo_path.stat().st_size)
    assert found["tokenizer_sha256"] is not None and found["method"]["config"]["quant"] == "stored"
    assert found["verdict"] == "identical" and found["machine"]["threads"] == 2
    assert found["epsilon"]["positions"] > 0 and found["margin"]["min"] > 0


@pytest.mark.demo
def test_a_changed_answer_is_found_where_it_is(demo_path: Path, certificate_path: Path, tmp_path: Path) -> None:
    found = json.loads(certificate_path.read_text(encoding="utf-8"))
    found["results"][1]["sha256"] = tokens_sha256((1, 2, 3))
    path = tmp_path / "changed.json"
    path.write_text(json.dumps(found), encoding="utf-8")
    result = check(
        str(path),
        lambda one: OpenModel(EngineConfig(str(demo_path), **engine_settings(one), threads=2)),
        lambda text: None,
    )
    assert [(one.part, one.kind) for one in result.differences] == [("results.1.sha256", Kind.FILE)]
    assert result.status == 1 and result.ran
