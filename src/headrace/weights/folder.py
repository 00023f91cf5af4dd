"""A Hugging Face folder as a checkpoint."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from headrace.core.errors import CheckpointError, UnsupportedModel, shorten
from headrace.weights.checkpoint import MAX_JSON, PICKLE_SUFFIXES, Checkpoint, file_identity
from headrace.weights.compressed import read_quantisation
from headrace.weights.files import parse_object, read_file
from headrace.weights.hub import INDEX, SINGLE
from headrace.weights.packed import ARRAY_TYPES
from headrace.weights.qtensor import QTensor
from headrace.weights.safetensors import SafetensorsFile


class _Shards:
    """The tensors as the files hold them: what `compressed.py` reads."""

    def __init__(self, files: Mapping[str, SafetensorsFile], homes: Mapping[str, str]) -> None:
        self._files, self._homes = files, homes

    def names(self) -> tuple[str, ...]:
        return tuple(self._homes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._files[self._homes[name]].shape(name)

    def dtype(self, name: str) -> str:
        return self._files[self._homes[name]].dtype(name)

    def array(self, name: str) -> NDArray[np.generic]:
        file = self._files[self._homes[name]]
        return file.raw(name).view(ARRAY_TYPES[file.dtype(name)]).reshape(file.shape(name))


class FolderCheckpoint(Checkpoint):
    """A folder with config.json, and model.safetensors or the shards that model.safetensors.index.json names.

    Where both are, model.safetensors is read (as transformers does). A quantised checkpoint has the names and shapes of
    the plain one: the tensors that make up one weight are read as that weight.
    """

    format = "hf"

    def __init__(self, path: Path) -> None:
        self.path = path
        self._config_bytes = read_file(path / "config.json", MAX_JSON)
        self.config = parse_object(self._config_bytes, "config.json")
        self._index_bytes = b""
        if (path / SINGLE).exists():
            self._files = {SINGLE: SafetensorsFile(path / SINGLE)}
            self._homes = dict.fromkeys(self._files[SINGLE].names, SINGLE)
        elif (path / INDEX).exists():
            self._read_index()
        else:
            raise self._no_weights()
        self.nbytes = sum(file.nbytes for file in self._files.values())
        self._raw = _Shards(self._files, self._homes)
        quantisation = read_quantisation(self.config, self._raw)
        self._packed, self.notes = quantisation.packed, quantisation.notes
        self._shapes = self._logical_shapes(quantisation.unused)

    def names(self) -> tuple[str, ...]:
        return tuple(self._shapes)

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._shapes

    def tensor(self, name: str) -> QTensor:
        if name not in self._shapes:
            raise CheckpointError(f"{shorten(self.path.name)}: no tensor {shorten(name)}")
        if name in self._packed:
            return self._packed[name].read()
        return self._files[self._homes[name]].tensor(name)

    def droppable(self, name: str) -> bool:
        """The biases of zeros that some programs write beside every packed weight."""
        module, _, part = name.rpartition(".")
        if part != "bias" or f"{module}.weight" not in self._packed or name not in self._shapes:
            return False
        return not self.tensor(name).dequantise().any()

    def drop_pages(self) -> None:
        for file in self._files.values():
            file.drop_pages()

    def close(self) -> None:
        for file in self._files.values():
            file.close()

    def _identity(self) -> Iterator[bytes]:
        yield self.format.encode()
        yield self._config_bytes
        yield self._index_bytes
        for file in self._files.values():
            yield from file_identity(file)

    def _logical_shapes(self, unused: frozenset[str]) -> dict[str, tuple[int, ...]]:
        """In the order of the files: a packed weight stands where the first of its tensors does."""
        first = {packed.sources[0]: name for name, packed in self._packed.items()}
        gone = unused.union(*(packed.sources for packed in self._packed.values())) - first.keys()
        shapes: dict[str, tuple[int, ...]] = {}
        for raw_name in self._homes:
            if raw_name in first:
                shapes[first[raw_name]] = self._packed[first[raw_name]].shape
            elif raw_name not in gone:
                shapes[raw_name] = self._raw.shape(raw_name)
        return shapes

    def _read_index(self) -> None:
        self._index_bytes = read_file(self.path / INDEX, MAX_JSON)
        homes = parse_object(self._index_bytes, INDEX, unique_keys=True).get("weight_map")
        if not isinstance(homes, dict) or not homes:
            raise CheckpointError(f"{INDEX}: weight_map: got {shorten(homes)}, allowed: an object, tensor -> file name")
        for name, home in homes.items():
            # A bare file name only: an index must not reach outside its folder. (The file may be a symlink.)
            if not isinstance(home, str) or not re.fullmatch(r"[^/\\\0]+\.safetensors", home):
                raise CheckpointError(
                    f"{INDEX}: tensor {shorten(name)}: file: got {shorten(home)}, "
                    "allowed: the name of a .safetensors file in the same folder"
                )
        shards = sorted(set(homes.values()))
        for shard in shards:
            if not (self.path / shard).is_file():
                raise CheckpointError(f"{INDEX}: the shard {shorten(shard)} is missing from the folder")
        self._files = {shard: SafetensorsFile(self.path / shard) for shard in shards}
        # Tensors a shard holds beside the index are listed too: the loader says whether they may be left over.
        self._homes = {
            name: shard for shard, file in self._files.items() for name in file.names if homes.get(name, shard) == shard
        }
        for name, home in homes.items():
            if self._homes.get(name) != home:
                raise CheckpointError(f"{INDEX}: tensor {shorten(name)} is not in its file {shorten(home)}")

    def _no_weights(self) -> Exception:
        where = shorten(self.path.name)
        try:
            pickled = sorted(file.name for file in self.path.iterdir() if file.suffix in PICKLE_SUFFIXES)
        except OSError as error:
            return CheckpointError(f"folder {where}: cannot be read: {error.strerror}")
        if pickled:
            return UnsupportedModel(
                f"folder {where}: weights are in {shorten(pickled[0])}, a pickle, which can run code; "
                f"supported: safetensors ({SINGLE} or {INDEX})"
            )
        return CheckpointError(f"folder {where}: no weights, needed: {SINGLE} or {INDEX}")
