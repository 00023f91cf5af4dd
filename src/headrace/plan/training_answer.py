"""What `plan training` answers: memory of the fullest GPU, time of a step, and other stages and layouts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace

from headrace.core.errors import InvalidParameter
from headrace.core.sizing import parameters
from headrace.core.sizing_work import (
    STATE_BYTES,
    deepspeed_estimate,
    infinity_efficiency,
    infinity_intensity,
    training_flops,
)
from headrace.core.spec import ModelSpec
from headrace.plan.document import Basis, Column, Document, Plot, Quantity, Series, Table
from headrace.plan.training import (
    FILLED,
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
    host_link,
    reached,
    step_interval,
    step_time,
)

GB = 10**9
SECONDS_PER_DAY = 86_400
LISTED = 12
"""Layouts of a search that are shown."""
ZERO_PAPER = "ZeRO, §5"
MEGATRON = "Reducing Activation Recomputation in Large Transformer Models, §4"
WORKING = "a layer's activations (full recomputation); 4 bytes · largest layer (ZeRO-3)"
TOTAL = "states + activations + working memory"
STEP = "compute + bubble + TP + PP + what ZeRO and host take longer than compute"
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
        *memory_quantities(spec, layout, cluster, held, known),
        *time_quantities(spec, layout, cluster, time, known),
    ]
    if layout.offload == "all":
        quantities.append(offload_quantity(spec, layout, cluster))
    if tokens is not None:
        quantities += run_quantities(spec, layout, cluster, time, known, tokens)
    verdict = "fits" if held.total <= cluster.room else "does not fit"
    name = cluster.device.name
    notes = [
        f"It {verdict}: {held.total / GB:.1f} GB on the fullest GPU, where {cluster.room / GB:.1f} GB of each {name} "
        "may be filled: a tenth is left to the framework's buffers and to fragmentation.",
        efficiency_sentence(cluster),
    ]
    if layout.offload != "none":
        notes.append("The step leaves out the optimizer's own time on the host.")
    if layout.sequence > spec.context:
        notes.append(f"Sequences of {layout.sequence} tokens are longer than the model's {spec.context}.")
    if spec.vision is not None:
        notes.append("The vision side counts as parameters; its activations and its FLOPs are left out.")
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
            f"more {name}, or another device: no TP, PP and ZeRO stage fits {spec.name} in its memory with "
            f"{global_batch} sequences of {base.sequence} a step",
        )
    tightest = min(found, key=lambda one: one.memory.total)
    return Document(
        title=f"Layouts for {spec.name} on {base.gpus} × {name}, {global_batch} sequences of {base.sequence} a step",
        quantities=[
            Quantity("parameters", parameters(spec), "", "sum over the weights", source),
            Quantity("layouts that fit", len(found), formula="in all ≤ what may be filled", source=ZERO_PAPER),
            Quantity(
                *("fastest", describe(found[0].layout), "", "largest throughput", cluster.device.source),
                note=_options(found[0].layout),
            ),
            Quantity(
                *("smallest", describe(tightest.layout), "", "least memory of a GPU in all", ZERO_PAPER),
                note=_options(tightest.layout),
            ),
        ],
        tables=[layout_table(found[:LISTED], cluster)],
        notes=[
            f"The {min(LISTED, len(found))} fastest of {len(found)}; TP stays within a node of {cluster.per_node}.",
            efficiency_sentence(cluster),
        ],
        data={"layouts": [asdict(one) for one in found[:LISTED]]},
    )


def describe(layout: Layout) -> str:
    return f"TP {layout.tp}, PP {layout.pp}, DP {layout.dp}, ZeRO-{layout.zero}, recomputation {layout.recompute}"


def _options(layout: Layout) -> str:
    """As the command takes them, beside the model and where it is trained."""
    given = f"--gpus {layout.gpus} --tp {layout.tp} --pp {layout.pp} --zero {layout.zero}"
    given += f" --recompute {layout.recompute}" + " --sequence-parallel" * layout.sequence_parallel
    given += f" --micro-batch {layout.micro_batch} --global-batch {layout.global_batch} --sequence {layout.sequence}"
    return given + (f" --offload {layout.offload}" if layout.offload != "none" else "")


def efficiency_sentence(cluster: Cluster) -> str:
    shown = f"Compute is taken at {100 * cluster.share:g} % of the peak"
    if cluster.efficiency is not None:
        return f"{shown}, as given; bubble and transfers come on top."
    least, most = cluster.shares
    return (
        f"{shown}, {100 * least:g} to {100 * most:g} % in the interval; bubble and transfers come on top. With that "
        "these formulas give what 175B and 1T reached on Frontier within a tenth (--checks)."
    )


# ---------------------------------------------------------------- parts


def memory_quantities(
    spec: ModelSpec, layout: Layout, cluster: Cluster, held: GpuMemory, known: Costs
) -> list[Quantity]:
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
            WORKING,
            "DeepSpeed, memory estimators",
        ),
        Quantity("memory of a GPU in all", held.total, "B", TOTAL, ZERO_PAPER),
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
        found.append(deepspeed_quantity(spec, layout, cluster, known))
    return found


def deepspeed_quantity(spec: ModelSpec, layout: Layout, cluster: Cluster, known: Costs) -> Quantity:
    """What DeepSpeed's users see printed; it knows no activations and no tensor or pipeline parallelism."""
    offloaded = {"none": (), "optimizer": ("optimizer",), "all": tuple(STATE_BYTES)}[layout.offload]
    nodes = -(-layout.gpus // cluster.per_node)
    device, host = deepspeed_estimate(parameters(spec), known.largest, layout.gpus, layout.zero == 3, offloaded, nodes)
    formula = (
        "stage 2: 2P + 18P/N, optimizer on the host 2P; stage 3: 4 · largest layer + 18P/N, optimizer on the host 2P/N "
        "instead, all on the host nothing"
    )
    note = "without activations" + (f"; {host / GB:.1f} GB on each host" if host else "")
    return Quantity("DeepSpeed's own estimate", device, "B", formula, "DeepSpeed, memory estimators", note=note)


def time_quantities(spec: ModelSpec, layout: Layout, cluster: Cluster, time: StepTime, known: Costs) -> list[Quantity]:
    basis, source = _basis(cluster), cluster.device.source
    useful = training_flops(spec, layout.sequence) * layout.tokens / layout.gpus
    links = f"{source}; {cluster.network / GB:g} GB/s between nodes for each GPU"
    low, high = step_interval(spec, layout, cluster, known)
    least, most = cluster.shares
    tokens = layout.tokens
    return [
        Quantity(
            *("step", time.expected, "s", STEP),
            *(source, basis, low, high),
            f"low: everything overlaps, at {100 * most:g} % of the peak; high: nothing does, at {100 * least:g} %",
        ),
        Quantity(
            *("throughput", tokens / time.expected, "tokens/s", "tokens of a step / step", source, basis),
            *(tokens / high, tokens / low),
        ),
        Quantity(
            *("tokens of a step", tokens, "tokens", "micro-batch · micro-batches · DP · sequence", "the layout"),
        ),
        Quantity("compute of a step", time.compute, "s", "FLOPs / (GPUs · peak · efficiency)", source, basis),
        Quantity("pipeline bubble", 100 * bubble(layout), "% of compute", "(p − 1)/(m·v)", "Megatron-LM, §2.2"),
        Quantity("tensor parallelism", time.tensor_parallel, "s", "4 (6) all-reduces of 2sbh a layer", links, basis),
        Quantity("pipeline transfers", time.pipeline, "s", "2 · 2sbh for each micro-batch", links, basis),
        Quantity("ZeRO's collectives", time.zero, "s", "2P elements, stage 3: 3P, · (N − 1)/N", links, basis),
        Quantity("host transfers", time.offload, "s", "4Ψ, with parameters 4Ψ(1 + m)", "ZeRO-Offload, §4", basis),
        Quantity(
            *("of the peak", 100 * reached(spec, layout, cluster, time), "%"),
            *("FLOPs, recomputed ones too / (peak · step)", "Megatron-LM, §5.1", basis),
        ),
        Quantity(
            *("of the peak, in the model's own FLOPs", 100 * useful / (cluster.peak * time.expected), "%"),
            *("FLOPs without recomputation / (peak · step)", "Megatron-LM, §5.1", basis),
        ),
    ]  # fmt: skip


def offload_quantity(spec: ModelSpec, layout: Layout, cluster: Cluster) -> Quantity:
    """ZeRO-Infinity's efficiency where nothing overlaps, for parameters and gradients on the host: every GPU brings its
    part over a link of its own."""
    intensity = infinity_intensity("parameters", layout.sequence, layout.micro_batch, spec.hidden_size)
    bandwidth = host_link(cluster)
    if layout.dp > 1:
        bandwidth = min(layout.dp * bandwidth, cluster.link(layout.tp * layout.dp))
    return Quantity(
        *("efficiency by the parameters' transfers", 100 * infinity_efficiency(intensity, bandwidth, cluster.peak)),
        *(
            "% of the peak",
            "AIT · bw / (AIT · bw + peak), bw: smaller of DP · host link, link of GPUs",
            "ZeRO-Infinity, §4 and §6.1",
        ),
        _basis(cluster),
        note=f"AIT {intensity:g} FLOPs a byte, {bandwidth / GB:g} GB/s",
    )


def run_quantities(
    spec: ModelSpec, layout: Layout, cluster: Cluster, time: StepTime, known: Costs, tokens: float
) -> list[Quantity]:
    steps, basis, source = tokens / layout.tokens, _basis(cluster), cluster.device.source
    seconds = (time.expected, *step_interval(spec, layout, cluster, known))
    days = [steps * one / SECONDS_PER_DAY for one in seconds]
    price = cluster.device.price_per_hour
    hours = [one * 24 * layout.gpus for one in days]
    flops = training_flops(spec, layout.sequence) * tokens
    found = [
        Quantity(
            *("FLOPs of the run", flops / 1e18, "exaFLOP"),
            *("(6 · active parameters + 6 · n h D · sequence) · tokens", "core.sizing_work.training_flops"),
        ),
        Quantity("steps", steps, "steps", "tokens / tokens of a step", "--tokens", "given"),
        Quantity("days", days[0], "days", "steps · seconds", source, basis, days[1], days[2]),
        Quantity("GPU-hours", hours[0], "h", "days · 24 · GPUs", source, basis, hours[1], hours[2]),
    ]
    if price is not None:
        rent = [one * price for one in hours]
        formula = f"GPU-hours · ${price:g}"
        found.append(Quantity("rent", rent[0], "$", formula, source, basis, rent[1], rent[2]))
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
    columns += [Column("activations", "GB", ACTIVATIONS, MEGATRON)]
    columns += [Column("working", "GB", WORKING, "DeepSpeed, memory estimators"), *_verdict(cluster)]
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
        *_verdict(cluster),
    ]
    return Table("By recomputation", columns, rows)


def _verdict(cluster: Cluster) -> Sequence[Column]:
    """Of a layout among others."""
    return (
        Column("in all", "GB", TOTAL, ZERO_PAPER),
        Column("fits", "", f"in all ≤ {FILLED:g} · memory", cluster.device.source),
        Column("step", "s", STEP, cluster.device.source),
    )


def layout_table(found: Sequence[Candidate], cluster: Cluster) -> Table:
    rows = []
    hosts = any(one.memory.host for one in found)
    for one in found:
        layout, total = one.layout, one.memory.total / GB
        shape = (layout.tp, layout.pp, layout.dp, layout.zero, layout.recompute, layout.micro_batches)
        left = cluster.device.memory_bytes / GB - total
        away = (one.memory.host / GB,) if hosts else ()
        rows.append((*shape, total, left, *away, 100 * bubble(layout), one.time.expected, one.tokens_per_s))
    names = ("TP", "PP", "DP", "ZeRO stage", "recomputation", "micro-batches")
    columns = [*map(Column, names), Column("on the fullest GPU", "GB", TOTAL, ZERO_PAPER)]
    source = cluster.device.source
    columns += [Column("left", "GB", "memory − on the fullest GPU", source)]
    columns += [Column("on the host", "GB", STATES, "ZeRO-Offload, §4")] if hosts else []
    columns += [Column("bubble", "%", "(p − 1)/m", "Megatron-LM, §2.2"), Column("step", "s", STEP, source)]
    columns += [Column("throughput", "tokens/s", "tokens of a step / step", source)]
    return Table("Layouts that fit", columns, rows)


def memory_plot(spec: ModelSpec, layout: Layout, cluster: Cluster, known: Costs) -> Plot:
    """By the number of GPUs, for each ZeRO stage; tensor and pipeline parallelism as given, nothing on the host."""
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
