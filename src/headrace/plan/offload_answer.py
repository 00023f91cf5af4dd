"""What `plan offload` answers: a placement, its times and what limits it, published runs, checks against them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from headrace.plan.document import Basis, Column, Document, Plot, Quantity, Series, Table, Value
from headrace.plan.numbers import number_text
from headrace.plan.offload import (
    PARTS,
    RESOURCES,
    TIERS,
    Block,
    Machine,
    Policy,
    Task,
    Times,
    bound,
    copied_layers,
    memory,
    step_seconds,
    times,
)
from headrace.plan.offload_machine import (
    BMINF_BYTES,
    BMINF_GPUS,
    BMINF_KEPT,
    BMINF_LAYERS,
    BMINF_SECONDS,
    DEEPNVME,
    DEEPNVME_ROWS,
    EXAMPLES,
    FLEXGEN_TABLE,
    LLAMA_3_70B_BYTES,
    Example,
)
from headrace.plan.placement import GB, Placement, Search, search, units, value_of_more

FLEXGEN = "FlexGen, §4.3, and experimental/cost_model.py"
TOTAL = "T = Tpre · layers + Tgen · layers · (output − 1) + head · output"
LONGEST = "longest of its transfers and compute, as they overlap"
BOUND = "rows · bandwidth / bytes streamed in a step"
LINKS: Mapping[str, str] = {"host": "host link", "disk": "disk"}


def placement_document(name: str, task: Task, machine: Machine, sequences: int | None) -> Document:
    """The best placement on this machine. Raises InvalidParameter where nothing fits."""
    found = search(task, machine, sequences)
    gains = value_of_more(task, machine, found)
    best = found.best
    limits = stream_limits(task, machine, best.block, best.policy)
    quantities = [
        *_time_quantities(task, best.block, best.times, machine.basis, machine.source),
        Quantity(
            *("throughput of shares of any size", best.bound, "tokens/s", "linear programme over nine shares", FLEXGEN),
            machine.basis,
        ),
        *limit_quantities(machine, best.block, limits),
        *(
            Quantity(
                *(
                    f"1 GB more of {tier} memory adds",
                    gain,
                    "tokens/s",
                    "linear programme with 10⁹ bytes more",
                    FLEXGEN,
                ),
                machine.basis,
            )
            for tier, gain in gains.items()
        ),
    ]
    notes = [
        bound_sentence(machine, best.block, limits),
        f"Limited in decode by {RESOURCES[best.times.decode.binding]}, "
        f"in prefill by {RESOURCES[best.times.prefill.binding]}.",
        "Layers that are not on the device are to lie evenly among the others, so that their transfers never queue.",
    ]
    if "data sheet" in machine.parts.values():
        notes.append("Peaks of data sheets: real products and links stay below them. A probe gives this machine's own.")
    tables = [placement_table(task, best.block, best.policy), busy_table(best.times), memory_table(task, machine, best)]
    return Document(
        title=f"Placement of {name} on {machine.name}",
        quantities=quantities,
        tables=tables,
        plots=[throughput_plot(found, task, machine)],
        notes=notes,
        data={"block": best.block, "policy": best.policy, "memory": memory(task, best.block, best.policy.shares)},
    )


def example_document(example: Example) -> Document:
    """A published run: the cost model's prediction for its policy, and the best policy of the same machine."""
    task, machine = example.task, example.machine
    found = times(task, machine.rates, example.block, example.policy)
    best = search(task, machine).best
    off = found.throughput / example.published - 1
    quantities = [
        *_time_quantities(task, example.block, found, machine.basis, machine.source),
        Quantity("published throughput", example.published, "tokens/s", "as published", example.source, "published"),
        Quantity(
            *("prediction against published", 100 * off, "%", "predicted / published − 1", example.source),
            note=example.note,
        ),
        Quantity(
            *("best policy found", best.times.throughput, "tokens/s", "linear programme, then whole units", FLEXGEN),
            machine.basis,
            note=f"{best.block.rows} × {best.block.batches} sequences",
        ),
    ]
    tables = [placement_table(task, example.block, example.policy), busy_table(found)]
    tables.append(placement_table(task, best.block, best.policy, "Best policy found"))
    notes = [f"{example.name}: {example.note}."] if example.note else []
    return Document(f"FlexGen's {example.name} on {machine.name}", quantities, tables, notes=notes)


def checks_document() -> Document:
    """Every published figure that the formulas here are held against."""
    compared = [
        Column("run"),
        Column("model", "tokens/s", f"FlexGen: {TOTAL}; DeepNVMe: {BOUND}", FLEXGEN),
        Column("published", "tokens/s", "as published", "FlexGen, Table 2; DeepNVMe's announcement"),
        Column("difference", "%", "model / published − 1", "derived"),
        Column("note"),
    ]
    rows: list[tuple[str, float, float, float, str]] = []
    for name, example in EXAMPLES.items():
        predicted = times(example.task, example.machine.rates, example.block, example.policy).throughput
        off = 100 * (predicted / example.published - 1)
        rows.append((f"FlexGen {name}", predicted, example.published, off, example.note))
    for bandwidth, published in DEEPNVME:
        predicted = bound(LLAMA_3_70B_BYTES, bandwidth, DEEPNVME_ROWS)
        name = f"DeepNVMe, Llama-3-70B, batch {DEEPNVME_ROWS}, {bandwidth / GB:g} GB/s"
        note = "compute starts to bind" if predicted > 1.05 * published else ""
        rows.append((name, predicted, published, 100 * (predicted / published - 1), note))
    layer = BMINF_BYTES / BMINF_LAYERS / BMINF_GPUS
    copied = copied_layers(BMINF_LAYERS, layer, BMINF_KEPT)
    source = "GLM-130B, its notes on BMInf (8 × V100-32GB)"
    formula = "bytes / layers / GPUs / seconds"
    quantities = [
        Quantity("BMInf: bandwidth of each link", layer / BMINF_SECONDS / GB, "GB/s", formula, source),
        Quantity("BMInf: layers copied in a forward pass", copied, "", "ceil((bytes − kept) / layer)", source),
        Quantity(
            "BMInf: seconds of a forward pass", copied * BMINF_SECONDS, "s", "layers copied · seconds each", source
        ),
    ]
    return Document(
        title="Offloading: formulas against published runs",
        quantities=quantities,
        tables=[
            Table("Throughput", compared, rows),
            Table(
                "Published on a T4, prompt 512, output 32",
                [
                    Column("system"),
                    *(Column(f"OPT-{size}", "tokens/s", "as published", "FlexGen, Table 2") for size in SIZES),
                ],
                FLEXGEN_TABLE,
            ),
        ],
        notes=[
            "ZeRO-Inference, OPT-30B on V100-32 (published, no formula): 43 tokens/s from the host, 30 from NVMe; "
            "prefetching gains 1.13, 1.14 and 1.21 × from NVMe (30B, 175B, BLOOM), nothing from the host."
        ],
    )


SIZES = ("6.7B", "30B", "175B")


# ---------------------------------------------------------------- parts of an answer


def _time_quantities(task: Task, block: Block, found: Times, basis: Basis, source: str) -> list[Quantity]:
    n, m = task.layers, task.output
    whole = f"{block.rows} × {block.batches} sequences of {task.prompt} + {m} tokens"
    first, step = n * found.prefill.seconds + found.head, n * found.decode.seconds + found.head
    head = Quantity("head", found.head, "s", "larger of FLOPs / peak, bytes / bandwidth", source, basis)
    return [
        Quantity("throughput", found.throughput, "tokens/s", "sequences · output / T", FLEXGEN, basis, note=whole),
        Quantity("prefill of a layer, Tpre", found.prefill.seconds, "s", LONGEST, source, basis),
        Quantity("decode step of a layer, Tgen", found.decode.seconds, "s", LONGEST, source, basis),
        *([head] if found.head else []),  # FlexGen's published examples leave it out
        Quantity("time to the first token", first, "s", "Tpre · layers + head", FLEXGEN, basis),
        Quantity("time of a token after it", step, "s", "Tgen · layers + head", FLEXGEN, basis),
        Quantity("time in all", found.total, "s", TOTAL, FLEXGEN, basis),
    ]  # fmt: skip


def stream_limits(task: Task, machine: Machine, block: Block, policy: Policy) -> dict[str, tuple[float, float, float]]:
    """tier -> (bytes of weights that a step takes from it or through it, bytes/s, tokens/s at most)."""
    weights = task.load.weights * task.layers
    _, wc, wd = policy.weights
    found = {}
    for tier, share, bandwidth in (
        ("host", wc + wd if machine.memory[1] else 0.0, machine.rates.to_device),
        ("disk", wd, machine.rates.weights_from_disk),
    ):
        if share:
            found[tier] = (weights * share, bandwidth, bound(weights * share, bandwidth, block.sequences))
    return found


def limit_quantities(machine: Machine, block: Block, limits: dict[str, tuple[float, float, float]]) -> list[Quantity]:
    return [
        Quantity(
            name=f"at most, by the {LINKS[tier]}",
            value=most,
            unit="tokens/s",
            formula=BOUND,
            source=machine.source,
            basis=machine.parts.get(tier, machine.basis),
            note=f"{streamed / GB:.2f} GB at {bandwidth / GB:.2f} GB/s: {step_seconds(streamed, bandwidth, 0):.3g} s "
            "a step",
        )
        for tier, (streamed, bandwidth, most) in limits.items()
    ]


def bound_sentence(machine: Machine, block: Block, limits: dict[str, tuple[float, float, float]]) -> str:
    if not limits:
        return "All weights stay on the device: no link bounds the throughput."
    tier = min(limits, key=lambda name: limits[name][2])
    _, bandwidth, most = limits[tier]
    shown = number_text(float(f"{most:.3g}"))
    return (
        f"At most {shown} tokens/s at batch {block.sequences}, because the {LINKS[tier]} gives "
        f"{bandwidth / GB:.3g} GB/s ({machine.parts.get(tier, machine.basis)})."
    )


def placement_table(task: Task, block: Block, policy: Policy, title: str = "Placement") -> Table:
    sizes = (
        task.load.weights * task.layers,
        task.load.kv * (task.prompt + task.output) * block.sequences * task.layers,
        task.load.hidden * task.prompt * block.sequences,
    )
    names = ("layers", "heads of a batch", "batches")
    rows: list[Sequence[Value]] = []
    for index, (part, size, whole, wholes) in enumerate(zip(PARTS, sizes, units(task, block), names, strict=True)):
        shares = policy.shares[3 * index : 3 * index + 3]
        rows.append((part, size / GB, *(100 * share for share in shares), *(share * whole for share in shares), wholes))
    columns = [
        Column("part"),
        Column("size", "GB", "weights; kv · tokens · sequences; hidden · prompt · sequences", "core/sizing_work.py"),
    ]
    columns += [Column(f"on {tier}", "%", "linear programme", FLEXGEN) for tier in TIERS]
    columns += [Column(f"{tier}, in units", "", "share · units of the part", FLEXGEN) for tier in TIERS]
    return Table(title, [*columns, Column("unit")], rows)


def busy_table(found: Times) -> Table:
    rows = []
    for name, words in RESOURCES.items():
        before, after = found.prefill.busy[name], found.decode.busy[name]
        rows.append((words, before, 100 * before / found.prefill.seconds, after, 100 * after / found.decode.seconds))
    columns = [
        Column("resource"),
        Column("prefill of a layer", "s", "bytes / bandwidth; FLOPs / peak", FLEXGEN),
        Column("of its time", "%", "busy / time of the layer", "derived"),
        Column("decode step of a layer", "s", "bytes / bandwidth; FLOPs / peak", FLEXGEN),
        Column("of its time", "%", "busy / time of the layer", "derived"),
    ]
    return Table("What a layer waits for", columns, rows)


def memory_table(task: Task, machine: Machine, best: Placement) -> Table:
    peaks = memory(task, best.block, best.policy.shares)
    rows = []
    for tier, room in zip(TIERS, machine.memory, strict=True):
        if room:
            used = max(peaks[tier].values())
            rows.append((tier, used / GB, room / GB, 100 * used / room))
    columns = [
        Column("tier"),
        Column("peak", "GB", "home and working memory", FLEXGEN),
        Column("may be used", "GB", "memory · --share", machine.source),
    ]
    return Table("Memory", [*columns, Column("filled", "%", "peak / may be used", "derived")], rows)


def throughput_plot(found: Search, task: Task, machine: Machine) -> Plot:
    """Of the best shares of any size, by the number of sequences, under what no placement of the weights exceeds."""
    best: dict[int, float] = {}
    for block, reached in found.by_block:
        best[block.sequences] = max(reached, best.get(block.sequences, 0.0))
    counts = sorted(best)
    series = [Series("best shares", [(float(count), best[count]) for count in counts], "line")]
    chosen = found.best.block.sequences
    series.append(Series("chosen", [(float(chosen), found.best.times.throughput)], "dots"))
    for tier, (streamed, bandwidth) in least_streamed(task, machine).items():
        points = [(float(count), bound(streamed, bandwidth, count)) for count in counts]
        series.append(Series(f"bound by the {LINKS[tier]}", points, "dashed"))
    return Plot("Throughput by batch", "sequences", "tokens/s", series, log_x=True, log_y=True)


def least_streamed(task: Task, machine: Machine) -> dict[str, tuple[float, float]]:
    """tier -> (bytes of weights that have no room above it, so that every step takes them from there; bytes/s)."""
    weights, (device, host, disk) = task.load.weights * task.layers, machine.memory
    found = {}
    if host and weights > device:
        found["host"] = (weights - device, machine.rates.to_device)
    if disk and weights > device + host:
        found["disk"] = (weights - device - host, machine.rates.weights_from_disk)
    return found
