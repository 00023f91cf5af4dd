"""The safetensors reader against the format's own library, and against files that are not what they claim."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save as save_bytes
from safetensors.torch import load_file, save_file

from headrace.core.errors import CheckpointError, UnsupportedModel
from headrace.weights.safetensors import MAX_HEADER, SafetensorsFile

F32 = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
WORD = b"\0" * 4


def file_of(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def write(folder: Path, content: bytes) -> Path:
    path = folder / "x.safetensors"
    path.write_bytes(content)
    return path


def test_round_trip_with_the_library(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"{dtype}.{index}".removeprefix("torch."): torch.randn(shape, generator=generator).to(dtype)
        for dtype in (torch.float32, torch.float16, torch.bfloat16)
        for index, shape in enumerate([(), (7,), (3, 5), (2, 3, 4), (0, 4)])
    } | {"ids": torch.arange(3), "mask": torch.tensor([True, False])}
    path = tmp_path / "x.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    file = SafetensorsFile(path)
    assert file.metadata == {"format": "pt"}
    assert set(file.names) == set(load_file(path)) == set(tensors)
    assert file.nbytes == sum(tensor.nbytes for tensor in tensors.values())
    for name, tensor in tensors.items():
        assert file.shape(name) == tuple(tensor.shape)
        if name in ("ids", "mask"):
            continue
        read = file.tensor(name)
        assert read.scheme == {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}[name.split(".")[0]]
        expected = tensor.to(torch.float32).numpy()
        assert read.dequantise().shape == expected.shape and read.dequantise().tobytes() == expected.tobytes()
    with pytest.raises(UnsupportedModel, match=r"'ids' is I64, supported: F32, F16, BF16"):
        file.tensor("ids")
    with pytest.raises(UnsupportedModel, match=r"'mask' is BOOL"):
        file.tensor("mask")


def test_a_tensor_is_a_read_only_view_and_outlives_close(tmp_path: Path) -> None:
    path = write(tmp_path, save_bytes({"a": np.arange(6, dtype=np.float32), "b": np.zeros(2, np.float16)}))
    file = SafetensorsFile(path)
    first = file.tensor("a").planes["data"]
    assert np.shares_memory(first, file.raw("a")) and np.shares_memory(first, file.tensor("a").planes["data"])
    assert not first.flags.writeable
    file.close()
    assert first.tolist() == [0, 1, 2, 3, 4, 5]
    with pytest.raises(ValueError, match="closed"):
        file.tensor("a")


def test_only_what_is_asked_for_is_read(tmp_path: Path) -> None:
    # A file of 1 TiB, all but a few bytes of it a hole: reading it whole would never end.
    size = 2**40
    header = json.dumps(
        {
            "hole": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]},
            "end": {"dtype": "F32", "shape": [1], "data_offsets": [size, size + 4]},
        }
    ).encode()
    path = write(tmp_path, file_of(header))
    with path.open("r+b") as out:
        out.seek(8 + len(header) + size)
        out.write(struct.pack("<f", 2.5))
    assert SafetensorsFile(path).tensor("end").dequantise().tolist() == [2.5]


@pytest.mark.parametrize(
    "content",
    [
        file_of({"a": F32}, WORD),
        file_of({"a": F32 | {"more": 1}}, WORD),
        file_of({}),
        file_of(b" " + json.dumps({"a": F32}).encode() + b"   ", WORD),
        file_of({"__metadata__": None, "a": F32}, WORD),
        file_of({"a": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}, "b": F32}, WORD),
        file_of({"a": {"dtype": "F4", "shape": [8], "data_offsets": [0, 4]}}, WORD),
        file_of({"a": {"dtype": "F32", "shape": [2**50, 0], "data_offsets": [0, 0]}}),
    ],
)
def test_odd_but_valid(tmp_path: Path, content: bytes) -> None:
    expected = {name: info["shape"] for name, info in deserialize(content)}
    file = SafetensorsFile(write(tmp_path, content))
    assert {name: list(file.shape(name)) for name in file.names} == expected
    for name in file.names:
        if file.dtype(name) == "F32":
            assert list(file.tensor(name).dequantise().shape) == expected[name]


def entry(**changes: object) -> dict[str, Any]:
    return {"w": F32 | changes}


NESTED = b'{"w":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
BAD: Mapping[str, tuple[bytes, str]] = {
    "empty file": (b"", "empty"),
    "seven bytes": (b"\0" * 7, "header length"),
    "header past the file": (file_of({"w": F32}, WORD, length=2**20), "header length 1048576"),
    "header over the bound": (file_of({"w": F32}, WORD, length=MAX_HEADER + 1), "header length 100000001"),
    "header of 2^64 - 1": (file_of({"w": F32}, WORD, length=2**64 - 1), "header length 18446744073709551615"),
    "header of no bytes": (file_of(b""), "header: not valid JSON"),
    "not JSON": (file_of(b"{w}"), "header: not valid JSON"),
    "not UTF-8": (file_of(b'{"\xff":1}'), "header: not UTF-8 at byte 2"),
    "a list": (file_of([]), "header: holds a JSON list"),
    "nested too deeply": (file_of(NESTED), "header: JSON nested too deeply"),
    "brackets without end": (file_of(b'{"w":[' + b"[]," * 2**20), "header holds 1048577 of '\\['"),
    "objects without end": (file_of(b'{"w":[' + b"{}," * 2**20), "header holds 1048577 of '{'"),
    "a number of 5,000 digits": (file_of(b'{"w":' + b"9" * 5000 + b"}"), "header: not valid JSON"),
    "name twice": (file_of(b'{"w":%s,"w":%s}' % ((json.dumps(F32).encode(),) * 2), WORD), "'w' is there twice"),
    "key twice in an entry": (
        file_of(b'{"w":{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}}', WORD),
        "'dtype' is there twice",
    ),
    "name of half a surrogate": (file_of(b'{"\\ud800":%s}' % json.dumps(F32).encode(), WORD), r"'\\ud800'.*Unicode"),
    "metadata not strings": (file_of({"__metadata__": {"a": 1}} | entry(), WORD), "__metadata__"),
    "entry not an object": (file_of({"w": 3}), "'w': got 3"),
    "entry without dtype": (file_of({"w": {"shape": [1], "data_offsets": [0, 4]}}, WORD), "'w': dtype: got None"),
    "unknown dtype": (file_of(entry(dtype="F33"), WORD), "'w': dtype: got 'F33'"),
    "dtype not text": (file_of(entry(dtype=["F32"]), WORD), "'w': dtype"),
    "shape not a list": (file_of(entry(shape=1), WORD), "'w': shape: got 1"),
    "shape negative": (file_of(entry(shape=[-1]), WORD), "'w': shape"),
    "shape of floats": (file_of(entry(shape=[1.0]), WORD), "'w': shape"),
    "shape of bools": (file_of(entry(shape=[True]), WORD), "'w': shape"),
    "33 dimensions": (file_of(entry(shape=[1] * 33), WORD), "'w': shape"),
    "offsets missing": (file_of({"w": {"dtype": "F32", "shape": [1]}}, WORD), "'w': data_offsets: got None"),
    "three offsets": (file_of(entry(data_offsets=[0, 4, 8]), WORD), "'w': data_offsets"),
    "offsets backwards": (file_of(entry(data_offsets=[4, 0]), WORD), r"'w': data_offsets \[4, 0\] are not inside"),
    "offsets past the file": (file_of(entry(data_offsets=[0, 8], shape=[2]), WORD), "'w': data_offsets .* not inside"),
    "product past 64 bits": (file_of(entry(shape=[2**62, 4])), "'w'.*not inside|'w': shape .* overflows"),
    "product past 64 bits, then zero": (
        file_of(entry(shape=[2**62, 4, 0], data_offsets=[0, 0])),
        "'w': shape .* overflows 64 bits",
    ),
    "size is not the span": (file_of(entry(shape=[2]), WORD), "'w': F32 .* takes 8 bytes, data_offsets span 4"),
    "half a byte": (file_of(entry(dtype="F4", shape=[7]), WORD), "'w': F4 .* takes 3.5 bytes"),
    "overlap": (
        file_of({"v": F32, "w": F32 | {"shape": [1], "data_offsets": [2, 6]}}, WORD * 2),
        "'w' overlaps the tensor before it",
    ),
    "the same bytes twice": (file_of({"v": F32, "w": F32}, WORD), "'w' overlaps"),
    "gap": (file_of({"w": F32 | {"data_offsets": [4, 8]}}, WORD * 2), "'w' leaves a gap"),
    "bytes at the end": (file_of(entry(), WORD + b"x"), "1 bytes after the last tensor"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_file_is_a_checkpoint_error(tmp_path: Path, kind: str) -> None:
    content, words = BAD[kind]
    with pytest.raises(CheckpointError, match=words) as caught:
        SafetensorsFile(write(tmp_path, content))
    message = str(caught.value)
    assert "x.safetensors" in message and "\n" not in message and len(message) < 400


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "none", tmp_path, tmp_path / "pipe"):
        with pytest.raises(CheckpointError, match=path.name):
            SafetensorsFile(path)


@given(data=st.data())
def test_damage_gives_a_coded_error_or_what_the_library_gives(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    whole = bytearray(save_bytes({"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(3, np.float16)}))
    kind = data.draw(st.sampled_from(["flip", "cut", "splice"]))
    at = data.draw(st.integers(0, len(whole) - 1))
    if kind == "flip":
        whole[at] ^= 1 << data.draw(st.integers(0, 7))
    elif kind == "cut":
        del whole[at:]
    else:
        whole[at : at + data.draw(st.integers(0, 8))] = data.draw(st.binary(max_size=8))
    path = write(tmp_path_factory.getbasetemp(), bytes(whole))
    try:
        file = SafetensorsFile(path)
        found = {name: file.raw(name).tobytes() for name in file.names}
        for name in file.names:
            file.tensor(name).dequantise()
    except UnsupportedModel:
        return
    except CheckpointError:
        return
    try:
        expected = {name: bytes(info["data"]) for name, info in deserialize(bytes(whole))}
    except SafetensorError as error:
        pytest.fail(f"read what the library refuses: {error}")
    assert found == expected
