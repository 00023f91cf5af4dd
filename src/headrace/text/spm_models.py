"""SentencePiece's two segmenters: normalised text to token ids, exactly as the library cuts it.

Both are written from the rules of sentencepiece's src/bpe_model.cc (merge the adjacent pair whose join scores best, the
leftmost on a tie) and src/unigram_model.cc (EncodeOptimized: the best-scoring path, summed in float32). The tokenizers
library is no substitute: its merges are ranked pairs, so that pieces of equal score come out otherwise (of 1,500 small
random models with ties, 312 differed), it has no unused pieces, and its paths are summed in float64.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from itertools import pairwise

from headrace.text.gguf_metadata import NORMAL, UNUSED, USER_DEFINED
from headrace.text.literals import Literals
from headrace.text.spm_normalizer import SPACE

_MAX_CACHED = 2**15
_MAX_CACHED_LENGTH = 64
_UNKNOWN_PENALTY = 10.0


@dataclass(frozen=True, slots=True)
class SpmVocabulary:
    """The pieces of a model. All lists have one item a token."""

    tokens: Sequence[str]
    scores: Sequence[float]
    """float32 values, finite."""
    types: Sequence[int]
    unknown_id: int | None
    """Where None, `byte_ids` is not."""
    byte_ids: Sequence[int] | None
    """The token of each byte, if characters without a piece are spelled in bytes."""

    def ids(self, *types: int) -> Mapping[str, int]:
        return {token: i for i, token in enumerate(self.tokens) if self.types[i] in types}


class _Unknowns:
    """What stands for characters that have no piece."""

    def __init__(self, vocabulary: SpmVocabulary) -> None:
        self._unknown_id = vocabulary.unknown_id
        self._byte_ids = vocabulary.byte_ids

    def ids(self, text: str) -> list[int]:
        if self._byte_ids is not None:
            return [self._byte_ids[byte] for byte in text.encode()]
        assert self._unknown_id is not None
        return [self._unknown_id]

    def join(self, ids: list[int]) -> list[int]:
        """A run of unknown characters is one unknown token."""
        unknown = self._unknown_id
        if self._byte_ids is not None or unknown not in ids:
            return ids
        return [*ids[:1], *(right for left, right in pairwise(ids) if right != unknown or left != unknown)]


class BpeSegmenter:
    """Byte-pair encoding by score. O(n log n) for n characters; text is cut first where no piece can reach across."""

    def __init__(self, vocabulary: SpmVocabulary) -> None:
        self._ids = vocabulary.ids(NORMAL, USER_DEFINED)
        mergeable = vocabulary.ids(NORMAL, USER_DEFINED, UNUSED)
        self._unused = _reachable(vocabulary.ids(UNUSED), mergeable)
        by_score = sorted({vocabulary.scores[i] for i in mergeable.values()}, reverse=True)
        rank_of_score = {score: rank for rank, score in enumerate(by_score)}
        self._ranks = {
            token: rank_of_score[vocabulary.scores[i]]
            for token, i in mergeable.items()
            if token in self._ids or token in self._unused
        }
        """Better scores have lower ranks, equal ones the same."""
        self._user_defined = Literals(vocabulary.ids(USER_DEFINED))
        self._unknowns = _Unknowns(vocabulary)
        reached = {token[at - 1] for token in mergeable for at in _spaces_within(token)}
        self._cut = re.compile(f"(?<![{re.escape(''.join(sorted({SPACE, *reached})))}])(?={SPACE})")
        self._cache: dict[str, list[int]] = {}

    def segment(self, text: str) -> list[int]:
        if self._unused:  # how an unused piece is taken apart depends on the whole text: see `_symbol_ids`
            return self._unknowns.join(self._merge(text))
        ids: list[int] = []
        for stretch, whole in self._user_defined.split(text):
            if whole:
                ids.append(self._ids[stretch])
                continue
            for word in self._cut.split(stretch):
                ids += self._word(word)
        return self._unknowns.join(ids)

    def _word(self, word: str) -> list[int]:
        if not word:
            return []
        ids = self._cache.get(word)
        if ids is None:
            ids = self._merge(word)
            if len(word) <= _MAX_CACHED_LENGTH:
                if len(self._cache) >= _MAX_CACHED:
                    self._cache.clear()
                self._cache[word] = ids
        return ids

    def _merge(self, text: str) -> list[int]:
        """Ids after all merges; runs of unknown tokens are not joined yet.

        A heap entry is rank × n + left. It is good if the pair that now begins at `left` has that rank: whatever the
        entry was made for, that pair is the best there is.
        """
        symbols: list[str] = []
        frozen: set[int] = set()
        for stretch, whole in self._user_defined.split(text):
            if whole:
                frozen.add(len(symbols))
            symbols += [stretch] if whole else stretch
        ranks, count = self._ranks, len(symbols)
        parts: dict[str, tuple[str, str]] = {}
        following = array("q", range(1, count + 1))
        before = array("q", range(-1, count - 1))
        heap: list[int] = []

        def rank_of(left: int, right: int) -> int | None:
            piece = symbols[left] + symbols[right]
            rank = ranks.get(piece)
            if rank is None or (frozen and (left in frozen or right in frozen)):
                return None
            if piece in self._unused:
                parts[piece] = symbols[left], symbols[right]
            return rank

        for left in range(count - 1):
            if (rank := rank_of(left, left + 1)) is not None:
                heap.append(rank * count + left)
        heapify(heap)
        while heap:
            rank, left = divmod(heappop(heap), count)
            right = following[left]
            if not symbols[left] or right == count or ranks.get(symbols[left] + symbols[right]) != rank:
                continue
            if frozen and (left in frozen or right in frozen):
                continue
            symbols[left] += symbols[right]
            symbols[right] = ""
            after = following[left] = following[right]
            if (left_of := before[left]) >= 0 and (joined := rank_of(left_of, left)) is not None:
                heappush(heap, joined * count + left_of)
            if after < count:
                before[after] = left
                if (joined := rank_of(left, after)) is not None:
                    heappush(heap, joined * count + left)
        return [token_id for symbol in symbols if symbol for token_id in self._symbol_ids(symbol, parts)]

    def _symbol_ids(self, symbol: str, parts: Mapping[str, tuple[str, str]]) -> list[int]:
        """An unused piece is taken apart again, as it was last put together anywhere; a single one is unknown."""
        out: list[int] = []
        stack = [symbol]
        while stack:
            symbol = stack.pop()
            split = parts.get(symbol)
            if split is not None:
                stack += reversed(split)
            elif (token_id := self._ids.get(symbol)) is not None:
                out.append(token_id)
            else:
                out += self._unknowns.ids(symbol)
        return out


class UnigramSegmenter:
    """The most probable path. O(n × different piece lengths) for n characters, 12 bytes of memory a character."""

    def __init__(self, vocabulary: SpmVocabulary) -> None:
        usable = vocabulary.ids(NORMAL, USER_DEFINED)
        normal = [vocabulary.scores[i] for i, kind in enumerate(vocabulary.types) if kind == NORMAL]
        most = max(normal, default=0.0)
        self._unknown_score = min(normal, default=0.0) - _UNKNOWN_PENALTY
        self._pieces: dict[str, tuple[int, float]] = {}
        lengths: dict[str, set[int]] = {}
        for token, i in usable.items():
            bonus = len(token.encode()) * most - 0.1  # so that a user-defined piece beats all other ways to its end
            self._pieces[token] = i, bonus if vocabulary.types[i] == USER_DEFINED else vocabulary.scores[i]
            lengths.setdefault(token[:1], set()).add(len(token))
        self._lengths = {first: sorted(found) for first, found in lengths.items()}
        self._unknowns = _Unknowns(vocabulary)

    def segment(self, text: str) -> list[int]:
        count = len(text)
        scores = array("f", bytes(4 * (count + 1)))
        sums = array("f", (0.0,))  # storing rounds to float32, as the library's variables do
        starts = array("l", [-1]) * (count + 1)
        chosen = array("l", [-1]) * (count + 1)
        for at in range(count):
            here = scores[at]
            single = False
            for length in self._lengths.get(text[at], ()):
                end = at + length
                if end > count:
                    break
                piece = self._pieces.get(text[at:end])
                if piece is None:
                    continue
                single = single or length == 1
                sums[0] = piece[1] + here
                if starts[end] < 0 or sums[0] > scores[end]:
                    scores[end], starts[end], chosen[end] = sums[0], at, piece[0]
            if not single:
                sums[0] = self._unknown_score + here
                if starts[at + 1] < 0 or sums[0] > scores[at + 1]:
                    scores[at + 1], starts[at + 1], chosen[at + 1] = sums[0], at, -1
        path: list[tuple[int, int]] = []
        at = count
        while at > 0:
            path.append((at, chosen[at]))
            at = starts[at]
        ids: list[int] = []
        for end, token_id in reversed(path):
            ids += [token_id] if token_id >= 0 else self._unknowns.ids(text[end - 1])
        return self._unknowns.join(ids)


def _reachable(unused: Iterable[str], mergeable: Mapping[str, int]) -> frozenset[str]:
    """Unused pieces that a merge can make. Padding ("[PAD12]") mostly is not."""

    def symbol(text: str) -> bool:
        return len(text) == 1 or text in mergeable

    return frozenset(
        token for token in unused if any(symbol(token[:at]) and symbol(token[at:]) for at in range(1, len(token)))
    )


def _spaces_within(token: str) -> list[int]:
    """Where ▁ follows another character."""
    return [at for at in range(1, len(token)) if token[at] == SPACE and token[at - 1] != SPACE]
