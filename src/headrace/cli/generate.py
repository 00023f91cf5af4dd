"""Answer prompts offline, all of them in one running batch; text or JSON on stdout, in the order of the prompts."""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headrace.cli.console import import_numpy, load_line_shown, print_notes, printable
from headrace.cli.flags import add_engine_flags, add_sampling_flags, given
from headrace.core import strict_json
from headrace.core.config import EngineConfig
from headrace.core.errors import InputFileError, InvalidParameter, RequestError, shorten
from headrace.core.types import SamplingParams, TokenLogprobs

if TYPE_CHECKING:
    from headrace.engine.answer import Completion
    from headrace.engine.model import OpenModel, Prompt
    from headrace.sched.scheduler import SchedulerStats

PROMPT_KEYS = ("prompt", "prompt_token_ids", "messages")
ADAPTER_KEY = "adapter"
MAX_FILE_BYTES = 2**30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_engine_flags(parser)
    add_sampling_flags(parser)
    parser.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="A prompt. Repeatable.")
    parser.add_argument(
        "--image",
        action="append",
        default=[],
        metavar="FILE",
        help="A picture for the one prompt, in the place of an <image> in it, else before it. Repeatable.",
    )
    parser.add_argument(
        "--prompt-file",
        metavar="F.jsonl",
        help='One JSON object a line: {"prompt": TEXT}, {"prompt_token_ids": [...]} or {"messages": [...]}, with any '
        'sampling field and an "adapter" beside it.',
    )
    parser.add_argument(
        "--use-adapter", metavar="NAME", default="", help="Which --adapter answers, where a line names none."
    )
    parser.add_argument("--json", action="store_true", help="One JSON object a request on stdout, and nothing else.")
    parser.add_argument("--stats", action="store_true", help="At the end, times and counts (with --json: an object).")


def run(arguments: argparse.Namespace) -> int:
    base = given(arguments, SamplingParams)
    SamplingParams(**base)
    lines = [{"prompt": text} for text in arguments.prompt]
    if arguments.prompt_file is not None:
        lines += read_prompt_file(Path(arguments.prompt_file))
    lines = [{ADAPTER_KEY: arguments.use_adapter, **line} for line in lines]
    if not lines:
        raise InvalidParameter("prompt", None, "at least one --prompt, or a --prompt-file that is not empty")

    if arguments.image and (len(arguments.prompt) != 1 or len(lines) != 1):
        raise InvalidParameter("--image", arguments.image[0], "beside one --prompt, and nothing else to answer")

    import_numpy(os.environ)
    from headrace.engine.model import OpenModel

    opened = OpenModel(EngineConfig(**given(arguments, EngineConfig)))
    return Job(opened, lines, base, arguments.json, arguments.stats, arguments.image).run()


class Job:
    """One call of the command: some prompts are refused at once, the others run together."""

    def __init__(
        self,
        opened: OpenModel,
        lines: list[dict[str, Any]],
        base: Mapping[str, Any],
        as_json: bool,
        stats: bool,
        images: Sequence[str] = (),
    ) -> None:
        """`images`: files, of the one prompt."""
        self._opened = opened
        self._lines = lines
        self._base = base
        self._as_json = as_json
        self._stats = stats
        self._images = images
        self._waiting: dict[tuple[int, int], Completion] = {}
        self._due: deque[tuple[int, int]] = deque()
        """(line, choice) of what is still to be printed, in order."""
        self._answers: list[int] = []
        """How many answers each line gets."""
        self._failures: list[str] = []
        self._prompt_tokens = self._output_tokens = 0

    def run(self) -> int:
        from headrace.engine.answer import refused
        from headrace.sched.scheduler import SchedulerStats

        self._opened.begin()
        good: list[tuple[int, Prompt, SamplingParams]] = []
        adapters: list[str] = []
        bad: list[Completion] = []
        for index, line in enumerate(self._lines):
            try:
                prompt, sampling = parse_line(line, self._base)
                if self._images:
                    prompt = _with_images(prompt, self._images)
                adapter = line.get(ADAPTER_KEY, "")
                request = self._opened.requests(str(index), prompt, sampling, adapter=adapter)[0]
                # Images are read again when their turn comes: those of a whole file are not for the memory.
                good.append((index, prompt if request.images else request.token_ids, sampling))
                adapters.append(adapter)
                self._answers.append(sampling.n)
            except RequestError as error:
                self._answers.append(1)
                bad.append(refused(index, error))
        self._due.extend((index, choice) for index, count in enumerate(self._answers) for choice in range(count))
        for completion in bad:
            self._show(completion)
        if good:
            self._answer(good, adapters)
        elif self._stats:
            self._show_stats(SchedulerStats(), load_s=0.0, wall_s=0.0)
        if not self._failures:
            return 0
        more = f" ({len(self._failures) - 1} more requests failed)" if len(self._failures) > 1 else ""
        print(f"headrace: error: {self._failures[0]}{more}", file=sys.stderr)
        return 1

    def _answer(self, good: list[tuple[int, Prompt, SamplingParams]], adapters: list[str]) -> None:
        from dataclasses import replace

        from headrace.engine.llm import LLM
        from headrace.engine.progress import loading, progress_bar

        print_notes(self._opened.checkpoint)
        with loading(load_line_shown(os.environ)) as on_progress:
            llm = LLM.load(self._opened, on_progress)
        with llm:
            began_s = time.monotonic()
            shown = sys.stderr.isatty() and not (sys.stdout.isatty() and len(good) == 1)
            with progress_bar(sum(sampling.n for *_, sampling in good), shown) as advance:
                for completion in llm.iterate([(prompt, sampling) for _, prompt, sampling in good], adapters):
                    advance(completion)
                    self._show(replace(completion, index=good[completion.index][0]))
            if self._stats:
                self._show_stats(llm.stats, llm.load_s, time.monotonic() - began_s)

    def _show(self, completion: Completion) -> None:
        """Prints what is complete, in input order."""
        self._waiting[completion.index, completion.choice] = completion
        while self._due and (ready := self._waiting.pop(self._due[0], None)) is not None:
            self._due.popleft()
            self._prompt_tokens += len(ready.prompt_token_ids) if ready.choice == 0 else 0
            self._output_tokens += len(ready.token_ids)
            if ready.error is not None:
                self._failures.append(f"request {ready.index}: {ready.error.message}")
            if self._as_json:
                print(json.dumps(to_json(ready), allow_nan=False), flush=True)
            elif ready.error is None:
                if sum(self._answers) > 1:
                    name = f"{ready.index}.{ready.choice}" if self._answers[ready.index] > 1 else ready.index
                    print(f"── {name} · {len(ready.token_ids)} tokens · {ready.finish_reason} ──")
                # What a model says is not to be obeyed by a terminal.
                print(printable(ready.text) if sys.stdout.isatty() else ready.text, flush=True)

    def _show_stats(self, totals: SchedulerStats, load_s: float, wall_s: float) -> None:
        from headrace.engine.hardware import peak_rss_bytes

        stats = {
            "load_s": load_s,
            "wall_s": wall_s,
            "prompt_tokens": self._prompt_tokens,
            "output_tokens": self._output_tokens,
            "iterations": totals.iterations,
            "computed_tokens": totals.computed_tokens,
            "cached_tokens": totals.cached_tokens,
            "preemptions": totals.preemptions,
            "peak_rss_bytes": peak_rss_bytes(),
            "backend": self._opened.config.backend,
        }
        if self._as_json:
            print(json.dumps({"stats": stats}), flush=True)
        else:
            print("\n".join(f"{name:>16}  {value}" for name, value in stats.items()), file=sys.stderr)


def _with_images(prompt: Prompt, names: Sequence[str]) -> Prompt:
    from headrace.engine.images import ImagePrompt

    assert isinstance(prompt, str)
    return ImagePrompt(prompt, [Path(name) for name in names], ["--image"] * len(names))


def to_json(completion: Completion) -> dict[str, Any]:
    error = completion.error
    record: dict[str, Any] = {
        "index": completion.index,
        "choice": completion.choice,
        "prompt_token_ids": completion.prompt_token_ids,
        "token_ids": completion.token_ids,
        "text": completion.text,
        "finish_reason": completion.finish_reason,
        "ttft_s": completion.ttft_s,
        "decode_tokens_per_s": completion.decode_tokens_per_s,
        "error": None if error is None else {"code": error.code, "message": error.message},
    }
    if completion.seed is not None:
        record["seed"] = completion.seed
    if completion.logprobs is not None:
        record["logprobs"] = [_logprobs(each) for each in completion.logprobs]
    if completion.prompt_logprobs is not None:
        record["prompt_logprobs"] = [each and _logprobs(each) for each in completion.prompt_logprobs]
    return record


def _logprobs(one: TokenLogprobs) -> dict[str, Any]:
    """JSON has no infinity: a token that cannot be has the log-probability null."""

    def finite(value: float) -> float | None:
        return value if math.isfinite(value) else None

    return {"logprob": finite(one.logprob), "top": [(token_id, finite(value)) for token_id, value in one.top]}


def read_prompt_file(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file; blank lines are skipped. Raises InputFileError naming file and line."""
    if path.is_dir():
        raise InputFileError(f"{path}: is a folder, allowed: a JSON-lines file")
    if path.is_file() and path.stat().st_size > MAX_FILE_BYTES:
        raise InputFileError(f"{path}: {path.stat().st_size} bytes, allowed: up to {MAX_FILE_BYTES}")
    try:
        return list(_objects(path, path.read_text(encoding="utf-8-sig")))
    except FileNotFoundError as error:
        raise InputFileError(f"{path}: no such file") from error
    except UnicodeDecodeError as error:
        raise InputFileError(f"{path}: not UTF-8 at byte {error.start}") from error


def _objects(path: Path, text: str) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = strict_json.parse(line)
        except (ValueError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error).split("\n")[0]
            raise InputFileError(f"{path}, line {number}: not JSON ({reason}): {shorten(line)}") from error
        if not isinstance(value, dict):
            raise InputFileError(f"{path}, line {number}: got {shorten(value)}, allowed: a JSON object")
        yield value


def parse_line(line: Mapping[str, Any], base: Mapping[str, Any]) -> tuple[Prompt, SamplingParams]:
    """Prompt and sampling of one line; the line's fields win over `base`. Raises RequestError."""
    keys = [key for key in PROMPT_KEYS if key in line]
    if len(keys) != 1:
        raise InvalidParameter("prompt", keys or sorted(line), "exactly one of " + ", ".join(PROMPT_KEYS))
    known = SamplingParams.__dataclass_fields__
    for name in line:
        if name not in known and name not in (*PROMPT_KEYS, ADAPTER_KEY):
            raise InvalidParameter("field", name, ", ".join((*PROMPT_KEYS, ADAPTER_KEY, *known)))
    prompt = line[keys[0]]
    if keys[0] == "prompt" and not isinstance(prompt, str):
        raise InvalidParameter("prompt", prompt, "a string")
    if keys[0] == "prompt_token_ids" and not (isinstance(prompt, list) and all(type(i) is int for i in prompt)):
        raise InvalidParameter("prompt_token_ids", prompt, "a list of integers")
    if keys[0] == "messages" and not (isinstance(prompt, list) and prompt and all(isinstance(m, dict) for m in prompt)):
        raise InvalidParameter("messages", prompt, "a list of objects, not empty")
    chosen = {name: line[name] for name in line if name in known}
    if isinstance(bias := chosen.get("logit_bias"), dict):
        # The keys of a JSON object are strings; no token id has ten digits.
        chosen["logit_bias"] = {int(key) if re.fullmatch("[0-9]{1,9}", key) else key: bias[key] for key in bias}
    return prompt, SamplingParams(**{**base, **chosen})
