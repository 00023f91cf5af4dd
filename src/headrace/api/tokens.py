"""How single tokens are named in log-probabilities, and where they lie in the text."""

from __future__ import annotations

from collections.abc import Sequence

from headrace.text.detokenize import Detokenizer
from headrace.text.tokenizer import Tokenizer
from headrace.text.vocabulary import TokenBytes


class TokenNames:
    """Names and bytes of tokens. Without a tokenizer, or if asked to, a token's name is `token_id:5`."""

    def __init__(self, tokenizer: Tokenizer | None, as_ids: bool = False) -> None:
        self._known = None if tokenizer is None else TokenBytes(tokenizer)
        self._as_ids = as_ids or tokenizer is None
        self._bytes: dict[int, bytes] = {}

    def name(self, token_id: int) -> str:
        r"""The token's text inside a line of text; part of a character is written as its bytes, `bytes:\xe2\x82`, so
        that different tokens keep different names."""
        if self._as_ids:
            return f"token_id:{token_id}"
        data = self.data(token_id)
        if not data:
            return f"token_id:{token_id}"  # padding: an id that the model has and the tokenizer lacks
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def data(self, token_id: int) -> bytes:
        """The token's bytes within a text; empty where it has none."""
        if self._known is None:
            return b""
        if (data := self._bytes.get(token_id)) is None:
            data = self._bytes[token_id] = self._known.data(token_id)
        return data


class Offsets:
    """Where tokens begin in a text, as they come."""

    def __init__(self, tokenizer: Tokenizer | None, skip_special_tokens: bool) -> None:
        self._detokenizer = None if tokenizer is None else Detokenizer(tokenizer, skip_special_tokens)
        self._length = 0

    def push(self, ids: Sequence[int]) -> list[int]:
        """Of each of the next tokens, how many characters are certain before it."""
        if self._detokenizer is None:
            return [0] * len(ids)
        found: list[int] = []
        for token_id in ids:
            found.append(self._length)
            self._length += len(self._detokenizer.push([token_id]))
        return found


def prompt_text(tokenizer: Tokenizer | None, ids: Sequence[int], given: str | None) -> tuple[str, bool]:
    """The prompt as `echo` returns it, and whether that text leaves special tokens out.

    `given`: the text that the client sent; where it sent ids, special tokens are spelled.
    """
    if tokenizer is None:
        return "", False
    if given is None:
        return tokenizer.decode(ids, skip_special_tokens=False), False
    return given, tokenizer.decode(ids, skip_special_tokens=False) != given
