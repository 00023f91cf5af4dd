"""What `plan training` answers: memory of the fullest GPU, time of a step, and other stages and layouts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace

from headrace.core.errors import InvalidParameter
from headrace.core.sizing import parameters
from headrace.core.sizing_work import (
    STATE_BYTES,
    Kept,
    deepspeed_estimate,
    infinity_efficiency,
    infinity_intensity,
    training_flops,
)
from headrace.core.spec import ModelSpec
from headrace.plan.document import Basis, Column, Document, Plot, Quantity, Series, Table
from headrace.plan.training import (
    RECOMPUTE,
    ZERO,
    Candidate,
    Cluster,
    Costs,
    GpuMemory,
    Layout,
    StepTime,
    bubble,
    candidates,
    check,
    costs,
    gpu_memory,
    step_time,
)

GB = 10**9
SECONDS_PER_DAY = 86_400
LISTED = 12
"""Layouts of a search that are shown."""
ZERO_PAPER = "ZeRO, §5"
MEGATRON = "Reducing Activation Recomputation in Large Transformer Models, §4"
STATES = "2Ψ + 2Ψ + 12Ψ of the GPU's share of the model; what the stage shards /N"
ACTIVATIONS = "micro-batches in flight · layers of the stage · sbh(10 + 24/t + 5as/(ht)), by tensor"


def training_document(
    spec: ModelSpec, layout: Layout, cluster: Cluster, source: str, tokens: float | None = None
) -> Document:
    """`tokens`: of the whole run. Raises InvalidParameter."""
    check(spec, layout)
    known = costs(spec, layout)
    held, time = gpu_memory(spec, layout, known), step_time(spec, layout, cluster, known)
    quantities = [
        Quantity("parameters", parameters(spec), "", "sum over the weights", source),
        *memory_quantities(spec, layout, cluster, held),
        *time_quantities(spec, layout, cluster, time),
    ]
    if layout.offload != "none":
        quantities += offload_quantities(spec, layout, cluster, known)
    if tokens is not None:
        quantities += run_quantities(spec, layout, cluster, time, tokens)
    verdict = "fits" if held.total <= cluster.room else "does not fit"
    name = cluster.device.name
    notes = [
        f"It {verdict}: {held.total / GB:.1f} GB on the fullest GPU, where {cluster.room / GB:.1f} GB of each {name} "
        "may be filled: a tenth is left to the framework's buffers and to fragmentation.",
        f"Compute is taken at {100 * cluster.efficiency:.2f} % of the peak; it was "
        "38.38, 36.14 and 31.96 % for 22B, 175B and 1T on Frontier (published).",
    ]
    return Document(
        title=f"Training {spec.name} on {layout.gpus} × {name}: {describe(layout)}",
        quantities=quantities,
        tables=[stage_table(spec, layout, cluster, known), recompute_table(spec, layout, cluster)],
        plots=[memory_plot(spec, layout, cluster, known)],
        notes=notes,
        data={"layout": layout, "memory": held, "time": time},
    )


def search_document(spec: ModelSpec, base: Layout, cluster: Cluster, global_batch: int, source: str) -> Document:
    """Every layout that fits, fastest first. Raises InvalidParameter where none does."""
    found = sorted(candidates(spec, cluster, base, global_batch), key=lambda one: (-one.tokens_per_s, one.memory.total))
    name = cluster.device.name
    if not found:
        raise InvalidParameter(
            "gpus",
            base.gpus,
            f"more {name}, or another device: no TP, PP and ZeRO stage fits {spec.name} in its memory",
        )
    tightest = min(found, key=lambda one: one.memory.total)
    return Document(
        title=f"Layouts for {spec.name} on {base.gpus} × {name}, {global_batch} sequences of {base.sequence} a step",
        quantities=[
            Quantity("parameters", parameters(spec), "", "sum over the weights", source),
            Quantity("layouts that fit", len(found)),
            Quantity("fastest", describe(found[0].layout), note=_options(found[0].layout)),
            Quantity("smallest", describe(tightest.layout), note=_options(tightest.layout)),
        ],
        tables=[layout_table(found[:LISTED], cluster)],
        notes=[f"The {min(LISTED, len(found))} fastest of {len(found)}; TP stays within a node of {cluster.per_node}."],
        data={"layouts": [asdict(one) for one in found[:LISTED]]},
    )


def describe(layout: Layout) -> str:
    return f"TP {layout.tp}, PP {layout.pp}, DP {layout.dp}, ZeRO-{layout.zero}, recomputation {layout.recompute}"


def _options(layout: Layout) -> str:
    return (
        f"--tp {layout.tp} --pp {layout.pp} --zero {layout.zero} --recompute {layout.recompute} "
        f"--micro-batch {layout.micro_batch} --global-batch {layout.global_batch}"
    )


# ---------------------------------------------------------------- parts


def memory_quantities(spec: ModelSpec, layout: Layout, cluster: Cluster, held: GpuMemory) -> list[Quantity]:
    """Of the fullest GPU."""
    found = [
        Quantity(
            f"{name} on a GPU", size, "B", STATES, ZERO_PAPER, note=f"pipeline stage {held.stage + 1} of {layout.pp}"
        )
        for name, size in held.states.items()
    ]
    found += [
        Quantity("activations on a GPU", held.activations, "B", ACTIVATIONS, MEGATRON),
        Quantity(
            *("working memory of a GPU", held.working, "B"),
            "a layer's activations (full recomputation); 4 bytes · largest layer (ZeRO-3)",
            "DeepSpeed, memory estimators",
        ),
        Quantity("memory of a GPU in all", held.total, "B", "states + activations + working memory", ZERO_PAPER),
        Quantity(
            *("left of a GPU's memory", cluster.device.memory_bytes - held.total, "B", "memory − all"),
            *(cluster.device.source, _basis(cluster)),
        ),
    ]
    if held.host:
        found.append(
            Quantity("on the host for each GPU", held.host, "B", STATES, "ZeRO-Offload, §4; ZeRO-Infinity, §5")
        )
    if layout.zero >= 2 and layout.tp == layout.pp == 1:
        largest = costs(spec, layout).largest
        away = layout.offload == "all"
        device, host = deepspeed_estimate(parameters(spec), largest, layout.gpus, layout.zero == 3, away)
        formula = (
            "2P + 18P/N (stage 2); 4 · largest layer + 18P/N (stage 3), without 18P/N where parameters are offloaded"
        )
        note = f"{host / GB:.1f} GB on the host (18P · 1.5)" if host else "without activations"
        found.append(
            Quantity("DeepSpeed's own estimate", device, "B", formula, "DeepSpeed, memory estimators", note=note)
        )
    return found


def time_quantities(spec: ModelSpec, layout: Layout, cluster: Cluster, time: StepTime) -> list[Quantity]:
    basis, source = _basis(cluster), cluster.device.source
    useful = training_flops(spec, layout.sequence) * layout.tokens / layout.gpus
    links = f"{source}; {cluster.network / GB:g} GB/s between nodes for each GPU"
    return [
        Quantity(
            *("step", time.expected, "s", "compute + bubble + TP + PP + what ZeRO and host take longer than compute"),
            *(source, basis, time.low, time.high),
            "low: everything overlaps; high: nothing does",
        ),
        Quantity("throughput", layout.tokens / time.expected, "tokens/s", "tokens of a step / step", source, basis),
        Quantity("tokens of a step", layout.tokens, "", "micro-batch · micro-batches · DP · sequence"),
        Quantity("compute of a step", time.compute, "s", "FLOPs / (GPUs · peak · efficiency)", source, basis),
        Quantity("pipeline bubble", 100 * bubble(layout), "% of compute", "(p − 1)/(m·v)", "Megatron-LM, §2.2"),
        Quantity("tensor parallelism", time.tensor_parallel, "s", "4 (6) all-reduces of 2sbh a layer", links, basis),
        Quantity("pipeline transfers", time.pipeline, "s", "2 · 2sbh for each micro-batch", links, basis),
        Quantity("ZeRO's collectives", time.zero, "s", "2P elements, stage 3: 3P, · (N − 1)/N", links, basis),
        Quantity("host transfers", time.offload, "s", "4Ψ, with parameters 4Ψ(1 + m)", "ZeRO-Offload, §4", basis),
        Quantity(
            *("of the peak, in the model's own FLOPs", 100 * useful / (cluster.peak * time.expected), "%"),
            *("FLOPs without recomputation / (peak · step)", "Megatron-LM, §5.1", basis),
        ),
    ]  # fmt: skip


def offload_quantities(spec: ModelSpec, layout: Layout, cluster: Cluster, known: Costs) -> list[Quantity]:
    """ZeRO-Infinity's efficiency where nothing overlaps, for what lies on the host."""
    link = cluster.device.host_link or 0.0
    kinds: Sequence[tuple[Kept, str]] = (("optimizer", "optimizer states"), ("parameters", "parameters and gradients"))
    found = []
    for kind, words in kinds[: 2 if layout.offload == "all" else 1]:
        # States come once a step, parameters with every micro-batch.
        rows = layout.micro_batch * (layout.micro_batches if kind == "optimizer" else 1)
        intensity = infinity_intensity(kind, layout.sequence, rows, spec.hidden_size)
        share = 100 * infinity_efficiency(intensity, link, cluster.peak)
        formula = "AIT · bw / (AIT · bw + peak)"
        note = f"AIT {intensity:g} FLOPs a byte, {link / GB:g} GB/s"
        found.append(
            Quantity(f"efficiency by the {words}", share, "%", formula, "ZeRO-Infinity, §4", _basis(cluster), note=note)
        )
    return found


def run_quantities(spec: ModelSpec, layout: Layout, cluster: Cluster, time: StepTime, tokens: float) -> list[Quantity]:
    steps, basis, source = tokens / layout.tokens, _basis(cluster), cluster.device.source
    days = [steps * seconds / SECONDS_PER_DAY for seconds in (time.expected, time.low, time.high)]
    price = cluster.device.price_per_hour
    hours = days[0] * 24 * layout.gpus
    found = [
        Quantity("FLOPs of the run", 6.0 * parameters(spec) * tokens / 1e18, "exaFLOP", "6 · parameters · tokens"),
        Quantity("steps", steps, "", "tokens / tokens of a step"),
        Quantity("days", days[0], "days", "steps · seconds", source, basis, days[1], days[2]),
        Quantity("GPU-hours", hours, "h", "days · 24 · GPUs", source, basis),
    ]
    if price is not None:
        found.append(Quantity("rent", hours * price, "USD", f"GPU-hours · {price:g} USD", source, basis))
    return found


def stage_table(spec: ModelSpec, layout: Layout, cluster: Cluster, known: Costs) -> Table:
    rows = []
    for zero in ZERO:
        other = replace(layout, zero=zero, offload="none")
        held, time = gpu_memory(spec, other, known), step_time(spec, other, cluster, known)
        states = (held.states[name] / GB for name in STATE_BYTES)
        fits = held.total <= cluster.room
        rows.append((zero, *states, held.activations / GB, held.working / GB, held.total / GB, fits, time.expected))
    columns = [Column("ZeRO stage"), *(Column(name, "GB", STATES, ZERO_PAPER) for name in STATE_BYTES)]
    columns += [Column("activations", "GB", ACTIVATIONS, MEGATRON), Column("working", "GB")]
    columns += [Column("in all", "GB"), Column("fits"), Column("step", "s")]
    return Table("By ZeRO stage, nothing on the host", columns, rows)


def recompute_table(spec: ModelSpec, layout: Layout, cluster: Cluster) -> Table:
    rows = []
    # Fused attention has no scores to keep, so there is nothing selective about it.
    for recompute in RECOMPUTE[::2] if layout.fused else RECOMPUTE:
        for parallel in (False, True) if layout.tp > 1 else (False,):
            other = replace(layout, recompute=recompute, sequence_parallel=parallel)
            held, time = gpu_memory(spec, other), step_time(spec, other, cluster)
            fits = held.total <= cluster.room
            rows.append((recompute, parallel, held.activations / GB, held.total / GB, fits, time.expected))
    columns = [
        *(Column("recomputation"), Column("sequence parallel"), Column("activations", "GB", ACTIVATIONS, MEGATRON)),
        *(Column("in all", "GB"), Column("fits"), Column("step", "s")),
    ]
    return Table("By recomputation", columns, rows)


def layout_table(found: Sequence[Candidate], cluster: Cluster) -> Table:
    rows = []
    for one in found:
        layout, total = one.layout, one.memory.total / GB
        shape = (layout.tp, layout.pp, layout.dp, layout.zero, layout.recompute, layout.micro_batches)
        left = cluster.device.memory_bytes / GB - total
        rows.append((*shape, total, left, 100 * bubble(layout), one.time.expected, one.tokens_per_s))
    names = ("TP", "PP", "DP", "ZeRO stage", "recomputation", "micro-batches")
    columns = [*map(Column, names), Column("on the fullest GPU", "GB", STATES, ZERO_PAPER), Column("left", "GB")]
    columns += [Column("bubble", "%", "(p − 1)/m", "Megatron-LM, §2.2"), Column("step", "s")]
    return Table("Layouts that fit", [*columns, Column("throughput", "tokens/s")], rows)


def memory_plot(spec: ModelSpec, layout: Layout, cluster: Cluster, known: Costs) -> Plot:
    """By the number of GPUs, for each ZeRO stage; tensor and pipeline parallelism as given."""
    one = layout.tp * layout.pp
    counts = [one * 2**power for power in range(13)]
    series = []
    for zero in ZERO:
        points = []
        for gpus in counts:
            held = gpu_memory(spec, replace(layout, gpus=gpus, zero=zero, offload="none"), known)
            points.append((float(gpus), held.total / GB))
        series.append(Series(f"ZeRO-{zero}", points))
    room = cluster.device.memory_bytes / GB
    series.append(Series(cluster.device.name, [(float(counts[0]), room), (float(counts[-1]), room)], "dashed"))
    return Plot("Memory of the fullest GPU", "GPUs", "GB", series, log_x=True, log_y=True)


def _basis(cluster: Cluster) -> Basis:
    return cluster.device.basis
