"""A SentencePiece tokenizer: special tokens, normaliser and segmenter, behind the few methods `Tokenizer` needs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Protocol

from headrace.text.gguf_metadata import CONTROL, UNKNOWN
from headrace.text.literals import Literals
from headrace.text.spm_models import SpmVocabulary
from headrace.text.spm_normalizer import SpmNormalizer

_WHITE = re.compile(r"[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]*")
"""White_Space of Unicode (str.isspace has four characters more)."""


class Segmenter(Protocol):
    def segment(self, text: str) -> list[int]: ...


class SentencePiece:
    """Text to ids. Control and unknown tokens spelled in the text count as such, and each stretch between them is
    normalised by itself (so that a prefix comes after each): both as in llama.cpp, and as transformers' older Llama
    tokenizers. Beside those tokens the ids are the sentencepiece library's.
    """

    def __init__(
        self,
        vocabulary: SpmVocabulary,
        normalizer: SpmNormalizer,
        segmenter: Segmenter,
        begin: Sequence[int],
        end: Sequence[int],
        strips_right: frozenset[str],
    ) -> None:
        """`begin` and `end` is what encode adds; tokens of `strips_right` take the white space after them."""
        self._tokens = vocabulary.tokens
        self._ids = {token: i for i, token in enumerate(vocabulary.tokens)}
        self._normalizer = normalizer
        self._segmenter = segmenter
        self._begin, self._end = list(begin), list(end)
        self._strips_right = strips_right
        self._spelled = Literals(vocabulary.ids(CONTROL, UNKNOWN))
        self.special = frozenset(vocabulary.ids(CONTROL))
        """Tokens that are no text. The unknown token is text: it reads ⁇."""
        self.unknown = frozenset(vocabulary.ids(UNKNOWN))
        self.byte_values = {vocabulary.tokens[i]: byte for byte, i in enumerate(vocabulary.byte_ids or ())}
        """By token, for those that stand for a byte."""
        self.drops_first_space = normalizer.add_prefix or normalizer.collapse
        self.drops_all_first_spaces = normalizer.collapse

    def get_vocab_size(self) -> int:
        return len(self._tokens)

    def id_to_token(self, token_id: int) -> str | None:
        return self._tokens[token_id] if 0 <= token_id < len(self._tokens) else None

    def token_to_id(self, token: str) -> int | None:
        return self._ids.get(token)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        ids = list(self._begin) if add_special_tokens else []
        strip = False
        for stretch, spelled in self._spelled.split(text):
            if spelled:
                ids.append(self._ids[stretch])
                strip = stretch in self._strips_right
                continue
            if strip:
                white = _WHITE.match(stretch)
                stretch = stretch[white.end() if white else 0 :]
            ids += self._segmenter.segment(self._normalizer.normalize(stretch))
        return ids + self._end if add_special_tokens else ids
