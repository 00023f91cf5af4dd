"""What an answer may depend on beside its request: the model, the build, the settings that shape numbers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headrace import __version__
from headrace.core.errors import ConfigError, shorten
from headrace.engine.model import OpenModel

TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"),
    *("chat_template.jinja", "chat_template.json", "generation_config.json"),
)


@dataclass(frozen=True, slots=True)
class ModelIdentity:
    """Of a model with its settings."""

    settings: Mapping[str, Any]
    """Everything beside a request that an answer may depend on."""
    served: tuple[str, ...]
    """The names of the model that a body may use; the first is said where it uses none."""
    digest: str
    """SHA-256 (hex) of the settings."""

    @property
    def system_fingerprint(self) -> str:
        return f"fp_{self.digest[:12]}"


def identify_model(opened: OpenModel) -> ModelIdentity:
    """Of this model with these settings. Raises ConfigError if an adapter has the model's name."""
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
        # A CPU's identity is what it was before there was another device.
        **({} if config.device == "cpu" else {"device": config.device, "batch_invariant": config.batch_invariant}),
        **({} if opened.requested.prompt_form == "auto" else {"prompt_form": opened.requested.prompt_form}),
        "adapters": {adapter.name: adapter.fingerprint for adapter in opened.adapters.values()},
    }
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    own = (name, typed, name.removesuffix(".gguf"))
    for adapter in opened.adapters:
        if adapter in own:
            raise ConfigError(f"adapter: {shorten(adapter)} is the model's own name, allowed: another one")
    served = tuple(dict.fromkeys((*own, *sorted(opened.adapters))))
    return ModelIdentity(settings, served, digest)


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
