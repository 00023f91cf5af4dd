"""Renders chat templates in a process that can be killed: a template is untrusted, and threads cannot be stopped."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from headrace.core.errors import TemplateError
from headrace.text.child_process import ChildProcess, ChildStopped

_MAX_SOURCE = 2**20
_MAX_INPUT = 20 * 2**20
_MIB = 2**20
# The kinds of answer, as template_child writes them; that module is not imported here, since it imports jinja2.
_TEXT, _RETIRE, _FAULT, _NO_MEMORY = b"t", b"T", b"f", b"m"


@dataclass(frozen=True, slots=True)
class TemplateLimits:
    """What one rendering may cost, compiling included."""

    cpu_s: float = 1.0
    """Seconds of CPU time."""
    wall_s: float = 10.0
    """Seconds in all; larger, since a busy machine is no fault of the template."""
    memory_bytes: int = 112 * _MIB
    """Address space above what the process has when it starts. What is resident may grow by a little more, by pages
    that were mapped before: it stays below 128 MB."""
    output: int = 4 * _MIB
    """Characters."""
    start_s: float = 60.0
    """Seconds for the process to start; not counted in `wall_s`."""


class TemplateRenderer:
    """At most one template process: started with the first rendering (or `start`), started anew after one that had to
    be killed. Thread-safe; one rendering at a time."""

    def __init__(self, limits: TemplateLimits | None = None) -> None:
        self.limits = limits or TemplateLimits()
        self._lock = threading.Lock()
        self._child: ChildProcess | None = None

    def start(self) -> None:
        """Starts the process without waiting for it. Raises EngineError."""
        with self._lock:
            self._living_child()

    def render(self, source: str, variables: Mapping[str, object], now: datetime | None = None) -> str:
        """What the template `source` writes; `variables` are JSON values, `now` is what its clock says.

        Raises TemplateError: no template, one that refuses or fails, or one that meets a limit; EngineError if the
        process cannot be started.
        """
        if len(source) > _MAX_SOURCE:
            raise TemplateError(f"the chat template has {len(source)} characters, allowed: {_MAX_SOURCE}")
        request = {"now": (now or datetime.now()).isoformat(), "source": source, "variables": variables}
        try:
            data = json.dumps(request, ensure_ascii=False).encode("utf-8", "surrogatepass")
        except ValueError as error:  # an integer of more digits than Python turns into text
            raise TemplateError(f"the messages cannot be written as JSON: {error}") from None
        if len(data) > _MAX_INPUT:
            raise TemplateError(f"the messages and the template have {len(data)} bytes, allowed: {_MAX_INPUT}")
        with self._lock:
            child = self._living_child()
            try:
                answer = child.ask(data, self.limits.wall_s, self.limits.cpu_s)
            except ChildStopped as stopped:
                self._drop()
                raise TemplateError(f"the chat template {stopped}") from None
            except BaseException:  # Ctrl-C too: what the process would answer later belongs to nobody
                self._drop()
                raise
            kind, text = answer[:1], answer[1:].decode("utf-8", "surrogatepass")
            if kind not in (_TEXT, _FAULT):
                self._drop()
        if kind in (_TEXT, _RETIRE):
            return text
        if kind == _FAULT:
            raise TemplateError(text)
        raise TemplateError(f"the chat template needs more than {self.limits.memory_bytes // _MIB} MiB of memory")

    def close(self) -> None:
        """Ends the process. The next rendering would start another."""
        with self._lock:
            self._drop()

    def _living_child(self) -> ChildProcess:
        if self._child is not None and not self._child.alive():
            self._drop()
        if self._child is None:
            limits = self.limits
            self._child = ChildProcess(
                "chat templates",
                "headrace.text.template_child",
                (limits.memory_bytes, limits.cpu_s, limits.output),
                ("jinja2", "markupsafe"),
                limits.start_s,
            )
        return self._child

    def _drop(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            child.close()
