"""Triton's interpreter, as tests need it: kernels run on the CPU, in numpy.

TRITON_INTERPRET=1 must be in the environment before triton is first imported: a kernel is made for the interpreter or
for a GPU when its module is.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np


@contextmanager
def loops_run() -> Iterator[None]:
    """The interpreter counts loops with arrays of one element, which numpy 2.4 no longer takes for numbers."""
    from triton.runtime import interpreter

    original = interpreter._patch_lang_tensor

    def patched(tensor: type, scope: Any) -> None:
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patched
    try:
        yield
    finally:
        interpreter._patch_lang_tensor = original


@contextmanager
def products_in_order() -> Iterator[None]:
    """Products are summed along k, one after the other: with BLAS a row's bits depend on its place among the others,
    which they do not on tensor cores. For tests of batch invariance; slow."""
    from triton.runtime import interpreter

    def create_dot(_: object, a: Any, b: Any, d: Any, *__: object) -> Any:
        a_MK, b_KN = (x.data.astype(d.data.dtype) for x in (a, b))
        total = np.zeros((a_MK.shape[0], b_KN.shape[1]), d.data.dtype)
        for k in range(a_MK.shape[1]):
            total += a_MK[:, k, None] * b_KN[k]
        return interpreter.TensorHandle(total + d.data, d.dtype.scalar)

    original = interpreter.InterpreterBuilder.create_dot
    interpreter.InterpreterBuilder.create_dot = create_dot
    try:
        yield
    finally:
        interpreter.InterpreterBuilder.create_dot = original
