"""Values that every package speaks of. Frozen, without torch and without protobuf types."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from enum import Enum
from hashlib import blake2b
from pathlib import Path

PROTOCOL_VERSION = 4


class Role(Enum):
    """The budgets that a worker starts with: see `RoleBudgets`."""

    PREFILL = "prefill"
    DECODE = "decode"


@dataclass(frozen=True, slots=True)
class RoleBudgets:
    """What a worker takes from others; a budget of 0 refuses new calls of its service."""

    prompt_tokens: int  # a step, of prompts for other workers: PrefillService
    answers: int  # at once: DecodeService


NO_BUDGETS = RoleBudgets(0, 0)


class Health(Enum):
    """Whether a worker computes what it should, as far as is known."""

    OK = "ok"
    DEGRADED = "degraded"  # its numbers were not finite lately
    SICK = "sick"  # it does not


class FinishReason(Enum):
    """Why an answer ended."""

    STOP = "stop"
    LENGTH = "length"
    ABORTED = "aborted"


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Resolved sampling parameters of one answer; ranges are checked at the public door.

    Order of application: min_tokens mask, logit_bias, repetition, frequency and presence penalties,
    temperature, min-p, top-k, top-p.
    """

    temperature: float = 0.0  # below 1e-5: argmax
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    min_p: float = 0.0
    frequency_penalty: float = 0.0  # over the answer's tokens
    presence_penalty: float = 0.0  # over the answer's tokens
    repetition_penalty: float = 1.0  # over prompt and answer
    seed: int = 0  # unsigned 64 bits
    logit_bias: tuple[tuple[int, float], ...] = ()

    @property
    def greedy(self) -> bool:
        """Whether the token is the plain argmax of the processed logits."""
        return self.temperature < 1e-5


@dataclass(frozen=True, slots=True)
class StopParams:
    """When an answer ends, as far as token ids tell; stop strings are the coordinator's."""

    max_tokens: int  # of the whole answer, tokens delivered by an earlier attempt included
    min_tokens: int = 0  # no stop token before this many
    stop_token_ids: frozenset[int] = frozenset()  # end-of-sequence ids included unless ignored


class ConstraintKind(Enum):
    """In which language a constraint is written."""

    JSON_SCHEMA = "json_schema"
    REGEX = "regex"
    LARK = "lark"


@dataclass(frozen=True, slots=True)
class Constraint:
    """What an answer must be; compiled where it is needed, the same everywhere."""

    kind: ConstraintKind
    source: str
    # What is written before the text and is no part of it: a tokenizer strips a space from the
    # start of a text, where no prompt stands before it.
    lead: str = ""


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities at one position, of the raw logits, in nats."""

    chosen: float  # of the token that stands there
    token_ids: tuple[int, ...]  # the likeliest tokens, best first,
    logprobs: tuple[float, ...]  # and theirs


@dataclass(frozen=True, slots=True)
class Peer:
    """A worker process, named so that a restart on the same address is somebody else."""

    worker_id: str
    incarnation: str
    address: str  # HOST:PORT of its gRPC services


@dataclass(frozen=True, slots=True)
class ModelIdentity:
    """What the workers of one model must agree on."""

    name: str
    digest: str  # compatibility digest, hex
    numeric_profile: str
    max_model_len: int
    block_size: int
    vocab_size: int
    tokenizer_digest: str = ""  # hex; equal ones read and write the same token ids


@dataclass(frozen=True, slots=True)
class KVPool:
    """The size of a worker's KV pool, for people; `limit`: why its context is not the model's."""

    num_bytes: int = 0
    limit: str = ""


NO_KV_POOL = KVPool()
SLOW_BYTES_PER_S = 5e9  # for reads of a GPU's memory: TCP is slower, all else faster


@dataclass(frozen=True, slots=True)
class KVLink:
    """What reads from one peer have shown."""

    peer: str  # whose memory was read
    lane: str  # as UCX names it; "": not known
    bytes_per_s: float  # smoothed
    num_bytes: int  # since the start
    memory: str  # DRAM or VRAM

    @property
    def slow(self) -> bool:
        """Whether a GPU's memory is read slower than by any lane but TCP."""
        return self.memory == "VRAM" and self.bytes_per_s < SLOW_BYTES_PER_S


def machine_id(boot_id: Path = Path("/proc/sys/kernel/random/boot_id")) -> str:
    """Equal for all processes of this machine until it boots again; "" where it has none."""
    try:
        return blake2b(boot_id.read_bytes(), digest_size=8).hexdigest()
    except OSError:
        return ""


def new_incarnation() -> str:
    """A name that no other process has had or will have."""
    return secrets.token_hex(8)
