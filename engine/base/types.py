"""Values that all packages share. Frozen, without torch and without protobuf types."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from enum import Enum
from hashlib import blake2b
from pathlib import Path
from typing import Literal

PROTOCOL_VERSION = 4
MemoryKind = Literal["DRAM", "VRAM"]  # as NIXL names them


class Role(Enum):
    """The budgets that a worker starts with: see `RoleBudgets`."""

    PREFILL = "prefill"
    DECODE = "decode"


@dataclass(frozen=True, slots=True)
class RoleBudgets:
    """The work that a worker accepts from others; a budget of 0 refuses new calls of a service."""

    prompt_tokens: int  # tokens a step of prompts for other workers (PrefillService)
    answers: int  # concurrent outputs (DecodeService)


NO_BUDGETS = RoleBudgets(0, 0)


class Health(Enum):
    """Whether a worker computes correct numbers, as far as is known."""

    OK = "ok"
    DEGRADED = "degraded"  # it recently computed numbers that are not finite
    SICK = "sick"  # its self-test fails


class FinishReason(Enum):
    """Why an output ended."""

    STOP = "stop"
    LENGTH = "length"
    ABORTED = "aborted"


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Resolved sampling parameters of one output; the public API has checked their ranges.

    Order of application: min_tokens mask, logit_bias, repetition, frequency and presence penalties,
    temperature, min-p, top-k, top-p.
    """

    temperature: float = 0.0  # below 1e-5: argmax
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    min_p: float = 0.0
    frequency_penalty: float = 0.0  # over the output's tokens
    presence_penalty: float = 0.0  # over the output's tokens
    repetition_penalty: float = 1.0  # over prompt and output
    seed: int = 0  # unsigned 64 bits
    logit_bias: tuple[tuple[int, float], ...] = ()

    @property
    def greedy(self) -> bool:
        """Whether each token is the argmax of the processed logits."""
        return self.temperature < 1e-5

    @property
    def penalizes(self) -> bool:
        """Whether the tokens before it change a token's logits."""
        return bool(self.repetition_penalty != 1 or self.frequency_penalty or self.presence_penalty)


@dataclass(frozen=True, slots=True)
class StopParams:
    """When an output ends by token ids; the coordinator handles stop strings."""

    max_tokens: int  # of the whole output, tokens of earlier attempts included
    min_tokens: int = 0  # no stop token before this many tokens
    stop_token_ids: frozenset[int] = frozenset()  # includes end-of-sequence ids, unless ignored


class ConstraintKind(Enum):
    """The language of a constraint."""

    JSON_SCHEMA = "json_schema"
    REGEX = "regex"
    LARK = "lark"


@dataclass(frozen=True, slots=True)
class Constraint:
    """A language that an output must belong to; it compiles to the same grammar everywhere."""

    kind: ConstraintKind
    source: str
    # Output before the constrained text: tokenizers strip a space from the start of a text that has
    # no prompt before it.
    leading_text: str = ""
    # A grammar in Lark of what stands between, which refers to the constrained text as @text.
    prologue: str = ""


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities at one position, of the raw logits, in nats."""

    chosen: float  # of the token at this position
    token_ids: tuple[int, ...]  # the likeliest tokens, best first
    logprobs: tuple[float, ...]  # of `token_ids`


@dataclass(frozen=True, slots=True)
class Peer:
    """A worker process; the incarnation distinguishes it from a restart on the same address."""

    worker_id: str
    incarnation: str
    address: str  # HOST:PORT of its gRPC services


@dataclass(frozen=True, slots=True)
class ModelIdentity:
    """Properties that all workers of one model share."""

    name: str
    digest: str  # compatibility digest, hex
    numeric_profile: str
    max_model_len: int
    block_size: int
    vocab_size: int
    tokenizer_digest: str = ""  # hex; equal digests mean equal token ids


@dataclass(frozen=True, slots=True)
class KVPool:
    """Size of a worker's KV pool; `limit`: why its context is shorter than the model's, or ""."""

    num_bytes: int = 0
    limit: str = ""


NO_KV_POOL = KVPool()
SLOW_BYTES_PER_S = 5e9  # reads of GPU memory: TCP is slower, all other transports are faster


@dataclass(frozen=True, slots=True)
class KVLink:
    """Measurements of the reads from one peer."""

    worker_id: str  # of the peer
    lane: str  # as UCX names it; "": unknown
    bytes_per_s: float  # smoothed
    num_bytes: int  # since the start
    memory: str  # DRAM or VRAM

    @property
    def slow(self) -> bool:
        """Whether GPU memory is read at a speed of TCP."""
        return self.memory == "VRAM" and self.bytes_per_s < SLOW_BYTES_PER_S


def machine_id(boot_id: Path = Path("/proc/sys/kernel/random/boot_id")) -> str:
    """An id that all processes of this machine share until it reboots; "" if unknown."""
    try:
        return blake2b(boot_id.read_bytes(), digest_size=8).hexdigest()
    except OSError:
        return ""


def new_incarnation() -> str:
    """A random id that is unique to one run of a process."""
    return secrets.token_hex(8)
