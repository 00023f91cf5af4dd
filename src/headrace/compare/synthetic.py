"""Synthetic requests: prompts of random ordinary tokens, and answers of exactly so many tokens."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from headrace.compare.arrivals import Arrivals, arrive, generator
from headrace.compare.workloads import Workload, WorkloadRequest, check_room
from headrace.core.errors import InvalidParameter

if TYPE_CHECKING:
    from headrace.engine.model import OpenModel

ALLOWED = "a number of tokens N, or uniform:A:B (from A to B, both included; 1 ≤ A ≤ B)"
MAX_TOKENS = 2**31 - 1


class Lengths(Protocol):
    """How many tokens prompts, or answers, have. Lengths of a trace are known one by one (see `compare.traffic`)."""

    @property
    def longest(self) -> int:
        """The longest that can be drawn."""

    def draw(self, count: int, rng: random.Random) -> tuple[int, ...]:
        """`count` lengths; fewer are a prefix of more."""


@dataclass(frozen=True, slots=True)
class Fixed:
    """All the same."""

    tokens: int

    def __post_init__(self) -> None:
        _check_tokens("tokens", self.tokens, 1)

    def __str__(self) -> str:
        return f"{self.tokens} tokens"

    @property
    def longest(self) -> int:
        return self.tokens

    def draw(self, count: int, rng: random.Random) -> tuple[int, ...]:
        return (self.tokens,) * count


@dataclass(frozen=True, slots=True)
class Uniform:
    """Every length from `low` to `high`, both included, equally likely."""

    low: int
    high: int

    def __post_init__(self) -> None:
        _check_tokens("low", self.low, 1)
        _check_tokens("high", self.high, self.low)

    def __str__(self) -> str:
        return f"{self.low} to {self.high} tokens (uniform)"

    @property
    def longest(self) -> int:
        return self.high

    def draw(self, count: int, rng: random.Random) -> tuple[int, ...]:
        return tuple(self.low + int(rng.random() * (self.high - self.low + 1)) for _ in range(count))


def parse_length(text: str, field: str) -> Lengths:
    """Lengths as a user writes them (ALLOWED). Raises InvalidParameter, naming `field`."""
    try:
        kind, *bounds = text.split(":")
        if kind == "uniform" and len(bounds) == 2:
            return Uniform(int(bounds[0]), int(bounds[1]))
        if not bounds:
            return Fixed(int(kind))
    except (AttributeError, ValueError, InvalidParameter):
        pass  # no text, no number, or one out of range: told below
    raise InvalidParameter(field, text, ALLOWED)


def ordinary_ids(opened: OpenModel) -> tuple[int, ...]:
    """Token ids to make prompts of, ascending: text in whole UTF-8 characters, no special token, none that ends an
    answer. A model without a tokenizer does not say what its tokens are: then all but those that its files name
    (`…_token_id`). Raises InvalidParameter where none is left."""
    size = opened.spec.vocab_size
    if opened.has_text:
        known = opened.vocabulary()
        barred = known.special | known.eos_ids | opened.eos_token_ids
        found = tuple(index for index, data in enumerate(known.tokens) if index not in barred and _is_text(data))
    else:
        named = [value for key, value in opened.checkpoint.config.items() if key.endswith("_token_id")]
        barred = opened.eos_token_ids.union(value for value in named if isinstance(value, int))
        found = tuple(index for index in range(size) if index not in barred)
    if not found:
        raise InvalidParameter("workload", f"a vocabulary of {size}", "a model with ordinary tokens to make prompts of")
    return found


def random_prompt(ids: Sequence[int], length: int, seed: int, index: int) -> tuple[int, ...]:
    """The prompt of request `index`: `length` of `ids`, each equally likely; a longer one begins the same."""
    rng = generator(seed, f"prompt {index}")
    return tuple(ids[int(rng.random() * len(ids))] for _ in range(length))


def synthetic(
    opened: OpenModel,
    count: int,
    prompt_length: Lengths,
    output_length: Lengths,
    arrivals: Arrivals,
    seed: int,
    max_tokens: int | None = None,
) -> Workload:
    """`count` requests; every answer has exactly the length that was drawn for it, or `max_tokens` if that is less.

    Raises InvalidParameter: prompt_length or output_length where the longest of them do not fit the model's context,
    num_requests.
    """
    longest = output_length.longest if max_tokens is None else min(output_length.longest, max_tokens)
    check_room("prompt_length", prompt_length.longest, "output_length", longest, opened.limits.max_model_len)
    ids = ordinary_ids(opened)
    prompts = prompt_length.draw(count, generator(seed, "prompt lengths"))
    answers = output_length.draw(count, generator(seed, "output lengths"))
    requests = tuple(
        WorkloadRequest(random_prompt(ids, length, seed, index), min(answer, longest))
        for index, (length, answer) in enumerate(zip(prompts, answers, strict=True))
    )
    notes = [
        f"Prompts are random ordinary tokens, {prompt_length} each; every answer has {output_length}; seed {seed}."
    ]
    cut = sum(answer > longest for answer in answers)
    if cut:
        notes.append(f"{cut} of {count} answers were cut to {longest} tokens.")
    return arrive(Workload("synthetic", requests, ignore_eos=True, seed=seed, notes=tuple(notes)), arrivals, seed)


def _is_text(data: bytes) -> bool:
    try:
        return bool(data.decode())
    except UnicodeDecodeError:
        return False


def _check_tokens(field: str, value: object, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= MAX_TOKENS:
        raise InvalidParameter(field, value, f"an integer from {low} to {MAX_TOKENS}")
