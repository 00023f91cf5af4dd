"""What a model takes and does on a machine that was probed, with the native backend."""

from __future__ import annotations

from collections.abc import Mapping

from headrace.core.errors import ConfigError, InvalidParameter
from headrace.core.resolve import CPU_MAX_NUM_SEQS
from headrace.core.sizing import weights_table
from headrace.plan.calibration import Calibration, calibrate
from headrace.plan.document import Column, Document, Quantity, Table, Value
from headrace.plan.model import (
    GIB,
    Question,
    check_context,
    curves,
    ladder,
    predict,
    predicted,
    sizes,
    weights_by_precision,
    what_fits,
)
from headrace.plan.profile import Profile
from headrace.plan.room import native_peak
from headrace.plan.speed import Precision, ProbedSpeed, Weights, decode_work, prefill_work
from headrace.plan.subject import Subject

KV_DTYPES = ("float32", "bfloat16", "int8")
"""That the native backend has."""


def probed_document(
    subject: Subject,
    profile: Profile,
    weights: Weights,
    kv_dtype: str,
    question: Question,
    past: Mapping[str, Calibration] | None = None,
) -> Document:
    """`past`: see `model.predicted`. Raises ConfigError, InvalidParameter."""
    past = past or {}
    spec = subject.spec
    if spec.vision is not None:
        raise ConfigError(f"{subject.name} reads images, which the native backend does not: allowed: --device NAME")
    if question.devices > 1:
        raise InvalidParameter("tp · pp · replicas", question.devices, "1 on a probed machine; or --device NAME")
    if kv_dtype not in KV_DTYPES:
        raise InvalidParameter("kv_dtype", kv_dtype, f"{', '.join(KV_DTYPES)} on a probed machine")
    check_context(spec, question)
    running = min(question.requests, CPU_MAX_NUM_SEQS)
    asked = (running, question.prompt, question.output)
    machine, speed = profile.machine, ProbedSpeed(spec, weights, profile, kv_dtype)
    found = predict(speed, spec, kv_dtype, *asked)
    peak = native_peak(spec, weights, kv_dtype, *asked, subject.has_text)
    total = sum(peak.values())
    memory = _memory(peak)
    if "peak_bytes" in past:
        memory = calibrate(memory, past["peak_bytes"], subject.name)
    quantities = [
        *sizes(subject, question, kv_dtype),
        Quantity("weights in memory", weights.nbytes, "B", "numbers · bits as kept / 8", "core.sizing.NATIVE_BITS"),
        memory,
        *predicted(found, speed, question, running, subject.name, past),
    ]
    notes = [f"The profile is {profile.verdict}."]
    if total > machine.memory_bytes:
        notes.append(f"It does not fit: {total / GIB:.1f} GiB of {machine.memory_bytes / GIB:.1f} GiB.")
    if running < question.requests:
        notes.append(f"Of {question.requests} requests, {running} run at a time: the others wait.")
    points = [(float(one), predict(speed, spec, kv_dtype, one, *asked[1:])) for one in ladder(CPU_MAX_NUM_SEQS)]
    elsewhere = what_fits(subject, Precision(kv_dtype=kv_dtype), question)
    return Document(
        title=f"{subject.name} on {machine.cpu}",
        quantities=quantities,
        tables=(_parts(speed, question, running), weights_by_precision(spec), elsewhere),
        plots=tuple(curves(points, 1)),
        notes=notes,
        data={"model": subject.name, "machine": machine.cpu, "peak_bytes": peak, "weights_table": weights_table(spec)},
    )


def _memory(peak: Mapping[str, int]) -> Quantity:
    text = "MiB: " + " + ".join(f"{name.replace('_', ' ')} {size / 2**20:.1f}" for name, size in peak.items())
    formula = "process + tokenizer + weights + a step's results + KV cache of every request in whole blocks"
    return Quantity(
        "peak memory", sum(peak.values()), "B", formula, "core.sizing, plan.room", basis="measured", note=text
    )


def _parts(speed: ProbedSpeed, question: Question, running: int) -> Table:
    """Where the time of a step goes."""
    half = question.prompt + question.output // 2
    prompt = speed.parts_s(prefill_work(speed.spec, 1, question.prompt, speed.kv_dtype))
    token = speed.parts_s(decode_work(speed.spec, running, half, speed.kv_dtype))
    formulas: Mapping[str, str] = {
        "layers": "2 · weights met · tokens / measured rate of such products",
        "head": "2 · V · d · rows of logits / measured rate",
        "attention": "prompt: FLOPs / measured rate; decode: bytes of keys and values / measured rate",
        "rows": "numbers normed, rotated, rounded · measured time of one",
        "operations": "operations · measured time of one + 3 × an empty step",
    }
    rows: list[list[Value]] = [[name, 1000 * prompt[name], 1000 * token[name], formulas[name]] for name in prompt]
    columns = (
        Column("part"),
        Column(f"prompt of {question.prompt}", "ms", speed.formula, speed.source),
        Column(f"decode of {running}", "ms", speed.formula, speed.source),
        Column("formula"),
    )
    return Table("Where the time of a step goes", columns, rows)
