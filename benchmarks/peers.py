"""headrace and other engines on the same work, interleaved, each in a process of its own. `make bench` runs this.

    python -m benchmarks.peers [--setup] [--engines llama.cpp:q4_1 headrace:native ...] [--work single batch ...]
        [--repeats 5] [--threads 2] [--isa native|avx2] [--model demo|llama-0.5b|llama-1.1b|FILE.gguf]
        [--contexts 128 512 ...] [--patience S] [--json FILE] [--svg FILE]

A row is ENGINE:PRECISION[,SETTING=VALUE...]; of headrace it is headrace:BACKEND[,file=PRECISION][,SETTING=VALUE...],
where file is the precision of a GGUF file made from the model (or `hf`, the dequantised folder), and the settings are
those of LLM(). --setup makes the environments and files that are missing, as `headrace compare MODEL --setup ENGINE`
does for one engine; llama.cpp is compiled then, and some gigabytes are downloaded and written.

Works: start, single, prefill, batch, staggered, sampling, context, all. Prompts are exact token ids from a fixed seed;
answers have a fixed length, greedy but for `sampling`. Engines are loaded together where memory allows, and take turns
in rotated order; ratios are of the runs of one round. A fixed loop before every run and the processor time of all other
processes during it show other load; with --patience S the runs of a work may wait S seconds in all for a quiet machine
and be made again where they were disturbed. The read bandwidth is measured in every round, at the size of each engine's
weights.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from benchmarks.machine_speed import Reader
from benchmarks.peer_chart import chart
from benchmarks.peer_run import Bench, CachedFleet, WorkResult
from benchmarks.peer_table import as_markdown, bound_share
from benchmarks.peer_work import CONTEXTS, NAMES, make_works

from headrace.cli.compare import peer_cache
from headrace.compare.machine import probe_machine
from headrace.compare.peers import ISAS, parse_spec
from headrace.core.errors import HeadraceError
from headrace.pages.files import ReportFile

SCHEMA = 1
DEFAULT_ENGINES = (
    *("llama.cpp:q4_1", "llama.cpp:q4_0", "llama.cpp:q8_0", "llama.cpp:f32", "openvino:fp32", "openvino:int8"),
    *("openvino:int4", "onnxruntime:int4", "ctranslate2:int8_float32", "ctranslate2:float32", "transformers:fp32"),
    *("headrace:auto", "headrace:auto,dtype=float32,file=f32"),
)
DEFAULT_WORK = ("single", "prefill", "batch", "staggered")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", nargs="+", default=list(DEFAULT_ENGINES), metavar="ROW")
    parser.add_argument("--work", nargs="+", default=list(DEFAULT_WORK), choices=("all", *NAMES), metavar="WORK")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--isa", choices=ISAS, default="native")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--contexts", type=int, nargs="+", default=list(CONTEXTS), metavar="N")
    parser.add_argument("--setup", action="store_true", help="first make what the rows need and is not there")
    parser.add_argument(
        "--patience", type=float, default=0.0, metavar="S", help="seconds for a quiet machine, see above"
    )
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--svg", metavar="FILE")
    arguments = parser.parse_args(argv)
    if arguments.repeats < 1 or arguments.threads < 1 or min(arguments.contexts) < 1:
        parser.error("--repeats, --threads and --contexts: at least 1")
    return arguments


def document(arguments: argparse.Namespace, results: Sequence[WorkResult], measured_at: str) -> dict[str, Any]:
    """Everything that was measured, as plain data."""
    works = []
    for result in results:
        rows = [
            {
                "engine": row.spec.name,
                "loaded": {name: value for name, value in row.loaded.items() if name != "ok"},
                "rounds": row.rounds,
                "of_bound": bound_share(result, row),
                "first_tokens": row.first_tokens[:16],
                "error": row.error,
            }
            for row in result.rows
        ]
        works.append(
            {
                "work": result.work.name,
                "title": result.work.title,
                "figures": [asdict(figure) for figure in result.work.figures],
                "rows": rows,
                "canary_s": result.canary_s,
                "bandwidths": [asdict(one) for one in result.bandwidths],
            }
        )
    return {
        "schema": SCHEMA,
        "measured_at": measured_at,
        "machine": asdict(probe_machine()),
        "isa": arguments.isa,
        "model": arguments.model,
        "threads": arguments.threads,
        "repeats": arguments.repeats,
        "works": works,
    }


def run(arguments: argparse.Namespace) -> int:
    parsed = (parse_spec(text).kept_to(arguments.isa) for text in arguments.engines)
    specs = list({spec.name: spec for spec in parsed}.values())
    files = {kind: ReportFile(kind, path) for kind in ("json", "svg") if (path := getattr(arguments, kind))}
    cache = peer_cache(arguments.isa)
    if arguments.setup:
        for spec in specs:
            cache.prepare(arguments.model, spec)
    fleet = CachedFleet(cache, arguments.model, arguments.threads)
    measured_at = datetime.now(UTC).isoformat(timespec="seconds")
    bench = Bench(fleet, arguments.isa, arguments.threads, arguments.repeats, say, arguments.patience)
    reader = Reader(arguments.threads)
    results: list[WorkResult] = []
    print(f"{arguments.model}, {arguments.threads} threads, {arguments.isa}, {arguments.repeats} rounds\n")
    try:
        for work in make_works(arguments.work, arguments.contexts):
            results.append(bench.run(work, specs, reader))
            print(as_markdown(results[-1]), flush=True)
            # After every work, so that what was measured stays if a later one is interrupted.
            if "json" in files:
                files["json"].write(json.dumps(document(arguments, results, measured_at), allow_nan=False) + "\n")
            if "svg" in files:
                files["svg"].write(chart(results, f"{arguments.model}, {arguments.threads} threads, {arguments.isa}"))
    finally:
        reader.close()
    return 1 if any(row.error for result in results for row in result.rows) else 0


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    try:
        return run(parse(argv))
    except HeadraceError as error:
        print(f"peers: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
