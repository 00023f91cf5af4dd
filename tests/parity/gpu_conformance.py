"""The suite that every backend passes, for the GPU backend: minutes under Triton's interpreter, so it is no part of
`make test`; `make kernels` and `make gpu-check` run it.

In the mode in which a row's bits depend on that row alone: the suite compares bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

import pytest

from headrace.testing.driver import Driver
from tests.parity.common import Checkpoint, Open
from tests.parity.gpu_cases import CUDA, opener
from tests.parity.test_parity import TestConformance, poisoned, unsaid
from tests.triton_interpreter import loops_run, products_in_order


@pytest.fixture(scope="module", autouse=True)
def _arithmetic() -> Iterator[None]:
    with nullcontext() if CUDA else loops_run(), nullcontext() if CUDA else products_in_order():
        yield


@pytest.fixture
def backend_name() -> str:
    return "torch"


class TestGpuConformance(TestConformance):
    @pytest.fixture(params=["llama", "gemma3", "gptj"] if CUDA else ["llama"])
    def driver(self, request: pytest.FixtureRequest, checkpoint: Checkpoint, open_driver: Open) -> Driver:
        self.model = checkpoint(request.param, vocab_size=61)
        return opener(open_driver)(self.model, change=lambda tensors: unsaid(poisoned(tensors)), batch_invariant=True)


del TestConformance
