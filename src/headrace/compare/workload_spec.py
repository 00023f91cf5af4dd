"""Names of workloads, as a user writes them, to workloads; and workloads to files, to be run again."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

from headrace.api.fields import check_unicode
from headrace.api.json import read_object
from headrace.compare.arrivals import MAX_REQUESTS, MAX_SEED, AtOnce, arrive, parse_arrivals
from headrace.compare.pictures import with_pixels
from headrace.compare.questions import IMAGE6, TEXT4, image6, text4
from headrace.compare.synthetic import Fixed, parse_length, synthetic
from headrace.compare.traffic import DEFAULT_MAX_TOKENS, printable, read_traffic, repeated_note
from headrace.compare.workloads import Workload, check_room, from_manifest, repeat
from headrace.core.errors import InputFileError, InvalidParameter, RequestError
from headrace.core.types import SamplingParams
from headrace.pages.files import ReportFile

if TYPE_CHECKING:
    from headrace.engine.model import OpenModel

ALLOWED = (
    "text4, image6 (a model that sees), synthetic, or a path to requests (.jsonl, or .csv with a header) or to a "
    "workload that was written (.json)"
)
DEFAULT_REQUESTS, DEFAULT_PROMPT = 32, 64
"""Of a synthetic workload, where nobody says otherwise: how many, and how long their prompts are in tokens."""
SPEEDS = (1e-6, 1e6)
MAX_MANIFEST_BYTES = 512 * 2**20


@dataclass(frozen=True, slots=True)
class WorkloadOptions:
    """What a user may ask of a workload; None: as the workload has it. Raises InvalidParameter."""

    max_tokens: int | None = None
    """Most tokens of an answer; longer ones are cut to it. Default: what a file states, else 96."""
    num_requests: int | None = None
    """How many. Questions are asked again where there are fewer; of a file, the first so many. Default: all; 32 of a
    synthetic workload."""
    prompt_length: str | None = None
    """Tokens of a synthetic prompt: N, or uniform:A:B. Default: 64."""
    output_length: str | None = None
    """Tokens of a synthetic answer: N, or uniform:A:B. Default: max_tokens."""
    arrivals: str | None = None
    """When requests arrive: at-once, gap:S, poisson:MEAN_GAP_S, rate:PER_S, bursts:SIZE:GAP_S or recorded; times in
    seconds. Default: as recorded where a file has times, else at-once."""
    seed: int = 0
    """Of everything that is drawn."""
    speed: float = 1.0
    """How many times as fast as recorded requests are replayed."""

    def __post_init__(self) -> None:
        SamplingParams(max_tokens=self.max_tokens)
        if self.num_requests is not None and not _is_int(self.num_requests, 1, MAX_REQUESTS):
            raise InvalidParameter("num_requests", self.num_requests, f"an integer from 1 to {MAX_REQUESTS}")
        for name in ("prompt_length", "output_length"):
            if getattr(self, name) is not None:
                parse_length(getattr(self, name), name)
        if self.arrivals is not None:
            parse_arrivals(self.arrivals)
        if not _is_int(self.seed, 0, MAX_SEED):
            raise InvalidParameter("seed", self.seed, f"an integer from 0 to {MAX_SEED}")
        low, high = SPEEDS
        is_number = isinstance(self.speed, int | float) and not isinstance(self.speed, bool)
        if not is_number or not low <= self.speed <= high:
            raise InvalidParameter("speed", self.speed, f"a number from {low:g} to {high:g}")


def read_workload(spec: str, opened: OpenModel, options: WorkloadOptions) -> Workload:
    """The workload that `spec` names, for one model. An option that has no meaning for it is refused.

    Raises InvalidParameter, InputFileError (what is wrong in a file), another RequestError where the model's tokenizer
    or template refuses a prompt.
    """
    if spec in ("text4", "image6"):
        return _questions(spec, opened, options)
    if spec == "synthetic":
        return _synthetic(opened, options)
    suffix = Path(spec).suffix.lower()
    if suffix in (".jsonl", ".csv"):
        return _file(Path(spec), opened, options)
    if suffix == ".json":
        _refuse(options, "a workload that was written is run as it is", *(one.name for one in fields(options)))
        return read_manifest(Path(spec), opened)
    raise InvalidParameter("workload", spec, ALLOWED)


def write_manifest(workload: Workload, file: ReportFile) -> None:
    """All of a workload, for `read_manifest`. Raises OSError."""
    file.write(json.dumps(workload.manifest(), allow_nan=False) + "\n")


def read_manifest(path: Path, opened: OpenModel) -> Workload:
    """A workload that was written: exactly the same work, for a model that has its tokens and enough context, and sees
    the same in its images. Raises InputFileError, which names file and field."""
    where = printable(path)
    try:
        if not path.is_file():
            raise RequestError("not a regular file" if path.exists() else "no such file")
        if path.stat().st_size > MAX_MANIFEST_BYTES:
            raise RequestError(f"{path.stat().st_size} bytes, allowed: up to {MAX_MANIFEST_BYTES}")
        manifest = read_object(path.read_bytes().decode())
        check_unicode(manifest)
        workload = from_manifest(manifest)
        longest, vocab_size = opened.limits.max_model_len, opened.limits.vocab_size
        for index, one in enumerate(workload.requests):
            prompt_field, answer_field = f"requests[{index}].token_ids", f"requests[{index}].max_tokens"
            check_room(prompt_field, len(one.token_ids), answer_field, one.max_tokens, longest)
            if (highest := max(one.token_ids)) >= vocab_size:
                raise InvalidParameter(prompt_field, highest, f"0 to {vocab_size - 1}, the tokens of this model")
        workload = with_pixels(workload, opened)
    except UnicodeDecodeError as error:
        raise InputFileError(f"{where}: not UTF-8 at byte {error.start}") from None
    except OSError as error:
        raise InputFileError(f"{where}: cannot be read: {error.strerror}") from error
    except RequestError as error:
        raise InputFileError(f"{where}: {error}") from error
    return workload


def _questions(spec: str, opened: OpenModel, options: WorkloadOptions) -> Workload:
    _refuse(options, "the questions are given", "prompt_length", "output_length")
    _refuse(options, "the questions have no times", "speed")
    process = AtOnce() if options.arrivals is None else parse_arrivals(options.arrivals)
    if process is None:
        raise InvalidParameter("arrivals", options.arrivals, "another process: the questions have no times")
    make, known = (text4, len(TEXT4)) if spec == "text4" else (image6, len(IMAGE6))
    asked = make(opened, options.max_tokens or DEFAULT_MAX_TOKENS)
    count = options.num_requests or known
    notes = (repeated_note(known, count),) if count > known else ()
    return arrive(replace(asked, requests=repeat(asked.requests, count), notes=notes), process, options.seed)


def _synthetic(opened: OpenModel, options: WorkloadOptions) -> Workload:
    _refuse(options, "synthetic requests have no recorded times", "speed")
    process = AtOnce() if options.arrivals is None else parse_arrivals(options.arrivals)
    if process is None:
        raise InvalidParameter("arrivals", options.arrivals, "another process: synthetic requests have no times")
    prompt, output = options.prompt_length, options.output_length
    return synthetic(
        opened,
        options.num_requests or DEFAULT_REQUESTS,
        Fixed(DEFAULT_PROMPT) if prompt is None else parse_length(prompt, "prompt_length"),
        Fixed(options.max_tokens or DEFAULT_MAX_TOKENS) if output is None else parse_length(output, "output_length"),
        process,
        options.seed,
        options.max_tokens,
    )


def _file(path: Path, opened: OpenModel, options: WorkloadOptions) -> Workload:
    _refuse(options, "the file has the requests", "prompt_length", "output_length")
    process = None if options.arrivals is None else parse_arrivals(options.arrivals)
    workload = read_traffic(
        path,
        opened,
        max_tokens=options.max_tokens,
        num_requests=options.num_requests,
        seed=options.seed,
        speed=options.speed,
        replay=None if options.arrivals is None else process is None,
    )
    return workload if process is None else arrive(workload, process, options.seed)


def _refuse(options: WorkloadOptions, why: str, *names: str) -> None:
    """Raises InvalidParameter for one of these options that was given."""
    defaults = WorkloadOptions()
    for name in names:
        if getattr(options, name) != getattr(defaults, name):
            raise InvalidParameter(name, getattr(options, name), f"to leave it out: {why}")


def _is_int(value: object, low: int, high: int) -> bool:
    return type(value) is int and low <= value <= high
