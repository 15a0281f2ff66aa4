"""Random admit, extend, name, share, free and evict sequences keep the pool whole."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from engine.base.kv_layout import KVLayout, block_hash, hash_salt
from engine.scheduling.block_pool import BlockPool, NoRoom
from engine.scheduling.block_table import BlockTable
from tests.support.invariants import check_pool

BLOCK_SIZE = 4
NUM_BLOCKS = 12


class HeldHashes:
    """An observer: the calls, and the hashes that they leave."""

    def __init__(self) -> None:
        self.calls: list[tuple[object, ...]] = []
        self.blocks: dict[bytes, int] = {}

    def hashed(self, block: int, block_hash: bytes) -> None:
        assert block_hash not in self.blocks and block not in self.blocks.values()
        self.blocks[block_hash] = block
        self.calls.append(("hashed", block, block_hash))

    def dropped(self, block: int, block_hash: bytes, *, evicted: bool) -> None:
        assert self.blocks.pop(block_hash) == block
        self.calls.append(("evicted" if evicted else "dropped", block, block_hash))


class PoolMachine(RuleBasedStateMachine):
    """A model beside the pool: what bytes each named block must still hold."""

    tables = Bundle("tables")

    def __init__(self) -> None:
        super().__init__()
        self.held = HeldHashes()
        self.pool = BlockPool(NUM_BLOCKS, self.held)
        self.live: list[BlockTable] = []
        self.bytes: dict[int, object] = {}  # block -> what was last written to it
        self.promised: dict[bytes, object] = {}  # name -> what it stands for
        self.generations = self.pool.generations.copy()

    def _write(self, blocks: list[int], content: object) -> None:
        for block in blocks:
            assert self.pool.generations[block] > self.generations[block], "written before the bump"
            self.bytes[block] = (content, block)
        self.generations = self.pool.generations.copy()

    @rule(target=tables, num_tokens=st.integers(1, 30))
    def admit(self, num_tokens: int) -> BlockTable:
        table = BlockTable(self.pool, BLOCK_SIZE)
        self.live.append(table)
        self._extend(table, num_tokens)
        return table

    @rule(table=tables, more=st.integers(1, 12))
    def extend(self, table: BlockTable, more: int) -> None:
        self._extend(table, len(table.blocks) * BLOCK_SIZE + more)

    def _extend(self, table: BlockTable, num_tokens: int) -> None:
        before, available = len(table.blocks), self.pool.num_available
        needed = table.missing(num_tokens)
        try:
            table.reserve(num_tokens)
        except NoRoom:
            assert needed > available
            assert len(table.blocks) == before
            assert self.pool.num_available == available
        else:
            assert len(table.blocks) == before + needed
            self._write(table.blocks[before:], object())

    @rule(table=tables, index=st.integers(0, 7), name=st.integers(0, 20))
    def name(self, table: BlockTable, index: int, name: int) -> None:
        if index < len(table.blocks):
            block, key = table.blocks[index], bytes([name])
            known = self.pool.match([key])
            had_name = any(self.pool.match([k]) == [block] for k in self.promised)
            self.pool.set_hash(block, key)
            if not known and not had_name:
                self.promised[key] = self.bytes[block]

    @rule(target=tables, name=st.integers(0, 20))
    def hit(self, name: int) -> BlockTable:
        table = BlockTable(self.pool, BLOCK_SIZE)
        self.live.append(table)
        blocks = self.pool.match([bytes([name])])
        table.open([blocks], len(blocks), len(blocks) * BLOCK_SIZE, len(blocks))
        for block in blocks:
            assert self.bytes[block] == self.promised[bytes([name])], "a name outlived its bytes"
        return table

    @rule(target=tables, table=tables, num_blocks=st.integers(0, 7))
    def share(self, table: BlockTable, num_blocks: int) -> BlockTable:
        twin = BlockTable(self.pool, BLOCK_SIZE)
        blocks = table.blocks[:num_blocks]
        twin.open([blocks], len(blocks), len(blocks) * BLOCK_SIZE, len(blocks))
        self.live.append(twin)
        return twin

    @rule(table=tables, num_blocks=st.integers(0, 7))
    def hide(self, table: BlockTable, num_blocks: int) -> None:
        self.pool.hide(table.blocks[:num_blocks])

    @rule(table=consumes(tables))
    def free(self, table: BlockTable) -> None:
        table.release()
        assert table.blocks == []

    @invariant()
    def whole(self) -> None:
        pool = self.pool
        check_pool(pool)
        assert pool.num_free + pool.num_cached + pool.num_held == NUM_BLOCKS
        held = {block for table in self.live for block in table.blocks}
        assert len(held) == pool.num_held
        assert self.held.blocks == pool._by_hash

    def teardown(self) -> None:
        for table in self.live:
            table.release()
        assert self.pool.num_held == 0
        check_pool(self.pool)


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=150, stateful_step_count=40)


def block_hashes(token_ids, block_size, salt):
    """Hashes of the whole blocks of `token_ids`, in order; a last partial block has none."""
    hashes = []
    parent = b""
    for start in range(0, len(token_ids) - block_size + 1, block_size):
        parent = block_hash(parent, token_ids[start : start + block_size], salt)
        hashes.append(parent)
    return hashes


def test_the_observer_sees_each_hash_come_and_go_in_order() -> None:
    held = HeldHashes()
    pool = BlockPool(3, held)
    a, b, c = pool.take(3)
    assert held.calls == [], "an unhashed block is no news"
    pool.set_hash(a, b"a")
    pool.set_hash(b, b"a")  # a second copy
    pool.set_hash(b, b"b", frozenset({"P1"}))
    pool.set_hash(c, b"c")
    pool.release([a, b])
    pool.pin([a])  # a hit is no change of what is held
    pool.release([a])
    expected = [("hashed", a, b"a"), ("hashed", b, b"b"), ("hashed", c, b"c")]
    assert held.calls == expected
    assert pool.forget("P1", for_good=True) == 1
    assert held.calls[3:] == [("dropped", b, b"b")]
    pool.take(2)
    assert held.calls[4:] == [("evicted", a, b"a")], "the free block is taken first"
    assert pool.hide([a, b, c]) == 1
    assert held.calls[5:] == [("dropped", c, b"c")]
    pool.release([c])
    assert len(held.calls) == 6 and held.blocks == {}


def test_an_evicted_block_is_dropped_before_its_generation_grows() -> None:
    """A reader that follows the observer still finds the old bytes under the old generation."""
    seen: list[int] = []

    class Reader(HeldHashes):
        def dropped(self, block: int, block_hash: bytes, *, evicted: bool) -> None:
            seen.append(int(pool.generations[block]))

    pool = BlockPool(1, Reader())
    (block,) = pool.take(1)
    pool.set_hash(block, b"a")
    generation = int(pool.generations[block])
    pool.release([block])
    assert pool.take(1) == [block]
    assert seen == [generation] and int(pool.generations[block]) == generation + 1


def test_least_recently_used_hash_is_dropped_first() -> None:
    pool = BlockPool(3)
    blocks = pool.take(3)
    for block in blocks:
        pool.set_hash(block, bytes([block]))
    pool.release([blocks[1]])
    pool.release([blocks[0]])
    pool.release([blocks[2]])
    assert pool.take(1) == [blocks[1]]
    assert pool.match([bytes([blocks[1]])]) == []
    assert pool.match([bytes([blocks[0]])]) == [blocks[0]]


def test_a_prefix_outlives_its_continuation() -> None:
    pool = BlockPool(3)
    blocks = pool.take(3)
    for block in blocks:
        pool.set_hash(block, bytes([block]))
    pool.release(blocks)
    pool.take(1)
    assert pool.match([bytes([b]) for b in blocks]) == blocks[:2]


def test_generations_are_unpredictable_aligned_and_bumped_before_reuse() -> None:
    a, b = BlockPool(64), BlockPool(64)
    assert not np.array_equal(a.generations, b.generations)
    assert a.generations.ctypes.data % 8 == 0
    before = a.generations.copy()
    taken = a.take(5)
    assert all(a.generations[t] == before[t] + 1 for t in taken)
    assert int(a.generations.max()) < 2**63


def test_misuse_is_an_error() -> None:
    pool = BlockPool(2)
    with pytest.raises(ValueError, match="free"):
        pool.pin([0])
    with pytest.raises(ValueError, match="not held"):
        pool.release([0])
    with pytest.raises(ValueError, match="not held"):
        pool.set_hash(0, b"x")
    with pytest.raises(NoRoom):
        pool.take(3)
    assert pool.num_free == 2


def test_hashes_depend_on_every_token_the_parent_and_the_salt() -> None:
    salt = hash_salt(digest="d")
    hashes = block_hashes(list(range(12)), 4, salt)
    assert len(set(hashes)) == 3
    assert block_hashes(list(range(11)), 4, salt) == hashes[:2]
    changed = block_hashes([99, *range(1, 12)], 4, salt)
    assert not set(changed) & set(hashes)
    assert not set(block_hashes(list(range(12)), 4, hash_salt(digest="d", cache_salt="s"))) & set(
        hashes
    )
    assert hash_salt(digest="ab", adapter="c") != hash_salt(digest="a", adapter="bc")


def test_layout_sizes() -> None:
    layout = KVLayout(num_layers=30, num_kv_heads=3, head_dim=64, block_size=16, dtype="bfloat16")
    assert layout.block_bytes == 368_640
    assert layout.num_blocks(0) == 0
    assert layout.num_blocks(16) == 1
    assert layout.num_blocks(17) == 2
