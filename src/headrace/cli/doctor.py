"""What this machine has, which backend will be used and why; with MODEL: what the model is, and whether it fits."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import asdict
from textwrap import wrap
from typing import TYPE_CHECKING, Any

from headrace import __version__
from headrace.cli.console import Style, columns, load_line_shown, printable, wants_colour
from headrace.cli.doctor_report import render, size
from headrace.core.config import EngineConfig, Hardware, ResolvedConfig
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
    "gpus": "list of name, memory_total_bytes, memory_free_bytes, driver, compute_capability, multiprocessors",
    "gpu_note": "why there are none, or why torch does not use them, or null",
    "card": "null where torch uses no GPU; else error (why it was not measured, or null), name, capability, "
    "memory_bytes, multiprocessors, copy_GBps (bytes read and written), read_GBps, matmul_TFLOPs (type -> rate), "
    "kernels (list of op, chosen, reason)",
    "packages": "name -> version, or null",
    "compiler": "path of the C++ compiler that would build the native kernels, or null",
    "backends": "list of name, available, why (it is not), found (by its own probe)",
    "auto": "null where nothing runs, else backend (the one that --backend auto takes), device, reason",
    "environment": "variables that matter -> value, null where unset; secrets only as set",
    "demo_model": "installed, path, bytes, hint",
    "hub_cache": "path, present, models, bytes, counted_whole, disk_free_bytes",
    "model": "null without MODEL; else error (code, message), or name, architecture, format, layers, hidden_size, "
    "heads, kv_heads, vocab_size, context, parameters, weight_bytes, kv_bytes_per_token, tokenizer, chat_template, "
    "notes, settings (name -> value, reason), loaded_weight_bytes, kv_cache_bytes, "
    "card_bytes (null on a CPU; else weights, step, images, graphs), needed_bytes, free_bytes, fits",
    "warnings": "list of sentences",
}
"""The keys of --json."""
SHOWN = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "CUDA_VISIBLE_DEVICES",
    "CUDA_DEVICE_ORDER",
    "HF_HOME",
    "HF_HUB_CACHE",
    "HF_HUB_OFFLINE",
    "XDG_STATE_HOME",
)
SECRET = ("HF_TOKEN", "HF_ENDPOINT")
"""Told as set or unset: an address may hold a password."""
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
    from headrace.engine.hardware import NEEDS, probe_hardware

    hardware = probe_hardware()
    gpus, gpu_note = probes.gpus(environ.get("CUDA_VISIBLE_DEVICES"))
    device = "cpu" if hardware.gpu is None else "cuda"
    # Before torch takes some of the GPU's memory.
    described = None if model is None else examine_model(model)
    backends = []
    for name in NEEDS:
        with checking(name, environ):
            backends.append(examine_backend(name, device))
    card = None
    if hardware.gpu is not None:
        with checking("the GPU", environ):
            card = examine_card()
    found: dict[str, Any] = {
        "headrace": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "usable": any(one["available"] for one in backends),
        "cpu": probes.cpu(),
        "memory": probes.memory(),
        "gpus": gpus,
        "gpu_note": gpu_note or (hardware.no_gpu if hardware.gpu is None else None),
        "card": card,
        "packages": probes.packages(),
        "compiler": probes.compiler(environ),
        "backends": backends,
        "auto": chosen_backend(hardware),
        "environment": {name: environ.get(name) for name in SHOWN}
        | {name: "set" if environ.get(name) else None for name in SECRET},
        "demo_model": examine_demo(),
        "hub_cache": probes.hub_cache(environ),
        "model": described,
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


def chosen_backend(hardware: Hardware) -> dict[str, Any] | None:
    from headrace.core.resolve import choose_backend, choose_device

    try:
        backend, reason = choose_backend(EngineConfig(""), hardware)
        device, _ = choose_device(EngineConfig("", backend=backend), hardware)
    except BackendUnavailable:
        return None
    return {"backend": backend, "device": device, "reason": reason}


def examine_card() -> dict[str, Any]:
    """What the GPU does in fact; it takes some seconds."""
    try:
        from headrace.backends.torch.gpu.device import card_report

        return {"error": None} | card_report()
    except (ImportError, OSError, RuntimeError, AssertionError) as error:  # of torch, of a driver that does not fit it
        return {"error": shorten(" ".join(str(error).split()), 200)[1:-1]}


def examine_backend(name: str, device: str = "cpu") -> dict[str, Any]:
    """Loads the backend's libraries, but no model."""
    from headrace.engine.model import create_backend

    try:
        backend = create_backend(name, "auto", device)
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

    from headrace.core.resolve_cuda import card_use
    from headrace.core.sizing import card_budget, kv_bytes_per_token
    from headrace.engine.hardware import probe_hardware

    spec, config, checkpoint = opened.spec, opened.config, opened.checkpoint
    attention = spec.layers[0].attention
    parameters = sum(prod(shape) for shape in checkpoint.shapes().values())
    kv_token = kv_bytes_per_token(spec, config.kv_dtype)
    loaded = loaded_bytes(checkpoint, config)
    cache = config.num_blocks * config.block_size * kv_token
    hardware = probe_hardware()
    needed, free, card = loaded + cache, hardware.free_memory_bytes, None
    if config.device == "cuda" and hardware.gpu is not None:
        budget = card_budget(spec, card_use(config), opened.stored, hardware.gpu.multiprocessors)
        loaded, needed, free, card = budget.weights, budget.total + cache, hardware.gpu.free_bytes, asdict(budget)
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
        "card_bytes": card,
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
        why = found["gpu_note"] or "the torch backend cannot run there"
        said.append(f"There is a GPU, but everything runs on the CPU: {why}.")
    names = {card["name"] for card in found["gpus"]}
    if len(names) > 1 and found["environment"]["CUDA_DEVICE_ORDER"] != "PCI_BUS_ID":
        said.append("The GPUs differ: with CUDA_DEVICE_ORDER=PCI_BUS_ID the first one listed here is the one used.")
    if found["card"] is not None and found["card"]["error"] is not None:
        said.append(f"The GPU could not be measured: {printable(found['card']['error'])}.")
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
