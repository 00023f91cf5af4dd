"""How long this machine takes for products of many shapes: what the GEMM predictor learns from.

The products run as they do in an engine: one program of the native backend holds the weights of every shape, its
threads go through them one after another, and each operation's own time is kept. All weights together are larger than
a cache, so each product reads its own from memory. Quantising the activations is another operation, and not counted.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
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
from headrace.plan.probe_programs import BITS, GROUP, PANEL, Programs, TimedProducts, copies
from headrace.plan.probe_tools import LARGE, Watch, find_caches, last_cache, usable_cpus
from headrace.plan.profile import is_busy

if TYPE_CHECKING:
    from headrace.engine.energy import Meter

FORMAT = "headrace-gemm-sweep/1"
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
    """While this product alone was repeated, of all that `Sweep.meter` counts."""


@dataclass(frozen=True, slots=True)
class Sweep:
    points: Sequence[Point]
    machine: str
    """Model of the processor."""
    cores: int
    """CPUs that the process could use."""
    threads: int
    instruction_set: str
    version: str
    """Of headrace."""
    measured_at: str
    """Date and time, UTC."""
    busy_cores: float | None
    """Cores' worth of time that everything else took during the sweep; None: not known."""
    meter: str | None = None
    """rapl: processors, and memory where it is counted apart; None: there is no meter, an estimate is none."""

    @property
    def busy(self) -> bool:
        return is_busy(self.busy_cores, self.cores)

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
    cpus = usable_cpus()
    watch = Watch(cpus)
    programs = Programs(threads)
    by_input = sorted(shapes, key=lambda shape: shape[1])
    weights = {(n, k, one): programs.pack(n, k, one) for n, k in by_input for one in precisions}
    bench = TimedProducts(programs, weights, max(rows))
    times: dict[Product, list[float]] = {product: [] for product in products}
    for _ in range(rounds):
        for m in rows:
            spent = bench.run(m)
            for weight, (operation,) in bench.operations.items():
                times[Product(m, *weight)].append(spent[operation])
    busy_cores = watch.busy_cores()
    del bench, weights
    meter = meter or RaplMeter.find()
    watts = {} if meter is None else measure_power(meter, programs, shapes, rows, precisions)
    ordered = sorted(products, key=lambda one: (one.precision, one.n, one.k, one.m))
    return Sweep(
        tuple(_point(product, times[product], watts.get(product)) for product in ordered),
        machine=processor_name(),
        cores=len(cpus),
        threads=threads,
        instruction_set=programs.instruction_set,
        version=__version__,
        measured_at=datetime.now(UTC).isoformat(timespec="seconds"),
        busy_cores=busy_cores,
        meter=meter.source if watts and meter is not None else None,
    )


def _point(product: Product, seconds: Sequence[float], watts: float | None) -> Point:
    return Point(product, min(seconds), (max(seconds) - min(seconds)) / statistics.median(seconds), watts)


def measure_power(
    meter: Meter,
    programs: Programs,
    shapes: Sequence[tuple[int, int]],
    rows: Sequence[int],
    precisions: Sequence[str],
    seconds: float = POWER_S,
) -> dict[Product, float]:
    """Watts that the meter counts while a product is repeated for `seconds`, of POWER_SHAPES of the shapes and
    POWER_ROWS of the rows, or of all where there are fewer. As many copies of a weight take turns as no cache holds, as
    far as `copies` allows: reading memory takes power too."""
    found: dict[Product, float] = {}
    nbytes = LARGE * last_cache(find_caches(usable_cpus()))
    chosen = sorted(shapes, key=math.prod)
    chosen = chosen[:: max(1, len(chosen) // POWER_SHAPES)]
    for n, k in chosen:
        for precision in precisions:
            packed = programs.pack(n, k, precision, copies(n, k, precision, nbytes))
            bench = TimedProducts(programs, {(n, k, precision): packed}, max(rows))
            for m in [m for m in rows if m in POWER_ROWS] or rows:
                bench.run(m)
                began = monotonic()
                meter.joules(began)
                while (now := monotonic()) < began + seconds:
                    bench.run(m)
                if (joules := meter.joules(now)) > 0:
                    found[Product(m, n, k, precision)] = joules / (now - began)
    return found


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
        fewest = 1 if allowed == (int,) else 0
        below = isinstance(found, int | float) and found < fewest
        if not isinstance(found, allowed) or isinstance(found, bool) or below:
            raise InvalidParameter(f"sweep.{name}", found, "what `headrace plan gemm --save` writes there")
    points = tuple(_read_point(index, line) for index, line in enumerate(value["points"]))
    if len({point.product for point in points}) < len(points):
        raise InvalidParameter("sweep.points", len(points), "each product once")
    return Sweep(points, **{name: value[name] for name in _HEADER})


_HEADER: Mapping[str, tuple[type, ...]] = {
    "machine": (str,),
    "cores": (int,),
    "threads": (int,),
    "instruction_set": (str,),
    "version": (str,),
    "measured_at": (str,),
    "busy_cores": (int, float, NoneType),
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
