"""Fields of a body from a client: taken one by one, checked, and what nobody has taken refused or named."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from headrace.api.errors import cut
from headrace.core.errors import InvalidParameter, RequestError, UnknownParameter, UnsupportedParameter

MAX_DEPTH = 64
"""How deep values may be nested that are passed on to a template or made into a grammar."""
MAX_NAMED = 32
"""Most unknown fields of a body that are named."""


class Unknown:
    """Fields that no route knows: refused, or left aside under their names."""

    def __init__(self, strict: bool) -> None:
        self._strict = strict
        self.names: list[str] = []
        """Paths such as `messages[0].colour`, in printable ASCII without spaces."""

    def add(self, path: str, where: str) -> None:
        """Raises UnknownParameter where unknown fields are refused."""
        if self._strict:
            raise UnknownParameter(path, where)
        if len(self.names) < MAX_NAMED:
            self.names.append("".join(char if "!" <= char <= "~" else "?" for char in cut(path)[:64]))

    def set_aside(self, path: str, value: object, allowed: str) -> None:
        """Of a known field, a value that is not carried out and that an answer can do without. Raises
        UnsupportedParameter where unknown fields are refused."""
        if self._strict:
            raise UnsupportedParameter(path, value, allowed)
        self.add(path, "")


class Fields:
    """The fields of an object; null is the same as absent. `prefix` stands before their names in messages."""

    def __init__(self, body: Mapping[str, Any], unknown: Unknown, prefix: str = "") -> None:
        self._left = {name: value for name, value in body.items() if value is not None}
        self._unknown = unknown
        self._prefix = prefix

    def take(self, name: str, default: Any = None) -> Any:
        return self._left.pop(name, default)

    def flag(self, name: str, default: bool = False) -> bool:
        value = self.take(name, default)
        if not isinstance(value, bool):
            raise InvalidParameter(self._prefix + name, value, "true or false")
        return value

    def integer(self, name: str, low: int, high: int) -> int | None:
        value = self.take(name)
        if value is not None and (type(value) is not int or not low <= value <= high):
            raise InvalidParameter(self._prefix + name, value, f"an integer from {low} to {high}")
        return value

    def text(self, name: str, most: int) -> str | None:
        value = self.take(name)
        if value is not None and (not isinstance(value, str) or not value or len(value) > most):
            raise InvalidParameter(self._prefix + name, value, f"a string of 1 to {most} characters")
        return value

    def finish(
        self,
        where: str,
        inert: frozenset[str] = frozenset(),
        neutral: Mapping[str, tuple[object, ...]] | None = None,
    ) -> None:
        """What is left is inert, or unsupported (raises UnsupportedParameter), or unknown."""
        neutral = neutral or {}
        left = {name: value for name, value in self._left.items() if name not in inert}
        refuse_unsupported(left, neutral, self._prefix)
        for name in left:
            if name not in neutral:
                self._unknown.add(self._prefix + name, where)


def refuse_unsupported(fields: Mapping[str, Any], neutral: Mapping[str, tuple[object, ...]], prefix: str = "") -> None:
    """Raises UnsupportedParameter for a field of `neutral` with another value than those that ask for nothing."""
    for name, value in fields.items():
        values = neutral.get(name)
        if values is not None and not any(type(value) is type(one) and value == one for one in values):
            allowed = " or ".join(["to leave it out", *(repr(one) for one in values)])
            raise UnsupportedParameter(prefix + name, value, allowed)


def check_depth(value: object, where: str) -> None:
    """Raises InvalidParameter for what is nested deeper than MAX_DEPTH."""
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            inside
            for one in level
            if isinstance(one, dict | list)
            for inside in (one.values() if isinstance(one, dict) else one)
        ]
        if not level:
            return
    raise InvalidParameter(where, value, f"JSON up to {MAX_DEPTH} deep")


def check_unicode(value: object, where: str = "") -> None:
    """Raises RequestError for a lone surrogate in any text of a JSON value: no tokenizer takes one."""
    pending: list[object] = [value]
    while pending:
        one = pending.pop()
        if isinstance(one, str):
            if not _is_unicode(one):
                raise RequestError(_describe_surrogate(value, where))
        elif isinstance(one, dict):
            pending += one.keys()
            pending += one.values()
        elif isinstance(one, list):
            pending += one


def _is_unicode(text: str) -> bool:
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _describe_surrogate(value: object, where: str) -> str:
    """Where it stands, and which it is."""
    pending: list[tuple[str, object]] = [(where, value)]
    while pending:
        path, one = pending.pop()
        if isinstance(one, str) and not _is_unicode(one):
            at = next(i for i, char in enumerate(one) if "\ud800" <= char <= "\udfff")
            found = f"a lone surrogate (U+{ord(one[at]):04X}) at character {at}"
            return f"{cut(path or 'body', 128)}: {found} is not valid Unicode"
        if isinstance(one, dict):
            for name, inside in one.items():
                shown = cut(name.encode("ascii", "backslashreplace").decode())
                pending += [(path or "body", name), (f"{path}.{shown}" if path else shown, inside)]
        elif isinstance(one, list):
            pending += [(f"{path}[{i}]", inside) for i, inside in enumerate(one)]
    raise AssertionError("there was a lone surrogate")
