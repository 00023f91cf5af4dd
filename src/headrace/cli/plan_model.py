"""What a model takes and does: parameters, memory, TTFT, ITL and throughput, on a known device or a probed machine."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

from headrace.cli.plan_arguments import add_model, device_named, probed
from headrace.core.errors import ConfigError, InvalidParameter

if TYPE_CHECKING:
    from headrace.plan.calibration import Calibration
    from headrace.plan.document import Document
    from headrace.plan.model import Question
    from headrace.plan.subject import Subject

DTYPES = ("float32", "bfloat16", "float16")
KV_DTYPES = (*DTYPES, "int8", "fp8")
QUANTS = ("none", "stored", "fp8", "int8", "int4")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser, "llama-3-8b, qwen2-72b, nvlm-d-72b, yi-34b-200k")
    place = parser.add_argument_group("where")
    place.add_argument("--device", metavar="NAME", help="Of the catalogue: H100, A100-80GB, L4 …; by data sheet.")
    place.add_argument(
        "--profile",
        metavar="FILE",
        help="What `headrace plan probe` measured: the native backend on that machine. Default, without --device: the "
        "last probe of this one.",
    )
    for name, what in (
        ("tp", "Devices that share every layer (tensor parallel)."),
        ("pp", "Groups of them in a row, each with its layers (pipeline parallel)."),
        ("replicas", "Copies of the model; requests are dealt out to them."),
    ):
        place.add_argument(f"--{name}", type=int, metavar="N", default=1, help=f"{what} Default: 1.")
    held = parser.add_argument_group("precision")
    words = "Type of plain weights. Default: the model's own, else bfloat16; on a probed machine float32."
    held.add_argument("--dtype", choices=DTYPES, metavar="NAME", help=f"{words} {', '.join(DTYPES)}.")
    held.add_argument(
        "--quant",
        choices=QUANTS,
        metavar="NAME",
        help="How weights are kept: none, int8, int4; fp8 on a device; stored (as the file has them) on a probed "
        "machine. Default: none; stored on a probed machine.",
    )
    kv = f"Of the KV cache: {', '.join(KV_DTYPES)}. Default: 16 bits; float32 beside plain weights on a probed machine."
    held.add_argument("--kv-dtype", choices=KV_DTYPES, metavar="NAME", help=kv)
    work = parser.add_argument_group("work")
    for name, default, what in (
        ("prompt", 512, "Tokens of a prompt."),
        ("output", 128, "Tokens of an answer."),
        ("concurrency", 1, "Requests at the same time, over all replicas."),
    ):
        work.add_argument(f"--{name}", type=int, metavar="N", default=default, help=f"{what} Default: {default}.")
    work.add_argument(
        "--long-context",
        action="store_true",
        help="Also the four costs of a long context: prefill, users, decode, switching; with --device.",
    )


def document(arguments: argparse.Namespace) -> Document:
    """Raises ModelError, InvalidParameter, ConfigError."""
    from headrace.plan.model import Question
    from headrace.plan.subject import read_subject

    if arguments.device is not None and arguments.profile is not None:
        raise ConfigError(f"device {arguments.device} and profile {arguments.profile}: allowed: one of them")
    question = Question(
        *(arguments.prompt, arguments.output, arguments.concurrency),
        *(arguments.tp, arguments.pp, arguments.replicas),
    )
    if arguments.device is not None:
        return _on_device(arguments, question, read_subject(arguments.model))
    if arguments.long_context:
        raise InvalidParameter("long-context", "no device", "with --device NAME, which has a link to its host")
    return _on_profile(arguments, question)


def _on_device(arguments: argparse.Namespace, question: Question, subject: Subject) -> Document:
    from headrace.plan import speed
    from headrace.plan.model import document as answer
    from headrace.plan.model import with_long_context

    device = device_named(arguments.device)
    quant = arguments.quant or "none"
    if quant not in speed.QUANTS:
        raise InvalidParameter("quant", quant, f"{', '.join(speed.QUANTS)} on a device of the catalogue")
    dtype = arguments.dtype or subject.dtype or "bfloat16"
    if arguments.dtype is None and dtype == "float32":
        dtype = "bfloat16"  # as the torch backend does on a GPU
    if arguments.dtype is None and dtype not in device.flops and "float16" in device.flops:
        dtype = "float16"
    held = speed.Precision(dtype, quant, arguments.kv_dtype or dtype)
    found = answer(subject, device, held, question, _past(device.name))
    return with_long_context(found, subject, device, held, question) if arguments.long_context else found


def _on_profile(arguments: argparse.Namespace, question: Question) -> Document:
    from headrace.plan.probed import probed_document
    from headrace.plan.profile import read_profile
    from headrace.plan.speed import native_weights
    from headrace.plan.subject import read_subject

    profile = read_profile(probed(arguments.profile, "--device NAME"))
    subject = read_subject(arguments.model)
    # As core.resolve does for the native backend.
    quant = arguments.quant or ("none" if arguments.dtype else "stored")
    weights = native_weights(subject, quant, arguments.dtype or "float32")
    kv_dtype = arguments.kv_dtype or ("bfloat16" if weights.codes else arguments.dtype or "float32")
    past = _past(profile.machine.cpu, profile.machine.threads)
    return probed_document(subject, profile, weights, kv_dtype, question, past)


def _past(device: str, threads: int | None = None) -> Mapping[str, Calibration]:
    """How far predictions were off on this device or machine, as far as any were ever measured."""
    from headrace.cli.console import state_folder
    from headrace.plan.calibration import Store, default_path, machine_key
    from headrace.plan.model import MEASURED

    folder = state_folder(os.environ)
    if folder is None:
        return {}
    store = Store(default_path(folder))
    return {name: store.calibration(name, machine_key(device, threads)) for name in MEASURED}
