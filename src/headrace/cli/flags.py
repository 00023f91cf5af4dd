"""Flags made from the configuration dataclasses and their docstrings."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields
from typing import Any

from headrace.core.config import EngineConfig
from headrace.core.docs import field_docs
from headrace.core.types import SamplingParams

TYPES: Mapping[str, type] = {
    "int": int,
    "int | None": int,
    "float": float,
    "float | None": float,
    "str": str,
    "str | None": str,
}
NOT_FLAGS = frozenset({"stop_token_ids", "logit_bias", "allowed_token_ids", "bad_words_ids", "skip_special_tokens"})
"""Fields of SamplingParams that are given in a file of prompts, not on the command line."""


class FieldName(str):
    """The name of a field of a config, as the help of its flag, until somebody reads it."""

    __slots__ = ("config",)

    def __new__(cls, config: type, name: str) -> FieldName:
        self = super().__new__(cls, name)
        self.config = config
        return self

    config: type


class FieldHelp(argparse.HelpFormatter):
    """Writes the help of fields' flags from the fields' docstrings. Only where help is shown is a source read."""

    def __init__(self, prog: str, *settings: Any, **more: Any) -> None:
        super().__init__(prog, *settings, **more)
        self._helps: dict[type, Mapping[str, str]] = {}

    def _get_help_string(self, action: argparse.Action) -> str | None:
        name = action.help
        if not isinstance(name, FieldName):
            return name
        config = name.config
        if config not in self._helps:
            docs = field_docs(config)
            self._helps[config] = {item.name: _help(item, docs[item.name]) for item in fields(config)}
        return self._helps[config][name]


def add_engine_flags(parser: argparse.ArgumentParser, leave_out: tuple[str, ...] = ()) -> None:
    """MODEL and a flag for each other field of EngineConfig."""
    parser.add_argument("model", metavar="MODEL", help=FieldName(EngineConfig, "model"))
    _add_all(parser, "engine", EngineConfig, ("model", *leave_out))


def add_sampling_flags(parser: argparse.ArgumentParser, leave_out: tuple[str, ...] = ()) -> None:
    """A flag for each field of SamplingParams that can be a flag."""
    _add_all(parser, "sampling", SamplingParams, (*NOT_FLAGS, *leave_out))


def add_flags(parser: argparse.ArgumentParser, title: str, config: type) -> None:
    """A flag for each field of a config."""
    _add_all(parser, title, config, ())


def _add_all(parser: argparse.ArgumentParser, title: str, cls: type, leave_out: tuple[str, ...]) -> None:
    group = parser.add_argument_group(title)
    for item in fields(cls):
        if item.name not in leave_out:
            _add(group, item, FieldName(cls, item.name))
    parser.formatter_class = FieldHelp


def _add(group: argparse._ArgumentGroup, item: Field[Any], where: FieldName) -> None:
    flag = "--" + item.metadata.get("flag", item.name).replace("_", "-")
    if item.default is False:
        group.add_argument(flag, action="store_true", default=argparse.SUPPRESS, help=where)
    elif item.default is True:
        no_flag = "--no-" + item.name.replace("_", "-")
        group.add_argument(no_flag, dest=item.name, action="store_false", default=argparse.SUPPRESS, help=where)
    elif _is_list(item):
        metavar = item.metadata.get("metavar", "TEXT")
        group.add_argument(
            flag, dest=item.name, action="append", metavar=metavar, default=argparse.SUPPRESS, help=where
        )
    else:
        kind = TYPES[str(item.type)]
        metavar = {int: "N", float: "X", str: "NAME"}[kind]
        group.add_argument(flag, type=kind, metavar=metavar, default=argparse.SUPPRESS, help=where)


def _is_list(item: Field[Any]) -> bool:
    return str(item.type).startswith("tuple[str, ...]")


def _help(item: Field[Any], doc: str) -> str:
    text = " ".join(doc.split()).replace("%", "%%")
    if item.default is True:
        return f"Do not {text[0].lower()}{text[1:]}"
    if _is_list(item):
        return text + " Repeatable."
    said = item.default is not False and item.default not in (None, MISSING)
    return f"{text} Default: {item.default}." if said else text


def given(arguments: argparse.Namespace, cls: type) -> dict[str, Any]:
    """The fields of `cls` that were set on the command line."""
    names = {item.name for item in fields(cls)}
    return {name: value for name, value in vars(arguments).items() if name in names}
