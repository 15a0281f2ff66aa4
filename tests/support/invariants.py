"""What must hold of a pool and of its requests between any two steps."""

from __future__ import annotations

from engine.scheduling.block_pool import BlockPool
from engine.scheduling.request import Request, State


def check_pool(pool: BlockPool) -> None:
    """Assert conservation, and that hashes, references and lists agree."""
    refs, hashes = pool._refs, pool._hashes
    held = sum(1 for count in refs if count > 0)
    assert held == pool.num_held, (held, pool.num_free, pool.num_cached, pool.num_blocks)
    assert all(count >= 0 for count in refs)
    assert all(refs[b] == 0 and hashes[b] is None for b in pool._free)
    assert all(refs[b] == 0 and hashes[b] is not None for b in pool._cached)
    assert all(hashes[block] is not None for block in pool._sources)
    assert {hashes[b]: b for b in range(pool.num_blocks) if hashes[b]} == pool._by_hash


def check_request(request: Request, block_size: int) -> None:
    """Assert that computed and hashed positions, and the blocks, fit the state of a request."""
    assert 0 <= request.num_computed <= len(request.tokens)
    assert request.num_computed <= request.table.num_positions or not request.table.blocks
    assert 0 <= request.draft_lag <= request.num_computed
    assert request.num_hashed * block_size <= request.num_computed - request.draft_lag
    holds = request.state in (State.FETCHING, State.RUNNING)
    assert holds or not request.table.blocks
