"""One request inside a worker: a few integers, a transition table and an asserted invariant.

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

A draft model's KV of the last `draft_lag` of those positions may still be missing: it is written
when the model drafts again, or before a whole block of it is missing. A block is named when it has
both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

from engine.cache.block_table import BlockTable
from engine.cache.layout import block_name
from engine.sampling.row import SampleRow
from engine.types import FinishReason, SamplingParams, StopParams


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
class Work:
    """What is asked of an engine.

    With `sampling` and `stop` it is an answer to write; without, the KV of whole blocks to compute.
    """

    request_id: str
    prompt: tuple[int, ...]
    salt: bytes  # root of its block names
    sampling: SamplingParams | None = None
    stop: StopParams | None = None
    output: tuple[int, ...] = ()  # of the answer, already delivered
    fetch: bool = False  # missing whole blocks may come from a peer
    announce_from: int = -1  # first block to report as it completes; -1: none
    priority: int = 0
    deadline_s: float | None = None  # when its caller stops waiting, monotonic; only shown


@dataclass(slots=True, eq=False)
class Request:
    """A Work with its progress. Owned by the engine thread."""

    key: int  # unique in this engine; request ids come back in retries
    work: Work
    table: BlockTable
    arrival_s: float
    state: State = State.WAITING
    tokens: list[int] = field(default_factory=list)
    num_computed: int = 0
    draft_lag: int = 0  # of those, the last ones that the draft model has not computed
    names: list[bytes] = field(default_factory=list)  # of whole blocks, grown on demand
    num_named: int = 0  # leading blocks of the table that are complete and named
    num_announced: int = 0
    num_cached_tokens: int = 0  # prompt tokens hit when it was first admitted
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    admitted_s: float = 0.0  # first time; 0: not yet
    finish_reason: FinishReason | None = None
    matched_stop: int | None = None

    def __post_init__(self) -> None:
        self.tokens = [*self.work.prompt, *self.work.output]
        self.num_announced = max(0, self.work.announce_from)

    @property
    def num_prompt(self) -> int:
        """Tokens of the prompt, without any of the answer."""
        return len(self.work.prompt)

    @property
    def num_output(self) -> int:
        """Tokens of the answer so far, those of earlier attempts included."""
        return len(self.tokens) - self.num_prompt

    @property
    def num_pending(self) -> int:
        """Known tokens whose KV is not computed yet."""
        return len(self.tokens) - self.num_computed

    @property
    def samples(self) -> bool:
        """Whether it writes an answer."""
        return self.work.sampling is not None

    @property
    def decoding(self) -> bool:
        """Whether its next row is one token and a draft."""
        return self.samples and self.num_pending == 1

    @property
    def sort_key(self) -> tuple[int, float, int]:
        """Priority, then age."""
        return (self.work.priority, self.arrival_s, self.key)

    def sample_row(self, draft: Sequence[int] = ()) -> SampleRow:
        """Where the sampler stands after the known tokens and `draft`."""
        work = self.work
        assert work.sampling is not None
        assert work.stop is not None
        early = self.num_output + len(draft) < work.stop.min_tokens
        return SampleRow(
            params=work.sampling,
            position=len(self.tokens) + len(draft),
            tokens=self.tokens,
            num_prompt=self.num_prompt,
            draft=draft,
            banned=work.stop.stop_token_ids if early else frozenset(),
        )

    def whole_names(self, block_size: int) -> list[bytes]:
        """Names of the whole blocks that a hit or a peer may supply.

        An answer needs at least one token to compute, so that there are logits to sample from:
        floor((n - 1) / block_size) blocks; mere KV may be hit whole.
        """
        usable = len(self.tokens) - (1 if self.samples else 0)
        while (len(self.names) + 1) * block_size <= len(self.tokens):
            start = len(self.names) * block_size
            parent = self.names[-1] if self.names else b""
            chunk = self.tokens[start : start + block_size]
            self.names.append(block_name(parent, chunk, self.work.salt))
        return self.names[: usable // block_size]

    def move(self, state: State) -> None:
        """Change state along the table."""
        assert state in _TRANSITIONS[self.state], f"{self.state} -> {state}"
        self.state = state

    def check(self, block_size: int) -> None:
        """Assert the invariant; for tests."""
        assert 0 <= self.num_computed <= len(self.tokens)
        assert self.num_computed <= len(self.table.blocks) * block_size
        assert 0 <= self.draft_lag <= self.num_computed
        assert self.num_named * block_size <= self.num_computed - self.draft_lag
        holds = self.state in (State.FETCHING, State.RUNNING)
        assert holds or not self.table.blocks
