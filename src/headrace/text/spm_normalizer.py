"""How SentencePiece prepares a text before it is cut: character map, spaces to ▁, prefix.

Source: sentencepiece, src/normalizer.cc (Normalizer::Normalize) for the order of the steps, and darts-clone's darts.h
for the double array that a precompiled character map begins with.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from headrace.text.literals import Literals

SPACE = "▁"
_SPACES = re.compile(" +")
_MAX_REPLACEMENT = 128
"""Bytes; the longest of NFKC has 33 (U+FDFA)."""


class CharacterMap:
    """A precompiled_charsmap: little-endian u32 size of the double array, the array, then NUL-ended UTF-8 strings.

    Raises ValueError on bytes that are no such map; whatever the array holds, a look-up stays inside it.
    """

    def __init__(self, data: bytes) -> None:
        size = int.from_bytes(data[:4], "little")
        if len(data) < 4 or size == 0 or size % 4 or size > len(data) - 4:
            raise ValueError(f"a character map of {len(data)} bytes with an array of {size}")
        self._units: Sequence[int] = struct.unpack(f"<{size // 4}I", data[4 : 4 + size])
        self._strings = data[4 + size :]
        longest = max(map(len, self._strings.split(b"\0")))
        if longest > _MAX_REPLACEMENT:
            raise ValueError(f"a character map that writes {longest} bytes for a character")

    def longest(self, text: bytes, start: int) -> tuple[int, str] | None:
        """(bytes that are replaced, what replaces them) for the longest entry that stands at `start`.

        An entry that ends inside a character counts as none.
        """
        units = self._units
        node = _offset(units[0])
        found: tuple[int, int] | None = None
        for at in range(start, len(text)):
            byte = text[at]
            node ^= byte
            if node >= len(units):
                break
            unit = units[node]
            if unit & 0x800000FF != byte:
                break
            node ^= _offset(unit)
            if node >= len(units):
                break
            ends_character = at + 1 == len(text) or text[at + 1] & 0xC0 != 0x80
            if unit >> 8 & 1 and ends_character:
                found = at + 1 - start, units[node] & 0x7FFFFFFF
        if found is None or found[1] >= len(self._strings):
            return None
        end = self._strings.find(b"\0", found[1])
        value = self._strings[found[1] : end if end >= 0 else len(self._strings)]
        return found[0], value.decode(errors="replace")


def _offset(unit: int) -> int:
    return unit >> 10 << ((unit & 1 << 9) >> 6)


@dataclass(frozen=True, slots=True)
class SpmNormalizer:
    """The steps before segmentation; `user_defined` strings pass the character map untouched."""

    add_prefix: bool
    """Whether ▁ comes before the text."""
    collapse: bool
    """Whether runs of spaces become one, and those at the ends none."""
    characters: CharacterMap | None
    user_defined: Literals

    def normalize(self, text: str) -> str:
        """Empty stays empty."""
        if not text:
            return ""
        if self.characters is not None:
            text = self._map(text, self.characters)
        if self.collapse:
            text = _SPACES.sub(" ", text.lstrip(" "))
        text = (SPACE if self.add_prefix else "") + text.replace(" ", SPACE)
        return text.rstrip(SPACE) if self.collapse else text

    def _map(self, text: str, characters: CharacterMap) -> str:
        out: list[str] = []
        data = text.encode()
        at = byte = 0
        while at < len(text):
            count = self.user_defined.prefix(text, at)
            hit = None if count else characters.longest(data, byte)
            if hit is None:
                passed = text[at : at + max(count, 1)]
                out.append(passed)
                size = len(passed.encode())
            else:
                size, replacement = hit
                passed = data[byte : byte + size].decode()
                out.append(replacement)
            at += len(passed)
            byte += size
        return "".join(out)
