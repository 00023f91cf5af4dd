"""`headrace profile` as a command: the demo model, a trace on the disk, Ctrl-C, and under a program in nsys' place."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from headrace.testing.checkpoints import tiny_checkpoint

COMMAND = (sys.executable, "-m", "headrace.cli.main", "profile")
SMALL = ("--max-model-len", "256", "--max-num-seqs", "4", "--threads", "1")


def alive(pid: int) -> bool:
    """Whether the process runs; one that nobody has waited for does not."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def wait_until(path: Path) -> str:
    for _ in range(6000):
        if path.exists() and (text := path.read_text()):
            return text
        time.sleep(0.05)
    pytest.fail(f"{path.name} was not written")


@pytest.mark.demo
def test_profile_of_the_demo_model(demo_path: Path, tmp_path: Path) -> None:
    work = ("--prompt-tokens", "20", "--max-tokens", "4", "--requests", "2", "--top", "2")
    path = tmp_path / "trace.json"
    done = subprocess.run([*COMMAND, "demo", *SMALL, *work, "--trace", str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert f"Profile of {demo_path.resolve().name}" in done.stdout and f"Written: {path}" in done.stdout
    assert "2 requests at once, each 20 prompt tokens" in done.stdout
    rows = {line.split()[0]: line.split() for line in done.stdout.splitlines() if line.strip()}
    for name in ("load", "schedule", "gather", "layers", "attention", "mlp", "detokenise"):
        assert rows[name][1].isdecimal(), name
    assert rows["headrace.decode"][1] == "3" and rows["attention"][1] == "90" and rows["detokenise"][1] == "4"
    events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    names = {event["name"] for event in events}
    assert names >= {"layer 29", "attend", "headrace.sample", "headrace.prefill", "detokenise", "head"}
    assert [file.name for file in tmp_path.iterdir()] == ["trace.json"]


def test_nsys_runs_this_command(tmp_path: Path) -> None:
    """What stands for nsys runs the command it is given, whole: on the torch backend, with the same work."""
    model = tiny_checkpoint(tmp_path / "tiny")
    tools = tmp_path / "bin"
    tools.mkdir()
    nsys = tools / "nsys"
    nsys.write_text(
        f"#!{sys.executable}\nimport os, subprocess, sys\n"
        "assert os.environ['NSYS_NVTX_PROFILER_REGISTER_ONLY'] == '0'\n"
        "at = sys.argv.index('-o')\n"
        "open(sys.argv[at + 1] + '.nsys-rep', 'w').write('report')\n"
        "sys.exit(subprocess.run(sys.argv[at + 2:]).returncode)\n"
    )
    nsys.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}"}
    flags = ("--prompt-tokens", "5", "--max-tokens", "3", "--requests", "1", "--nsys", str(tmp_path / "out"))
    done = subprocess.run([*COMMAND, str(model), *SMALL, *flags], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "eager, CPU, 1 threads" in done.stdout and "1 request: 5 prompt tokens" in done.stdout
    assert f"Written: {tmp_path / 'out'}.nsys-rep" in done.stdout and "not on the PATH" not in done.stdout


def test_ctrl_c_ends_the_work(tmp_path: Path) -> None:
    model = tiny_checkpoint(tmp_path / "tiny", max_position_embeddings=4096)
    work = ("--requests", "64", "--prompt-tokens", "3000", "--max-tokens", "500", "--threads", "1")
    trace = tmp_path / "trace.json"
    command = [*COMMAND, str(model), *work, "--trace", str(trace)]
    child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        while "_kernels" not in Path(f"/proc/{child.pid}/maps").read_text():
            assert child.poll() is None, child.communicate()[1]
            time.sleep(0.05)
        time.sleep(0.5)
        child.send_signal(signal.SIGINT)
        _, err = child.communicate()
    finally:
        child.kill()
    assert child.returncode == 130 and err == "headrace: error: interrupted\n"
    assert [file.name for file in tmp_path.iterdir()] == ["tiny"]


def test_ctrl_c_ends_nsys_and_what_it_runs(tmp_path: Path) -> None:
    nsys = tmp_path / "nsys"
    nsys.write_text(
        f"#!{sys.executable}\nimport subprocess, sys\nsleep = subprocess.Popen(['sleep', '1000'])\n"
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(sleep.pid))\nsleep.wait()\n"
    )
    nsys.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = [*COMMAND, "no/such/model", "--nsys", str(tmp_path / "out")]
    child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        sleeping = int(wait_until(tmp_path / "pid"))
        child.send_signal(signal.SIGINT)
        _, err = child.communicate()
    finally:
        child.kill()
    assert child.returncode == 130 and err.endswith("headrace: error: interrupted\n")
    assert not alive(sleeping)
