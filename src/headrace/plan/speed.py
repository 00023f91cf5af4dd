"""How long a step takes: on a device of the catalogue by its data sheet, on a probed machine by what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Protocol

from headrace.core.errors import InvalidParameter
from headrace.core.flops import all_reduce_bytes, attention_flops, causal_flops, head_flops, layer_flops, read_bytes
from headrace.core.sizing import DTYPE_BYTES, NATIVE_BITS, Matrix, end_weights, kv_bytes_per_token, layer_weights
from headrace.core.spec import ModelSpec
from headrace.plan.devices import Device
from headrace.plan.document import Basis
from headrace.plan.probe_native import PREFILL
from headrace.plan.profile import Profile
from headrace.plan.subject import Subject

DTYPES = ("float32", "bfloat16", "float16")
QUANTS = ("none", "fp8", "int8", "int4")
NATIVE_QUANTS = ("stored", "none", "int8", "int4")
KV_DTYPES = ("float32", "bfloat16", "float16", "int8", "fp8")
CHUNK = 512
"""Most tokens of a step of the native backend."""
COLD = 3
"""By which what a step does beside its kernels takes longer than in an engine that computes next to nothing: weights
have gone through the caches since (measured, of 1 and of 32 rows)."""
UNSEEN = 40
"""Keys that a prompt's token meets and does not see, on average: half of a chunk of 64 keys, and half of the 16 tokens
that share their loads."""
ROUNDED_BITS: Mapping[str, float] = {"int8": 8.5, "int4": 5}
"""A number that the native backend rounds at load, its share of a scale (and a minimum) included."""
KINDS: Mapping[str, str] = {
    **dict.fromkeys(("q4_0", "q4_1", "q4_K", "int4"), "int4"),
    **dict.fromkeys(("q3_K", "q5_0", "q5_1", "q5_K", "q6_K", "q8_0", "int8"), "int8"),
}
"""Scheme -> which products compute with it: codes of 4 bits, or of 8; the others are plain numbers."""
PLAIN_BITS: Mapping[str, float] = {"float32": 32, "bfloat16": 16, "float16": 16, "f32": 32}


@dataclass(frozen=True, slots=True)
class Work:
    """What one step computes."""

    tokens: int
    """That go through the layers."""
    samples: int
    """Rows of logits."""
    scores: int
    """FLOPs of attention."""
    kv_bytes: int
    """Of keys and values that are read."""
    requests: int
    """Whose tokens they are."""
    prompt: bool
    """Whether they are prompts, and not one token of each request."""


def decode_work(spec: ModelSpec, rows: int, context: int, kv_dtype: str) -> Work:
    """A token of each of `rows` requests that have `context` tokens."""
    read = rows * context * kv_bytes_per_token(spec, kv_dtype)
    return Work(rows, rows, rows * attention_flops(spec, context), read, rows, False)


def prefill_work(spec: ModelSpec, prompts: int, tokens: int, kv_dtype: str) -> Work:
    """`prompts` of `tokens` tokens each; their keys and values are read once."""
    read = prompts * tokens * kv_bytes_per_token(spec, kv_dtype)
    return Work(prompts * tokens, prompts, prompts * causal_flops(spec, tokens), read, prompts, True)


class Speed(Protocol):
    @property
    def basis(self) -> Basis: ...

    @property
    def source(self) -> str: ...

    @property
    def formula(self) -> str:
        """Of a step's time, for a reader."""

    def step_s(self, work: Work) -> float:
        """Seconds."""


# ---------------------------------------------------------------- by data sheet


@dataclass(frozen=True, slots=True)
class Precision:
    """How a model is held on a device of the catalogue."""

    dtype: str = "bfloat16"
    quant: str = "none"
    kv_dtype: str = "bfloat16"

    @property
    def form(self) -> str:
        """Of `sizing.WEIGHT_FORMS`; int8 takes the bytes of fp8."""
        return {"none": "bf16", "int8": "fp8"}.get(self.quant, self.quant)

    @property
    def factor(self) -> int:
        """Bytes, against those of the form: plain float32 has twice those of bf16."""
        return 2 if (self.dtype, self.quant) == ("float32", "none") else 1

    @property
    def name(self) -> str:
        return self.dtype if self.quant == "none" else self.quant

    def compute_type(self, device: Device) -> str:
        """What its products are computed in: int4 is unpacked to 16 bits; a type without units, to the next wider."""
        wanted = self.quant if self.quant in ("fp8", "int8") else self.dtype
        for name in (wanted, self.dtype, "bfloat16", "float16", "float32"):
            if name in device.flops:
                return name
        raise InvalidParameter("dtype", wanted, f"{', '.join(device.flops)} on {device.name}")


@dataclass(frozen=True, slots=True)
class SheetSpeed:
    """The roofline: no step is faster. One replica of tp × pp devices.

    max((weights + KV / m) / (tp · bandwidth), FLOPs / (m · tp · peak)) + all-reduces; m = min(pp, requests)
    micro-batches keep so many pipeline stages busy. Two all-reduces a layer of 2 (tp − 1)/tp tokens · hidden · bytes.
    """

    spec: ModelSpec
    device: Device
    precision: Precision
    tp: int = 1
    pp: int = 1

    @property
    def basis(self) -> Basis:
        return self.device.basis

    @property
    def source(self) -> str:
        return self.device.source

    @property
    def formula(self) -> str:
        return "max(bytes / bandwidth, FLOPs / peak)" + (" + all-reduces" if self.tp > 1 else "")

    def step_s(self, work: Work) -> float:
        spec, device, held = self.spec, self.device, self.precision
        busy = min(self.pp, work.requests)
        weights = held.factor * read_bytes(spec, held.form, ceil(work.tokens / busy))
        memory_s = (weights + work.kv_bytes / busy) / (self.tp * device.bandwidth)
        flops = layer_flops(spec) * work.tokens + head_flops(spec) * work.samples + work.scores
        compute_s = flops / (busy * self.tp * device.flops[held.compute_type(device)])
        return max(memory_s, compute_s) + self._reduce_s(work.tokens)

    def _reduce_s(self, tokens: int) -> float:
        if self.tp == 1:
            return 0.0
        link = self.device.peer_link
        if link is None:
            raise InvalidParameter("tp", self.tp, f"1 on {self.device.name}, which has no link to another of its kind")
        return tokens * all_reduce_bytes(self.spec, DTYPE_BYTES[self.precision.dtype], self.tp) / link


# ---------------------------------------------------------------- as measured


@dataclass(frozen=True, slots=True)
class Part:
    """Weights that are computed with alike, as the native backend keeps them."""

    kind: str
    """int4, int8, bfloat16 or float32: see `KINDS` and `_plain`."""
    numbers: float
    """Multiplied with every token: of experts, the chosen ones."""
    nbytes: float
    """Held."""
    share: float = 1.0
    """Of its numbers that one token meets: of experts, the chosen ones'."""


@dataclass(frozen=True, slots=True)
class Weights:
    """A model as the native backend keeps it."""

    layers: Sequence[Part]
    head: Part
    table_bytes: float
    """Of the embedding, where it is not the head."""
    rest_bytes: int
    """Norms and biases, float32."""

    @property
    def codes(self) -> bool:
        """Whether some are, so that activations are rounded to int8."""
        return any(part.kind in ("int8", "int4") for part in (*self.layers, self.head))

    @property
    def nbytes(self) -> int:
        return round(sum(part.nbytes for part in (*self.layers, self.head)) + self.table_bytes + self.rest_bytes)


def native_weights(subject: Subject, quant: str = "stored", dtype: str = "float32") -> Weights:
    """`quant`: of NATIVE_QUANTS; `dtype`: of plain numbers where quant is none. Raises InvalidParameter."""
    if quant not in NATIVE_QUANTS:
        raise InvalidParameter("quant", quant, f"{', '.join(NATIVE_QUANTS)} on a probed machine")
    spec = subject.spec
    plain = subject.dtype or "float32"
    matrices = [one for layer in spec.layers for one in layer_weights(layer, spec.hidden_size) if one.linear]
    total = sum(one.numbers for one in matrices)
    active = layer_flops(spec) / 2 / total
    schemes = dict(subject.layers) or {plain: total}
    # The names of a vision side, which the native backend has not, are among a checkpoint's own.
    own = total / sum(schemes.values())

    def part(scheme: str, numbers: float, table: bool = False) -> Part:
        bits, kind = _kept(scheme, "int8" if table and quant == "int4" else quant, dtype)
        share = 1.0 if table else active
        return Part(kind, numbers * share, numbers * bits / 8, share)

    ends = Matrix(spec.vocab_size, spec.hidden_size).numbers
    head = part(subject.head or plain, ends, table=True)
    table = 0.0 if spec.embedding.tied else part(subject.table or plain, ends, table=True).nbytes
    small = [one for layer in spec.layers for one in layer_weights(layer, spec.hidden_size)]
    rest = sum(one.numbers for one in (*end_weights(spec), *small) if not one.linear and one.cols == 1)
    return Weights([part(scheme, own * count) for scheme, count in schemes.items()], head, table, 4 * rest)


def _kept(scheme: str, quant: str, dtype: str) -> tuple[float, str]:
    """(bits of a number, kind of its products)"""
    names: Mapping[str, str] = {"f16": "float16", "bf16": "bfloat16", "f32": "float32"}
    if quant == "none":
        return _plain(dtype)
    if scheme in KINDS and scheme in NATIVE_BITS:
        return NATIVE_BITS[scheme], KINDS[scheme]
    if quant in ROUNDED_BITS:
        return ROUNDED_BITS[quant], quant
    if scheme.startswith(("int4", "int8")):
        return ROUNDED_BITS[scheme[:4]], scheme[:4]
    return _plain(names.get(scheme, scheme))


def _plain(dtype: str) -> tuple[float, str]:
    """Of plain numbers: those of 16 bits are half to read, and float16 is as fast as bfloat16, which is probed."""
    bits = PLAIN_BITS.get(dtype, 32)
    return bits, "float32" if bits == 32 else "bfloat16"


@dataclass(frozen=True, slots=True)
class ProbedSpeed:
    """Part after part, as the native backend runs a step: products at the measured rate for so many rows; attention;
    what is done row by row; what each operation takes, and a step that computes nothing. Prompts are computed in chunks
    of `CHUNK` tokens. Raises InvalidParameter where the profile lacks one."""

    spec: ModelSpec
    weights: Weights
    profile: Profile
    kv_dtype: str
    basis: Basis = "measured"

    @property
    def source(self) -> str:
        machine = self.profile.machine
        return f"headrace plan probe, {machine.cpu}, {machine.threads} threads, {machine.date}"

    @property
    def formula(self) -> str:
        return "products + attention + rows + operations, each at its measured rate"

    def parts_s(self, work: Work) -> dict[str, float]:
        """Seconds of a step by what they go to."""
        steps = max(1, ceil(work.tokens / CHUNK))
        each, width = min(work.tokens, CHUNK), self.spec.hidden_size
        layers, head = self.weights.layers, self.weights.head
        profile = self.profile
        fixed_s = profile.value("operation") * operations(self.spec) + COLD * profile.step_seconds(work.requests)
        return {
            "layers": sum(self._product_s(part, work.tokens, each, width) for part in layers),
            "head": self._product_s(head, work.samples, max(1.0, work.samples / steps), self.spec.vocab_size),
            "attention": self._attention_s(work),
            "rows": work.tokens * activation_width(self.spec) * profile.value("rows"),
            "operations": steps * fixed_s,
        }

    def step_s(self, work: Work) -> float:
        return sum(self.parts_s(work).values())

    def _attention_s(self, work: Work) -> float:
        """Decoding rows wait for keys and values; prompts, whose tokens share them, for arithmetic."""
        if work.prompt:
            rate = self.profile.value("attention", phase="prefill", dtype=self.kv_dtype)
            return work.scores * padding(work.tokens / work.requests) / padding(PREFILL) / rate
        return work.kv_bytes / self.profile.kv_bandwidth(self.kv_dtype)

    def _product_s(self, part: Part, tokens: float, met: float, width: int) -> float:
        """`tokens`: in all; `met`: at a time; `width`: of what a product gives. The rates are of weights that come from
        memory, so that with few tokens they are those of reading. An expert meets only the tokens that chose it."""
        rate = self.profile.gemm_rate(part.kind, max(1.0, met * part.share), width, self.weights.nbytes)
        return 2 * part.numbers * tokens / rate


def padding(tokens: float) -> float:
    """What attention of a prompt computes, over what its tokens see."""
    return 1 + 2 * UNSEEN / tokens


def operations(spec: ModelSpec) -> int:
    """Of a step of the native backend: two norms, four products, rotation, attention and rounding a layer, and ends."""
    return 9 * len(spec.layers) + 4


def activation_width(spec: ModelSpec) -> int:
    """Numbers that are normed, rotated, activated or rounded for one token, in all layers."""
    total = 0
    for layer in spec.layers:
        attention = layer.attention
        experts = layer.mlp.experts
        inner = layer.mlp.intermediate if experts is None else experts.experts_per_token * experts.intermediate
        total += 2 * spec.hidden_size + 2 * (attention.heads + attention.kv_heads) * attention.head_dim + inner
    return total
