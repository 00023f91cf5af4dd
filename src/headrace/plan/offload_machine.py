"""The machine that a placement is made for: device, host and disk as one set of rates; published examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from headrace.core.errors import InvalidParameter
from headrace.core.flops import head_flops
from headrace.core.sizing import Matrix, weight_bytes
from headrace.core.sizing_work import layer_load, opt_load
from headrace.core.spec import ModelSpec
from headrace.plan.devices import Device
from headrace.plan.document import Basis
from headrace.plan.offload import FLEXGEN_T4, Block, Machine, Overlap, Policy, Task, plain_rates

TYPES = ("bfloat16", "float16", "float32")
"""Of arithmetic, the first that a device has units for."""
LLAMA_3_70B_BYTES = 2 * 70_553_706_496


@dataclass(frozen=True, slots=True)
class Disk:
    """Bytes, and bytes/s."""

    nbytes: float
    read: float
    write: float
    source: str
    basis: Basis


@dataclass(frozen=True, slots=True)
class Example:
    """A published run of a model that does not fit."""

    name: str
    task: Task
    block: Block
    policy: Policy
    published: float
    """Tokens/s."""
    note: str
    """What its prediction is worth."""
    source: str = "FlexGen, Table 2 (T4 16 GB, prompt 512, output 32)"
    machine: Machine = FLEXGEN_T4


EXAMPLES: Mapping[str, Example] = {
    "opt-30b": Example(
        name="opt-30b",
        task=Task(48, opt_load(7168, 4 * 7168, 56), 512, 32),
        block=Block(48, 3),
        policy=Policy((0.2, 0.8, 0.0), (0.0, 1.0, 0.0), (0.0, 1.0, 0.0)),
        published=7.32,
        note="",
    ),
    "opt-175b": Example(
        name="opt-175b",
        task=Task(96, opt_load(12_288, 4 * 12_288, 96), 512, 32),
        block=Block(32, 8),
        policy=Policy((0.0, 0.5, 0.5), (0.0, 0.0, 1.0), (0.0, 1.0, 0.0)),
        published=0.69,
        note="not reproducible with the default constants: they were fitted to no run of this model",
    ),
}
FLEXGEN_TABLE: Sequence[tuple[str, float, float, float]] = (
    ("Hugging Face Accelerate", 25.12, 0.62, 0.01),
    ("DeepSpeed ZeRO-Inference", 9.28, 0.60, 0.01),
    ("FlexGen", 25.26, 7.32, 0.69),
    ("FlexGen, 4-bit", 29.12, 8.38, 1.12),
)
"""System, tokens/s of OPT-6.7B, 30B, 175B on a T4."""
DEEPNVME: Sequence[tuple[float, float]] = ((10e9, 7), (27e9, 17), (48e9, 26))
"""Bytes/s of the disks, published tokens/s of Llama-3-70B, batch 96."""
DEEPNVME_ROWS = 96
BMINF_LAYERS, BMINF_BYTES, BMINF_GPUS, BMINF_SECONDS, BMINF_KEPT = 70, 260e9, 8, 0.075, 25 * 2**30
"""GLM-130B on 8 V100-32GB: layers, bytes in float16, GPUs, seconds to copy one layer, weights kept on each GPU."""


def task_of(spec: ModelSpec, form: str, kv_dtype: str, prompt: int, output: int) -> Task:
    """Embedding, head and a vision side stay on the device. `form`: of WEIGHT_FORMS. Raises InvalidParameter."""
    if prompt < 1:
        raise InvalidParameter("prompt", prompt, "an integer ≥ 1")
    if output < 1:
        raise InvalidParameter("output", output, "an integer ≥ 1")
    if prompt + output > spec.context:
        raise InvalidParameter("prompt", prompt, f"at most {spec.context - output}, so that {output} more tokens fit")
    load = layer_load(spec, form, "bfloat16", kv_dtype)
    layers = len(spec.layers)
    head = Matrix(spec.vocab_size, spec.hidden_size).nbytes(form)
    resident = weight_bytes(spec, form) - load.weights * layers
    return Task(layers, load, prompt, output, resident, head_flops(spec), head)


def machine_of(
    device: Device,
    host: Device | None,
    disk: Disk | None,
    share: float = 0.9,
    overlap: Overlap = "prefetch",
    link_basis: Basis | None = None,
) -> Machine:
    """`host`: what the device's link leads to; None where the device has the machine's memory itself (a CPU), or where
    nothing of the host's is to be used. `share`: of device and host memory that may be filled. `link_basis`: of the
    device's link to the host, where that is not the device's own.

    Raises InvalidParameter for a device that has no link to the host it needs.
    """
    if host is not None and not device.host_link:
        raise InvalidParameter("device", device.name, "one with a link to a host; of a CPU leave --host-memory out")
    tiers = (device.memory_bytes * share, host.memory_bytes * share if host else 0.0, disk.nbytes if disk else 0.0)
    computes = host or device
    rates = plain_rates(
        link=device.host_link or 0.0,
        read=disk.read if disk else 0.0,
        write=disk.write if disk else 0.0,
        flops=fastest(device),
        bandwidth=device.bandwidth,
        host_flops=fastest(computes),
        host_bandwidth=computes.bandwidth,
        overlap=overlap,
    )
    devices = [device] + ([host] if host else [])
    parts: dict[str, Basis] = {"compute": _weakest([one.basis for one in devices])}
    if host:
        parts["host"] = device.basis if link_basis is None else link_basis
    if disk:
        parts["disk"] = disk.basis
    names = " + ".join(one.name for one in devices) + (" + disk" if disk else "")
    sources = "; ".join([one.source for one in devices] + ([disk.source] if disk else []))
    return Machine(names, tiers, rates, _weakest(list(parts.values())), sources, parts, share)


def fastest(device: Device) -> float:
    """FLOP/s in 16 bits where it has units for them, else in float32. Raises InvalidParameter without either."""
    found = next((device.flops[name] for name in TYPES if name in device.flops), 0.0)
    if not found:
        raise InvalidParameter("device", device.name, "one with a known rate of 16-bit or float32 arithmetic")
    return found


def _weakest(bases: Sequence[Basis]) -> Basis:
    """What a number rests on that needs all of them."""
    order: tuple[Basis, ...] = ("given", "data sheet", "published", "calibrated", "measured")
    return next((basis for basis in order if basis in bases), "exact")
