"""The GPU backend under test: on CUDA where TRITON_INTERPRET is 0, else on the CPU, its kernels interpreted."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from headrace.backends.base import Backend
from headrace.testing.driver import Driver
from tests.parity.common import Open

CUDA = os.environ.get("TRITON_INTERPRET") == "0"
SIZES: dict[str, Any] = {"max_rows": 8, "max_tokens": 64, "max_model_len": 256, "num_blocks": 64, "block_size": 8}


def gpu_backend() -> Backend:
    from headrace.backends.torch.gpu.backend import GpuBackend

    return GpuBackend("cuda" if CUDA else "cpu")


def opener(open_driver: Open) -> Open:
    """`open_driver`, of the GPU backend."""

    def open_one(path: Path, **options: Any) -> Driver:
        return open_driver(path, **({"backend": gpu_backend()} | SIZES | options))

    return open_one
