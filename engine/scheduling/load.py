"""What other threads may know of an engine: values, so that no lock and no live state is shared.

engine thread --- LoadReport, replaced after each step ---> loop: heartbeats, health
              --- Limits, fixed at the start -------------> loop: refuses what can never fit
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from engine.base.errors import InvalidRequest
from engine.base.kv_columns import FULL, blocks_needed
from engine.base.types import NO_BUDGETS, RoleBudgets
from engine.scheduling.request import EngineRequest


@dataclass(slots=True)
class Totals:
    """Counted since an engine's start."""

    prompt_tokens_computed: int = 0
    prompt_tokens_cached: int = 0
    generation_tokens: int = 0
    drafts: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0


@dataclass(frozen=True, slots=True)
class LoadReport:
    """The load of an engine between two steps."""

    num_running: int = 0
    num_waiting: int = 0
    waiting_tokens: int = 0  # known tokens to compute, without those of answers under way
    free_blocks: int = 0
    cached_blocks: int = 0
    held_blocks: int = 0
    total_blocks: int = 0
    totals: Totals = field(default_factory=Totals)
    degraded_until_s: float = -math.inf  # monotonic
    role_budgets: RoleBudgets = NO_BUDGETS

    def is_degraded(self, now_s: float) -> bool:
        """Whether the engine computed numbers that were not finite a short while ago."""
        return now_s < self.degraded_until_s


@dataclass(frozen=True, slots=True)
class Limits:
    """What one request may need, alone in the pool."""

    num_blocks: int
    block_size: int
    max_model_len: int
    draft_window: int  # positions beyond the known tokens that a request reserves
    windows: tuple[int, ...] = FULL  # of the columns of block tables
    blocks_ahead: int = 0  # in a column with a window

    def entries_needed(self, num_tokens: int) -> int:
        """Entries of a block table for so many known tokens and one draft window."""
        return -(-(num_tokens + self.draft_window) // self.block_size)

    def room_needed(self, num_tokens: int) -> int:
        """Blocks that such a request holds at most."""
        return self._blocks(num_tokens + self.draft_window)

    def _blocks(self, num_positions: int) -> int:
        return blocks_needed(self.windows, num_positions, self.block_size, self.blocks_ahead)

    def check_fits(self, request: EngineRequest) -> None:
        """Raise InvalidRequest for a request that could never have its memory."""
        num_prompt, stop = len(request.prompt), request.stop
        if stop is None:
            needed = self._blocks(num_prompt)
        elif num_prompt >= self.max_model_len:
            expected = f"expected fewer than {self.max_model_len}"
            raise InvalidRequest("prompt", f"{num_prompt} tokens; {expected}")
        else:
            longest = min(num_prompt + stop.max_tokens, self.max_model_len)
            needed = self.room_needed(longest)
        if needed > self.num_blocks:
            raise InvalidRequest(
                "prompt", f"needs {needed} KV blocks; this worker has {self.num_blocks}"
            )
