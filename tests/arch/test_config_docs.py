"""Every field of core/config.py says what it is: flags, the documentation page and /info are made from these texts."""

from __future__ import annotations

import ast

import pytest

from tests.arch.rules import PACKAGE, last


def is_dataclass(node: ast.ClassDef) -> bool:
    heads = [part.func if isinstance(part, ast.Call) else part for part in node.decorator_list]
    return any(last(head) == "dataclass" for head in heads)


def undocumented(tree: ast.Module) -> list[str]:
    """`Class.field` of every dataclass field that no non-empty string literal follows."""
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.ClassDef) or not is_dataclass(node):
            continue
        for field, after in zip(node.body, [*node.body[1:], None], strict=True):
            if isinstance(field, ast.AnnAssign):
                match after:
                    case ast.Expr(value=ast.Constant(value=str(text))) if text.strip():
                        pass
                    case _:
                        found.append(f"{node.name}.{ast.unparse(field.target)}")
    return found


def test_every_config_field_has_a_docstring() -> None:
    tree = ast.parse((PACKAGE / "core" / "config.py").read_text(encoding="utf-8"))
    assert any(isinstance(node, ast.ClassDef) and is_dataclass(node) for node in tree.body)
    assert undocumented(tree) == []


@pytest.mark.parametrize("decorator", ["dataclass", "dataclass(frozen=True)", "dataclasses.dataclass()"])
def test_missing_docstring_is_reported(decorator: str) -> None:
    text = f'@{decorator}\nclass A:\n    a: int\n    """Said."""\n    b: int = 1\n    c: str = ""\n    " "\n'
    assert undocumented(ast.parse(text)) == ["A.b", "A.c"]


def test_other_classes_are_free() -> None:
    assert undocumented(ast.parse("class A:\n    a: int\n")) == []
