"""Certificates of a GPU: what they say more, and what a check allows."""

from __future__ import annotations

import io
import json
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from headrace.compare.certificate import SCHEDULE, config_of
from headrace.compare.certificate_reader import read_certificate
from headrace.compare.check import (
    CheckResult,
    Difference,
    Kind,
    changed_parts,
    conclusion,
    engine_settings,
    show,
)
from headrace.compare.verdict import RequestVerdict
from headrace.core.errors import InputFileError
from headrace.pages.terminal import console
from headrace.testing.checkpoints import tiny_checkpoint
from tests.unit.certificate_cases import make, open_tiny, three_prompts
from tests.unit.test_compare_certificate import put, run_check, sealed_again


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def certified(tiny: Path) -> dict[str, Any]:
    return make(open_tiny(tiny), three_prompts())


def on_gpu(found: dict[str, Any], batch_invariant: bool) -> dict[str, Any]:
    """The same certificate, as if it had been made on a GPU."""
    for side in ("reference", "method"):
        more = {"device": "cuda", "batch_invariant": batch_invariant}
        found = put(found, f"{side}.config", found[side]["config"] | more)
    return sealed_again(put(found, "machine.gpu", "NVIDIA H200"))


def test_near_ties_of_a_gpu_are_allowed_unless_it_was_batch_invariant(
    certified: dict[str, Any], tmp_path: Path
) -> None:
    for invariant, status in ((False, 0), (True, 1)):
        path = tmp_path / "certificate.json"
        path.write_text(json.dumps(on_gpu(certified, invariant)), encoding="utf-8")
        one = read_certificate(path)
        assert engine_settings(one)["device"] == "cuda" and engine_settings(one)["batch_invariant"] is invariant
        assert changed_parts(one) == []
        near, far = RequestVerdict(1, 3, 0.1, 0.2), RequestVerdict(2, 3, 0.3, 0.2)
        answers = [Difference(Kind.ANSWER, "results.1.sha256", "near", near)]
        result = CheckResult(str(path), one, tuple(answers), True, True)
        assert result.status == status
        said = " ".join(conclusion(result))
        assert ("for all of 3 prompts, but for near-ties in 1 of them" in said) == (not invariant)
        stream = io.StringIO()
        show(result, console(stream))
        assert ("At a near-tie, as the certificate's scope allows" in stream.getvalue()) == (not invariant)
        answers.append(Difference(Kind.ANSWER, "results.2.sha256", "far", far))
        assert CheckResult(str(path), one, tuple(answers), True, True).status == 1


def test_a_cpu_says_nothing_of_devices(tiny: Path, certified: dict[str, Any], tmp_path: Path) -> None:
    """So that certificates from before there was another stay valid."""
    config = certified["reference"]["config"]
    assert list(config) == ["backend", "dtype", "quant", "kv_dtype", *SCHEDULE] and "CPU" in certified["scope"]
    result = run_check(certified, tmp_path, tiny)
    assert result.status == 0 and engine_settings(result.certificate)["device"] == "cpu"
    with closing(open_tiny(tiny)) as opened:
        found = config_of(replace(opened.config, device="cuda", batch_invariant=False))
    assert found is not None and (found["device"], found["batch_invariant"]) == ("cuda", False)


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"device": "cpu", "batch_invariant": True}, "device: got 'cpu', allowed: 'cuda'"),
        ({"device": "cuda"}, "batch_invariant"),
        ({"batch_invariant": True}, "device"),
        ({"device": "cuda", "batch_invariant": 1}, "batch_invariant: got 1"),
    ],
)
def test_a_device_is_cuda_with_its_mode(
    certified: dict[str, Any], tmp_path: Path, more: dict[str, Any], told: str
) -> None:
    path = tmp_path / "certificate.json"
    path.write_text(json.dumps(put(certified, "reference.config", certified["reference"]["config"] | more)))
    with pytest.raises(InputFileError, match=told):
        read_certificate(path)
