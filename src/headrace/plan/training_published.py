"""Published training runs: the models by their sizes, and the figures that the formulas are held against."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from headrace.core.sizing import parameters
from headrace.core.sizing_work import (
    STATE_BYTES,
    Kept,
    infinity_efficiency,
    infinity_intensity,
    infinity_parameters,
    infinity_state_bytes,
    infinity_working_bytes,
    zero_bytes,
    zero_traffic,
)
from headrace.core.spec import ModelSpec
from headrace.plan.devices import find_device
from headrace.plan.document import Column, Document, Quantity, Table
from headrace.plan.training import EFFICIENCY, Cluster, Layout, gpt, gpu_memory, reached, step_time

GB = 10**9
TIB = 2**40
ZERO = "ZeRO, §5 and Figure 1"
FRONTIER = "Optimizing Distributed Training on Frontier for Large Language Models"
INFINITY = "ZeRO-Infinity, §3 and Table 1"
FRONTIER_BYTES = 14
"""A parameter's states there."""
FRONTIER_SHARES: Sequence[tuple[str, float, float]] = (
    ("22B", 22e9, 38.38),
    ("175B", 175e9, 36.14),
    ("1T", 1e12, 31.96),
)
"""Model, parameters, % of the peak of a GCD."""
INFINITY_TABLE: Sequence[tuple[int, int, float, float]] = (
    (80, 10_240, 0.10, 1.83),
    (100, 20_480, 0.50, 9.16),
    (128, 25_600, 1.01, 18.31),
    (195, 65_536, 10.05, 182.81),
    (315, 163_840, 101.5, 1845.70),
)
"""Layers, hidden size; published parameters (10¹²) and states (TiB)."""
ZERO_TABLE: Sequence[float] = (120, 31.4, 16.6, 1.9)
"""Published GB on each of 64 GPUs by stage, 7.5 billion parameters."""


@dataclass(frozen=True, slots=True)
class Preset:
    """A published run."""

    spec: ModelSpec
    layout: Layout
    device: str
    source: str
    reached: float | None = None
    """Published % of the peak over a whole step."""


def presets() -> Mapping[str, Preset]:
    """Micro-batches are as many as there are GPUs for a copy of the model, where none are published: so a step has as
    many sequences as GPUs."""
    return {
        "gpt-175b": Preset(
            gpt("175B of Frontier", 96, 12_288, 96),
            Layout(1024, tp=4, pp=16, zero=1, micro_batches=64, recompute="full"),
            "MI250X",
            f"{FRONTIER}: TP 4, PP 16, micro-batch 1, ZeRO-1",
            36.14,
        ),
        "gpt-1t": Preset(
            gpt("1T of Frontier", 128, 25_600, 160),
            Layout(3072, tp=8, pp=64, zero=1, micro_batches=512, recompute="full"),
            "MI250X",
            f"{FRONTIER}: TP 8, PP 64, micro-batch 1, ZeRO-1",
            31.96,
        ),
        "glm-130b": Preset(
            gpt("GLM-130B", 70, 12_288, 96, vocab=150_528, inner=32_768, gated=True),
            Layout(768, tp=4, pp=8, zero=1, micro_batches=176, recompute="full"),
            "A100-40GB",
            "GLM-130B: TP 4, PP 8, DP 24 on 768 A100-40GB; 4224 sequences a step",
        ),
    }


def checks_document() -> Document:
    """Every published figure of training that the formulas are held against."""
    return Document(
        title="Training: formulas against published figures",
        quantities=[*_frontier_quantities(), *_infinity_quantities()],
        tables=[
            _zero_table(),
            _traffic_table(),
            _frontier_table(),
            _infinity_table(),
            _efficiency_table(),
            _fit_table(),
        ],
        notes=[
            "Published without a formula here: Frontier, weak scaling 100 % on 1024 and 3072 MI250X, strong 89 % "
            "(175B) and 87 % (1T); low-bandwidth partitioning 1.71 × ZeRO++ on 20B, scaling 0.94 up to 384 GCDs. "
            "ZeRO-Offload: 13B on one GPU; ZeRO-Infinity: 25 PFLOPS on 512 V100. Fuyou: 156 against 45 TFLOPS on 13B "
            "(3.47 ×).",
        ],
    )


def _zero_table() -> Table:
    rows = []
    for stage, published in enumerate(ZERO_TABLE):
        states = zero_bytes(7.5e9, 64, stage)
        rows.append((stage, *(states[name] / GB for name in STATE_BYTES), sum(states.values()) / GB, published))
    columns = [Column("ZeRO stage"), *(Column(name, "GB", "2Ψ, 2Ψ, 12Ψ; sharded: /N", ZERO) for name in STATE_BYTES)]
    columns += [
        Column("on each GPU", "GB", "16Ψ; 4Ψ + 12Ψ/N; 2Ψ + 14Ψ/N; 16Ψ/N", ZERO),
        Column("published", "GB", "as published", ZERO),
    ]
    return Table("Model states of 7.5 billion parameters on 64 GPUs", columns, rows)


def _traffic_table() -> Table:
    whole = zero_traffic(1, 3)
    # Gathers forward and backward, then the reduction, each P elements: quantised weights halve the first, a copy in
    # each node replaces the second, gradients of 4 bits are a quarter of the third.
    plus = whole / 3 * (0.5 + 0 + 0.25)
    rows = [
        *((f"ZeRO-{stage}", zero_traffic(1, stage)) for stage in (1, 2, 3)),
        ("ZeRO++ (qwZ, hpZ, qgZ), between nodes", plus),
    ]
    source = "ZeRO, §7; ZeRO++, §3"
    columns = [Column("method"), Column("sent in a step by each GPU", "bytes a parameter", "2P or 3P elements", source)]
    return Table("Communication, one micro-batch a step", columns, rows)


def _frontier_table() -> Table:
    peak = find_device("MI250X").flops["bfloat16"] / 1e12
    rows = [(name, share, peak * share / 100, FRONTIER_BYTES * count / GB) for name, count, share in FRONTIER_SHARES]
    columns = [
        Column("model"),
        Column("of the peak", "%", "as published", FRONTIER),
        Column("reached on a GCD", "TFLOPS", f"share · {peak} TFLOPS", FRONTIER),
        Column("states", "GB", f"{FRONTIER_BYTES} bytes a parameter", FRONTIER),
    ]
    return Table("Frontier", columns, rows)


def _frontier_quantities() -> list[Quantity]:
    return [
        Quantity(
            "1T parameters on 20T tokens", 6 * 1e12 * 20e12 / 1e18, "exaFLOP", "6 · parameters · tokens", FRONTIER
        ),
    ]


def _infinity_table() -> Table:
    rows = []
    for layers, hidden, trillions, tebibytes in INFINITY_TABLE:
        count, states = infinity_parameters(layers, hidden), infinity_state_bytes(layers, hidden)
        rows.append((layers, hidden, count / 1e12, trillions, states / TIB, tebibytes))
    columns = [
        *(Column("layers"), Column("hidden size")),
        *(Column("parameters", "10¹²", "12 nl hd²", INFINITY), Column("published", "10¹²", "as published", INFINITY)),
        *(Column("states", "TiB", "240 nl hd²", INFINITY), Column("published", "TiB", "as published", INFINITY)),
    ]
    return Table("ZeRO-Infinity: what a model's states take", columns, rows)


def _infinity_quantities() -> list[Quantity]:
    working, activations = infinity_working_bytes(25_600, 256, 1, 1024)
    formula = "parameters · bytes / 32 GB"
    return [
        Quantity("V100-32GB that hold the states of 1T, 20 B a parameter", 1e12 * 20 / 32e9, "GPUs", formula, INFINITY),
        Quantity(
            *("V100-32GB that hold the states of 1T, 16 B a parameter", 1e12 * 16 / 32e9, "GPUs", formula, ZERO),
            note="800 as published hold activations and buffers too",
        ),
        Quantity(
            *("ZeRO-Offload: 16-bit parameters of 13B", zero_bytes(13e9, 1, 2)["parameters"] / GB, "GB", "2Ψ"),
            "ZeRO-Offload, §4",
            note="on one V100-32GB, the rest on its host (published)",
        ),
        Quantity("MSWM of 1T (hidden 25,600)", working / GB, "GB", "4 · hd · 4hd", INFINITY),
        Quantity(
            *("AWM of 1T, one sequence of 1024", activations / GB, "GB"),
            *("bsz · seq · ci · (16 hd + 2 · heads · seq)", INFINITY),
        ),
    ]


def _efficiency_table() -> Table:
    """On a V100, sequences of 1024 as in the paper."""
    peak, rows = 70e12, []
    kinds: Sequence[Kept] = ("parameters", "optimizer", "activations")
    for kind in kinds:
        for bandwidth in (3e9, 12e9, 70e9, 1500e9):
            found = [infinity_efficiency(infinity_intensity(kind, 1024, b, 8192), bandwidth, peak) for b in (2, 16)]
            rows.append((kind, bandwidth / GB, *(100 * one for one in found)))
    formula = "AIT · bw / (AIT · bw + peak)"
    columns = [
        Column("what lies away"),
        Column("bandwidth", "GB/s"),
        *(Column(f"micro-batch {b}", "% of 70 TFLOPS", formula, "ZeRO-Infinity, §4") for b in (2, 16)),
    ]
    return Table("Efficiency where nothing overlaps (hidden 8192, sequences of 1024)", columns, rows)


def _fit_table() -> Table:
    rows = []
    for name, preset in presets().items():
        held = gpu_memory(preset.spec, preset.layout)
        device = find_device(preset.device)
        layout = preset.layout
        shape = f"TP {layout.tp}, PP {layout.pp}, DP {layout.dp}, ZeRO-{layout.zero}"
        room = device.memory_bytes / GB
        count = parameters(preset.spec) / GB
        cluster = Cluster(device, next(dtype for dtype in ("bfloat16", "float16") if dtype in device.flops))
        share = 100 * reached(preset.spec, layout, cluster, step_time(preset.spec, layout, cluster))
        size = (layout.gpus, count, held.total / GB, device.name, room, held.total / GB <= room)
        rows.append((name, shape, *size, share, preset.reached))
    columns = [
        *(Column("run"), Column("layout"), Column("GPUs")),
        Column("parameters", "10⁹", "sum over the weights", "core.sizing"),
        Column("on the fullest GPU", "GB", "states + activations + working memory", "ZeRO, §5; Megatron-LM"),
        *(Column("device"), Column("its memory", "GB", "capacity", "data sheet"), Column("fits")),
        Column("of the peak", "%", "FLOPs, recomputed ones too / (peak · step)", "Megatron-LM, §5.1"),
        Column("published", "%", "as published", FRONTIER),
    ]
    notes = [
        f"Compute is taken at {100 * EFFICIENCY:g} % of the peak, chosen between the two published runs of Frontier; "
        "they do not say how many micro-batches a step had: here as many as make it one sequence a GPU.",
    ]
    return Table("Published layouts", columns, rows, notes)
