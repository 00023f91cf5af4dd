"""Backends under test, tiny checkpoints, and transformers' answers to hold the first against."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM

from headrace.backends.base import Backend, BackendOptions
from headrace.core.spec import ModelSpec, WeightMap
from headrace.models.registry import describe
from headrace.parallel.mesh import Mesh
from headrace.testing.checkpoints import tiny_checkpoint
from headrace.testing.driver import Driver
from headrace.weights.checkpoint import open_checkpoint
from headrace.weights.loader import stream
from tests.parity.common import BACKENDS, create_backend

SIZES: dict[str, Any] = {
    "dtype": "float32",
    "threads": 1,
    "block_size": 8,
    "num_blocks": 256,
    "max_rows": 40,
    "max_tokens": 512,
    "max_model_len": 256,
}


class Reference:
    """transformers, eager attention: the logits of a whole sequence at once."""

    def __init__(self, path: Path, dtype: str) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(
            path, dtype=getattr(torch, dtype), attn_implementation="eager"
        )
        self._model.eval()

    def logits(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """(tokens, vocabulary)"""
        with torch.inference_mode():
            return self._model(torch.tensor([list(tokens)])).logits[0].float().numpy()

    def greedy(self, prompt: Sequence[int], count: int) -> list[int]:
        tokens = list(prompt)
        for _ in range(count):
            tokens.append(int(self.logits(tokens)[-1].argmax()))
        return tokens[len(prompt) :]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A tiny checkpoint; the same arguments give the same folder."""
    made: dict[str, Path] = {}

    def make(architecture: str = "llama", **config: Any) -> Path:
        key = repr((architecture, sorted(config.items())))
        if key not in made:
            made[key] = tiny_checkpoint(tmp_path_factory.mktemp("model"), architecture, **config)
        return made[key]

    return make


@pytest.fixture(scope="session")
def reference() -> Callable[..., Reference]:
    """The checkpoint in transformers, loaded once."""
    made: dict[tuple[Path, str], Reference] = {}

    def load(path: Path, dtype: str = "float32") -> Reference:
        if (path, dtype) not in made:
            made[path, dtype] = Reference(path, dtype)
        return made[path, dtype]

    return load


@pytest.fixture(params=BACKENDS)
def backend_name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def open_driver(backend_name: str) -> Iterator[Callable[..., Driver]]:
    """Loads a checkpoint into a new backend, and closes it in the end. `change` may alter the tensors on their way;
    `read` makes spec and weight map out of the config, in place of the registry; `backend` is loaded, not a new one."""
    opened: list[Backend] = []

    def open_one(
        path: Path,
        *,
        change: Callable[[Any], Any] = lambda tensors: tensors,
        read: Callable[[Any], tuple[ModelSpec, WeightMap]] | None = None,
        backend: Backend | None = None,
        **options: Any,
    ) -> Driver:
        source = open_checkpoint(path)
        if read is None:
            description = describe(source.config, source.format, source.shapes())
            spec, weight_map = description.spec, description.weight_map
        else:
            spec, weight_map = read(source.config)
        backend = backend or create_backend(backend_name)
        opened.append(backend)
        tensors = change(stream(source, weight_map))
        capacity = backend.load(spec, tensors, BackendOptions(**(SIZES | options)), Mesh())
        return Driver(backend, capacity)

    yield open_one
    for backend in opened:
        backend.close()
