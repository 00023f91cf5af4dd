"""What runs in the template process: reads a template and its variables from fd 0, writes the text or the fault back.

Law: a template may spend its limits and the process, and nothing else. The process is started with an empty
environment, no other file descriptors and a session of its own (a Ctrl-C in the terminal does not reach it), and gives
up memory, files and child processes before it reads the first template.

A request is JSON; an answer is one byte of kind and UTF-8. Lone surrogates pass both ways. The standard library and
jinja2 only: the start is paid for in milliseconds.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from headrace.core.errors import TemplateError
from headrace.text import child_channel as channel
from headrace.text.sandbox import compile_template, render_template

TEXT, FAULT, NO_MEMORY = b"t", b"f", b"m"
RETIRE = b"T"
"""A text after which the process ends: it has grown, and the next template shall have its full share."""
_WARM_UP = (
    "{% macro m(x) %}{{ x | tojson(indent=2) | pprint }}{% endmacro %}{% for i in range(2) %}{{ m([i]) }}{% endfor %}"
    "{{ '%s' % strftime_now('%Y') }}{{ '{}'.format(1) }}{{ {}.a.b }}"
)
"""Makes jinja2 import what it imports late, on an error too: afterwards no file can be opened."""


def main(memory_bytes: str, cpu_s: str, max_output: str) -> None:
    """Serves until the parent's end of the channel closes."""
    channel.restore_signals()
    memory, output = int(memory_bytes), int(max_output)
    now = datetime.now()
    with contextlib.suppress(TemplateError):
        render_template(compile_template(_WARM_UP, output, lambda: now), {}, output)
    statm = channel.open_statm()
    used = channel.address_space(statm)
    channel.give_up(used + memory if used else None)
    renderer = _Renderer(output)
    parent = os.getppid()
    channel.send(channel.READY)
    while (frame := channel.receive(parent)) is not None:
        channel.limit_cpu(float(cpu_s))
        answer = renderer.answer(frame)
        channel.limit_cpu(0)
        if answer[:1] == TEXT and channel.address_space(statm) > used + memory // 2:
            answer = RETIRE + answer[1:]
        channel.send(answer)
        if answer[:1] in (RETIRE, NO_MEMORY):
            return


class _Renderer:
    def __init__(self, max_output: int) -> None:
        self._max_output = max_output
        self._now = datetime.now()
        self._compile = functools.lru_cache(maxsize=8)(
            lambda source: compile_template(source, max_output, lambda: self._now)
        )

    def answer(self, frame: bytes) -> bytes:
        try:
            request: Mapping[str, Any] = json.loads(frame.decode("utf-8", "surrogatepass"))
            self._now = datetime.fromisoformat(request["now"])
            template = self._compile(request["source"])
            text = render_template(template, request["variables"], self._max_output)
            return TEXT + text.encode("utf-8", "surrogatepass")
        except TemplateError as error:
            return FAULT + str(error).encode("utf-8", "surrogatepass")
        except MemoryError:
            return NO_MEMORY
