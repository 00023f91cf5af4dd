"""Grammars over a model's tokens, by llguidance: which tokens keep an answer a beginning of some word of the language.

Exact: an id is allowed iff its bytes are. llguidance would rather force the spelling that a tokenizer gives to bytes
that are certain; that is switched off, since a model may spell as it likes.

Beside the model's ids, llguidance is given tokens of our own: the end of the answer (in its masks wherever the answer
may end), and, for each token that reads otherwise at the start of a text, what it reads there.
"""

from __future__ import annotations

import re
import time
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import TYPE_CHECKING

from headrace.core.errors import BackendUnavailable, GrammarError

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer

_NO_FORCING = '\n%llguidance {"no_forcing": true}\n'
"""Stands last, where it wins over other settings, and where it moves no line that an error names."""
_END_NAME = b"<|end_of_answer|>"
_NO_SPELLING = "the grammar leaves no token: the model's tokens cannot spell what may come next, or nothing may"
_MAX_REASON = 300
_PICTURE = re.compile(r"\s*(\d+ \||\^+\s*$|<non-verbose/>)")
_ALLOWANCE_S = 0.1
_SECONDS_PER_TOKEN = 0.005
"""CPU time that following a grammar may cost: an allowance, and so much a token. A common one costs 0.05 ms a token."""


def require_llguidance() -> None:
    """Raises BackendUnavailable where it is not installed."""
    if find_spec("llguidance") is None:
        raise BackendUnavailable(
            "structured output needs the llguidance package, which is not installed: pip install 'headrace[serve]'"
        )


@dataclass(frozen=True, slots=True, eq=False)
class Vocabulary:
    """A model's tokens in bytes, one for each of its logits."""

    tokens: tuple[bytes, ...]
    """Empty where an id has no text (padding): never allowed. Of a special token: its name."""
    special: frozenset[int]
    """Ids that are no text, whatever they are called."""
    eos_ids: frozenset[int]
    """Ids that end an answer."""
    firsts: Mapping[int, bytes] = field(default_factory=dict)
    """Of tokens that read otherwise at the start of a text: what they read there."""

    def pack(self) -> bytes:
        """For another process."""
        counts = array("I", (len(self.tokens), len(self.special), len(self.eos_ids), len(self.firsts)))
        texts = [*self.tokens, *self.firsts.values()]
        numbers = array("I", (*sorted(self.special), *sorted(self.eos_ids), *self.firsts, *map(len, texts)))
        return counts.tobytes() + numbers.tobytes() + b"".join(texts)

    @staticmethod
    def unpack(data: bytes) -> Vocabulary:
        """What `pack` gave, on the same machine."""
        width = array("I").itemsize
        counts = array("I", data[: 4 * width])
        num_tokens, num_special, num_eos, num_firsts = counts
        ids = num_special + num_eos + num_firsts
        end = (4 + ids + num_tokens + num_firsts) * width
        numbers = array("I", data[4 * width : end])
        texts: list[bytes] = []
        for length in numbers[ids:]:
            texts.append(data[end : end + length])
            end += length
        return Vocabulary(
            tokens=tuple(texts[:num_tokens]),
            special=frozenset(numbers[:num_special]),
            eos_ids=frozenset(numbers[num_special : num_special + num_eos]),
            firsts=dict(zip(numbers[num_special + num_eos : ids], texts[num_tokens:], strict=True)),
        )


class GrammarCompiler:
    """Grammars to matchers, for one vocabulary. Thread-safe; compiling lets other threads run."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        """About 0.1 s for 49,000 tokens, without other threads. Raises BackendUnavailable."""
        require_llguidance()
        self.vocabulary = vocabulary
        size = len(vocabulary.tokens)
        self.aliases = {token_id: size + i for i, token_id in enumerate(vocabulary.firsts)}
        """The token of ours that stands for this one at the start of a text."""
        self.end_id = size + len(self.aliases)
        """The token of ours that ends an answer."""
        tokens = (*vocabulary.tokens, *vocabulary.firsts.values(), _END_NAME)
        self._tokenizer = _make_tokenizer(tokens, (*vocabulary.special, self.end_id), self.end_id)
        self._limits = _make_limits()
        self.text_bits = _bits(i for i, data in enumerate(vocabulary.tokens) if data)
        """Ids that may ever be allowed."""
        self.plain_bits = self.text_bits & ~_bits(self.aliases)
        """Those that read alike wherever they stand."""

    def compile(self, grammar: str) -> Grammar:
        """`grammar` in llguidance's own form: Lark, or its JSON. Raises GrammarError."""
        from llguidance import LLMatcher

        text = grammar if grammar.lstrip().startswith("{") else grammar + _NO_FORCING
        matcher = LLMatcher(self._tokenizer, text, log_level=0, limits=self._limits)
        if matcher.is_error():
            raise GrammarError(_reason(matcher.get_error()))
        return Grammar(self, matcher)


class Grammar:
    """A compiled grammar."""

    def __init__(self, compiler: GrammarCompiler, matcher: LLMatcher) -> None:
        self._compiler = compiler
        self._matcher = matcher

    def start(self, stop_ids: Iterable[int] = ()) -> Matcher:
        """A new answer. `stop_ids`: ids that end it beside the model's own. Raises GrammarError if there are none."""
        return Matcher(self._compiler, self._matcher.deep_copy(), stop_ids)


class Matcher:
    """One answer on its way through a grammar. Not thread-safe."""

    def __init__(self, compiler: GrammarCompiler, matcher: LLMatcher, stop_ids: Iterable[int]) -> None:
        self._compiler = compiler
        self._matcher = matcher
        size = len(compiler.vocabulary.tokens)
        self._end_ids = compiler.vocabulary.eos_ids.union(i for i in stop_ids if 0 <= i < size)
        if not self._end_ids:
            raise GrammarError(
                "the grammar cannot end: the model has no token that ends an answer; give stop_token_ids"
            )
        self._end_bits = _bits(self._end_ids)
        self._num_bytes = -(-size // 8)
        self._at_start = bool(compiler.aliases)
        self._left_s = _ALLOWANCE_S
        self.stopped = False
        """Whether an id that ends the answer has come."""

    def mask(self) -> bytes:
        """Which ids may come next: ceil(vocabulary / 8) bytes, a little-endian bit a token id. Where the answer may
        end, so may the ids that end it; where it must, no others. Raises GrammarError where it costs too much."""
        if self.stopped:
            return self._end_bits.to_bytes(self._num_bytes, "little")
        began = time.thread_time()
        data = self._matcher.compute_bitmask()
        self._spend(began)
        compiler = self._compiler
        bits = int.from_bytes(data, "little")
        if self._at_start:
            size = len(compiler.vocabulary.tokens)
            firsts = (bits >> size).to_bytes(len(data), "little")
            reached = _bits(i for k, i in enumerate(compiler.aliases) if firsts[k >> 3] >> (k & 7) & 1)
            allowed = bits & compiler.plain_bits | reached
        else:
            allowed = bits & compiler.text_bits
        if bits >> compiler.end_id & 1:
            allowed |= self._end_bits
        if not allowed:
            raise GrammarError(_NO_SPELLING)
        return allowed.to_bytes(self._num_bytes, "little")

    def advance(self, token_ids: Iterable[int]) -> None:
        """The answer goes on with these. Raises GrammarError for a token that is not allowed, and where it costs too
        much."""
        compiler = self._compiler
        for token_id in token_ids:
            if self.stopped:
                return
            if token_id in self._end_ids and self._matcher.is_accepting():
                self.stopped = True
                return
            read_as = compiler.aliases.get(token_id, token_id) if self._at_start else token_id
            if token_id not in compiler.vocabulary.special:
                self._at_start = False
            self._left_s += _SECONDS_PER_TOKEN
            began = time.thread_time()
            self._matcher.consume_token(read_as)
            self._spend(began)

    def _spend(self, began: float) -> None:
        self._left_s -= time.thread_time() - began
        if self._matcher.is_error():
            error = self._matcher.get_error()
            raise GrammarError(_NO_SPELLING if error.startswith("NoExtension") else _reason(error))
        if self._left_s < 0:
            raise GrammarError("the grammar is too complex: this answer takes too long to follow through it")


def _make_limits() -> LLParserLimits:
    """Such that a mask costs some 20 ms at worst, and a request's states 50 MB; an object may have 1,200 optional
    properties."""
    from llguidance import LLParserLimits

    return LLParserLimits(
        max_items_in_row=5_000,
        initial_lexer_fuel=500_000,
        step_lexer_fuel=100_000,
        step_max_items=20_000,
        max_lexer_states=60_000,
        max_grammar_size=200_000,
        verbose_errors=False,
    )


def _make_tokenizer(tokens: Sequence[bytes], special: Sequence[int], end_id: int) -> LLTokenizer:
    from llguidance import LLTokenizer

    return LLTokenizer(_Spelling(tokens, special, end_id), eos_token=end_id)  # type: ignore[arg-type]


class _Spelling:
    """What LLTokenizer reads of a tokenizer: the attributes of llguidance.TokenizerWrapper."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokens: Sequence[bytes], special: Sequence[int], end_id: int) -> None:
        self.tokens = tokens
        self.special_token_ids = special
        self.eos_token_id = end_id
        text = set(range(len(tokens))).difference(special)
        self._byte_ids = {tokens[i][0]: i for i in text if len(tokens[i]) == 1}

    def __call__(self, text: str) -> list[int]:
        """Asked only by a grammar that has forcing switched on again."""
        return [self._byte_ids[byte] for byte in text.encode()]


def _bits(ids: Iterable[int]) -> int:
    found = list(ids)
    data = bytearray((max(found, default=0) >> 3) + 1)
    for i in found:
        data[i >> 3] |= 1 << (i & 7)
    return int.from_bytes(data, "little")


def _reason(error: str) -> str:
    """llguidance's message on one line, without its picture of the place."""
    lines = [line for line in error.splitlines() if not _PICTURE.match(line)]
    text = " ".join(" ".join(lines).split())
    if len(text) > _MAX_REASON:  # what it quotes comes first, what is wrong last
        text = f"{text[: _MAX_REASON // 2]} … {text[-_MAX_REASON // 2 :]}"
    return f"the grammar: {text}"
