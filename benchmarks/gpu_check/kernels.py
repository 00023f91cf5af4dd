"""Stage kernels: every kernel of headrace.backends.torch.kernels and every form of weights against float64 on fresh
random inputs, in all types, and its time by replays of CUDA graphs on cold caches, beside the library's.

Shapes are Llama-2-7B's and others' true ones, and odd ones. What must be reached of the bytes' or the operations' time
stands in the rows. Right comes first, fast after it: time may end."""

from __future__ import annotations

from benchmarks.gpu_check import kernel_attention, kernel_experts, kernel_linear, kernel_sampling, kernel_small
from benchmarks.gpu_check.bench import Bench
from benchmarks.gpu_check.rows import Case

PARTS = (kernel_linear, kernel_attention, kernel_sampling, kernel_small, kernel_experts)


def cases(bench: Bench) -> list[Case]:
    found = [case for part in PARTS for case in part.cases(bench)]
    return sorted(found, key=lambda case: case.name.endswith(": fast"))
