"""The shape of a KV block, and what must agree before two workers exchange one. No torch here.

    pool   [num_blocks, num_kv_heads, num_layers, 2, block_size, head_dim]
            |<------------------ one block: one contiguous extent ------------------>|

A block is one extent and so one NIXL descriptor; adjacent blocks coalesce. Any range of its heads
is one extent, too, so that workers of unequal tensor parallelism exchange one descriptor a block
and head range. A layer's view `pool[:, :, layer]` is strided, which FlashInfer's paged wrappers
take (HND).

The layers of a draft model lie in the same blocks, behind those of the target. They are a group of
their own, head-major as well, as their heads differ in number and size:

    block   | target: [heads, layers, 2, block_size, head_dim] | draft: [...] | (padding)
            0                                          draft_offset    block_elements
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace

from engine.base.kv_columns import FULL, blocks_needed
from engine.base.types import PROTOCOL_VERSION

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
HASH_BYTES = 16
GENERATION_BYTES = 8  # of a block's generation: see kvtransfer/fence.py
_LAYOUT_VERSION = 2  # of the order of a block's axes, and of the fields below
_DIGEST_FIELDS = ("num_kv_heads", "num_layers", "block_size", "head_dim", "dtype")


@dataclass(frozen=True, slots=True)
class LayerGroup:
    """Layers whose heads lie together in a block: head h at offset + (h - first_head) * head_bytes.

    Attributes:
        first_head: the first of the model's KV heads that the block holds.
        num_heads: KV heads that it holds from there on.
        head_bytes: one head of all layers of the group, keys and values.
        offset: bytes of the block before the group.
    """

    first_head: int
    num_heads: int
    head_bytes: int
    offset: int

    @property
    def heads(self) -> range:
        """The model's KV heads that the block holds."""
        return range(self.first_head, self.first_head + self.num_heads)

    @property
    def end(self) -> int:
        """Bytes of the block up to the end of the group."""
        return self.offset + self.num_heads * self.head_bytes

    def offset_of(self, head: int) -> int:
        """Bytes of the block before one of these heads."""
        return self.offset + (head - self.first_head) * self.head_bytes


@dataclass(frozen=True, slots=True)
class KVLayout:
    """Geometry of the KV pool of one model, and of the draft model beside it."""

    num_layers: int  # of a block
    num_kv_heads: int
    head_dim: int
    block_size: int  # tokens a block
    dtype: str  # of the cache: float32, bfloat16 or float16
    draft: KVLayout | None = None  # of the same block_size and dtype
    first_kv_head: int = 0  # of a rank's part of the heads, see `shard`
    windows: tuple[int, ...] = FULL  # of the columns of block tables, see kv_columns
    places: tuple[tuple[int, int], ...] = ()  # of each layer, as Columns has it; (): one column

    def __post_init__(self) -> None:
        ours = (self.block_size, self.dtype)
        if self.draft and (self.draft.block_size, self.draft.dtype) != ours:
            raise ValueError("a draft model's layers have the target's block_size and dtype")

    @property
    def num_columns(self) -> int:
        """Columns of a block table."""
        return len(self.windows)

    @property
    def total_layers(self) -> int:
        """Layers of the model."""
        return len(self.places) or self.num_layers

    def place(self, layer: int) -> tuple[int, int]:
        """A layer's column, and its place among the layers of a block."""
        return self.places[layer] if self.places else (0, layer)

    @property
    def block_shape(self) -> tuple[int, int, int, int, int]:
        """(num_kv_heads, num_layers, 2, block_size, head_dim); the 2 are K and V."""
        return (self.num_kv_heads, self.num_layers, 2, self.block_size, self.head_dim)

    @property
    def run_elements(self) -> int:
        """Elements of one head's keys, or values, of one layer in a block: they lie together."""
        return self.block_size * self.head_dim

    @property
    def head_elements(self) -> int:
        """Elements from one head of a block to the next: keys and values of all layers."""
        return self.num_layers * 2 * self.run_elements

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
    def groups(self) -> tuple[LayerGroup, ...]:
        """The target's layers, then the draft model's, as byte ranges of a block."""
        size, parts = DTYPE_BYTES[self.dtype], [(self, 0)]
        if self.draft:
            parts.append((self.draft, self.draft_offset))
        return tuple(
            LayerGroup(p.first_kv_head, p.num_kv_heads, p.head_elements * size, offset * size)
            for p, offset in parts
        )

    def shard(self, rank: int, num_ranks: int) -> KVLayout:
        """The blocks of one rank of a tensor-parallel worker, which hold only its heads.

        With fewer heads than ranks each head lies on several ranks. Raises ValueError where the one
        number does not divide the other.
        """
        small, large = sorted((self.num_kv_heads, num_ranks))
        if not 0 <= rank < num_ranks or large % small:
            raise ValueError(
                f"rank {rank} of {num_ranks} over {self.num_kv_heads} KV heads; expected a rank"
                " below the number of ranks, and that heads or ranks are a multiple of the other"
            )
        return replace(
            self,
            num_kv_heads=max(1, self.num_kv_heads // num_ranks),
            first_kv_head=rank * self.num_kv_heads // num_ranks,
            draft=self.draft and self.draft.shard(rank, num_ranks),
        )

    @property
    def text(self) -> str:
        """The part of the compatibility digest that describes the whole model's layout."""
        fields = " ".join(f"{name}={getattr(self, name)}" for name in _DIGEST_FIELDS)
        draft = f" draft=({self.draft.text})" if self.draft else ""
        columns = ""
        if self.windows != FULL:
            places = ",".join(f"{column}:{index}" for column, index in self.places)
            columns = f" windows={','.join(map(str, self.windows))} places={places}"
        return f"layout={_LAYOUT_VERSION} {fields}{columns}{draft}"

    def num_blocks(self, num_tokens: int) -> int:
        """Blocks that `num_tokens` positions occupy, in one column."""
        return -(-num_tokens // self.block_size)

    def pool_blocks(self, num_tokens: int, ahead: int = 0) -> int:
        """Blocks that a request of `num_tokens` positions holds at most; `ahead`: kv_columns."""
        return blocks_needed(self.windows, num_tokens, self.block_size, ahead)


def _round_up(n: int, unit: int) -> int:
    return -(-n // unit) * unit


def digest_of(person: bytes, *fields: bytes) -> bytes:
    """BLAKE2b-128 over length-prefixed fields: they cannot run into each other."""
    data = b"".join(
        [part for field in fields for part in (len(field).to_bytes(8, "little"), field)]
    )
    return hashlib.blake2b(data, digest_size=HASH_BYTES, person=person).digest()


def compatibility_digest(
    *, numeric_profile: str, tokenizer_digest: str, layout: KVLayout, rope: str
) -> str:
    """Hex digest of everything that two workers must share before one reads the other's blocks.

    Compared at registration and at every handshake, before anything else is decoded.
    """
    fields = (str(PROTOCOL_VERSION), numeric_profile, tokenizer_digest, layout.text, rope)
    return digest_of(b"diptych-compat", *(f.encode() for f in fields)).hex()


def hash_salt(*, digest: str, adapter: str = "", cache_salt: str = "") -> bytes:
    """The root of a chain of block hashes: hashes of different salts never meet."""
    return digest_of(b"diptych-salt", digest.encode(), adapter.encode(), cache_salt.encode())


def column_hash(block: bytes, column: int) -> bytes:
    """The hash of a column's block, from that of the positions: column 0 has the latter."""
    return digest_of(b"diptych-column", block, bytes([column])) if column else block


def block_hash(parent: bytes, token_ids: Sequence[int], salt: bytes) -> bytes:
    """Content hash of a full block: H(parent's hash or b"", its tokens, salt)."""
    tokens = struct.pack(f"<{len(token_ids)}I", *token_ids)
    return digest_of(b"diptych-block", parent, tokens, salt)
