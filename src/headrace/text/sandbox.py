"""The jinja2 sandbox for chat templates: no Python internals, no changes to its input, no value beyond a size.

jinja2's own sandbox bounds `range` and attributes; what a value may grow to is bounded here, at each operation that can
make a large value from small ones. It runs in a process of its own (`template_child`), which bounds time and memory.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from headrace.core.errors import TemplateError

_MAX_BITS = 2**14
"""Bits of an integer product or power."""
_WIDE = re.compile(r"\d{6,}|\*|\{[^{}]*:[^{}]*\{")
"""A format string with a width (or precision) of six digits, or with one taken from an argument."""
_PADDERS = frozenset(("center", "ljust", "rjust", "zfill", "expandtabs"))
_COUNTED_FILTERS = ("center", "batch", "slice", "wordwrap", "truncate", "round", "tojson")
_MAX_MESSAGE = 10_000
_MAX_COUNT = 10_000
"""Width, indent or count given to a filter or to a string method."""


def compile_template(source: str, max_size: int, clock: Callable[[], datetime]) -> jinja2.Template:
    """A template whose values hold at most `max_size` characters or items; `clock` is what `strftime_now` reads.

    Raises TemplateError if the source is not a template.
    """
    try:
        return _Environment(max_size, clock).from_string(source)
    except MemoryError:
        raise
    except Exception as error:
        raise TemplateError(f"the chat template cannot be read: {_one_line(error)}") from None


def render_template(template: jinja2.Template, variables: Mapping[str, Any], max_output: int) -> str:
    """What the template writes. Raises TemplateError if it refuses, fails, or writes over `max_output` characters."""
    out: list[str] = []
    left = max_output
    try:
        for chunk in template.generate(variables):
            left -= len(chunk)
            if left < 0:
                raise TemplateError(f"the chat template writes more than {max_output} characters")
            out.append(chunk)
    except (MemoryError, TemplateError):
        raise
    except Exception as error:
        raise TemplateError(f"the chat template failed: {_one_line(error)}") from None
    return "".join(out)


def _one_line(error: Exception) -> str:
    text = " ".join(str(error)[:_MAX_MESSAGE].split()) or type(error).__name__
    return text if len(text) <= 300 else text[:299] + "…"


class _Clock:
    """`strftime_now`; a callable whose only attribute the sandbox refuses."""

    __slots__ = ("_now",)

    def __init__(self, now: Callable[[], datetime]) -> None:
        self._now = now

    def __call__(self, pattern: str) -> str:
        return self._now().strftime(pattern)


class _Dict:
    """`dict(…)` and `dict.fromkeys`, without the type behind them."""

    __slots__ = ()

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, keys: Iterable[Any], value: Any = None) -> dict[Any, Any]:
        return dict.fromkeys(keys, value)


class _GenerationTag(Extension):
    """`{% generation %}…{% endgeneration %}` marks the assistant's words for training; here it is its content."""

    tags = frozenset(("generation",))  # type: ignore[assignment] # jinja2 declares a set and only reads it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


class _ConcatAsJoin(NodeTransformer):
    """`a ~ b` becomes `[a, b] | join`: the operator has no hook, the filter has a bound."""

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802 (jinja2's name)
        parts = [self.visit(part) for part in node.nodes]
        items = nodes.List(parts).set_lineno(node.lineno)
        return nodes.Filter(items, "join", [], [], None, None).set_lineno(node.lineno)


class _Namespace(Namespace):
    """`namespace()` that holds no name with a leading underscore: those lead to Python's internals."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        # As jinja2's own: `namespace(self=…)` is a name like the others.
        attributes = dict(*args[1:], **kwargs)
        for name in attributes:
            _check_name(name)
        Namespace.__init__(args[0], attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"namespace attribute {name!r} begins with an underscore")


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self, max_size: int, clock: Callable[[], datetime]) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, "jinja2.ext.loopcontrols"])
        self._max_size = max_size
        self.concat = self._join  # type: ignore[method-assign]  # what a macro or a block `set` wrote
        for name in _COUNTED_FILTERS:
            self.filters[name] = _with_small_counts(self.filters[name])
        self.filters["tojson"] = _with_small_counts(_to_json)
        self.filters["join"] = self._bounded(self.filters["join"], self._check_join)
        self.filters["replace"] = self._bounded(self.filters["replace"], self._check_replace)
        self.filters["indent"] = self._bounded(self.filters["indent"], self._check_indent)
        self.filters["format"] = self._bounded(self.filters["format"], self._check_format)
        del self.globals["lipsum"]
        self.globals["dict"] = _Dict()
        self.globals["namespace"] = _Namespace
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _Clock(clock)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree: nodes.Template = _ConcatAsJoin().visit(super()._parse(source, name, filename))
        return tree

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "+" and _sized(left) and _sized(right):
            self._check_size(len(left) + len(right))
        elif operator == "*" and (_sized(left) or _sized(right)):
            items, times = (left, right) if _sized(left) else (right, left)
            if isinstance(times, int):
                self._check_size(len(items) * max(times, 0))
        elif operator in ("*", "**") and isinstance(left, int) and isinstance(right, int):
            bits = abs(left).bit_length()
            if (bits + abs(right).bit_length() if operator == "*" else bits * abs(right)) > _MAX_BITS:
                raise SecurityError(f"an integer of more than {_MAX_BITS} bits")
        elif operator == "%" and isinstance(left, str):
            self._check_format(left)
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805 (jinja2's names)
        owner, name = getattr(__obj, "__self__", None), getattr(__obj, "__name__", "")
        if isinstance(owner, str):
            if name in _PADDERS:
                _check_counts(args, kwargs)
            elif name == "replace" and len(args) >= 2:
                __self._check_replace(owner, *args)
            elif name == "join" and args:
                args = (list(args[0]), *args[1:])
                __self._check_join(args[0], owner)
        return super().call(__context, __obj, *args, **kwargs)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is not None:
            self._check_format(value.__self__)
        return wrapped

    def _bounded(self, function: Callable[..., Any], check: Callable[..., None]) -> Callable[..., Any]:
        """`function` after `check` of its arguments; a filter that jinja2 gives a context gets it."""
        takes_context = hasattr(function, "jinja_pass_arg")

        @functools.wraps(function)
        def bounded(*args: Any, **kwargs: Any) -> Any:
            before, given = (args[:1], args[1:]) if takes_context else ((), args)
            if given and not isinstance(given[0], str | Mapping) and isinstance(given[0], Iterable):
                given = (list(given[0]), *given[1:])
            check(*given, **kwargs)
            return function(*before, *given, **kwargs)

        return bounded

    def _check_size(self, size: int) -> None:
        if size > self._max_size:
            raise SecurityError(f"a value of more than {self._max_size} characters or items")

    def _join(self, parts: Iterable[str]) -> str:
        parts = list(parts)
        self._check_size(sum(map(len, parts)))
        return "".join(parts)

    def _check_join(self, value: Any, d: Any = "", attribute: Any = None) -> None:
        if _sized(value) or isinstance(value, Mapping):
            items = len(value)
            written = 0 if attribute is not None else sum(len(i) if isinstance(i, str) else 1 for i in value)
            self._check_size(written + items * len(str(d)))

    def _check_replace(self, value: Any, old: Any = "", new: Any = "", count: Any = None) -> None:
        text = str(value)
        self._check_size(len(text) + text.count(str(old)) * len(str(new)))

    def _check_indent(self, value: Any, width: Any = 4, *_: Any, **__: Any) -> None:
        text = str(value)
        self._check_size(len(text) + (text.count("\n") + 1) * (len(width) if isinstance(width, str) else abs(width)))

    def _check_format(self, value: Any, *_: Any, **__: Any) -> None:
        if isinstance(value, str) and _WIDE.search(value):
            raise SecurityError("a format width of more than 5 digits, or one from an argument")


def _sized(value: Any) -> bool:
    return isinstance(value, str | list | tuple)


def _check_counts(args: Iterable[Any], kwargs: Mapping[str, Any]) -> None:
    for value in (*args, *kwargs.values()):
        if isinstance(value, int) and abs(value) > _MAX_COUNT:
            raise SecurityError(f"a width or count of more than {_MAX_COUNT}")


def _with_small_counts(function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter whose numbers, after the value itself, are small."""
    skip = 2 if hasattr(function, "jinja_pass_arg") else 1

    @functools.wraps(function)
    def bounded(*args: Any, **kwargs: Any) -> Any:
        _check_counts(args[skip:], kwargs)
        return function(*args, **kwargs)

    return bounded


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: object) -> None:
    raise jinja2.TemplateError(str(message))
