"""Run the same requests under every method: are the tokens the same, how long does each take, and which one to use?"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headrace.cli.console import print_notes
from headrace.cli.flags import add_engine_flags, add_flags, given
from headrace.core.config import EngineConfig
from headrace.core.errors import InvalidParameter

if TYPE_CHECKING:
    from headrace.compare.advice import Advice
    from headrace.compare.certificate_reader import Certificate
    from headrace.compare.csv_files import CsvFolder
    from headrace.compare.peer_setup import PeerCache
    from headrace.compare.runner import Comparison, Outside, Wishes
    from headrace.engine.model import OpenModel
    from headrace.pages.files import ReportFile

MAX_REPEATS = 1000
METHODS = "serial,dataloader,threads,fused"
KEY = "OPENAI_API_KEY"
"""Environment variable with the key for a server that is compared."""
BREAK_EVEN_S = 120.0
"""How long a break-even rate is looked for, about."""


class Setup(argparse.Action):
    """--setup NAME does without MODEL."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, *_: Any) -> None:
        setattr(namespace, self.dest, values)
        for action in parser._actions:
            if action.dest == "model":
                action.required = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from headrace.compare.figures import Prices, Slo
    from headrace.compare.methods.registry import known
    from headrace.compare.workload_spec import ALLOWED, WorkloadOptions

    add_engine_flags(parser, leave_out=("policy", "prefix_cache", "adapters"))
    group = parser.add_argument_group("what is compared")
    ways = " ".join(f"{line}." for line in known()).replace("%", "%%")
    group.add_argument(
        "--methods",
        metavar="LIST",
        default=METHODS,
        help=f"Comma-separated. serial is always part of it: the others are held against it. {ways} "
        f"Default: {METHODS}.",
    )
    group.add_argument(
        "--workload",
        metavar="WHAT",
        default="text4",
        help=f"What is asked: {ALLOWED}; flover:1 to flover:7, the experiments of the Flover study. Default: text4.",
    )
    add_flags(parser, "workload", WorkloadOptions)
    group.add_argument(
        "--repeats",
        type=int,
        metavar="R",
        default=3,
        help="Rounds; each runs every method. Fewer than 3 cannot tell methods apart, 8 and more can at a level of "
        "1 %%. Default: 3.",
    )
    _add_wishes(parser.add_argument_group("what is wanted"))
    add_flags(parser, "service that counts as good", Slo)
    add_flags(parser, "prices", Prices)
    _add_outputs(parser.add_argument_group("reports"))
    outside = parser.add_argument_group("outside engines")
    outside.add_argument(
        "--setup",
        metavar="NAME",
        action=Setup,
        help="Instead of comparing: make the environment of an outside engine, and MODEL's files for it if MODEL is "
        "given (demo, llama-0.5b, llama-1.1b or a .gguf file). NAME: llama.cpp, openvino, onnxruntime, ctranslate2, "
        "transformers or vllm.",
    )
    outside.add_argument(
        "--isa",
        metavar="NAME",
        default="native",
        help="llama.cpp: compiled for this machine (native) or for AVX2 without anything newer (avx2). "
        "Default: native.",
    )


def _add_wishes(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--objective",
        metavar="NAME",
        default="time",
        help="What the best method has least of: time, cost, energy or memory. Default: time.",
    )
    group.add_argument(
        "--break-even",
        metavar="LOW:HIGH",
        help="Also look for the arrival rate, between LOW and HIGH requests a second, at which the best two methods "
        "change places in mean latency (up to two minutes more).",
    )


def _add_outputs(group: argparse._ArgumentGroup) -> None:
    files = (
        ("--json", "FILE", "Write every figure and token id to FILE."),
        ("--html", "FILE", "Write a report for people to FILE, one page in itself."),
        ("--csv", "FOLDER", "Write tables to FOLDER: methods, requests, progress, completions."),
        ("--manifest", "FILE", "Write the workload to FILE (.json): --workload FILE runs exactly the same again."),
        ("--certificate", "FILE", "Write to FILE what shows that the advised method gave serial's tokens."),
        ("--check", "FILE", "Instead of comparing: run a certificate again, and name every difference."),
    )
    for flag, metavar, said in files:
        group.add_argument(flag, metavar=metavar, help=said)
    group.add_argument(
        "--live",
        action="store_true",
        help="Instead of comparing: watch 32 requests join and leave one running batch. MODEL `picture`: without a "
        "model, as in the Flover study's picture.",
    )


@dataclass(frozen=True, slots=True)
class Files:
    """Where reports go; each path was seen to be writable."""

    one: Mapping[str, ReportFile]
    """Kind -> its file."""
    csv: CsvFolder | None

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> Files:
        """Raises InvalidParameter."""
        from headrace.compare.csv_files import CsvFolder
        from headrace.pages.files import ReportFile

        kinds = ("json", "html", "manifest", "certificate")
        paths = {kind: path for kind in kinds if (path := getattr(arguments, kind)) is not None}
        seen: dict[str, str] = {}
        for kind, path in paths.items():
            if (other := seen.setdefault(os.path.realpath(path), kind)) != kind:
                raise InvalidParameter(kind, path, f"another file than --{other}")
        folder = None if arguments.csv is None else CsvFolder("csv", arguments.csv)
        return cls({kind: ReportFile(kind, path) for kind, path in paths.items()}, folder)


def run(arguments: argparse.Namespace) -> int:
    if arguments.setup is not None:
        return set_up(arguments)
    if arguments.check is not None:
        return check(arguments)
    if arguments.live:
        return live(arguments)
    if not 1 <= arguments.repeats <= MAX_REPEATS:
        raise InvalidParameter("repeats", arguments.repeats, f"an integer from 1 to {MAX_REPEATS}")
    names = method_names(arguments.methods)
    if arguments.workload.startswith("flover:"):
        return flover(arguments, names)
    return study(arguments, names)


def method_names(text: str) -> list[str]:
    """The list of --methods; NAME=VALUE belongs to the engine before it. Raises InvalidParameter."""
    from headrace.compare.methods.registry import check_names, is_outside

    names: list[str] = []
    for piece in text.split(","):
        name = piece.strip()
        if names and "=" in name and is_outside(names[-1]):
            names[-1] += f",{name}"
        else:
            names.append(name)
    check_names(names)
    return names


def open_model(arguments: argparse.Namespace, **settings: Any) -> OpenModel:
    """Without the prefix cache: every run computes everything. `settings`: below what the user sets."""
    from headrace.engine.model import OpenModel

    opened = OpenModel(EngineConfig(**{**settings, **given(arguments, EngineConfig), "prefix_cache": False}))
    print_notes(opened.checkpoint)
    return opened


def wishes_of(arguments: argparse.Namespace) -> Wishes:
    """Raises InvalidParameter."""
    from headrace.compare.advice import objective_of
    from headrace.compare.figures import Prices, Slo
    from headrace.compare.runner import Wishes

    slo = Slo(**given(arguments, Slo))
    wishes = Wishes(arguments.objective, slo if slo.asked else None, Prices(**given(arguments, Prices)))
    objective_of(wishes)
    return wishes


def outside_of(arguments: argparse.Namespace) -> Outside:
    """Where outside engines are, and the key for a server."""
    from headrace.compare.runner import Outside

    return Outside(peer_cache(arguments.isa), os.environ.get(KEY, ""))


def rates_of(text: str | None) -> tuple[float, float] | None:
    """LOW:HIGH of --break-even. Raises InvalidParameter."""
    if text is None:
        return None
    low, _, high = text.partition(":")
    try:
        found = float(low), float(high)
    except ValueError:
        found = (0.0, 0.0)
    if not 0 < found[0] < found[1] < float("inf"):
        raise InvalidParameter("break-even", text, "LOW:HIGH, requests a second, 0 < LOW < HIGH")
    return found


def study(arguments: argparse.Namespace, names: Sequence[str]) -> int:
    """The comparison."""
    from headrace.cli.remember import remember
    from headrace.compare.methods import with_base
    from headrace.compare.workload_spec import WorkloadOptions

    options = WorkloadOptions(**given(arguments, WorkloadOptions))
    wishes, rates, files = wishes_of(arguments), rates_of(arguments.break_even), Files.of(arguments)
    outside = outside_of(arguments)

    from headrace.compare.advice import advice_of
    from headrace.compare.progress import progress_line
    from headrace.compare.runner import compare, find_break_even
    from headrace.compare.table import show
    from headrace.compare.workload_spec import read_workload, write_manifest
    from headrace.engine.energy import find_meters
    from headrace.pages.terminal import console

    opened = open_model(arguments)
    with closing(opened), progress_line() as progress:
        workload = read_workload(arguments.workload, opened, options)
        if "manifest" in files.one:
            write_manifest(workload, files.one["manifest"])
        meters = find_meters(cuda=opened.config.device == "cuda")
        comparison = compare(opened, workload, with_base(names), arguments.repeats, progress, wishes, outside, meters)
        advice = advice_of(comparison, arguments.model)
        if rates is not None:
            told = "not looked for, since no second method is left"
            if advice.runner_up is not None:
                pair = (advice.method, advice.runner_up)
                told = str(find_break_even(opened, workload, pair, rates, BREAK_EVEN_S, progress, outside))
            advice = advice_of(comparison, arguments.model, f"Break-even in mean latency: {told}.")
        written = write_reports(files, comparison, advice, opened, progress)
    out = console()
    show(comparison, advice, out)
    tell_written([*written, *(file.path for kind, file in files.one.items() if kind == "manifest")])
    if told := remember(comparison, arguments.model, os.environ):
        print(told, file=sys.stderr)
    return 0


def write_reports(
    files: Files, comparison: Comparison, advice: Advice, opened: OpenModel, progress: Callable[[str], None]
) -> list[str]:
    """Writes what was asked for; the paths."""
    makers: Mapping[str, Callable[[], str]] = {
        "json": lambda: as_json(comparison, advice),
        "html": lambda: as_html(comparison, advice),
        "certificate": lambda: as_certificate(comparison, advice, opened, progress),
    }
    written = []
    for kind, make in makers.items():
        if (file := files.one.get(kind)) is not None:
            file.write(make())
            written.append(file.path)
    if files.csv is not None:
        files.csv.write(comparison)
        written.append(files.csv.path)
    return written


def tell_written(paths: Sequence[str]) -> None:
    from headrace.pages.terminal import console, show_written

    out = console()
    for path in paths:
        show_written(path, out)


def flover(arguments: argparse.Namespace, names: Sequence[str]) -> int:
    """An experiment of the Flover study."""
    from headrace.compare.workload_spec import WorkloadOptions

    number = arguments.workload.partition(":")[2]
    if number not in tuple("1234567"):
        raise InvalidParameter("workload", arguments.workload, "flover:1 to flover:7")
    given_flags = {name: getattr(arguments, name) for name in ("manifest", "certificate", "break_even")}
    given_flags |= {name: value for name, value in given(arguments, WorkloadOptions).items() if name != "seed"}
    for flag, value in given_flags.items():
        if value is not None:
            raise InvalidParameter(flag, value, "to leave it out with flover:N, whose requests are the study's")
    files = Files.of(arguments)
    outside = outside_of(arguments)

    from headrace.compare.flover.experiments import run_experiment
    from headrace.compare.flover.plan import envelope, requests_of
    from headrace.compare.flover.render import csv_files, document, show
    from headrace.compare.methods.bench import Bench, share_card
    from headrace.compare.methods.registry import is_outside, make_method
    from headrace.compare.progress import progress_line
    from headrace.compare.report import flover_page
    from headrace.compare.synthetic import ordinary_ids, random_prompt
    from headrace.pages.terminal import console

    requests = requests_of(int(number))
    opened = open_model(arguments, max_num_seqs=requests)
    with closing(opened), progress_line() as progress, closing(Bench(opened)) as bench:
        ids = ordinary_ids(opened)
        seed = getattr(arguments, "seed", 0)
        prompts = [random_prompt(ids, 8, seed, index) for index in range(requests)]
        share_card(opened, envelope(int(number), prompts, opened.limits.max_model_len))
        result = run_experiment(
            int(number),
            lambda name: make_method(name, bench, outside.peers, outside.api_key),
            prompts,
            opened.limits.max_model_len,
            repeats=arguments.repeats,
            seed=seed,
            outside=[name for name in names if is_outside(name)],
            progress=progress,
        )
    show(result, console())
    written = []
    texts: Mapping[str, Callable[[], str]] = {
        "json": lambda: json.dumps(document(result), allow_nan=False) + "\n",
        "html": lambda: flover_page(result, opened),
    }
    for kind, file in files.one.items():
        file.write(texts[kind]())
        written.append(file.path)
    if files.csv is not None:
        files.csv.write_texts(csv_files(result))
        written.append(files.csv.path)
    tell_written(written)
    return 0


def live(arguments: argparse.Namespace) -> int:
    """The demonstration of one running batch."""
    files = Files.of(arguments)

    from headrace.compare.flover.live import live_files, play_demo, play_fixture
    from headrace.compare.flover.published import DEMO_LENGTHS
    from headrace.compare.methods.bench import Bench
    from headrace.compare.synthetic import ordinary_ids, random_prompt
    from headrace.pages.terminal import console

    out = console()
    if arguments.model == "picture":
        outcome = play_fixture(out)
    else:
        opened = open_model(arguments, max_num_seqs=len(DEMO_LENGTHS))
        with closing(opened), closing(Bench(opened)) as bench:
            ids = ordinary_ids(opened)
            prompts = [random_prompt(ids, 8, 0, index) for index in range(len(DEMO_LENGTHS))]
            outcome = play_demo(bench.core, prompts, opened.limits.max_model_len, out)
    if files.csv is not None:
        files.csv.write_texts(live_files(outcome))
        tell_written([files.csv.path])
    return 0


def check(arguments: argparse.Namespace) -> int:
    """Runs a certificate again: 0 if all of it holds."""
    from headrace.compare.check import check as run_check
    from headrace.compare.check import engine_settings, show
    from headrace.compare.methods.registry import make_method
    from headrace.compare.progress import progress_line
    from headrace.pages.terminal import console

    outside = outside_of(arguments)

    def opened(certificate: Certificate) -> OpenModel:
        return open_model(arguments, **engine_settings(certificate))

    with progress_line() as progress:
        result = run_check(
            arguments.check,
            opened,
            progress,
            lambda name, bench: make_method(name, bench, outside.peers, outside.api_key),
        )
    show(result, console())
    return result.status


def set_up(arguments: argparse.Namespace) -> int:
    python = peer_cache(arguments.isa).set_up(arguments.setup, arguments.model)
    print(f"{arguments.setup} is ready: {python}")
    return 0


def peer_cache(isa: str) -> PeerCache:
    """The user's cache folder for outside engines; what is made there is told on stderr."""
    from headrace.compare.peer_setup import PeerCache

    base = os.environ.get("XDG_CACHE_HOME", "")
    folder = Path(base) if Path(base).is_absolute() else Path.home() / ".cache"
    environment = {**os.environ, "PYTHONNOUSERSITE": "1"}
    return PeerCache(folder / "headrace" / "peers", environment, isa, lambda text: print(text, file=sys.stderr))


def as_json(comparison: Comparison, advice: Advice) -> str:
    from headrace.compare.document import document

    return json.dumps(document(comparison, advice), allow_nan=False) + "\n"


def as_html(comparison: Comparison, advice: Advice) -> str:
    from headrace.compare.report import page

    return page(comparison, advice)


def as_certificate(comparison: Comparison, advice: Advice, opened: OpenModel, progress: Callable[[str], None]) -> str:
    from headrace.compare.certificate import hash_weights, tokenizer_sha256
    from headrace.compare.certify import certify

    weights = hash_weights(opened.checkpoint, progress)
    found = certify(comparison, advice.method, weights, tokenizer_sha256(opened.checkpoint))
    return json.dumps(found, allow_nan=False, indent=1) + "\n"
