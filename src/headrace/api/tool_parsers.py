"""Tool calls in a model's text, told as they are written.

Law: the parts of the pushes and of `finish`, joined, do not depend on how the text was cut. A character is looked at a
bounded number of times, so the cost is linear. What only looks like a call is text, unless it was told as a call.

Text that may turn out to be a call waits. A call is told once its name is known and its arguments begin; from then on
the arguments pass through as the model writes them, and end where their object ends, or the text. White space before
and after calls is dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from headrace.api.call_scanner import SPACES, Call, NamedCall, ObjectCall, skip_space
from headrace.api.tools import ToolChoice, ToolSpec
from headrace.core.errors import InvalidParameter


@dataclass(frozen=True, slots=True)
class TextPart:
    """Text that belongs to no call."""

    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    """A call begins; its arguments follow."""

    index: int
    """Of the answer's calls, from 0."""
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """More of a call's arguments: JSON, as the model writes it."""

    index: int
    text: str


Part = TextPart | CallStart | CallArguments


class ToolParser(Protocol):
    """Reads one answer."""

    def push(self, text: str) -> list[Part]:
        """What is now certain."""

    def finish(self) -> list[Part]:
        """The rest; nothing is pushed after it."""


def make_parser(style: str, tools: Sequence[ToolSpec], choice: ToolChoice, parallel: bool = True) -> ToolParser:
    """A fresh parser for one answer.

    `style`: hermes, llama3 or mistral. Only calls of `tools`, or of the one that `choice` names, count as calls; with
    the choice "none" nothing does. `parallel`: whether calls after the first are told; otherwise they are dropped.
    Raises InvalidParameter on another style.
    """
    if style not in _PARSERS:
        raise InvalidParameter("tool_parser", style, ", ".join(_PARSERS))
    if choice.mode == "none" or not tools:
        return _Plain()
    names = frozenset({choice.name} if choice.mode == "named" else (tool.name for tool in tools))
    return _PARSERS[style](names, parallel)


class _Plain:
    def push(self, text: str) -> list[Part]:
        return [TextPart(text)] if text else []

    def finish(self) -> list[Part]:
        return []


def _begins(s: str, i: int, literal: str) -> bool | None:
    """Whether `literal` stands at `i`; None where the text ends before that is certain."""
    if s.startswith(literal, i):
        return True
    return None if len(s) - i < len(literal) and literal.startswith(s[i:]) else False


class _Reader:
    """What the styles share: a state that takes the text from where the last one stopped, and the call being read."""

    def __init__(self, names: frozenset[str], parallel: bool) -> None:
        self._names = names
        self._most = None if parallel else 1
        self._parts: list[Part] = []
        self._carry = ""
        """What may be the beginning of a marker."""
        self._spaces: list[str] = []
        """White space that shows only if text follows, or no call was told."""
        self._raw: list[str] = []
        """What becomes text if the call comes to nothing."""
        self._call: Call = ObjectCall(names)
        self._told = False
        self._count = 0
        self._text_since_call = True
        self._state: Callable[[str, int], int] = self._plain
        self._then: Callable[[str, int], int] = self._plain
        """The state after a call."""

    def push(self, text: str) -> list[Part]:
        s = self._carry + text
        self._carry = ""
        i = 0
        while i < len(s):
            i = self._state(s, i)
        return self._take()

    def finish(self) -> list[Part]:
        self._raw.append(self._carry)
        if "".join(self._raw).strip(SPACES) in (",", ";"):  # a call was to follow, of which nothing came
            self._raw = []
        self._release()
        if self._text_since_call:
            self._add(TextPart("".join(self._spaces)))
        return self._take()

    def _take(self) -> list[Part]:
        parts, self._parts = self._parts, []
        return parts

    def _add(self, part: Part) -> None:
        if not isinstance(part, CallStart) and not part.text:
            return
        if not isinstance(part, TextPart) and self._most is not None and part.index >= self._most:
            return
        self._parts.append(part)

    def _text(self, text: str) -> None:
        """Text; the white space at its end waits."""
        shown = text.rstrip(SPACES)
        if shown:
            self._add(TextPart("".join(self._spaces) + shown))
            self._spaces = []
            self._text_since_call = True
        if len(shown) < len(text):
            self._spaces.append(text[len(shown) :])

    def _release(self) -> None:
        raw, self._raw = "".join(self._raw), []
        self._text(raw)

    def _hold(self, s: str, i: int) -> int:
        """Waits for more text to tell what begins at `i`."""
        self._carry = s[i:]
        return len(s)

    def _plain(self, s: str, i: int) -> int:
        self._text(s[i:])
        return len(s)

    def _until(self, marker: str, then: Callable[[str, int], int], s: str, i: int) -> int:
        """Text up to a marker, with which the state changes."""
        at = s.find(marker, i)
        if at >= 0:
            self._text(s[i:at])
            self._raw = [marker]
            self._state = then
            return at + len(marker)
        held = next((size for size in range(len(marker) - 1, 0, -1) if s.endswith(marker[:size], i)), 0)
        self._text(s[i : len(s) - held])
        return self._hold(s, len(s) - held)

    def _skip(self, s: str, i: int) -> int:
        """Puts white space aside."""
        end = skip_space(s, i)
        (self._raw if self._raw else self._spaces).append(s[i:end])
        return end

    def _begin(self, call: Call, then: Callable[[str, int], int]) -> None:
        self._call = call
        self._told = False
        self._then = then
        self._state = self._in_call

    def _in_call(self, s: str, i: int) -> int:
        call = self._call
        end = call.feed(s, i)
        if not self._told:
            self._raw.append(s[i:end])
            if call.ready:
                self._told = True
                self._raw = []
                self._spaces = []
                self._text_since_call = False
                self._add(CallStart(self._count, call.name))
                self._count += 1
        if self._told:
            self._add(CallArguments(self._count - 1, "".join(call.arguments)))
            call.arguments.clear()
        if call.status == "done":
            self._state = self._then
        elif call.status == "bad":
            self._broken(told=self._told)
        return end

    def _broken(self, told: bool) -> None:
        """What was read is no call, or the end of one that was told: from here it is text."""
        if not told:
            self._release()
        self._state = self._plain


class _Hermes(_Reader):
    """`<tool_call>{"name": …, "arguments": {…}}</tool_call>`, any number of them, with text before and between."""

    _OPEN, _CLOSE = "<tool_call>", "</tool_call>"

    def __init__(self, names: frozenset[str], parallel: bool) -> None:
        super().__init__(names, parallel)
        self._state = self._in_text

    def _in_text(self, s: str, i: int) -> int:
        return self._until(self._OPEN, self._before_object, s, i)

    def _before_object(self, s: str, i: int) -> int:
        if (i := self._skip(s, i)) < len(s):
            self._begin(ObjectCall(self._names), self._after)
        return i

    def _after(self, s: str, i: int) -> int:
        """After a call, with or without its closing tag."""
        if (i := self._skip(s, i)) == len(s):
            return i
        found = _begins(s, i, self._CLOSE)
        if found is None:
            return self._hold(s, i)
        self._state = self._in_text
        if not found:
            return i
        self._spaces = []
        return i + len(self._CLOSE)

    def _broken(self, told: bool) -> None:
        super()._broken(told)
        self._state = self._after if told else self._in_text

    def finish(self) -> list[Part]:
        if self._state == self._after:
            self._carry = ""  # a closing tag, cut
        return super().finish()


class _Llama3(_Reader):
    """`{"name": …, "parameters": {…}}` as the whole answer, or several of them with `;` between."""

    _TAG = "<|python_tag|>"

    def __init__(self, names: frozenset[str], parallel: bool) -> None:
        super().__init__(names, parallel)
        self._state = self._start

    def _start(self, s: str, i: int) -> int:
        if (i := self._skip(s, i)) == len(s):
            return i
        found = _begins(s, i, self._TAG)
        if found is None:
            return self._hold(s, i)
        if found:
            self._raw.append(self._TAG)
            return i + len(self._TAG)
        self._begin(ObjectCall(self._names), self._between)
        return i

    def _between(self, s: str, i: int) -> int:
        if (i := self._skip(s, i)) == len(s):
            return i
        self._state = self._start
        if s[i] == ";":
            self._raw.append(";")
            return i + 1
        return i


class _Mistral(_Reader):
    """`[TOOL_CALLS]` before a list of `{"name": …, "arguments": {…}}`, or before each `name[ARGS]{…}`.

    At the start of an answer, and after a call, the same forms count without it: models leave it out.
    """

    _MARK = "[TOOL_CALLS]"

    def __init__(self, names: frozenset[str], parallel: bool) -> None:
        super().__init__(names, parallel)
        self._state = self._bare

    def _bare(self, s: str, i: int) -> int:
        if (i := self._skip(s, i)) == len(s):
            return i
        found = _begins(s, i, self._MARK)
        if found is None:
            return self._hold(s, i)
        if found:
            self._raw = [self._MARK]
            self._state = self._marked
            return i + len(self._MARK)
        return self._marked(s, i)

    def _marked(self, s: str, i: int) -> int:
        if (i := self._skip(s, i)) == len(s):
            return i
        if s[i] == "[":
            self._raw.append("[")
            self._state = self._item
            return i + 1
        self._begin(NamedCall(self._names), self._bare)
        return i

    def _item(self, s: str, i: int) -> int:
        if (i := self._skip(s, i)) < len(s):
            self._begin(ObjectCall(self._names), self._next)
        return i

    def _next(self, s: str, i: int) -> int:
        if (i := self._skip(s, i)) == len(s):
            return i
        if s[i] == ",":
            self._raw.append(",")
            self._state = self._item
            return i + 1
        self._state = self._bare if s[i] == "]" else self._in_text
        return i + 1 if s[i] == "]" else i

    def _in_text(self, s: str, i: int) -> int:
        return self._until(self._MARK, self._marked, s, i)

    def _broken(self, told: bool) -> None:
        super()._broken(told)
        self._state = self._in_text


_PARSERS: Mapping[str, Callable[[frozenset[str], bool], ToolParser]] = {
    "hermes": _Hermes,
    "llama3": _Llama3,
    "mistral": _Mistral,
}
