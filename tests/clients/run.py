"""Clients that must work unchanged, each in an environment of its own, against a real server.

    python -m tests.clients.run [NAME …] [--full]

An environment is made of NAME.txt, which pins everything, and kept in ~/.cache/headrace/clients. A client's script asks
the server, and prints a line for each thing that it has checked. Clients that need weights that others can load too get
a server of the demo model's dequantised float32 copy, which is made once and kept there as well.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import headrace.compare.drivers
from headrace.weights.checkpoint import locate
from tests.server.conftest import serving

HERE = Path(__file__).parent
CACHE = Path.home() / ".cache" / "headrace" / "clients"
CHECKED = re.compile(r"^ok: (.+)$|^ *(\d+ generated.*)$", re.MULTILINE)
"""What a script says that it has checked; the second is schemathesis' own line."""
READY = "headrace-ready"
"""A file in an environment that is whole: what it was made of."""
CONVERTER = Path(headrace.compare.drivers.__file__).with_name("convert.py")
LIMIT_S, FULL_LIMIT_S = 600, 3600
INHERITED = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE")


@dataclass(frozen=True)
class Client:
    """One client: the package whose version is told, and what its script needs."""

    package: str
    script: str
    flags: tuple[str, ...] = ()
    """Of the server."""
    float32: bool = False
    """The server has the float32 copy; the script is told its folder."""
    folder: bool = False
    """The script is told the folder of the float32 copy."""
    environment: Mapping[str, str] | None = None
    short: tuple[str, ...] = ()
    """Arguments of the script without --full."""
    own_servers: bool = False
    """The script is one of these tests: it starts its servers, and the client, by itself."""


CLIENTS: Mapping[str, Client] = {
    "text-generation": Client("text-generation", "text_generation_client.py"),
    "litellm": Client("litellm", "litellm_client.py", environment={"LITELLM_LOCAL_MODEL_COST_MAP": "True"}),
    "langchain-openai": Client("langchain-openai", "langchain_openai_client.py"),
    "langchain-huggingface": Client("langchain-huggingface", "langchain_huggingface_client.py"),
    "instructor": Client("instructor", "instructor_client.py"),
    "lm-eval": Client("lm-eval", "lm_eval_client.py", ("--kv-dtype", "float32"), float32=True, folder=True),
    "guidellm": Client("guidellm", "guidellm_client.py", folder=True),
    "schemathesis": Client("schemathesis", "schemathesis_run.py", short=("--max-examples", "10"), own_servers=True),
}


@dataclass(frozen=True)
class Result:
    """What became of one client."""

    name: str
    version: str
    checks: tuple[str, ...]
    error: str
    took_s: float


def say(text: str) -> None:
    print(text, flush=True)


def environment(name: str) -> Path:
    """The interpreter of a client's environment, made anew where it is not what NAME.txt asks for. Raises OSError."""
    folder, pins = CACHE / name, HERE / f"{name}.txt"
    wanted = f"{hashlib.sha256(pins.read_bytes()).hexdigest()} {sys.version}"
    python, ready = folder / "bin" / "python", folder / READY
    if ready.exists() and ready.read_text() == wanted:
        return python
    say(f"{name}: making its environment ...")
    ready.unlink(missing_ok=True)
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
    # Files are compiled when they are first imported.
    install = [str(python), "-m", "pip", "install", "-qq", "--no-input", "--disable-pip-version-check", "--no-compile"]
    subprocess.run([*install, "-r", str(pins)], check=True)
    ready.write_text(wanted)
    return python


def float32_copy() -> Path:
    """The demo model's weights as float32 safetensors, with its tokenizer: what transformers loads."""
    folder = CACHE / "models" / "demo-f32"
    if not (folder / READY).exists():
        say("dequantising the demo model ...")
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run([sys.executable, "-I", str(CONVERTER), "hf", str(locate("demo")), str(folder), ""], check=True)
        (folder / READY).touch()
    return folder


@contextmanager
def server(client: Client) -> Iterator[str]:
    """The URL of a server as the client needs it."""
    model: str | Path = float32_copy() if client.float32 else "demo"
    threads = ("--threads", str(len(os.sched_getaffinity(0))))
    with serving(model, *threads, *client.flags) as running:
        yield running.url


def run_client(name: str, full: bool) -> Result:
    client = CLIENTS[name]
    version, error = "", ""
    checks: list[str] = []
    began_s = time.monotonic()
    try:
        python = environment(name)
        version = version_of(python, client.package)
        with ExitStack() as stack:
            url = "" if client.own_servers else stack.enter_context(server(client))
            done = run_script(client, python, url, full)
        checks = [said or counted for said, counted in CHECKED.findall(done.stdout)]
        if done.returncode or not checks:
            error = f"exit {done.returncode}\n{done.stdout[-12_000:]}\n{done.stderr[-6000:]}"
    except (subprocess.SubprocessError, OSError) as problem:
        error = str(problem)
    return Result(name, version, tuple(checks), error, time.monotonic() - began_s)


def run_script(client: Client, python: Path, url: str, full: bool) -> subprocess.CompletedProcess[str]:
    """Raises TimeoutExpired."""
    if client.own_servers:
        command = [sys.executable, "-m", f"tests.clients.{client.script.removesuffix('.py')}"]
        environ = dict(os.environ)
    else:
        command = [str(python), "-I", str(HERE / client.script), url]
        environ = {key: value for key, value in os.environ.items() if key in INHERITED}
    command += [str(float32_copy())] if client.folder else []
    command += () if full else client.short
    environ |= client.environment or {}
    limit_s = FULL_LIMIT_S if full else LIMIT_S
    return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=limit_s)


def version_of(python: Path, package: str) -> str:
    line = f"from importlib.metadata import version; print(version({package!r}))"
    return subprocess.run([str(python), "-I", "-c", line], check=True, capture_output=True, text=True).stdout.strip()


def table(results: list[Result]) -> str:
    """A line for each client."""
    lines = [f"{'client':<22}{'version':<10}{'result':<8}{'seconds':>7}  what was run"]
    for one in results:
        verdict = "fail" if one.error else "pass"
        lines.append(f"{one.name:<22}{one.version:<10}{verdict:<8}{one.took_s:>7.0f}  {'; '.join(one.checks)}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(CLIENTS)}; otherwise all")
    parser.add_argument("--full", action="store_true", help="more examples, where a client makes them")
    given = parser.parse_args()
    for name in given.names:
        if name not in CLIENTS:
            parser.error(f"NAME: got {name!r}, allowed: {', '.join(CLIENTS)}")
    results = []
    for name in given.names or CLIENTS:
        results.append(result := run_client(name, given.full))
        say(f"{name}: {'fail' if result.error else 'pass'}")
        if result.error:
            say(result.error)
    failed = sum(bool(one.error) for one in results)
    say(f"\n{table(results)}\n\n{len(results) - failed} passed, {failed} failed")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
