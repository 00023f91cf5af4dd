"""How long this machine takes for products of many shapes: what the GEMM predictor learns from.

The products run as they do in an engine: one program of the native backend holds the weights of every shape, its
threads go through them one after another, and each operation's own time is kept. All weights together are larger than
a cache, so each product reads its own from memory. Quantising the activations is another operation, and not counted.
"""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from time import monotonic
from types import NoneType
from typing import TYPE_CHECKING

from headrace import __version__
from headrace.core import sizing, strict_json
from headrace.core.errors import InvalidParameter
from headrace.engine.energy import RaplMeter
from headrace.engine.hardware import processor_name

if TYPE_CHECKING:
    from headrace.backends.native._kernels import Packer, Session, Weight
    from headrace.engine.energy import Meter

FORMAT = "headrace-gemm-sweep/1"
BITS: Mapping[str, float] = {
    "float32": 32,
    "bfloat16": sizing.NATIVE_BITS["bf16"],
    "int8": sizing.NATIVE_BITS["q8_0"],
    "int4": sizing.NATIVE_BITS["q4_1"],
}
"""Precision -> bits of a weight as the native backend keeps it, scales included. Activations of the first two are
float32, those of int8 and int4 are int8 with a scale for each 32 columns."""
SHAPES: tuple[tuple[int, int], ...] = (
    *((n, k) for k in (256, 576, 1024, 1536, 2048) for n in (64, 256, 576, 1024, 1536, 3072)),
    (2048, 4096), (8192, 1024), (16384, 576),
)  # fmt: skip
"""(n, k) of the weights: n outputs, k inputs. Layers of models from 0.1B to 3B parameters."""
ROWS: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128, 256)
"""m: tokens of a step."""
ROUNDS = 5
POWER_ROWS: tuple[int, ...] = (1, 16, 256)
POWER_SHAPES = 8
"""Of how many weights the power is measured."""
POWER_S = 0.08
"""How long one product is repeated for it: RAPL counts about each millisecond."""
LARGEST = 2**24
"""Of m, n and k."""
MOST = 1e6
"""Of seconds, watts and a spread."""
MOST_BYTES = 64 * 2**20
"""Of a sweep's file."""
GROUP = 32
"""k is a multiple of it where weights are codes."""
PANEL = 16
"""n is padded to a multiple of it."""
VOCAB = 32


@dataclass(frozen=True, slots=True)
class Product:
    """x wᵀ with x (m, k) and w (n, k)."""

    m: int
    n: int
    k: int
    precision: str

    def __post_init__(self) -> None:
        """Raises InvalidParameter."""
        for name in ("m", "n", "k"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= LARGEST:
                raise InvalidParameter(f"product.{name}", value, f"an integer from 1 to {LARGEST}")
        if self.precision not in BITS:
            raise InvalidParameter("product.precision", self.precision, ", ".join(BITS))

    @property
    def flops(self) -> int:
        return sizing.product_flops(self.m, self.n, self.k)

    @property
    def nbytes(self) -> float:
        return sizing.product_bytes(self.m, self.n, self.k, BITS[self.precision])

    @property
    def shape(self) -> tuple[int, int]:
        """Of its weight."""
        return self.n, self.k


@dataclass(frozen=True, slots=True)
class Point:
    product: Product
    seconds: float
    """Of the quickest round: whatever else the machine does can only add to it."""
    spread: float
    """(longest - quickest) / median of the rounds."""
    watts: float | None = None
    """Of the machine while this product alone was repeated, by `Sweep.meter`."""


@dataclass(frozen=True, slots=True)
class Sweep:
    points: Sequence[Point]
    machine: str
    """Model of the processor."""
    threads: int
    instruction_set: str
    version: str
    """Of headrace."""
    measured_at: str
    """Date and time, UTC."""
    load: float | None
    """Load average of the machine as the sweep began; None: not known."""
    meter: str | None = None
    """rapl; None: there is no meter, an estimate from the machine's load is none."""

    @property
    def busy(self) -> bool:
        """Whether others used more than half of the threads' cores."""
        return self.load is not None and self.load > self.threads / 2

    @property
    def spread(self) -> float:
        """Median of the points'."""
        return statistics.median(point.spread for point in self.points)


def measure_sweep(
    threads: int,
    shapes: Sequence[tuple[int, int]] = SHAPES,
    rows: Sequence[int] = ROWS,
    precisions: Sequence[str] = tuple(BITS),
    rounds: int = ROUNDS,
    meter: Meter | None = None,
) -> Sweep:
    """A few seconds with the defaults, and about 0.5 GB of memory. `meter`: one that measures, not one that estimates;
    None: RAPL where this process may read it.

    Raises BackendUnavailable without the native kernels, InvalidParameter.
    """
    for n, k in shapes:
        if k % GROUP or n % PANEL:
            raise InvalidParameter("shape", (n, k), f"n a multiple of {PANEL}, k of {GROUP}")
    products = {Product(m, n, k, precision) for m in rows for n, k in shapes for precision in precisions}
    if not products or rounds < 1:
        raise InvalidParameter("sweep", len(products), "at least one product and one round")
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    times: dict[Product, list[float]] = {product: [] for product in products}
    bench = _Bench(threads, shapes, precisions, max(rows))
    for _ in range(rounds):
        for m in rows:
            for (n, k, precision), seconds in bench.run(m):
                times[Product(m, n, k, precision)].append(seconds)
    del bench
    meter = meter or RaplMeter.find()
    watts = {} if meter is None else measure_power(meter, threads, shapes, rows, precisions)
    ordered = sorted(products, key=lambda one: (one.precision, one.n, one.k, one.m))
    return Sweep(
        tuple(_point(product, times[product], watts.get(product)) for product in ordered),
        machine=processor_name(),
        threads=threads,
        instruction_set=_instruction_set(),
        version=__version__,
        measured_at=datetime.now(UTC).isoformat(timespec="seconds"),
        load=load,
        meter=meter.source if watts and meter is not None else None,
    )


def _point(product: Product, seconds: Sequence[float], watts: float | None) -> Point:
    return Point(product, min(seconds), (max(seconds) - min(seconds)) / statistics.median(seconds), watts)


def measure_power(
    meter: Meter,
    threads: int,
    shapes: Sequence[tuple[int, int]],
    rows: Sequence[int],
    precisions: Sequence[str],
    seconds: float = POWER_S,
) -> dict[Product, float]:
    """Watts of the machine while a product is repeated for `seconds`, of POWER_SHAPES of the shapes and POWER_ROWS of
    the rows, or of all where there are fewer."""
    found: dict[Product, float] = {}
    chosen = sorted(shapes, key=math.prod)
    chosen = chosen[:: max(1, len(chosen) // POWER_SHAPES)]
    for n, k in chosen:
        for precision in precisions:
            bench = _Bench(threads, [(n, k)], [precision], max(rows))
            for m in [m for m in rows if m in POWER_ROWS] or rows:
                bench.run(m)
                began = monotonic()
                meter.joules(began)
                while (now := monotonic()) < began + seconds:
                    bench.run(m)
                if (joules := meter.joules(now)) > 0:
                    found[Product(m, n, k, precision)] = joules / (now - began)
    return found


class _Bench:
    """A program with one product for each weight, and the threads that run it."""

    def __init__(
        self, threads: int, shapes: Sequence[tuple[int, int]], precisions: Sequence[str], most_rows: int
    ) -> None:
        """Raises BackendUnavailable."""
        isa = _instruction_set()
        from headrace.backends.native import _kernels
        from headrace.core.types import SamplingParams

        packer = _kernels.Packer(threads)
        kv = _kernels.KvStore("float32", most_rows, 1)
        program = _kernels.Program(isa, kv)
        codes = any(_is_codes(precision) for precision in precisions)
        outputs = {n: program.buffer(n) for n, _ in shapes}
        self._products: dict[int, tuple[int, int, str]] = {}
        for k in dict.fromkeys(k for _, k in shapes):
            x = program.buffer(k, quantised=codes)
            program.embed(_pack(packer, VOCAB, k, "float32"), 1.0, x)
            if codes:
                program.quantise(x)
            for n in [n for n, other in shapes if other == k]:
                for precision in precisions:
                    linear = _kernels.Linear(_pack(packer, n, k, precision), None, 0)
                    self._products[program.product([linear], x, outputs[n])] = n, k, precision
        head, logits = program.size, program.buffer(VOCAB, head=True)
        self._session: Session = _kernels.Session(
            program.finish(), kv, VOCAB, 1, most_rows, most_rows, threads, head, logits
        )
        ids = [index % VOCAB for index in range(most_rows)]
        self._session.admit(0, ids, most_rows, _kernels.RowSampling(SamplingParams(), most_rows, (), VOCAB), -1)
        self._session.append_blocks(0, [0])
        self._session.profile(True)

    def run(self, m: int) -> Iterator[tuple[tuple[int, int, str], float]]:
        """Every product once, with m rows: ((n, k, precision), seconds)."""
        self._session.ask(0, 0, m, (), False, False, False, None)
        self._session.run()
        timings = self._session.take_timings().tolist()
        found = ((self._products.get(number), end - begin) for number, _, begin, end in timings)
        return ((product, max(1, spent) / 1e9) for product, spent in found if product is not None)


def _is_codes(precision: str) -> bool:
    return precision in ("int8", "int4")


def _pack(packer: Packer, n: int, k: int, precision: str) -> Weight:
    """A weight of random numbers; the packer has finished with it."""
    import numpy as np

    from headrace.backends.native import _kernels

    block = np.random.default_rng(0).standard_normal(min(n * k, 1 << 18), np.float32)
    numbers = np.resize(block, (n, k))
    if _is_codes(precision):
        weight = _kernels.quantise_numbers(packer, int(precision.removeprefix("int")), numbers, "f32")
    else:
        weight = _kernels.pack_numbers(packer, numbers, "f32", {"float32": "f32", "bfloat16": "bf16"}[precision])
    packer.finish()
    return weight


def _instruction_set() -> str:
    """The one the native backend takes. Raises BackendUnavailable without its kernels."""
    from headrace.engine.model import create_backend

    return str(create_backend("native").probe()["instructions"])


# ---------------------------------------------------------------- files


def sweep_text(sweep: Sweep) -> str:
    """The content of its file: JSON, a line a point."""
    header = {"format": FORMAT, **{name: getattr(sweep, name) for name in _HEADER}}
    lines = [
        [one.product.m, one.product.n, one.product.k, one.product.precision, one.seconds, one.spread, one.watts]
        for one in sweep.points
    ]
    head = json.dumps(header, ensure_ascii=False, allow_nan=False).removesuffix("}")
    body = ",\n".join(map(json.dumps, lines))
    return f'{head}, "points": [\n{body}\n]}}\n'


def read_sweep(path: Path) -> Sweep:
    """Raises InvalidParameter where it is no sweep's file, or one that cannot be."""
    refusal = InvalidParameter("sweep", str(path), "a file that `headrace plan gemm --save` wrote")
    try:
        with path.open("rb") as file:
            data = file.read(MOST_BYTES + 1)
        if len(data) > MOST_BYTES:
            raise refusal
        value = strict_json.parse(data.decode("utf-8"), unique_keys=True)
    except (OSError, ValueError, RecursionError) as error:
        raise refusal from error
    if not isinstance(value, dict) or value.get("format") != FORMAT or not isinstance(value.get("points"), list):
        raise refusal
    for name, allowed in _HEADER.items():
        found = value.get(name)
        if not isinstance(found, allowed) or isinstance(found, bool):
            raise InvalidParameter(f"sweep.{name}", found, "what `headrace plan gemm --save` writes there")
    points = tuple(_read_point(index, line) for index, line in enumerate(value["points"]))
    if len({point.product for point in points}) < len(points):
        raise InvalidParameter("sweep.points", len(points), "each product once")
    return Sweep(points, **{name: value[name] for name in _HEADER})


_HEADER: Mapping[str, tuple[type, ...]] = {
    "machine": (str,),
    "threads": (int,),
    "instruction_set": (str,),
    "version": (str,),
    "measured_at": (str,),
    "load": (int, float, NoneType),
    "meter": (str, NoneType),
}


def _read_point(index: int, line: object) -> Point:
    field = f"sweep.points[{index}]"
    if not isinstance(line, list) or len(line) != 7:
        raise InvalidParameter(field, line, "[m, n, k, precision, seconds, spread, watts or null]")
    m, n, k, precision, seconds, spread, watts = line
    if not isinstance(precision, str):
        raise InvalidParameter(field, precision, ", ".join(BITS))
    try:
        product = Product(m, n, k, precision)
    except InvalidParameter as error:
        raise InvalidParameter(field, line, str(error)) from error
    for name, value, low in (("seconds", seconds, 1e-12), ("spread", spread, 0.0), ("watts", watts, 1e-6)):
        if value is None and name == "watts":
            continue
        if not isinstance(value, int | float) or isinstance(value, bool) or not low <= value <= MOST:
            raise InvalidParameter(f"{field}.{name}", value, f"a number from {low:g} to {MOST:g}")
    return Point(product, seconds, spread, watts)
