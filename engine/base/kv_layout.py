"""The shape of a KV block, and what must agree before two workers exchange one. No torch here.

    pool   [num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim]
            |<------------------ one block: one contiguous extent ------------------>|

One block of all layers is one extent and so one NIXL descriptor; adjacent blocks coalesce. A
layer's view `pool[:, layer]` is strided, which FlashInfer's paged wrappers take (HND).

A draft model's layers lie in the same blocks, behind the target's, so that whoever holds, names or
moves a block has both:

    block   | target: [num_layers, 2, heads, block_size, head_dim] | draft: [...] | (padding)
            0                                               draft_offset          block_elements
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

from engine.base.types import PROTOCOL_VERSION

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
HASH_BYTES = 16


@dataclass(frozen=True, slots=True)
class KVLayout:
    """Geometry of the KV pool of one model, and of the draft model beside it."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_size: int  # tokens a block
    dtype: str  # of the cache: float32, bfloat16 or float16
    draft: KVLayout | None = None  # of the same block_size and dtype

    def __post_init__(self) -> None:
        if self.draft and (self.draft.block_size, self.draft.dtype) != (
            self.block_size,
            self.dtype,
        ):
            raise ValueError("a draft model's layers have the target's block_size and dtype")

    @property
    def block_shape(self) -> tuple[int, int, int, int, int]:
        """(num_layers, 2, num_kv_heads, block_size, head_dim); the 2 are K and V."""
        return (self.num_layers, 2, self.num_kv_heads, self.block_size, self.head_dim)

    @property
    def run_elements(self) -> int:
        """Elements of one head's keys, or values, in a block: they lie together."""
        return self.block_size * self.head_dim

    @property
    def draft_offset(self) -> int:
        """Elements of a block before the draft model's."""
        size = math.prod(self.block_shape)
        return _round_up(size, self.draft.run_elements) if self.draft else size

    @property
    def block_elements(self) -> int:
        """Elements from one block to the next: whole runs of either model, so rarely padded."""
        if self.draft is None:
            return self.draft_offset
        end = self.draft_offset + math.prod(self.draft.block_shape)
        return _round_up(end, math.lcm(self.run_elements, self.draft.run_elements))

    @property
    def block_bytes(self) -> int:
        """Size of one block of all layers of both models."""
        return self.block_elements * DTYPE_BYTES[self.dtype]

    @property
    def text(self) -> str:
        """All fields, for digests."""
        own = (*self.block_shape, self.dtype)
        return " ".join(map(str, own)) + (f" draft=({self.draft.text})" if self.draft else "")

    def num_blocks(self, num_tokens: int) -> int:
        """Blocks that `num_tokens` positions occupy."""
        return -(-num_tokens // self.block_size)


def _round_up(n: int, unit: int) -> int:
    return -(-n // unit) * unit


def _digest(person: bytes, *fields: bytes) -> bytes:
    """BLAKE2b-128 over length-prefixed fields."""
    h = hashlib.blake2b(digest_size=HASH_BYTES, person=person)
    for field in fields:
        h.update(len(field).to_bytes(8, "little"))
        h.update(field)
    return h.digest()


def compatibility_digest(
    *, numeric_profile: str, tokenizer_digest: str, layout: KVLayout, rope: str
) -> str:
    """Hex digest of everything that two workers must share before one reads the other's blocks.

    Compared at registration and at every handshake, before anything else is decoded.
    """
    fields = (str(PROTOCOL_VERSION), numeric_profile, tokenizer_digest, layout.text, rope)
    return _digest(b"diptych-compat", *(f.encode() for f in fields)).hex()


def hash_salt(*, digest: str, adapter: str = "", cache_salt: str = "") -> bytes:
    """The root that a chain of block names grows from: names of different salts never meet."""
    return _digest(b"diptych-salt", digest.encode(), adapter.encode(), cache_salt.encode())


def block_hash(parent: bytes, token_ids: Sequence[int], salt: bytes) -> bytes:
    """Content name of a full block: H(parent's name or b"", its tokens, salt)."""
    tokens = b"".join(t.to_bytes(4, "little") for t in token_ids)
    return _digest(b"diptych-block", parent, tokens, salt)


def block_hashes(token_ids: Sequence[int], block_size: int, salt: bytes) -> list[bytes]:
    """Names of the whole blocks of `token_ids`, in order; a last partial block has no name."""
    names: list[bytes] = []
    parent = b""
    for start in range(0, len(token_ids) - block_size + 1, block_size):
        parent = block_hash(parent, token_ids[start : start + block_size], salt)
        names.append(parent)
    return names
