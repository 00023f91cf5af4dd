"""Stage decode: one request of Llama-2-7B's shape against the bytes that its tokens must read, prompts against the
matmul rate, both measured in the same run; forms of weights; Python's share; a trace; what batch invariance costs."""

from __future__ import annotations

from statistics import median

import torch
from benchmarks.gpu_check.bench import Bench
from benchmarks.gpu_check.clock import copy_bandwidth, fp8_matmul_rate, matmul_rate, read_bandwidth
from benchmarks.gpu_check.engine import Engine, Model, llama, per_token, prompts
from benchmarks.gpu_check.rows import Case, Figure, Target
from benchmarks.gpu_check.trace import step_times, traced

ROUNDS = 5
SHORT, LONG, ANSWER = 128, 3584, 256
"""Tokens of the prompts and of the answers that are timed."""
PREFILL = (8, 2048)
STEP_TOKENS = 8192
TRACED = 48
"""Steps in the trace."""
FORMS = {"bf16": 0.85, "fp8": 0.75, "int4": 0.75}
"""Form of the weights -> the share of the bytes' bound that must be reached."""


def cases(bench: Bench) -> list[Case]:
    return [
        *_ceilings(bench),
        _decode(bench, "bf16", SHORT),
        _decode(bench, "bf16", LONG),
        Case(
            "prefill 8 × 2048, bf16",
            "first tokens of eight prompts; ratio: of the measured bf16 matmul rate",
            lambda: _prefill(bench),
            Target(0.60),
            20,
        ),
        Case(
            "Python between steps, bf16, batch 1",
            "share of a step's time in which the device idles between one replayed graph and the next",
            lambda: _overhead(bench),
            Target(0.03, most=True),
            15,
        ),
        _invariant(bench, "decode"),
        _invariant(bench, "prefill"),
        _decode(bench, "fp8", SHORT),
        _decode(bench, "int4", SHORT),
    ]


def _ceilings(bench: Bench) -> list[Case]:
    clock = bench.clock
    return [
        Case(
            "read bandwidth",
            "a reduction over 2 GiB, the fastest of four",
            lambda: Figure([one / 1e9 for one in read_bandwidth(clock)], "GB/s"),
        ),
        Case(
            "copy bandwidth",
            "2 GiB to another place, bytes read + written",
            lambda: Figure([one / 1e9 for one in copy_bandwidth(clock)], "GB/s"),
        ),
        Case(
            "matmul rate, bf16",
            "8192³ by the library, random numbers",
            lambda: Figure([one / 1e12 for one in matmul_rate(clock, torch.bfloat16)], "TFLOP/s"),
        ),
        Case(
            "matmul rate, fp8",
            "8192³ by torch._scaled_mm, a scale a row",
            lambda: Figure([one / 1e12 for one in fp8_matmul_rate(clock)], "TFLOP/s"),
        ),
    ]


# ---------------------------------------------------------------- one request


def engine(bench: Bench, form: str, batch_invariant: bool = False) -> tuple[Engine, Model]:
    model = llama(bench.dry, form)
    rows, tokens, longest = (2, 64, 64) if bench.dry else (8, STEP_TOKENS, LONG + ANSWER + 16)

    def make() -> Engine:
        return Engine(
            model,
            bench.dry,
            rows=rows,
            tokens=tokens,
            longest=longest,
            seed=bench.seed,
            batch_invariant=batch_invariant,
            interpreted=form != "bf16",
        )

    return bench.engine(f"{form}, invariant {batch_invariant}", make), model


def _decode(bench: Bench, form: str, prompt: int) -> Case:
    context = "" if prompt == SHORT else f" behind {prompt} tokens"
    return Case(
        f"decode {form}, one request{context}",
        f"time a token, {prompt} + {ANSWER} tokens; bound: bytes of weights and KV ÷ read bandwidth",
        lambda: _decode_figure(bench, form, prompt),
        Target(FORMS[form]),
        35,
    )


def _decode_figure(bench: Bench, form: str, prompt: int) -> Figure:
    running, model = engine(bench, form)
    samples = decode_samples(bench, running, prompt)
    prompt, answer = _lengths(bench, prompt)
    read = model.read_bytes + model.kv_bytes * (prompt + answer / 2)
    bound_s = read / bench.read_Bps
    memory = dict(running.backend.memory())
    return Figure(
        [1e3 * one for one in samples],
        "ms",
        1e3 * bound_s,
        bound_s / median(samples),
        f"{read / 1e9:.2f} GB a token at {bench.read_Bps / 1e9:.0f} GB/s; loaded in {running.load_s:.1f} s",
        {"memory": memory, "explain": running.backend.explain()},
    )


def decode_samples(bench: Bench, running: Engine, prompt: int) -> list[float]:
    """Seconds a token of one request, a round each; the first round warms up."""
    prompt, answer = _lengths(bench, prompt)
    asked = prompts(1 if bench.dry else ROUNDS + 1, prompt, running.model.spec.vocab_size, bench.seed)
    found = [per_token(running.run([one], [answer])) for one in asked]
    return found if bench.dry else found[1:]


def _lengths(bench: Bench, prompt: int) -> tuple[int, int]:
    return (min(prompt // 16, 40), 3) if bench.dry else (prompt, ANSWER)


# ---------------------------------------------------------------- prompts


def _prefill(bench: Bench) -> Figure:
    running, model = engine(bench, "bf16")
    samples = prefill_samples(bench, running)
    count, length = _prefill_sizes(bench)
    flops = model.prefill_flops(count, length)
    rate = flops / median(samples)
    tokens = count * length / median(samples)
    return Figure(
        [1e3 * one for one in samples],
        "ms",
        1e3 * flops / bench.matmul_flops,
        rate / bench.matmul_flops,
        f"{rate / 1e12:.0f} of {bench.matmul_flops / 1e12:.0f} TFLOP/s; {tokens:.0f} tokens/s",
    )


def prefill_samples(bench: Bench, running: Engine) -> list[float]:
    """Seconds from all prompts' arrival to the last first token."""
    count, length = _prefill_sizes(bench)
    rounds = 1 if bench.dry else ROUNDS
    asked = prompts(count * (rounds + 1), length, running.model.spec.vocab_size, bench.seed)
    parts = [asked[count * i : count * (i + 1)] for i in range(rounds + 1)]
    return [running.run(part, [1] * count).seconds for part in parts][1:]


def _prefill_sizes(bench: Bench) -> tuple[int, int]:
    return (2, 16) if bench.dry else PREFILL


def _invariant(bench: Bench, what: str) -> Case:
    return Case(
        f"batch-invariant {what}, bf16",
        "the same with every answer's bits independent of the batch; ratio: its time ÷ the ordinary one's",
        lambda: _invariant_figure(bench, what),
        None,
        35 if what == "decode" else 10,
    )


def _invariant_figure(bench: Bench, what: str) -> Figure:
    plain_name = "prefill 8 × 2048, bf16" if what == "prefill" else "decode bf16, one request"
    running, _ = engine(bench, "bf16", batch_invariant=True)
    samples = prefill_samples(bench, running) if what == "prefill" else decode_samples(bench, running, SHORT)
    plain = bench.report.samples(plain_name)
    ratio = 1e3 * median(samples) / median(plain) if plain else None
    note = f"against {median(plain):.3f} ms" if plain else f"no time of {plain_name!r} to compare with"
    return Figure([1e3 * one for one in samples], "ms", None, ratio, note)


# ---------------------------------------------------------------- Python's share


def _overhead(bench: Bench) -> Figure:
    """How long nothing runs on the device between one replay and the next, of the time of a step without a profiler.
    The profiler slows Python down: what it shows is at least what there is."""
    running, _ = engine(bench, "bf16")
    wall_s = median(decode_samples(bench, running, SHORT))
    _, answer = _lengths(bench, SHORT)
    answer = min(answer, TRACED)
    middle = SHORT + (ANSWER - TRACED) // 2  # the steps are as long as those that are timed, on average
    asked = prompts(1, _lengths(bench, middle)[0], running.model.spec.vocab_size, bench.seed + 1)
    path = bench.out / "decode_trace.json.gz"
    events = traced(lambda: running.run(asked, [answer]), path, bench.dry)
    found = step_times(events)
    if found is None:
        if bench.dry:
            return Figure([], "share", None, None, f"no device in the trace; {path.name}")
        raise RuntimeError("the trace shows no replayed graph: the time of a step on the device is not known")
    share = found.idle_s / wall_s
    return Figure(
        [share],
        "share",
        None,
        share,
        f"idle {1e6 * found.idle_s:.1f} µs between replays (n {found.count}, under the profiler); a step takes "
        f"{1e3 * wall_s:.3f} ms without it, a replay {1e3 * found.span_s:.3f} ms with it; trace: {path.name}",
        {"replay_ms": 1e3 * found.span_s, "idle_us": 1e6 * found.idle_s, "step_ms": 1e3 * wall_s},
    )
