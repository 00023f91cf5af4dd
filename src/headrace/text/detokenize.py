"""Token ids to text as they come, never half a character.

Law: the pushes joined, and `finish`, are `Tokenizer.decode` of all the ids, however the ids are split. At most three
bytes (an unfinished UTF-8 sequence) are held back. Cost is linear: no id is decoded twice.

How a token's text depends on its neighbours is known for each decoder we admit (`read_decoder`): bytes join into
characters, and the first token may lose a leading space. Nothing else does, so nothing else is kept.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from headrace.core.errors import UnsupportedModel, shorten
from headrace.text.sentencepiece import SentencePiece
from headrace.text.spm_normalizer import SPACE

if TYPE_CHECKING:
    from tokenizers import decoders

    from headrace.text.tokenizer import Tokenizer

BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SEQUENCE = re.compile(r"(Replace )*(ByteFallback )?(Fuse (Strip )?)?")
_UNKNOWN_SURFACE = " ⁇ "
"""What sentencepiece writes for the unknown token."""
_ANCHOR = "a"
"""Stands before the tokens of a push, so that the decoder does not take them for the first of the text."""


def _byte_of_char() -> dict[str, int]:
    """GPT-2's alphabet: a printable character for each byte (the others take U+0100 and up, in order)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF_CHAR = _byte_of_char()


@dataclass(frozen=True, slots=True)
class DecoderRules:
    """How tokens become text."""

    kind: Literal["byte_level", "first", "fused", "pieces"]
    """byte_level: tokens spell bytes. first: the first token's text may differ. fused: `strip` cuts the whole text.
    pieces: SentencePiece's own rules (`_piece_text`)."""
    byte_fallback: bool = False
    """`<0xE2>` is a byte."""
    strip: int = 0
    """Most spaces cut from the start of the text (kind `fused`)."""


def read_decoder(decoder: decoders.Decoder | None, name: str) -> DecoderRules:
    """The rules of a tokenizer.json's decoder; `name` is the file's. Raises UnsupportedModel on one we do not know."""
    if decoder is None:
        return DecoderRules("first")
    config = json.loads(decoder.__getstate__())
    parts = config["decoders"] if config["type"] == "Sequence" else [config]
    types = "".join(f"{part['type']} " for part in parts)
    if types in ("ByteLevel ", "Metaspace "):
        return DecoderRules("byte_level" if types == "ByteLevel " else "first")
    last = parts[-1] if parts else {}
    odd_strip = last.get("type") == "Strip" and (last.get("content") != " " or last.get("stop") != 0)
    if not parts or not _SEQUENCE.fullmatch(types) or odd_strip:
        raise UnsupportedModel(
            f"{name}: decoder is {shorten(types.strip())}, supported: ByteLevel, Metaspace, or Replace, ByteFallback, "
            "Fuse and Strip (of spaces on the left), in this order"
        )
    return DecoderRules("fused", "ByteFallback " in types, last["start"] if last["type"] == "Strip" else 0)


class _Utf8:
    """Bytes to text; an unfinished character (at most 3 bytes) waits for the next call."""

    def __init__(self, one_mark_a_byte: bool) -> None:
        self._one_mark_a_byte = one_mark_a_byte
        self._waiting = b""

    def push(self, data: bytes, final: bool = False) -> str:
        """Invalid bytes become U+FFFD: one a byte, or one for each longest beginning of a character."""
        data = self._waiting + data
        self._waiting = b""
        out: list[str] = []
        while data:
            try:
                out.append(data.decode())
                break
            except UnicodeDecodeError as error:
                out.append(data[: error.start].decode())
                if error.end == len(data) and error.reason == "unexpected end of data" and not final:
                    self._waiting = data[error.start :]
                    break
                out.append("\ufffd" * (error.end - error.start if self._one_mark_a_byte else 1))
                data = data[error.end :]
        return "".join(out)


class Detokenizer:
    """One answer's text. `push` each run of new ids, `finish` once."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._raw = tokenizer.raw
        self._rules = tokenizer.decoder_rules
        self._skip_special_tokens = skip_special_tokens
        self._utf8 = _Utf8(one_mark_a_byte=self._rules.kind != "byte_level")
        self._strip = self._rules.strip
        self._at_start = True

    def push(self, ids: Iterable[int]) -> str:
        """The text that is now certain."""
        tokens = self._tokenizer.tokens(ids, self._skip_special_tokens)
        if self._rules.kind == "byte_level":
            return self._utf8.push(b"".join(map(bytes_of_spelling, tokens)))
        if not self._rules.byte_fallback:
            return self._cut(self._decode(tokens))
        out: list[str] = []
        plain: list[str] = []
        run: list[int] = []
        for token in tokens:
            byte = self._byte_of(token)
            if byte is not None:
                if plain:
                    out.append(self._decode(plain))
                    plain = []
                run.append(byte)
                self._at_start = False
                continue
            # A token that is no byte ends the bytes before it, in this push or an earlier one.
            out.append(self._utf8.push(bytes(run), final=True))
            run = []
            plain.append(token)
        out.append(self._utf8.push(bytes(run)) if run else self._decode(plain))
        return self._cut("".join(out))

    def finish(self) -> str:
        """What was held back."""
        return self._cut(self._utf8.push(b"", final=True))

    def _byte_of(self, token: str) -> int | None:
        if isinstance(self._raw, SentencePiece):
            return self._raw.byte_values.get(token)
        match = BYTE_TOKEN.fullmatch(token)
        return None if match is None else int(match[1], 16)

    def _decode(self, tokens: Sequence[str]) -> str:
        if not tokens:
            return ""
        if isinstance(self._raw, SentencePiece):
            return "".join([self._piece_text(token, self._raw) for token in tokens])
        decoder = self._raw.decoder
        if self._rules.kind == "fused":
            return str(decoder.decode([_ANCHOR, *tokens]))[len(decoder.decode([_ANCHOR])) :]
        first, self._at_start = self._at_start, False
        if decoder is None:
            return ("" if first else " ") + " ".join(tokens)
        if first:
            return str(decoder.decode(list(tokens)))
        return str(decoder.decode([_ANCHOR, *tokens]))[len(_ANCHOR) :]

    def _piece_text(self, piece: str, raw: SentencePiece) -> str:
        """As sentencepiece's Decode: the first piece loses a leading ▁; if runs collapse, all before the text do."""
        if piece in raw.unknown or piece in raw.special:
            self._at_start = False
            return _UNKNOWN_SURFACE if piece in raw.unknown else piece
        if self._at_start and raw.drops_first_space and piece.startswith(SPACE):
            piece = piece[1:]
            self._at_start = raw.drops_all_first_spaces
        if piece:
            self._at_start = False
        return piece.replace(SPACE, " ")

    def _cut(self, text: str) -> str:
        """Without the spaces that the decoder strips from the start of the whole text."""
        if not self._strip or not text:
            return text
        spaces = len(text) - len(text.lstrip(" "))
        cut = min(spaces, self._strip)
        self._strip = self._strip - cut if cut == len(text) else 0
        return text[cut:]


def bytes_of_spelling(token: str) -> bytes:
    """A token outside the byte alphabet (an added one) stands for itself."""
    try:
        return bytes([_BYTE_OF_CHAR[char] for char in token])
    except KeyError:
        return token.encode()
