"""One request inside a worker: a few integers and a transition table.

      submit                                room reserved, blocks wanted from a peer
    ----------> WAITING ------------------------------------------------> FETCHING
                  ^  |  room reserved                                        |  fetch ended
                  |  +-----------------------> RUNNING <---------------------+
                  |        preempted              |
                  +-------------------------------+
                       (any state) ---> FINISHED: stop, length, aborted

WAITING holds no memory. FETCHING and RUNNING hold the whole prompt's blocks and one draft window.

    tokens   [ prompt ............ | answer ...... ]
              0        num_computed ^               ^ len(tokens)
    KV of accepted tokens is complete in [0, num_computed); the next row starts there.

A draft model's KV of the last `draft_lag` of those positions may still be missing: it is computed
when the model drafts again, or before a whole block of it is missing. A block gets its hash when
both are there.

Where the prompt's log-probabilities are requested, all its positions are computed with logits,
cached ones too: a hit supplies no position that is not scored yet. A block with a hash is never
written again, so such a request computes into blocks of its own.

The engine thread owns a request. While it waits, the scheduler's queue alone refers to it; from its
admission to its end its block table holds one reference to each of its blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from engine.base.kv_layout import block_hash
from engine.base.types import SamplingParams, StopParams, TokenLogprobs
from engine.constraints import Matcher
from engine.scheduling.block_pool import NO_SOURCES
from engine.scheduling.block_table import BlockTable
from engine.scheduling.events import Counts
from engine.scheduling.rows import SampleRow

NO_SLOT = -1
NO_DRAFT_ID = -1
_NOT_BANNED: frozenset[int] = frozenset()


class State(Enum):
    """Where a request stands; see the module's picture."""

    WAITING = "waiting"
    FETCHING = "fetching"
    RUNNING = "running"
    FINISHED = "finished"


_TRANSITIONS = {
    State.WAITING: {State.FETCHING, State.RUNNING, State.FINISHED},
    State.FETCHING: {State.RUNNING, State.FINISHED},
    State.RUNNING: {State.WAITING, State.FINISHED},
    State.FINISHED: set(),
}


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """A request as an engine gets it.

    With `sampling` and `stop` it is an answer to write; without, the KV of whole blocks to compute.
    """

    request_id: str
    prompt: tuple[int, ...]
    salt: bytes  # root of its block hashes
    sampling: SamplingParams | None = None
    stop: StopParams | None = None
    output: tuple[int, ...] = ()  # of the answer, already delivered
    fetch: bool = False  # missing whole blocks may come from a peer
    announce_from: int = -1  # first block to report as it completes; -1: none
    priority: int = 0
    deadline_s: float | None = None  # when its caller stops waiting, monotonic; only shown
    num_logprobs: int | None = None  # alternatives reported with each token; None: nothing is
    num_prompt_logprobs: int | None = None  # the same for the prompt's tokens but the first
    source: str = ""  # incarnation of the peer that sends missing blocks
    matcher: Matcher | None = None  # after `output`; the engine's from the moment it is submitted


@dataclass(slots=True, eq=False)
class Request:
    """An EngineRequest with its progress. Owned by the engine thread."""

    key: int  # unique in this engine; request ids come back in retries
    work: EngineRequest
    table: BlockTable
    arrival_s: float
    rank: int = 0  # its priority, until the scheduler raises it
    state: State = State.WAITING
    tokens: list[int] = field(default_factory=list)
    num_computed: int = 0
    draft_lag: int = 0  # of those, the last ones that the draft model has not computed
    hashes: list[bytes] = field(default_factory=list)  # of whole blocks, grown on demand
    num_hashed: int = 0  # leading blocks of the table that are complete and have their hash
    num_announced: int = 0
    sources: frozenset[str] = NO_SOURCES  # of its complete blocks: see BlockPool
    num_cached_tokens: int = 0  # prompt tokens hit when it was first admitted
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    admitted_s: float = 0.0  # first time; 0: not yet
    num_scored: int = 0  # leading positions whose logits have scored the prompt's next token
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)  # not yet reported
    matched_stop: int | None = None
    counts: Counts | None = None  # as last reported; None: they have changed
    slot: int = NO_SLOT  # in DecodeSlots
    draft_id: int = NO_DRAFT_ID  # see `speculation`
    num_prompt: int = field(init=False)  # tokens of the prompt, without any of the answer
    is_answer: bool = field(init=False)  # else only the KV of whole blocks is wanted
    may_fetch: bool = field(init=False)  # missing whole blocks may come from a peer
    wants_tokens: bool = field(init=False)  # not where the prompt's log-probabilities are all

    def __post_init__(self) -> None:
        self.tokens = [*self.work.prompt, *self.work.output]
        self.rank = self.work.priority
        self.num_prompt = len(self.work.prompt)
        self.is_answer = self.work.sampling is not None
        self.may_fetch = self.work.fetch
        self.wants_tokens = self.work.stop is not None and self.work.stop.max_tokens > 0
        self.num_announced = max(0, self.work.announce_from)

    @property
    def num_pending(self) -> int:
        """Known tokens whose KV is not computed yet."""
        return len(self.tokens) - self.num_computed

    @property
    def num_to_score(self) -> int:
        """Leading positions to score: the prompt's last one has no next token in it."""
        return 0 if self.work.num_prompt_logprobs is None else self.num_prompt - 1

    @property
    def fetches(self) -> bool:
        """Whether blocks that are not here come from a peer; not before its prompt is scored."""
        return self.may_fetch and self.num_scored >= self.num_to_score

    @property
    def decoding(self) -> bool:
        """Whether its next row is one token and a draft."""
        return self.is_answer and len(self.tokens) - self.num_computed == 1

    @property
    def sort_key(self) -> tuple[int, float, int]:
        """Rank, then age."""
        return (self.rank, self.arrival_s, self.key)

    def end(self, max_model_len: int) -> int:
        """Number of known tokens that ends the answer, if nothing else does."""
        assert self.work.stop is not None
        return min(self.num_prompt + self.work.stop.max_tokens, max_model_len)

    def sample_row(
        self, draft: Sequence[int] = (), mask: NDArray[np.int32] | None = None
    ) -> SampleRow:
        """Where the sampler stands after the known tokens and `draft`."""
        work, position = self.work, len(self.tokens) + len(draft)
        sampling, stop = work.sampling, work.stop
        assert sampling is not None and stop is not None
        early = position - self.num_prompt < stop.min_tokens
        banned = stop.stop_token_ids if early else _NOT_BANNED
        return SampleRow(sampling, position, self.tokens, self.num_prompt, draft, banned, mask)

    def whole_hashes(self, block_size: int) -> list[bytes]:
        """Hashes of the whole blocks that a hit or a peer may supply.

        An answer needs at least one token to compute, so that there are logits to sample from:
        floor((n - 1) / block_size) blocks; a request for KV alone may be hit whole.
        """
        usable = len(self.tokens) - (1 if self.is_answer else 0)
        while (len(self.hashes) + 1) * block_size <= len(self.tokens):
            start = len(self.hashes) * block_size
            parent = self.hashes[-1] if self.hashes else b""
            chunk = self.tokens[start : start + block_size]
            self.hashes.append(block_hash(parent, chunk, self.work.salt))
        return self.hashes[: usable // block_size]

    def num_whole(self, block_size: int) -> int:
        """How many blocks a hit or a peer may supply."""
        return len(self.whole_hashes(block_size))

    def hittable_hashes(self, block_size: int) -> list[bytes]:
        """Those of them whose positions need not be computed for their logits."""
        hashes = self.whole_hashes(block_size)
        missing = self.num_scored < self.num_to_score
        return hashes[: self.num_scored // block_size] if missing else hashes

    def move(self, state: State) -> None:
        """Change state along the table."""
        assert state in _TRANSITIONS[self.state], f"{self.state} -> {state}"
        self.state = state
