"""What this machine has, which backend will be used and why; with MODEL: what the model is, and whether it fits."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from textwrap import wrap
from typing import TYPE_CHECKING, Any, NamedTuple

from headrace import __version__
from headrace.cli.console import Style, columns, load_line_shown, printable, wants_colour
from headrace.core.config import EngineConfig, ResolvedConfig
from headrace.core.errors import BackendUnavailable, HeadraceError, shorten

if TYPE_CHECKING:
    from headrace.engine.model import OpenModel
    from headrace.weights.checkpoint import Checkpoint

KEYS: Mapping[str, str] = {
    "headrace": "version",
    "python": "version",
    "system": "kind and machine",
    "usable": "whether a backend can run",
    "cpu": "model, cores_present, cores_usable, quota_cores, instructions, numa_nodes, governor, load_1min",
    "memory": "total_bytes, available_bytes, limit_bytes (of the control group), swap_total_bytes, swap_free_bytes",
    "gpus": "list of name, memory_total_bytes, memory_free_bytes, driver, compute_capability",
    "gpu_note": "why there are none, or null",
    "packages": "name -> version, or null",
    "compiler": "path of the C++ compiler that would build the native kernels, or null",
    "backends": "list of name, available, why (it is not), found (by its own probe)",
    "auto": "null where nothing runs, else backend (the one that --backend auto takes), reason",
    "environment": "variables that matter -> value, null where unset; secrets only as set",
    "demo_model": "installed, path, bytes, hint",
    "hub_cache": "path, present, models, bytes, counted_whole, disk_free_bytes",
    "model": "null without MODEL; else error (code, message), or name, architecture, format, layers, hidden_size, "
    "heads, kv_heads, vocab_size, context, parameters, weight_bytes, kv_bytes_per_token, tokenizer, chat_template, "
    "notes, settings (name -> value, reason), loaded_weight_bytes, kv_cache_bytes, needed_bytes, free_bytes, fits",
    "warnings": "list of sentences",
}
"""The keys of --json."""
SHOWN = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "CUDA_VISIBLE_DEVICES",
    "HF_HOME",
    "HF_HUB_CACHE",
    "HF_HUB_OFFLINE",
    "XDG_STATE_HOME",
)
SECRET = ("HF_TOKEN", "HF_ENDPOINT")
"""Told as set or unset: an address may hold a password."""
LABEL = 13
LOW_MEMORY, LOW_DISK = 2**30, 5 * 2**30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        metavar="MODEL",
        nargs="?",
        help="As for the other commands. Its headers are read; a Hub id is fetched.",
    )
    parser.add_argument("--json", action="store_true", help="One JSON object on stdout, and nothing else.")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    keys = "\n".join(
        "\n".join(wrap(text, 78, initial_indent=f"  {name:13}", subsequent_indent=" " * 15))
        for name, text in KEYS.items()
    )
    parser.epilog = (
        "Exit status: 0 if a backend can run (and MODEL opens and fits), else 1.\n\n"
        f"keys of --json (an unknown value is null):\n{keys}"
    )


def run(arguments: argparse.Namespace) -> int:
    found = examine(arguments.model, os.environ)
    if arguments.json:
        print(json.dumps(found, allow_nan=False))
    else:
        width = min(columns(sys.stdout), 110)
        print(render(found, Style(wants_colour(sys.stdout, os.environ)), width))
    model = found["model"]
    return 0 if found["usable"] and (model is None or model.get("fits")) else 1


def examine(model: str | None, environ: Mapping[str, str]) -> dict[str, Any]:
    """An object with `KEYS`. Raises nothing: a probe that fails says so in its place."""
    import platform

    from headrace.cli import probes
    from headrace.engine.hardware import NEEDS

    gpus, gpu_note = probes.gpus()
    backends = []
    for name in NEEDS:
        with checking(name, environ):
            backends.append(examine_backend(name))
    found: dict[str, Any] = {
        "headrace": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "usable": any(one["available"] for one in backends),
        "cpu": probes.cpu(),
        "memory": probes.memory(),
        "gpus": gpus,
        "gpu_note": gpu_note,
        "packages": probes.packages(),
        "compiler": probes.compiler(environ),
        "backends": backends,
        "auto": chosen_backend(),
        "environment": {name: environ.get(name) for name in SHOWN}
        | {name: "set" if environ.get(name) else None for name in SECRET},
        "demo_model": examine_demo(),
        "hub_cache": probes.hub_cache(environ),
        "model": None if model is None else examine_model(model),
    }
    return found | {"warnings": warnings_of(found)}


@contextmanager
def checking(what: str, environ: Mapping[str, str]) -> Iterator[None]:
    """Says on a terminal what takes its seconds."""
    shown = load_line_shown(environ)
    if shown:
        print(f"checking {what} …", end="", file=sys.stderr, flush=True)
    try:
        yield
    finally:
        if shown:
            print("\r\x1b[2K", end="", file=sys.stderr, flush=True)


def chosen_backend() -> dict[str, Any] | None:
    from headrace.core.resolve import choose_backend
    from headrace.engine.hardware import probe_hardware

    try:
        backend, reason = choose_backend(EngineConfig(""), probe_hardware())
    except BackendUnavailable:
        return None
    return {"backend": backend, "reason": reason}


def examine_backend(name: str) -> dict[str, Any]:
    """Loads the backend's libraries, but no model."""
    from headrace.engine.model import create_backend

    try:
        backend = create_backend(name)
        try:
            return {"name": name, "available": True, "why": None, "found": dict(backend.probe())}
        finally:
            backend.close()
    except HeadraceError as error:
        why = str(error)
    except (ImportError, OSError, RuntimeError, AttributeError) as error:  # an installation that is broken
        why = f"its library cannot be loaded: {shorten(' '.join(str(error).split()), 200)}"
    return {"name": name, "available": False, "why": why, "found": {}}


def examine_demo() -> dict[str, Any]:
    from headrace.core.errors import ModelNotFound
    from headrace.weights.checkpoint import DEMO, locate

    try:
        path = locate(DEMO)
        return {"installed": True, "path": str(path), "bytes": path.stat().st_size, "hint": None}
    except ModelNotFound as error:
        hint = str(error)
    except (OSError, ValueError) as error:
        hint = f"it cannot be read: {error}"
    return {"installed": False, "path": None, "bytes": None, "hint": hint}


def examine_model(model: str) -> dict[str, Any]:
    """Headers, description and settings of a model; no weights are read."""
    from headrace.engine.model import OpenModel

    try:
        opened = OpenModel(EngineConfig(model))
        with closing(opened):
            return describe_model(opened)
    except HeadraceError as error:
        return {"error": {"code": error.code, "message": str(error)}}
    except OSError as error:
        return {"error": {"code": "os_error", "message": f"{error.filename or model}: {error.strerror or error}"}}


def describe_model(opened: OpenModel) -> dict[str, Any]:
    from math import prod

    from headrace.core.sizing import kv_bytes_per_token
    from headrace.engine.hardware import probe_hardware

    spec, config, checkpoint = opened.spec, opened.config, opened.checkpoint
    attention = spec.layers[0].attention
    parameters = sum(prod(shape) for shape in checkpoint.shapes().values())
    kv_token = kv_bytes_per_token(spec, config.kv_dtype)
    loaded = loaded_bytes(checkpoint, config)
    cache = config.num_blocks * config.block_size * kv_token
    needed = loaded + cache
    free = probe_hardware().free_memory_bytes
    names = [name for name in config.__dataclass_fields__ if name != "reasons"]
    return {
        "error": None,
        "name": checkpoint.origin,
        "architecture": spec.name,
        "format": checkpoint.format,
        "layers": len(spec.layers),
        "hidden_size": spec.hidden_size,
        "heads": attention.heads,
        "kv_heads": attention.kv_heads,
        "vocab_size": spec.vocab_size,
        "context": spec.context,
        "parameters": parameters,
        "weight_bytes": checkpoint.nbytes,
        "kv_bytes_per_token": kv_token,
        "tokenizer": opened.has_text,
        "chat_template": opened.has_text and opened.tokenizer.chat_template is not None,
        "notes": list(checkpoint.notes),
        "settings": {
            name: {"value": getattr(config, name), "reason": config.reasons.get(name, "the default")} for name in names
        },
        "loaded_weight_bytes": loaded,
        "kv_cache_bytes": cache,
        "needed_bytes": needed,
        "free_bytes": free,
        "fits": needed <= free,
    }


def loaded_bytes(checkpoint: Checkpoint, config: ResolvedConfig) -> int:
    """Of the weights in memory, from the headers. Weights as stored: exact for GGUF and plain numbers."""
    from collections import Counter
    from math import prod

    from headrace.core.sizing import DTYPE_BYTES, stored_bytes

    numbers = {name: prod(shape) for name, shape in checkpoint.shapes().items()}
    if config.quant == "none":
        return sum(numbers.values()) * DTYPE_BYTES[config.dtype]
    if checkpoint.format != "gguf":
        return checkpoint.nbytes
    counts: Counter[str] = Counter()
    for name, count in numbers.items():
        counts[checkpoint.tensor(name).scheme] += count
    return stored_bytes(counts)


def warnings_of(found: Mapping[str, Any]) -> list[str]:
    """What makes headrace slower, or stops it, and can be changed."""
    from headrace.core.resolve import INSTALL

    cpu, memory, said = found["cpu"], found["memory"], []
    usable, quota, load = cpu["cores_usable"], cpu["quota_cores"], cpu["load_1min"]
    if not found["usable"]:
        said.append(f"No backend can run. For the native kernels, {INSTALL['native']}; for torch, {INSTALL['torch']}.")
    elif any(one["name"] == "native" and not one["available"] for one in found["backends"]):
        said.append(f"Without its native kernels headrace is several times slower: {INSTALL['native']}.")
    if quota is not None and quota < usable:
        advised = max(1, int(quota))
        said.append(
            f"The control group allows {quota:g} CPUs' worth of time for {usable} cores, and more threads than that "
            f"wait for each other: the default is --threads {advised}."
        )
    if load is not None and load > usable:
        said.append(f"Other programs keep the cores busy (load {load:g} for {usable}): times will vary.")
    if cpu["governor"] == "powersave":
        said.append("The CPU's frequency governor is powersave: performance is steadier and often faster.")
    if cpu["instructions"].get("avx2") is False:
        said.append("This CPU has no AVX2: expect a fraction of the usual speed.")
    if memory["available_bytes"] is not None and memory["available_bytes"] < LOW_MEMORY:
        said.append(f"Only {size(memory['available_bytes'])} of memory are available.")
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        value = found["environment"][name]
        if value and not (value.isascii() and value.isdecimal() and int(value[:9]) > 0):
            said.append(f"{name} is {printable(shorten(value))}, which is no number of threads; --threads counts.")
    if found["gpus"] and not any(one["found"].get("device", "cpu") != "cpu" for one in found["backends"]):
        said.append("There is a GPU, but no backend of this installation uses it: everything runs on the CPU.")
    room = found["hub_cache"]["disk_free_bytes"]
    if room is not None and room < LOW_DISK:
        said.append(f"Only {size(room)} are free on the disk where Hub models are kept.")
    model = found["model"]
    if model is not None and model["error"] is None and not model["fits"]:
        said.append(
            f"The model does not fit: it needs about {size(model['needed_bytes'])}, and {size(model['free_bytes'])} "
            "are free. A smaller --max-model-len or --kv-cache-mib needs less."
        )
    return said


# ---------------------------------------------------------------- for people


class Row(NamedTuple):
    label: str
    text: str
    good: bool | None = None
    """Colours what stands before the first colon."""


def render(found: Mapping[str, Any], style: Style, width: int) -> str:
    """The whole report, wrapped to `width` columns."""
    packages = [f"{name} {version}" for name, version in found["packages"].items() if version]
    missing = [name for name, version in found["packages"].items() if not version]
    software = [
        Row("headrace", f"{found['headrace']}, Python {found['python']}"),
        Row("packages", ", ".join(packages)),
        Row("not installed", ", ".join(missing) or "–"),
        Row("environment", environment_text(found["environment"])),
    ]
    sections = [
        ("Machine", machine_rows(found)),
        ("Software", software),
        ("Backends", backend_rows(found)),
        ("Models", storage_rows(found)),
    ]
    if found["model"] is not None:
        sections.append((f"Model {found['model'].get('name', '')}".rstrip(), model_rows(found["model"])))
        sections.append(("Settings chosen for it", settings_rows(found["model"])))
    blocks = [section_text(printable(title), rows, width, style) for title, rows in sections if rows]
    if found["warnings"]:
        lines = [line for text in found["warnings"] for line in hanging(text, width, "  ! ", "    ")]
        blocks.append("\n".join((style.bold("Worth a look"), *(style.warn(line) for line in lines))))
    return "\n\n".join(blocks)


def machine_rows(found: Mapping[str, Any]) -> list[Row]:
    cpu, memory = found["cpu"], found["memory"]
    cores = f"{cpu['cores_usable']} usable of {cpu['cores_present']}"
    if cpu["quota_cores"] is not None:
        cores += f", control group allows {cpu['quota_cores']:g} CPUs' worth of time"
    if (cpu["numa_nodes"] or 1) > 1:
        cores += f", {cpu['numa_nodes']} NUMA nodes"
    has = [name for name, there in cpu["instructions"].items() if there]
    lacks = [name for name, there in cpu["instructions"].items() if not there]
    sets = (", ".join(has) or "none that matter") + (f" (not: {', '.join(lacks)})" if lacks else "")
    rooms = f"{size(memory['available_bytes'])} available of {size(memory['total_bytes'])}"
    if memory["limit_bytes"] is not None:
        rooms += f", control group limit {size(memory['limit_bytes'])}"
    swap = memory["swap_total_bytes"]
    rooms += f", swap {size(memory['swap_free_bytes'])} free of {size(swap)}" if swap else ", no swap"
    rows = [
        Row("system", found["system"]),
        Row("CPU", cpu["model"] or "unknown"),
        Row("cores", cores),
        Row("instructions", sets if cpu["instructions"] else "unknown"),
        Row("memory", rooms),
        Row("load", "unknown" if cpu["load_1min"] is None else f"{cpu['load_1min']:g} in the last minute"),
    ]
    if cpu["governor"]:
        rows.append(Row("governor", cpu["governor"]))
    for card in found["gpus"]:
        text = f"{card['name']}, {size(card['memory_free_bytes'])} free of {size(card['memory_total_bytes'])}"
        rows.append(Row("GPU", f"{text}, driver {card['driver']}, compute capability {card['compute_capability']}"))
    if found["gpu_note"]:
        rows.append(Row("GPU", found["gpu_note"]))
    return rows


def environment_text(environment: Mapping[str, str | None]) -> str:
    parts = [f"{name}={shorten(value, 60)[1:-1]}" for name, value in environment.items() if value]
    return ", ".join(parts) or "nothing that matters is set"


def backend_rows(found: Mapping[str, Any]) -> list[Row]:
    rows = [backend_row(one) for one in found["backends"]]
    if any(one["name"] == "native" and not one["available"] for one in found["backends"]):
        rows.append(Row("compiler", found["compiler"] or "no C++ compiler is on the PATH"))
    chosen = found["auto"]
    return [*rows, Row("auto", "none of them" if chosen is None else f"{chosen['backend']}: {chosen['reason']}")]


def backend_row(backend: Mapping[str, Any]) -> Row:
    if not backend["available"]:
        return Row(backend["name"], f"no: {backend['why']}", good=False)
    # The library's own number of threads is not the one that headrace will set.
    found = {name: value for name, value in backend["found"].items() if name != "threads"}
    text = ", ".join(f"{name} {spelled(found[name])}" for name in found)
    if "built" in found:
        usable = found["available"]
        text = f"{found['instructions']} kernels, the fastest that this CPU runs of {', '.join(found['built'])}"
        if lacking := [name for name in found["built"] if name not in usable]:
            text += f" (it lacks what {', '.join(lacking)} needs)"
    return Row(backend["name"], f"yes: {text}", good=True)


def storage_rows(found: Mapping[str, Any]) -> list[Row]:
    demo, cache = found["demo_model"], found["hub_cache"]
    text = f"empty ({cache['path']})"
    if cache["present"]:
        models = f"{cache['models']} model" + ("" if cache["models"] == 1 else "s")
        text = f"{models}, {'' if cache['counted_whole'] else 'at least '}{size(cache['bytes'])}, in {cache['path']}"
    return [
        Row("demo", f"installed, {size(demo['bytes'])}" if demo["installed"] else demo["hint"]),
        Row("Hub cache", text),
        Row("disk there", f"{size(cache['disk_free_bytes'])} free"),
    ]


def model_rows(model: Mapping[str, Any]) -> list[Row]:
    if model["error"] is not None:
        return [Row("error", model["error"]["message"], good=False)]
    bits = 8 * model["weight_bytes"] / max(1, model["parameters"])
    chat = "with a chat template" if model["chat_template"] else "no chat template"
    shape = f"{model['layers']} layers of {model['hidden_size']}, {model['heads']} heads, {model['kv_heads']} of KV"
    parts = f"{size(model['loaded_weight_bytes'])} of weights, up to {size(model['kv_cache_bytes'])} of KV cache"
    needs = f"{parts}, {size(model['free_bytes'])} free"
    return [
        Row("architecture", f"{model['architecture']} ({model['format']}): {shape}"),
        Row("context", f"{model['context']} tokens, vocabulary of {model['vocab_size']}"),
        Row("tokenizer", f"yes, {chat}" if model["tokenizer"] else "none: token ids in and out"),
        Row("weights", f"{model['parameters'] / 1e6:,.1f} M in {size(model['weight_bytes'])}, {bits:.1f} bits each"),
        Row("KV cache", f"{model['kv_bytes_per_token'] / 1024:.1f} KiB a token"),
        Row("fits", f"{spelled(model['fits'])}: {needs}", good=model["fits"]),
        *(Row("note", note) for note in model["notes"]),
    ]


def settings_rows(model: Mapping[str, Any]) -> list[Row]:
    rows = []
    for name, setting in model.get("settings", {}).items():
        value, reason = spelled(setting["value"]), setting["reason"]
        rows.append(Row(name, reason if reason.startswith(f"{value}:") else f"{value}: {reason}"))
    return rows


def section_text(title: str, rows: Sequence[Row], width: int, style: Style) -> str:
    indent = 4 + max(LABEL, *(len(row.label) for row in rows))
    return "\n".join((style.bold(title), *(laid_out(row, indent, width, style) for row in rows)))


def laid_out(row: Row, indent: int, width: int, style: Style) -> str:
    """Label, then the text, wrapped below itself. Colours come last, so that they take no room."""
    lines = hanging(printable(row.text), width, f"  {row.label}".ljust(indent), " " * indent)
    if row.good is not None:
        word, colon, rest = lines[0][indent:].partition(":")
        lines[0] = lines[0][:indent] + (style.good if row.good else style.bad)(word) + colon + rest
    return "\n".join(lines)


def hanging(text: str, width: int, first: str, later: str) -> list[str]:
    """Wrapped lines; a path is longer than a line rather than broken."""
    lines = wrap(text, max(width - len(later), 40), break_on_hyphens=False, break_long_words=False)
    return [(later if number else first) + line for number, line in enumerate(lines or [""])]


def size(num_bytes: int | None) -> str:
    """In binary units, for people."""
    if num_bytes is None:
        return "unknown"
    for power, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if num_bytes >= 1 << power:
            return f"{num_bytes / (1 << power):.{1 if power == 30 else 0}f} {unit}"
    return f"{num_bytes} bytes"


def spelled(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)
