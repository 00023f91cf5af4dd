"""What a model is, takes and does on a device or on a probed machine: size, memory, TTFT, ITL, throughput."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil

from headrace.core.errors import InvalidParameter
from headrace.core.flops import image_flops, prefill_flops, token_flops
from headrace.core.sizing import (
    WEIGHT_FORMS,
    kv_bytes_per_token,
    parameters,
    split_bytes,
    tensor_parallel_bytes,
    weight_bytes,
    weights_table,
)
from headrace.core.spec import ModelSpec
from headrace.plan.calibration import Calibration, calibrate
from headrace.plan.cost import cost_per_million_tokens
from headrace.plan.devices import DEVICES, Device
from headrace.plan.document import Basis, Column, Document, Plot, Quantity, Series, Table
from headrace.plan.long_context import costs_plot, costs_table, place_of, published_table
from headrace.plan.room import Room, device_room, fewest, listed
from headrace.plan.speed import Precision, SheetSpeed, Speed, decode_work, prefill_work
from headrace.plan.subject import Subject

GIB = 2**30
ROOFLINE = "Williams 2009, Roofline; serving: Fu 2024, Challenges in Deploying Long-Context Transformers"
ALL_RANKS = (1, 2, 4, 6, 8)
MEASURED = ("ttft_s", "itl_s", "tokens_per_s", "peak_bytes")
"""What of a prediction is measured later: its names in the store of calibration."""
MOST_RANKS = 1024
MOST_REQUESTS = 65_536


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked of the model. Raises InvalidParameter."""

    prompt: int = 512
    """Tokens of each prompt."""
    output: int = 128
    """Tokens of each answer."""
    requests: int = 1
    """At the same time, over all replicas."""
    tp: int = 1
    pp: int = 1
    replicas: int = 1

    def __post_init__(self) -> None:
        for name, most in (("prompt", 2**24), ("output", 2**24), ("requests", MOST_REQUESTS)):
            check_count("concurrency" if name == "requests" else name, getattr(self, name), most)
        for name in ("tp", "pp", "replicas"):
            check_count(name, getattr(self, name), MOST_RANKS)

    @property
    def tokens(self) -> int:
        """Of a request, at its end."""
        return self.prompt + self.output

    @property
    def each(self) -> int:
        """Requests of the replica that has most."""
        return ceil(self.requests / self.replicas)

    @property
    def devices(self) -> int:
        return self.tp * self.pp * self.replicas


def check_count(field: str, value: object, most: int) -> None:
    """Raises InvalidParameter unless it is an integer from 1 to `most`."""
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise InvalidParameter(field, value, f"an integer from 1 to {most}")


@dataclass(frozen=True, slots=True)
class Prediction:
    """Of one replica with so many requests that come at the same time."""

    ttft_s: float
    """Of a request that is alone."""
    all_ttft_s: float
    """Until each of them has its first token."""
    itl_s: float
    """Between two tokens of an answer, all of them decoding, half of the answer written."""
    total_s: float
    """Until the last one is answered."""
    tokens_per_s: float
    """Of all answers."""


def predict(speed: Speed, spec: ModelSpec, kv_dtype: str, requests: int, prompt: int, output: int) -> Prediction:
    """TTFT = t(prefill); ITL = t(decode at prompt + output/2); throughput = B·output / (t(B prefills) + (output − 1)
    ITL): the first token comes of the prefill."""
    alone = speed.step_s(prefill_work(spec, 1, prompt, kv_dtype))
    everybody = speed.step_s(prefill_work(spec, requests, prompt, kv_dtype))
    itl = speed.step_s(decode_work(spec, requests, prompt + output // 2, kv_dtype))
    total = everybody + (output - 1) * itl
    return Prediction(alone, everybody, itl, total, requests * output / total)


# ---------------------------------------------------------------- sizes


def sizes(subject: Subject, question: Question, kv_dtype: str) -> Iterator[Quantity]:
    """Of the model itself, on whatever device."""
    spec, source = subject.spec, subject.source
    yield Quantity("parameters", parameters(spec), "", "Σ rows × columns of every weight", source)
    kv = kv_bytes_per_token(spec, kv_dtype)
    formula = "2 n h_k D e" + (" + a 32-bit scale for each key and value" if kv_dtype in ("int8", "fp8") else "")
    yield Quantity(f"KV cache per token ({kv_dtype})", kv, "B", formula, source)
    yield Quantity("FLOPs per token", token_flops(spec), "FLOP", "2 P_active, embedding left out", source)
    flops = prefill_flops(spec, question.prompt)
    yield Quantity(f"FLOPs of a prompt of {question.prompt}", flops, "FLOP", "2 P L + 2 n h D L² (causal)", source)
    if spec.vision is not None:
        formula = "2 P_tower patches + 4 n h D patches² + projector"
        yield Quantity("FLOPs of an image's tile", image_flops(spec), "FLOP", formula, source)
        rows = spec.vision.projector.tokens
        yield Quantity("tokens of an image's tile", rows, "", "rows that the projector gives", source)


def weights_by_precision(spec: ModelSpec, gpus: Sequence[int] = ALL_RANKS) -> Table:
    """The bytes on each of so many GPUs, layers dealt out or whole."""
    rows: list[list[str | int | float | None]] = []
    for form in WEIGHT_FORMS:
        for count in gpus:
            each = tensor_parallel_bytes(spec, form, count)
            largest = max(split_bytes(spec, form, count))
            shared = None if each is None else each / GIB
            rows.append([form, count, weight_bytes(spec, form) / GIB, shared, largest / GIB])
    columns = (
        Column("weights"),
        Column("GPUs"),
        Column("in all", "GiB", "Σ bytes of every weight", "core.sizing.weight_bytes"),
        Column("each, tensor parallel", "GiB", "rows or columns of each layer dealt out", "Megatron-LM, §3"),
        Column("most, whole layers", "GiB", "the first GPU has the vision side and half as many layers", "split_model"),
    )
    notes = [f"{form}: {text}" for form, text in WEIGHT_FORMS.items()]
    notes.append("–: the heads are not dealt out evenly to so many")
    return Table("Weights by precision and number of GPUs", columns, rows, notes, named_by=2)


# ---------------------------------------------------------------- on a device


@dataclass(frozen=True, slots=True)
class OnDevice:
    """A question about a device of the catalogue. Raises InvalidParameter."""

    subject: Subject
    device: Device
    held: Precision
    question: Question

    def __post_init__(self) -> None:
        spec, asked = self.subject.spec, self.question
        check_context(spec, asked)
        if asked.pp > len(spec.layers):
            raise InvalidParameter("pp", asked.pp, f"up to the model's {len(spec.layers)} layers")
        if asked.tp * asked.pp > 1 and self.device.peer_link is None:
            name = "tp" if asked.tp > 1 else "pp"
            raise InvalidParameter(name, getattr(asked, name), f"1 on {self.device.name}, which has no link to another")
        if self._room() is None:
            heads = sorted({(one.attention.heads, one.attention.kv_heads) for one in spec.layers})
            allowed = f"what divides the model's heads (of queries, of keys): {', '.join(map(str, heads))}"
            raise InvalidParameter("tp", asked.tp, allowed)

    def _room(self) -> Room | None:
        asked = self.question
        return device_room(self.subject.spec, self.device, self.held, asked.tp, asked.pp, asked.each, asked.tokens)

    @property
    def room(self) -> Room:
        found = self._room()
        assert found is not None
        return found

    @property
    def speed(self) -> SheetSpeed:
        return SheetSpeed(self.subject.spec, self.device, self.held, self.question.tp, self.question.pp)

    def predict(self, requests: int) -> Prediction:
        """Of a replica with so many requests."""
        asked = self.question
        return predict(self.speed, self.subject.spec, self.held.kv_dtype, requests, asked.prompt, asked.output)


def check_context(spec: ModelSpec, question: Question) -> None:
    """Raises InvalidParameter for requests longer than the model's context."""
    if question.tokens > spec.context:
        allowed = f"up to the model's context, {spec.context} tokens"
        raise InvalidParameter("prompt + output", question.tokens, allowed)


def document(
    subject: Subject, device: Device, held: Precision, question: Question, past: Mapping[str, Calibration] | None = None
) -> Document:
    """Of a model on a device of the catalogue. `past`: see `predicted`. Raises InvalidParameter."""
    case = OnDevice(subject, device, held, question)
    room, speed = case.room, case.speed
    running = min(question.each, room.requests(question.tokens)) or question.each
    found = case.predict(running)
    quantities = [*sizes(subject, question, held.kv_dtype), *_memory(case), *_ridge(case)]
    quantities += predicted(found, speed, question, running, subject.name, past or {})
    if device.price_per_hour is not None:
        rate = question.replicas * found.tokens_per_s
        dollars = cost_per_million_tokens(device.price_per_hour * question.devices, rate)
        price = f"$/h · 1e6 / (3600 · tokens/s), {question.devices} × ${device.price_per_hour:g}/h"
        quantities.append(Quantity("cost", dollars, "$ per million tokens", price, device.source, speed.basis))
    rates = "Data-sheet" if device.basis != "measured" else "The probe's"
    notes = [f"{rates} rates bound what can be: no step keeps to them. Times are at least so, throughput at most."]
    if room.requests(question.tokens) < question.each:
        notes.append(_short(case))
    return Document(
        title=f"{subject.name} on {question.devices} × {device.name}",
        quantities=quantities,
        tables=(weights_by_precision(subject.spec), what_fits(subject, held, question)),
        plots=tuple(_curve(case)),
        notes=notes,
        data={
            "model": subject.name,
            "device": device.name,
            "stages_bytes": list(room.stages),
            "weights_table": weights_table(subject.spec),
        },
    )


def with_long_context(
    answer: Document, subject: Subject, device: Device, held: Precision, question: Question
) -> Document:
    """The same answer with the four costs of a long context on one replica's devices, and the published example."""
    spec = subject.spec
    case = OnDevice(subject, device, held, question)
    count, room = question.tp * question.pp, case.room
    weights = sum(room.stages) * question.tp
    place = place_of(spec, device, held, weights, count * (room.memory - room.step), count)
    where = f"{subject.name} on {count} × {device.name}"
    tables = (*answer.tables, costs_table(spec, place, where), published_table())
    return replace(answer, tables=tables, plots=(*answer.plots, costs_plot(spec, place)))


def _short(case: OnDevice) -> str:
    room, asked = case.room, case.question
    if room.left <= 0:
        need = (room.weights + room.step) / GIB
        return f"It does not fit: weights and a step's results take {need:.1f} GiB of {room.memory / GIB:.1f} GiB."
    most = room.requests(asked.tokens)
    return f"Of {asked.each} requests of {asked.tokens} tokens, {most} fit a replica at a time: the others wait."


def _memory(case: OnDevice) -> Iterator[Quantity]:
    asked, room, source = case.question, case.room, "core.sizing, core.flops"
    how = f"most of its {asked.pp} stages ({listed(room.stages)} GiB)" if asked.pp > 1 else "Σ of every weight's share"
    split = f", TP {asked.tp} × PP {asked.pp}"
    yield Quantity(f"weights a device ({case.held.name}{split})", room.weights, "B", how, source)
    yield Quantity("KV cache per token a device", room.kv_per_token, "B", "KV per token of the stage / TP", source)
    note = "at most" + (", CUDA graphs included" if case.device.kind == "gpu" else "")
    yield Quantity("a step's results", room.step, "B", "widest layer + logits + parts of attention", source, note=note)
    used = room.used(asked.each, asked.tokens)
    formula = f"weights + step + {asked.each} × {asked.tokens} tokens of KV"
    yield Quantity("memory a device", used, "B", formula, source, note=f"of {case.device.memory_bytes:,} B")
    formula = "(memory − weights − step) / (KV per token · tokens of a request), a replica"
    most = room.requests(asked.tokens) * asked.replicas
    yield Quantity("concurrent requests at most", most, "", formula, case.device.source, case.device.basis)


def _ridge(case: OnDevice) -> Iterator[Quantity]:
    device, held = case.device, case.held
    dtype = held.compute_type(device)
    size = weight_bytes(case.subject.spec, held.form) * held.factor / parameters(case.subject.spec)
    rows = ridge_rows(device.flops[dtype], device.bandwidth, size)
    formula = f"peak / bandwidth · e / 2, {dtype}, e = {size:.3g} bytes a weight"
    yield Quantity("rows from which decode is compute-bound", rows, "", formula, ROOFLINE, device.basis)


def ridge_rows(flops: float, bandwidth: float, weight_size: float) -> float:
    """Rows of a decode batch from which arithmetic, and not reading the weights, takes longer."""
    return flops / bandwidth * weight_size / 2


def numbers(found: Prediction, peak_bytes: int | None = None) -> dict[str, float]:
    """A prediction by the names of `MEASURED`."""
    told = {"ttft_s": found.ttft_s, "itl_s": found.itl_s, "tokens_per_s": found.tokens_per_s}
    return told if peak_bytes is None else {**told, "peak_bytes": float(peak_bytes)}


def predicted(
    found: Prediction, speed: Speed, question: Question, running: int, model: str, past: Mapping[str, Calibration]
) -> Iterator[Quantity]:
    """`running`: requests that a replica runs at a time; `past`: of the same quantities on this device or machine, by
    their names in `numbers`."""

    def corrected(name: str, quantity: Quantity) -> Quantity:
        return calibrate(quantity, past[name], model) if name in past else quantity

    how: tuple[str, Basis] = (speed.source, speed.basis)
    step = speed.formula
    formula = f"{step}; a prompt of {question.prompt} tokens, alone"
    yield corrected("ttft_s", Quantity("TTFT", found.ttft_s, "s", formula, *how))
    if running > 1:
        yield Quantity(f"TTFT, {running} at once", found.all_ttft_s, "s", f"{step}; all prompts", *how)
    formula = f"{step}; a token of each request at {question.prompt + question.output // 2} tokens"
    yield corrected("itl_s", Quantity(f"ITL, {running} at once", found.itl_s, "s", formula, *how))
    rate = question.replicas * found.tokens_per_s
    formula = "replicas · B · output / (t(prefills) + (output − 1) · ITL)"
    name = f"throughput, {min(question.requests, running * question.replicas)} at once"
    yield corrected("tokens_per_s", Quantity(name, rate, "tokens/s", formula, *how))


def ladder(most: int) -> list[int]:
    """1, 2, 4 … and `most`."""
    steps = [1]
    while steps[-1] * 2 <= most:
        steps.append(steps[-1] * 2)
    return steps if steps[-1] == most else [*steps, most]


def _curve(case: OnDevice) -> Iterator[Plot]:
    most = min(MOST_REQUESTS, case.room.requests(case.question.tokens))
    if most < 1:
        return
    replicas = case.question.replicas
    points = [(float(one * replicas), case.predict(one)) for one in ladder(most)]
    yield from curves(points, replicas)


def curves(points: Sequence[tuple[float, Prediction]], replicas: int) -> Iterator[Plot]:
    """`points`: (requests at the same time, what a replica does with its share of them)."""
    rates = [(count, replicas * one.tokens_per_s) for count, one in points]
    gaps = [(count, 1000 * one.itl_s) for count, one in points]
    title = "Throughput against concurrency"
    yield Plot(title, "requests at once", "tokens/s", (Series("predicted", rates),), log_x=True, log_y=True)
    title = "Inter-token latency against concurrency"
    yield Plot(title, "requests at once", "ITL, ms", (Series("predicted", gaps),), log_x=True, log_y=True)


def what_fits(subject: Subject, held: Precision, question: Question) -> Table:
    """Every device of the catalogue: the fewest of them that hold the model and a replica's requests."""
    rows: list[list[str | int | float | None]] = []
    for device in DEVICES.values():
        try:
            there = replace(held, dtype=_nearest(held, device))
            there.compute_type(device)
            found = fewest(subject.spec, device, there, question.each, question.tokens)
        except InvalidParameter:
            found = None
        if found is None:
            rows.append([device.name, device.memory_bytes / GIB, *[None] * 8])
            continue
        tp, pp, room = found
        speed = SheetSpeed(subject.spec, device, there, tp, pp)
        each = predict(speed, subject.spec, there.kv_dtype, question.each, question.prompt, question.output)
        price = None
        if device.price_per_hour is not None:
            price = cost_per_million_tokens(tp * pp * device.price_per_hour, each.tokens_per_s)
        most = room.requests(question.tokens)
        size = room.used(question.each, question.tokens) / GIB
        memory = device.memory_bytes / GIB
        rows.append([device.name, memory, tp, pp, size, most, each.ttft_s, 1000 * each.itl_s, each.tokens_per_s, price])
    best = "max(bytes / bandwidth, FLOPs / peak)"
    columns = (
        Column("device"),
        Column("memory", "GiB", "by data sheet", "plan.devices"),
        Column("TP", "", "fewest of 1, 2, 4, 8", "plan.room"),
        Column("PP", "", "fewest of 1, 2, 4, 8", "plan.room"),
        Column("used a device", "GiB", "weights + step + KV", "core.sizing"),
        Column("requests at most", "", "(memory − weights − step) / KV of a request", "plan.room"),
        Column("TTFT", "s", best, ROOFLINE),
        Column("ITL", "ms", best, ROOFLINE),
        Column("throughput", "tokens/s", "B · output / (t(prefills) + (output − 1) · ITL)", ROOFLINE),
        Column("cost", "$/Mtoken", "$/h · 1e6 / (3600 · tokens/s)", "plan.devices"),
    )
    title = (
        f"What fits where: {question.each} × {question.tokens} tokens, {held.name} weights, {held.kv_dtype} KV cache"
    )
    notes = (
        "Bounds by data sheet, one replica. –: 8 × 8 of them do not hold it, or it has no type or link for it.",
        "A device without bfloat16 computes in float16. On a GPU, 90 % of the memory is counted.",
    )
    return Table(title, columns, rows, notes)


def _nearest(held: Precision, device: Device) -> str:
    """Its own dtype, or the other one of 16 bits where the device has no units for it."""
    other = {"bfloat16": "float16", "float16": "bfloat16"}.get(held.dtype, held.dtype)
    return held.dtype if held.dtype in device.flops or other not in device.flops else other
