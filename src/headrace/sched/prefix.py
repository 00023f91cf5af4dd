"""PrefixCache: full blocks found again by what they hold.

A block's key is SHA-256 over its parent's key, its token ids, the pieces of images in it, and, at the root, the
salt, the adapter and everything that makes KV values differ (model, KV dtype). On a hit the token ids are compared as
well, so that not even a collision could mix two requests (docs/CONTRACTS.md §1, law 8).
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256

from headrace.core.types import ImageSpan
from headrace.sched.blocks import BlockPool


@dataclass(frozen=True, slots=True)
class _Entry:
    key: bytes
    parent: bytes
    token_ids: tuple[int, ...]


class PrefixCache:
    """Maps block keys to blocks of one pool. `identity` names model and KV dtype; other caches never match it."""

    def __init__(self, num_blocks: int, block_size: int, identity: str, enabled: bool = True) -> None:
        self.pool = BlockPool(num_blocks, on_evict=self._evict)
        self.block_size = block_size
        self.enabled = enabled
        self._identity = identity.encode()
        self._by_key: dict[bytes, int] = {}
        self._by_block: dict[int, _Entry] = {}

    def root(self, salt: str, adapter: str = "") -> bytes:
        """Parent key of a request's first block; length-prefixed: no two (identity, adapter, salt) run together."""
        parts = (self._identity, adapter.encode(), salt.encode())
        return sha256(b"".join(b"%d:%b" % (len(part), part) for part in parts)).digest()

    def child(self, parent: bytes, token_ids: Sequence[int], start: int, images: Iterable[ImageSpan] = ()) -> bytes:
        """Key of the block that holds `token_ids`, the first of which is token `start` of its request."""
        digest = sha256(parent)
        digest.update(array("q", token_ids).tobytes())
        stop = start + len(token_ids)
        for image in images:
            first, last = max(start, image.start), min(stop, image.start + image.length)
            if first < last:
                digest.update(f"|{image.hash}:{first - image.start}:{first - start}:{last - first}".encode())
        return digest.digest()

    def match(self, root: bytes, token_ids: Sequence[int], images: Sequence[ImageSpan] = ()) -> list[int]:
        """Blocks that hold the longest known prefix, in order, without taking hold of them.

        The last token is never part of it: it is always computed, so that there are logits to sample (law 7).
        """
        blocks: list[int] = []
        if not self.enabled:
            return blocks
        parent, size = root, self.block_size
        for start in range(0, len(token_ids) - size, size):
            ids = tuple(token_ids[start : start + size])
            key = self.child(parent, ids, start, images)
            block = self._by_key.get(key)
            if block is None:
                break
            entry = self._by_block[block]
            if entry.token_ids != ids or entry.parent != parent:
                break
            blocks.append(block)
            parent = key
        return blocks

    def insert(
        self, parent: bytes, token_ids: Sequence[int], start: int, images: Sequence[ImageSpan], block: int
    ) -> bytes:
        """Publishes a full block that a committed step has filled; returns its key. The first holder of a key stays."""
        key = self.child(parent, token_ids, start, images)
        if self.enabled and key not in self._by_key and block not in self._by_block:
            self._by_key[key] = block
            self._by_block[block] = _Entry(key, parent, tuple(token_ids))
            self.pool.keep(block)
        return key

    def withdraw(self, blocks: Iterable[int]) -> None:
        """Held blocks whose content is not to be trusted: they are not found any more, and freed at their release."""
        for block in blocks:
            if block in self._by_block:
                self._evict(block)
                self.pool.forget(block)

    def clear(self) -> None:
        """Nothing is found any more, and every block is free. Nobody may hold one."""
        self._by_key.clear()
        self._by_block.clear()
        self.pool.clear()

    def _evict(self, block: int) -> None:
        del self._by_key[self._by_block.pop(block).key]

    def check_integrity(self, tables: Iterable[Sequence[int]]) -> None:
        """Raises AssertionError unless cache, pool and the block tables of all live sequences agree."""
        self.pool.check_integrity(tables)
        if {entry.key: block for block, entry in self._by_block.items()} != self._by_key:
            raise AssertionError("keys and blocks of the prefix cache are not each other's inverse")
        for entry in self._by_block.values():
            if len(entry.token_ids) != self.block_size:
                raise AssertionError("a block that is not full was published")
