"""Rows of mixtures of experts: which experts a token goes to, and what they answer."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from benchmarks.gpu_check.bench import Bench
from benchmarks.gpu_check.clock import Run
from benchmarks.gpu_check.kernel_small import act
from benchmarks.gpu_check.rows import Case
from benchmarks.gpu_check.tools import EXACT, TOLERANCES, Pair, elements, fast, randn, right
from torch import Tensor


def cases(bench: Bench) -> list[Case]:
    return [
        right(bench, "route", "the likeliest, lowest id on a tie", lambda dtype: _route(bench), [torch.float32]),
        right(bench, "experts_mlp", "odd sizes, empty experts, padding", partial(_answers, bench)),
        *_fast(bench),
    ]


def _route(bench: Bench) -> Iterator[Pair]:
    from headrace.backends.torch.kernels.routing import route

    for tokens, experts, choices in [(3, 5, 2)] if bench.dry else [(65, 8, 2), (70, 128, 8), (3, 5, 3)]:
        for normalise in (True, False):
            scores = randn(bench, tokens, experts, dtype=torch.float32)
            scores[0] = 0
            weights, chosen = route(scores, choices, normalise)
            wanted, order = routed(scores, choices, normalise)
            yield Pair(f"weights {tokens}×{experts}", weights, wanted)
            yield Pair(f"experts {tokens}×{experts}", chosen, order, EXACT)


def routed(scores_TE: Tensor, choices: int, normalise: bool) -> tuple[Tensor, Tensor]:
    """A stable sort keeps the lowest id first."""
    order = torch.sort(scores_TE, dim=-1, descending=True, stable=True).indices[:, :choices]
    weights = torch.softmax(scores_TE.double(), dim=-1).gather(1, order)
    return (weights / weights.sum(-1, keepdim=True) if normalise else weights), order


def _answers(bench: Bench, dtype: torch.dtype) -> Iterator[Pair]:
    from headrace.backends.torch.kernels.experts import experts_mlp

    sizes = [(3, 4, 2, 40, 24)] if bench.dry else [(1, 8, 2, 512, 256), (70, 5, 3, 200, 72), (300, 8, 2, 512, 256)]
    for tokens, experts, choices, hidden, inner in sizes:
        for gated in (True,) if bench.dry else (True, False):
            x = randn(bench, tokens, hidden, dtype=dtype)
            up = randn(bench, experts, inner * (2 if gated else 1), hidden, dtype=dtype, scale=hidden**-0.5)
            down = randn(bench, experts, hidden, inner, dtype=dtype, scale=inner**-0.5)
            weights, chosen = routed(randn(bench, tokens, experts, dtype=torch.float32), choices, True)
            chosen = chosen.to(torch.int32)
            if tokens > 2:
                chosen[1] = -1  # padding
            out = experts_mlp(x, weights.float(), chosen, up, down, None, "silu", gated)
            wanted = _reference(x, weights, chosen, up, down, gated)
            label = f"{tokens} tokens, {experts} experts{', gated' if gated else ''}"
            yield Pair(label, out, wanted, 2 * TOLERANCES[dtype])


def _reference(x: Tensor, weights: Tensor, chosen: Tensor, up: Tensor, down: Tensor, gated: bool) -> Tensor:
    out = torch.zeros(x.shape, dtype=torch.float64, device=x.device)
    for expert in range(len(up)):
        for choice in range(chosen.shape[1]):
            mine = chosen[:, choice] == expert
            middle = x[mine].double() @ up[expert].double().T
            if gated:
                gate, middle = middle.chunk(2, dim=-1)
                middle = act(gate, "silu") * middle
            else:
                middle = act(middle, "silu")
            out[mine] += weights[mine, choice, None].double() * (middle @ down[expert].double().T)
    return out


def _fast(bench: Bench) -> list[Case]:
    if bench.dry:
        return [_time(bench, "tiny", 2, 4, 2, 32, 16)]
    return [
        _time(bench, "Mixtral 8×7B, 1 token", 1, 8, 2, 4096, 14336),
        _time(bench, "Qwen3-30B-A3B, 16 tokens", 16, 128, 8, 2048, 768),
        _time(bench, "Mixtral 8×7B, 1024 tokens", 1024, 8, 2, 4096, 14336),
    ]


def _time(bench: Bench, label: str, tokens: int, experts: int, choices: int, hidden: int, inner: int) -> Case:
    dtype = torch.float32 if bench.dry else torch.bfloat16
    each = 3 * hidden * inner
    met = experts * (1 - (1 - choices / experts) ** tokens)  # experts that some token goes to, on average

    def make() -> Run:
        from headrace.backends.torch.kernels.experts import experts_mlp

        x = randn(bench, tokens, hidden, dtype=dtype)
        up = randn(bench, experts, 2 * inner, hidden, dtype=dtype, scale=0.02)
        down = randn(bench, experts, hidden, inner, dtype=dtype, scale=0.02)
        weights, chosen = routed(randn(bench, tokens, experts, dtype=torch.float32), choices, True)
        weights, chosen = weights.float(), chosen.to(torch.int32)
        return lambda: experts_mlp(x, weights, chosen, up, down, None, "silu", True)

    return fast(
        bench,
        f"experts_mlp, {label}",
        "bound: weights of the experts that are met, or the matmul rate",
        make,
        nbytes=elements(dtype, 1) * met * each,
        flops=2.0 * tokens * choices * each,
        set_bytes=elements(dtype, 1) * experts * each,
    )
