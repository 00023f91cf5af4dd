"""Programs of the native backend that are made to be timed: weights of random numbers, and sessions that keep how long
each operation took. The probe and the sweep of matrix products run the same ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from headrace.core import sizing

if TYPE_CHECKING:
    from headrace.backends.native import _kernels

BITS: Mapping[str, float] = {
    "float32": 32,
    "bfloat16": sizing.NATIVE_BITS["bf16"],
    "int8": sizing.NATIVE_BITS["q8_0"],
    "int4": sizing.NATIVE_BITS["q4_1"],
}
"""Precision -> bits of a weight as the native backend keeps it, scales included. Activations of the first two are
float32, those of int8 and int4 are int8 with a scale for each GROUP columns."""
GROUP = 32
"""k is a multiple of it where weights are codes."""
PANEL = 16
"""n is padded to a multiple of it."""
VOCAB = 64
FEWEST_COPIES, MOST_COPIES = 3, 4096
"""Of a weight in one program."""
RANDOM_NUMBERS = 1 << 18
"""Different ones in a weight, again and again."""
SEED = 9
Kind = tuple[int, int, str]
"""Of a weight: n outputs, k inputs, precision."""


def copies(n: int, k: int, precision: str, nbytes: float) -> int:
    """How many weights (n, k) take `nbytes` together, within what a program should have."""
    return max(FEWEST_COPIES, min(MOST_COPIES, round(nbytes / sizing.product_bytes(0, n, k, BITS[precision]))))


def is_codes(precision: str) -> bool:
    """Whether its activations are rounded to int8."""
    return precision in ("int8", "int4")


class Programs:
    """Makes weights, programs, and the sessions that run them on `threads` threads."""

    def __init__(self, threads: int) -> None:
        """Raises BackendUnavailable."""
        from headrace.engine.model import create_backend

        self.instruction_set = str(create_backend("native").probe()["instructions"])
        from headrace.backends.native import _kernels

        self.kernels = _kernels
        self._threads = threads
        self._packer = _kernels.Packer(threads)

    def program(self, kv: _kernels.KvStore) -> _kernels.Program:
        return self.kernels.Program(self.instruction_set, kv)

    def pack(self, n: int, k: int, precision: str, count: int = 1) -> list[_kernels.Weight]:
        """`count` weights (n, k) of the same random numbers; the packer has finished with them."""
        import numpy as np

        kernels, packer = self.kernels, self._packer
        block = np.random.default_rng(SEED).standard_normal(min(n * k, RANDOM_NUMBERS), np.float32)
        numbers = np.resize(block, (n, k))

        def one() -> _kernels.Weight:
            made: _kernels.Weight
            if is_codes(precision):
                made = kernels.quantise_numbers(packer, int(precision.removeprefix("int")), numbers, "f32")
            else:
                made = kernels.pack_numbers(packer, numbers, "f32", {"float32": "f32", "bfloat16": "bf16"}[precision])
            return made

        packed = [one() for _ in range(count)]
        packer.finish()
        return packed

    def embedded(self, program: _kernels.Program, width: int, quantised: bool = False) -> int:
        """A buffer of `width` activations a token, which the program's next operation fills."""
        (table,) = self.pack(VOCAB, width, "float32")
        x = program.buffer(width, quantised=quantised)
        program.embed(table, 1.0, x)
        return x

    def session(
        self, program: _kernels.Program, kv: _kernels.KvStore, rows: int, most_tokens: int, context: int
    ) -> _kernels.Session:
        """Of a program without a head: nothing is sampled. Keeps each operation's time."""
        head, logits = program.size, program.buffer(VOCAB, head=True)
        limits = (VOCAB, rows, most_tokens, context)
        session = self.kernels.Session(program.finish(), kv, *limits, self._threads, head, logits)
        session.profile(True)
        return session

    def admit(self, session: _kernels.Session, row: int, tokens: int, blocks: Sequence[int]) -> None:
        from headrace.core.types import SamplingParams

        ids = [index % VOCAB for index in range(tokens)]
        session.admit(row, ids, tokens, self.kernels.RowSampling(SamplingParams(), tokens, (), VOCAB), -1)
        session.append_blocks(row, blocks)


def run_once(session: _kernels.Session, asks: Sequence[tuple[int, int, int]]) -> dict[int, float]:
    """(row, start, length) of each ask -> operation -> its seconds. The clock counts nanoseconds: none takes less."""
    for row, start, length in asks:
        session.ask(row, start, length, (), False, False, False, None)
    session.run()
    timings = session.take_timings().tolist()
    # Below 0 are the timings of what surrounds the operations.
    return {operation: max(1, end - begin) / 1e9 for operation, _, begin, end in timings if operation >= 0}


class TimedProducts:
    """One program with a product for each weight: x wᵀ, one after another, as in a step of an engine."""

    def __init__(self, programs: Programs, weights: Mapping[Kind, Sequence[_kernels.Weight]], most_rows: int) -> None:
        """`weights`: kind -> packed ones of it, each in memory of its own."""
        kernels = programs.kernels
        kv = kernels.KvStore("float32", most_rows, 1)
        program = programs.program(kv)
        codes = {k for _, k, precision in weights if is_codes(precision)}
        inputs: dict[int, int] = {}
        outputs = {n: program.buffer(n) for n in dict.fromkeys(n for n, _, _ in weights)}
        self.operations: dict[Kind, list[int]] = {}
        """Kind -> the products with its weights."""
        for (n, k, precision), packed in weights.items():
            if k not in inputs:
                inputs[k] = programs.embedded(program, k, quantised=k in codes)
                if k in codes:
                    program.quantise(inputs[k])
            linears = [kernels.Linear(one, None, 0) for one in packed]
            self.operations[n, k, precision] = [program.product([one], inputs[k], outputs[n]) for one in linears]
        self._session = programs.session(program, kv, 1, most_rows, most_rows)
        programs.admit(self._session, 0, most_rows, [0])

    def run(self, m: int) -> dict[int, float]:
        """All of them once, with m rows: operation -> seconds."""
        return run_once(self._session, [(0, 0, m)])
