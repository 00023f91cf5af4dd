"""What a probe measured, and on what: a JSON file that the other plans read in place of a data sheet."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median

from headrace.core.errors import InputFileError, InvalidParameter, shorten
from headrace.core.strict_json import parse
from headrace.plan.devices import Device

FORMAT = "headrace-probe-1"
NOISY = 0.05
"""A figure whose rounds lie further apart than this share of their median is too noisy to be called repeatable."""
MOST_BYTES = 4 * 2**20
"""Of a profile's file; a probe writes some tens of kilobytes."""
FEWEST_ROUNDS = 3
"""Of a probe: with fewer its spread says too little."""
BUSY = 0.1
"""A machine of whose cores others take more than this share is busy: figures are of all cores, and lose as much."""
Detail = str | int | float
JUDGED = ("gemm", "stream", "read", "gather", "attend", "card")
"""Figures whose spread decides whether a probe is repeatable; disk, links, applications and overheads are each judged
by themselves."""


def percent(share: float) -> str:
    """5.3 %, but 53 %."""
    return f"{share:.1%}" if share < 0.1 else f"{share:.0%}"


def is_busy(busy_cores: float | None, cores: int) -> bool:
    """Whether others took more than BUSY of the cores; None: not known, and not called so."""
    return (busy_cores or 0.0) > BUSY * cores


@dataclass(frozen=True, slots=True)
class Figure:
    """One thing measured, in a few rounds that lie seconds apart."""

    name: str
    """gemm, stream, read, gather, attend, attention, operation, rows, step, disk, host_link, card, application."""
    of: Mapping[str, Detail]
    """Which one: for gemm weights, rows (M), n, k; for read and gather bytes …"""
    unit: str
    rounds: Sequence[float]
    """The median of each round. Empty: it could not be measured, and `note` says why."""
    note: str = ""

    @property
    def value(self) -> float | None:
        """The median of the rounds."""
        return median(self.rounds) if self.rounds else None

    @property
    def spread(self) -> float | None:
        """(largest − smallest) / median of the rounds."""
        middle = self.value
        return (max(self.rounds) - min(self.rounds)) / middle if middle else None

    @property
    def verdict(self) -> str:
        """repeatable, or why it is not."""
        if self.spread is None:
            return self.note
        if len(self.rounds) < FEWEST_ROUNDS:
            return f"{len(self.rounds)} of {FEWEST_ROUNDS} rounds"
        return "repeatable" if self.spread <= NOISY else f"too noisy, spread {percent(self.spread)}"


@dataclass(frozen=True, slots=True)
class Machine:
    """What was probed, and what else went on there."""

    cpu: str
    cores: int
    """CPUs that the process may use."""
    threads: int
    """Threads that the figures were measured with."""
    instruction_set: str | None
    """Of the native kernels; None: they are not built."""
    memory_bytes: int
    """Of the machine, or what its control group may take of it."""
    caches: Mapping[str, int]
    """Level -> bytes of one such cache."""
    system: str
    python: str
    libraries: Mapping[str, str]
    date: str
    """UTC, ISO 8601."""
    load_average: float | None
    """Over the last minute, as the probe began."""
    busy_cores: float | None
    """Cores' worth of time that everything else took while the probe ran; the load average where the system does not
    count it."""

    @property
    def busy(self) -> bool:
        return is_busy(self.busy_cores, self.cores)


@dataclass(frozen=True, slots=True)
class Profile:
    machine: Machine
    figures: Sequence[Figure]
    seconds: float
    """How long the probe took."""
    path: str = field(default="", compare=False)
    """The file it was read from or written to."""

    # ------------------------------------------------------------ single figures

    def find(self, name: str, **of: Detail) -> Figure | None:
        """The first figure of this name that has all these details and was measured."""
        for one in self.figures:
            if one.name == name and one.rounds and all(one.of.get(key) == value for key, value in of.items()):
                return one
        return None

    def value(self, name: str, **of: Detail) -> float:
        """Its value. Raises InvalidParameter where the profile has no such figure."""
        found = self.find(name, **of)
        if found is None or found.value is None:
            wanted = ", ".join([name, *(f"{key} {value}" for key, value in of.items())])
            raise InvalidParameter("profile", self.path or self.machine.date, f"a probe that measured {wanted}")
        return found.value

    # ------------------------------------------------------------ rates

    def gemm_rate(self, weights: str, rows: float, n: float = math.inf, set_bytes: float = math.inf) -> float:
        """FLOP/s (2 · M · N · K a product) of the native kernels, `rows` (M) tokens at a time, weights float32,
        bfloat16, int8 or int4. `n`: outputs of the product; `set_bytes`: of all weights that are read again and again.
        Log-linear between what was measured, outside as at the nearest. Raises InvalidParameter where no such product
        was measured."""
        found = [one for one in self.figures if one.name == "gemm" and one.rounds and one.of.get("weights") == weights]
        if not found:
            self.value("gemm", weights=weights)
        tree: dict[float, dict[float, dict[float, float]]] = {}
        for one in found:
            width, count, size = (float(one.of[name]) for name in ("n", "rows", "set_bytes"))
            tree.setdefault(width, {}).setdefault(count, {})[size] = one.value or 0.0
        by_width = {
            width: _between({count: _between(sets, set_bytes) for count, sets in counts.items()}, rows)
            for width, counts in tree.items()
        }
        return _between(by_width, n)

    def read_bandwidth(self) -> float:
        """Bytes/s that all threads read together from memory: from the largest working set. Raises InvalidParameter."""
        return max(self._of("read"), key=lambda one: float(one.of["bytes"])).value or 0.0

    def kv_bandwidth(self, dtype: str = "float32") -> float:
        """Bytes/s of keys and values that decode attention reads, as the native backend keeps them. Raises
        InvalidParameter."""
        return self.value("attend", dtype=dtype)

    def step_seconds(self, rows: int = 1) -> float:
        """What a step takes of an engine that computes next to nothing: scheduler, plan, sampling; linear in the rows
        between and beyond what was measured. Raises InvalidParameter."""
        points = sorted({float(one.of["rows"]): one.value or 0.0 for one in self._of("step")}.items())
        if len(points) == 1:
            return points[0][1]
        (x, y), (far_x, far_y) = points[0], points[-1]
        return max(0.0, y + (far_y - y) * (rows - x) / (far_x - x))

    def _of(self, name: str) -> list[Figure]:
        found = [one for one in self.figures if one.name == name and one.rounds]
        if not found:
            self.value(name)
        return found

    # ------------------------------------------------------------ as a whole

    def device(self) -> Device:
        """The machine as one of the catalogue's, from what was measured. Raises InvalidParameter where that is not
        enough."""
        flops = {"float32": self._peak("float32"), "int8": max(self._peak("int8"), self._peak("int4"))}
        host = self.find("host_link", to="device")
        return Device(
            name=self.machine.cpu,
            kind="cpu",
            flops={dtype: rate for dtype, rate in flops.items() if rate},
            memory_bytes=self.machine.memory_bytes,
            bandwidth=self.read_bandwidth(),
            watts=None,
            price_per_hour=None,
            host_link=None if host is None else host.value,
            peer_link=None,
            source=f"headrace plan probe, {self.machine.threads} threads, {self.machine.date}",
            basis="measured",
        )

    def card(self) -> Device | None:
        """The GPU as one of the catalogue's, from what was measured of it; None: it was not."""
        read = self.find("card", kind="read")
        if read is None or read.value is None:
            return None
        products = [one for one in self.figures if one.name == "card" and one.of.get("kind") == "product"]
        host = self.find("host_link", to="device")
        return Device(
            name=str(read.of["card"]),
            kind="gpu",
            flops={str(one.of["dtype"]): one.value for one in products if one.value},
            memory_bytes=int(read.of["memory_bytes"]),
            bandwidth=read.value,
            watts=None,
            price_per_hour=None,
            host_link=None if host is None else host.value,
            peer_link=None,
            source=f"headrace plan probe, {self.machine.date}",
            basis="measured",
        )

    def _peak(self, weights: str) -> float:
        rates = [one.value or 0.0 for one in self.figures if one.name == "gemm" and one.of.get("weights") == weights]
        return max(rates, default=0.0)

    @property
    def _judged(self) -> list[Figure]:
        return [one for one in self.figures if one.name in JUDGED and one.rounds]

    @property
    def _rounds(self) -> int:
        """Of the judged figure that has fewest; 0: there is none."""
        return min((len(one.rounds) for one in self._judged), default=0)

    @property
    def worst_spread(self) -> float:
        """Of the figures that decide."""
        return max((one.spread or 0.0 for one in self._judged), default=0.0)

    @property
    def verdict(self) -> str:
        """Whether another probe of this machine may be expected to say the same, in a sentence."""
        machine, judged = self.machine, self._judged
        if machine.busy:
            return (
                f"not called repeatable: other programs used {machine.busy_cores:.1f} of {machine.cores} cores; "
                "probe again when the machine is quiet"
            )
        if self._rounds < FEWEST_ROUNDS:
            return f"not called repeatable: {self._rounds} of {FEWEST_ROUNDS} rounds were measured"
        noisy = sum(1 for one in judged if (one.spread or 0.0) > NOISY)
        worst = percent(self.worst_spread)
        if noisy:
            return f"too noisy, spread {worst}: {noisy} of {len(judged)} figures vary by more than {NOISY:.0%}"
        return f"repeatable: products and memory vary by at most {worst} from round to round"

    @property
    def repeatable(self) -> bool:
        return not self.machine.busy and self._rounds >= FEWEST_ROUNDS and self.worst_spread <= NOISY

    def as_json(self) -> dict[str, object]:
        """What is written; `read_profile` reads it back."""
        figures = [
            {**asdict(one), "value": one.value, "spread": one.spread, "verdict": one.verdict} for one in self.figures
        ]
        return {
            "format": FORMAT,
            "repeatable": self.repeatable,
            "verdict": self.verdict,
            "seconds": self.seconds,
            "machine": asdict(self.machine),
            "figures": figures,
        }


def _between(measured: Mapping[float, float], x: float) -> float:
    """Log-linear between the points, constant outside."""
    points = sorted(measured.items())
    if x <= points[0][0]:
        return points[0][1]
    for (x0, y0), (x1, y1) in pairwise(points):
        if x < x1:
            share = math.log(x / x0) / math.log(x1 / x0)
            return y0 * float((y1 / y0) ** share)
    return points[-1][1]


# ---------------------------------------------------------------- the file


def default_path(state: Path) -> Path:
    """Where a probe writes, and where the other plans look: in headrace's state folder."""
    return state / "probe.json"


def check_writable(path: Path) -> None:
    """Raises InvalidParameter where `write_profile` could not write."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidParameter("profile", str(path), f"a file that can be written ({error.strerror})") from error
    if path.is_dir() or not os.access(path.parent, os.W_OK | os.X_OK):
        raise InvalidParameter("profile", str(path), "a file that can be written")


def write_profile(profile: Profile, path: Path) -> None:
    """All of the new file or all of the old one. Raises InvalidParameter where it cannot be written."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            beside.write_text(json.dumps(profile.as_json(), indent=1, allow_nan=False) + "\n", encoding="utf-8")
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)
    except OSError as error:
        raise InvalidParameter("profile", str(path), f"a file that can be written ({error.strerror})") from error


def read_profile(path: Path) -> Profile:
    """Raises InputFileError for what is no profile, or cannot be read."""
    try:
        with path.open("rb") as file:
            raw = file.read(MOST_BYTES + 1)
    except OSError as error:
        hint = "; `headrace plan probe` makes one" if isinstance(error, FileNotFoundError) else ""
        raise InputFileError(f"profile {path}: {error.strerror}{hint}") from error
    try:
        if len(raw) > MOST_BYTES:
            raise ValueError(f"more than {MOST_BYTES} bytes")
        found = parse(raw.decode())
        if not isinstance(found, dict) or found.get("format") != FORMAT:
            raise ValueError(f"it does not say that it is {FORMAT}")
        machine = Machine(**found["machine"])
        _check_machine(machine)
        figures = tuple(_figure(one) for one in found["figures"])
        return Profile(machine, figures, float(found["seconds"]), str(path))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        reason = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else shorten(str(error), 160)[1:-1]
        raise InputFileError(f"profile {path}: not a probe's profile: {reason}") from error


def _check_machine(machine: Machine) -> None:
    for name in ("cores", "threads", "memory_bytes"):
        count = getattr(machine, name)
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise ValueError(f"machine.{name}: got {shorten(count)}, needed a whole number above 0")
    for name in ("cpu", "date", "system", "python"):
        if not isinstance(getattr(machine, name), str):
            raise ValueError(f"machine.{name}: got {shorten(getattr(machine, name))}, needed text")
    for name in ("caches", "libraries"):
        if not isinstance(getattr(machine, name), dict):
            raise ValueError(f"machine.{name}: got {shorten(getattr(machine, name))}, needed an object")
    for name in ("load_average", "busy_cores"):
        value = getattr(machine, name)
        if value is not None and not (_is_number(value) and value >= 0):
            raise ValueError(f"machine.{name}: got {shorten(value)}, needed a number from 0 or null")


NUMBERS: Mapping[str, Sequence[str]] = {
    "gemm": ("rows", "n", "k", "set_bytes"),
    "read": ("bytes",),
    "step": ("rows",),
    "card": ("memory_bytes",),
}
"""Figures -> details that are numbers above 0."""
TEXTS: Mapping[str, Sequence[str]] = {"gemm": ("weights",), "stream": ("kind",), "card": ("card", "kind")}
"""Figures -> details that are text."""


def _figure(raw: Mapping[str, object]) -> Figure:
    name, of, unit, rounds, note = (raw[key] for key in ("name", "of", "unit", "rounds", "note"))
    if not (isinstance(name, str) and isinstance(unit, str) and isinstance(note, str)):
        raise ValueError("a figure's name, unit and note are text")
    if not isinstance(of, dict) or not all(isinstance(value, str | int | float) for value in of.values()):
        raise ValueError(f"{shorten(name)}: `of` is an object of numbers and text")
    if not isinstance(rounds, list) or not all(_is_number(value) and value > 0 for value in rounds):
        raise ValueError(f"{shorten(name)}: rounds are numbers above 0")
    if rounds:
        for key in NUMBERS.get(name, ()):
            if not (_is_number(of.get(key)) and of[key] > 0):
                raise ValueError(f"{shorten(name)}: {key} is a number above 0")
        for key in TEXTS.get(name, ()):
            if not isinstance(of.get(key), str):
                raise ValueError(f"{shorten(name)}: {key} is text")
    return Figure(name, of, unit, tuple(map(float, rounds)), note)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
