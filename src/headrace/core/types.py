"""What passes between the rooms (docs/CONTRACTS.md §1, §2, §5). Frozen, plain, in token ids.

A field is honoured or refused, never ignored: a field appears here when every backend honours it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from headrace.core.errors import InvalidParameter

MAX_LOGPROBS = 20
"""Most alternatives a request may ask for at a position (the bound of the OpenAI and vLLM routes)."""

MAX_INT = 2**63 - 1
"""Largest integer that goes between processes and into kernels."""

MAX_N = 128
"""Most answers to one prompt (the bound of the OpenAI routes)."""

MAX_PIXEL_BYTES = 2**27
"""Most bytes of pixels in one request: some 200 tiles of 448 × 448, more than a context of 32k tokens has room for."""


def _require_int(name: str, value: object, low: int, high: int | None, note: str = "") -> None:
    bounds = f"an integer ≥ {low}" if high is None else f"an integer from {low} to {high}"
    wrong_type = isinstance(value, bool) or not isinstance(value, int)
    if wrong_type or value < low or (high is not None and value > high):  # type: ignore[operator]
        raise InvalidParameter(name, value, bounds + note)


def _require_float(
    name: str, value: object, allowed: str, low: float, high: float = math.inf, low_open: bool = False
) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidParameter(name, value, allowed)
    try:
        number = float(value)
    except OverflowError as error:  # an integer of more than 308 digits
        raise InvalidParameter(name, value, allowed) from error
    if not math.isfinite(number) or number < low or number > high or (low_open and number == low):
        raise InvalidParameter(name, value, allowed)


def _require_bool(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise InvalidParameter(name, value, "true or false")


def _texts(name: str, value: object) -> tuple[str, ...]:
    """A text or a list of texts -> a tuple; none of them empty."""
    texts = (value,) if isinstance(value, str) else value
    if not isinstance(texts, Sequence) or any(not isinstance(text, str) or not text for text in texts):
        raise InvalidParameter(name, value, "a string or a list of strings, none of them empty")
    return tuple(texts)


def _token_ids(name: str, value: object) -> tuple[int, ...]:
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise InvalidParameter(name, value, "a list of token ids")
    for token_id in value:
        _require_int(name, token_id, 0, MAX_INT)
    return tuple(value)


def _token_sequences(name: str, value: object) -> tuple[tuple[int, ...], ...]:
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise InvalidParameter(name, value, "a list of lists of token ids")
    sequences = tuple(_token_ids(name, one) for one in value)
    if not all(sequences):
        raise InvalidParameter(name, value, "lists of token ids, none of them empty")
    return sequences


def _biases(value: object) -> tuple[tuple[int, float], ...]:
    """A mapping, or pairs, of token id and bias -> pairs in the order of the ids."""
    allowed = "{token id: number from -100 to 100}"
    pairs = value.items() if isinstance(value, Mapping) else value
    if isinstance(pairs, str | bytes) or not isinstance(pairs, Iterable):
        raise InvalidParameter("logit_bias", value, allowed)
    found: dict[int, float] = {}
    for pair in pairs:
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise InvalidParameter("logit_bias", value, allowed)
        _require_int("logit_bias", pair[0], 0, MAX_INT, " as a token id")
        _require_float(f"logit_bias of token {pair[0]}", pair[1], "a number from -100 to 100", -100, 100)
        found[pair[0]] = float(pair[1])
    return tuple(sorted(found.items()))


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
    min_p: float = 0.0
    """Keep tokens at least this many times as likely as the likeliest one; 0 to 1, 0: all."""
    typical_p: float = 1.0
    """Keep the tokens whose surprise is closest to the expected one, up to this probability in sum; in (0, 1], 1: all
    (arXiv 2202.00666)."""
    repetition_penalty: float = 1.0
    """Divides the positive logits, and multiplies the negative ones, of ids in prompt or answer; above 0 (arXiv
    1909.05858)."""
    presence_penalty: float = 0.0
    """Taken once off the logit of each id that the answer holds; -2 to 2."""
    frequency_penalty: float = 0.0
    """Taken off an id's logit each time that the answer holds it; -2 to 2."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """Added to the logits of these ids, -100 to 100 each; a mapping may be given."""
    allowed_token_ids: tuple[int, ...] | None = None
    """No other id is ever chosen; None: all may be."""
    bad_words: tuple[str, ...] = ()
    """Texts never to be generated, as the tokens they are encoded to, with and without a space before them (encoded by
    the client; the engine knows no text)."""
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    """Token sequences never to be generated: the last id of one is masked where the answer ends in the ids before."""
    seed: int | None = None
    """Any 64-bit integer; None: one is drawn, and returned with the answer."""
    stop: tuple[str, ...] = ()
    """Texts that end the answer (found by the client, cut from the text; the engine knows no text)."""
    stop_token_ids: tuple[int, ...] = ()
    """Token ids that end the answer, beside the model's own end-of-sequence ids."""
    include_stop_str_in_output: bool = False
    """Leave the stop text, or the text of the token, that ended the answer at its end."""
    ignore_eos: bool = False
    """Go on past the model's end-of-sequence ids (`stop_token_ids` still end the answer)."""
    logprobs: int | None = None
    """Return the log-probability of each token and of this many likeliest; of the raw logits. 0 to 20."""
    prompt_logprobs: int | None = None
    """The same of each token of the prompt but the first. Such a prompt is computed whole, whatever the cache holds."""
    n: int = 1
    """Answers to the prompt, 1 to 128; the i-th draws with a seed made of `seed` and i (`engine.model.children`)."""
    skip_special_tokens: bool = True
    """Leave special tokens out of the text."""

    def __post_init__(self) -> None:
        if self.max_tokens is not None:
            _require_int("max_tokens", self.max_tokens, 1, MAX_INT)
        _require_int("min_tokens", self.min_tokens, 0, self.max_tokens, " (max_tokens)" if self.max_tokens else "")
        _require_float("temperature", self.temperature, "a number from 0 to 2", 0, 2)
        for name in ("top_p", "typical_p"):
            _require_float(name, getattr(self, name), "a number above 0, up to 1", 0, 1, low_open=True)
        _require_float("min_p", self.min_p, "a number from 0 to 1", 0, 1)
        _require_float("repetition_penalty", self.repetition_penalty, "a finite number above 0", 0, low_open=True)
        for name in ("presence_penalty", "frequency_penalty"):
            _require_float(name, getattr(self, name), "a number from -2 to 2", -2, 2)
        _require_int("top_k", self.top_k, -1, MAX_INT)
        _require_int("n", self.n, 1, MAX_N)
        if self.seed is not None:
            _require_int("seed", self.seed, -(2**63), 2**63 - 1)
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _require_int(name, getattr(self, name), 0, MAX_LOGPROBS)
        for name in ("ignore_eos", "skip_special_tokens", "include_stop_str_in_output"):
            _require_bool(name, getattr(self, name))
        canonical: dict[str, object] = {
            "stop": _texts("stop", self.stop),
            "bad_words": _texts("bad_words", self.bad_words),
            "stop_token_ids": _token_ids("stop_token_ids", self.stop_token_ids),
            "bad_words_ids": _token_sequences("bad_words_ids", self.bad_words_ids),
            "logit_bias": _biases(self.logit_bias),
        }
        if self.allowed_token_ids is not None:
            canonical["allowed_token_ids"] = _token_ids("allowed_token_ids", self.allowed_token_ids)
            if not canonical["allowed_token_ids"]:
                raise InvalidParameter("allowed_token_ids", self.allowed_token_ids, "at least one token id")
        for name, value in canonical.items():
            object.__setattr__(self, name, value)


@dataclass(frozen=True, slots=True)
class ImageSpan:
    """An image of a prompt, and where its placeholder tokens lie.

    Between placeholders of one image may be other tokens (NVLM's tile tags): those keep their own embedding.
    """

    start: int
    """Of its first placeholder."""
    length: int
    """To the end of its last one."""
    hash: str
    """SHA-256 (hex) of the pixels, their form and the tiling options."""
    tiles: int = 1
    pixels: bytes = field(default=b"", repr=False)
    """uint8 (tiles, side, side, 3), rows from the top, red green blue; or, where `normalised`, float32 in the machine's
    order (tiles, 3, side, side) that need no more."""
    normalised: bool = False


@dataclass(frozen=True, slots=True)
class Request:
    """What a user asks for, in token ids."""

    id: str
    token_ids: tuple[int, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    images: tuple[ImageSpan, ...] = ()
    adapter: str = ""
    """Name of the LoRA adapter that answers; empty: the model itself."""
    salt: str = ""
    """Requests share prefix blocks only with requests of the same salt."""
    priority: int = 0
    """Lower goes first; ties by arrival."""
    deadline_s: float | None = None
    """On the engine's monotonic clock; a request unfinished by then ends with `deadline_exceeded`."""
    join_by_s: float | None = None
    """On the engine's monotonic clock; a request that has not joined the running batch by then ends with
    `queue_timeout`."""
    arrival_s: float = 0.0
    """On the engine's monotonic clock."""
    grammar: str = ""
    """What the answer must be a word of: a grammar in llguidance's own form (Lark, or its JSON); empty: anything."""


@dataclass(frozen=True, slots=True)
class ImageLimits:
    """What a model that sees takes."""

    token_id: int
    """Of the placeholder."""
    tokens_per_tile: int
    tile_size: int
    """Pixels on a side of a tile."""
    most: int
    """Images of one request."""


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """What the loaded model allows; `validate` holds every request against it before any work."""

    vocab_size: int
    max_model_len: int
    """Most tokens of prompt and answer together."""
    adapters: frozenset[str] = frozenset()
    """Names of the LoRA adapters that are loaded."""
    images: ImageLimits | None = None
    """None: the model reads no images."""


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
    adapter: str = ""
    """Name of the LoRA adapter that computes the row; empty: the model itself."""


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
    score_prompt: bool = False
    """Return the log-probability of every prompt token that follows a computed one."""


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
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    """If asked for: of prompt tokens start + 1 … start + length, as far as the prompt goes."""


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
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    """With the first tokens, if asked for: of each prompt token but the first."""


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
    joined_s: float | None = None
    """When it first joined the running batch; None: it never did."""


@dataclass(frozen=True, slots=True)
class ErrorEvent:
    request_id: str
    code: str
    message: str
    time_s: float


Event = TokenEvent | FinishEvent | ErrorEvent
"""Exactly one FinishEvent or ErrorEvent ends each request."""
