"""The kernels behind `attention.paged_attention`; their arguments are checked and explained there.

A tile is a few queries of one span. A program takes one tile and one KV head: its M rows are the tile's queries × the
query heads that share the KV head, so each key and value is read once for all of them. It walks over the keys, N at a
time, with the online softmax (arXiv 2205.14135), in powers of two: scores come multiplied by log2 e.
An invisible key adds exact zeros. M, N, D: rows, keys and head dim of a tile, padded to what the tensor cores take.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _numbers(codes_ND: tl.tensor, FP8: tl.constexpr, TYPE: tl.constexpr) -> tl.tensor:
    """E4M3 as numbers of the compute type; FP8 1: of its own type, 2: as bytes."""
    if FP8 == 2:
        # As float16 the bits mean a number 2⁸ times too small, subnormal ones included; the code of NaN would be 480.
        bits = codes_ND.to(tl.uint16)
        number = (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.float16, bitcast=True) * 256.0
        number = tl.where((bits & 0x7F) == 0x7F, float("nan"), number)
    else:
        number = codes_ND
    # By way of float32: from float16 to bfloat16 alone takes a slow instruction for each number.
    return number.to(tl.float32).to(TYPE)


@triton.jit
def _walk(
    q_MD: tl.tensor, positions_M: tl.tensor, top_M: tl.tensor, sum_M: tl.tensor, acc_MD: tl.tensor, begin: tl.tensor,
    end: tl.tensor, low: tl.tensor, high: tl.tensor, table: tl.tensor, head: tl.tensor, k_cache: tl.tensor,
    v_cache: tl.tensor, k_scales: tl.tensor, v_scales: tl.tensor, scale: tl.tensor, cap: tl.tensor, window: tl.tensor,
    KV_HEADS: tl.constexpr, BLOCK_SIZE: tl.constexpr, D: tl.constexpr, WINDOW: tl.constexpr, CAP: tl.constexpr,
    FP8: tl.constexpr, MASKED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:  # fmt: skip
    """The keys [begin, end), of which rows may see those of [low, high). Not MASKED: every row sees all of them."""
    d = tl.arange(0, BLOCK_D)
    for start in tl.range(begin, end, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        if MASKED:
            # What nobody sees may be stale and NaN: it is never loaded.
            known = (keys >= low) & (keys < high)
            blocks = tl.load(table + keys // BLOCK_SIZE, mask=known, other=0)
        else:
            blocks = tl.load(table + keys // BLOCK_SIZE)
        places = (blocks.to(tl.int64) * KV_HEADS + head) * BLOCK_SIZE + keys % BLOCK_SIZE
        offsets_ND = places[:, None] * D + d[None, :]
        if MASKED or BLOCK_D > D:
            wanted = (known[:, None] if MASKED else True) & (d < D)[None, :]
            k_ND = tl.load(k_cache + offsets_ND, mask=wanted, other=0.0)
            v_ND = tl.load(v_cache + offsets_ND, mask=wanted, other=0.0)
        else:
            k_ND = tl.load(k_cache + offsets_ND)
            v_ND = tl.load(v_cache + offsets_ND)
        if FP8:
            k_ND = _numbers(k_ND, FP8, q_MD.dtype)
            v_ND = _numbers(v_ND, FP8, q_MD.dtype)
            if MASKED:
                k_scales_N = tl.load(k_scales + places, mask=known, other=0.0)
                v_scales_N = tl.load(v_scales + places, mask=known, other=0.0)
            else:
                k_scales_N = tl.load(k_scales + places)
                v_scales_N = tl.load(v_scales + places)

        scores_MN = tl.dot(q_MD, tl.trans(k_ND), input_precision="ieee") * scale
        if FP8:
            scores_MN *= k_scales_N[None, :]
        if CAP:
            # cap × tanh(x) = cap − 2 cap ÷ (e²ˣ + 1), which neither overflows nor needs a library.
            scores_MN = cap - 2 * cap / (tl.exp2(scores_MN) + 1)
        if MASKED:
            visible = keys[None, :] <= positions_M[:, None]
            if WINDOW:
                visible &= keys[None, :] > positions_M[:, None] - window
            scores_MN = tl.where(visible, scores_MN, float("-inf"))

        new_M = tl.maximum(top_M, tl.max(scores_MN, 1))
        base_M = tl.where(new_M == float("-inf"), 0.0, new_M)
        weights_MN = tl.exp2(scores_MN - base_M[:, None])
        shrink_M = tl.exp2(top_M - base_M)
        sum_M = sum_M * shrink_M + tl.sum(weights_MN, 1)
        if FP8:
            if q_MD.dtype == tl.float16:
                # A weight × a scale may be too small for float16; a value is not.
                v_ND = (v_ND.to(tl.float32) * v_scales_N[:, None]).to(tl.float16)
            else:
                weights_MN *= v_scales_N[None, :]
        acc_MD = tl.dot(weights_MN.to(q_MD.dtype), v_ND, acc_MD * shrink_M[:, None], input_precision="ieee")
        top_M = new_M
    return top_M, sum_M, acc_MD


@triton.jit
def _part(
    q_MD: tl.tensor, positions_M: tl.tensor, begin: tl.tensor, end: tl.tensor, position: tl.tensor, low: tl.tensor,
    high: tl.tensor, table: tl.tensor, head: tl.tensor, k_cache: tl.tensor, v_cache: tl.tensor, k_scales: tl.tensor,
    v_scales: tl.tensor, scale: tl.tensor, cap: tl.tensor, window: tl.tensor,
    KV_HEADS: tl.constexpr, BLOCK_SIZE: tl.constexpr, D: tl.constexpr, WINDOW: tl.constexpr, CAP: tl.constexpr,
    FP8: tl.constexpr, BODY: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:  # fmt: skip
    """Largest score, sum of weights and weighted values of the keys [begin, end), begin a multiple of BLOCK_N."""
    top_M = tl.full([BLOCK_M], float("-inf"), tl.float32)
    sum_M = tl.zeros([BLOCK_M], tl.float32)
    acc_MD = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if BODY:
        # Keys of [full, plain) are seen by every row.
        full = begin
        if WINDOW:
            full = tl.minimum(tl.maximum(tl.cdiv(high - window, BLOCK_N) * BLOCK_N, begin), end)
            top_M, sum_M, acc_MD = _walk(
                q_MD, positions_M, top_M, sum_M, acc_MD, begin, full, low, high, table, head,
                k_cache, v_cache, k_scales, v_scales, scale, cap, window,
                KV_HEADS, BLOCK_SIZE, D, WINDOW, CAP, FP8, True, BLOCK_N, BLOCK_D,
            )  # fmt: skip
        plain = tl.maximum(tl.minimum((position + 1) // BLOCK_N * BLOCK_N, end), full)
        top_M, sum_M, acc_MD = _walk(
            q_MD, positions_M, top_M, sum_M, acc_MD, full, plain, low, high, table, head,
            k_cache, v_cache, k_scales, v_scales, scale, cap, window,
            KV_HEADS, BLOCK_SIZE, D, WINDOW, CAP, FP8, False, BLOCK_N, BLOCK_D,
        )  # fmt: skip
        begin = plain
    top_M, sum_M, acc_MD = _walk(
        q_MD, positions_M, top_M, sum_M, acc_MD, begin, end, low, high, table, head,
        k_cache, v_cache, k_scales, v_scales, scale, cap, window,
        KV_HEADS, BLOCK_SIZE, D, WINDOW, CAP, FP8, True, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    return top_M, sum_M, acc_MD


@triton.jit
def _merged(
    top_M: tl.tensor, sum_M: tl.tensor, acc_MD: tl.tensor, top2_M: tl.tensor, sum2_M: tl.tensor, acc2_MD: tl.tensor
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Two parts of a row's keys as one. A part in which nothing was visible (top -inf) changes no bit of the other."""
    new_M = tl.maximum(top_M, top2_M)
    base_M = tl.where(new_M == float("-inf"), 0.0, new_M)
    shrink_M = tl.exp2(top_M - base_M)
    shrink2_M = tl.exp2(top2_M - base_M)
    acc_MD = acc_MD * shrink_M[:, None] + acc2_MD * shrink2_M[:, None]
    return new_M, sum_M * shrink_M + sum2_M * shrink2_M, acc_MD


@triton.jit(
    do_not_specialize=["table_stride", "queries", "splits", "slots", "window"],
    do_not_specialize_on_alignment=["starts", "lengths", "contexts", "rows", "tiles", "block_tables"],
)
def attention_kernel(
    q: tl.tensor, k_cache: tl.tensor, v_cache: tl.tensor, out: tl.tensor, k_scales: tl.tensor, v_scales: tl.tensor,
    partials: tl.tensor, stats: tl.tensor, starts: tl.tensor, lengths: tl.tensor, contexts: tl.tensor, rows: tl.tensor,
    tiles: tl.tensor, block_tables: tl.tensor, q_stride: tl.tensor, out_stride: tl.tensor, table_stride: tl.tensor,
    queries: tl.tensor, splits: tl.tensor, slots: tl.tensor, window: tl.tensor, scale: tl.tensor, cap: tl.tensor,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_SIZE: tl.constexpr, WINDOW: tl.constexpr,
    CAP: tl.constexpr, FP8: tl.constexpr, CHUNK: tl.constexpr, BODY: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
) -> None:  # fmt: skip
    """Grid (KV heads, tiles, splits). CHUNK: a split has every splits-th chunk; 0: an equal share of the keys.

    BODY: keys that every row sees are walked without masks, for speed; the bits are the same. How often a program goes
    round, and where its result goes, is found at run time: one binary serves prefill and decode.
    """
    head, tile, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    span, first = tl.load(tiles + 2 * tile), tl.load(tiles + 2 * tile + 1)
    # All that the first keys hang on is read at once, also by a program that then has nothing to do.
    length, context = tl.load(lengths + span), tl.load(contexts + span)
    start, row = tl.load(starts + span), tl.load(rows + span)
    count = tl.minimum(queries, length - first)
    shares = tl.where(length == 1, splits, 1)
    if (count <= 0) | (split >= shares):
        return
    position = context - length + first
    table = block_tables + row.to(tl.int64) * table_stride

    m = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    query_M = m // GROUP
    head_M = head * GROUP + m % GROUP
    token_M = (start + first + query_M).to(tl.int64)
    live_MD = (query_M < count)[:, None] & (d < D)[None, :]
    q_MD = tl.load(q + token_M[:, None] * q_stride + (head_M * D)[:, None] + d[None, :], mask=live_MD, other=0.0)
    positions_M = position + tl.minimum(query_M, count - 1)

    high = position + count
    low = 0
    if WINDOW:
        low = tl.maximum(0, position - window + 1)

    top_M = tl.full([BLOCK_M], float("-inf"), tl.float32)
    sum_M = tl.zeros([BLOCK_M], tl.float32)
    acc_MD = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if CHUNK:
        origin = low // CHUNK
        last = tl.cdiv(high, CHUNK) - origin
        step = shares
    else:
        share = tl.cdiv(tl.cdiv(high, BLOCK_N) - low // BLOCK_N, shares) * BLOCK_N
        last = split + 1
        step = 1
    for part in tl.range(split, last, step):
        if CHUNK:
            begin = (origin + part) * CHUNK
            end = tl.minimum(begin + CHUNK, high)
            begin = tl.maximum(begin, low // BLOCK_N * BLOCK_N)
        else:
            begin = low // BLOCK_N * BLOCK_N + part * share
            end = tl.minimum(begin + share, high)
        part_top, part_sum, part_acc = _part(
            q_MD, positions_M, begin, end, position, low, high, table, head,
            k_cache, v_cache, k_scales, v_scales, scale, cap, window,
            KV_HEADS, BLOCK_SIZE, D, WINDOW, CAP, FP8, BODY, BLOCK_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip
        if shares > 1:
            place_M = (span * KV_HEADS * GROUP + head_M).to(tl.int64) * slots + part
            live_M = query_M < count
            tl.store(stats + 2 * place_M, part_top, mask=live_M)
            tl.store(stats + 2 * place_M + 1, part_sum, mask=live_M)
            # What has no keys has no sum either: only its top is read.
            tl.store(partials + place_M[:, None] * D + d[None, :], part_acc, mask=live_MD & (begin < end))
        if CHUNK:
            top_M, sum_M, acc_MD = _merged(top_M, sum_M, acc_MD, part_top, part_sum, part_acc)
        else:
            top_M, sum_M, acc_MD = part_top, part_sum, part_acc
    if shares == 1:
        places_MD = token_M[:, None] * out_stride + (head_M * D)[:, None] + d[None, :]
        tl.store(out + places_MD, (acc_MD / sum_M[:, None]).to(out.dtype.element_ty), mask=live_MD)


@triton.jit(
    do_not_specialize=["splits", "slots", "window"], do_not_specialize_on_alignment=["starts", "lengths", "contexts"]
)
def combine_kernel(
    partials: tl.tensor, stats: tl.tensor, out: tl.tensor, starts: tl.tensor, lengths: tl.tensor, contexts: tl.tensor,
    out_stride: tl.tensor, splits: tl.tensor, slots: tl.tensor, window: tl.tensor,
    HEADS: tl.constexpr, D: tl.constexpr, WINDOW: tl.constexpr, CHUNK: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:  # fmt: skip
    """Grid (heads, spans): puts together the parts of each span of one token.

    CHUNK: one after the other, as `attention_kernel` does. Else all BLOCK_S ≥ splits at once.
    """
    head = tl.program_id(0)
    span = tl.program_id(1)
    if tl.load(lengths + span) != 1:
        return
    d = tl.arange(0, BLOCK_D)
    place = (span * HEADS + head).to(tl.int64) * slots
    target = out + tl.load(starts + span).to(tl.int64) * out_stride + head * D + d
    if CHUNK:
        high = tl.load(contexts + span)
        low = 0
        if WINDOW:
            low = tl.maximum(0, high - window)
        top = tl.full([1], float("-inf"), tl.float32)
        total = tl.zeros([1], tl.float32)
        acc_1D = tl.zeros([1, BLOCK_D], tl.float32)
        for part in tl.range(0, tl.cdiv(high, CHUNK) - low // CHUNK):
            at = place + part + tl.arange(0, 1)
            part_1D = tl.load(partials + at[:, None] * D + d[None, :], mask=(d < D)[None, :], other=0)
            part_top, part_sum = tl.load(stats + 2 * at), tl.load(stats + 2 * at + 1)
            top, total, acc_1D = _merged(top, total, acc_1D, part_top, part_sum, part_1D)
        # Summed over one row: the same numbers without the dimension.
        result_D = tl.sum(acc_1D / total[:, None], 0)
    else:
        s = tl.arange(0, BLOCK_S)
        top_S = tl.load(stats + 2 * (place + s), mask=s < splits, other=float("-inf"))
        sum_S = tl.load(stats + 2 * (place + s) + 1, mask=s < splits, other=0)
        met_S = top_S != float("-inf")
        wanted = met_S[:, None] & (d < D)[None, :]
        part_SD = tl.load(partials + (place + s)[:, None] * D + d[None, :], mask=wanted, other=0.0)
        weights_S = tl.where(met_S, tl.exp2(top_S - tl.max(top_S, 0)), 0.0)
        result_D = tl.sum(part_SD * weights_S[:, None], 0) / tl.sum(sum_S * weights_S, 0)
    tl.store(target, result_D.to(out.dtype.element_ty), mask=d < D)
