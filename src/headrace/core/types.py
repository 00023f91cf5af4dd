"""What passes between the rooms (docs/CONTRACTS.md §1, §2, §5). Frozen, plain, in token ids.

A field is honoured or refused, never ignored: a field appears here when every backend honours it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from headrace.core.errors import InvalidParameter

MAX_LOGPROBS = 20
"""Most alternatives a request may ask for at a position (the bound of the OpenAI and vLLM routes)."""


def _require_int(name: str, value: object, low: int, high: int | None, note: str = "") -> None:
    bounds = f"an integer ≥ {low}" if high is None else f"an integer from {low} to {high}"
    wrong_type = isinstance(value, bool) or not isinstance(value, int)
    if wrong_type or value < low or (high is not None and value > high):  # type: ignore[operator]
        raise InvalidParameter(name, value, bounds + note)


def _require_float(name: str, value: object, allowed: str, low: float, high: float, low_open: bool) -> None:
    wrong_type = isinstance(value, bool) or not isinstance(value, int | float)
    if wrong_type or not math.isfinite(value):  # type: ignore[arg-type]
        raise InvalidParameter(name, value, allowed)
    if value < low or value > high or (low_open and value == low):  # type: ignore[operator]
        raise InvalidParameter(name, value, allowed)


def _require_bool(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise InvalidParameter(name, value, "true or false")


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to choose tokens, and when to stop. The default is greedy, so the same call gives the same answer.

    Raises `InvalidParameter` on a value out of range.
    """

    max_tokens: int | None = 128
    """Most tokens to generate, ≥ 1; None: as many as the context holds."""
    min_tokens: int = 0
    """While fewer are out, every id that would end the request is masked."""
    temperature: float = 0.0
    """0 to 2; 0 is greedy (argmax, lowest id on a tie)."""
    top_k: int = 0
    """Keep the k likeliest tokens; 0 and -1: all."""
    top_p: float = 1.0
    """Keep the smallest set of likeliest tokens whose probabilities sum to at least this; in (0, 1]."""
    seed: int | None = None
    """Any 64-bit integer; None: one is drawn, and returned with the answer."""
    stop: tuple[str, ...] = ()
    """Texts that end the answer (found by the client, cut from the text; the engine knows no text)."""
    stop_token_ids: tuple[int, ...] = ()
    """Token ids that end the answer, beside the model's own end-of-sequence ids."""
    ignore_eos: bool = False
    """Go on past the model's end-of-sequence ids (`stop_token_ids` still end the answer)."""
    logprobs: int | None = None
    """Return the log-probability of each token and of this many likeliest; of the raw logits."""
    skip_special_tokens: bool = True
    """Leave special tokens out of the text."""

    def __post_init__(self) -> None:
        if self.max_tokens is not None:
            _require_int("max_tokens", self.max_tokens, 1, None)
        _require_int("min_tokens", self.min_tokens, 0, self.max_tokens, " (max_tokens)" if self.max_tokens else "")
        _require_float("temperature", self.temperature, "a number from 0 to 2", 0, 2, low_open=False)
        _require_float("top_p", self.top_p, "a number above 0, up to 1", 0, 1, low_open=True)
        _require_int("top_k", self.top_k, -1, None)
        if self.seed is not None:
            _require_int("seed", self.seed, -(2**63), 2**63 - 1)
        if self.logprobs is not None:
            _require_int("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        _require_bool("ignore_eos", self.ignore_eos)
        _require_bool("skip_special_tokens", self.skip_special_tokens)
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        if not isinstance(self.stop, Sequence) or any(not isinstance(s, str) or not s for s in self.stop):
            raise InvalidParameter("stop", self.stop, "a string or a list of strings, none of them empty")
        object.__setattr__(self, "stop", tuple(self.stop))
        if not isinstance(self.stop_token_ids, Sequence) or isinstance(self.stop_token_ids, str):
            raise InvalidParameter("stop_token_ids", self.stop_token_ids, "a list of token ids")
        for token_id in self.stop_token_ids:
            _require_int("stop_token_ids", token_id, 0, None)
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))


@dataclass(frozen=True, slots=True)
class ImageSpan:
    """Where an image's placeholder tokens lie in a prompt."""

    start: int
    length: int
    hash: str
    """SHA-256 (hex) of the decoded pixels and the tiling options."""


@dataclass(frozen=True, slots=True)
class Request:
    """What a user asks for, in token ids."""

    id: str
    token_ids: tuple[int, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    images: tuple[ImageSpan, ...] = ()
    salt: str = ""
    """Requests share prefix blocks only with requests of the same salt."""
    priority: int = 0
    """Lower goes first; ties by arrival."""
    deadline_s: float | None = None
    """On the engine's monotonic clock; a request unfinished by then ends with `deadline_exceeded`."""
    arrival_s: float = 0.0
    """On the engine's monotonic clock."""


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """What the loaded model allows; `validate` holds every request against it before any work."""

    vocab_size: int
    max_model_len: int
    """Most tokens of prompt and answer together."""


# ---------------------------------------------------------------- control plane → backend


@dataclass(frozen=True, slots=True)
class Admit:
    """A request enters a row. Processed before any row of the same plan runs."""

    row: int
    token_ids: tuple[int, ...]
    """All that exist: the prompt, and what was generated before a preemption."""
    num_prompt: int
    """How many of `token_ids` are prompt: output position i is token `num_prompt + i`."""
    sampling: SamplingParams
    stop_ids: frozenset[int] = frozenset()
    """Every id that ends this request: masked while fewer than `min_tokens` are out."""
    images: tuple[ImageSpan, ...] = ()


@dataclass(frozen=True, slots=True)
class RowStep:
    """One row's work in a step: compute tokens [start, start + length), then its drafts."""

    row: int
    start: int
    length: int
    drafts: tuple[int, ...] = ()
    """Proposed tokens that follow; each is one more token to compute and verify."""
    new_blocks: tuple[int, ...] = ()
    """Appended to the row's block table before the step runs. Those that lie wholly before `start` are already
    filled (a prefix-cache hit); the others hold nothing of use."""
    sample: bool = False
    """Sample after the last token. False for a chunk that does not reach the end of what is known."""
    mask: object | None = None
    """Grammar masks as bytes: for each sampled position (1 + drafts), ceil(vocabulary / 8) of them with a little-endian
    bit a token id. None: every token is allowed."""
    logits: bool = False
    """Return the raw logits of every computed position (for verdicts and tests)."""


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One iteration. Order of meaning: release, admit, copies, rows."""

    step: int
    rows: tuple[RowStep, ...]
    admit: tuple[Admit, ...] = ()
    release: tuple[int, ...] = ()
    """Rows to forget. A row may be released and admitted anew in one plan."""
    copies: tuple[tuple[int, int], ...] = ()
    """(source, destination) blocks, all layers."""


# ---------------------------------------------------------------- backend → control plane


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Of the raw logits: the chosen token's, and the likeliest `top` (id, log-probability), best first."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class RowError:
    """Why a row failed; the row is released and its blocks are not published."""

    code: str
    message: str


@dataclass(frozen=True, slots=True)
class RowOut:
    row: int
    tokens: tuple[int, ...] = ()
    """Accepted drafts, then the sampled token; empty where nothing was to be sampled."""
    accepted: int = 0
    """How many of `tokens` were drafts."""
    logprobs: tuple[TokenLogprobs, ...] = ()
    """One a token, if asked for."""
    error: RowError | None = None
    logits: Any = None
    """float32 array (computed tokens, vocabulary), if asked for."""


@dataclass(frozen=True, slots=True)
class StepResult:
    step: int
    rows: tuple[RowOut, ...]
    seconds: Mapping[str, float] = field(default_factory=dict)
    """Seconds by phase (prepare, forward, sample)."""


@dataclass(frozen=True, slots=True)
class Capacity:
    """What a loaded backend can hold."""

    blocks: int
    block_size: int
    max_rows: int
    max_tokens: int
    """Most tokens computed in one step."""


# ---------------------------------------------------------------- engine → outside


class FinishReason(StrEnum):
    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"


@dataclass(frozen=True, slots=True)
class TokenEvent:
    request_id: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]
    time_s: float


@dataclass(frozen=True, slots=True)
class FinishEvent:
    request_id: str
    reason: FinishReason
    prompt_tokens: int
    output_tokens: int
    cached_tokens: int
    """Prompt tokens whose KV came from the prefix cache."""
    time_s: float
    stop_id: int | None = None
    """The token id that ended it, where one did."""


@dataclass(frozen=True, slots=True)
class ErrorEvent:
    request_id: str
    code: str
    message: str
    time_s: float


Event = TokenEvent | FinishEvent | ErrorEvent
"""Exactly one FinishEvent or ErrorEvent ends each request."""
