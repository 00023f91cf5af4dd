"""What makes two runs the same run, and the ids and seeds that follow from it.

Nothing is drawn: ids are hashes of the settings and of the input line, seeds of the line alone, `created` is the time
the input was last changed. So a line computed again gives the same bytes, and two runs can be compared with `cmp`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headrace import __version__
from headrace.batch.lines import InputFile, RawLine
from headrace.core.errors import ConfigError, shorten
from headrace.engine.model import OpenModel

TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"),
    *("chat_template.jinja", "chat_template.json", "generation_config.json"),
)


@dataclass(frozen=True, slots=True)
class Identity:
    """Of one run over one input."""

    settings: Mapping[str, Any]
    """Everything beside the input that an answer may depend on."""
    served: tuple[str, ...]
    """The names of the model that a body may use; the first is said where it uses none."""
    digest: str
    """SHA-256 (hex) of the settings."""

    @property
    def system_fingerprint(self) -> str:
        return f"fp_{self.digest[:12]}"

    def manifest(self, source: InputFile) -> dict[str, Any]:
        """What the journal begins with."""
        return {"settings": dict(self.settings), "input_sha256": source.sha256, "created": source.mtime_s}

    def line_id(self, line: RawLine) -> str:
        """24 hex digits; different for each line of the file."""
        return self._hash("line", line)[:24]

    def answer_id(self, line: RawLine) -> str:
        """32 hex digits, for the body."""
        return self._hash("answer", line)[:32]

    def request_id(self, line: RawLine) -> str:
        return "req_" + self._hash("request", line)[:32]

    def _hash(self, what: str, line: RawLine) -> str:
        text = f"{what} {self.digest} {line.index} ".encode()
        return hashlib.sha256(text + line.digest).hexdigest()


def line_seed(line: RawLine) -> int:
    """The seed of a line that draws and names none: of the line alone, so it stays when lines around it change."""
    return int.from_bytes(hashlib.sha256(b"seed " + line.digest).digest()[:8], "little", signed=True)


def identify(opened: OpenModel) -> Identity:
    """Of a run with this model and these settings. Raises ConfigError if an adapter has the model's name."""
    typed = opened.requested.model
    path = Path(typed)
    name = path.resolve().name if path.exists() else typed
    config = opened.config
    settings = {
        "headrace": __version__,
        "model": name,
        "weights": opened.checkpoint.fingerprint(),
        "tokenizer": _tokenizer_hash(opened),
        "backend": config.backend,
        "dtype": config.dtype,
        "quant": config.quant,
        "kv_dtype": config.kv_dtype,
        "instruction_set": config.instruction_set,
        "threads": config.threads,
        "max_model_len": config.max_model_len,
        "adapters": {adapter.name: adapter.fingerprint for adapter in opened.adapters.values()},
    }
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    own = (name, typed, name.removesuffix(".gguf"))
    for adapter in opened.adapters:
        if adapter in own:
            raise ConfigError(f"adapter: {shorten(adapter)} is the model's own name, allowed: another one")
    served = tuple(dict.fromkeys((*own, *sorted(opened.adapters))))
    return Identity(settings, served, digest)


def _tokenizer_hash(opened: OpenModel) -> str:
    """Of the files that turn text into ids and back; those of a GGUF file are in its header, and so in `weights`."""
    digest = hashlib.sha256()
    if opened.checkpoint.format != "gguf":
        for name in TOKENIZER_FILES:
            path = opened.checkpoint.path / name
            if path.is_file():
                with path.open("rb") as file:
                    digest.update(name.encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
