"""Reports are written whole or not at all, and a path that cannot be written is found out before the work."""

from __future__ import annotations

import os
from pathlib import Path

from headrace.core.errors import InvalidParameter

ALLOWED = "a file in a folder that can be written to"


class ReportFile:
    """A path that was seen to be writable. Raises InvalidParameter, naming `field`, if it is not."""

    def __init__(self, field: str, path: str) -> None:
        self.path = path
        refusal = InvalidParameter(field, path, ALLOWED)
        try:
            # Through a link to what it names, so that the link stays.
            self._target = Path(path).resolve()
            if not path or (self._target.exists() and not self._is_open_to_us()):
                raise refusal
            self._temporary = self._target.with_name(f".{self._target.name[:200]}.{os.getpid()}.tmp")
            self._write_temporary("")
            self._temporary.unlink()
        except (OSError, ValueError, RuntimeError) as error:
            raise refusal from error

    def _is_open_to_us(self) -> bool:
        return self._target.is_file() and os.access(self._target, os.W_OK)

    def _write_temporary(self, text: str) -> None:
        try:
            self._temporary.write_text(text, encoding="utf-8")
        except OSError:
            self._temporary.unlink(missing_ok=True)
            raise

    def write(self, text: str) -> None:
        """The whole content: whoever reads the path sees the old file or the new one. Raises OSError."""
        self._write_temporary(text)
        self._temporary.replace(self._target)
