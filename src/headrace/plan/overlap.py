"""How fast a node could serve at most, and how far overlapped nano-batches bring it there.

Source: NanoFlow, arXiv 2408.12757 (its analysis, its table of measured throughputs) and its repository's constants.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from headrace.core.errors import InvalidParameter
from headrace.core.flops import (
    all_reduce_bytes,
    attention_flops,
    causal_flops,
    head_flops,
    layer_products,
    rank_bytes,
    token_flops,
)
from headrace.core.sizing import Matrix, kv_bytes_per_token, layer_weights, weight_bytes
from headrace.core.spec import LayerSpec, ModelSpec
from headrace.plan.devices import Device
from headrace.plan.document import Basis, Column, Document, Plot, Quantity, Series, Table, Value
from headrace.plan.nano_batches import RESOURCES, Op, Timeline, retire, simulate, split, staircase
from headrace.plan.subject import Subject

PAPER = "NanoFlow, arXiv 2408.12757"
PUBLISHED_MODEL, PUBLISHED_PARAMETERS = "llama-2-70b", 70e9
"""What NanoFlow's repository takes it for; its weights are 68,976,648,192 numbers."""
GEMM_EFFICIENCY = 260 / 312
"""Of an A100's data sheet, reached by matrix products: NanoFlow's repository."""
FORM, KV_DTYPE, VALUE_BYTES = "bf16", "bfloat16", 2
MOST_TOKENS, MOST_GPUS = 10_000_000, 10_000
NANO = (1, 2, 3, 4, 6, 8)
LAG_ROWS, LAG_SLOTS = 64, 16
SHOWN_LAYERS = 3

WORKLOADS: tuple[str, ...] = ("512-512", "1024-512", "512-1024", "Splitwise", "LMSYS", "ShareGPT")
TRACES = slice(3, 6)
MEASURED: Mapping[str, tuple[float, ...]] = {
    "vLLM": (494, 552, 410, 484, 251, 255),
    "DeepSpeed-FastGen": (490, 513, 372, 548, 293, 335),
    "TensorRT-LLM": (735, 817, 636, 831, 560, 639),
    "NanoFlow": (1286, 1263, 1212, 1259, 1247, 1272),
}
"""Tokens/s/GPU of LLaMA-2-70B on 8 x A100, by WORKLOADS."""


@dataclass(frozen=True, slots=True)
class Node:
    """GPUs that deal out every layer (tensor parallelism). Raises InvalidParameter."""

    gpus: int
    compute: float
    """FLOP/s of one, as its products reach them."""
    memory_bytes: float
    bandwidth: float
    """Bytes/s of one GPU's memory."""
    link: float | None
    """Bytes/s from one GPU to the others, one direction; None only where there is one GPU."""
    name: str = ""
    source: str = ""
    basis: Basis = "given"

    def __post_init__(self) -> None:
        if not 1 <= self.gpus <= MOST_GPUS:
            raise InvalidParameter("gpus", self.gpus, f"an integer from 1 to {MOST_GPUS}")
        for field in ("compute", "memory_bytes", "bandwidth"):
            value = getattr(self, field)
            if not (math.isfinite(value) and value > 0):
                raise InvalidParameter(field, value, "a number > 0")
        if self.gpus > 1 and not self.link:
            raise InvalidParameter("gpus", self.gpus, f"1: {self.name or 'the device'} has no link to a second one")


NANOFLOW_NODE = Node(
    *(8, 260e12, 80e9, 2e12, 300e9, "8 x A100-80GB, NanoFlow's constants"),
    source="constants of NanoFlow's repository",
    basis="published",
)


def node_of(device: Device, gpus: int, efficiency: float = GEMM_EFFICIENCY) -> Node:
    """`efficiency`: share of a data sheet's FLOP/s that products reach; a measured device has it in its figures."""
    if not 0 < efficiency <= 1:
        raise InvalidParameter("gemm_efficiency", efficiency, "a number > 0, up to 1")
    peak = device.flops.get("bfloat16") or device.flops.get("float16") or device.flops["float32"]
    reached = peak if device.basis == "measured" else peak * efficiency
    return Node(
        *(gpus, reached, device.memory_bytes, device.bandwidth, device.peer_link, f"{gpus} x {device.name}"),
        source=device.source,
        basis=device.basis,
    )


@dataclass(frozen=True, slots=True)
class Traffic:
    """What an iteration computes: `batch` tokens, of prompts and answers in the proportion of their lengths, so that as
    many requests end as begin. Raises InvalidParameter."""

    batch: int = 2048
    prompt: int = 512
    output: int = 512

    def __post_init__(self) -> None:
        for field in ("batch", "prompt", "output"):
            if not 1 <= getattr(self, field) <= MOST_TOKENS:
                raise InvalidParameter(field, getattr(self, field), f"an integer from 1 to {MOST_TOKENS}")

    @property
    def rows(self) -> float:
        """Answers that get a token."""
        return self.batch * self.output / (self.prompt + self.output)

    @property
    def context(self) -> int:
        """Tokens that one attends to, on average over its answer."""
        return self.prompt + self.output // 2


# ---------------------------------------------------------------- bound


def optimum(compute: float, parameters: float) -> float:
    """Tokens/s of one GPU if its products never wait: compute / (2 P), however many GPUs there are (NanoFlow, optimal
    throughput). `parameters`: those that a token is multiplied with."""
    return compute / (2 * parameters)


@dataclass(frozen=True, slots=True)
class Iteration:
    """Seconds for which one iteration keeps each resource of a node busy (NanoFlow, cost analysis)."""

    compute: float
    memory: float
    network: float

    @property
    def memory_ratio(self) -> float:
        """T_R: below 1, compute is what limits, not memory."""
        return self.memory / self.compute

    @property
    def bottleneck(self) -> str:
        return max(RESOURCES, key=lambda name: getattr(self, name))


def iteration(spec: ModelSpec, node: Node, batch: int, parameters: float) -> Iteration:
    """T_comp = 2 B P / (N compute); T_mem = memory / bandwidth: a full device is read once; T_net = 4 (N − 1) B d e n /
    (N link): two all-reduces a layer, on every link at the same time."""
    network = batch * all_reduce_bytes(spec, VALUE_BYTES, node.gpus) / node.link if node.gpus > 1 and node.link else 0.0
    return Iteration(2 * batch * parameters / (node.gpus * node.compute), node.memory_bytes / node.bandwidth, network)


# ---------------------------------------------------------------- operations


def operations(spec: ModelSpec, node: Node, traffic: Traffic) -> list[Op]:
    """Of one iteration, in order, in seconds of one GPU of the node.

    Products: FLOPs, and weights read once (`fixed`). Attention of answers reads the KV cache of their contexts; that of
    prompts is arithmetic on what it has just made. All-reduces after attention and after the MLP, both rings. Norms,
    activations and embedding are left out: fused into the others, and small.
    """
    every, rate, speed = traffic.batch, node.gpus * node.compute, node.gpus * node.bandwidth
    found: list[Op] = []

    def product(name: str, flops: float, read: float) -> None:
        found.append(Op(name, flops / rate, read / speed, fixed=read / speed))

    def reduce(name: str, one: ModelSpec) -> None:
        sums = 1 if one.layers[0].parallel else 2
        if node.link and node.gpus > 1:
            sent = all_reduce_bytes(one, VALUE_BYTES, node.gpus) / sums
            found.append(Op(name, network=every * sent / node.link))

    for layer in spec.layers:
        one = replace(spec, layers=(layer,))
        cache = kv_bytes_per_token(one, KV_DTYPE)
        parts = list(_products(layer, spec.hidden_size))
        rows, prompts = traffic.rows, every - traffic.rows
        product("qkv", every * parts[0][0], parts[0][1])
        read = rows * min(traffic.context, layer.attention.window or traffic.context) * cache
        found.append(Op("decode attention", rows * attention_flops(one, traffic.context) / rate, read / speed))
        scores = prompts * causal_flops(one, traffic.prompt) / traffic.prompt
        found.append(Op("prompt attention", scores / rate, prompts * cache / speed))
        product("o", every * parts[1][0], parts[1][1])
        if not layer.parallel:
            reduce("reduce attention", one)
        product("up", every * parts[2][0], parts[2][1])
        product("down", every * parts[3][0], parts[3][1])
        reduce("reduce mlp", one)
    sampled = traffic.rows + (every - traffic.rows) / traffic.prompt
    product("head", sampled * head_flops(spec), Matrix(spec.vocab_size, spec.hidden_size).nbytes(FORM))
    return found


def _products(layer: LayerSpec, hidden: int) -> Iterator[tuple[float, float]]:
    """(FLOPs of a token, bytes of weights) of qkv, o, the MLP's way up (and its router) and its way down. Of experts, a
    batch reads all."""
    products = list(layer_products(layer, hidden))
    used, router = [one for one in products if one.linear], [one for one in products if not one.linear]
    stored = [one for one in layer_weights(layer, hidden) if one.linear]
    up, down = (
        [[one for one in part[4:] if (one.cut == "cols") is way] for part in (used, stored)] for way in (False, True)
    )
    for matrices, read in (
        (used[:3], stored[:3]),
        (used[3:4], stored[3:4]),
        (router + up[0], router + up[1]),
        (down[0], down[1]),
    ):
        yield 2 * _numbers(matrices), _bytes(read)


def _numbers(matrices: Sequence[Matrix]) -> int:
    return sum(one.numbers for one in matrices)


def _bytes(matrices: Sequence[Matrix]) -> int:
    return sum(one.nbytes(FORM) for one in matrices)


@dataclass(frozen=True, slots=True)
class Overlap:
    """One iteration in `nano` nano-batches."""

    nano: int
    tokens_per_s: float
    """Of one GPU."""
    timeline: Timeline


def overlaps(ops: Sequence[Op], node: Node, batch: int, nano: Sequence[int]) -> list[Overlap]:
    """`ops` of an iteration of `batch` tokens, for each number of nano-batches; 1: one operation after the other."""
    lines = [(count, simulate(split(ops, count))) for count in nano]
    return [Overlap(count, batch / line.makespan / node.gpus, line) for count, line in lines]


def fastest(found: Sequence[Overlap]) -> Overlap:
    """Of equals the one with fewer nano-batches."""
    return max(found, key=lambda one: (one.tokens_per_s, -one.nano))


# ---------------------------------------------------------------- published


def speed_ups() -> tuple[float, ...]:
    """NanoFlow over TensorRT-LLM, by WORKLOADS."""
    return tuple(ours / theirs for ours, theirs in zip(MEASURED["NanoFlow"], MEASURED["TensorRT-LLM"], strict=True))


def published() -> Table:
    best = round(optimum(NANOFLOW_NODE.compute, PUBLISHED_PARAMETERS))
    ratios = speed_ups()
    rows: list[list[Value]] = [
        [workload, *(speeds[place] for speeds in MEASURED.values()), 100 * MEASURED["NanoFlow"][place] / best, ratio]
        for place, (workload, ratio) in enumerate(zip(WORKLOADS, ratios, strict=True))
    ]
    source = f"{PAPER}, throughput of LLaMA-2-70B on 8 x A100"
    return Table(
        "Published: what engines reach of the bound (LLaMA-2-70B, 8 x A100)",
        (
            Column("prompt-answer, or trace"),
            *(Column(name, "tok/s/GPU", "measured by the authors", source) for name in MEASURED),
            Column(f"NanoFlow of {best}", "%", f"NanoFlow / {best}", "derived"),
            Column("NanoFlow over TensorRT-LLM", "x", "ratio of the two", "derived"),
        ),
        rows,
        notes=(
            f"The paper's “up to 1.91x” is the mean over the three traces ({fmean(ratios[TRACES]):.3f}); over all six "
            f"the mean is {fmean(ratios):.2f} and the largest {max(ratios):.2f}.",
            "The bound leaves out attention, and kernels disturb each other on a device: 59 to 72 % were reached over "
            "all models that were ported.",
        ),
    )


# ---------------------------------------------------------------- answer


def document(
    subject: Subject,
    node: Node,
    traffic: Traffic | None = None,
    nano: Sequence[int] = NANO,
    parameters: float | None = None,
) -> Document:
    """`parameters`: as published; None: those a token is multiplied with. Raises InvalidParameter."""
    spec, traffic = subject.spec, traffic or Traffic()
    active = token_flops(spec) / 2 if parameters is None else parameters
    times = iteration(spec, node, traffic.batch, active)
    ops = operations(spec, node, traffic)
    found = overlaps(ops, node, traffic.batch, nano)
    best, serial = fastest(found), math.fsum(op.seconds for op in ops)
    return Document(
        title=f"Overlap: {subject.name} on {node.name}",
        quantities=(
            *_bounds(node, traffic, active, times),
            Quantity(
                "throughput, one operation after the other",
                traffic.batch / serial / node.gpus,
                "tok/s/GPU",
                "batch / (sum of operations) / GPUs",
                "simulation of the operations below",
                "simulated",
            ),
            Quantity(
                f"throughput, {best.nano} nano-batches",
                best.tokens_per_s,
                "tok/s/GPU",
                "batch / makespan / GPUs",
                "simulation of the operations below",
                "simulated",
                note=f"{serial / best.timeline.makespan:.2f} x one after the other; kernels that disturb each other "
                "are not modelled",
            ),
            *_lag(traffic, best, node),
        ),
        tables=(_nano_table(found, traffic), _op_table(ops), published()),
        plots=(_use_plot(best), _nano_plot(found, optimum(node.compute, active))),
        notes=(_room(spec, node, traffic), *_uneven(spec, node)),
        data={"makespans_s": {str(one.nano): one.timeline.makespan for one in found}, "serial_s": serial},
    )


def _bounds(node: Node, traffic: Traffic, active: float, times: Iteration) -> Sequence[Quantity]:
    analysis = f"{PAPER}, cost analysis; node: {node.source}"

    def seconds(name: str, value: float, formula: str) -> Quantity:
        return Quantity(name, value, "s", formula, analysis, node.basis)

    return (
        Quantity(
            "optimal throughput",
            optimum(node.compute, active),
            "tok/s/GPU",
            f"FLOP/s / (2 · parameters) = {node.compute:.4g} / (2 · {active:.4g})",
            f"{PAPER}, optimal throughput; node: {node.source}",
            node.basis,
        ),
        seconds(
            "compute of an iteration (T_comp)",
            times.compute,
            f"2 · tokens · parameters / (GPUs · FLOP/s), {traffic.batch} tokens, {node.gpus} GPUs",
        ),
        seconds("memory (T_mem)", times.memory, "memory / bandwidth: a full device read once"),
        seconds("network (T_net)", times.network, "4 (GPUs − 1) / GPUs · tokens · hidden · bytes · layers / link"),
        Quantity(
            "T_R",
            times.memory_ratio,
            "",
            "T_mem / T_comp",
            analysis,
            node.basis,
            note=f"the node is limited by {times.bottleneck}",
        ),
    )


def _lag(traffic: Traffic, best: Overlap, node: Node) -> Sequence[Quantity]:
    found = retire([traffic.output] * LAG_ROWS, LAG_SLOTS, lag=1)
    where = f"{PAPER}, asynchronous scheduling"
    return (
        Quantity(
            "tokens wasted for each finished row",
            found.wasted / LAG_ROWS,
            "",
            "step i + 1 starts before the end of sequence of step i is known",
            where,
            "simulated",
            note=f"{found.wasted / found.computed:.2%} of answers of {traffic.output} tokens",
        ),
        Quantity(
            "host time for which that pays",
            best.timeline.makespan / traffic.output,
            "s",
            "iteration / output: the host's time between two iterations, hidden, is worth more than the wasted tokens",
            where,
            "simulated",
        ),
    )


def _nano_table(found: Sequence[Overlap], traffic: Traffic) -> Table:
    simulated = "simulation"
    rows = []
    for one in found:
        share = one.timeline.share
        largest = max(one.timeline.busy.values())
        rows.append(
            [
                one.nano,
                1e3 * one.timeline.makespan,
                1e3 * largest,
                one.tokens_per_s,
                *(100 * share[name] for name in RESOURCES),
            ]
        )
    return Table(
        f"One iteration of {traffic.batch} tokens (prompts of {traffic.prompt}, answers of {traffic.output})",
        (
            Column("nano-batches"),
            Column("iteration", "ms", "makespan of the operations", simulated),
            Column("bound", "ms", "busiest resource", simulated),
            Column("throughput", "tok/s/GPU", "batch / makespan / GPUs", simulated),
            *(Column(name, "%", "busy seconds / makespan", simulated) for name in RESOURCES),
        ),
        rows,
        notes=("Each nano-batch reads the weights again: with many of them memory becomes the bound.",),
    )


def _op_table(ops: Sequence[Op]) -> Table:
    sums: dict[str, list[float]] = {}
    for op in ops:
        kept = sums.setdefault(op.name, [0.0, 0.0, 0.0, 0.0])
        for index, seconds in enumerate((*op.busy, op.seconds)):
            kept[index] += 1e3 * seconds
    return Table(
        "Operations of an iteration, all layers together, each alone on the device",
        (
            Column("operation"),
            Column("compute", "ms", "FLOPs / (GPUs · FLOP/s)", "core.flops"),
            Column("memory", "ms", "bytes / (GPUs · bandwidth)", "core.sizing"),
            Column("network", "ms", "2 (GPUs − 1) / GPUs · tokens · hidden · bytes / link", PAPER),
            Column("alone", "ms", "the largest of the three", "roofline"),
        ),
        [[name, *values] for name, values in sums.items()],
    )


def _use_plot(best: Overlap) -> Plot:
    ends = sorted(span.end for span in best.timeline.spans if span.name == "down")
    until = ends[min(len(ends), SHOWN_LAYERS * best.nano) - 1]
    return Plot(
        f"What is in use, first layers, {best.nano} nano-batches",
        "milliseconds",
        "% in use",
        [
            Series(name, [(1e3 * at, 100 * used) for at, used in staircase(best.timeline, name, until)], "steps")
            for name in RESOURCES
        ],
    )


def _nano_plot(found: Sequence[Overlap], bound: float) -> Plot:
    ends = (found[0].nano, found[-1].nano)
    return Plot(
        "Throughput by number of nano-batches",
        "nano-batches",
        "tok/s/GPU",
        (
            Series("simulated", [(one.nano, one.tokens_per_s) for one in found], "line"),
            Series("optimal", [(at, bound) for at in ends], "dashed"),
        ),
    )


def _uneven(spec: ModelSpec, node: Node) -> Sequence[str]:
    if rank_bytes(spec, FORM, node.gpus, 1) is not None:
        return ()
    return (f"Its heads cannot be dealt out evenly to {node.gpus} GPUs: what is shown is a bound all the same.",)


def _room(spec: ModelSpec, node: Node, traffic: Traffic) -> str:
    cache = traffic.rows * traffic.context * kv_bytes_per_token(spec, KV_DTYPE)
    room = node.gpus * node.memory_bytes - weight_bytes(spec, FORM)
    said = (
        f"{traffic.rows:,.0f} answers at once keep {cache / 1e9:,.1f} GB of KV cache, beside weights of "
        f"{weight_bytes(spec, FORM) / 1e9:,.1f} GB"
    )
    if room < 0:
        return f"The weights, {weight_bytes(spec, FORM) / 1e9:,.1f} GB, do not fit into this node."
    if room < cache:
        return f"{said}: more than fits into {node.gpus * node.memory_bytes / 1e9:,.0f} GB. There can be no such batch."
    return f"{said}: there is room for {room / 1e9:,.1f} GB."
