"""What a quantization_config means by a layer: its name, `re:` and a regular expression, or a class.

The expressions come out of an untrusted file, and Python's `re` may take for ever over one. So they are matched here,
by sets of positions: the work grows with expression × name², whatever they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NoReturn

from headrace.core.errors import UnsupportedModel, shorten

MAX_PATTERN = 512
"""Characters of an expression."""
MAX_NAME = 256
"""Characters of a layer's name: so that no search takes much memory."""
MAX_REPEAT = 64
MAX_WORK = 2**23
"""Steps, of a quarter of a microsecond each: forty thousand names by five ordinary expressions."""
MAX_DEPTH = 16
_UNBOUNDED = -1
_CLASSES: Mapping[str, Callable[[str], bool]] = MappingProxyType(
    {"d": str.isdecimal, "w": lambda char: char.isalnum() or char == "_", "s": str.isspace}
)
_EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings")


@dataclass(frozen=True, slots=True, eq=False)
class _Char:
    accepts: Callable[[str], bool]


@dataclass(frozen=True, slots=True, eq=False)
class _Text:
    text: str


@dataclass(frozen=True, slots=True, eq=False)
class _Edge:
    at_end: bool


@dataclass(frozen=True, slots=True, eq=False)
class _Look:
    node: _Node
    negative: bool


@dataclass(frozen=True, slots=True, eq=False)
class _Repeat:
    node: _Node
    least: int
    most: int


@dataclass(frozen=True, slots=True, eq=False)
class _Seq:
    nodes: tuple[_Node, ...]


@dataclass(frozen=True, slots=True, eq=False)
class _Either:
    nodes: tuple[_Node, ...]


_Node = _Char | _Text | _Edge | _Look | _Repeat | _Seq | _Either


class _Parser:
    """The part of Python's syntax that such files use. Raises UnsupportedModel for the rest of it."""

    def __init__(self, text: str, where: str) -> None:
        self.text, self.where, self.pos = text, where, 0
        if len(text) > MAX_PATTERN:
            self.fail(f"longer than {MAX_PATTERN} characters")

    def fail(self, what: str) -> NoReturn:
        raise UnsupportedModel(f"{self.where}: the pattern {shorten(self.text)} is not read: {what}")

    def whole(self) -> _Node:
        node = self.either(0)
        if self.pos < len(self.text):
            self.fail(f"{self.text[self.pos]!r} at {self.pos}")
        return node

    def peek(self) -> str:
        return self.text[self.pos : self.pos + 1]

    def take(self, literal: str) -> bool:
        found = self.text.startswith(literal, self.pos)
        self.pos += len(literal) * found
        return found

    def either(self, depth: int) -> _Node:
        if depth > MAX_DEPTH:
            self.fail(f"groups deeper than {MAX_DEPTH}")
        nodes = [self.sequence(depth)]
        while self.take("|"):
            nodes.append(self.sequence(depth))
        return nodes[0] if len(nodes) == 1 else _Either(tuple(nodes))

    def sequence(self, depth: int) -> _Node:
        nodes: list[_Node] = []
        while self.peek() not in ("", "|", ")"):
            node = self.repeated(self.atom(depth))
            if isinstance(node, _Text) and nodes and isinstance(nodes[-1], _Text):
                node = _Text(nodes.pop().text + node.text)  # type: ignore[union-attr]
            nodes.append(node)
        return nodes[0] if len(nodes) == 1 else _Seq(tuple(nodes))

    def repeated(self, node: _Node) -> _Node:
        bounds = self.bounds()
        if bounds is None:
            return node
        if isinstance(node, _Edge | _Look):
            self.fail("a repeated anchor")
        self.take("?")  # the lazy form: it finds the same names
        if self.peek() in ("*", "+", "?", "{"):
            self.fail("a repetition of a repetition")
        return _Repeat(node, *bounds)

    def bounds(self) -> tuple[int, int] | None:
        for sign, least, most in (("*", 0, _UNBOUNDED), ("+", 1, _UNBOUNDED), ("?", 0, 1)):
            if self.take(sign):
                return least, most
        if not self.take("{"):
            return None
        stop = self.text.find("}", self.pos)
        numbers = self.text[self.pos : max(stop, self.pos)].split(",")
        self.pos = stop + 1
        least_text, most_text = numbers[0], numbers[-1]
        is_number = (least_text.isdecimal() or (not least_text and len(numbers) == 2)) and len(numbers) < 3
        if stop < 0 or not is_number or not (most_text.isdecimal() or (not most_text and len(numbers) == 2)):
            self.fail("a '{' that counts nothing")
        least, most = int(least_text or 0), int(most_text) if most_text else _UNBOUNDED
        if max(least, most) > MAX_REPEAT or 0 <= most < least:
            self.fail(f"a repetition out of order, or of more than {MAX_REPEAT}")
        return least, most

    def atom(self, depth: int) -> _Node:
        char = self.peek()
        self.pos += 1
        if char == "(":
            return self.group(depth)
        if char == "[":
            return self.char_class()
        if char == ".":
            return _Char(lambda found: found != "\n")
        if char in "^$":
            return _Edge(at_end=char == "$")
        if char in "*+?{":
            self.fail(f"{char!r} with nothing before it")
        return self.escape() if char == "\\" else _Text(char)

    def group(self, depth: int) -> _Node:
        negative = self.take("?!")
        look = negative or self.take("?=")
        if not look and not self.take("?:") and self.peek() == "?":
            self.fail("a group of the form '(?'")
        node = self.either(depth + 1)
        if not self.take(")"):
            self.fail("a group that does not end")
        return _Look(node, negative) if look else node

    def escape(self) -> _Char | _Text:
        char = self.peek()
        self.pos += 1
        if char and char.lower() in _CLASSES:
            accepts = _CLASSES[char.lower()]
            return _Char(accepts if char.islower() else lambda found: not accepts(found))
        if not char or char.isalnum():
            self.fail(f"the escape \\{char}")
        return _Text(char)

    def char_class(self) -> _Node:
        inverted = self.take("^")
        tests: list[Callable[[str], bool]] = []
        while (char := self.peek()) != "]":
            self.pos += 1
            if not char:
                self.fail("a class that does not end")
            last = self.text[self.pos + 1 : self.pos + 2]
            if char == "\\":
                node = self.escape()
                tests.append(node.accepts if isinstance(node, _Char) else node.text.__eq__)
            elif self.peek() == "-" and last not in ("", "]", "\\"):
                self.pos += 2
                tests.append(_between(char, last))
            else:
                tests.append(char.__eq__)
        self.pos += 1
        if not tests:
            self.fail("an empty class")
        return _Char(lambda found: any(test(found) for test in tests) != inverted)


def _between(low: str, high: str) -> Callable[[str], bool]:
    return lambda found: low <= found <= high


class Work:
    """How many steps the expressions of one file may still take, all names together."""

    def __init__(self, where: str) -> None:
        self.where, self.left = where, MAX_WORK

    def take(self, steps: int) -> None:
        self.left -= steps
        if self.left < 0:
            raise UnsupportedModel(f"{self.where}: its patterns take more than {MAX_WORK} steps to match")


class _Search:
    """Where each node can end in one text, by where it begins. Every pair is worked out once."""

    def __init__(self, text: str, work: Work) -> None:
        self.text, self._work = text, work
        self._known: dict[tuple[int, int], frozenset[int]] = {}

    def ends(self, node: _Node, start: int) -> frozenset[int]:
        if isinstance(node, _Char):
            found = start < len(self.text) and node.accepts(self.text[start])
            return frozenset((start + 1,)) if found else frozenset()
        if isinstance(node, _Text):
            found = self.text.startswith(node.text, start)
            return frozenset((start + len(node.text),)) if found else frozenset()
        if isinstance(node, _Edge):
            found = start == (len(self.text) if node.at_end else 0)
            return frozenset((start,)) if found else frozenset()
        key = (id(node), start)
        if key not in self._known:
            self._known[key] = self._work_out(node, start)
        return self._known[key]

    def _work_out(self, node: _Look | _Repeat | _Seq | _Either, start: int) -> frozenset[int]:
        if isinstance(node, _Look):
            return frozenset((start,)) if bool(self.ends(node.node, start)) != node.negative else frozenset()
        if isinstance(node, _Either):
            return frozenset().union(*(self.ends(one, start) for one in node.nodes))
        if isinstance(node, _Repeat) and isinstance(node.node, _Char):
            return self._run(node.node, node, start)
        here = frozenset((start,))
        if isinstance(node, _Seq):
            for one in node.nodes:
                here = self._step(one, here)
            return here
        for _ in range(node.least):
            here = self._step(node.node, here)
        reached, fresh, rounds = set(here), here, node.least
        while fresh and rounds != node.most:
            fresh = self._step(node.node, fresh) - reached
            reached |= fresh
            rounds += 1
        self._work.take(rounds)
        return frozenset(reached)

    def _run(self, char: _Char, node: _Repeat, start: int) -> frozenset[int]:
        """The same for one character, which is what mostly repeats: `.*`, `[0-9]+`."""
        longest = len(self.text) if node.most == _UNBOUNDED else min(len(self.text), start + node.most)
        stop = start
        while stop < longest and char.accepts(self.text[stop]):
            stop += 1
        return frozenset(range(start + node.least, stop + 1))

    def _step(self, node: _Node, starts: frozenset[int]) -> frozenset[int]:
        found = [self.ends(node, start) for start in starts]
        self._work.take(1 + len(starts) + sum(map(len, found)) // 32)
        return frozenset().union(*found)


class Pattern:
    """One entry of `targets` or `ignore`. Raises UnsupportedModel for an expression that is not read."""

    def __init__(self, text: str, where: str, work: Work) -> None:
        self.text, self._work = text, work
        self._node = _Parser(text.removeprefix("re:"), where).whole() if text.startswith("re:") else None

    def rank(self, module: str) -> int | None:
        """How a layer's name is meant: 0 by itself, 1 by an expression that fits its beginning, 2 by its class, which
        is Embedding for a table of tokens and Linear for every other; None if it is not."""
        if self._node is not None:
            if len(module) > MAX_NAME:
                raise UnsupportedModel(f"the name of layer {shorten(module)} has over {MAX_NAME} characters")
            return 1 if _Search(module, self._work).ends(self._node, 0) else None
        if self.text == module:
            return 0
        kind = "Embedding" if module.rpartition(".")[2] in _EMBEDDINGS else "Linear"
        return 2 if self.text == kind else None
