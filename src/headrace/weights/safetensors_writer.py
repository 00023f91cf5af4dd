"""Writer of the safetensors format (`safetensors.py` says what it is): plain tensors, one after the other."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from headrace.weights.qtensor import SCHEMES, QTensor

DTYPES: Mapping[str, str] = {"f32": "F32", "f16": "F16", "bf16": "BF16"}
"""Scheme -> the format's own name of the type."""
_ALIGN = 8


def write_safetensors(
    path: Path,
    tensors: Mapping[str, QTensor],
    metadata: Mapping[str, str] | None = None,
    on_written: Callable[[str], None] = lambda name: None,
) -> None:
    """Writes `tensors` to `path`, the widest numbers first, so that each lies at a multiple of its numbers' size.

    The file has its name only when it is whole. `on_written` hears of each tensor that is written. A tensor that is not
    laid out in order is copied, one at a time. Raises ValueError for a packed scheme or a name that
    cannot be stored, OSError where the disk does.
    """
    for name, tensor in tensors.items():
        if tensor.scheme not in DTYPES:
            raise ValueError(f"{name}: a tensor of {tensor.scheme} cannot be written, allowed: {', '.join(DTYPES)}")
        if name == "__metadata__":
            raise ValueError("__metadata__ cannot be the name of a tensor")
    order = sorted(tensors, key=lambda name: -SCHEMES[tensors[name].scheme].group_bytes)
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in order:
        tensor = tensors[name]
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": DTYPES[tensor.scheme], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGN)
    partial = path.with_name(f"{path.name}.partial")
    try:
        with partial.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name in order:
                data = np.ascontiguousarray(tensors[name].planes["data"])
                file.write(data.reshape(-1).view(np.uint8).data)
                on_written(name)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
