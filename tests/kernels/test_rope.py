"""Norm, rotation and the way into the KV cache in Triton, against `ops.norm` and `apply_rope`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from headrace.backends.torch import ops
from headrace.backends.torch.kernels.rope import FLOAT8, Rotary, can_fuse, e4m3_code, rope_and_store, rotary
from headrace.backends.torch.parameters import Norm
from headrace.backends.torch.rope import apply_rope, rope_table
from headrace.core.errors import EngineError
from headrace.core.spec import AttentionSpec, NormSpec, RopeScaling, RopeSpec

POSITIONS = (0, 90, 7, 31, 64)
SLOTS = (3, 17, -1, 0, 9)
MAX_LEN = 96
BLOCKS = 4

# The interpreter's numpy at NaN; in rows that are not stored as well.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero) encountered")


def attention(
    heads: int, kv_heads: int, dim: int, rope: RopeSpec | None, norm: NormSpec | None = None
) -> AttentionSpec:
    return AttentionSpec(heads, kv_heads, dim, dim**-0.5, q_norm=norm, k_norm=norm, rope=rope)


@dataclass(slots=True)
class Case:
    spec: AttentionSpec
    qkv: Tensor
    """A view, NaN beside it."""
    norms: Sequence[Norm | None]
    k_cache: Tensor
    v_cache: Tensor
    scales: Sequence[Tensor]

    def run(self, slots: Sequence[int] = SLOTS) -> None:
        table = None if self.spec.rope is None else rotary(self.spec.rope, MAX_LEN, "cpu")
        positions, places = (torch.tensor(one, dtype=torch.int32) for one in (POSITIONS[: len(slots)], slots))
        caches = (self.k_cache, self.v_cache)
        rope_and_store(self.qkv, positions, places, table, self.spec, *self.norms, *caches, *self.scales)

    def wanted(self) -> tuple[Tensor, Tensor, Tensor]:
        """(T, heads, D) of q, k and v, computed in float32 from the norms on."""
        spec = self.spec
        heads = self.qkv.reshape(len(POSITIONS), -1, spec.head_dim)
        q, k, v = heads.split((spec.heads, spec.kv_heads, spec.kv_heads), dim=1)
        q, k = (
            x if norm is None else ops.norm(x, norm.weight, norm.bias, norm.spec)
            for x, norm in zip((q, k), self.norms, strict=True)
        )
        if spec.rope is not None:
            cos, sin = (one[list(POSITIONS)] for one in rope_table(spec.rope, MAX_LEN, torch.float32))
            q, k = (apply_rope(x.float(), cos, sin, spec.rope.interleaved) for x in (q, k))
        return q, k, v

    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        spec = self.spec
        heads = self.qkv.reshape(len(POSITIONS), -1, spec.head_dim)
        return heads.split((spec.heads, spec.kv_heads, spec.kv_heads), dim=1)


def case(spec: AttentionSpec, dtype: torch.dtype, packed: bool = False, block_size: int = 5) -> Case:
    torch.manual_seed(spec.head_dim + spec.heads)
    width = (spec.heads + 2 * spec.kv_heads) * spec.head_dim
    qkv = torch.full((len(POSITIONS), width + 9), torch.nan, dtype=dtype)[:, 4 : 4 + width]
    qkv.copy_(torch.randn(len(POSITIONS), width))
    norms = []
    for one in (spec.q_norm, spec.k_norm):
        if one is None:
            norms.append(None)
            continue
        weight = torch.rand(one.width) + 0.5
        bias = torch.randn(one.width).to(dtype) if one.bias else None
        norms.append(Norm(one, weight if one.unit_offset else weight.to(dtype), bias))
    shape = (BLOCKS, spec.kv_heads, block_size, spec.head_dim)
    # A block of somebody else before the cache: slot -1 would be there.
    caches = [torch.full((BLOCKS + 1, *shape[1:]), torch.nan).to(FLOAT8 if packed else dtype)[1:] for _ in "kv"]
    scales = [torch.full((BLOCKS + 1, *shape[1:3]), torch.nan)[1:] for _ in "kv"] if packed else []
    return Case(spec, qkv, norms, *caches, scales)


def stored(cache: Tensor, slot: int) -> Tensor:
    block_size = cache.shape[2]
    return cache[slot // block_size, :, slot % block_size]


def check(one: Case, dtype: torch.dtype) -> None:
    before = one.qkv.clone()
    wanted_q, wanted_k, wanted_v = one.wanted()
    one.run()
    q, k, v = one.parts()
    tolerance = 1e-6 if dtype == torch.float32 else 6e-4  # float16: half a unit in the last place, and ulps of a norm
    if one.spec.q_norm is not None:
        tolerance *= 4
    live = [i for i, slot in enumerate(SLOTS) if slot >= 0]
    for got, wanted in ((q, wanted_q), (k, wanted_k)):
        torch.testing.assert_close(got[live].float(), wanted[live].float(), rtol=tolerance, atol=tolerance)
    assert torch.equal(v[live], wanted_v[live])
    padding = SLOTS.index(-1)
    assert torch.equal(one.qkv[padding], before[padding])
    assert one.qkv._base is not None and int(one.qkv._base.isnan().sum()) == 9 * len(POSITIONS)
    for cache, values in ((one.k_cache, k), (one.v_cache, v)):
        rest = cache.clone()
        for i in live:
            assert torch.equal(stored(cache, SLOTS[i]), values[i])
            stored(rest, SLOTS[i]).fill_(torch.nan)
        assert rest.isnan().all() and cache._base is not None and cache._base[0].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "turning", "interleaved"),
    [
        (4, 2, 64, 64, False),
        (3, 3, 64, 64, True),
        (5, 1, 6, 6, False),  # no power of two
        (4, 2, 10, 4, True),
        (5, 1, 80, 32, False),  # the rest passes
        (3, 3, 80, 20, True),
        (4, 2, 64, 16, False),
        (4, 2, 7, 2, False),  # odd
        (3, 3, 96, 0, False),  # no rotation at all
    ],
)
def test_q_turns_in_place_and_k_and_v_are_stored(
    heads: int, kv_heads: int, dim: int, turning: int, interleaved: bool, dtype: torch.dtype
) -> None:
    rope = RopeSpec(turning, 10000.0, interleaved) if turning else None
    check(case(attention(heads, kv_heads, dim, rope), dtype), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    "norm",
    [
        NormSpec("rms", 1e-6, 0),
        NormSpec("rms", 1e-6, 0, unit_offset=True),
        NormSpec("layer", 1e-5, 0, bias=True),
        NormSpec("layer", 1e-5, 0),
    ],
    ids=lambda norm: f"{norm.kind} {norm.unit_offset} {norm.bias}",
)
@pytest.mark.parametrize(
    ("dim", "rope"),
    [
        (64, RopeSpec(64, 1e4)),
        (10, RopeSpec(4, 1e4)),
        (12, RopeSpec(8, 1e4, interleaved=True)),
        (7, None),
    ],
    ids=str,
)
def test_heads_are_normed_before_they_turn(dim: int, rope: RopeSpec | None, norm: NormSpec, dtype: torch.dtype) -> None:
    check(case(attention(4, 2, dim, rope, replace(norm, width=dim)), dtype), dtype)


def test_many_heads_take_several_programs() -> None:
    check(case(attention(19, 9, 128, RopeSpec(128, 1e4)), torch.float16, block_size=8), torch.float16)


def test_only_k_is_normed() -> None:
    spec = replace(attention(4, 2, 8, RopeSpec(8, 1e4)), k_norm=NormSpec("rms", 1e-6, 8))
    check(case(spec, torch.float32), torch.float32)


def test_a_stretched_embedding_keeps_its_magnitude() -> None:
    numbers = {"factor": 4.0, "original_context": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": 1.0}
    scaling = RopeScaling("yarn", numbers | {"attention_factor": 1.2})
    check(case(attention(2, 2, 16, RopeSpec(16, 1e4, scaling=scaling)), torch.float32), torch.float32)


def test_a_token_s_bits_depend_on_it_alone() -> None:
    spec = attention(4, 2, 24, RopeSpec(24, 1e4), NormSpec("rms", 1e-6, 24))
    together, alone = case(spec, torch.float32), case(spec, torch.float32)
    together.run()
    alone.qkv = alone.qkv[:2]
    alone.run(SLOTS[:2])
    assert torch.equal(together.qkv[:2], alone.qkv)
    for slot in SLOTS[:2]:
        assert torch.equal(stored(together.k_cache, slot), stored(alone.k_cache, slot))


# ---------------------------------------------------------------- E4M3


@triton.jit
def _codes_kernel(x: tl.tensor, codes: tl.tensor, count: tl.tensor, BLOCK: tl.constexpr) -> None:
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = index < count
    tl.store(codes + index, e4m3_code(tl.load(x + index, mask=inside, other=0.0)), mask=inside)


def test_codes_are_torch_s_for_every_number_between_two_codes() -> None:
    every = torch.arange(127, dtype=torch.uint8).view(FLOAT8).float()  # 0 … 448
    middles = (every[1:] + every[:-1]) / 2
    up, down = middles.nextafter(torch.tensor(torch.inf)), middles.nextafter(torch.tensor(0.0))
    tiny = torch.tensor([1e-45, 1e-38, 2.0**-10, 2.0**-11, torch.nan, torch.inf])
    x = torch.cat((every, middles, up, down, tiny, torch.rand(2000) * 448, torch.rand(500) * 2.0**-6))
    x = torch.cat((x, -x))
    codes = torch.full((len(x),), 99, dtype=torch.uint8)
    _codes_kernel[(triton.cdiv(len(x), 4096),)](x, codes, len(x), 4096)
    known = x.isfinite()
    assert (codes[~known] & 0x7F == 0x7F).all()  # where torch's own cast makes an infinite number 448
    assert torch.equal(codes[known], x[known].to(FLOAT8).view(torch.uint8))


def check_packed(one: Case) -> None:
    one.run()
    _, k, v = one.parts()
    for cache, scales, values in ((one.k_cache, one.scales[0], k), (one.v_cache, one.scales[1], v)):
        rest, rest_scales = cache.float(), scales.clone()
        for i, slot in enumerate(SLOTS):
            if slot < 0:
                continue
            x = values[i].float()
            peak = x.abs().amax(dim=-1)
            scale = torch.where(peak == 0, torch.ones(()), peak / 448)
            assert torch.equal(stored(scales, slot), scale)
            assert torch.equal(stored(cache, slot).view(torch.uint8), (x / scale[:, None]).to(FLOAT8).view(torch.uint8))
            stored(rest, slot).fill_(torch.nan)
            stored(rest_scales, slot).fill_(torch.nan)
        assert rest.isnan().all() and rest_scales.isnan().all()
        assert all(one._base is not None and one._base[0].float().isnan().all() for one in (cache, scales))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("dim", "rope", "normed"),
    [
        (64, RopeSpec(64, 1e4), False),
        (10, RopeSpec(4, 1e4), True),
        (12, RopeSpec(12, 1e4, interleaved=True), False),
        (7, None, True),
    ],
    ids=str,
)
def test_a_cache_of_codes_holds_what_torch_would_cast(
    dim: int, rope: RopeSpec | None, normed: bool, dtype: torch.dtype
) -> None:
    norm = NormSpec("rms", 1e-6, dim) if normed else None
    check_packed(case(attention(4, 2, dim, rope, norm), dtype, packed=True))


@settings(max_examples=8, deadline=None)
@given(st.integers(1, 40), st.integers(1, 5), st.floats(1e-30, 1e30), st.booleans())
def test_codes_of_any_magnitude(dim: int, kv_heads: int, magnitude: float, interleaved: bool) -> None:
    rope = RopeSpec(dim // 2 * 2, 1e4, interleaved) if dim > 1 else None
    one = case(attention(5, kv_heads, dim, rope), torch.float32, packed=True)
    one.qkv *= magnitude
    check_packed(one)


@pytest.mark.parametrize("rope", [RopeSpec(8, 1e4), None], ids=str)
def test_zeros_faults_and_vanishing_numbers_as_codes(rope: RopeSpec | None) -> None:
    one = case(attention(2, 2, 8, rope), torch.float32, packed=True)
    one.qkv[0] = 0.0
    one.qkv[1, -3] = torch.nan  # of the last value head
    one.qkv[3, -9] = torch.inf  # of the first
    one.qkv[4] = 1e-44
    one.run()
    scales = one.scales[1]
    assert (stored(one.v_cache, SLOTS[0]).float() == 0).all() and (stored(scales, SLOTS[0]) == 1).all()
    for token, bad in ((1, 1), (3, 0)):
        values, scale = stored(one.v_cache, SLOTS[token]).float(), stored(scales, SLOTS[token])
        assert values[bad].isnan().all() and scale[bad].isnan()
        assert values[1 - bad].isfinite().all() and scale[1 - bad].isfinite()
    vanishing = stored(one.v_cache, SLOTS[4]).float() * stored(scales, SLOTS[4])[:, None]
    assert ((vanishing >= 0) & (vanishing < 1e-40)).all()


# ---------------------------------------------------------------- edges


def test_what_is_fused_and_what_is_not() -> None:
    spec = attention(4, 2, 8, RopeSpec(8, 1e4), NormSpec("rms", 1e-6, 8))
    assert can_fuse(spec) and can_fuse(attention(4, 2, 8, None))
    assert not can_fuse(replace(spec, q_norm=NormSpec("rms", 1e-6, 32)))
    assert not can_fuse(replace(spec, k_norm=NormSpec("rms", 1e-6, 16)))
    assert not can_fuse(replace(spec, rope=RopeSpec(16, 1e4)))
    assert not can_fuse(replace(spec, rope=RopeSpec(7, 1e4)))
    assert not can_fuse(replace(spec, alibi=True))


def test_no_tokens() -> None:
    one = case(attention(4, 2, 8, RopeSpec(8, 1e4)), torch.float32)
    one.qkv = one.qkv[:0]
    one.run(())
    assert one.k_cache.isnan().all()


def test_what_does_not_fit_is_refused() -> None:
    one = case(attention(4, 2, 8, RopeSpec(8, 1e4)), torch.float32)
    table = rotary(RopeSpec(8, 1e4), MAX_LEN, "cpu")
    rows = torch.zeros(len(POSITIONS), dtype=torch.int32)

    def run(
        qkv: Tensor = one.qkv,
        table: Rotary | None = table,
        spec: AttentionSpec = one.spec,
        k_cache: Tensor = one.k_cache,
        scales: Tensor | None = None,
        slots: Tensor = rows,
    ) -> None:
        rope_and_store(qkv, rows, slots, table, spec, None, None, k_cache, one.v_cache, scales)

    with pytest.raises(EngineError, match="does not carry out"):
        run(spec=replace(one.spec, alibi=True))
    with pytest.raises(EngineError, match="rotary embedding where"):
        run(table=None)
    with pytest.raises(EngineError, match="5 positions, 4 slots"):
        run(slots=rows[1:])
    with pytest.raises(EngineError, match="columns for 4 and 2 × 2 heads"):
        run(qkv=one.qkv[:, 8:])
    with pytest.raises(EngineError, match="not the layer's"):
        run(k_cache=one.k_cache[..., :4])
    with pytest.raises(EngineError, match="float16 cache"):
        run(k_cache=one.k_cache.half())
    with pytest.raises(EngineError, match="scales True"):
        run(scales=torch.ones(one.k_cache.shape[:3]))
    with pytest.raises(EngineError, match=r"scales .* of a cache"):
        run(k_cache=one.k_cache.to(FLOAT8), scales=torch.ones(2))
