"""What the parity tests share: prompts, logits of a whole sequence, and how far two of them are apart."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from headrace.backends.base import Backend
from headrace.core.types import RowOut
from headrace.testing.driver import Driver
from tests.parity.cases import CASES

Checkpoint = Callable[..., Path]
Open = Callable[..., Driver]
Logits = NDArray[np.float32]

TOLERANCE = 1e-4
VOCAB = 97
BACKENDS = ("torch", "native")


def create_backend(name: str) -> Backend:
    if name == "native":
        from headrace.backends.native.backend import NativeBackend

        return NativeBackend()
    from headrace.backends.torch.backend import TorchBackend

    return TorchBackend()


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return [int(i) for i in np.random.default_rng([length, seed]).integers(3, VOCAB, length)]


def spans(driver: Driver, row: int, sizes: Sequence[int]) -> Iterator[RowOut]:
    """Runs the row in these chunks, alone, and gives each one's logits."""
    for size in sizes:
        out = driver.run(driver.span(row, size, sample=False, logits=True))[row]
        assert out.error is None, out.error
        yield out


def all_logits(driver: Driver, tokens: Sequence[int], chunk: int = 512) -> Logits:
    """Logits of every position of a sequence, computed in chunks, in a row of its own."""
    row = driver.admit(tokens)
    sizes = [min(chunk, len(tokens) - start) for start in range(0, len(tokens), chunk)]
    logits = np.concatenate([out.logits for out in spans(driver, row, sizes)])
    driver.release(row)
    return logits


def difference(found: Logits, wanted: Logits) -> float:
    assert found.shape == wanted.shape and found.dtype == np.float32
    return float(np.abs(found - wanted).max())


def of_case(name: str, checkpoint: Checkpoint) -> Path:
    return checkpoint(CASES[name].architecture, **CASES[name].config)
