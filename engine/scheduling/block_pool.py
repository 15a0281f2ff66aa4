"""The KV blocks of one worker: their holders, their hashes, and how often each was reused.

Owned and called by the engine thread alone. Other workers read the memory of the generations over
NIXL.

                 take                      release, last holder
      +--------------------+      +-------------------------------------------+
      |                    v      |                                           v
    free (no hash)        held (refs > 0) --- set_hash() ---> held, hashed    |
      ^                    ^      |                                           |
      |  released unhashed |      | released hashed                           |
      +--------------------|------+                                           |
                           |      v                                           |
                           +--- cached (refs 0, hashed, LRU) <----------------+
                      pin a hit / take the least recently used (hash dropped)

    free + cached + held = total, always; held = 0 at rest.

A block may depend on other workers: its bytes, or those of an earlier block of its sequence, were
computed by them. `sources` are their incarnations. When a worker turns out to be sick, no block
that depends on it can be found any more (`forget`).

The fence rests on one rule: `take` bumps a block's generation *before* the block can be written
again. A reader that was sent generation g, and reads g again after its copy, has the bytes of g.
"""

from __future__ import annotations

import secrets
from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from engine.base.kv_layout import GENERATION_BYTES

NO_SOURCES: frozenset[str] = frozenset()
_MAX_FORGOTTEN = 1024


class NoRoom(Exception):
    """Fewer free and cached blocks than requested; nothing was taken."""


class BlockObserver(Protocol):
    """Follows the hashes of a pool: those hashed and not dropped since are those it holds.

    The pool calls it on the engine thread at each change, in order. It must not call the pool.
    """

    def hashed(self, block: int, block_hash: bytes) -> None:
        """The block can be found from now on; its bytes are complete."""

    def dropped(self, block: int, block_hash: bytes, *, evicted: bool) -> None:
        """The block cannot be found any more.

        `evicted`: for new content; its bytes are good until this returns. Else they may be wrong.
        """


class _NoObserver:
    def hashed(self, block: int, block_hash: bytes) -> None:
        pass

    def dropped(self, block: int, block_hash: bytes, *, evicted: bool) -> None:
        pass


class BlockPool:
    """Reference-counted block ids with content hashes.

    Attributes:
        generations: [num_blocks] uint64, 8-byte aligned; starts at random values, so that a block
            of an earlier process at the same address never matches.
    """

    def __init__(self, num_blocks: int, observer: BlockObserver | None = None) -> None:
        """`observer`: the one follower of this pool's hashes; the pool calls it."""
        if num_blocks < 1:
            raise ValueError("a pool needs at least one block")
        self.num_blocks = num_blocks
        self._observer = observer or _NoObserver()
        raw = np.frombuffer(
            bytearray(secrets.token_bytes(num_blocks * GENERATION_BYTES)), np.uint64
        )
        # The top bits are cleared so that no bump ever wraps round to an old value.
        self.generations: npt.NDArray[np.uint64] = raw >> np.uint64(2)
        self._refs = [0] * num_blocks
        self._hashes: list[bytes | None] = [None] * num_blocks
        self._by_hash: dict[bytes, int] = {}
        self._sources: dict[int, frozenset[str]] = {}  # of hashed blocks that have any
        self._forgotten: OrderedDict[str, None] = OrderedDict()  # sources, the oldest first
        self._free = deque(range(num_blocks))
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently used first

    @property
    def num_free(self) -> int:
        """Blocks that hold nothing."""
        return len(self._free)

    @property
    def num_cached(self) -> int:
        """Blocks without a holder that can still be hit."""
        return len(self._cached)

    @property
    def num_held(self) -> int:
        """Blocks with at least one reference."""
        return self.num_blocks - self.num_free - self.num_cached

    @property
    def held(self) -> frozenset[int]:
        """The blocks with at least one holder."""
        return frozenset(block for block, refs in enumerate(self._refs) if refs > 0)

    @property
    def num_available(self) -> int:
        """Blocks that `take` could return."""
        return self.num_free + self.num_cached

    def take(self, count: int) -> list[int]:
        """Hold `count` blocks for new content: free ones first, then the least recently used.

        Raises:
            NoRoom: nothing was taken.
        """
        if count > self.num_available:
            raise NoRoom(f"{count} blocks requested, {self.num_available} available")
        taken = []
        for _ in range(count):
            if self._free:
                block = self._free.popleft()
            else:
                block, _ = self._cached.popitem(last=False)
                self._drop_hash(block, evicted=True)
            self._refs[block] = 1
            taken.append(block)
        if taken:
            # Before the first new write. On a GPU the write is a later kernel launch, on the CPU a
            # later call of the same thread; both order this store before it.
            self.generations[taken if count > 1 else block] += np.uint64(1)
        return taken

    def pin(self, blocks: Iterable[int]) -> None:
        """Add one reference to each block; each is held or cached."""
        for block in blocks:
            if self._refs[block] == 0:
                if self._hashes[block] is None:
                    raise ValueError(f"block {block} is free and cannot be pinned")
                del self._cached[block]
            self._refs[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """Drop one reference of each block, the last first: a prefix outlives its continuation."""
        for block in reversed(blocks):
            if self._refs[block] <= 0:
                raise ValueError(f"block {block} is not held")
            self._refs[block] -= 1
            if self._refs[block] == 0:
                if self._hashes[block] is None:
                    self._free.append(block)
                else:
                    self._cached[block] = None

    def set_hash(self, block: int, block_hash: bytes, sources: frozenset[str] = NO_SOURCES) -> None:
        """Make a held block of complete bytes findable.

        A second copy of a hash stays unhashed, and so does a block with a forgotten source.
        """
        if self._refs[block] <= 0:
            raise ValueError(f"block {block} is not held and cannot get a hash")
        if block_hash in self._by_hash or self._hashes[block] is not None:
            return
        if sources:
            if self.has_forgotten(sources):
                return
            self._sources[block] = sources
        self._hashes[block] = block_hash
        self._by_hash[block_hash] = block
        self._observer.hashed(block, block_hash)

    def sources(self, blocks: Iterable[int]) -> frozenset[str]:
        """Incarnations of the workers that these hashed blocks depend on."""
        if not self._sources:
            return NO_SOURCES
        return NO_SOURCES.union(*(self._sources.get(block, NO_SOURCES) for block in blocks))

    def has_forgotten(self, sources: Iterable[str]) -> bool:
        """Whether one of them was forgotten for good."""
        return any(source in self._forgotten for source in sources)

    def forget(self, source: str, *, for_good: bool) -> int:
        """Drop the hashes of all blocks that depend on `source`; returns how many there were.

        Holders keep their blocks. `for_good`: later blocks of this source get no hash either.
        """
        if for_good:
            self._forgotten[source] = None
            if len(self._forgotten) > _MAX_FORGOTTEN:
                self._forgotten.popitem(last=False)
        return self.hide([b for b, sources in self._sources.items() if source in sources])

    def hide(self, blocks: Iterable[int]) -> int:
        """Drop the hashes of these blocks; returns how many had one. Holders keep their blocks."""
        hashed = [block for block in blocks if self._hashes[block] is not None]
        for block in hashed:
            self._drop_hash(block, evicted=False)
            if self._refs[block] == 0:
                del self._cached[block]
                self._free.append(block)
        return len(hashed)

    def match(self, hashes: Sequence[bytes]) -> list[int]:
        """Blocks of the longest leading run of `hashes` that is here, not pinned."""
        hits = []
        for block_hash in hashes:
            block = self._by_hash.get(block_hash)
            if block is None:
                break
            hits.append(block)
        return hits

    def num_cached_of(self, blocks: Iterable[int]) -> int:
        """How many of these blocks have no holder: pinning them lowers `num_available` by that."""
        return sum(1 for block in blocks if self._refs[block] == 0)

    def _drop_hash(self, block: int, *, evicted: bool) -> None:
        block_hash = self._hashes[block]
        assert block_hash is not None
        del self._by_hash[block_hash]
        self._hashes[block] = None
        self._sources.pop(block, None)
        self._observer.dropped(block, block_hash, evicted=evicted)
