"""The four costs of a long context, all of them the KV cache's: prefill, fewer users, slower decode, switching.

Fu 2024, Challenges in Deploying Long-Context Transformers: a theoretical peak performance analysis. Prefill is that of
exact causal attention, 2 P L + 2 n h D L²; the published figures fit a width of 4096 in place of h D.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from headrace.core.errors import InvalidParameter
from headrace.core.flops import causal_flops, token_flops
from headrace.core.sizing import kv_bytes_per_token
from headrace.core.spec import ModelSpec
from headrace.plan.devices import Device
from headrace.plan.document import Column, Plot, Series, Table, Value
from headrace.plan.speed import Precision

PAPER = "Fu 2024, Challenges in Deploying Long-Context Transformers"
ANSWER = 250
"""Tokens that are decoded: one screen of text, as in the paper."""
LENGTHS = (4096, 50_000, 100_000)
GB = 2**30
"""The paper's: 80 GB of an A100 are 80 GiB, and its other GB with them."""


@dataclass(frozen=True, slots=True)
class Place:
    """A model on one device, or on several that share it, as the four costs see it."""

    layers: int
    width: int
    """h D: of all query heads together."""
    flops_per_token: float
    """2 P"""
    kv_per_token: int
    """Bytes."""
    weights: float
    """Bytes."""
    memory: float
    """Bytes for weights and KV cache."""
    flops: float
    """Per second."""
    bandwidth: float
    """Bytes/s."""
    link: float | None
    """Bytes/s to the host; None: KV caches have nowhere to go."""


@dataclass(frozen=True, slots=True)
class Costs:
    """At one length of context."""

    kv: int
    """Bytes of one user's KV cache."""
    users: float
    """That fit at the same time; a whole number of them, rounded down."""
    prefill_s: float
    decode_s: float
    """Of `ANSWER` tokens."""
    switch_s: float | None
    """To put one user's KV cache away and fetch another's."""


def four_costs(place: Place, tokens: int, attention: float | None = None) -> Costs:
    """`attention`: FLOPs of the prompt's attention; None: 2 n h D L². Raises InvalidParameter."""
    if tokens < 1:
        raise InvalidParameter("context", tokens, "a whole number of tokens from 1")
    kv = place.kv_per_token * tokens
    scores = 2 * place.layers * place.width * tokens**2 if attention is None else attention
    return Costs(
        kv=kv,
        users=max(0.0, (place.memory - place.weights) / kv),
        prefill_s=(place.flops_per_token * tokens + scores) / place.flops,
        decode_s=ANSWER * (place.weights + kv) / place.bandwidth,
        switch_s=None if place.link is None else 2 * kv / place.link,
    )


def yi_34b(width: int = 56 * 128) -> Place:
    """The paper's example with the paper's constants: Yi-34B-200K on an A100 of 80 GB. `width`: 4096 is what its
    prefill figures fit, 56 × 128 what the model has."""
    return Place(
        layers=60,
        width=width,
        flops_per_token=2 * 34e9,
        kv_per_token=2 * 60 * 8 * 128 * 2,
        weights=68 * GB,
        memory=80 * GB,
        flops=312e12,
        bandwidth=2000 * GB,
        link=20 * GB,
    )


PUBLISHED: Sequence[tuple[str, str, Sequence[float | None]]] = (
    ("KV cache of a user", "GiB", (0.91, 11.0, 22.8)),
    ("users at the same time", "", (None, 1.0, None)),
    ("prefill", "s", (0.89, 14.1, None)),
    (f"decode of {ANSWER} tokens", "s", (8.5, 9.8, None)),
    ("context switch", "s", (0.1, 1.1, None)),
)
"""Quantity, unit, and the paper's figure at each of `LENGTHS`."""
FORMULAS = (
    "2 n h_k D e L",
    "(memory − weights) / KV",
    "(2 P L + 2 n h D L²) / FLOP/s",
    f"{ANSWER} (weights + KV) / bandwidth",
    "2 KV / link to the host",
)


def values(costs: Costs) -> tuple[float | None, ...]:
    """In the order and the units of `PUBLISHED`."""
    return costs.kv / GB, costs.users, costs.prefill_s, costs.decode_s, costs.switch_s


def place_of(spec: ModelSpec, device: Device, held: Precision, weights: int, memory: float, devices: int) -> Place:
    """`weights`, `memory`: bytes of all `devices` that share the model."""
    attention = spec.layers[0].attention
    return Place(
        layers=len(spec.layers),
        width=attention.heads * attention.head_dim,
        flops_per_token=token_flops(spec),
        kv_per_token=kv_bytes_per_token(spec, held.kv_dtype),
        weights=weights,
        memory=memory,
        flops=devices * device.flops[held.compute_type(device)],
        bandwidth=devices * device.bandwidth,
        link=None if device.host_link is None else devices * device.host_link,
    )


def lengths(context: int) -> list[int]:
    """4K, 50K, 100K and the model's own, as far as it goes."""
    return sorted({one for one in LENGTHS if one < context} | {context})


def costs_table(spec: ModelSpec, place: Place, where: str) -> Table:
    """The four costs of a model at each length."""
    found = [(one, four_costs(place, one, causal_flops(spec, one))) for one in lengths(spec.context)]
    rows: list[list[Value]] = []
    for index, (name, unit, _) in enumerate(PUBLISHED):
        rows.append([name, unit, *(values(costs)[index] for _, costs in found), FORMULAS[index]])
    columns = [Column("cost"), Column("unit")]
    columns += [Column(f"{tokens:,} tokens", "", "see the row's formula", PAPER) for tokens, _ in found]
    notes = (
        "Prefill is that of exact causal attention over h · D; a layer with a window counts what it sees.",
        "Less than one user: a context of that length does not fit beside the weights.",
    )
    return Table(f"Long context: {where}", (*columns, Column("formula")), rows, notes)


def published_table() -> Table:
    """Planning §3: the paper's example, as computed with its constants and as published."""
    rows: list[list[Value]] = []
    true = [values(four_costs(yi_34b(), one)) for one in LENGTHS]
    paper = [values(four_costs(yi_34b(4096), one)) for one in LENGTHS]
    for index, (name, unit, said) in enumerate(PUBLISHED):
        each = [value for at in range(len(LENGTHS)) for value in (true[at][index], said[at])]
        rows.append([name, unit, *each, FORMULAS[index]])
        if name == "prefill":
            each = [value for at in range(len(LENGTHS)) for value in (paper[at][index], said[at])]
            rows.append(["prefill, width 4096", unit, *each, "(2 P L + 2 n 4096 L²) / FLOP/s"])
    columns = [Column("cost"), Column("unit")]
    for tokens in LENGTHS:
        columns += [
            Column(f"{tokens:,} tokens", "", "see the row's formula", PAPER),
            Column("published", "", "as published", PAPER),
        ]
    notes = (
        "34B parameters, 68 GB of weights, 80 GB, 312 TFLOP/s, 2 TB/s, 20 GB/s to the host; GB of bytes = 2³⁰.",
        "The published prefill fits a width of 4096; the model's is 56 × 128 = 7168, which headrace uses.",
    )
    return Table("The published example: Yi-34B-200K on an A100 80 GB", (*columns, Column("formula")), rows, notes)


def costs_plot(spec: ModelSpec, place: Place) -> Plot:
    """Seconds of each cost, and users, against the length of the context."""
    longest = spec.context
    points = sorted({max(1, longest >> shift) for shift in range(8)} | {one for one in LENGTHS if one <= longest})
    found = [(float(one), four_costs(place, one, causal_flops(spec, one))) for one in points]
    series = [
        Series("prefill, s", [(x, one.prefill_s) for x, one in found]),
        Series(f"decode of {ANSWER} tokens, s", [(x, one.decode_s) for x, one in found]),
        Series("users at the same time", [(x, one.users) for x, one in found if one.users > 0], "dashed"),
    ]
    switches = [(x, one.switch_s) for x, one in found if one.switch_s is not None]
    if switches:
        series.append(Series("context switch, s", switches))
    series = [one for one in series if one.points]
    return Plot("The four costs of a long context", "context, tokens", "seconds, users", series, log_x=True, log_y=True)
