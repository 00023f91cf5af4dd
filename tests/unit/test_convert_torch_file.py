"""What torch.save writes, read without torch; and what a pickle may not do. And the writer of safetensors."""

from __future__ import annotations

import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from headrace.core.errors import CheckpointError, HeadraceError, UnsupportedModel
from headrace.weights import torch_file
from headrace.weights.qtensor import QTensor
from headrace.weights.safetensors import SafetensorsFile
from headrace.weights.safetensors_writer import write_safetensors
from headrace.weights.torch_file import StoredTensor, TorchCheckpoint, TorchFile


def saved(path: Path, value: object, **settings: Any) -> TorchFile:
    torch.save(value, path / "x.pt", **settings)
    return TorchFile(path / "x.pt")


def rewritten(path: Path, change: Callable[[str, bytes], bytes | None], compress: int = zipfile.ZIP_STORED) -> Path:
    """The file of `saved` with its entries changed, or left out."""
    with zipfile.ZipFile(path / "x.pt") as old, zipfile.ZipFile(path / "y.pt", "w", compress) as new:
        for entry in old.infolist():
            data = change(entry.filename, old.read(entry))
            if data is not None:
                new.writestr(entry.filename, data)
    return path / "y.pt"


def with_pickle(path: Path, program: bytes) -> Path:
    return rewritten(path, lambda name, data: program if name.endswith("data.pkl") else data)


def same(found: StoredTensor, expected: torch.Tensor) -> bool:
    plain = expected.detach().contiguous()
    raw = plain.view(torch.int16).numpy().view(np.uint16) if plain.dtype == torch.bfloat16 else plain.numpy()
    return found.data.shape == raw.shape and found.data.tobytes() == raw.tobytes()


def test_every_type_and_layout(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(4, 5, 6, generator=generator)
    tensors = {str(kind): base.to(kind) for kind in (torch.float32, torch.float16, torch.bfloat16, torch.float64)}
    tensors |= {str(kind): torch.arange(5).to(kind) for kind in (torch.int64, torch.int32, torch.int16, torch.int8)}
    tensors |= {
        "bytes": torch.arange(5, dtype=torch.uint8),
        "flags": torch.tensor([True, False]),
        "transposed": base.transpose(0, 2),
        "part": base[1:3, :, ::2],
        "again": base,
        "empty": torch.empty(0, 3),
        "number": torch.tensor(3.5),
        "parameter": torch.nn.Parameter(base[0]),
    }
    found = saved(tmp_path, tensors).root
    assert isinstance(found, dict) and found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert same(found[name], tensor), name
        assert not found[name].data.size or not found[name].data.flags.writeable


def test_what_stands_beside_tensors(tmp_path: Path) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2))
    whole = {"model": module.state_dict(), "step": 7, "rate": 0.5, "names": ["a", None, True], "at": (1, 2, 3, -4)}
    found = saved(tmp_path, whole).root
    assert isinstance(found, dict)
    assert {name: found[name] for name in ("step", "rate", "names", "at")} == {
        name: whole[name] for name in ("step", "rate", "names", "at")
    }
    assert all(same(found["model"][name], tensor) for name, tensor in module.state_dict().items())
    assert list(found["model"]) == list(module.state_dict())


def test_optimizer_state(tmp_path: Path) -> None:
    module = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(module.parameters())
    module(torch.ones(3)).sum().backward()
    optimizer.step()
    found = saved(tmp_path, {"model": module.state_dict(), "optimizer": optimizer.state_dict()}).root
    assert isinstance(found, dict) and set(found["optimizer"]) == {"state", "param_groups"}


class Ran:
    """What a hostile pickle would call."""

    def __init__(self, call: tuple[Any, ...]) -> None:
        self.call = call

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


@pytest.mark.parametrize(
    ("call", "named"),
    [
        ((exec, ("raise SystemExit",)), "exec"),
        ((getattr, ({}, "keys")), "getattr"),
        ((torch.load, ("x",)), "torch.serialization load"),
        ((OrderedDict.fromkeys, ("ab",)), "getattr"),
        ((Path, ("x",)), "pathlib"),
        ((np.arange, (3,)), "numpy"),
    ],
)
def test_code_is_refused(tmp_path: Path, call: tuple[Any, ...], named: str) -> None:
    with pytest.raises(UnsupportedModel, match=rf"data.pkl names '.*{named}.*', which may run code"):
        saved(tmp_path, {"model": {"a": torch.ones(2), "b": Ran(call)}})


def test_a_module_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match=r"torch.nn.modules.linear Linear"):
        saved(tmp_path, torch.nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("program", "error", "message"),
    [
        (b"", CheckpointError, "pickle exhausted"),
        (b"\x80\x02}", CheckpointError, "pickle exhausted"),
        (b"\x80\x02.", CheckpointError, "not a sound pickle"),
        (b"\xff.", CheckpointError, "opcode"),
        (b"\x80\x02h\x05.", CheckpointError, "not a sound pickle"),
        (b"\x80\x02u.", CheckpointError, "not a sound pickle"),
        (b"\x80\x02}]K\x01s.", CheckpointError, "not a sound pickle"),
        (b"\x80\x02}(K\x01u.", CheckpointError, "not a sound pickle"),
        (b"\x80\x02K\x01)R.", CheckpointError, "a call that torch.save does not write"),
        (b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)R.", CheckpointError, "a call that torch.save"),
        (b"\x80\x02K\x01}b.", CheckpointError, "attributes of what is no dictionary"),
        (b"\x80\x02K\x01Q.", CheckpointError, "storage is not described"),
        (b"\x80\x02cos\nsystem\n.", UnsupportedModel, "os system"),
        (b"\x80\x02(ios\nsystem\n.", UnsupportedModel, "INST"),
        (b"\x80\x02}\x81.", UnsupportedModel, "NEWOBJ"),
        (b"\x80\x02\x82\x01.", UnsupportedModel, "EXT1"),
        (b"\x80\x04\x8c\x02os\x8c\x06system\x93.", UnsupportedModel, "SHORT_BINUNICODE"),
        (b"\x80\x02Pabc\n.", UnsupportedModel, "PERSID"),
    ],
)
def test_unsound_programs(tmp_path: Path, program: bytes, error: type[HeadraceError], message: str) -> None:
    saved(tmp_path, {"a": torch.ones(2)})
    with pytest.raises(error, match=message):
        TorchFile(with_pickle(tmp_path, program))


def test_a_pickle_may_hold_itself(tmp_path: Path) -> None:
    saved(tmp_path, {})
    assert isinstance(TorchFile(with_pickle(tmp_path, b"\x80\x02}q\x00K\x01h\x00s.")).root, dict)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ((6, (2, 3), (3, 1), 0), (6, (3, 3), (3, 1), 0)),
        ((6, (2, 3), (3, 1), 0), (6, (2, 3), (4, 1), 0)),
        ((6, (2, 3), (3, 1), 0), (6, (2, 3), (3, 1), 1)),
        ((6, (2, 3), (3, 1), 0), (6, (2, 3), (3, -1), 3)),
        ((6, (2, 3), (3, 1), 0), (6, (-2, 3), (3, 1), 0)),
        ((6, (2, 3), (3, 1), 0), (6, (2, 3), (3,), 0)),
        ((6, (2, 3), (3, 1), 0), (6, (2, 3), (3, 2**62), 0)),
        ((6, (2, 3), (3, 1), 0), (7, (2, 3), (3, 1), 0)),
        ((6, (2, 3), (3, 1), 0), (6, (2, 3.0), (3, 1), 0)),
        ((6, (2, 3), (3, 1), 0), (6, (2, True), (3, 1), 0)),
        ((6, (2, 3), (3, 1), 0), (6, (2, 2**40), (3, 0), 0)),
    ],
)
def test_a_tensor_stays_inside_its_storage(tmp_path: Path, old: Any, new: Any) -> None:
    saved(tmp_path, {"a": torch.ones(2, 3)})

    def tensor(count: int, shape: object, strides: object, offset: int) -> bytes:
        parts = (b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu", count)
        numbers = [pickle.dumps(one, 2)[2:-1] for one in (parts[1], offset, shape, strides)]
        head = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(" + parts[0] + numbers[0] + b"tQ"
        return head + numbers[1] + numbers[2] + numbers[3] + b"\x89ccollections\nOrderedDict\n)RtR."

    good = TorchFile(with_pickle(tmp_path, tensor(*old))).root
    assert isinstance(good, StoredTensor) and good.data.tolist() == [[1, 1, 1], [1, 1, 1]]
    with pytest.raises(CheckpointError, match="not a sound pickle"):
        TorchFile(with_pickle(tmp_path, tensor(*new)))


def test_what_is_no_such_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.pt"
    with pytest.raises(CheckpointError, match="no such file"):
        TorchFile(path)
    path.write_bytes(b"not a zip at all")
    with pytest.raises(CheckpointError, match=r"not a zip as torch.save writes it since torch 1.6"):
        TorchFile(path)
    with pytest.raises(CheckpointError, match="not a zip"):
        saved(tmp_path, {"a": torch.ones(2)}, _use_new_zipfile_serialization=False)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/b", b"")
    with pytest.raises(CheckpointError, match=r"a zip with 0 data\.pkl"):
        TorchFile(path)
    saved(tmp_path, {"a": torch.ones(2)})
    with pytest.raises(UnsupportedModel, match=r"data.pkl' is compressed, torch.save does not"):
        TorchFile(rewritten(tmp_path, lambda name, data: data, zipfile.ZIP_DEFLATED))
    with pytest.raises(UnsupportedModel, match="byteorder"):
        TorchFile(rewritten(tmp_path, lambda name, data: b"big" if name.endswith("byteorder") else data))
    with pytest.raises(CheckpointError, match="storage is not described"):
        TorchFile(rewritten(tmp_path, lambda name, data: None if name.endswith("data/0") else data))
    with pytest.raises(CheckpointError, match="are said to be 2 f32"):
        TorchFile(rewritten(tmp_path, lambda name, data: data[:4] if name.endswith("data/0") else data))
    monkeypatch.setattr(torch_file, "MAX_PICKLE", 8)
    with pytest.raises(CheckpointError, match=r"data.pkl has \d+ bytes, allowed: up to 8"):
        TorchFile(path)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_damage_is_an_error_with_a_code_or_nothing(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    torch.save({"model": {"a": torch.ones(3, 4), "b": [torch.zeros(2)]}, "n": 5}, folder / "x.pt")
    with zipfile.ZipFile(folder / "x.pt") as archive:
        program = bytearray(archive.read("x/data.pkl"))
    for _ in range(data.draw(st.integers(1, 4))):
        program[data.draw(st.integers(0, len(program) - 1))] = data.draw(st.integers(0, 255))
    try:
        TorchFile(with_pickle(folder, bytes(program)))
    except HeadraceError as error:
        assert len(str(error)) < 400


def test_a_checkpoint_of_such_tensors(tmp_path: Path) -> None:
    file = saved(tmp_path, {"a": torch.ones(2, 3), "ids": torch.arange(3)})
    assert isinstance(file.root, dict)
    checkpoint = TorchCheckpoint(file, {"model_type": "x"}, file.root)
    assert checkpoint.shapes() == {"a": (2, 3), "ids": (3,)} and checkpoint.names() == ("a", "ids")
    assert checkpoint.tensor("a").dequantise().tolist() == [[1, 1, 1], [1, 1, 1]]
    with pytest.raises(UnsupportedModel, match="'ids' is i64, supported: f32, f16, bf16"):
        checkpoint.tensor("ids")
    with pytest.raises(CheckpointError, match="no tensor 'b'"):
        checkpoint.tensor("b")
    assert len(checkpoint.fingerprint()) == 64
    checkpoint.drop_pages()
    checkpoint.close()
    assert checkpoint.tensor("a").dequantise().sum() == 6


# ---------------------------------------------------------------- the writer


def test_writer_round_trip(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(3, 5, generator=generator)
    tensors = {
        "half": base.half(),
        "brain": base.bfloat16(),
        "plain": base,
        "turned": base.T,
        "empty": torch.empty(0, 4),
        "number": torch.tensor(2.5),
        "ä": torch.ones(1),
    }
    file = saved(tmp_path, tensors)
    assert isinstance(file.root, dict)
    checkpoint = TorchCheckpoint(file, {}, file.root)
    heard: list[str] = []
    path = tmp_path / "out.safetensors"
    write_safetensors(path, {name: checkpoint.tensor(name) for name in tensors}, {"format": "pt"}, heard.append)
    assert sorted(heard) == sorted(tensors) and [one.name for one in tmp_path.glob("*.partial")] == []
    theirs, ours = load_file(path), SafetensorsFile(path)
    assert ours.metadata == {"format": "pt"} and set(ours.names) == set(tensors)
    for name, tensor in tensors.items():
        assert theirs[name].dtype == tensor.dtype and torch.equal(theirs[name], tensor)
        assert ours.tensor(name).dequantise().tobytes() == tensor.float().contiguous().numpy().tobytes()


def test_writer_refuses(tmp_path: Path) -> None:
    packed = QTensor.from_bytes("q8_0", (1, 32), np.zeros(34, np.uint8))
    for tensors, message in (
        ({"a": packed}, "a tensor of q8_0 cannot be written, allowed: f32, f16, bf16"),
        ({"__metadata__": QTensor.from_array(np.zeros(1, np.float32))}, "cannot be the name"),
        ({"\ud800": QTensor.from_array(np.zeros(1, np.float32))}, "surrogates"),
    ):
        with pytest.raises(ValueError, match=message):
            write_safetensors(tmp_path / "x.safetensors", tensors)
    assert list(tmp_path.iterdir()) == []


def test_writer_leaves_nothing_half(tmp_path: Path) -> None:
    def fail(name: str) -> None:
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_safetensors(tmp_path / "x", {"a": QTensor.from_array(np.zeros(1, np.float32))}, None, fail)
    assert list(tmp_path.iterdir()) == []
