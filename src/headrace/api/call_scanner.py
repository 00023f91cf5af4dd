"""One tool call, read as it is written.

Of its arguments only strings and depth are known: their characters pass through as they are.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Literal, Protocol

_SPACE = re.compile(r"[ \t\r\n]*")
SPACES = " \t\r\n"
_NO_QUOTE = re.compile(r'[^"\\]*')
_NO_BRACKET = re.compile(r'[^"{}\[\]]*')
_SCALAR = re.compile(r"[-+.0-9A-Za-z]*")
_NAME = re.compile(r"[A-Za-z0-9_-]*")
_MISTRAL_HEADER = re.compile(r"(\[CALL_ID\][A-Za-z0-9]*)?(\[ARGS\])?[ \t\r\n]*")
_MAX_HEADER = 128
"""Most characters between a name and the brace after it."""
_MAX_SHORT = 512
"""Most characters of a key, a name or a number where it may become part of a call."""

Status = Literal["more", "done", "bad"]


class _String:
    """A JSON string after its opening quote."""

    def __init__(self) -> None:
        self._escaped = False
        self.done = False

    def feed(self, s: str, i: int) -> int:
        """Returns where it stopped: behind the closing quote, or at the end of `s`."""
        n = len(s)
        while i < n:
            if self._escaped:
                self._escaped = False
                i += 1
                continue
            match = _NO_QUOTE.match(s, i)
            assert match is not None
            i = match.end()
            if i < n:
                self.done = s[i] == '"'
                self._escaped = not self.done
                i += 1
                if self.done:
                    break
        return i


class _Span:
    """A JSON object or array with its brackets: strings and depth are all that is known of it."""

    def __init__(self) -> None:
        self._depth = 0
        self._string: _String | None = None
        self.done = False

    def feed(self, s: str, i: int) -> int:
        """Returns where it stopped: behind the last bracket, or at the end of `s`."""
        n = len(s)
        while i < n:
            if self._string is not None:
                i = self._string.feed(s, i)
                if self._string.done:
                    self._string = None
                continue
            match = _NO_BRACKET.match(s, i)
            assert match is not None
            i = match.end()
            if i == n:
                break
            char = s[i]
            i += 1
            if char == '"':
                self._string = _String()
            elif char in "{[":
                self._depth += 1
            else:
                self._depth -= 1
                if self._depth == 0:
                    self.done = True
                    break
        return i


class Call(Protocol):
    """One call being read."""

    status: Status
    name: str
    ready: bool
    """Whether it can be told: the name is one of the tools', and the arguments have begun."""
    arguments: list[str]
    """Pieces of the arguments that nobody has taken."""

    def feed(self, s: str, i: int) -> int:
        """Reads on from `i`; returns where it stopped, which is before the end only once the status is not "more"."""


class ObjectCall:
    """`{"name": …, "arguments": {…}}` from its brace; `parameters` is another name of the arguments, in any order."""

    def __init__(self, names: frozenset[str]) -> None:
        self.status: Status = "more"
        self.name = ""
        self.ready = False
        self.arguments: list[str] = []
        self._names = names
        self._has_arguments = False
        self._key = ""
        self._short: list[str] = []
        """Pieces of a key, a name or a number."""
        self._string = _String()
        self._span = _Span()
        self._step: Callable[[str, int], int] = self._open

    def feed(self, s: str, i: int) -> int:
        n = len(s)
        while i < n and self.status == "more":
            i = self._step(s, i)
        return i

    def _bad(self, i: int) -> int:
        self.status = "bad"
        return i

    def _open(self, s: str, i: int) -> int:
        if s[i] != "{":
            return self._bad(i)
        self._step = self._before_first_key
        return i + 1

    def _before_first_key(self, s: str, i: int) -> int:
        return self._before_key(s, i, first=True)

    def _before_key(self, s: str, i: int, first: bool = False) -> int:
        if (i := skip_space(s, i)) == len(s):
            return i
        if first and s[i] == "}":
            return self._close(i)
        if s[i] != '"':
            return self._bad(i)
        self._string = _String()
        self._short = []
        self._step = self._in_key
        return i + 1

    def _in_key(self, s: str, i: int) -> int:
        end = self._take_string(s, i)
        if self.status == "more" and self._string.done:
            key = self._decode()
            if key is None:
                return self._bad(end)
            self._key = "arguments" if key == "parameters" else key
            self._step = self._before_colon
        return end

    def _before_colon(self, s: str, i: int) -> int:
        if (i := skip_space(s, i)) == len(s):
            return i
        if s[i] != ":":
            return self._bad(i)
        self._step = self._before_value
        return i + 1

    def _before_value(self, s: str, i: int) -> int:
        if (i := skip_space(s, i)) == len(s):
            return i
        char = s[i]
        wants_name = self._key == "name" and not self.name
        wants_arguments = self._key == "arguments" and not self._has_arguments
        if char == "{" and wants_arguments:
            self._has_arguments = True
            self._span = _Span()
            self._step = self._in_arguments
            return i
        if char == '"' and wants_name:
            self._string = _String()
            self._short = []
            self._step = self._in_name
            return i + 1
        if wants_name or (wants_arguments and char in '"['):
            return self._bad(i)
        if char == '"':
            self._string = _String()
            self._step = self._in_other_string
            return i + 1
        if char in "{[":
            self._span = _Span()
            self._step = self._in_other_span
            return i
        self._short = []
        self._step = self._in_scalar
        return i if _SCALAR.fullmatch(char) else self._bad(i)

    def _in_arguments(self, s: str, i: int) -> int:
        end = self._span.feed(s, i)
        self.arguments.append(s[i:end])
        self.ready = bool(self.name)
        if self._span.done:
            self._step = self._after_value
        return end

    def _in_name(self, s: str, i: int) -> int:
        end = self._take_string(s, i)
        if self.status == "more" and self._string.done:
            self.name = self._decode() or ""
            if self.name not in self._names:
                return self._bad(end)
            self.ready = self._has_arguments
            self._step = self._after_value
        return end

    def _in_other_string(self, s: str, i: int) -> int:
        end = self._string.feed(s, i)
        if self._string.done:
            self._step = self._after_value
        return end

    def _in_other_span(self, s: str, i: int) -> int:
        end = self._span.feed(s, i)
        if self._span.done:
            self._step = self._after_value
        return end

    def _in_scalar(self, s: str, i: int) -> int:
        match = _SCALAR.match(s, i)
        assert match is not None
        end = match.end()
        self._short.append(match[0])
        if end < len(s):
            # `"arguments": null` is a call without arguments; no other plain value can be them.
            if self._key == "arguments" and not self._has_arguments and "".join(self._short) != "null":
                return self._bad(end)
            self._step = self._after_value
        return end

    def _after_value(self, s: str, i: int) -> int:
        if (i := skip_space(s, i)) == len(s):
            return i
        if s[i] == "}":
            return self._close(i)
        if s[i] != ",":
            return self._bad(i)
        self._step = self._before_key
        return i + 1

    def _close(self, i: int) -> int:
        if not self.name:
            return self._bad(i)
        if not self._has_arguments:
            self.arguments.append("{}")
        self.ready = True
        self.status = "done"
        return i + 1

    def _take_string(self, s: str, i: int) -> int:
        end = self._string.feed(s, i)
        self._short.append(s[i:end])
        return end

    def _decode(self) -> str | None:
        """The string that was taken; None if it is too long for a name, or no JSON."""
        spelled = "".join(self._short)
        if len(spelled) > _MAX_SHORT:
            return None
        try:
            return str(json.loads('"' + spelled))
        except ValueError:
            return None


class NamedCall:
    """Mistral's `name[ARGS]{…}`, also with a call id before, or nothing between name and brace."""

    def __init__(self, names: frozenset[str]) -> None:
        self.status: Status = "more"
        self.name = ""
        self.ready = False
        self.arguments: list[str] = []
        self._names = names
        self._begun = ""
        self._header = ""
        self._span = _Span()

    def feed(self, s: str, i: int) -> int:
        n = len(s)
        if not self.name:
            match = _NAME.match(s, i)
            assert match is not None
            i = match.end()
            self._begun += match[0][: _MAX_SHORT - len(self._begun)]
            if not any(name.startswith(self._begun) for name in self._names):
                self.status = "bad"
            elif i < n:
                self.name = self._begun if self._begun in self._names else ""
                self.status = "more" if self.name else "bad"
        while i < n and self.status == "more" and not self.ready:
            if s[i] == "{":
                self.ready = _MISTRAL_HEADER.fullmatch(self._header) is not None
                self.status = "more" if self.ready else "bad"
            elif len(self._header) == _MAX_HEADER or (not self._header and s[i] != "["):
                self.status = "bad"
            else:
                self._header += s[i]
                i += 1
        if self.ready and i < n:
            end = self._span.feed(s, i)
            self.arguments.append(s[i:end])
            i = end
            if self._span.done:
                self.status = "done"
        return i


def skip_space(s: str, i: int) -> int:
    match = _SPACE.match(s, i)
    assert match is not None
    return match.end()
