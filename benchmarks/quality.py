"""What each format costs in quality: KL, top-1 agreement and perplexity against fp32, on text that comes with Python.

    python -m benchmarks.quality [--model demo] [--gguf FILE ...] [--tokens 20000] [--llama-cpp PYTHON] [--threads 1]
        [--json FILE]

Text: the help topics of the standard library (pydoc_data.topics), without BOS; windows of 512 tokens, evenly spread
over it. The first 16 tokens of a window are context only: the other 496 are foretold, and counted.

Reference: the native backend in float32 throughout, KV cache included, on the very weights of the row's file, so that
`KL` shows what the arithmetic and the KV cache cost and not what making the file cost. `KL to the model` refers to the
fp32 of --model for every row. Weights that are quantised at load are --model's, dequantised and with their channels
moved by half a group (`quality_shift.py`).

--llama-cpp: an interpreter that has llama-cpp-python; adds a row for each file. All rows get the same token ids, window
by window, and never more than 64 positions of logits of a row are held.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn, Protocol, cast

import numpy as np
from benchmarks.quality_score import Logits, Tally, Truth
from benchmarks.quality_shift import shifted

from headrace.backends.base import BackendOptions
from headrace.compare.machine import probe_machine
from headrace.core.errors import EngineError, HeadraceError, InvalidParameter, shorten
from headrace.core.sizing import blocks_for
from headrace.engine.model import create_backend
from headrace.models.registry import describe
from headrace.pages.files import ReportFile
from headrace.parallel.mesh import Mesh
from headrace.testing.driver import Driver
from headrace.text.tokenizer import load_tokenizer
from headrace.weights.checkpoint import locate, open_checkpoint
from headrace.weights.loader import stream
from headrace.weights.qtensor import QTensor

SCHEMA = 1
WINDOW = 512
CONTEXT_ONLY = 16
"""Tokens at the beginning of a window that are not foretold."""
COUNTED = WINDOW - CONTEXT_ONLY
CHUNK = 64
"""Positions of logits that are held at once."""
BLOCK_SIZE = 16
SCRIPT = Path(__file__).with_name("quality_llama.py")
Window = Sequence[int]


@dataclass(frozen=True, slots=True)
class Format:
    """One row of the table."""

    engine: str
    file: Path
    weights: str
    """stored, none, int8 or int4, as in BackendOptions.quant."""
    dtype: str = "float32"
    kv: str = "float32"
    shifted: bool = False
    """Load the file's weights dequantised, and their channels moved."""

    def title(self) -> str:
        """Of its weights."""
        if self.weights == "stored":
            return self.file.stem
        return f"{self.dtype if self.weights == 'none' else self.weights} from {self.file.stem}"


def reference(file: Path) -> Format:
    return Format("headrace", file, "none")


def formats(model: Path, others: Sequence[Path], llama_cpp: bool) -> list[Format]:
    """All rows, the references left out."""
    rows = [Format("headrace", model, "stored", kv=kv) for kv in ("float32", "bfloat16", "int8")]
    rows += [Format("headrace", model, "none", kv=kv) for kv in ("bfloat16", "int8")]
    rows += [Format("headrace", model, "none", dtype="bfloat16")]
    rows += [Format("headrace", model, weights, shifted=True) for weights in ("int8", "int4")]
    rows += [Format("headrace", file, "stored") for file in others]
    if llama_cpp:
        rows += [Format("llama.cpp", file, "stored", kv="") for file in (model, *others)]
    return rows


class Source(Protocol):
    """Gives logits."""

    kv: str

    def chunks(self, window: Window) -> Iterator[Logits]:
        """Of the counted positions, CHUNK at a time."""

    def close(self) -> None: ...


class NativeSource:
    def __init__(self, row: Format, threads: int) -> None:
        checkpoint = open_checkpoint(row.file)
        found = describe(checkpoint.config, checkpoint.format, checkpoint.shapes(), checkpoint.vector)
        options = BackendOptions(
            dtype=row.dtype,
            quant=row.weights,
            kv_dtype=row.kv,
            threads=threads,
            block_size=BLOCK_SIZE,
            num_blocks=blocks_for(WINDOW, BLOCK_SIZE),
            max_rows=1,
            max_tokens=CHUNK,
            max_model_len=WINDOW,
        )
        tensors = stream(checkpoint, found.weight_map)
        if row.shifted:
            tensors = _shifted(tensors, found.spec.layers[0].attention.head_dim)
        self.kv = row.kv
        self._backend = create_backend("native")
        with closing(checkpoint):
            self._driver = Driver(self._backend, self._backend.load(found.spec, tensors, options, Mesh()))
        self.instructions = str(self._backend.probe()["instructions"])

    def chunks(self, window: Window) -> Iterator[Logits]:
        driver = self._driver
        row = driver.admit(window[:-1])
        driver.run(driver.span(row, CONTEXT_ONLY - 1, sample=False))
        for start in range(0, COUNTED, CHUNK):
            out = driver.run(driver.span(row, min(CHUNK, COUNTED - start), sample=False, logits=True))[row]
            if out.error is not None:
                raise EngineError(f"{out.error.code}: {out.error.message}")
            yield cast("Logits", out.logits)
        driver.release(row)

    def close(self) -> None:
        self._backend.close()


def _shifted(tensors: Iterable[tuple[str, QTensor]], head_dim: int) -> Iterator[tuple[str, QTensor]]:
    for name, tensor in tensors:
        yield name, QTensor.from_array(shifted(name, np.asarray(tensor.dequantise(), np.float32), head_dim))


class LlamaSource:
    """llama.cpp in an interpreter of its own. It computes a window when the first chunk is asked for."""

    def __init__(self, python: Path, row: Format, threads: int) -> None:
        numbers = [str(number) for number in (threads, WINDOW, CONTEXT_ONLY - 1)]
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 (closed by `close`)
        self._process = subprocess.Popen(
            [str(python), "-I", str(SCRIPT), str(row.file), *numbers],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._stdin, self._stdout = self._process.stdin, self._process.stdout
        line = self._stdout.readline()
        if not line:
            self._fail()
        facts = json.loads(line)
        self.kv, self.version, self._vocabulary = facts["kv"], facts["version"], facts["vocabulary"]

    def chunks(self, window: Window) -> Iterator[Logits]:
        try:
            self._stdin.write(json.dumps(list(window[:-1])).encode() + b"\n")
            self._stdin.flush()
        except OSError:
            self._fail()
        for start in range(0, COUNTED, CHUNK):
            shape = (min(CHUNK, COUNTED - start), self._vocabulary)
            size = shape[0] * shape[1] * np.dtype(np.float32).itemsize
            data = self._stdout.read(size)
            if len(data) != size:
                self._fail()
            yield np.frombuffer(data, np.float32).reshape(shape)

    def _fail(self) -> NoReturn:
        """Raises EngineError with the last line that it wrote to stderr."""
        self._process.wait()
        self._stderr.seek(0)
        said = [line for line in self._stderr.read().decode(errors="replace").split("\n") if line.strip()]
        self.close()
        raise EngineError(f"llama.cpp ended: {shorten(said[-1], 300) if said else 'it said nothing'}")

    def close(self) -> None:
        """Idempotent."""
        self._process.kill()
        self._process.wait()
        for stream_ in (self._stdin, self._stdout, self._stderr):
            with suppress(OSError):
                stream_.close()


def make_windows(model: Path, tokens: int) -> list[list[int]]:
    """At least `tokens` counted positions. Raises InvalidParameter if the text has not so many."""
    from pydoc_data.topics import topics

    with closing(open_checkpoint(model)) as checkpoint:
        token_ids = load_tokenizer(checkpoint).encode("\n\n".join(topics[name] for name in sorted(topics)), False)
    return spread(token_ids, tokens)


def spread(token_ids: Sequence[int], tokens: int) -> list[list[int]]:
    """Windows that do not overlap, at equal distances. Raises InvalidParameter if there are too few tokens for them."""
    most = len(token_ids) // WINDOW
    count = -(-tokens // COUNTED)
    if not 0 < count <= most:
        raise InvalidParameter("tokens", tokens, f"1 to {most * COUNTED}")
    stride = len(token_ids) // count
    return [list(token_ids[start : start + WINDOW]) for start in range(0, count * stride, stride)]


def measure(
    windows: Sequence[Window], references: Sequence[tuple[Path, Source]], rows: Sequence[tuple[Format, Source]]
) -> tuple[dict[Path, Tally], list[Tally]]:
    """Figures of each reference (its perplexity) and each row. The first reference is the model's."""
    base = references[0][0]
    of_references = {file: Tally() for file, _ in references}
    of_rows = [Tally() for _ in rows]
    for number, window in enumerate(windows, 1):
        streams = [source.chunks(window) for _, source in (*references, *rows)]
        start = CONTEXT_ONLY
        for chunks in zip(*streams, strict=True):
            targets = window[start : start + CHUNK]
            start += CHUNK
            truths: dict[Path, Truth] = {}
            for (file, _), logits in zip(references, chunks, strict=False):
                truths[file] = Truth(logits)
                of_references[file].add(logits, targets, {})
            for (row, _), logits, tally in zip(rows, chunks[len(references) :], of_rows, strict=True):
                tally.add(logits, targets, {str(file): truths[file] for file in {row.file, base}})
        print(f"\rwindow {number} of {len(windows)}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return of_references, of_rows


def table(results: Sequence[dict[str, Any]]) -> str:
    """Markdown."""
    head = ("engine", "weights", "KV", "KL, nats a token", "median", "99 %", "top-1 the same", "perplexity (fp32)")
    lines = [[*head, "KL to the model"], ["---"] * (len(head) + 1)]
    for one in results:
        own, model = one["own"], one["model"]
        perplexity = f"{one['perplexity']:.3f} ({one['fp32_perplexity']:.3f})"
        cells = [one["engine"], one["weights"], one["kv"], mean_text(own), number_text(own["median_kl"])]
        cells += [number_text(own["p99_kl"]), f"{own['top1_agreement']:.2%}".replace("%", " %"), perplexity]
        lines.append([*cells, number_text(model["mean_kl"])])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def mean_text(summary: dict[str, Any]) -> str:
    error = summary["standard_error"]
    return number_text(summary["mean_kl"]) + ("" if error is None else f" ± {number_text(error, 2)}")


def number_text(value: float, digits: int = 3) -> str:
    """`digits` significant digits, as a plain number."""
    return np.format_float_positional(value, precision=digits, fractional=False, unique=False, trim="-")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything that was measured, as plain data."""
    model = Path(locate(arguments.model))
    others = [file for file in dict.fromkeys(Path(file) for file in arguments.gguf) if file != model]
    windows = make_windows(model, arguments.tokens)
    with ExitStack() as stack:

        def opened(row: Format) -> Source:
            source: Source
            if row.engine == "headrace":
                source = NativeSource(row, arguments.threads)
            else:
                source = LlamaSource(arguments.llama_cpp, row, arguments.threads)
            stack.callback(source.close)
            return source

        references = [(file, opened(reference(file))) for file in (model, *others)]
        rows = [(row, opened(row)) for row in formats(model, others, arguments.llama_cpp is not None)]
        of_references, of_rows = measure(windows, references, rows)
        llama_cpp = {source.version for _, source in rows if isinstance(source, LlamaSource)}
        instructions = {source.instructions for _, source in rows if isinstance(source, NativeSource)}
    results = [
        {
            "engine": row.engine,
            "weights": row.title(),
            "kv": source.kv,
            "own": asdict(tally.summary(str(row.file), len(windows))),
            "model": asdict(tally.summary(str(model), len(windows))),
            "perplexity": tally.perplexity,
            "fp32_perplexity": of_references[row.file].perplexity,
        }
        for (row, source), tally in zip(rows, of_rows, strict=True)
    ]
    return {
        "schema": SCHEMA,
        "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": asdict(probe_machine()),
        "instructions": ", ".join(instructions),
        "llama_cpp_python": ", ".join(llama_cpp) or None,
        "window": WINDOW,
        "counted_of_window": COUNTED,
        "positions": COUNTED * len(windows),
        "results": results,
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="demo, or a model's file or folder")
    parser.add_argument("--gguf", nargs="+", default=[], metavar="FILE", help="the same model in other formats")
    parser.add_argument("--tokens", type=int, default=20000, help="at least so many positions are counted")
    parser.add_argument("--llama-cpp", type=Path, metavar="PYTHON", help="an interpreter that has llama-cpp-python")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", metavar="FILE")
    arguments = parser.parse_args(argv)
    if arguments.threads < 1:
        parser.error("--threads: at least 1")
    try:
        report = None if arguments.json is None else ReportFile("json", arguments.json)
        found = run(arguments)
        print(table(found["results"]))
        if report is not None:
            report.write(json.dumps(found, indent=2) + "\n")
    except (HeadraceError, OSError) as error:
        print(f"quality: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
