"""BlockPool: which blocks of the KV cache are free, held, or kept for reuse.

law: every block is in exactly one place
     free   nobody holds it, its content is of no use
     idle   nobody holds it, its content can still be matched (least recently released first to go)
     held   refcount ≥ 1
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence


class BlockPool:
    """Counts holders of `num_blocks` blocks; knows nothing of tokens. `on_evict` hears of each idle block taken."""

    def __init__(self, num_blocks: int, on_evict: Callable[[int], None] = lambda block: None) -> None:
        self.num_blocks = num_blocks
        self._on_evict = on_evict
        self._refs = [0] * num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._kept: set[int] = set()

    @property
    def available(self) -> int:
        """Blocks that `allocate` could hand out now."""
        return len(self._free) + len(self._idle)

    @property
    def num_held(self) -> int:
        """Blocks with a holder."""
        return self.num_blocks - self.available

    def refs(self, block: int) -> int:
        return self._refs[block]

    def allocate(self, count: int) -> list[int]:
        """`count` blocks with one holder each; idle blocks only after the free ones. The caller checks `available`."""
        if count > self.available:
            raise ValueError(f"{count} blocks asked for, {self.available} available")
        blocks = []
        for _ in range(count):
            if self._free:
                block = self._free.pop()
            else:
                block, _ = self._idle.popitem(last=False)
                self._kept.discard(block)
                self._on_evict(block)
            self._refs[block] = 1
            blocks.append(block)
        return blocks

    def share(self, block: int) -> None:
        """One more holder of a block that is held or idle."""
        if self._refs[block] == 0:
            del self._idle[block]
        self._refs[block] += 1

    def keep(self, block: int) -> None:
        """The held block's content can be matched from now on: without holders it becomes idle, not free."""
        self._kept.add(block)

    def forget(self, block: int) -> None:
        """The opposite of `keep`, for a held block: without holders it becomes free."""
        self._kept.discard(block)

    def release(self, blocks: Sequence[int]) -> None:
        """One holder less for each, last first: the tail of a sequence is the first to be evicted later."""
        for block in reversed(blocks):
            self._refs[block] -= 1
            if self._refs[block] == 0:
                if block in self._kept:
                    self._idle[block] = None
                else:
                    self._free.append(block)

    def clear(self) -> None:
        """Every block is free, whoever held it."""
        self._refs = [0] * self.num_blocks
        self._free = list(range(self.num_blocks - 1, -1, -1))
        self._idle.clear()
        self._kept.clear()

    def check_integrity(self, tables: Iterable[Sequence[int]]) -> None:
        """Raises AssertionError unless the pool agrees with the block tables of all live sequences."""
        held = Counter(block for table in tables for block in table)
        free, idle = set(self._free), set(self._idle)
        if len(free) != len(self._free):
            raise AssertionError("a block is in the free list twice")
        if free & idle or (free | idle) & held.keys():
            raise AssertionError("a block is in two places")
        if len(free) + len(idle) + len(held) != self.num_blocks:
            raise AssertionError(f"free {len(free)} + idle {len(idle)} + held {len(held)} != {self.num_blocks}")
        if any(self._refs[block] != held[block] for block in range(self.num_blocks)):
            raise AssertionError("a refcount differs from the number of block tables that name the block")
        if not idle <= self._kept or free & self._kept:
            raise AssertionError("idle blocks are not exactly the kept ones without holders")
