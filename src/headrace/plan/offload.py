"""Time and memory of a model that does not fit: weights, cache and hidden states on device, host and disk.

The cost model is FlexGen's (§4.3 of High-throughput Generative Inference with a Single GPU, and its experimental
cost_model.py): a block of sequences goes through the layers one by one, so a layer's weights come once a block, while
the transfers of its neighbours run beside it. Every term is affine in the nine shares of a policy, so one set of
formulas both evaluates a policy and gives `placement` its linear programme.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from headrace.core.sizing_work import LayerLoad
from headrace.plan.document import Basis

GIB = 2**30
TIERS = ("device", "host", "disk")
PARTS = ("weights", "cache", "hidden")
RESOURCES: Mapping[str, str] = {
    "load": "host → device",
    "store": "device → host",
    "read": "disk → host",
    "write": "host → disk",
    "compute": "compute",
}
BUFFERS = 2
"""Layers whose weights are on the device at a time, where they are not kept there: one in use, one on its way."""
Overlap = Literal["flexgen", "prefetch", "none"]
"""How a layer's transfers and its compute add up. flexgen: as its cost model, where loading to the device is hidden by
nothing in decode; prefetch: the longest of all; none: their sum."""
Shares = Sequence[float]
"""Nine: of weights, cache and hidden states, each on device, host and disk."""


@dataclass(frozen=True, slots=True)
class Rates:
    """How fast a machine moves and computes: bytes/s and FLOP/s."""

    to_device: float
    cache_to_host: float
    hidden_to_host: float
    from_disk: float
    weights_from_disk: float
    cache_to_disk: float
    hidden_to_disk: float
    step_to_disk: float
    """What a decode step writes."""
    matmul: float
    matmul_decode: float
    attention: float
    attention_decode: float
    host_attention: float
    device_bandwidth: float = math.inf
    """Of its memory; infinite where the rates of compute hold it already."""
    host_bandwidth: float = math.inf
    prefill_keys: float = 0.5
    """Share of the square of a prompt's scores that prefill computes: 1 where the mask saves nothing."""
    small_batches: tuple[float, float, float] | None = None
    """Fitted: what the host loses with few rows and narrow layers."""
    overlap: Overlap = "prefetch"


@dataclass(frozen=True, slots=True)
class Machine:
    """Where a model is to run. `memory`: bytes that may be used on device, host and disk; 0: there is none."""

    name: str
    memory: tuple[float, float, float]
    rates: Rates
    basis: Basis
    """Of a number that needs all of it."""
    source: str
    parts: Mapping[str, Basis] = field(default_factory=dict)
    """Of compute, of the host link, of the disk: where they differ."""
    share: float = 1.0
    """Of device and host memory that may be filled; `memory` has it already."""


@dataclass(frozen=True, slots=True)
class Task:
    """What is to be answered: a model's layers, prompts of `prompt` tokens, answers of `output` tokens."""

    layers: int
    load: LayerLoad
    prompt: int
    output: int
    resident: float = 0
    """Bytes that stay on the device whatever the policy: embedding, head, a vision side."""
    head_flops: float = 0
    """Of one row of logits."""
    head_bytes: float = 0


@dataclass(frozen=True, slots=True)
class Block:
    """Sequences that go through a layer together: `batches` batches of `rows`, one after the other."""

    rows: int
    batches: int = 1

    @property
    def sequences(self) -> int:
        return self.rows * self.batches


@dataclass(frozen=True, slots=True)
class Policy:
    """Shares on device, host and disk; each three add up to 1."""

    weights: tuple[float, float, float]
    cache: tuple[float, float, float]
    hidden: tuple[float, float, float]

    @property
    def shares(self) -> Shares:
        return (*self.weights, *self.cache, *self.hidden)


@dataclass(frozen=True, slots=True)
class Stage:
    """One layer, for the whole block: seconds that each of RESOURCES is busy, and how long it takes in all."""

    busy: Mapping[str, float]
    seconds: float

    @property
    def binding(self) -> str:
        """The resource that is busy for longest."""
        return max(self.busy, key=lambda name: self.busy[name])


@dataclass(frozen=True, slots=True)
class Times:
    prefill: Stage
    decode: Stage
    head: float
    """Seconds of a token of each answer in the head."""
    total: float
    """Seconds for the block: every layer, the head, prompt and answer."""
    throughput: float
    """Tokens/s of the answers."""


_T4_GIB: Mapping[str, float] = {
    "to_device": 12.89, "cache_to_host": 0.97, "hidden_to_host": 4.82, "from_disk": 0.473,
    "weights_from_disk": 0.95 * 0.473, "cache_to_disk": 0.746, "hidden_to_disk": 2.015, "step_to_disk": 2.015,
}  # fmt: skip
FLEXGEN_T4 = Machine(
    name="T4 of FlexGen",
    memory=(15 * GIB, 204 * GIB, 1500 * GIB),
    rates=Rates(
        **{name: rate * GIB for name, rate in _T4_GIB.items()},
        matmul=21.24e12,
        matmul_decode=4.3e12,
        attention=9.97e12,
        attention_decode=0.079e12,
        host_attention=0.0123e12,
        prefill_keys=1.0,
        small_batches=(0.0168, 0.0328, 0.0621),
        overlap="flexgen",
    ),
    basis="published",
    source="FlexGen, experimental/cost_model.py: constants fitted on a T4 instance",
)


def plain_rates(
    link: float, read: float, write: float, flops: float, bandwidth: float, host_flops: float, host_bandwidth: float,
    overlap: Overlap = "prefetch",
) -> Rates:  # fmt: skip
    """A machine of which only bandwidths and peaks are known: every transfer of an edge has its rate, arithmetic is as
    fast as peak or memory allow. A rate of 0 stands for an edge that is not there."""
    link, read, write = (rate or math.inf for rate in (link, read, write))
    return Rates(
        link, link, link, read, read, write, write, write, flops, flops, flops, flops, host_flops, bandwidth,
        host_bandwidth, overlap=overlap,
    )  # fmt: skip


# ---------------------------------------------------------------- seconds of a layer


def prefill_busy(task: Task, rates: Rates, block: Block, shares: Shares) -> dict[str, float]:
    """Seconds for which each resource is busy with one layer of the prompts. Affine in `shares`."""
    load, s, count = task.load, task.prompt, block.sequences
    _, wc, wd, _, cc, cd, _, hc, hd = shares
    hidden, cache = load.hidden * s * count, load.kv * (s + 1) * count
    compute = _products(rates.matmul, task, rates, block, s)
    compute += rates.prefill_keys * count * s * s * load.attention / rates.attention
    return {
        "load": (load.weights * (wc + wd) + hidden * (hc + hd)) / rates.to_device,
        "store": cache * (cc + cd) / rates.cache_to_host + hidden * (hc + hd) / rates.hidden_to_host,
        "read": (load.weights * wd + hidden * hd) / rates.from_disk,
        "write": cache * cd / rates.cache_to_disk + hidden * hd / rates.hidden_to_disk,
        "compute": compute,
    }


def decode_busy(task: Task, rates: Rates, block: Block, shares: Shares) -> dict[str, float]:
    """The same of one token of each answer, at half its length. A cache that is not on the device is attended to by
    the host."""
    load, count = task.load, block.sequences
    _, wc, wd, cg, cc, cd, _, hc, hd = shares
    hidden, keys = load.hidden * count, count * (task.prompt + task.output / 2)
    on_device = max(load.attention / rates.attention_decode, load.kv / rates.device_bandwidth)
    on_host = max(load.attention / (rates.host_attention * _small(rates, load, block)), load.kv / rates.host_bandwidth)
    products = _products(rates.matmul_decode, task, rates, block, 1)
    return {
        "load": (load.weights * (wc + wd) + hidden * (hc + hd)) / rates.to_device,
        "store": hidden * (hc + hd) / rates.hidden_to_host,
        "read": (load.kv * keys * cd + hidden * hd) / rates.from_disk + load.weights * wd / rates.weights_from_disk,
        "write": (load.kv * count * cd + hidden * hd) / rates.step_to_disk,
        "compute": products + keys * (cg * on_device + (cc + cd) * on_host),
    }


def _products(rate: float, task: Task, rates: Rates, block: Block, tokens: int) -> float:
    """Every batch reads the layer's weights from the device's memory."""
    each = max(block.rows * tokens * task.load.linear / rate, task.load.weights / rates.device_bandwidth)
    return block.batches * each


def _small(rates: Rates, load: LayerLoad, block: Block) -> float:
    """Share of its rate at which the host computes attention."""
    if rates.small_batches is None:
        return 1.0
    both, rows, width = rates.small_batches
    x, y = max(0.0, math.log2(64 / block.rows)), max(0.0, math.log2(4096 / load.hidden_size))
    return max(0.1, 1 + both * x * y - rows * x - width * y)


def prefill_sums(overlap: Overlap) -> tuple[tuple[str, ...], ...]:
    """Resources that wait for each other: a layer takes as long as the longest of these sums."""
    if overlap == "flexgen":
        return (("load", "read"), ("store", "write"), ("compute",))
    return _sums(overlap)


def decode_sums(overlap: Overlap) -> tuple[tuple[str, ...], ...]:
    if overlap == "flexgen":
        return tuple(("load", name) for name in ("store", "read", "write", "compute"))
    return _sums(overlap)


def _sums(overlap: Overlap) -> tuple[tuple[str, ...], ...]:
    return (tuple(RESOURCES),) if overlap == "none" else tuple((name,) for name in RESOURCES)


def times(task: Task, rates: Rates, block: Block, policy: Policy) -> Times:
    """T = prefill · layers + decode · layers · (output − 1) + head · output. FlexGen leaves the head out."""
    shares = policy.shares
    before = _stage(prefill_busy(task, rates, block, shares), prefill_sums(rates.overlap))
    after = _stage(decode_busy(task, rates, block, shares), decode_sums(rates.overlap))
    head = block.batches * max(
        block.rows * task.head_flops / rates.matmul_decode, task.head_bytes / rates.device_bandwidth
    )
    total = task.layers * (before.seconds + after.seconds * (task.output - 1)) + head * task.output
    return Times(before, after, head, total, block.sequences * task.output / total)


def _stage(busy: Mapping[str, float], sums: Sequence[Sequence[str]]) -> Stage:
    return Stage(busy, max(sum(busy[name] for name in names) for names in sums))


# ---------------------------------------------------------------- bytes


def memory(task: Task, block: Block, shares: Shares) -> dict[str, dict[str, float]]:
    """Peak bytes by tier in prefill and in decode (FlexGen, cost_model.py: home and working memory). Affine in
    `shares`."""
    load, rows, count, tokens = task.load, block.rows, block.sequences, task.prompt + task.output
    wg, wc, wd, cg, cc, cd, hg, hc, hd = shares
    weights, cache = load.weights * task.layers, load.kv * tokens * count * task.layers
    hidden, one = load.hidden * count, load.hidden * rows
    away, hidden_away = wc + wd, hc + hd
    row_cache, row_scores = load.kv * tokens * rows, load.scores * tokens * rows
    s = task.prompt
    buffers = BUFFERS * load.weights * away + task.resident
    return {
        "device": {
            "prefill": weights * wg + cache * cg + hidden * s * hg + buffers
            + one * s * hidden_away + rows * s * (load.inner + load.scores * s),
            "decode": weights * wg + cache * cg + hidden * hg + buffers
            + one * hidden_away + rows * load.inner + (2 * row_cache + row_scores) * cg,
        },
        "host": {
            "prefill": weights * wc + cache * cc + hidden * s * hc + load.weights * away + one * s * hidden_away,
            "decode": weights * wc + cache * cc + hidden * hc + load.weights * wd
            + 2 * one * hidden_away + (2 * row_cache + row_scores) * (cc + cd),
        },
        "disk": {"prefill": weights * wd + cache * cd + hidden * s * hd},
    }  # fmt: skip


# ---------------------------------------------------------------- the bound


def bound(streamed: float, bandwidth: float, rows: int) -> float:
    """Tokens/s that no schedule exceeds: `rows` answers grow by a token in each step, which takes at least
    `streamed` bytes over a link of `bandwidth` bytes/s."""
    return rows * bandwidth / streamed


def step_seconds(streamed: float, bandwidth: float, compute: float, prefetch: bool = True) -> float:
    """Of one step: the longer of transfer and compute; their sum without prefetch."""
    transfer = streamed / bandwidth
    return max(transfer, compute) if prefetch else transfer + compute


def copied_layers(layers: int, layer_bytes: float, kept: float) -> int:
    """Layers that come anew in each forward pass where `kept` bytes of weights stay on the device."""
    return max(0, math.ceil((layers * layer_bytes - kept) / layer_bytes))
