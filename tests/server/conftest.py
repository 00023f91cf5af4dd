"""Real servers on the demo model: the command itself, in a process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

START_S = 120


class Running:
    """A server that runs."""

    def __init__(self, process: subprocess.Popen[str], url: str, log: list[str]) -> None:
        self.process = process
        self.url = url
        self.log = log
        """What it wrote on stderr, line by line."""

    @property
    def address(self) -> tuple[str, int]:
        host, port = self.url.removeprefix("http://").rsplit(":", 1)
        return host, int(port)


@contextmanager
def serving(model: str | Path, *flags: str, environ: dict[str, str] | None = None) -> Iterator[Running]:
    """`headrace serve` on a free port; ended by SIGTERM."""
    process = subprocess.Popen(
        [sys.executable, "-m", "headrace.cli.main", "serve", str(model), "--port", "0", *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **(environ or {})},
    )
    assert process.stdout is not None and process.stderr is not None
    log: list[str] = []
    reader = threading.Thread(target=log.extend, args=(process.stderr,), daemon=True)
    reader.start()
    timer = threading.Timer(START_S, process.kill)
    timer.start()
    try:
        line = process.stdout.readline()
        timer.cancel()
        if not line.startswith("listening on "):
            process.wait(10)
            reader.join(5)
            pytest.fail(f"the server did not start: {''.join(log)}")
        yield Running(process, line.split()[-1], log)
    finally:
        timer.cancel()
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        reader.join(5)
        process.stdout.close()
        process.stderr.close()


@pytest.fixture(scope="session")
def server(demo_path: Path) -> Iterator[Running]:
    """A server with default settings, for all tests that do not harm it."""
    with serving("demo", "--threads", "1") as running:
        yield running


@pytest.fixture(scope="session")
def server_url(server: Running) -> str:
    return server.url
