"""Four kernels as programs have them: what a roofline is compared with. Each with its FLOPs and the bytes it must move
at least; caches and temporary arrays can only add to these."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from headrace.plan.probe_tools import Bench, Pass, What, share

NO_SCIPY = "scipy is not installed: pip install 'headrace[plan]'"
ROWS_AT_A_TIME = 8
"""Of Jacobi's grid: a few of them stay in a second-level cache through the four steps."""
ITERATIONS = 5
"""Of CG, a pass."""


NOTES: Mapping[str, str] = {
    "GEMV": "GEMV: by numpy's BLAS, with as many threads as that takes",
    **dict.fromkeys(("SpMV", "CG"), "SpMV, CG: by scipy, with one thread"),
}
"""Where others than the probe's threads work: kernel -> who does."""


class Applications:
    """GEMV (numpy's BLAS and its threads), Jacobi (numpy, the probe's threads), SpMV and CG (scipy, one thread)."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self._kernels: dict[str, Callable[[], tuple[float, float, float]]] = {}
        self._gemv()
        self._jacobi()
        if find_spec("scipy") is None:
            bench.skipped += [What("application", {"kernel": name}, "FLOP/s", NO_SCIPY) for name in ("SpMV", "CG")]
        else:
            self._sparse()

    def round(self) -> Iterator[tuple[What, float]]:
        for name, measure in self._kernels.items():
            flops, nbytes, seconds = measure()
            of: Mapping[str, str | float] = {"kernel": name, "intensity": flops / nbytes}
            yield What("application", of, "FLOP/s", NOTES.get(name, "")), flops / seconds

    def _gemv(self) -> None:
        import numpy as np

        n = max(256, int((self._bench.large / 2 / 4) ** 0.5))
        matrix, x, y = np.ones((n, n), np.float32), np.ones(n, np.float32), np.empty(n, np.float32)
        work = self._bench.repeat
        self._kernels["GEMV"] = lambda: (2 * n * n, 4 * (n * n + 2 * n), work(lambda: np.dot(matrix, x, out=y)))

    def _jacobi(self) -> None:
        """Five points of a plane, float64: each new value is the mean of its four neighbours."""
        import numpy as np

        n = max(64, int((self._bench.large / 2 / 8) ** 0.5))
        old, new = np.ones((n, n)), np.ones((n, n))
        threads = self._bench.threads

        def make(thread: int) -> Pass:
            rows = range(n - 2)[share(n - 2, thread, threads)]
            bands = []
            for first in range(rows.start + 1, rows.stop + 1, ROWS_AT_A_TIME):
                last = min(first + ROWS_AT_A_TIME, rows.stop + 1)
                around = old[first - 1 : last - 1, 1:-1], old[first + 1 : last + 1, 1:-1]
                bands.append((new[first:last, 1:-1], *around, old[first:last, :-2], old[first:last, 2:]))

            def run() -> None:
                for out, above, below, left, right in bands:
                    np.add(above, below, out)
                    np.add(out, left, out)
                    np.add(out, right, out)
                    np.multiply(out, 0.25, out)

            return run

        points = (n - 2) ** 2
        self._kernels["Jacobi"] = lambda: (4 * points, 16 * points, self._bench.together(make))

    def _sparse(self) -> None:
        """The Laplacian of a plane, five numbers a row, 32-bit columns."""
        import numpy as np

        sparse = import_module("scipy.sparse")
        side = max(32, int((self._bench.large / 2 / 60) ** 0.5))
        line = sparse.diags_array([-1.0, 2.0, -1.0], offsets=[-1, 0, 1], shape=(side, side))
        one = sparse.eye_array(side)
        matrix: Any = (sparse.kron(line, one) + sparse.kron(one, line)).tocsr()
        n, nonzeros = matrix.shape[0], matrix.nnz
        flops, nbytes = 2 * nonzeros, 12 * nonzeros + 4 * n + 16 * n
        x = np.ones(n)
        repeat = self._bench.repeat
        self._kernels["SpMV"] = lambda: (flops, nbytes, repeat(lambda: matrix @ x))
        # An iteration: a product, two dot products (16 n, 8 n bytes), three updates (24 n each); 2 n FLOPs each.
        total = ITERATIONS * (flops + 10 * n), ITERATIONS * (nbytes + 96 * n)
        self._kernels["CG"] = lambda: (*total, repeat(lambda: conjugate_gradients(matrix, x, ITERATIONS)))


def conjugate_gradients(matrix: Any, b: Any, iterations: int) -> tuple[Any, float]:
    """(x, |b − A x|²) after some iterations from x = 0 on a symmetric positive definite matrix (Hestenes, Stiefel)."""
    import numpy as np

    x, r, p = np.zeros_like(b), b.copy(), b.copy()
    scratch = np.empty_like(b)
    residual = float(r @ r)
    for _ in range(iterations):
        q = matrix @ p
        alpha = residual / float(p @ q)
        np.add(x, np.multiply(p, alpha, scratch), x)
        np.subtract(r, np.multiply(q, alpha, scratch), r)
        before, residual = residual, float(r @ r)
        np.add(r, np.multiply(p, residual / before, p), p)
    return x, residual
