"""The docstrings of a dataclass's fields: the one source of flag help, the settings page and /info."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Mapping


def field_docs(cls: type) -> Mapping[str, str]:
    """Field -> the string literal that follows it in the class's source. Raises OSError if there is no source."""
    body = ast.parse(inspect.getsource(cls)).body[0]
    if not isinstance(body, ast.ClassDef):
        raise TypeError(f"{cls} is not a class")
    docs: dict[str, str] = {}
    for field, literal in zip(body.body, body.body[1:], strict=False):
        if not isinstance(field, ast.AnnAssign) or not isinstance(field.target, ast.Name):
            continue
        if isinstance(literal, ast.Expr) and isinstance(literal.value, ast.Constant):
            docs[field.target.id] = inspect.cleandoc(str(literal.value.value))
    return docs
