"""Training: memory of each GPU, and time of a step, by ZeRO stage, tensor and pipeline parallelism, recomputation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from headrace.core.errors import InvalidParameter
from headrace.core.flops import rank_bytes, stages
from headrace.core.sizing import end_weights, layer_weights
from headrace.core.sizing_work import (
    Recompute,
    activation_bytes,
    tensor_parallel_traffic,
    training_flops,
    zero_bytes,
    zero_traffic,
)
from headrace.core.spec import AttentionSpec, EmbeddingSpec, LayerNorms, LayerSpec, MlpSpec, ModelSpec, NormSpec
from headrace.plan.devices import Device

Offload = Literal["none", "optimizer", "all"]
"""What lies on the host: nothing; optimizer states and gradients (ZeRO-Offload); the parameters too (ZeRO-Infinity)."""
RECOMPUTE: tuple[Recompute, ...] = ("none", "selective", "full")
OFFLOAD: tuple[Offload, ...] = ("none", "optimizer", "all")
ZERO = (0, 1, 2, 3)
EFFICIENCY = 0.44
"""Share of the peak that compute reaches, where none is given. Published shares are of whole steps: with what these
formulas say of bubble and transfers, 175B and 1T on Frontier come to them with 0.490 and 0.398 in compute."""
EFFICIENCIES = (0.39, 0.50)
"""Between which it lies."""
NETWORK = 25e9
"""Bytes/s between nodes for each GPU, where none are given: one port of 200 Gbit/s."""
PER_NODE = 8
FILLED = 0.9
"""Share of a device's memory that a layout may take."""


@dataclass(frozen=True, slots=True)
class Layout:
    """How a model is trained. `check` raises for what cannot be."""

    gpus: int
    tp: int = 1
    pp: int = 1
    zero: int = 1
    micro_batch: int = 1
    """Sequences that go through a layer at a time."""
    micro_batches: int = 1
    """Of each data-parallel group in a step (gradient accumulation)."""
    sequence: int = 2048
    recompute: Recompute = "none"
    sequence_parallel: bool = False
    interleave: int = 1
    """Pieces of the model that each pipeline stage holds (v)."""
    fused: bool = True
    """Attention never writes its scores (flash attention)."""
    dropout: bool = False
    offload: Offload = "none"

    @property
    def dp(self) -> int:
        """Copies of the model."""
        return self.gpus // (self.tp * self.pp)

    @property
    def global_batch(self) -> int:
        """Sequences of a step."""
        return self.micro_batch * self.micro_batches * self.dp

    @property
    def tokens(self) -> int:
        return self.global_batch * self.sequence


@dataclass(frozen=True, slots=True)
class GpuMemory:
    """Bytes on the fullest GPU, and what it leaves on its host."""

    states: Mapping[str, float]
    """Parameters, gradients, optimizer."""
    activations: float
    working: float
    """ZeRO-3: a layer's parameters and gradients, gathered; full recomputation: a layer's activations."""
    host: float
    stage: int
    """Of the pipeline, from 0."""

    @property
    def total(self) -> float:
        return sum(self.states.values()) + self.activations + self.working


@dataclass(frozen=True, slots=True)
class StepTime:
    """Seconds of one step, by what takes them."""

    compute: float
    bubble: float
    tensor_parallel: float
    pipeline: float
    zero: float
    offload: float

    @property
    def low(self) -> float:
        """Where everything overlaps."""
        return max(self.compute + self.bubble, self.tensor_parallel, self.pipeline, self.zero, self.offload)

    @property
    def high(self) -> float:
        """Where nothing does."""
        shown = (self.tensor_parallel, self.pipeline, self.zero, self.offload)
        return self.compute + self.bubble + sum(shown)

    @property
    def expected(self) -> float:
        """Tensor and pipeline transfers are waited for; ZeRO's and the host's hide behind compute while it lasts."""
        hidden = max(0.0, self.zero + self.offload - self.compute)
        return self.compute + self.bubble + self.tensor_parallel + self.pipeline + hidden


@dataclass(frozen=True, slots=True)
class Cluster:
    """Many of one device."""

    device: Device
    dtype: str = "bfloat16"
    per_node: int = PER_NODE
    network: float = NETWORK
    efficiency: float | None = None
    """Share of the peak that compute reaches, bubble and transfers left out; None: not known, so EFFICIENCY."""

    @property
    def room(self) -> float:
        """Bytes of each device that training may fill: buffers of the framework and fragmentation take the rest."""
        return FILLED * self.device.memory_bytes

    @property
    def peak(self) -> float:
        """FLOP/s. Raises InvalidParameter for a device without units for the type."""
        if self.dtype not in self.device.flops:
            raise InvalidParameter("dtype", self.dtype, f"{', '.join(self.device.flops)} of {self.device.name}")
        return self.device.flops[self.dtype]

    @property
    def share(self) -> float:
        """Of the peak."""
        return EFFICIENCY if self.efficiency is None else self.efficiency

    @property
    def shares(self) -> tuple[float, float]:
        """Between which it lies."""
        return EFFICIENCIES if self.efficiency is None else (self.efficiency, self.efficiency)

    def link(self, group: int) -> float:
        """Bytes/s in a group of so many neighbours."""
        if group > self.per_node or self.device.peer_link is None:
            return self.network
        return self.device.peer_link


def check(spec: ModelSpec, layout: Layout) -> None:
    """Raises InvalidParameter, naming the field."""
    for name in ("gpus", "tp", "pp", "micro_batch", "micro_batches", "sequence", "interleave"):
        if getattr(layout, name) < 1:
            raise InvalidParameter(name, getattr(layout, name), "an integer ≥ 1")
    if layout.gpus % (layout.tp * layout.pp):
        raise InvalidParameter("gpus", layout.gpus, f"a multiple of tp × pp = {layout.tp * layout.pp}")
    count = len(spec.layers)
    if layout.pp > count:
        raise InvalidParameter("pp", layout.pp, f"at most the {count} layers of the model")
    if layout.interleave > 1 and (layout.pp == 1 or count % (layout.pp * layout.interleave)):
        raise InvalidParameter("interleave", layout.interleave, f"1, or with pp > 1 so that pp × it divides {count}")
    if layout.zero not in ZERO:
        raise InvalidParameter("zero", layout.zero, "0, 1, 2 or 3")
    if layout.offload == "optimizer" and layout.zero == 0:
        raise InvalidParameter("offload", layout.offload, "with --zero 1, 2 or 3")
    if layout.offload == "all" and layout.zero != 3:
        raise InvalidParameter("offload", layout.offload, "with --zero 3")


# ---------------------------------------------------------------- memory


@dataclass(frozen=True, slots=True)
class Costs:
    """What a model costs by itself in a layout, whatever the ZeRO stage and the number of micro-batches."""

    held: tuple[int, ...]
    """Numbers of the weights on one GPU of each pipeline stage."""
    activations: float
    """Bytes that all layers keep of one micro-batch, on one GPU of those that share them."""
    working: float
    """Bytes of a layer's activations while it is recomputed."""
    largest: int
    """Numbers of a layer, or of the embedding where that has more."""
    flops: float
    """Of one token."""


def costs(spec: ModelSpec, layout: Layout) -> Costs:
    """Raises InvalidParameter for heads that `tp` does not deal out evenly."""
    sizes = rank_bytes(spec, "bf16", layout.tp, layout.pp)
    if sizes is None:
        raise InvalidParameter("tp", layout.tp, "a divisor of the model's heads and KV heads")
    layers = max(sum(one.numbers for one in layer_weights(layer, spec.hidden_size)) for layer in spec.layers)
    full = layout.recompute == "full"
    return Costs(
        held=tuple(size // 2 for size in sizes),
        activations=_layers_bytes(spec, layout, layout.recompute),
        working=_layers_bytes(spec, layout, "none") / len(spec.layers) if full else 0.0,
        largest=max(layers, *(one.numbers for one in end_weights(spec))),
        flops=training_flops(spec, layout.sequence, layout.recompute),
    )


def _layers_bytes(spec: ModelSpec, layout: Layout, recompute: Recompute) -> float:
    return sum(
        activation_bytes(
            layer,
            spec.hidden_size,
            layout.micro_batch * layout.sequence,
            layout.sequence,
            tp=layout.tp,
            sequence_parallel=layout.sequence_parallel,
            recompute=recompute,
            fused=layout.fused,
            dropout=layout.dropout,
        )
        for layer in spec.layers
    )


def gpu_memory(spec: ModelSpec, layout: Layout, known: Costs | None = None) -> GpuMemory:
    """Of the fullest pipeline stage. `known`: `costs(spec, layout)`. Raises InvalidParameter (`check`)."""
    check(spec, layout)
    known = known or costs(spec, layout)
    return max((_of_stage(spec, layout, known, stage) for stage in range(layout.pp)), key=lambda one: one.total)


def _of_stage(spec: ModelSpec, layout: Layout, known: Costs, stage: int) -> GpuMemory:
    """One-forward-one-backward: stage i keeps the activations of at most p − i micro-batches; interleaving adds
    (p − 1)/(p·v) of them (Reducing Activation Recomputation, §4.2.3)."""
    share = stages(len(spec.layers), layout.pp)[stage] / len(spec.layers)
    states = zero_bytes(known.held[stage], layout.dp, layout.zero)
    kept = float(layout.pp - stage)
    if layout.interleave > 1:
        kept *= 1 + (layout.pp - 1) / (layout.pp * layout.interleave)
    activations = share * min(kept, layout.micro_batches) * known.activations
    if stage == layout.pp - 1:
        # Final norm and head: their inputs in 16 bits, logits in 32 (the same paper, §4.3).
        ways = layout.tp if layout.sequence_parallel else 1
        head = 4 * spec.hidden_size / ways + 4 * spec.vocab_size / layout.tp
        activations += layout.micro_batch * layout.sequence * head
    working = known.working + (4 * known.largest / layout.tp if layout.zero == 3 else 0)
    away = {"none": (), "optimizer": ("optimizer", "gradients"), "all": tuple(states)}[layout.offload]
    held = {name: 0.0 if name in away else size for name, size in states.items()}
    return GpuMemory(held, activations, working, sum(states[name] for name in away), stage)


# ---------------------------------------------------------------- time


def bubble(layout: Layout) -> float:
    """Time that a pipeline stage idles / time that it computes: (p − 1)/(m·v) (Megatron-LM, §2.2)."""
    return (layout.pp - 1) / (layout.micro_batches * layout.interleave)


def step_time(spec: ModelSpec, layout: Layout, cluster: Cluster, known: Costs | None = None) -> StepTime:
    """`known`: `costs(spec, layout)`. Raises InvalidParameter for a device that lacks what the layout needs."""
    check(spec, layout)
    known = known or costs(spec, layout)
    tokens, held = layout.micro_batch * layout.sequence, max(known.held)
    compute = known.flops * layout.tokens / layout.gpus / (cluster.peak * cluster.share)
    tp = pp = zero = away = 0.0
    if layout.tp > 1:
        each = tensor_parallel_traffic(tokens, spec.hidden_size, len(spec.layers), layout.tp, layout.recompute)
        tp = each / layout.pp * layout.micro_batches / cluster.link(layout.tp)
    if layout.pp > 1:
        # A micro-batch's hidden states forward and their gradients backward, for each piece of the model.
        each = 2 * 2.0 * tokens * spec.hidden_size * layout.interleave / (layout.tp if layout.sequence_parallel else 1)
        pp = each * layout.micro_batches / cluster.link(layout.gpus)
    if layout.dp > 1:
        sent = zero_traffic(held, layout.zero, layout.micro_batches) * (layout.dp - 1) / layout.dp
        zero = sent / cluster.link(layout.tp * layout.dp)
    if layout.offload != "none":
        away = host_traffic(held / layout.dp, layout) / host_link(cluster)
    return StepTime(compute, bubble(layout) * compute, tp, pp, zero, away)


def step_interval(spec: ModelSpec, layout: Layout, cluster: Cluster, known: Costs | None = None) -> tuple[float, float]:
    """Seconds of a step: with the largest share of the peak and everything that can overlap, to the smallest and
    nothing that does."""
    least, most = cluster.shares
    fast, slow = (step_time(spec, layout, replace(cluster, efficiency=one), known) for one in (most, least))
    return fast.low, slow.high


def reached(spec: ModelSpec, layout: Layout, cluster: Cluster, time: StepTime) -> float:
    """Share of the peak over a whole step, recomputed FLOPs included: as Megatron-LM counts, and Frontier's runs."""
    flops = training_flops(spec, layout.sequence, layout.recompute) * layout.tokens / layout.gpus
    return flops / (cluster.peak * time.expected)


def host_traffic(parameters: float, layout: Layout) -> float:
    """Bytes between a GPU and its host in a step: gradients down, updated parameters up, 4 bytes a parameter
    (ZeRO-Offload, §4); parameters that live there also come up twice for each micro-batch."""
    again = 4 * layout.micro_batches if layout.offload == "all" else 0
    return parameters * (4 + again)


def host_link(cluster: Cluster) -> float:
    if cluster.device.host_link is None:
        raise InvalidParameter("offload", cluster.device.name, "a device with a link to a host")
    return cluster.device.host_link


# ---------------------------------------------------------------- search


@dataclass(frozen=True, slots=True)
class Candidate:
    layout: Layout
    memory: GpuMemory
    time: StepTime

    @property
    def tokens_per_s(self) -> float:
        return self.layout.tokens / self.time.expected


def candidates(spec: ModelSpec, cluster: Cluster, base: Layout, global_batch: int) -> Iterator[Candidate]:
    """Every layout of `base.gpus` GPUs that fits their memory and takes `global_batch` sequences a step: TP a power of
    two in a node (with sequence parallelism), PP up to the layers, ZeRO 0 to 3 as far as `base.offload` goes with it,
    with and without full recomputation. The rest is `base`'s."""
    offloading = {"none": ZERO, "optimizer": ZERO[1:], "all": ZERO[3:]}[base.offload]
    for tp in _powers(min(cluster.per_node, base.gpus)):
        if base.gpus % tp or rank_bytes(spec, "bf16", tp, 1) is None:
            continue
        for pp in _divisors(base.gpus // tp):
            dp = base.gpus // (tp * pp)
            if pp > len(spec.layers) or global_batch % (dp * base.micro_batch):
                continue
            for recompute in RECOMPUTE[::2]:
                shape = replace(
                    base, tp=tp, pp=pp, micro_batches=global_batch // (dp * base.micro_batch), recompute=recompute,
                    sequence_parallel=tp > 1, interleave=1,
                )  # fmt: skip
                known = costs(spec, shape)
                for zero in offloading if dp > 1 else offloading[:1]:
                    layout = replace(shape, zero=zero)
                    held = gpu_memory(spec, layout, known)
                    if held.total <= cluster.room:
                        yield Candidate(layout, held, step_time(spec, layout, cluster, known))


def _powers(most: int) -> tuple[int, ...]:
    return tuple(2**power for power in range(most.bit_length()) if 2**power <= most)


def _divisors(number: int) -> tuple[int, ...]:
    return tuple(one for one in range(1, number + 1) if number % one == 0)


# ---------------------------------------------------------------- models by numbers


def gpt(
    name: str, layers: int, hidden: int, heads: int, vocab: int = 51_200, inner: int | None = None, gated: bool = False
) -> ModelSpec:
    """GPT's shape: `inner` 4 × hidden where it is not given, a tied head, biases everywhere."""
    norm = NormSpec("layer", 1e-5, hidden, bias=True)
    attention = AttentionSpec(heads, heads, hidden // heads, (hidden // heads) ** -0.5, qkv_bias=True, o_bias=True)
    mlp = MlpSpec(gated, "gelu", inner or 4 * hidden, bias=True)
    layer = LayerSpec(attention, mlp, LayerNorms(pre_attn=norm, pre_mlp=norm))
    return ModelSpec(name, vocab, hidden, 2**20, EmbeddingSpec(tied=True), (layer,) * layers, norm)
