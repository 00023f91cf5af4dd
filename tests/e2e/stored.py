"""How near the native backend comes with a checkpoint's weights as they are stored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from headrace.backends.base import BackendOptions
from headrace.core.config import EngineConfig
from headrace.engine.model import OpenModel
from headrace.testing.driver import Driver

OPTIONS = BackendOptions(
    dtype="float32", threads=1, block_size=16, num_blocks=32, max_rows=8, max_tokens=512, max_model_len=128
)


def logits_of(path: Path, tokens: Sequence[int], backend: str, quant: str = "none") -> NDArray[np.float32]:
    """(tokens, vocabulary)"""
    opened = OpenModel(EngineConfig(model=str(path), threads=1))
    with opened.checkpoint:
        loaded, capacity = opened.load_backend(backend, replace(OPTIONS, quant=quant))
    try:
        driver = Driver(loaded, capacity)
        row = driver.admit(tokens)
        out = driver.run(driver.span(row, len(tokens), logits=True))[row]
        assert out.error is None
        return np.asarray(out.logits)
    finally:
        loaded.close()


def divergence(found: NDArray[np.float32], wanted: NDArray[np.float32]) -> float:
    """Mean KL(wanted ‖ found) over the positions, in nats."""
    p, q = (torch.log_softmax(torch.from_numpy(one).double(), -1) for one in (wanted, found))
    return float((p.exp() * (p - q)).sum(-1).mean())


def stored_is_near(path: Path, model: PreTrainedModel, limit: float) -> None:
    """Against transformers in float32, on 100 random tokens."""
    generator = np.random.default_rng(0)
    tokens = [int(i) for i in generator.integers(0, model.config.vocab_size, 100)]
    with torch.inference_mode():
        wanted = model(torch.tensor([tokens])).logits[0].float().numpy()
    found = divergence(logits_of(path, tokens, "native", "stored"), wanted)
    assert found < limit, f"KL {found:.4f}"
