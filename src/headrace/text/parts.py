"""What every kind of tokenizer file is read into."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from headrace.text.sentencepiece import SentencePiece


@dataclass(frozen=True, slots=True)
class TokenizerParts:
    """What a checkpoint says about its tokenizer."""

    raw: Tokenizer | SentencePiece
    eos_token_ids: frozenset[int]
    bos_token_id: int | None
    special_tokens: Mapping[str, str]
    chat_template: str | None
