"""What sampling means (docs/CONTRACTS.md §2) in plain Python: slow, written apart from `headrace.backends.sampling`.

One token at a time, each rule as it is worded, no shortcut. Logits are Python floats that hold float32 values;
arithmetic on them rounds to float32 after each operation. From the temperature on, float64.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from headrace.core.types import SamplingParams, TokenLogprobs

INF = math.inf

TINY, MOST = 2.0**-126, (2 - 2.0**-23) * 2.0**127
"""Least and largest normal float32: the repetition penalty stays between them, and what it makes of a logit below the
latter, so that no penalty masks an id or makes a logit infinite."""

CLOSE = 1e-11
"""Two float64 sums or differences this near one another (relative) may fall either way with the order of adding."""


@dataclass(frozen=True)
class Case:
    """One place at which a token is wanted, with all that decides it."""

    logits: tuple[float, ...]
    sampling: SamplingParams
    prompt: tuple[int, ...] = (0,)
    answer: tuple[int, ...] = ()
    stop_ids: tuple[int, ...] = ()
    mask: bytes | None = None


@dataclass(frozen=True)
class Kept:
    """What the filters leave, ascending by id. `sure` is False where the last bits of a float64 sum decided a cut."""

    weights: dict[int, float]
    sure: bool


@dataclass(frozen=True)
class Choice:
    """`token` is None where every id is masked."""

    token: int | None
    sure: bool = True


def f32(number: float) -> float:
    """Rounded to float32. A float64 result of +, -, × or ÷ of two float32 values rounds as the exact one does, since 53
    bits are more than twice 24 and two."""
    try:
        return float(struct.unpack("<f", struct.pack("<f", number))[0])
    except OverflowError:
        return math.copysign(INF, number)


# ---------------------------------------------------------------- masks and penalties


def masked(case: Case) -> list[float]:
    """The logits after the masks and the biases."""
    sampling, values = case.sampling, list(case.logits)
    size = len(values)
    if sampling.allowed_token_ids is not None:
        allowed = set(sampling.allowed_token_ids)
        for token in range(size):
            if token not in allowed:
                values[token] = -INF
    for sequence in sampling.bad_words_ids:
        before, last = sequence[:-1], sequence[-1]
        ends_so = len(before) <= len(case.answer) and all(
            case.answer[len(case.answer) - len(before) + i] == token for i, token in enumerate(before)
        )
        if ends_so and last < size:
            values[last] = -INF
    for token, bias in sampling.logit_bias:
        if token < size:
            values[token] = f32(values[token] + f32(bias))
    if len(case.answer) < sampling.min_tokens:
        for token in case.stop_ids:
            if token < size:
                values[token] = -INF
    if case.mask is not None:
        for token in range(size):
            if not case.mask[token // 8] & (1 << (token % 8)):
                values[token] = -INF
    return values


def adjusted(case: Case) -> list[float]:
    """The logits that the temperature divides: after masks, biases and penalties."""
    sampling, values = case.sampling, masked(case)
    repetition = min(max(f32(sampling.repetition_penalty), TINY), MOST)
    frequency, presence = f32(sampling.frequency_penalty), f32(sampling.presence_penalty)
    prompt = set(case.prompt)
    counts: dict[int, int] = {}
    for token in case.answer:
        counts[token] = counts.get(token, 0) + 1
    for token, value in enumerate(values):
        if value == -INF:
            continue
        if token in counts or token in prompt:
            value = f32(value / repetition) if value > 0 else f32(value * repetition)
            value = min(max(value, -MOST), MOST)
        if token in counts:
            value = f32(value - f32(frequency * f32(counts[token])))
            value = f32(value - presence)
        values[token] = value
    return values


# ---------------------------------------------------------------- filters


def near(left: float, right: float, scale: float) -> bool:
    return abs(left - right) <= CLOSE * scale


def shortest_prefix(order: list[int], weights: dict[int, float], goal: float) -> tuple[list[int], bool]:
    """The fewest of `order` whose weights sum to `goal` of the whole, and whether that is sure."""
    whole = math.fsum(weights.values())
    total, sure = 0.0, True
    for length, token in enumerate(order, start=1):
        total += weights[token]
        sure = sure and not near(total, goal * whole, whole)
        if total >= goal * whole:
            return order[:length], sure
    return order, sure


def typical(weights: dict[int, float], values: Sequence[float], mass: float) -> tuple[list[int], bool]:
    """arXiv 2202.00666 §4: the ids whose surprise is nearest to the expected one, up to `mass`."""
    whole = math.fsum(weights.values())
    surprise = {token: -math.log(weight / whole) if weight > 0 else INF for token, weight in weights.items()}
    expected = math.fsum(weights[token] / whole * surprise[token] for token in weights if weights[token] > 0)
    distance = {token: abs(surprise[token] - expected) for token in weights}
    order = sorted(weights, key=lambda token: (distance[token], token))
    kept, sure = shortest_prefix(order, weights, mass)
    # Which of two comes first is unsure where their distances are all but equal and their logits are not the same.
    for i in (len(kept) - 1, len(kept)):
        if 0 < i < len(order) and values[order[i - 1]] != values[order[i]]:
            one, two = distance[order[i - 1]], distance[order[i]]
            sure = sure and not (two < INF and near(one, two, 1 + two + expected))
    return kept, sure


def kept(values: Sequence[float], sampling: SamplingParams) -> Kept:
    """The weights that the draw chooses among; there must be an id above -inf."""
    peak = max(values)
    left = [token for token, value in enumerate(values) if value > -INF]
    left.sort(key=lambda token: (-values[token], token))
    if sampling.top_k > 0:
        left = left[: sampling.top_k]
    sure = True
    weights = {token: math.exp((values[token] - peak) / sampling.temperature) for token in left}
    if sampling.typical_p < 1:
        left, sure = typical(weights, values, sampling.typical_p)
        weights = {token: weights[token] for token in left}
    if sampling.top_p < 1:
        order = sorted(weights, key=lambda token: (-values[token], token))
        left, certain = shortest_prefix(order, weights, sampling.top_p)
        sure = sure and certain
        weights = {token: weights[token] for token in left}
    if sampling.min_p > 0:
        likeliest = max(weights.values())
        floor = sampling.min_p * likeliest
        sure = sure and not any(near(w, floor, floor) and w != likeliest for w in weights.values())
        weights = {token: weight for token, weight in weights.items() if weight >= floor}
    return Kept(dict(sorted(weights.items())), sure)


def distribution(case: Case) -> dict[int, float]:
    """The exact probability of each id that may be drawn."""
    weights = kept(adjusted(case), case.sampling).weights
    whole = math.fsum(weights.values())
    return {token: weight / whole for token, weight in weights.items()}


# ---------------------------------------------------------------- the draw


def philox(counter: Sequence[int], key: Sequence[int]) -> tuple[int, int, int, int]:
    """Philox4x32-10 (Salmon et al., SC 2011, §4.3)."""
    a, b, c, d = counter
    left, right = key
    for _ in range(10):
        from_a, from_c = 0xD2511F53 * a, 0xCD9E8D57 * c
        a, b = (from_c >> 32) ^ b ^ left, from_c & 0xFFFFFFFF
        c, d = (from_a >> 32) ^ d ^ right, from_a & 0xFFFFFFFF
        left, right = (left + 0x9E3779B9) & 0xFFFFFFFF, (right + 0xBB67AE85) & 0xFFFFFFFF
    return a, b, c, d


def gumbels(seed: int, output_position: int, tokens: Iterable[int]) -> dict[int, float]:
    """Each id's Gumbel(0, 1)."""
    key = (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF)
    blocks: dict[int, tuple[int, int, int, int]] = {}
    found: dict[int, float] = {}
    for token in tokens:
        block = token // 4
        if block not in blocks:
            blocks[block] = philox((block, output_position & 0xFFFFFFFF, output_position >> 32, 0), key)
        uniform = (blocks[block][token % 4] + 0.5) / 4294967296
        found[token] = -math.log(-math.log(uniform))
    return found


def choose(case: Case) -> Choice:
    values, sampling = adjusted(case), case.sampling
    peak = max(values)
    if peak == -INF:
        return Choice(None)
    if sampling.temperature < 1e-5:
        return Choice(values.index(peak))
    left = kept(values, sampling)
    assert sampling.seed is not None
    noise = gumbels(sampling.seed, len(case.answer), left.weights)
    best, token = -INF, -1
    for candidate in sorted(left.weights):
        score = values[candidate] / sampling.temperature + noise[candidate]
        if score > best:
            best, token = score, candidate
    return Choice(token, left.sure)


def logprobs(logits: Sequence[float], token: int, count: int) -> TokenLogprobs:
    """Log-softmax of the raw logits: the token's, and the `count` best."""
    peak = max(logits)
    whole = peak + math.log(math.fsum(math.exp(value - peak) for value in logits))
    best = sorted(range(len(logits)), key=lambda one: (-logits[one], one))[:count]
    return TokenLogprobs(logits[token] - whole, tuple((one, logits[one] - whole) for one in best))


# ---------------------------------------------------------------- statistics


def chi_square_tail(statistic: float, freedom: int) -> float:
    """How likely chi-square of `freedom` degrees is at least `statistic`: the regularised incomplete gamma function
    Q(freedom / 2, statistic / 2), by its series below the peak and its continued fraction above (DLMF 8.7.1, 8.9.2)."""
    a, x = freedom / 2, statistic / 2
    if x <= 0:
        return 1.0
    front = math.exp(a * math.log(x) - x - math.lgamma(a))
    if x < a + 1:
        term = total = 1 / a
        n = a
        while term > total * 1e-17:
            n += 1
            term *= x / n
            total += term
        return 1 - front * total
    # Modified Lentz: x + 1 - a - 1 (1 - a) / (x + 3 - a - 2 (2 - a) / (x + 5 - a - …)).
    b = x + 1 - a
    c, d = INF, 1 / b
    fraction = d
    for i in range(1, 10_000):
        part = -i * (i - a)
        b += 2
        d = 1 / (part * d + b)
        c = b + part / c
        fraction *= c * d
        if abs(c * d - 1) < 1e-15:
            break
    return front * fraction


def fit(counts: dict[int, int], shares: dict[int, float]) -> float:
    """How likely draws of `shares` are to be at least as far from them as `counts` (Pearson). 0.0 where an id was drawn
    that has no share. The rarest ids count as one, so that each cell expects five draws."""
    draws = sum(counts.values())
    if any(token not in shares for token in counts):
        return 0.0
    cells: list[tuple[float, float]] = []
    found = wanted = 0.0
    for token in sorted(shares, key=lambda token: shares[token]):
        found, wanted = found + counts.get(token, 0), wanted + shares[token] * draws
        if wanted >= 5:
            cells.append((found, wanted))
            found = wanted = 0.0
    if len(cells) == 1:
        return 1.0
    return chi_square_tail(sum((seen - due) ** 2 / due for seen, due in cells), len(cells) - 1)
