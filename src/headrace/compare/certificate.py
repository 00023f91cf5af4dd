"""Lossless certificate: a JSON file with which somebody else can run a comparison again and see whether it was true.

It says: this method gave exactly the reference's tokens for these prompts, with these weights, on this class of
machine. It holds the whole workload, hashes of the weights and of every answer, and a seal for each of its parts, so
that a part that was changed later can be named. Seals prove nothing against somebody who seals a changed part anew:
truth comes from running it again (`compare.check`), not from who wrote it, and so there is no signature either.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from headrace.backends.base import Backend
from headrace.compare.machine import Machine
from headrace.compare.verdict import Epsilon, RequestVerdict, method_verdict
from headrace.compare.workloads import Workload
from headrace.core.config import ResolvedConfig
from headrace.core.errors import CheckpointError
from headrace.weights.checkpoint import Checkpoint, read_json
from headrace.weights.hub import INDEX, SINGLE

FORMAT = "headrace-certificate/1"
SEALED = "sealed"
"""The field that holds the seals of all others."""
SCOPE = (
    "A machine of the same class (CPU, instruction set, system, and versions of headrace and its libraries) must give "
    "every answer bit for bit, with any number of threads. On another one an answer may differ only where the margin "
    "between the reference's two largest logits is below epsilon."
)
CUDA_SCOPE = (
    "A machine of the same class (GPU, system, and versions of headrace and its libraries) must give every answer bit "
    "for bit where both configurations are batch_invariant. Otherwise, and on another machine, an answer may differ "
    "only where the margin between the reference's two largest logits is below epsilon."
)
"""Of answers that were computed on a GPU."""
ARITHMETIC = ("backend", "dtype", "quant", "kv_dtype")
"""Settings that decide the bits of a row."""
CUDA_ARITHMETIC = ("device", "batch_invariant")
"""Those that do on a GPU; a certificate of a CPU has none of them."""
SCHEDULE = ("block_size", "max_model_len", "max_num_seqs", "max_num_batched_tokens")
"""Settings that decide which rows share a step. The number of KV blocks is left out: it follows the free memory; and
the prefix cache, which is off in every comparison."""
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.jinja",
    "chat_template.json",
)
"""What is read of a folder to make tokens of text and to know which of them end an answer."""

Progress = Callable[[str], None]


def canonical(value: object) -> bytes:
    """JSON in one form only: sorted keys, no spaces, ASCII. Raises ValueError for a number that is not finite."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _packed(token_ids: Sequence[int]) -> bytes:
    return struct.pack(f"<{len(token_ids) + 1}I", len(token_ids), *token_ids)


def tokens_sha256(token_ids: Sequence[int]) -> str:
    """SHA-256 of the number of tokens and of their ids, each a little-endian u32."""
    return _sha256(_packed(token_ids))


def prompts_sha256(prompts: Sequence[Sequence[int]]) -> str:
    """SHA-256 of the number of prompts (little-endian u32), and then of each its length and ids as in a token list."""
    return _sha256(struct.pack("<I", len(prompts)) + b"".join(map(_packed, prompts)))


@dataclass(frozen=True, slots=True)
class WeightsFile:
    """A file that the model is read from."""

    name: str
    nbytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Weights:
    """All bytes of a model's weights and description."""

    files: tuple[WeightsFile, ...]
    fingerprint: str
    """`Checkpoint.fingerprint`: what reports and caches call these weights by. It covers a part of the bytes only."""

    @property
    def sha256(self) -> str:
        """Over the sorted list of (name, hash), a line `HASH  NAME` each (as sha256sum writes it)."""
        lines = sorted((one.name, one.sha256) for one in self.files)
        return _sha256("".join(f"{digest}  {name}\n" for name, digest in lines).encode())

    def as_json(self) -> dict[str, Any]:
        files = [{"name": one.name, "bytes": one.nbytes, "sha256": one.sha256} for one in self.files]
        return {"files": files, "sha256": self.sha256, "fingerprint": self.fingerprint}


def hash_weights(checkpoint: Checkpoint, progress: Progress) -> Weights:
    """Reads every byte of the files that the checkpoint is read from. Raises CheckpointError."""
    files = []
    for path in weight_paths(checkpoint):
        progress(f"hashing {path.name}")
        files.append(WeightsFile(_printable(path.name), *_hash_file(path)))
    return Weights(tuple(files), checkpoint.fingerprint())


def weight_paths(checkpoint: Checkpoint) -> tuple[Path, ...]:
    """The GGUF file; of a folder config.json, and model.safetensors or else the index and its shards."""
    folder = checkpoint.path
    if checkpoint.format == "gguf":
        return (folder,)
    names = ["config.json", SINGLE]
    if not (folder / SINGLE).exists():
        homes = cast("Mapping[str, str]", read_json(folder / INDEX)["weight_map"])
        names = ["config.json", INDEX, *sorted(set(homes.values()))]
    return tuple(folder / name for name in names)


def _hash_file(path: Path) -> tuple[int, str]:
    """(bytes, SHA-256 in hex)"""
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            return file.tell(), digest
    except OSError as error:
        raise CheckpointError(f"{_printable(path.name)}: cannot be read: {error.strerror}") from error


def _printable(name: str) -> str:
    """A file name need not be valid text."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def tokenizer_sha256(checkpoint: Checkpoint) -> str | None:
    """Of a folder: SHA-256 over the lines `HASH  NAME` of its `TOKENIZER_FILES`; of a GGUF file: over its metadata
    below `tokenizer.` as JSON with sorted keys. None: it has nothing of the kind. Raises CheckpointError."""
    if checkpoint.format == "gguf":
        found = {name: value for name, value in checkpoint.config.items() if name.startswith("tokenizer.")}
        return _sha256(json.dumps(found, sort_keys=True, default=_listed).encode("ascii")) if found else None
    paths = [checkpoint.path / name for name in sorted(TOKENIZER_FILES) if (checkpoint.path / name).is_file()]
    lines = [f"{_hash_file(path)[1]}  {path.name}\n" for path in paths]
    return _sha256("".join(lines).encode()) if lines else None


def _listed(value: Any) -> list[Any]:
    """Long arrays of the metadata are not lists."""
    return cast("list[Any]", value.tolist())


def instructions_of(backend: Backend) -> tuple[str, ...]:
    """Instruction sets that a loaded backend computes with, as it calls them."""
    found = backend.probe().get("instructions")
    return (str(found).lower(),) if found else ()


@dataclass(frozen=True, slots=True)
class Side:
    """One of the two that were compared: the reference or the method."""

    name: str
    config: ResolvedConfig | None
    """None: an engine from outside."""
    outputs: Sequence[tuple[int, ...]]
    """Token ids of each answer, with the one that ended it; of several rounds, the one that its verdict is of."""
    finish_reasons: Sequence[str]
    """stop or length, of each of these answers."""

    def as_json(self) -> dict[str, Any]:
        return {"name": self.name, "config": config_of(self.config)}


def config_of(config: ResolvedConfig | None) -> dict[str, Any] | None:
    """What of a configuration may decide an answer; threads and instruction set are the machine's."""
    if config is None:
        return None
    on_gpu = CUDA_ARITHMETIC if config.device == "cuda" else ()
    return {name: getattr(config, name) for name in (*ARITHMETIC, *on_gpu, *SCHEDULE)}


@dataclass(frozen=True, slots=True)
class Setting:
    """What the answers were computed with."""

    machine: Machine
    instructions: Sequence[str]
    """`instructions_of` the backend."""
    threads: int
    on_gpu: bool = False
    """Whether the answers were computed on the machine's GPU."""

    def machine_json(self) -> dict[str, Any]:
        return {
            "cpu": self.machine.cpu,
            "isa": list(self.instructions),
            "system": self.machine.system,
            "threads": self.threads,
            "gpu": self.machine.gpu if self.on_gpu else None,
        }

    def versions_json(self) -> dict[str, Any]:
        return {"python": self.machine.python, **self.machine.libraries}


def certificate(
    *,
    created: str,
    model_name: str,
    weights: Weights,
    tokenizer: str | None,
    workload: Workload,
    reference: Side,
    method: Side,
    verdicts: Sequence[RequestVerdict],
    margins: Sequence[Sequence[float]],
    epsilon: Epsilon,
    setting: Setting,
) -> dict[str, Any]:
    """The certificate of one method as a JSON object without NaN.

    `created`: date and time, UTC. `tokenizer`: `tokenizer_sha256`. `verdicts`: one a request, `worst_of_rounds`; the
    answers of `method` are of the rounds that they name.
    `margins`: for every token of the reference's answers, the difference of its two largest logits there.
    """
    lengths = [one.max_tokens for one in workload.requests]
    found: dict[str, Any] = {
        "format": FORMAT,
        "created": created,
        "scope": CUDA_SCOPE if setting.on_gpu else SCOPE,
        "model": model_name,
        "weights": weights.as_json(),
        "tokenizer_sha256": tokenizer,
        "prompts": {
            "count": len(workload.prompts),
            "sha256": prompts_sha256(workload.prompts),
            "ids_included": True,
        },
        "sampling": {"temperature": 0, "max_tokens": max(lengths), "ignore_eos": workload.ignore_eos},
        "workload": workload.manifest(),
        "reference": reference.as_json(),
        "method": method.as_json(),
        "versions": setting.versions_json(),
        "machine": setting.machine_json(),
        "results": [
            {
                "prompt": index,
                "prompt_sha256": tokens_sha256(prompt),
                "tokens": len(method.outputs[index]),
                "token_ids": list(method.outputs[index]),
                "sha256": tokens_sha256(method.outputs[index]),
                "reference_sha256": tokens_sha256(reference.outputs[index]),
                "reference_token_ids": None if verdict.token is None else list(reference.outputs[index]),
                "finish_reason": method.finish_reasons[index],
                "verdict": str(verdict.kind),
                "at": verdict.token,
                "margin": verdict.margin,
            }
            for index, (prompt, verdict) in enumerate(zip(workload.prompts, verdicts, strict=True))
        ],
        "verdict": str(method_verdict(verdicts).kind),
        "epsilon": {"value": epsilon.value, "positions": epsilon.positions, "source": epsilon.source},
        "margin": margin_summary(margins, epsilon.value),
    }
    return found | {SEALED: seals(found)}


def margin_summary(margins: Sequence[Sequence[float]], epsilon: float) -> dict[str, Any]:
    """How far the reference's answers are from a tie: over all their positions the smallest margin, the 1st percentile
    (nearest rank), how many are 0 and how many below `epsilon`; logits."""
    values = sorted(value for answer in margins for value in answer)
    return {
        "positions": len(values),
        "min": values[0] if values else None,
        "p01": values[max(0, math.ceil(len(values) / 100) - 1)] if values else None,
        "tied_positions": sum(value == 0 for value in values),
        "near_tied_positions": sum(value < epsilon for value in values),
    }


def seals(found: Mapping[str, Any]) -> dict[str, str]:
    """Path of each part -> SHA-256 of its canonical JSON. Objects are parts of their fields; lists of objects, of their
    entries."""
    return {path: _sha256(canonical(value)) for path, value in parts(found) if path.partition(".")[0] != SEALED}


def parts(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(path, value) of each part, paths written `machine.threads`, `results.3`."""
    begin = f"{path}." if path else ""
    if isinstance(value, dict) and value:
        for name, inner in value.items():
            yield from parts(inner, f"{begin}{name}")
    elif isinstance(value, list) and value and all(isinstance(entry, dict) for entry in value):
        for index, entry in enumerate(value):
            yield f"{begin}{index}", entry
    else:
        yield path, value
