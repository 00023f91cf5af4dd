"""What `plan serving` is asked: a JSON file with a histogram of request sizes, and each GPU's throughputs, which are
given there, measured by `headrace compare`, or predicted.

```json
{"workload_distribution": [[0.2, 0.1], [0.5, 0.2]], "total_request_rate": 30, "slice_factor": 1,
 "input_tokens": [100, 1000], "output_tokens": [50, 400],
 "gpu_info": {"A10G": {"cost": 1.01, "tputs": [[2, 1], [5, 2]]},
              "my-machine": {"cost": 0.4, "reports": ["small.json", "large.json"]},
              "2xL4": {}}}
```
Rows are prompt sizes, columns answer sizes; input_tokens and output_tokens are their upper ends. The names of the first
four keys are those of Mélange's own files, which are read as they are.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from headrace.core.errors import InputFileError, InvalidParameter, UnknownParameter, shorten
from headrace.core.spec import ModelSpec
from headrace.core.strict_json import parse
from headrace.plan.devices import DEVICES, Device, find_device
from headrace.plan.room import WIDTHS, device_room
from headrace.plan.serving import SLICE_FACTOR, Demand, Gpu, Point
from headrace.plan.speed import Precision, SheetSpeed, decode_work, prefill_work

MOST_BYTES = 256 * 2**20
"""Of one file."""
MOST_BUCKETS = 1000
MOST_GPUS = 64
MOST_ROWS = 1024
"""Answers at once, of a prediction."""
WHOLE_EDGE = 100_000_000
HASH_DIGITS = 12
REPORT_SCHEMA = 2
"""Of `headrace compare --json`."""
SAME = ("identical", "near-tie")
"""Verdicts of a method that gave the base's tokens."""
FIELDS = frozenset(
    {"workload_distribution", "total_request_rate", "slice_factor", "gpu_info", "input_tokens", "output_tokens"}
)
GPU_FIELDS = frozenset({"cost", "tputs", "points", "reports"})
POINT_FIELDS = frozenset({"requests_per_s", "ttft_s", "itl_s"})

MELANGE: Mapping[str, Any] = {
    "gpu_info": {
        "A10G": {"cost": 1.01, "tputs": [[2, 1], [5, 2]]},
        "A100-80GB": {"cost": 3.67, "tputs": [[20, 20], [40, 20]]},
    },
    "workload_distribution": [[0.2, 0.1], [0.5, 0.2]],
    "total_request_rate": 30.0,
    "slice_factor": 1,
}
"""The example of Mélange's repository."""


@dataclass(frozen=True, slots=True)
class Size:
    """Of the largest requests of a bucket, in tokens."""

    prompt: int
    output: int


@dataclass(frozen=True, slots=True)
class Workload:
    demand: Demand
    shape: tuple[int, int]
    """Rows and columns of the histogram; buckets go row by row."""
    sizes: Sequence[Size] | None
    """By bucket; None: the file has no edges."""
    edges: tuple[Sequence[int], Sequence[int]] | None
    note: str
    """What a reader has to know of the histogram; empty: nothing."""

    def bucket(self, prompt: int, output: int) -> int | None:
        """Of a request of this size; None: larger than all."""
        assert self.edges is not None
        places = [
            next((index for index, edge in enumerate(edges) if size <= edge), None)
            for size, edges in zip((prompt, output), self.edges, strict=True)
        ]
        row, column = places
        return None if row is None or column is None else row * self.shape[1] + column


# ---------------------------------------------------------------- the file


def read_request(path: Path) -> Mapping[str, Any]:
    """Raises InputFileError, UnknownParameter."""
    found = _read(path)
    _known(found, FIELDS, str(path))
    return found


def _read(path: Path) -> dict[str, Any]:
    try:
        size = path.stat().st_size
        if size > MOST_BYTES:
            raise InputFileError(f"{path}: {size:,} bytes, allowed: up to {MOST_BYTES:,}")
        found = parse(path.read_text(encoding="utf-8"), unique_keys=True)
    except OSError as error:
        raise InputFileError(f"{path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise InputFileError(f"{path}: not JSON that can be read: {shorten(str(error), 120)}") from error
    if not isinstance(found, dict):
        raise InputFileError(f"{path}: got {shorten(found)}, allowed: a JSON object")
    return found


def _known(found: Mapping[str, Any], fields: frozenset[str], where: str) -> None:
    for name in found:
        if name not in fields:
            raise UnknownParameter(name, f"{where} (known: {', '.join(sorted(fields))})")


def read_workload(request: Mapping[str, Any], rate: float | None = None, slice_factor: int | None = None) -> Workload:
    """`rate` (requests/s) and `slice_factor` win over the file's. A histogram may hold shares or counts: only
    proportions matter. Raises InvalidParameter."""
    matrix = _matrix(request.get("workload_distribution"), "workload_distribution")
    rows, columns = len(matrix), len(matrix[0])
    cells = [value for row in matrix for value in row]
    total = sum(cells)
    if total == 0:
        raise InvalidParameter("workload_distribution", matrix, "a histogram with a request in it")
    if not math.isfinite(total):
        raise InvalidParameter("workload_distribution", total, "a sum that is finite")
    wanted = request.get("total_request_rate") if rate is None else rate
    per_s = _number(wanted, "rate", above=True)
    factor = request.get("slice_factor", SLICE_FACTOR) if slice_factor is None else slice_factor
    if isinstance(factor, bool) or not isinstance(factor, int):
        raise InvalidParameter("slice_factor", factor, "an integer ≥ 1")
    shares = abs(total - 1) < 1e-6
    rates = [cell * per_s if shares else cell / total * per_s for cell in cells]
    edges = _edges(request, rows, columns)
    if edges is None:
        names = [f"row {row}, column {column}" for row in range(1, rows + 1) for column in range(1, columns + 1)]
        sizes = None
    else:
        sizes = [Size(prompt, output) for prompt in edges[0] for output in edges[1]]
        names = [f"≤ {size.prompt} in, ≤ {size.output} out" for size in sizes]
    note = "" if shares else f"The histogram's entries sum to {total:g}: they are taken as counts."
    return Workload(Demand(names, rates, factor), (rows, columns), sizes, edges, note)


def _matrix(value: object, field: str) -> list[list[float]]:
    allowed = "a list of rows of equal length (prompt sizes), each a list of numbers ≥ 0 (answer sizes)"
    if not isinstance(value, list) or not value or not all(isinstance(row, list) and row for row in value):
        raise InvalidParameter(field, value, allowed)
    if len({len(row) for row in value}) != 1 or len(value) * len(value[0]) > MOST_BUCKETS:
        raise InvalidParameter(field, value, f"{allowed}, up to {MOST_BUCKETS} entries")
    return [
        [_number(one, f"{field}[{row}][{column}]") for column, one in enumerate(cells)]
        for row, cells in enumerate(value)
    ]


def _number(value: object, field: str, above: bool = False) -> float:
    """Finite and ≥ 0. `above`: > 0."""
    said = "a number > 0" if above else "a number ≥ 0"
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidParameter(field, value, said)
    try:
        found = float(value)
    except OverflowError:
        raise InvalidParameter(field, value, said) from None
    if not math.isfinite(found) or found < 0 or (above and found == 0):
        raise InvalidParameter(field, value, said)
    return found


def _edges(request: Mapping[str, Any], rows: int, columns: int) -> tuple[Sequence[int], Sequence[int]] | None:
    found: list[Sequence[int]] = []
    fields = {"input_tokens": rows, "output_tokens": columns}
    if not any(name in request for name in fields):
        return None
    for name, count in fields.items():
        ends = request.get(name)
        allowed = f"{count} rising integers, 1 or more: the upper ends of the histogram's sizes"
        if not isinstance(ends, list) or len(ends) != count:
            raise InvalidParameter(name, ends, allowed)
        if any(isinstance(end, bool) or not isinstance(end, int) or not 1 <= end <= WHOLE_EDGE for end in ends):
            raise InvalidParameter(name, ends, allowed)
        if any(after <= before for before, after in pairwise(ends)):
            raise InvalidParameter(name, ends, allowed)
        found.append(ends)
    return found[0], found[1]


# ---------------------------------------------------------------- GPUs


def read_gpus(
    request: Mapping[str, Any],
    workload: Workload,
    folder: Path,
    names: Sequence[str] | None = None,
    model: tuple[str, ModelSpec] | None = None,
    quant: str = "none",
) -> list[Gpu]:
    """The GPU types of the file, or of `names`, with their throughputs: given, measured (reports, looked for in
    `folder`), or predicted for `model` (its name and description). Raises InvalidParameter, InputFileError."""
    info = request.get("gpu_info", {})
    if not isinstance(info, dict) or not all(isinstance(one, dict) for one in info.values()):
        raise InvalidParameter("gpu_info", info, "an object: GPU -> an object with cost, tputs, points or reports")
    wanted = list(info) if names is None else list(names)
    if not 1 <= len(wanted) <= MOST_GPUS or len(set(wanted)) != len(wanted):
        raise InvalidParameter("gpus", wanted, f"1 to {MOST_GPUS} different GPU types, of gpu_info or the catalogue")
    return [_gpu(name, info.get(name, {}), workload, folder, model, quant) for name in wanted]


def _gpu(
    name: str,
    entry: Mapping[str, Any],
    workload: Workload,
    folder: Path,
    model: tuple[str, ModelSpec] | None,
    quant: str,
) -> Gpu:
    where = f"gpu_info[{shorten(name)}]"
    _known(entry, GPU_FIELDS, where)
    ways = [field for field in ("tputs", "points", "reports") if field in entry]
    if len(ways) > 1:
        raise InvalidParameter(where, ways, "one of tputs, points, reports")
    price = _number(entry["cost"], f"{where}.cost", above=True) if "cost" in entry else _price(name)
    if not ways:
        return _predicted(name, price, workload, model, quant)
    value, field = entry[ways[0]], f"{where}.{ways[0]}"
    if ways == ["reports"]:
        return _measured(name, price, value, field, workload, folder)
    points = list(_given(value, field, workload.shape, of_points=ways == ["points"]))
    return Gpu(name, price, points)


def _price(name: str) -> float:
    """$/h of a catalogue's device, or of several. Raises InvalidParameter."""
    try:
        count, device = parse_type(name)
    except InvalidParameter as error:
        known = f"{', '.join(DEVICES)}; or any name that has its cost per hour in gpu_info of the file"
        raise InvalidParameter("gpus", name, known) from error
    if device.price_per_hour is None:
        priced = ", ".join(known for known, one in DEVICES.items() if one.price_per_hour is not None)
        raise InvalidParameter(
            "gpus", name, f"one with a price ({priced}), or give its cost per hour in gpu_info of the file"
        )
    return count * device.price_per_hour


def parse_type(name: str) -> tuple[int, Device]:
    """`L4`, or `4xL4`: four of them that deal out every layer. Raises InvalidParameter, with the names there are."""
    several = re.fullmatch(r"([1-9][0-9]?) ?[x×] ?(.+)", name)
    count, plain = (int(several[1]), several[2]) if several else (1, name)
    return count, find_device(plain)


def _given(value: object, field: str, shape: tuple[int, int], of_points: bool) -> Iterator[Sequence[Point]]:
    """By bucket: one throughput, or points (an object each, or a list of them)."""
    rows, columns = shape
    allowed = f"{rows} rows of {columns}, as workload_distribution"
    if not isinstance(value, list) or len(value) != rows:
        raise InvalidParameter(field, value, allowed)
    for row, cells in enumerate(value):
        if not isinstance(cells, list) or len(cells) != columns:
            raise InvalidParameter(f"{field}[{row}]", cells, allowed)
        for column, cell in enumerate(cells):
            at = f"{field}[{row}][{column}]"
            yield list(_points(cell, at)) if of_points else [Point(_number(cell, at))]


def _points(cell: object, field: str) -> Iterator[Point]:
    for one in cell if isinstance(cell, list) else [cell]:
        if not isinstance(one, dict) or "requests_per_s" not in one:
            raise InvalidParameter(field, one, "objects with requests_per_s, and ttft_s and itl_s where known")
        _known(one, POINT_FIELDS, field)
        ttft_s, itl_s = (
            None if one.get(name) is None else _number(one[name], f"{field}.{name}") for name in ("ttft_s", "itl_s")
        )
        yield Point(_number(one["requests_per_s"], f"{field}.requests_per_s"), ttft_s, itl_s)


# ---------------------------------------------------------------- measured


def _measured(name: str, price: float, value: object, field: str, workload: Workload, folder: Path) -> Gpu:
    if not isinstance(value, list) or not value or not all(isinstance(one, str) for one in value):
        raise InvalidParameter(field, value, "a list of files that headrace compare --json wrote")
    if workload.edges is None:
        raise InvalidParameter(field, value, "only beside input_tokens and output_tokens, the sizes of the histogram")
    points: list[list[Point]] = [[] for _ in workload.demand.buckets]
    reports = [read_report(folder / one, workload) for one in value]
    for what in ("machine", "model"):
        different = sorted({getattr(one, what) for one in reports})
        if len(different) > 1:
            raise InvalidParameter(field, different, f"reports of one {what}: they are the sizes of one GPU type")
    for one in reports:
        points[one.bucket] += one.points
    source = f"headrace compare of {reports[0].model} on {reports[0].machine}"
    return Gpu(name, price, points, source, "measured", reports[0].model)


@dataclass(frozen=True, slots=True)
class Report:
    """Of `headrace compare --json`, as far as it matters here."""

    bucket: int
    points: Sequence[Point]
    """One for each method that gave the base's tokens."""
    machine: str
    """The device that it ran on."""
    model: str
    """Its name, and the first digits of its weights' hash."""


def read_report(path: Path, workload: Workload) -> Report:
    """Latencies are 95th percentiles over a round's requests, medians over its rounds.

    Raises InputFileError; InvalidParameter where its requests are of more than one bucket: one time cannot be shared
    out between two sizes.
    """
    report = _read(path)
    if report.get("schema") != REPORT_SCHEMA:
        raise InputFileError(f"{path}: schema {shorten(report.get('schema'))}, allowed: {REPORT_SCHEMA}")
    try:
        prompts = [len(one["token_ids"]) for one in report["workload"]["manifest"]["requests"]]
        methods = [one for one in report["methods"].values() if one["verdict"] in SAME]
        outputs = [len(tokens) for one in methods for tokens in one["outputs"]]
        places = {
            workload.bucket(prompt, output)
            for one in methods
            for prompt, output in zip(prompts, map(len, one["outputs"]), strict=True)
        }
        points = [_point(one["figures"], max(outputs) > 1) for one in methods]
        device = "cpu" if report["config"]["device"] == "cpu" else "gpu"
        machine = str(report["machine"][device])
        model = f"{report['model']['name']} ({report['model']['fingerprint'][:HASH_DIGITS]})"
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputFileError(f"{path}: not a report of headrace compare --json: {shorten(error)}") from error
    if not points:
        raise InputFileError(f"{path}: no method gave the base's tokens")
    if len(places) != 1 or None in places:
        sizes = f"{min(prompts)} to {max(prompts)} in, {min(outputs)} to {max(outputs)} out"
        raise InvalidParameter(
            str(path), sizes, "requests of one bucket of the histogram (compare --prompt-length, --output-length)"
        )
    (bucket,) = places
    assert bucket is not None
    return Report(bucket, points, machine, model)


def _point(figures: Mapping[str, Any], several: bool) -> Point:
    """`several`: whether any answer has more than one token; if not, there is no gap that could be too long."""
    tpot = figures["tpot"]
    untold = None if several else 0.0
    return Point(
        float(figures["requests_per_min"]["median"]) / 60,
        float(figures["ttft"]["p95"]["median"]),
        untold if tpot is None else float(tpot["p95"]["median"]),
    )


# ---------------------------------------------------------------- predicted


def _predicted(name: str, price: float, workload: Workload, model: tuple[str, ModelSpec] | None, quant: str) -> Gpu:
    if model is None:
        raise InvalidParameter(
            "gpus", name, "with tputs, points or reports in gpu_info, or a --model to predict them for"
        )
    if workload.sizes is None:
        raise InvalidParameter(
            "model", model[0], "a file with input_tokens and output_tokens, the sizes that are to be predicted"
        )
    count, device = parse_type(name)
    if count > WIDTHS[-1]:
        raise InvalidParameter("gpus", name, f"up to {WIDTHS[-1]} of them, a node's, where throughputs are predicted")
    wanted = zip(workload.sizes, workload.demand.rates, strict=True)
    longest = max(size.prompt + size.output for size, rate in wanted if rate)
    if longest > model[1].context:
        raise InvalidParameter(
            "input_tokens", longest, f"up to {model[1].context} with output_tokens: {model[0]}'s context"
        )
    points = [
        predict(model[1], device, size, count, Precision(quant=quant)) if rate else []
        for size, rate in zip(workload.sizes, workload.demand.rates, strict=True)
    ]
    return Gpu(name, price, points, device.source, device.basis, model[0])


def predict(spec: ModelSpec, device: Device, size: Size, tp: int, held: Precision) -> list[Point]:
    """Requests of the largest size of a bucket, c at once, for rising c as far as there is memory.

    A request takes one step for its prompt (T_p) and output − 1 of the decode steps that c share (T_d): throughput
    X = 1 / (T_p + (output − 1) T_d / c). Prompts stop the others: ITL = T_d / (1 − X T_p). TTFT = T_d + T_p: the step
    under way, then its own; there is no queue.
    """
    speed = SheetSpeed(spec, device, held, tp)
    tokens = size.prompt + size.output
    prompt_s = speed.step_s(prefill_work(spec, 1, size.prompt, held.kv_dtype))
    found = []
    for rows in _ladder():
        room = device_room(spec, device, held, tp, 1, rows, tokens)
        if room is None or room.requests(tokens) < rows:
            break
        step_s = speed.step_s(decode_work(spec, rows, size.prompt + size.output // 2, held.kv_dtype))
        per_s = 1 / (prompt_s + (size.output - 1) * step_s / rows)
        itl_s = step_s / (1 - per_s * prompt_s) if size.output > 1 else 0.0
        found.append(Point(per_s, step_s + prompt_s, itl_s))
    return found


def _ladder() -> Iterator[int]:
    """1, 2, 3, 4, 6, 8, 12, 16 …"""
    rows = 1
    while rows <= MOST_ROWS:
        yield rows
        if rows > 1 and 3 * rows // 2 <= MOST_ROWS:
            yield 3 * rows // 2
        rows *= 2
