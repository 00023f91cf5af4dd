"""Which LoRA adapters a user names, and where they lie."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from headrace.core.errors import InvalidParameter

MAX_ADAPTERS = 1024
_NAME = re.compile(r"[\w./:@+-]{1,128}", re.ASCII)
_ENTRY = "NAME=FOLDER, the name of up to 128 letters, digits and . _ - / : @ +"


def parse_adapters(value: object) -> dict[str, str]:
    """{name: folder}, or entries NAME=FOLDER -> folder by name. Raises InvalidParameter."""
    if isinstance(value, Mapping):
        pairs = list(value.items())
    elif isinstance(value, Sequence) and not isinstance(value, str | bytes):
        pairs = [_pair(entry) for entry in value]
    else:
        raise InvalidParameter("adapters", value, f"entries {_ENTRY}, or an object of names and folders")
    if len(pairs) > MAX_ADAPTERS:
        raise InvalidParameter("adapters", f"{len(pairs)} entries", f"up to {MAX_ADAPTERS}")
    found: dict[str, str] = {}
    for name, folder in pairs:
        if not isinstance(name, str) or not _NAME.fullmatch(name) or not isinstance(folder, str) or not folder:
            raise InvalidParameter("adapters", f"{name}={folder}", _ENTRY)
        if name in found:
            raise InvalidParameter("adapters", name, "each name once")
        found[name] = folder
    return found


def _pair(entry: object) -> tuple[str, str]:
    name, sign, folder = entry.partition("=") if isinstance(entry, str) else ("", "", "")
    if not sign:
        raise InvalidParameter("adapters", entry, _ENTRY)
    return name, folder
