"""How far `headrace plan model` is off on this machine: it probes, predicts, measures with the engine, prints errors.

    python -m benchmarks.plan_accuracy [--models demo,0.3b,0.5b] [--profile FILE] [--repeats 5] [--json FILE] [--store]

Models: demo (4-bit codes as stored), and two shapes with random weights, made in a temporary folder (1.1 GB at most):
0.3b, rounded to int4 at load, and 0.5b, rounded to int8. Each runs in a process of its own: 32 requests at once, after
which its peak memory is read; then 32 at once and one alone by turns, medians. The probe comes right before, so that
both see the same machine; nothing else should run on it. --store keeps the pairs where `headrace plan --accuracy` finds
them.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from benchmarks.machine_speed import wait_for_quiet

from headrace.cli.console import state_folder
from headrace.core.sizing import blocks_for, kv_bytes_per_block
from headrace.core.types import SamplingParams
from headrace.engine.hardware import peak_rss_bytes
from headrace.engine.llm import LLM
from headrace.plan.calibration import Context, Store, default_path, machine_key, record_run
from headrace.plan.model import numbers, predict
from headrace.plan.profile import Profile, read_profile
from headrace.plan.room import BLOCK, LANES, native_peak
from headrace.plan.speed import ProbedSpeed, native_weights
from headrace.plan.subject import read_subject
from headrace.weights.qtensor import QTensor
from headrace.weights.safetensors_writer import write_safetensors

STREAMS = 32
PROMPT, MANY_PROMPT, OUTPUT = 256, 64, 48
"""Tokens of the prompt that is alone, of each of many, and of every answer."""
KV_DTYPE = "bfloat16"
ALONE = 3
"""Runs of one request after each of many: they are short, and are spread over the same seconds."""
SEED = 11
LIMITS: Mapping[str, float] = {"ttft_s": 0.20, "itl_s": 0.20, "tokens_per_s": 0.20, "peak_bytes": 0.05}
QUIET_S, QUIET_CORES = 60.0, 0.3
STORED = "stored"


@dataclass(frozen=True, slots=True)
class Case:
    """A model and how its weights are kept."""

    name: str
    quant: str = STORED
    sizes: Mapping[str, int] | None = None
    """Of a Llama with random weights, in config.json's words; None: `name` is a model."""


SHAPES: Sequence[Case] = (
    Case("demo"),
    Case(
        "0.3b",
        "int4",
        {"hidden_size": 1024, "num_hidden_layers": 22, "num_attention_heads": 16, "num_key_value_heads": 4,
         "intermediate_size": 3072, "vocab_size": 32_000},
    ),
    Case(
        "0.5b",
        "int8",
        {"hidden_size": 1280, "num_hidden_layers": 24, "num_attention_heads": 20, "num_key_value_heads": 5,
         "intermediate_size": 4096, "vocab_size": 32_000},
    ),
)  # fmt: skip


def make_checkpoint(folder: Path, sizes: Mapping[str, int]) -> Path:
    """A Llama of these sizes in bfloat16, head and embedding tied."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "eos_token_id": 2,
        **sizes,
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    write_safetensors(folder / "model.safetensors", dict(_tensors(sizes)))
    return folder


def _tensors(sizes: Mapping[str, int]) -> Iterator[tuple[str, QTensor]]:
    hidden, inner = sizes["hidden_size"], sizes["intermediate_size"]
    keys = hidden // sizes["num_attention_heads"] * sizes["num_key_value_heads"]
    block = np.random.default_rng(SEED).standard_normal(1 << 20, np.float32) * np.float32(0.02)
    bits = (block.view(np.uint32) >> np.uint32(16)).astype(np.uint16)

    def weight(rows: int, columns: int) -> QTensor:
        return QTensor("bf16", (rows, columns), {"data": np.resize(bits, (rows, columns))})

    def norm() -> QTensor:
        return QTensor.from_array(np.ones(hidden, np.float32))

    yield "model.embed_tokens.weight", weight(sizes["vocab_size"], hidden)
    yield "model.norm.weight", norm()
    for index in range(sizes["num_hidden_layers"]):
        layer = f"model.layers.{index}."
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"{layer}{name}.weight", norm()
        for name, rows, columns in (
            ("self_attn.q_proj", hidden, hidden),
            ("self_attn.k_proj", keys, hidden),
            ("self_attn.v_proj", keys, hidden),
            ("self_attn.o_proj", hidden, hidden),
            ("mlp.gate_proj", inner, hidden),
            ("mlp.up_proj", inner, hidden),
            ("mlp.down_proj", hidden, inner),
        ):
            yield f"{layer}{name}.weight", weight(rows, columns)


# ---------------------------------------------------------------- measuring


def measure(model: str, quant: str, repeats: int) -> dict[str, float]:
    """In this process, which should have done nothing else."""
    generator = random.Random(SEED)
    # A cache that 32 requests fill: its memory is found by the first of them, and not by each that is timed.
    blocks = STREAMS * blocks_for(MANY_PROMPT + OUTPUT, BLOCK) + 1
    size = blocks * kv_bytes_per_block(read_subject(model).spec, KV_DTYPE, BLOCK, LANES)
    settings = {"backend": "native", "prefix_cache": False, "kv_cache_mib": -(-size // 2**20)}
    with LLM(model, quant=quant, kv_dtype=KV_DTYPE, max_model_len=512, **settings) as llm:
        vocab = llm.opened.spec.vocab_size

        def ids(count: int) -> list[int]:
            return [generator.randrange(100, vocab - 100) for _ in range(count)]

        sampling = SamplingParams(max_tokens=OUTPUT, temperature=0.0, ignore_eos=True)

        def run(count: int, tokens: int) -> tuple[float, float, float]:
            """(TTFT, ITL, tokens/s)"""
            began = time.perf_counter()
            answers = llm.generate([ids(tokens) for _ in range(count)], sampling, progress=False)
            seconds = time.perf_counter() - began
            ttft, rate = answers[0].ttft_s, answers[0].decode_tokens_per_s
            assert ttft is not None and rate is not None
            return ttft, 1 / rate, count * OUTPUT / seconds

        run(STREAMS, MANY_PROMPT)
        peak = peak_rss_bytes()
        run(1, PROMPT)
        many: list[tuple[float, float, float]] = []
        alone: list[tuple[float, float, float]] = []
        for _ in range(repeats):
            many.append(run(STREAMS, MANY_PROMPT))
            alone += [run(1, PROMPT) for _ in range(ALONE)]
    return {
        "ttft_s": median(one[0] for one in alone),
        "itl_s": median(one[1] for one in alone),
        "tokens_per_s": median(one[2] for one in many),
        "peak_bytes": float(peak),
    }


def measured_apart(model: str, quant: str, repeats: int) -> dict[str, float]:
    """By a process of its own."""
    command = [sys.executable, "-m", "benchmarks.plan_accuracy", "--measure", model, quant, "--repeats", str(repeats)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


# ---------------------------------------------------------------- predicting


def foretold(model: str, quant: str, profile: Profile) -> dict[str, float]:
    """What `headrace plan model` says of the same runs."""
    subject = read_subject(model)
    weights = native_weights(subject, quant)
    speed = ProbedSpeed(subject.spec, weights, profile, KV_DTYPE)
    alone = predict(speed, subject.spec, KV_DTYPE, 1, PROMPT, OUTPUT)
    many = predict(speed, subject.spec, KV_DTYPE, STREAMS, MANY_PROMPT, OUTPUT)
    peak = native_peak(subject.spec, weights, KV_DTYPE, STREAMS, MANY_PROMPT, OUTPUT, subject.has_text)
    return {**numbers(alone, sum(peak.values())), "tokens_per_s": many.tokens_per_s}


def probe(path: Path) -> Profile:
    """By the command, in a process of its own."""
    subprocess.run(
        [sys.executable, "-m", "headrace.cli.main", "plan", "probe", "--profile", str(path), "--json"],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return read_profile(path)


def compare(case: Case, profile: Profile | None, repeats: int, folder: Path) -> dict[str, Any]:
    """One model's figures; `profile` None: a probe right before."""
    model = case.name if case.sizes is None else str(make_checkpoint(folder, case.sizes))
    wait_for_quiet(QUIET_CORES, time.monotonic() + QUIET_S)
    found = profile or probe(folder / "probe.json")
    measured = measured_apart(model, case.quant, repeats)
    said = foretold(model, case.quant, found)
    errors = {name: said[name] / measured[name] - 1 for name in LIMITS}
    machine = machine_key(found.machine.cpu, found.machine.threads)
    return {
        "model": f"{case.name}, {case.quant}",
        "machine": machine,
        "profile": found.verdict,
        "predicted": said,
        "measured": measured,
        "errors": errors,
        "within": {name: abs(error) <= LIMITS[name] for name, error in errors.items()},
    }


def show(row: Mapping[str, Any]) -> None:
    print(f"{row['model']}: {row['profile']}")
    for name, limit in LIMITS.items():
        said, measured, error = row["predicted"][name], row["measured"][name], row["errors"][name]
        verdict = "within" if row["within"][name] else "NOT within"
        print(
            f"  {name:<13} predicted {said:>12.6g}  measured {measured:>12.6g}  {error:>+7.1%}  {verdict} {limit:.0%}"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(case.name for case in SHAPES))
    parser.add_argument("--profile", type=Path)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--store", action="store_true")
    parser.add_argument("--measure", nargs=2, metavar=("MODEL", "QUANT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure is not None:
        model, quant = arguments.measure
        print(json.dumps(measure(model, quant, arguments.repeats)))
        return 0
    wanted = arguments.models.split(",")
    known = {case.name: case for case in SHAPES}
    if unknown := [name for name in wanted if name not in known]:
        parser.error(f"--models: got {unknown[0]!r}, allowed: {', '.join(known)}")
    profile = None if arguments.profile is None else read_profile(arguments.profile)
    rows = []
    for name in wanted:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(compare(known[name], profile, arguments.repeats, Path(folder)))
        show(rows[-1])
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    state = state_folder(os.environ)
    if arguments.store and state is not None:
        store = Store(default_path(state))
        for row in rows:
            name = row["model"].removesuffix(f", {STORED}")  # as compare calls it
            record_run(store, row["predicted"], row["measured"], Context(row["machine"], name, "benchmark"))
    return 0 if all(all(row["within"].values()) for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
