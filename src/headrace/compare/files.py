"""Reports are written whole or not at all, and a path that cannot be written is found out before the work."""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType
from typing import Self

from headrace.core.errors import InvalidParameter

ALLOWED = "a file in a folder that can be written to"


class ReportFile:
    """A file beside its final place, renamed onto it by `write`. Use in a `with`: what is not written leaves nothing.

    Raises InvalidParameter, naming `field`, if there can be no such file.
    """

    def __init__(self, field: str, path: str) -> None:
        self.path = path
        shown = InvalidParameter(field, path, ALLOWED)
        try:
            # Through a link to what it names, so that the link stays.
            self._target = Path(path).resolve()
            if not path or (self._target.exists() and not self._target.is_file()):
                raise shown
            self._temporary = self._target.with_name(f".{self._target.name[:200]}.{field}.{os.getpid()}.tmp")
            self._file = self._temporary.open("x", encoding="utf-8")
            if self._target.exists() and not os.access(self._target, os.W_OK):
                self.discard()
                raise shown
        except (OSError, ValueError, RuntimeError) as error:
            raise shown from error

    def write(self, text: str) -> None:
        """The whole content. Raises OSError if the disk is full."""
        with self._file:
            self._file.write(text)
        self._temporary.replace(self._target)

    def discard(self) -> None:
        self._file.close()
        self._temporary.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.discard()
