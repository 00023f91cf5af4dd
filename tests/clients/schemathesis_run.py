"""schemathesis, with all its checks, against /openapi.json; exits with 0 if it finds nothing.

    python -m tests.clients.schemathesis_run [--url URL [--key KEY]] [--max-examples N]

Without --url it starts servers of its own, one that asks for a key and one that does not, on a tiny model: much of what
it sends asks for as long an answer as there may be.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.clients.run import environment
from tests.clients.tiny_model import write_tiny_model
from tests.server.conftest import serving

# A long queue, for prompts × n is nothing that a schema can bound: a body may ask for as much as any server gives.
FLAGS = ("--threads", "1", "--max-num-seqs", "64", "--max-queued", "2000", "--served-model-name", "tiny")
REQUEST_S = 60
KEY = "a-key-of-the-tests"
KEYED_SHARE = 10
"""The server with a key gets one in so many of the examples: only who may come in is another matter there."""
EXAMPLES = 200


def run(python: Path, url: str, key: str | None, examples: int) -> int:
    """The exit code of schemathesis; what it writes is shown."""
    command = [str(python.with_name("schemathesis")), "run", f"{url}/openapi.json", "--checks", "all", "--no-color"]
    # The warnings are of patterns that are for checking alone (`ANY` in server/schemas_requests.py).
    command += ["--max-examples", str(examples), "--request-timeout", str(REQUEST_S), "--warnings", "off"]
    if key is not None:
        command += ["--header", f"Authorization: Bearer {key}"]
    with tempfile.TemporaryDirectory() as folder:  # it leaves its findings where it runs
        return subprocess.run(command, cwd=folder).returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="of a server that runs")
    parser.add_argument("--key", help="that it asks for")
    parser.add_argument("--max-examples", type=int, default=EXAMPLES, metavar="N", help="default: %(default)s")
    given = parser.parse_args()
    python = environment("schemathesis")
    if given.url:
        return run(python, given.url.rstrip("/"), given.key, given.max_examples)
    with tempfile.TemporaryDirectory() as folder:
        model = write_tiny_model(Path(folder))
        with serving(model, *FLAGS) as server:
            code = run(python, server.url, None, given.max_examples)
        with serving(model, *FLAGS, "--api-key", KEY) as server:
            return run(python, server.url, KEY, max(1, given.max_examples // KEYED_SHARE)) or code


if __name__ == "__main__":
    sys.exit(main())
