"""What makes two runs the same run, and the ids and seeds that follow from it.

Nothing is drawn: ids are hashes of the settings and of the input line, seeds of the line alone, `created` is the time
the input was last changed. So a line computed again gives the same bytes, and two runs can be compared with `cmp`. What
an image is that a line names by its address (`http:`, `file:`) is another's to say: it is looked up when the line is.
"""

from __future__ import annotations

import hashlib
from typing import Any

from headrace.batch.lines import InputFile, RawLine
from headrace.engine.identity import ModelIdentity, identify_model
from headrace.engine.model import OpenModel


class Identity(ModelIdentity):
    """Of one run over one input."""

    def manifest(self, source: InputFile) -> dict[str, Any]:
        """What the journal begins with."""
        return {"settings": dict(self.settings), "input_sha256": source.sha256, "created": source.mtime_s}

    def line_id(self, line: RawLine) -> str:
        """24 hex digits; different for each line of the file."""
        return self._hash("line", line)[:24]

    def answer_id(self, line: RawLine) -> str:
        """32 hex digits, for the body."""
        return self._hash("answer", line)[:32]

    def request_id(self, line: RawLine) -> str:
        return "req_" + self._hash("request", line)[:32]

    def _hash(self, what: str, line: RawLine) -> str:
        text = f"{what} {self.digest} {line.index} ".encode()
        return hashlib.sha256(text + line.digest).hexdigest()


def line_seed(line: RawLine) -> int:
    """The seed of a line that draws and names none: of the line alone, so it stays when lines around it change."""
    return int.from_bytes(hashlib.sha256(b"seed " + line.digest).digest()[:8], "little", signed=True)


def identify(opened: OpenModel) -> Identity:
    """Of a run with this model and these settings. Raises ConfigError if an adapter has the model's name."""
    model = identify_model(opened)
    return Identity(model.settings, model.served, model.digest)
