"""What a tokenizer's tokens are in bytes, as the text of an answer has them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from headrace.text.detokenize import BYTE_TOKEN, bytes_of_spelling
from headrace.text.grammar import Vocabulary
from headrace.text.sentencepiece import SentencePiece
from headrace.text.spm_normalizer import SPACE

if TYPE_CHECKING:
    from headrace.text.tokenizer import Tokenizer

_ANCHOR = "a"
"""Stands before a token, so that the decoder does not take it for the first of the text."""


class TokenBytes:
    """The bytes of single tokens, by the rules of `headrace.text.detokenize`."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._raw = tokenizer.raw
        self._rules = tokenizer.decoder_rules
        self._cut = 0
        if self._rules.kind == "fused":
            self._cut = len(self._decode([_ANCHOR]))

    def data(self, token_id: int) -> bytes:
        """The token's bytes within a text; empty where the id has no token."""
        token = self._raw.id_to_token(token_id)
        return b"" if token is None else self._within(token)

    def first(self, token_id: int) -> bytes:
        """The token's bytes where it is the first of a text: it may lose a space."""
        token = self._raw.id_to_token(token_id)
        if token is None:
            return b""
        rules, data = self._rules, self._within(token)
        if rules.kind == "fused" and rules.strip:
            spaces = len(data) - len(data.lstrip(b" "))
            return data[min(spaces, rules.strip) :]
        if rules.kind == "pieces" and isinstance(self._raw, SentencePiece):
            drops = self._raw.drops_first_space and token.startswith(SPACE)
            return data[1:] if drops and token not in self._raw.byte_values else data
        if rules.kind == "first":
            return (token if self._no_decoder else self._decode([token])).encode()
        return data

    def _within(self, token: str) -> bytes:
        rules = self._rules
        if rules.kind == "byte_level":
            return bytes_of_spelling(token)
        if isinstance(self._raw, SentencePiece):
            byte = self._raw.byte_values.get(token)
            return token.replace(SPACE, " ").encode() if byte is None else bytes([byte])
        if rules.byte_fallback and (match := BYTE_TOKEN.fullmatch(token)):
            return bytes([int(match[1], 16)])
        if self._no_decoder:
            return f" {token}".encode()
        return self._decode([_ANCHOR, token])[self._cut or len(_ANCHOR) :].encode()

    @property
    def _no_decoder(self) -> bool:
        return not isinstance(self._raw, SentencePiece) and self._raw.decoder is None

    def _decode(self, tokens: list[str]) -> str:
        assert not isinstance(self._raw, SentencePiece)
        return str(self._raw.decoder.decode(tokens))


def build_vocabulary(tokenizer: Tokenizer, size: int) -> Vocabulary:
    """The tokens behind `size` logits. Ids that the tokenizer lacks (padding) are never allowed, special tokens never
    as text."""
    known = TokenBytes(tokenizer)
    raw = tokenizer.raw
    eos_ids = frozenset(token_id for token_id in tokenizer.eos_token_ids if token_id < size)
    if isinstance(raw, SentencePiece):
        no_text = raw.special | raw.unknown
    else:
        no_text = frozenset(token.content for token in raw.get_added_tokens_decoder().values() if token.special)
    tokens: list[bytes] = []
    special: list[int] = []
    firsts: dict[int, bytes] = {}
    for token_id in range(size):
        token = raw.id_to_token(token_id)
        if token is not None and (token in no_text or token_id in eos_ids):
            special.append(token_id)
            tokens.append(token.encode())
            continue
        data = known.data(token_id)
        tokens.append(data)
        if tokenizer.decoder_rules.kind != "byte_level" and (first := known.first(token_id)) != data:
            firsts[token_id] = first
    return Vocabulary(tuple(tokens), frozenset(special), eos_ids, firsts)
