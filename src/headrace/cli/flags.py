"""Flags made from the configuration dataclasses and their docstrings."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields
from typing import Any

from headrace.core.config import EngineConfig
from headrace.core.docs import field_docs
from headrace.core.types import SamplingParams

TYPES: Mapping[str, type] = {"int": int, "int | None": int, "float": float, "str": str}
NOT_FLAGS = frozenset({"stop_token_ids", "logit_bias", "allowed_token_ids", "bad_words_ids", "skip_special_tokens"})
"""Fields of SamplingParams that are given in a file of prompts, not on the command line."""


def add_engine_flags(parser: argparse.ArgumentParser, leave_out: tuple[str, ...] = ()) -> None:
    """MODEL and a flag for each other field of EngineConfig."""
    docs = field_docs(EngineConfig)
    parser.add_argument("model", metavar="MODEL", help=docs["model"])
    group = parser.add_argument_group("engine")
    for item in fields(EngineConfig):
        if item.name not in ("model", *leave_out):
            _add(group, item, docs)


def add_sampling_flags(parser: argparse.ArgumentParser, leave_out: tuple[str, ...] = ()) -> None:
    """A flag for each field of SamplingParams that can be a flag."""
    docs = field_docs(SamplingParams)
    group = parser.add_argument_group("sampling")
    for item in fields(SamplingParams):
        if item.name not in NOT_FLAGS and item.name not in leave_out:
            _add(group, item, docs)


def _add(group: argparse._ArgumentGroup, item: Field[Any], docs: Mapping[str, str]) -> None:
    flag = "--" + item.metadata.get("flag", item.name).replace("_", "-")
    text = " ".join(docs[item.name].split()).replace("%", "%%")
    if item.default is False:
        group.add_argument(flag, action="store_true", default=argparse.SUPPRESS, help=text)
    elif item.default is True:
        no_flag = "--no-" + item.name.replace("_", "-")
        turned = f"Do not {text[0].lower()}{text[1:]}"
        group.add_argument(no_flag, dest=item.name, action="store_false", default=argparse.SUPPRESS, help=turned)
    elif str(item.type).startswith("tuple[str, ...]"):
        metavar, text = item.metadata.get("metavar", "TEXT"), text + " Repeatable."
        group.add_argument(flag, dest=item.name, action="append", metavar=metavar, default=argparse.SUPPRESS, help=text)
    else:
        kind = TYPES[str(item.type)]
        metavar = {int: "N", float: "X", str: "NAME"}[kind]
        default = "" if item.default in (None, MISSING) else f" Default: {item.default}."
        group.add_argument(flag, type=kind, metavar=metavar, default=argparse.SUPPRESS, help=text + default)


def given(arguments: argparse.Namespace, cls: type) -> dict[str, Any]:
    """The fields of `cls` that were set on the command line."""
    names = {item.name for item in fields(cls)}
    return {name: value for name, value in vars(arguments).items() if name in names}
