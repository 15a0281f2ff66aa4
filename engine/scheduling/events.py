"""What an engine reports of its requests: values that cross from its thread to the loop.

[FetchEvent] [AnnouncedEvent ...] [TokensEvent ...] FinishedEvent    in order, for each request
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from engine.base.errors import DiptychError
from engine.base.types import FinishReason, TokenLogprobs


class Counts(NamedTuple):
    """What a request has used so far."""

    num_cached_tokens: int
    num_draft_tokens: int
    num_accepted_tokens: int
    queue_s: float  # until it was first admitted


class TokensEvent(NamedTuple):
    """New tokens of an answer; with the first, or instead, the prompt's log-probabilities."""

    key: int
    token_ids: list[int]
    counts: Counts
    logprobs: Sequence[TokenLogprobs] = ()  # one a token, where requested
    prompt_logprobs: Sequence[TokenLogprobs] = ()  # of its tokens 1, 2, ...


@dataclass(frozen=True, slots=True)
class FetchEvent:
    """Room is reserved; entries of the block table from `first_block` on are wanted from a peer.

    An entry has a block for each column whose window reaches it from the end: see kv_columns.
    """

    key: int
    first_block: int
    block_ids: list[int]  # in table order, each entry's by column
    hashes: list[bytes]  # one a block
    token_ids: list[int]  # of all whole blocks, from position 0
    counts: list[int]  # blocks of each entry

    @property
    def end(self) -> int:
        """The entry behind the last one."""
        return self.first_block + len(self.counts)

    def offset(self, entry: int) -> int:
        """How many blocks the wanted entries before this one have."""
        return sum(self.counts[: entry - self.first_block])

    def entries(self, entry: int, num_blocks: int) -> int:
        """How many whole entries from `entry` on the next `num_blocks` blocks are."""
        num_entries = 0
        for count in self.counts[entry - self.first_block :]:
            if count > num_blocks or not (num_blocks or count):
                break
            num_blocks -= count
            num_entries += 1
        return num_entries


@dataclass(frozen=True, slots=True)
class AnnouncedEvent:
    """Complete blocks of a prompt, pinned once more for the receiver, which releases them."""

    key: int
    first_block: int  # entry of the block table
    block_ids: list[int]  # of this entry and the next ones, as in FetchEvent
    hashes: list[bytes]
    generations: list[int]


@dataclass(frozen=True, slots=True)
class FinishedEvent:
    """The last event of a request."""

    key: int
    reason: FinishReason
    matched_stop: int | None
    counts: Counts
    error: DiptychError | None = None  # why the engine gave it up


Event = TokensEvent | FetchEvent | AnnouncedEvent | FinishedEvent
