"""Where weights, KV cache and hidden states go when the device is too small: time, the resource that binds, what more
memory is worth."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from headrace.cli.plan_arguments import add_model, device_named, refuse_beside
from headrace.core.errors import InvalidParameter

if TYPE_CHECKING:
    from headrace.core.spec import ModelSpec
    from headrace.plan.devices import Device
    from headrace.plan.document import Basis, Document
    from headrace.plan.offload import Block, Machine, Overlap, Policy
    from headrace.plan.offload_machine import Disk
    from headrace.plan.profile import Profile

EXAMPLES = ("opt-30b", "opt-175b")
FORMS = ("bf16", "fp8", "int4")
KV_DTYPES = ("float32", "bfloat16", "float16", "int8", "fp8")
GB = 1e9
DISK_GB = 1000.0
USUAL: Mapping[str, object] = {"share": 0.9, "prompt": 512, "output": 32, "form": "bf16", "kv_dtype": "bfloat16"}
SIZES = ("device_memory", "host_memory", "link", "disk_read", "disk_write", "disk_memory")
PLACES = ("device", "host", "profile", *SIZES, "sequences", "no_prefetch", "deepspeed", *USUAL)
"""What a published run has of its own."""
EXPERTS = "A layer is streamed with all of its experts, chosen or not; streaming the chosen ones alone is not modelled."
MOST = 2**20
"""Tokens and sequences."""
HUGE = 1e12
"""GB and GB/s."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser, "llama-2-70b", instead="")
    parser.add_argument("--preset", choices=EXAMPLES, help="Instead of MODEL: FlexGen's run of it on a T4.")
    parser.add_argument("--checks", action="store_true", help="Only the published runs, and what the formulas give.")
    where = parser.add_argument_group("where (GB = 10^9 bytes)")
    where.add_argument("--device", metavar="NAME", help="Of the catalogue: RTX-4090, T4 … Default: the probed machine.")
    where.add_argument(
        "--host", metavar="NAME", help="CPU of the catalogue that a device hangs on. Default: the probed."
    )
    where.add_argument(
        "--profile", metavar="FILE", help="What `headrace plan probe` measured. Default: the last probe."
    )
    for name, what in (
        ("device-memory", "GB of the device."),
        ("host-memory", "GB of the host."),
        ("link", "GB/s between device and host, one direction."),
        ("disk-read", "GB/s of the disk; without it, and without a probe of it, there is no disk."),
        ("disk-write", "GB/s. Default: as it is read."),
        ("disk-memory", f"GB of the disk. Default: {DISK_GB:g}."),
    ):
        where.add_argument(f"--{name}", type=float, metavar="X", help=what)
    where.add_argument(
        "--share",
        type=float,
        metavar="X",
        help=f"Of device and host memory that may be filled. Default: {USUAL['share']}.",
    )
    work = parser.add_argument_group("work")
    work.add_argument("--prompt", type=int, metavar="N", help="Tokens of a prompt. Default: 512.")
    work.add_argument("--output", type=int, metavar="N", help="Tokens of an answer. Default: 32.")
    work.add_argument("--sequences", type=int, metavar="N", help="At a time. Default: as many as are best, up to 2048.")
    work.add_argument("--form", choices=FORMS, help="How weights are kept. Default: bf16.")
    work.add_argument("--kv-dtype", choices=KV_DTYPES, help="Of the cache. Default: bfloat16.")
    work.add_argument("--no-prefetch", action="store_true", help="Transfers and compute wait for each other.")
    work.add_argument("--deepspeed", metavar="FILE", help="Write the placement as a ZeRO-Inference config to FILE.")


def document(arguments: argparse.Namespace) -> Document:
    """Raises InvalidParameter, ConfigError, ModelError, InputFileError, BackendUnavailable without scipy."""
    from headrace.plan.offload_answer import checks_document, example_document, placement_document
    from headrace.plan.offload_machine import EXAMPLES as PUBLISHED
    from headrace.plan.offload_machine import task_of
    from headrace.plan.subject import read_subject

    asked = [name for name in ("model", "preset") if getattr(arguments, name) is not None]
    asked += ["checks"] * arguments.checks
    if len(asked) != 1:
        raise InvalidParameter("model", ", ".join(asked) or None, "one of MODEL, --preset, --checks")
    if arguments.model is None:
        refuse_beside(arguments, f"--{asked[0]}", PLACES)
    for name, usual in USUAL.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, usual)
    if arguments.checks:
        return checks_document()
    if arguments.preset is not None:
        return example_document(PUBLISHED[arguments.preset])
    for name in ("prompt", "output", "sequences"):
        value = getattr(arguments, name)
        if value is not None and not 1 <= value <= MOST:
            raise InvalidParameter(name, value, f"an integer from 1 to {MOST}")
    machine = _machine(arguments)
    subject = read_subject(arguments.model)
    write = _fragment(arguments, subject.spec)
    task = task_of(subject.spec, arguments.form, arguments.kv_dtype, arguments.prompt, arguments.output)
    found = placement_document(subject.name, task, machine, arguments.sequences)
    experts = any(layer.mlp.experts is not None for layer in subject.spec.layers)
    return replace(found, notes=[*found.notes, *[EXPERTS] * experts, *write(found)])


def _machine(arguments: argparse.Namespace) -> Machine:
    from headrace.plan.offload_machine import machine_of

    if not 0 < arguments.share <= 1:
        raise InvalidParameter("share", arguments.share, "a number above 0 and at most 1")
    for name in SIZES:
        value = getattr(arguments, name)
        if value is not None and not 0 < value <= HUGE:
            raise InvalidParameter(name, value, f"a number above 0, up to {HUGE:g}")
    device = None if arguments.device is None else device_named(arguments.device)
    if device is None or device.kind != "gpu":
        for name in ("host", "host_memory", "link"):
            if (value := getattr(arguments, name)) is not None:
                raise InvalidParameter(name, value, "to leave it out, or --device NAME of a GPU")
    profile = _profile(arguments, device)
    host: Device | None = None
    link_basis: Basis | None = None
    if device is None:
        assert profile is not None
        device = replace(profile.device(), host_link=None)
    elif device.kind == "gpu":
        host = _host(arguments, profile)
        if arguments.link is not None:
            link, link_basis = arguments.link * GB, "given"
        elif host.host_link:
            link, link_basis = host.host_link, host.basis
        else:
            link = device.host_link
        device = replace(device, host_link=link)
    if arguments.device_memory is not None:
        device = replace(device, memory_bytes=round(arguments.device_memory * GB))
    overlap: Overlap = "none" if arguments.no_prefetch else "prefetch"
    return machine_of(device, host, _disk(arguments, profile), arguments.share, overlap, link_basis)


def _host(arguments: argparse.Namespace, profile: Profile | None) -> Device:
    from headrace.plan.devices import find_device

    if arguments.host is not None:
        host = find_device(arguments.host)
        if host.kind != "cpu":
            raise InvalidParameter("host", arguments.host, "a CPU of the catalogue")
    else:
        assert profile is not None
        host = profile.device()
    if arguments.host_memory is None:
        return host
    return replace(host, memory_bytes=round(arguments.host_memory * GB))


def _disk(arguments: argparse.Namespace, profile: Profile | None) -> Disk | None:
    """Given, or as the probe read it."""
    from headrace.plan.offload_machine import Disk

    room = (arguments.disk_memory or DISK_GB) * GB
    if arguments.disk_read is not None:
        read = arguments.disk_read * GB
        return Disk(room, read, (arguments.disk_write or arguments.disk_read) * GB, "disk as given", "given")
    measured = None if profile is None else profile.find("disk")
    if profile is None or measured is None or measured.value is None:
        if arguments.disk_write is not None or arguments.disk_memory is not None:
            raise InvalidParameter("disk_read", None, "GB/s of the disk, beside --disk-write and --disk-memory")
        return None
    write = arguments.disk_write * GB if arguments.disk_write else measured.value
    source = f"disk: {profile.device().source}" + (f", {measured.note}" if measured.note else "")
    return Disk(room, measured.value, write, source, "measured")


def _profile(arguments: argparse.Namespace, device: Device | None) -> Profile | None:
    """As given, or the last one where it is needed: for the machine alone, or as the host of a GPU. Raises ConfigError
    where there is none."""
    from headrace.cli.plan_arguments import probed
    from headrace.plan.profile import read_profile

    needs_host = device is None or (device.kind == "gpu" and arguments.host is None)
    if arguments.profile is None and not needs_host:
        return None
    return read_profile(probed(arguments.profile, "--device NAME and --host NAME"))


def _fragment(arguments: argparse.Namespace, spec: ModelSpec) -> Callable[[Document], list[str]]:
    """Refuses what cannot be written before the work; what it returns writes it, and says so."""
    if arguments.deepspeed is None:
        return lambda _: []
    from headrace.core.flops import alike
    from headrace.core.sizing import end_weights, layer_weights, parameters
    from headrace.pages.files import ReportFile
    from headrace.plan.fragments import PRECISIONS, deepspeed_inference, inference_notes, json_text

    device = None if arguments.device is None else device_named(arguments.device)
    if device is None or device.kind != "gpu":
        raise InvalidParameter("deepspeed", arguments.deepspeed, "beside --device NAME of a GPU")
    if arguments.form != "bf16":
        raise InvalidParameter("form", arguments.form, "bf16 with --deepspeed: its config streams 16-bit weights")
    dtype = next(name for name in PRECISIONS if name in device.flops)
    file = ReportFile("deepspeed", arguments.deepspeed)
    layers = [matrix for layer, _ in alike(spec.layers) for matrix in layer_weights(layer, spec.hidden_size)]
    largest = max(one.rows * one.cols for one in (*end_weights(spec), *layers))

    def write(found: Document) -> list[str]:
        block: Block = found.data["block"]  # type: ignore[assignment]
        policy: Policy = found.data["policy"]  # type: ignore[assignment]
        file.write(json_text(deepspeed_inference(block, policy, parameters(spec), largest, dtype)))
        return [*inference_notes(policy), f"Written: {file.path}"]

    return write
