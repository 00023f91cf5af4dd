"""Solvers of other makers that write to standard output whatever they are told."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager

STDOUT = 1


@contextmanager
def quiet() -> Iterator[None]:
    """Nothing reaches the process's standard output, C code's own buffers included: HiGHS prints a line now and then
    that no option turns off, and it would be in the middle of a JSON answer."""
    try:
        kept = os.dup(STDOUT)
    except OSError:  # closed: nothing can reach it
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    flush = ctypes.CDLL(None).fflush
    flush(None)
    os.dup2(nowhere, STDOUT)
    try:
        yield
    finally:
        flush(None)
        os.dup2(kept, STDOUT)
        os.close(kept)
        os.close(nowhere)
