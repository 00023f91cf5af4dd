"""What a CUDA device does in fact: bandwidth and matrix rates measured here and now, and the kernels that will run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from statistics import median
from typing import Any

import torch

BUFFER_BYTES = 2**30
"""Far more than any L2 cache holds."""
SIDE = 8192
"""Rows and columns of the matrices that are multiplied."""
RUNS = 15
SECONDS = 0.25
"""Most for one figure, warm-up left out."""
FP8_CARD = (8, 9)
BFLOAT16_CARD = (8, 0)
ATTENTION_PACKAGES: Mapping[str, str] = {"flashinfer": "FlashInfer", "flash_attn": "flash-attn"}
"""Module -> name."""


def card_report(device: int = 0) -> dict[str, Any]:
    """The first CUDA device, measured in under 3 s: name, capability, memory_bytes, copy_GBps (bytes read and written),
    read_GBps, matmul_TFLOPs (type -> rate of a square product of `SIDE` on random data), kernels.

    A figure is the median of several runs; None: it could not be had, for want of memory for example. Raises
    RuntimeError where torch finds no such device.
    """
    place = torch.device("cuda", device)
    found = torch.cuda.get_device_properties(place)
    free, _ = torch.cuda.mem_get_info(place)
    with torch.cuda.device(place):
        figures = measure(place, (found.major, found.minor), min(BUFFER_BYTES, free // 8))
        torch.cuda.empty_cache()
    return {
        "name": found.name,
        "capability": [found.major, found.minor],
        "memory_bytes": found.total_memory,
        "multiprocessors": found.multi_processor_count,
        **figures,
        "kernels": kernels((found.major, found.minor), installed()),
    }


def measure(place: torch.device, capability: tuple[int, int], size: int) -> dict[str, Any]:
    """The figures of `card_report`. `size`: bytes of a buffer that is copied and read."""
    return {
        "copy_GBps": _measured(partial(copy_gbps, place, size)),
        "read_GBps": _measured(partial(read_gbps, place, size)),
        "matmul_TFLOPs": {name: _measured(partial(matmul_tflops, place, name)) for name in matmul_types(capability)},
    }


def matmul_types(capability: tuple[int, int]) -> tuple[str, ...]:
    """Those whose product has matrix units of its own on such a card."""
    types = ["float16"]
    if capability >= BFLOAT16_CARD:
        types.insert(0, "bfloat16")
    if capability >= FP8_CARD:
        types.append("fp8")
    return tuple(types)


def installed() -> frozenset[str]:
    """Which of `ATTENTION_PACKAGES` are there. None of them is imported."""
    return frozenset(module for module in ATTENTION_PACKAGES if find_spec(module) is not None)


def kernels(capability: tuple[int, int], packages: frozenset[str]) -> list[dict[str, str]]:
    """What runs each operation on such a card, and why: op, chosen, reason."""
    others = "; ".join(
        f"{name}: {'installed, not measured yet' if module in packages else 'not installed'}"
        for module, name in ATTENTION_PACKAGES.items()
    )
    table = [
        ("attention", "Triton, paged, split along long contexts", others),
        ("linear, plain weights", "cuBLAS; Triton for a few rows", "the faster of the two by shape, measured at load"),
        ("linear, int8", "Triton, int8 matrix units", "exact integer sums, scales behind them"),
        ("linear, int4", "Triton, 16-bit activations", "weights are unpacked in registers"),
        ("experts", "Triton, tokens sorted by expert", "one launch for all experts, nothing waits for the host"),
        ("norm, rotary, activation", "Triton", "fused with what stands beside them: each value is read once"),
        ("sampling", "Triton", "tokens never leave the device before they are chosen"),
    ]
    eight = ("linear, fp8", "torch._scaled_mm; Triton for a few rows", "fp8 matrix units, a scale a row")
    if capability < FP8_CARD:
        major, minor = capability
        eight = ("linear, fp8", "none", f"it needs compute capability 8.9, this card has {major}.{minor}")
    table.insert(2, eight)
    return [{"op": op, "chosen": chosen, "reason": reason} for op, chosen, reason in table]


def copy_gbps(place: torch.device, size: int) -> float:
    """Of a copy within the device, bytes read plus bytes written."""
    source = _numbers(place, size)
    target = torch.empty_like(source)
    return 2 * source.nbytes / median_seconds(lambda: target.copy_(source)) / 1e9


def read_gbps(place: torch.device, size: int) -> float:
    """Of a sum over a large buffer: whichever of torch's two ways to add it up reads faster."""
    source = _numbers(place, size)
    rows = source[: len(source) // 4096 * 4096].view(4096, -1)
    ways: Sequence[Callable[[], object]] = (source.sum, lambda: rows.sum(dim=1))
    return max(source.nbytes / median_seconds(way) for way in ways) / 1e9


def matmul_tflops(place: torch.device, name: str) -> float:
    """Of a product of two square matrices of random numbers, whose rows lie in memory as a linear layer's do."""
    if name == "fp8":
        a, b = (_square(place, torch.bfloat16).to(torch.float8_e4m3fn) for _ in range(2))
        one = torch.ones((), device=place)
        seconds = median_seconds(
            lambda: torch._scaled_mm(a, b.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=True)
        )
    else:
        a, b = (_square(place, getattr(torch, name)) for _ in range(2))
        out = torch.empty_like(a)
        seconds = median_seconds(lambda: torch.mm(a, b.t(), out=out))
    return 2 * SIDE**3 / seconds / 1e12


def median_seconds(run: Callable[[], object]) -> float:
    """By events around each of up to `RUNS` runs, after two that are not counted."""
    run()
    run()
    times: list[float] = []
    while len(times) < RUNS and sum(times) < SECONDS:
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        run()
        ended.record()
        ended.synchronize()
        times.append(began.elapsed_time(ended) / 1e3)
    return median(times)


def _square(place: torch.device, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(SIDE, SIDE, device=place, dtype=dtype)


def _numbers(place: torch.device, size: int) -> torch.Tensor:
    """Random float32 of so many bytes."""
    return torch.rand(size // 4, device=place)


def _measured(measure: Callable[[], float]) -> float | None:
    """None where the device, or its memory, does not do it."""
    try:
        return measure()
    except RuntimeError:
        return None
