"""Typed reads of a GGUF file's `tokenizer.*` keys, and what every kind of tokenizer reads alike."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from headrace.core.errors import CheckpointError, shorten

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
_TOKEN_TYPES = frozenset(range(7))  # 0 is undefined
_STOP_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")
_NAMED: Mapping[str, str] = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "pad_token": "padding_token_id",
    "unk_token": "unknown_token_id",
}


class Metadata:
    """Typed reads of the `tokenizer.*` keys; a wrong type raises CheckpointError naming file and key."""

    def __init__(self, metadata: Mapping[str, object], name: str) -> None:
        self.metadata = metadata
        self.name = name

    def fail(self, key: str, value: object, allowed: str) -> CheckpointError:
        return CheckpointError(f"{self.name}: {key} is {shorten(value)}, allowed: {allowed}")

    def strings(self, key: str) -> list[str]:
        value = self.metadata.get(key)
        items = _as_list(value)
        if items is None or not set(map(type, items)) <= {str}:
            raise self.fail(key, value, "a list of strings")
        return items

    def tokens(self) -> list[str]:
        """The vocabulary: at least one token, each once. An empty one gets a name that no text is likely to hold."""
        key = "tokenizer.ggml.tokens"
        tokens = self.strings(key)
        if not all(tokens):
            tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(tokens)]
        if not tokens:
            raise self.fail(key, [], "at least one token")
        if len(set(tokens)) != len(tokens):
            ids = {token: i for i, token in enumerate(tokens)}
            twice = next(token for i, token in enumerate(tokens) if ids[token] != i)
            raise self.fail(key, twice, "each token once")
        return tokens

    def text(self, key: str) -> str | None:
        value = self.metadata.get(key)
        if value is not None and not isinstance(value, str):
            raise self.fail(key, value, "a string")
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self.metadata.get(key, default)
        if not isinstance(value, bool):
            raise self.fail(key, value, "true or false")
        return value

    def token_id(self, key: str, vocab_size: int) -> int | None:
        value = self.metadata.get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < vocab_size:
            raise self.fail(key, value, f"a token id from 0 to {vocab_size - 1}")
        return value

    def token_types(self, vocab_size: int) -> list[int]:
        """One a token; all normal where the key is missing."""
        key = "tokenizer.ggml.token_type"
        types = _as_list(self.metadata.get(key, [NORMAL] * vocab_size))
        if types is None or len(types) != vocab_size:
            raise self.fail(key, self.metadata.get(key), f"a list of {vocab_size} token types, one a token")
        if not (set(map(type, types)) <= {int} and set(types) <= _TOKEN_TYPES):
            wrong = next(item for item in types if type(item) is not int or item not in _TOKEN_TYPES)
            raise self.fail(key, wrong, "0 to 6")
        return types

    def scores(self, vocab_size: int) -> list[float]:
        """One finite number a token."""
        key = "tokenizer.ggml.scores"
        scores = _as_list(self.metadata.get(key))
        if scores is None or len(scores) != vocab_size:
            raise self.fail(key, self.metadata.get(key), f"a list of {vocab_size} scores, one a token")
        for item in scores:
            if isinstance(item, bool) or not isinstance(item, float | int) or not math.isfinite(item):
                raise self.fail(key, item, "finite numbers")
        return scores

    def data(self, key: str) -> bytes | None:
        """A list of bytes, signed or not."""
        value = self.metadata.get(key)
        if value is None:
            return None
        items = _as_list(value)
        if items is None or any(isinstance(i, bool) or not isinstance(i, int) or not -128 <= i < 256 for i in items):
            raise self.fail(key, value, "a list of bytes")
        return bytes(i & 0xFF for i in items)


@dataclass(frozen=True, slots=True)
class NamedIds:
    """The token ids that have a name, and which of them `encode` puts around a text."""

    begin: int | None
    end: int | None
    bos: int | None
    eos_token_ids: frozenset[int]
    special_tokens: Mapping[str, str]

    @classmethod
    def read(cls, read: Metadata, tokens: Sequence[str], add_bos: bool | None, add_eos: bool) -> NamedIds:
        """`add_bos` and `add_eos` hold where the file does not say; None is true if there is a BOS."""
        ids = {key: read.token_id(f"tokenizer.ggml.{key}", len(tokens)) for key in (*_NAMED.values(), *_STOP_KEYS)}
        bos, eos = ids["bos_token_id"], ids["eos_token_id"]
        adds_bos = read.flag("tokenizer.ggml.add_bos_token", default=bos is not None if add_bos is None else add_bos)
        adds_eos = read.flag("tokenizer.ggml.add_eos_token", default=add_eos)
        for wanted, token_id, what in ((adds_bos, bos, "bos"), (adds_eos, eos, "eos")):
            if wanted and token_id is None:
                reason = f"add_{what}_token is true, but tokenizer.ggml.{what}_token_id is missing"
                raise CheckpointError(f"{read.name}: {reason}")
        return cls(
            begin=bos if adds_bos else None,
            end=eos if adds_eos else None,
            bos=bos,
            eos_token_ids=frozenset(i for key in _STOP_KEYS if (i := ids[key]) is not None),
            special_tokens={what: tokens[i] for what, key in _NAMED.items() if (i := ids[key]) is not None},
        )


def gguf_eos_ids(metadata: Mapping[str, object], name: str) -> frozenset[int]:
    """The ids that end an answer, of a file that need not have a tokenizer. Raises CheckpointError."""
    read = Metadata(metadata, name)
    ids = (read.token_id(f"tokenizer.ggml.{key}", 2**31) for key in _STOP_KEYS)
    return frozenset(i for i in ids if i is not None)


def _as_list(value: object) -> list[Any] | None:
    items = value.tolist() if hasattr(value, "tolist") else value
    return items if isinstance(items, list) else None
