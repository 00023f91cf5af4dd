"""`headrace batch` against a real server: the answers are the model's own, also after the client was killed."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from headrace.batch.lines import scan
from headrace.batch.run import run_batch
from headrace.cli.main import main
from headrace.core.config import EngineConfig
from headrace.engine.model import OpenModel
from tests.robustness import batch_kill
from tests.server.conftest import serving
from tests.unit.batch_cases import call, read_jsonl, tiny_model, write_lines


def lines(count: int) -> list[dict[str, Any]]:
    """Short ones: greedy or with a seed, chats and completions, and some that are refused."""
    found = []
    for k in range(count):
        body: dict[str, Any] = {
            "max_tokens": 1 + k % 5,
            "prompt": f"The number {k} is",
            "temperature": k % 2,
            "seed": k,
        }
        url = "/v1/completions"
        if k % 3 == 1:
            del body["prompt"]
            url, body["messages"] = "/v1/chat/completions", [{"role": "user", "content": f"Say {k}."}]
        if k % 8 == 5:
            body["temperature"] = 9
        if k % 10 == 4:
            body |= {"n": 2, "logprobs": 1} if "prompt" in body else {"logprobs": True, "top_logprobs": 2}
        found.append(call(f"r{k}", url, **body))
    return found


def without_what_differs(path: Path) -> list[dict[str, Any]]:
    """The lines of a file but for what a server makes anew, and the hashes of its URL."""
    found = read_jsonl(path)
    for one in found:
        del one["id"], one["response"]["request_id"]
        body = one["response"]["body"]
        for name in ("id", "created"):
            body.pop(name, None)
        body.get("usage", {}).pop("prompt_tokens_details", None)
    return found


def both(out: Path) -> list[list[dict[str, Any]]]:
    return [without_what_differs(path) for path in (out, out.with_name(f"{out.stem}.errors.jsonl"))]


def test_the_answers_are_the_models_own(server_url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out, own = write_lines(tmp_path / "in.jsonl", lines(40)), tmp_path / "out.jsonl", tmp_path / "own.jsonl"
    assert main(["batch", server_url, str(source), str(out)]) == 0
    assert "40 lines: 35 ok, 5 failed\n" in capsys.readouterr().err
    opened = OpenModel(EngineConfig("demo", threads=1))
    run_batch(opened, scan(source), own)
    opened.close()
    assert both(out) == both(own)
    before = out.read_bytes()
    assert main(["batch", server_url + "/v1", str(source), str(out)]) == 0
    assert "already complete (40 lines)" in capsys.readouterr().err and out.read_bytes() == before


def test_a_client_that_is_killed(tmp_path: Path) -> None:
    """At random points, inside a write, then by a manager's stop: the files of a run that nothing disturbed."""
    with serving(tiny_model(tmp_path / "tiny"), "--threads", "1") as running:
        case = batch_kill.Case(tmp_path, 150, random.Random(5), running.url)
        batch_kill.kill_randomly(case, 3)
        batch_kill.tear_writes(case, 1)
        batch_kill.interrupt(case, signal.SIGTERM)


def test_another_server_a_key_and_a_small_queue(demo_path: Path, tmp_path: Path, server_url: str) -> None:
    """What a full queue refuses is sent again until it is taken; a journal is of one server."""
    source, out = write_lines(tmp_path / "in.jsonl", lines(60)), tmp_path / "out.jsonl"
    flags = ("--threads", "1", "--max-num-seqs", "2", "--max-queued", "1", "--api-key", "k")
    with serving("demo", *flags) as small:
        command = [sys.executable, "-m", "headrace.cli.main", "batch"]
        rest = [str(source), str(out), "--concurrency", "16"]
        refused = subprocess.run([*command, small.url, *rest], capture_output=True, text=True, timeout=60)
        assert refused.returncode == 2 and "wants another API key" in refused.stderr
        process = subprocess.Popen([*command, small.url, *rest, "--api-key", "k"], stderr=subprocess.PIPE, text=True)
        journal = tmp_path / "out.jsonl.journal"
        while process.poll() is None and (not journal.exists() or journal.stat().st_size < 4000):
            time.sleep(0.001)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
        assert process.returncode == 130
        other = subprocess.run([*command, server_url, *rest], capture_output=True, text=True, timeout=60)
        assert other.returncode == 2 and f"was begun with url '{small.url}', now '{server_url}'" in other.stderr
        done = subprocess.run(
            [*command, small.url, *rest, "--api-key", "k"], capture_output=True, text=True, timeout=120
        )
    assert done.returncode == 0 and "60 lines: " in done.stderr
    codes = [one["response"]["body"]["error"]["code"] for one in read_jsonl(tmp_path / "out.errors.jsonl")]
    assert set(codes) == {"invalid_parameter"} and len(codes) == 7, json.dumps(codes)
