"""What every test shares."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

# A shell that starts the tests in the background has them ignore Ctrl-C, and every process they start inherits that.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Tests ask no hub for anything, whatever the machine can reach. Set before huggingface_hub is first imported.
os.environ["HF_HUB_OFFLINE"] = "1"

# Triton's kernels are interpreted on the CPU, unless the environment says otherwise: `make gpu-check` says 0. Set
# before triton is first imported: a kernel is made for one or the other when its module is.
os.environ.setdefault("TRITON_INTERPRET", "1")

# The same examples every time, however slow the machine. `--hypothesis-profile=search` looks for new ones.
settings.register_profile("ci", deadline=None, derandomize=True)
settings.register_profile("search", deadline=None, max_examples=2000)
settings.load_profile("ci")


@pytest.fixture(scope="session", autouse=True)
def own_state(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What commands keep for later (histories, probes, predictions) is not the developer's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        yield


@pytest.fixture(scope="session")
def interpreted() -> Iterator[None]:
    """What Triton's interpreter lacks, where it runs the kernels."""
    from tests.triton_interpreter import loops_run

    with loops_run():
        yield


def pytest_collection_finish() -> None:
    """Modules and collected tests stay to the end: no search for garbage need look at them."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def settled_heap() -> None:
    """Nor at what the tests of other modules have left, above all the libraries they have imported: hundreds of
    thousands of objects, which a comparison would look through before each of its runs."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def demo_path() -> Path:
    """The demo model's GGUF file. Where it is not installed the test fails and says how to install it."""
    from headrace.core.errors import ModelNotFound
    from headrace.weights.checkpoint import locate

    try:
        return Path(locate("demo"))
    except ModelNotFound as error:
        hint = str(error)
    pytest.fail(hint, pytrace=False)
