"""How fast this machine's memory is: STREAM, reading by working set, gathers as paged keys and values need them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from headrace.plan.probe_tools import Bench, Pass, What, share

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    F64 = NDArray[np.float64]

STREAM_WORDS: Mapping[str, int] = {"copy": 2, "scale": 2, "add": 3, "triad": 3}
"""Numbers that STREAM counts for each element: those read and the one written, without the line that a write first
reads (McCalpin, STREAM)."""
SCALAR = 3.0
IN_BLOCKS = "triad by numpy in blocks: up to a fifth below a plain loop"
BLOCK = 1 << 16
"""Numbers that the triad's two steps meet at a time: they stay in a second-level cache between the two."""
READ_FROM = 2 / 3
"""Of a first-level cache: what each thread has of the smallest working set."""
READ_STEP = 4
"""Times which the next working set is larger."""
KIB = 2**10
READ_ONCE = 1 << 25
"""Bytes that a pass reads at least, however small the working set."""
GATHER_BYTES: Sequence[int] = (1 << 10, 1 << 14)
"""Of one piece: a token's keys or values of one layer, and a block of 16 of them (4 heads of 64, float32)."""
GATHER_NOTE = "gather: bytes read and bytes written"
SEED = 20


class Stream:
    """STREAM's four loops over arrays of float64, each four times the last cache."""

    def __init__(self, bench: Bench) -> None:
        import numpy as np

        self._bench = bench
        self._count = bench.large // 8
        self._arrays: Sequence[F64] = [np.empty(self._count) for _ in range(3)]
        # By the threads that will use them: memory lies with the processor that writes it first.
        bench.together(self._filler)

    def round(self) -> Iterator[tuple[What, float]]:
        moved = 8 * self._count
        for kind, words in STREAM_WORDS.items():
            seconds = self._bench.together(lambda thread, kind=kind: self.work(kind, thread))  # type: ignore[misc]
            note = IN_BLOCKS if kind == "triad" and native_triad() is None else ""
            yield What("stream", {"kind": kind, "bytes": moved}, "bytes/s", note), words * moved / seconds

    def _filler(self, thread: int) -> Pass:
        parts = self._parts(thread)

        def fill() -> None:
            for number, part in enumerate(parts):
                part.fill(number + 1.0)

        return fill

    def _parts(self, thread: int) -> list[F64]:
        return [one[share(self._count, thread, self._bench.threads)] for one in self._arrays]

    def work(self, kind: str, thread: int) -> Pass:
        """c = a; b = s c; c = a + b; a = b + s c: a thread's part of them."""
        import numpy as np

        a, b, c = self._parts(thread)
        if kind == "copy":
            return lambda: np.copyto(c, a)
        if kind == "scale":
            return lambda: np.multiply(c, SCALAR, b)
        if kind == "add":
            return lambda: np.add(a, b, c)
        return triad(a, b, c)


def triad(a: F64, b: F64, c: F64) -> Pass:
    """a = b + s c: the native kernels' loop; without them numpy, which has no such loop."""
    native = native_triad()
    return triad_in_blocks(a, b, c) if native is None else lambda: native(a, b, SCALAR, c)


def native_triad() -> Callable[[F64, F64, float, F64], None] | None:
    """(a, b, s, c): one loop, without the interpreter's lock; None: not built."""
    try:
        from headrace.backends.native import _kernels
    except ImportError:
        return None
    return _kernels.triad


def triad_in_blocks(a: F64, b: F64, c: F64) -> Pass:
    """a = b + s c in two steps: a block is multiplied, then added to while it is in a cache. Memory sees what it sees
    of one loop, but the processor has more to do: up to a fifth slower where one core nearly keeps up with memory."""
    import numpy as np

    blocks = [(a[i : i + BLOCK], b[i : i + BLOCK], c[i : i + BLOCK]) for i in range(0, len(a), BLOCK)]
    multiply, add, scalar = np.multiply, np.add, np.array(SCALAR)

    def run() -> None:
        for x, y, z in blocks:
            multiply(z, scalar, x)
            add(x, y, x)

    return run


class Read:
    """All threads read their shares of a working set again and again: from the first cache to memory."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        size = int(READ_FROM * bench.first_cache) // KIB * KIB * bench.threads
        self.sizes: list[int] = []
        while size < bench.large:
            self.sizes.append(size)
            size *= READ_STEP
        self.sizes.append(bench.large)

    def round(self) -> Iterator[tuple[What, float]]:
        for size in self.sizes:
            times = max(1, READ_ONCE // size)
            seconds = self._bench.together(lambda thread, size=size, times=times: self._work(size, times))  # type: ignore[misc]
            note = self._bench.note if size == self.sizes[-1] else ""
            yield What("read", {"bytes": size}, "bytes/s", note), size * times / seconds

    def _work(self, size: int, times: int) -> Pass:
        """The largest of the numbers: numpy's fastest loop that only reads."""
        import numpy as np

        part = np.ones(size // 4 // self._bench.threads, np.int32)
        return np.broadcast_to(part, (times, len(part))).max


class Gather:
    """Pieces of one array, in an order drawn by lot, into another array."""

    def __init__(self, bench: Bench) -> None:
        import numpy as np

        self._bench = bench
        self._pool = np.ones(bench.large // 4, np.float32)
        self._out = np.empty_like(self._pool)
        self._random = np.random.default_rng(SEED)

    def round(self) -> Iterator[tuple[What, float]]:
        for size in GATHER_BYTES:
            width = size // 4
            whole = len(self._pool) // width * width
            pool, out = (one[:whole].reshape(-1, width) for one in (self._pool, self._out))
            order = self._random.permutation(len(pool))
            seconds = self._bench.together(lambda thread, p=pool, o=out, i=order: self._work(p, o, i, thread))  # type: ignore[misc]
            yield What("gather", {"piece_bytes": size}, "bytes/s", GATHER_NOTE), 2 * pool.nbytes / seconds

    def _work(self, pool: NDArray[Any], out: NDArray[Any], order: NDArray[Any], thread: int) -> Pass:
        part = share(len(order), thread, self._bench.threads)
        # Any mode but "raise" writes straight into `out`.
        return lambda: pool.take(order[part], axis=0, out=out[part], mode="clip")
