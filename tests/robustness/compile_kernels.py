"""Every kernel that steps of the GPU backend launch is compiled for real cards, with none there.

Steps are run on the CPU with Triton's compiler in place of its launcher: each launch compiles its kernel, for the very
arguments that it would have on a GPU, down to machine code, and computes nothing. What is printed of each: registers,
bytes of stack (spilled registers among them), shared memory.

    python -m tests.robustness.compile_kernels [--capabilities 80 90] [--quick]
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from headrace.backends.base import BackendOptions
from headrace.backends.torch.gpu import loaded as gpu_loaded
from headrace.backends.torch.gpu.backend import GpuBackend
from headrace.backends.torch.kernels.matmul import Card
from headrace.core.types import SamplingParams
from headrace.models.registry import describe
from headrace.parallel.mesh import Mesh
from headrace.testing.checkpoints import tiny_checkpoint
from headrace.testing.driver import Driver
from headrace.weights.checkpoint import open_checkpoint
from headrace.weights.loader import stream

SHARED_KIB: Mapping[int, int] = {80: 163, 90: 227}
"""Most shared memory of one program (CUDA C++ Programming Guide, technical specifications)."""
MOST_STACK = 64
"""Bytes a thread: a few registers at the edges of a kernel."""
WIDE = {
    "hidden_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "intermediate_size": 1024,
    "num_hidden_layers": 1,
}


@dataclass(frozen=True, slots=True)
class Case:
    architecture: str = "llama"
    config: Mapping[str, Any] = field(default_factory=lambda: WIDE)
    options: Mapping[str, Any] = field(default_factory=dict)


CASES: Mapping[str, Case] = {
    "plain": Case(),
    "invariant": Case(options={"batch_invariant": True}),
    "int4": Case(options={"quant": "int4"}),
    "int8": Case(options={"quant": "int8"}),
    "fp8": Case(options={"quant": "fp8", "kv_dtype": "fp8"}),
    "float16": Case(options={"dtype": "float16", "kv_dtype": "float16"}),
    "float32": Case(options={"dtype": "float32", "kv_dtype": "float32"}),
    "gemma3": Case("gemma3", WIDE | {"head_dim": 256}),
    "gptj": Case("gptj", {}),
    "mixtral": Case("mixtral", WIDE | {"num_local_experts": 4, "num_experts_per_tok": 2}),
}
QUICK = ("plain", "int4", "fp8")


class NoDriver:
    """What Triton's compiler asks of a device that is not there."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_only(found: dict[str, Any]) -> Callable[[Any, Any], Callable[..., None]]:
    """In place of `kernel[grid]`. `found`: name and hash -> what was compiled."""

    def launched(kernel: Any, grid: Any) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            if "ASM" in kwargs:  # instructions of the GPU's own, which a CPU's tensors do not ask for
                kwargs["ASM"] = args[0].dtype != torch.float32
            made = kernel.run(*args, grid=grid, warmup=True, **kwargs)
            found[f"{kernel.fn.__name__} {made.hash[:8]}"] = made

        return launch

    return launched


def steps(case: Case, folder: Path) -> None:
    """A prompt, a decode step, one of several rows, and one that samples."""
    path = tiny_checkpoint(folder, case.architecture, **case.config)
    source = open_checkpoint(path)
    description = describe(source.config, source.format, source.shapes())
    sizes = {"dtype": "bfloat16", "kv_dtype": "bfloat16", "threads": 1, "block_size": 16, "num_blocks": 64}
    limits = {"max_rows": 16, "max_tokens": 256, "max_model_len": 512}
    backend = GpuBackend("cpu")
    options = BackendOptions(**(sizes | limits | dict(case.options)))
    rows = Driver(backend, backend.load(description.spec, stream(source, description.weight_map), options, Mesh()))
    prompt = [int(i) for i in np.random.default_rng(0).integers(3, 90, 100)]
    first = rows.admit(prompt)
    rows.run(rows.span(first, len(prompt)))
    rows.run(rows.span(first, 1))
    others = [rows.admit(prompt[:40], SamplingParams(temperature=1.0, seed=1, top_p=0.9)) for _ in range(3)]
    rows.run(rows.span(first, 1), *(rows.span(row, 40) for row in others))
    rows.run(*(rows.span(row, 1) for row in (first, *others)))


def resources(cubin: bytes, tool: str) -> Iterator[tuple[str, int]]:
    """Of the program in the machine code, as CUDA's own tool says it."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    for name, number in re.findall(r"(REG|STACK):(\d+)", text):
        yield name, int(number)


def _always(card: Card, _: torch.device) -> Card:
    return card


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capabilities", type=int, nargs="+", default=sorted(SHARED_KIB), choices=sorted(SHARED_KIB))
    parser.add_argument("--quick", action="store_true", help=f"of the cases only {', '.join(QUICK)}")
    arguments = parser.parse_args()
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set: kernels would be interpreted, not compiled")
    tool = str(Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump")
    failed = False
    for capability in arguments.capabilities:
        driver.set_active(NoDriver(capability))
        card = Card((capability // 10, capability % 10), 132)
        gpu_loaded.card_of = partial(_always, card)
        found: dict[str, Any] = {}
        JITFunction.__getitem__ = compile_only(found)
        for name in QUICK if arguments.quick else CASES:
            if CASES[name].options.get("quant") == "fp8" and capability < 89:
                continue
            with tempfile.TemporaryDirectory() as folder:
                steps(CASES[name], Path(folder))
        for name, made in sorted(found.items()):
            usage = dict(resources(made.asm["cubin"], tool))
            shared = made.metadata.shared / 1024
            bad = usage["STACK"] > MOST_STACK or shared > SHARED_KIB[capability]
            failed |= bad
            print(
                f"sm_{capability}  {name:38} {usage['REG']:4} registers {usage['STACK']:5} B of stack "
                f"{shared:6.1f} KiB shared{'   TOO MUCH' if bad else ''}",
                flush=True,
            )
        print(f"sm_{capability}: {len(found)} kernels compiled", flush=True)
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
