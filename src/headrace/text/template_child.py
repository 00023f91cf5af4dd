"""What runs in the template process: reads a template and its variables from fd 0, writes the text or the fault back.

Law: a template may spend its limits and the process, and nothing else. The process is started with an empty
environment, no other file descriptors and a session of its own (a Ctrl-C in the terminal does not reach it), and gives
up memory, files and child processes before it reads the first template. CPU time is ended by the kernel (SIGPROF at
its default kills), since no Python code runs while one long C call does.

A frame is four bytes of length (big-endian) and that many bytes. A request is JSON; an answer is one byte of kind and
UTF-8. Lone surrogates pass both ways. The standard library and jinja2 only: the start is paid for in milliseconds.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import resource
import select
import signal
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from headrace.core.errors import TemplateError
from headrace.text.sandbox import compile_template, render_template

READY, TEXT, FAULT, NO_MEMORY = b"r", b"t", b"f", b"m"
RETIRE = b"T"
"""A text after which the process ends: it has grown, and the next template shall have its full share."""
_CHANNEL = 0
_PARENT_CHECK_MS = 10_000
_WARM_UP = (
    "{% macro m(x) %}{{ x | tojson(indent=2) | pprint }}{% endmacro %}{% for i in range(2) %}{{ m([i]) }}{% endfor %}"
    "{{ '%s' % strftime_now('%Y') }}{{ '{}'.format(1) }}{{ {}.a.b }}"
)
"""Makes jinja2 import what it imports late, on an error too: afterwards no file can be opened."""


def main(memory_bytes: int, cpu_s: float, max_output: int) -> None:
    """Serves until the parent's end of the channel closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # the parent may have ignored or blocked it, and that is inherited
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGPROF})
    now = datetime.now()
    with contextlib.suppress(TemplateError):
        render_template(compile_template(_WARM_UP, max_output, lambda: now), {}, max_output)
    statm = _open_statm()
    used = _address_space(statm)
    _give_up(used + memory_bytes if used else None)
    renderer = _Renderer(max_output)
    parent = os.getppid()
    _send(READY)
    while (frame := _receive(parent)) is not None:
        signal.setitimer(signal.ITIMER_PROF, cpu_s)
        answer = renderer.answer(frame)
        signal.setitimer(signal.ITIMER_PROF, 0)
        if answer[:1] == TEXT and _address_space(statm) > used + memory_bytes // 2:
            answer = RETIRE + answer[1:]
        _send(answer)
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


def _open_statm() -> int | None:
    try:
        return os.open("/proc/self/statm", os.O_RDONLY)
    except OSError:
        return None


def _address_space(statm: int | None) -> int:
    """Bytes mapped now; 0 where the platform does not say. (ru_maxrss would count what the parent had before vfork.)"""
    return 0 if statm is None else int(os.pread(statm, 64, 0).split()[0]) * resource.getpagesize()


def _give_up(address_space: int | None) -> None:
    """Memory, files, children. A limit that the platform lacks is left out; `poll` needs room for one descriptor."""
    limits = {"RLIMIT_FSIZE": 0, "RLIMIT_CORE": 0, "RLIMIT_NPROC": 0, "RLIMIT_NOFILE": 1, "RLIMIT_AS": address_space}
    for name, value in limits.items():
        if value is not None and hasattr(resource, name):
            with contextlib.suppress(OSError, ValueError):
                resource.setrlimit(getattr(resource, name), (value, value))


def _receive(parent: int) -> bytes | None:
    """The next frame; None when the parent has closed its end or is gone."""
    waiting = select.poll()
    waiting.register(_CHANNEL, select.POLLIN)
    while not waiting.poll(_PARENT_CHECK_MS):
        if os.getppid() != parent:  # a fork of the parent may hold the channel open
            return None
    head = _read(4)
    return None if head is None else _read(int.from_bytes(head, "big"))


def _read(count: int) -> bytes | None:
    data = bytearray()
    while len(data) < count:
        chunk = os.read(_CHANNEL, min(count - len(data), 2**16))
        if not chunk:
            return None
        data += chunk
    return bytes(data)


def _send(data: bytes) -> None:
    view = memoryview(len(data).to_bytes(4, "big") + data)
    while view:
        view = view[os.write(_CHANNEL, view) :]
