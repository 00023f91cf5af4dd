"""What there is for a request: blocks already computed, blocks in the making, room."""

from __future__ import annotations

from collections.abc import Sequence as Rows

from headrace.sched.prefix import PrefixCache
from headrace.sched.sequence import Sequence


class Admission:
    """Looks, and takes hold of nothing."""

    def __init__(self, cache: PrefixCache) -> None:
        self._cache = cache

    def match(self, sequence: Sequence) -> list[int]:
        """Blocks that need not be computed: none while its prompt's log-probabilities are wanted, for a block holds no
        logits."""
        if sequence.unscored:
            return []
        return self._cache.match(sequence.root_key, sequence.tokens, sequence.request.images)

    def is_coming(self, sequence: Sequence, num_cached: int, running: Rows[Sequence]) -> bool:
        """Whether a running row will publish the block after its first `num_cached`: to wait is to find it."""
        stop = (num_cached + 1) * self._cache.block_size
        tokens = sequence.tokens
        if not self._cache.enabled or sequence.unscored or stop >= len(tokens):
            return False
        return any(
            len(other.keys) <= num_cached
            and other.root_key == sequence.root_key
            and len(other.tokens) >= stop
            and other.tokens[stop - 1] == tokens[stop - 1]
            and other.tokens[:stop] == tokens[:stop]
            and _images(other, stop) == _images(sequence, stop)
            for other in running
        )

    def room_for(self, sequence: Sequence, cached: list[int], running: Rows[Sequence]) -> bool:
        """Whether its known tokens fit beside those of the running rows and one more block for each of these, so that
        joining does not at once mean preempting. Alone, it always fits."""
        pool = self._cache.pool
        idle = sum(pool.refs(block) == 0 for block in cached)
        promised = sum(self.blocks_for(s.num_tokens) + 1 - len(s.blocks) for s in running)
        needed = self.blocks_for(len(sequence.tokens)) - len(cached)
        return needed + promised <= pool.available - idle

    def fitting(self, sequence: Sequence, wanted: int) -> int:
        """How many of the `wanted` next tokens of a row the blocks at hand allow."""
        size = self._cache.block_size
        held = len(sequence.blocks) * size - sequence.num_planned
        return wanted if wanted <= held else max(0, min(wanted, held + self._cache.pool.available * size))

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self._cache.block_size)


def _images(sequence: Sequence, stop: int) -> list[tuple[int, int, str]]:
    """Those that begin before token `stop`: their places and what they are."""
    return [(one.start, one.length, one.hash) for one in sequence.request.images if one.start < stop]
