"""The kernels of `sampling.py`, which says what they do and why that is right."""

from __future__ import annotations

import triton
import triton.language as tl

from headrace.backends.philox import GUMBEL_SPREAD
from headrace.backends.torch.kernels.philox import ROUGH, gumbel, philox_block, philox_words, rough_gumbel

NOTHING_WANTED = -1
"""In place of a token: the row is padding."""

NOT_FINITE = -2
"""In place of a token: a NaN among the logits, or +inf the largest."""

NO_TOKEN = -3
"""In place of a token: every logit is -inf."""

NOTHING, GREEDY, RANDOM = 0, 1, 2
"""Modes of a row, in the last column of `Draws.ints`."""

_NOT_FINITE = tl.constexpr(NOT_FINITE)
_NO_TOKEN = tl.constexpr(NO_TOKEN)
_NOTHING_WANTED = tl.constexpr(NOTHING_WANTED)
_NOTHING = tl.constexpr(NOTHING)
_RANDOM = tl.constexpr(RANDOM)
_SPREAD = tl.constexpr(GUMBEL_SPREAD)
_LEAST = tl.constexpr(-3.4028234663852886e38)
_MOST_ID = tl.constexpr(0x7FFFFFFF)


# ---------------------------------------------------------------- pieces


@triton.jit
def _key(values: tl.tensor) -> tl.tensor:
    """int32 keys that ascend as float32 does; -0 and +0 are one number."""
    bits = tl.where(values == 0.0, 0.0, values).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _value(key: tl.tensor) -> tl.tensor:
    """The float32 of a key."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _middle(low: tl.tensor, high: tl.tensor) -> tl.tensor:
    """Half way, rounded up, where the sum would overflow."""
    return (low | high) - ((low ^ high) >> 1)


@triton.jit
def _filters(floats_ptr: tl.tensor, ints_ptr: tl.tensor, row: tl.tensor, vocab: tl.tensor) -> tuple[tl.tensor, ...]:
    """temperature, top_k (or the largest int32), top_p, min_p, seed's low and high word, position."""
    temperature = tl.load(floats_ptr + row * 3)
    top_p = tl.load(floats_ptr + row * 3 + 1)
    min_p = tl.load(floats_ptr + row * 3 + 2)
    top_k = tl.load(ints_ptr + row * 5)
    top_k = tl.where((top_k > 0) & (top_k < vocab), top_k, _MOST_ID).to(tl.int32)
    seed_low = tl.load(ints_ptr + row * 5 + 1)
    seed_high = tl.load(ints_ptr + row * 5 + 2)
    position = tl.load(ints_ptr + row * 5 + 3)
    return temperature, top_k, top_p, min_p, seed_low, seed_high, position


@triton.jit
def _weights(values: tl.tensor, peak: tl.tensor, inverse: tl.tensor) -> tl.tensor:
    """exp((logit - peak) / temperature) in float64, given 1 / temperature; -inf weighs nothing."""
    return tl.exp((values.to(tl.float64) - peak.to(tl.float64)) * inverse)


@triton.jit
def _nobody() -> tuple[tl.tensor, tl.tensor]:
    """Score and id of a draw that nobody has entered."""
    return tl.full((), float("-inf"), tl.float64), tl.full((), -1, tl.int32)


@triton.jit
def _draw(
    logits_ptr: tl.tensor, values: tl.tensor, ids: tl.tensor, quads: tl.tensor, able: tl.tensor, peak: tl.tensor,
    floats: tl.tuple, best_score: tl.tensor, best_id: tl.tensor,
) -> tuple[tl.tensor, tl.tensor]:  # fmt: skip
    """The better of the best so far and the winner among the able: (score, id). `ids` ascend, also from call to call.

    float32 leaves those that could have won, one as a rule; float64 decides. `peak`: finite, no less than any value,
    and that of one who takes part, here or in another call: whoever is far below it has no chance.
    """
    temperature, _, _, _, seed_low, seed_high, position = floats
    inverse = (1.0 / temperature).to(tl.float32)
    words = philox_block(quads, seed_low, seed_high, position)
    below = tl.where(able, values, peak) - peak
    scores = tl.where(able, below * inverse + rough_gumbel(words), float("-inf"))
    # Float64 scores of huge logits are coarse, and tie: then all of them are looked at.
    margin = 4.0 * ROUGH + tl.abs(peak) * inverse * 1e-15
    to_beat = (best_score - peak.to(tl.float64) / temperature).to(tl.float32)
    close = able & (scores >= tl.maximum(tl.max(scores, 0), to_beat) - margin)
    left = tl.sum(close.to(tl.int32), 0)
    last = -1
    while left > 0:
        token = tl.min(tl.where(close & (ids > last), ids, _MOST_ID), 0)
        logit = tl.load(logits_ptr + token).to(tl.float32).to(tl.float64)
        w0, w1, w2, w3 = philox_words(token // 4, seed_low, seed_high, position)
        lane = token % 4
        word = tl.where(lane < 2, tl.where(lane == 0, w0, w1), tl.where(lane == 2, w2, w3))
        score = logit / temperature + gumbel(word)
        best_id = tl.where(score > best_score, token, best_id)
        best_score = tl.where(score > best_score, score, best_score)
        last = token
        left -= 1
    return best_score, best_id


# ---------------------------------------------------------------- survey


@triton.jit(do_not_specialize_on_alignment=["floats_ptr", "ints_ptr"])
def survey_kernel(
    logits_ptr: tl.tensor, row_stride: tl.tensor, vocab: tl.tensor, floats_ptr: tl.tensor, ints_ptr: tl.tensor,
    peaks_ptr: tl.tensor, tops_ptr: tl.tensor, scores_ptr: tl.tensor, winners_ptr: tl.tensor, masses_ptr: tl.tensor,
    maxima_ptr: tl.tensor, tiles: tl.tensor, groups: tl.tensor, TILE: tl.constexpr, GROUP: tl.constexpr,
) -> None:  # fmt: skip
    """Of one tile: peak, its id or NOT_FINITE; if it draws, the winner; if it filters, mass and groups' maxima."""
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    mode = tl.load(ints_ptr + row * 5 + 4)
    if mode == _NOTHING:
        return
    logits_ptr += row * row_stride
    ids = tile * TILE + tl.arange(0, TILE)
    values = tl.load(logits_ptr + ids, mask=ids < vocab, other=float("-inf")).to(tl.float32)
    nan = values != values
    peak = tl.max(tl.where(nan, float("-inf"), values), 0)
    bad = (tl.sum(nan.to(tl.int32), 0) > 0) | (peak == float("inf"))
    top = tl.min(tl.where(values == peak, ids, _MOST_ID), 0)
    place = row * tiles + tile
    tl.store(peaks_ptr + place, peak)
    tl.store(tops_ptr + place, tl.where(bad, _NOT_FINITE, top))
    if mode == _RANDOM:
        floats = _filters(floats_ptr, ints_ptr, row, vocab)
        temperature, top_k, top_p, min_p, _, _, _ = floats
        # Of a tile that is all -inf, or not finite, nobody is able.
        able = (values > float("-inf")) & (bad == 0)
        known = tl.where(bad | (peak == float("-inf")), 0.0, peak)
        if (top_k < _MOST_ID) | (top_p < 1) | (min_p > 0):
            group = tile * (TILE // GROUP) + tl.arange(0, TILE // GROUP)
            maxima = tl.max(tl.reshape(tl.where(able, values, float("-inf")), (TILE // GROUP, GROUP)), 1)
            tl.store(maxima_ptr + row * groups + group, maxima, mask=group < groups)
        if (top_k == _MOST_ID) & (top_p < 1):
            weights = _weights(tl.where(able, values, known), known, 1.0 / temperature)
            tl.store(masses_ptr + place, tl.sum(tl.where(able, weights, 0.0), 0))
        quads = tile * (TILE // 4) + tl.arange(0, TILE // 4)
        score, winner = _nobody()
        score, winner = _draw(logits_ptr, values, ids, quads, able, known, floats, score, winner)
        tl.store(scores_ptr + place, score)
        tl.store(winners_ptr + place, winner)


# ---------------------------------------------------------------- plan


@triton.jit
def _kth_floor(maxima: tl.tensor, peak: tl.tensor, top_k: tl.tensor) -> tl.tensor:
    """A value that at least top_k logits reach: the k-th largest of the groups' maxima. Lowest of all if they are
    fewer, or -inf."""
    keys = _key(maxima)
    low = _key(tl.full((), _LEAST, tl.float32))
    high = _key(peak)
    while low < high:
        middle = _middle(low, high)
        count = tl.sum((keys >= middle).to(tl.int32), 0)
        enough = count >= top_k
        low = tl.where(enough, middle, low)
        high = tl.where(enough, tl.where(count == top_k, middle, high), middle - 1)
    return _value(low)


@triton.jit(do_not_specialize_on_alignment=["floats_ptr", "ints_ptr", "tokens_ptr"])
def plan_kernel(
    logits_ptr: tl.tensor, row_stride: tl.tensor, vocab: tl.tensor, floats_ptr: tl.tensor, ints_ptr: tl.tensor,
    peaks_ptr: tl.tensor, tops_ptr: tl.tensor, scores_ptr: tl.tensor, winners_ptr: tl.tensor, masses_ptr: tl.tensor,
    maxima_ptr: tl.tensor, found_ptr: tl.tensor, bounds_ptr: tl.tensor, tokens_ptr: tl.tensor, tiles: tl.tensor,
    live_ptr: tl.tensor, groups: tl.tensor, TILES: tl.constexpr, GROUPS: tl.constexpr,
) -> None:  # fmt: skip
    """Of one row: its token, or the first winner with the bounds and the list of what may yet beat it."""
    row = tl.program_id(0).to(tl.int64)
    mode = tl.load(ints_ptr + row * 5 + 4)
    if mode == _NOTHING:
        tl.store(found_ptr + row, 0)
        tl.store(tokens_ptr + row, _NOTHING_WANTED)
        return
    tile = tl.arange(0, TILES)
    place = row * tiles + tile
    peaks = tl.load(peaks_ptr + place, mask=tile < tiles, other=float("-inf"))
    tops = tl.load(tops_ptr + place, mask=tile < tiles, other=_MOST_ID)
    peak = tl.max(peaks, 0)
    token = tl.min(tl.where(peaks == peak, tops, _MOST_ID), 0)
    token = tl.where(peak == float("-inf"), _NO_TOKEN, token)
    token = tl.where(tl.min(tops, 0) == _NOT_FINITE, _NOT_FINITE, token)
    found = 0
    if (mode == _RANDOM) & (token >= 0):
        temperature, top_k, top_p, min_p, _, _, _ = _filters(floats_ptr, ints_ptr, row, vocab)
        scores = tl.load(scores_ptr + place, mask=tile < tiles, other=float("-inf"))
        winners = tl.load(winners_ptr + place, mask=tile < tiles, other=_MOST_ID)
        token = tl.min(tl.where(scores == tl.max(scores, 0), winners, _MOST_ID), 0)
        if (top_k < _MOST_ID) | (top_p < 1) | (min_p > 0):
            group = tl.arange(0, GROUPS)
            inside = group < groups
            maxima = tl.load(maxima_ptr + row * groups + group, mask=inside, other=float("-inf"))
            height = peak.to(tl.float64)
            mass = tl.full((), 0.0, tl.float64)
            # Nobody this far below the peak wins, whatever the draw.
            lowest = -_SPREAD * temperature
            if min_p > 0:
                lowest = tl.maximum(lowest, temperature * tl.log(min_p))
            if (top_k == _MOST_ID) & (top_p < 1):
                masses = tl.load(masses_ptr + place, mask=tile < tiles, other=0.0)
                mass = tl.sum(masses * _weights(peaks, peak, 1.0 / temperature), 0)
                # All lighter than this weigh less than 1 - top_p of the whole together: the nucleus needs none.
                lowest = tl.maximum(lowest, temperature * tl.log((1.0 - top_p) * mass / vocab))
            margin = 1e-5 * (tl.abs(height) + temperature)
            floor = tl.maximum(height + lowest - margin, _LEAST).to(tl.float32)
            # Nobody behind the winner matters: either it stays, or those ahead of it race again.
            floor = tl.maximum(floor, tl.load(logits_ptr + row * row_stride + token).to(tl.float32))
            if top_k < _MOST_ID:
                least = _kth_floor(maxima, peak, top_k)
                # What top-p is a share of is the whole that top-k leaves, however light.
                floor = tl.where(top_p < 1, least, tl.maximum(floor, least))
            live = inside & (maxima >= floor)
            slot = tl.cumsum(live.to(tl.int32), 0) - 1
            tl.store(live_ptr + row * groups + slot, group, mask=live)
            found = tl.sum(live.to(tl.int32), 0)
            tl.store(bounds_ptr + row * 3, height)
            tl.store(bounds_ptr + row * 3 + 1, floor.to(tl.float64))
            tl.store(bounds_ptr + row * 3 + 2, mass)
    tl.store(found_ptr + row, found)
    tl.store(tokens_ptr + row, token)


# ---------------------------------------------------------------- race


@triton.jit
def _ahead(values: tl.tensor, ids: tl.tensor, value: tl.tensor, token: tl.tensor) -> tl.tensor:
    """Who comes before the token of that logit: the likelier, and of equals the lower id."""
    return (values > value) | ((values == value) & (ids < token))


@triton.jit(do_not_specialize_on_alignment=["floats_ptr", "ints_ptr", "tokens_ptr"])
def race_kernel(
    logits_ptr: tl.tensor, row_stride: tl.tensor, vocab: tl.tensor, floats_ptr: tl.tensor, ints_ptr: tl.tensor,
    counts_ptr: tl.tensor, scores_ptr: tl.tensor, winners_ptr: tl.tensor, masses_ptr: tl.tensor, found_ptr: tl.tensor,
    bounds_ptr: tl.tensor, tokens_ptr: tl.tensor, tiles: tl.tensor, TILE: tl.constexpr, FEW: tl.constexpr,
) -> None:  # fmt: skip
    """Of one tile of a row of many candidates: the number, mass and winner of those ahead of the row's first winner."""
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    if tl.load(found_ptr + row) <= FEW:
        return
    logits_ptr += row * row_stride
    floats = _filters(floats_ptr, ints_ptr, row, vocab)
    temperature, _, top_p, _, _, _, _ = floats
    peak = tl.load(bounds_ptr + row * 3).to(tl.float32)
    floor = tl.load(bounds_ptr + row * 3 + 1).to(tl.float32)
    token = tl.load(tokens_ptr + row)
    value = tl.load(logits_ptr + token).to(tl.float32)
    ids = tile * TILE + tl.arange(0, TILE)
    values = tl.load(logits_ptr + ids, mask=ids < vocab, other=float("-inf")).to(tl.float32)
    ahead = (values >= floor) & _ahead(values, ids, value, token)
    place = row * tiles + tile
    tl.store(counts_ptr + place, tl.sum(ahead.to(tl.int32), 0))
    mass = tl.full((), 0.0, tl.float64)
    if top_p < 1:
        mass = tl.sum(_weights(tl.where(ahead, values, float("-inf")), peak, 1.0 / temperature), 0)
    tl.store(masses_ptr + place, mass)
    # The tile's winner among all is the winner among those ahead, if it is one of them.
    winner = tl.load(winners_ptr + place)
    best = tl.load(logits_ptr + winner, mask=winner >= 0, other=float("-inf")).to(tl.float32)
    if (best < floor) | (_ahead(best, winner, value, token) == 0):
        quads = tile * (TILE // 4) + tl.arange(0, TILE // 4)
        score, winner = _nobody()
        score, winner = _draw(logits_ptr, values, ids, quads, ahead, peak, floats, score, winner)
        tl.store(scores_ptr + place, score)
        tl.store(winners_ptr + place, winner)


# ---------------------------------------------------------------- finish


@triton.jit
def _places(
    live_ptr: tl.tensor, found: tl.tensor, first: tl.tensor, GROUPS: tl.constexpr, WIDTH: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:  # fmt: skip
    """Of the groups from place `first` of the list, WIDTH numbers each that count them on: (GROUPS, WIDTH), and whether
    the list goes so far."""
    slot = first + tl.arange(0, GROUPS)
    group = tl.load(live_ptr + slot, mask=slot < found, other=0)
    return group[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :], (slot < found)[:, None]


@triton.jit
def _candidates(
    logits_ptr: tl.tensor, vocab: tl.tensor, live_ptr: tl.tensor, found: tl.tensor, first: tl.tensor, floor: tl.tensor,
    CHUNK: tl.constexpr, GROUP: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:  # fmt: skip
    """Logits and ids of the groups from place `first` of the list; -inf where there is none, or below the floor."""
    ids, listed = _places(live_ptr, found, first, CHUNK // GROUP, GROUP)
    values = tl.load(logits_ptr + ids, mask=listed & (ids < vocab), other=float("-inf")).to(tl.float32)
    values = tl.where(values >= floor, values, float("-inf"))
    return tl.reshape(values, (CHUNK,)), tl.reshape(ids, (CHUNK,))


@triton.jit
def _full_key(values: tl.tensor, ids: tl.tensor) -> tl.tensor:
    """int64 keys that ascend as (likelier, lower id) do; of -inf, lower than of any number."""
    return (_key(values).to(tl.int64) << 32) + (_MOST_ID - ids)


@triton.jit
def _mass_of_top(
    logits_ptr: tl.tensor, vocab: tl.tensor, live_ptr: tl.tensor, found: tl.tensor, floor: tl.tensor, peak: tl.tensor,
    inverse: tl.tensor, top_k: tl.tensor, CHUNK: tl.constexpr, GROUP: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """The sum of the weights of the top_k candidates: the k-th key is found by bisection."""
    step: tl.constexpr = CHUNK // GROUP
    low = _full_key(floor, _MOST_ID)
    high = _full_key(peak, 0)
    while low < high:
        middle = _middle(low, high)
        count = 0
        first = 0
        while first < found:
            values, ids = _candidates(logits_ptr, vocab, live_ptr, found, first, floor, CHUNK, GROUP)
            count += tl.sum((_full_key(values, ids) >= middle).to(tl.int32), 0)
            first += step
        enough = count >= top_k
        low = tl.where(enough, middle, low)
        high = tl.where(enough, tl.where(count == top_k, middle, high), middle - 1)
    mass = tl.full((), 0.0, tl.float64)
    first = 0
    while first < found:
        values, ids = _candidates(logits_ptr, vocab, live_ptr, found, first, floor, CHUNK, GROUP)
        kept = tl.where(_full_key(values, ids) >= low, values, float("-inf"))
        mass += tl.sum(_weights(kept, peak, inverse), 0)
        first += step
    return mass


@triton.jit
def _measure(
    logits_ptr: tl.tensor, vocab: tl.tensor, live_ptr: tl.tensor, found: tl.tensor, floor: tl.tensor, peak: tl.tensor,
    inverse: tl.tensor, value: tl.tensor, token: tl.tensor, weighs: tl.tensor, CHUNK: tl.constexpr, GROUP: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:  # fmt: skip
    """How many candidates are ahead of the token, and, if `weighs`, their mass."""
    step: tl.constexpr = CHUNK // GROUP
    count = tl.full((), 0, tl.int32)
    mass = tl.full((), 0.0, tl.float64)
    first = 0
    while first < found:
        values, ids = _candidates(logits_ptr, vocab, live_ptr, found, first, floor, CHUNK, GROUP)
        ahead = _ahead(values, ids, value, token)
        count += tl.sum(ahead.to(tl.int32), 0)
        if weighs:
            mass += tl.sum(_weights(tl.where(ahead, values, float("-inf")), peak, inverse), 0)
        first += step
    return count, mass


@triton.jit
def _draw_ahead(
    logits_ptr: tl.tensor, vocab: tl.tensor, live_ptr: tl.tensor, found: tl.tensor, floor: tl.tensor, peak: tl.tensor,
    floats: tl.tuple, value: tl.tensor, token: tl.tensor, CHUNK: tl.constexpr, GROUP: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """The winner among the candidates ahead of the token."""
    step: tl.constexpr = CHUNK // GROUP
    score, winner = _nobody()
    first = 0
    while first < found:
        values, ids = _candidates(logits_ptr, vocab, live_ptr, found, first, floor, CHUNK, GROUP)
        quads, _listed = _places(live_ptr, found, first, step, GROUP // 4)
        quads = tl.reshape(quads, (CHUNK // 4,))
        ahead = _ahead(values, ids, value, token)
        score, winner = _draw(logits_ptr, values, ids, quads, ahead, peak, floats, score, winner)
        first += step
    return winner


@triton.jit(do_not_specialize_on_alignment=["floats_ptr", "ints_ptr", "tokens_ptr"])
def finish_kernel(
    logits_ptr: tl.tensor, row_stride: tl.tensor, vocab: tl.tensor, floats_ptr: tl.tensor, ints_ptr: tl.tensor,
    counts_ptr: tl.tensor, scores_ptr: tl.tensor, winners_ptr: tl.tensor, masses_ptr: tl.tensor, found_ptr: tl.tensor,
    bounds_ptr: tl.tensor, tokens_ptr: tl.tensor, tiles: tl.tensor, live_ptr: tl.tensor, groups: tl.tensor,
    TILES: tl.constexpr, CHUNK: tl.constexpr, GROUP: tl.constexpr, FEW: tl.constexpr,
) -> None:  # fmt: skip
    """Of one row: the winner stays if it is inside of every filter; if not, those ahead of it race again."""
    row = tl.program_id(0).to(tl.int64)
    found = tl.load(found_ptr + row)
    if found == 0:
        return
    logits_ptr += row * row_stride
    live_ptr += row * groups
    floats = _filters(floats_ptr, ints_ptr, row, vocab)
    temperature, top_k, top_p, min_p, _, _, _ = floats
    inverse = 1.0 / temperature
    peak = tl.load(bounds_ptr + row * 3).to(tl.float32)
    floor = tl.load(bounds_ptr + row * 3 + 1).to(tl.float32)
    goal = top_p * tl.load(bounds_ptr + row * 3 + 2)
    if (top_k < _MOST_ID) & (top_p < 1):
        goal = top_p * _mass_of_top(logits_ptr, vocab, live_ptr, found, floor, peak, inverse, top_k, CHUNK, GROUP)
    tile = tl.arange(0, TILES)
    there = tile < tiles
    place = row * tiles + tile
    token = tl.load(tokens_ptr + row)
    raced = found > FEW
    outside = True
    while outside:
        value = tl.load(logits_ptr + token).to(tl.float32)
        if raced:
            count = tl.sum(tl.load(counts_ptr + place, mask=there, other=0), 0)
            mass = tl.sum(tl.load(masses_ptr + place, mask=there, other=0.0), 0)
        else:
            count, mass = _measure(
                logits_ptr, vocab, live_ptr, found, floor, peak, inverse, value, token, top_p < 1, CHUNK, GROUP
            )
        inside = (value >= floor) & (count < top_k) & ((top_p >= 1) | (mass < goal))
        inside = inside & (tl.exp((value.to(tl.float64) - peak.to(tl.float64)) / temperature) >= min_p)
        outside = (count > 0) & (inside == 0)
        if outside:
            if raced:
                scores = tl.load(scores_ptr + place, mask=there, other=float("-inf"))
                winners = tl.load(winners_ptr + place, mask=there, other=_MOST_ID)
                token = tl.min(tl.where(scores == tl.max(scores, 0), winners, _MOST_ID), 0)
            else:
                token = _draw_ahead(logits_ptr, vocab, live_ptr, found, floor, peak, floats, value, token, CHUNK, GROUP)
            raced = False
    tl.store(tokens_ptr + row, token)
