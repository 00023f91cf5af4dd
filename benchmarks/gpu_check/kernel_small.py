"""Rows of the small kernels: norms, activations, rotation with the cache's write, embedding, rows and blocks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
from benchmarks.gpu_check.bench import Bench
from benchmarks.gpu_check.clock import Run
from benchmarks.gpu_check.rows import Case
from benchmarks.gpu_check.tools import EXACT, Pair, elements, fast, few, ints, poisoned, randn, right
from torch import Tensor
from torch.nn import functional

from headrace.core.spec import AttentionSpec, NormSpec, RopeSpec

HIDDEN, INNER = 4096, 11008
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")


def cases(bench: Bench) -> list[Case]:
    return [
        right(bench, "norm, add_norm", "rms and layer; widths to 16384", partial(_norms, bench)),
        right(bench, "gated, activate", "four activations, odd widths", partial(_activations, bench)),
        right(bench, "rope_and_store", "half-split, interleaved, partial; paged cache", partial(_ropes, bench)),
        right(bench, "embed, rows, blocks", "exact", partial(_tables, bench)),
        *_fast(bench),
    ]


# ---------------------------------------------------------------- norms and activations


def _norms(bench: Bench, dtype: torch.dtype) -> Iterator[Pair]:
    from headrace.backends.torch.kernels.norm import add_norm, norm

    shapes = [(3, 97), (2, 64)] if bench.dry else [(1, HIDDEN), (7, HIDDEN), (33, 8192), (5, 97), (3, 16384)]
    for rows, width in shapes[3:4] if few(bench, dtype) else shapes:
        for spec in (
            NormSpec("rms", 1e-5, width),
            NormSpec("rms", 1e-6, width, unit_offset=True),
            NormSpec("layer", 1e-5, width, bias=True),
        ):
            x = randn(bench, rows, width + 5, dtype=dtype)[:, :width]
            weight = randn(bench, width, dtype=torch.float32 if spec.unit_offset else dtype, scale=0.5)
            bias = randn(bench, width, dtype=dtype) if spec.bias else None
            label = f"{spec.kind}{' offset' if spec.unit_offset else ''} {rows}×{width}"
            out = poisoned(bench, rows, width, dtype=dtype)
            norm(x, weight, bias, spec, out)
            yield Pair(label, out, norm_reference(x.double(), weight, bias, spec))
            hidden, branch = randn(bench, rows, width, dtype=dtype), randn(bench, rows, width, dtype=dtype)
            total = hidden + branch
            yield Pair(
                f"add {label}", add_norm(hidden, branch, weight, bias, spec), norm_reference(total, weight, bias, spec)
            )
            yield Pair(f"sum {label}", hidden, total, EXACT)


def norm_reference(x: Tensor, weight: Tensor, bias: Tensor | None, spec: NormSpec) -> Tensor:
    """RMSNorm or LayerNorm in float64."""
    x = x.double()
    if spec.kind == "layer":
        x = x - x.mean(-1, keepdim=True)
    x = x * torch.rsqrt((x * x).mean(-1, keepdim=True) + spec.eps) * weight.double()
    return x if bias is None else x + bias.double()


def act(x: Tensor, name: str) -> Tensor:
    """In x's type."""
    if name == "gelu_tanh":
        return functional.gelu(x, approximate="tanh")
    if name == "gelu":
        return functional.gelu(x)
    return functional.silu(x) if name == "silu" else functional.relu(x)


def _activations(bench: Bench, dtype: torch.dtype) -> Iterator[Pair]:
    from headrace.backends.torch.kernels.activation import activate, gated

    for rows, width in [(3, 37)] if bench.dry else [(5, INNER), (64, 97), (1, INNER)]:
        for name in ACTIVATIONS:
            x = randn(bench, rows, 2 * width, dtype=dtype, scale=2.0)
            gate, up = x.double().chunk(2, dim=-1)
            yield Pair(f"gated {name} {rows}×{width}", gated(x, name), act(gate, name) * up)
            yield Pair(f"{name} {rows}×{2 * width}", activate(x, name), act(x.double(), name))


# ---------------------------------------------------------------- rotation


def _ropes(bench: Bench, dtype: torch.dtype) -> Iterator[Pair]:
    from headrace.backends.torch.kernels.rope import rope_and_store, rotary

    plain = AttentionSpec(32, 8, 128, 128**-0.5, rope=RopeSpec(128, 10000.0))
    small = AttentionSpec(4, 2, 20, 1.0, rope=RopeSpec(12, 10000.0))
    turned = replace(small, rope=RopeSpec(12, 10000.0, interleaved=True))
    for spec in (small, turned) if bench.dry else (plain, small, turned):
        tokens, block_size, blocks = (3, 4, 4) if bench.dry else (37, 16, 8)
        heads, kv_heads, dim = spec.heads, spec.kv_heads, spec.head_dim
        qkv = randn(bench, tokens, (heads + 2 * kv_heads) * dim, dtype=dtype)
        before = qkv.double().view(tokens, -1, dim)
        order = torch.randperm(blocks * block_size)[:tokens].tolist()
        positions = ints(bench, [7 * i % 200 for i in range(tokens)])
        slots = ints(bench, [*order[:-1], -1])  # the last token is padding
        caches = [poisoned(bench, blocks, kv_heads, block_size, dim, dtype=dtype) for _ in range(2)]
        assert spec.rope is not None
        rope_and_store(qkv, positions, slots, rotary(spec.rope, 256, bench.clock.device), spec, None, None, *caches)
        label = f"{heads}/{kv_heads}×{dim}{' interleaved' if spec.rope.interleaved else ''}"
        wanted = rotated(before[:, : heads + kv_heads], positions, spec.rope)
        out = qkv.view(tokens, -1, dim)
        yield Pair(f"q {label}", out[:-1, :heads], wanted[:-1, :heads])
        yield Pair(f"padding {label}", out[-1, :heads], before[-1, :heads], EXACT)
        written = (wanted[:, heads:], before[:, heads + kv_heads :])
        for name, cache, values in zip("kv", caches, written, strict=True):
            expected = poisoned(bench, blocks, kv_heads, block_size, dim, dtype=torch.float64)
            for token, slot in enumerate(order[:-1]):
                expected[slot // block_size, :, slot % block_size] = values[token]
            yield Pair(f"{name} cache {label}", cache, expected)


def rotated(x_THD: Tensor, positions_T: Tensor, spec: RopeSpec) -> Tensor:
    """Rotary embedding in float64, angles as plain Llama's (float32 frequencies)."""
    half = spec.dim // 2
    frequencies = torch.float_power(spec.base, -torch.arange(half, device=x_THD.device, dtype=torch.float64) / half)
    angles = positions_T.double()[:, None] * frequencies
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    turned = x_THD[..., : spec.dim]
    if spec.interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
        mixed = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
    else:
        a, b = turned[..., :half], turned[..., half:]
        mixed = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
    return torch.cat((mixed, x_THD[..., spec.dim :]), dim=-1)


# ---------------------------------------------------------------- tables


def _tables(bench: Bench, dtype: torch.dtype) -> Iterator[Pair]:
    from headrace.backends.torch.kernels.embed import embed, put_blocks, take_rows

    vocab, width = (19, 37) if bench.dry else (32000, HIDDEN)
    weight = randn(bench, vocab, width, dtype=dtype)
    last, rows = ints(bench, [5, 7, -2]), ints(bench, [0, 1, 2, 0])
    ids = ints(bench, [3, -1, -1, vocab - 1])
    wanted = weight[torch.tensor([3, 7, 0, vocab - 1], device=weight.device)]
    yield Pair("embed", embed(ids, last, rows, weight), wanted, EXACT)
    places = ints(bench, [2, -1, 0])
    taken = weight[torch.tensor([2, 0, 0], device=weight.device)].clone()
    taken[1] = 0
    yield Pair("take_rows", take_rows(weight, places), taken, EXACT)
    tables = torch.zeros(4, 6, dtype=torch.int32, device=weight.device)
    put_blocks(tables, ints(bench, [3, -1, 0]), ints(bench, [5, 0, 1]), ints(bench, [42, 9, 17]))
    filled = torch.zeros_like(tables)
    filled[3, 5], filled[0, 1] = 42, 17
    yield Pair("put_blocks", tables, filled, EXACT)


# ---------------------------------------------------------------- times


def _fast(bench: Bench) -> list[Case]:
    dtype = torch.float32 if bench.dry else torch.bfloat16
    tokens, hidden, inner = (2, 64, 32) if bench.dry else (64, HIDDEN, INNER)
    spec = NormSpec("rms", 1e-5, hidden)
    shapes = ((tokens, hidden), (tokens, hidden), (hidden,))

    def make_norm() -> Run:
        from headrace.backends.torch.kernels.norm import add_norm

        x, branch, weight = (randn(bench, *shape, dtype=dtype) for shape in shapes)
        return lambda: add_norm(x, branch, weight, None, spec)

    def make_gated() -> Run:
        from headrace.backends.torch.kernels.activation import gated

        x = randn(bench, tokens, 2 * inner, dtype=dtype)
        return lambda: gated(x, "silu")

    def make_rope() -> Run:
        from headrace.backends.torch.kernels.rope import rope_and_store, rotary

        attention = AttentionSpec(hidden // 32, hidden // 32, 32, 1.0, rope=RopeSpec(32, 10000.0))
        if not bench.dry:
            attention = AttentionSpec(32, 32, 128, 1.0, rope=RopeSpec(128, 10000.0))
        heads, dim = attention.heads, attention.head_dim
        qkv = randn(bench, tokens, 3 * heads * dim, dtype=dtype)
        caches = [torch.zeros(tokens, heads, 16, dim, dtype=dtype, device=qkv.device) for _ in range(2)]
        places = ints(bench, list(range(tokens)))
        slots, angles = places * 16, rotary(attention.rope or RopeSpec(dim, 1e4), 256, qkv.device)
        return lambda: rope_and_store(qkv, places, slots, angles, attention, None, None, *caches)

    def library_norm() -> Run:
        x, branch, weight = (randn(bench, *shape, dtype=dtype) for shape in shapes)
        return lambda: functional.rms_norm(x.add_(branch), (hidden,), weight, 1e-5)

    label = f"{tokens} tokens, 7B"
    qkv_numbers = 3 * tokens * hidden
    return [
        fast(
            bench,
            f"add_norm, {label}",
            "reads two, writes two",
            make_norm,
            nbytes=elements(dtype, 4 * tokens * hidden),
            others={"torch add + rms_norm": library_norm},
        ),
        fast(bench, f"gated, {label}", "silu", make_gated, nbytes=elements(dtype, 3 * tokens * inner)),
        fast(
            bench,
            f"rope_and_store, {label}",
            "q in place, k and v into the cache",
            make_rope,
            nbytes=elements(dtype, 2 * qkv_numbers),
        ),
    ]
