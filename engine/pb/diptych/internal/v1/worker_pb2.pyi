from engine.pb.diptych.v1 import inference_pb2 as _inference_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class PrefillPeer(_message.Message):
    __slots__ = ("worker_id", "incarnation", "address")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    incarnation: str
    address: str
    def __init__(self, worker_id: _Optional[str] = ..., incarnation: _Optional[str] = ..., address: _Optional[str] = ...) -> None: ...

class DecodeRequest(_message.Message):
    __slots__ = ("request_id", "prompt_token_ids", "output_token_ids", "sampling", "stop", "prefill", "cache_salt", "priority", "incarnation", "num_logprobs", "constraint", "num_prompt_logprobs", "shared_key")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    PREFILL_FIELD_NUMBER: _ClassVar[int]
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    NUM_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    CONSTRAINT_FIELD_NUMBER: _ClassVar[int]
    NUM_PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    SHARED_KEY_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    prompt_token_ids: _containers.RepeatedScalarFieldContainer[int]
    output_token_ids: _containers.RepeatedScalarFieldContainer[int]
    sampling: SamplingParams
    stop: StopParams
    prefill: PrefillPeer
    cache_salt: str
    priority: int
    incarnation: str
    num_logprobs: int
    constraint: Constraint
    num_prompt_logprobs: int
    shared_key: bytes
    def __init__(self, request_id: _Optional[str] = ..., prompt_token_ids: _Optional[_Iterable[int]] = ..., output_token_ids: _Optional[_Iterable[int]] = ..., sampling: _Optional[_Union[SamplingParams, _Mapping]] = ..., stop: _Optional[_Union[StopParams, _Mapping]] = ..., prefill: _Optional[_Union[PrefillPeer, _Mapping]] = ..., cache_salt: _Optional[str] = ..., priority: _Optional[int] = ..., incarnation: _Optional[str] = ..., num_logprobs: _Optional[int] = ..., constraint: _Optional[_Union[Constraint, _Mapping]] = ..., num_prompt_logprobs: _Optional[int] = ..., shared_key: _Optional[bytes] = ...) -> None: ...

class Constraint(_message.Message):
    __slots__ = ("kind", "source", "leading_text", "prologue")
    class Kind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        KIND_UNSPECIFIED: _ClassVar[Constraint.Kind]
        KIND_JSON_SCHEMA: _ClassVar[Constraint.Kind]
        KIND_REGEX: _ClassVar[Constraint.Kind]
        KIND_LARK: _ClassVar[Constraint.Kind]
    KIND_UNSPECIFIED: Constraint.Kind
    KIND_JSON_SCHEMA: Constraint.Kind
    KIND_REGEX: Constraint.Kind
    KIND_LARK: Constraint.Kind
    KIND_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    LEADING_TEXT_FIELD_NUMBER: _ClassVar[int]
    PROLOGUE_FIELD_NUMBER: _ClassVar[int]
    kind: Constraint.Kind
    source: str
    leading_text: str
    prologue: str
    def __init__(self, kind: _Optional[_Union[Constraint.Kind, str]] = ..., source: _Optional[str] = ..., leading_text: _Optional[str] = ..., prologue: _Optional[str] = ...) -> None: ...

class Logprobs(_message.Message):
    __slots__ = ("chosen", "token_ids", "logprobs")
    CHOSEN_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    chosen: float
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    logprobs: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, chosen: _Optional[float] = ..., token_ids: _Optional[_Iterable[int]] = ..., logprobs: _Optional[_Iterable[float]] = ...) -> None: ...

class SamplingParams(_message.Message):
    __slots__ = ("temperature", "top_p", "top_k", "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty", "seed", "logit_bias")
    class LogitBiasEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: int
        value: float
        def __init__(self, key: _Optional[int] = ..., value: _Optional[float] = ...) -> None: ...
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    MIN_P_FIELD_NUMBER: _ClassVar[int]
    FREQUENCY_PENALTY_FIELD_NUMBER: _ClassVar[int]
    PRESENCE_PENALTY_FIELD_NUMBER: _ClassVar[int]
    REPETITION_PENALTY_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    LOGIT_BIAS_FIELD_NUMBER: _ClassVar[int]
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    frequency_penalty: float
    presence_penalty: float
    repetition_penalty: float
    seed: int
    logit_bias: _containers.ScalarMap[int, float]
    def __init__(self, temperature: _Optional[float] = ..., top_p: _Optional[float] = ..., top_k: _Optional[int] = ..., min_p: _Optional[float] = ..., frequency_penalty: _Optional[float] = ..., presence_penalty: _Optional[float] = ..., repetition_penalty: _Optional[float] = ..., seed: _Optional[int] = ..., logit_bias: _Optional[_Mapping[int, float]] = ...) -> None: ...

class StopParams(_message.Message):
    __slots__ = ("max_tokens", "min_tokens", "stop_token_ids")
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MIN_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    max_tokens: int
    min_tokens: int
    stop_token_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, max_tokens: _Optional[int] = ..., min_tokens: _Optional[int] = ..., stop_token_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class DecodeResponse(_message.Message):
    __slots__ = ("tokens", "finished", "alive", "unknown")
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    ALIVE_FIELD_NUMBER: _ClassVar[int]
    UNKNOWN_FIELD_NUMBER: _ClassVar[int]
    tokens: Tokens
    finished: DecodeFinished
    alive: Alive
    unknown: Unknown
    def __init__(self, tokens: _Optional[_Union[Tokens, _Mapping]] = ..., finished: _Optional[_Union[DecodeFinished, _Mapping]] = ..., alive: _Optional[_Union[Alive, _Mapping]] = ..., unknown: _Optional[_Union[Unknown, _Mapping]] = ...) -> None: ...

class Unknown(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Alive(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Tokens(_message.Message):
    __slots__ = ("token_ids", "cached_tokens", "draft_tokens", "accepted_tokens", "queue_s", "prefill_s", "kv_transfer_s", "logprobs", "prompt_logprobs")
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    DRAFT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    ACCEPTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    QUEUE_S_FIELD_NUMBER: _ClassVar[int]
    PREFILL_S_FIELD_NUMBER: _ClassVar[int]
    KV_TRANSFER_S_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    cached_tokens: int
    draft_tokens: int
    accepted_tokens: int
    queue_s: float
    prefill_s: float
    kv_transfer_s: float
    logprobs: _containers.RepeatedCompositeFieldContainer[Logprobs]
    prompt_logprobs: _containers.RepeatedCompositeFieldContainer[Logprobs]
    def __init__(self, token_ids: _Optional[_Iterable[int]] = ..., cached_tokens: _Optional[int] = ..., draft_tokens: _Optional[int] = ..., accepted_tokens: _Optional[int] = ..., queue_s: _Optional[float] = ..., prefill_s: _Optional[float] = ..., kv_transfer_s: _Optional[float] = ..., logprobs: _Optional[_Iterable[_Union[Logprobs, _Mapping]]] = ..., prompt_logprobs: _Optional[_Iterable[_Union[Logprobs, _Mapping]]] = ...) -> None: ...

class DecodeFinished(_message.Message):
    __slots__ = ("finish_reason", "matched_stop_token", "cached_tokens", "draft_tokens", "accepted_tokens", "queue_s", "prefill_s", "kv_transfer_s")
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    MATCHED_STOP_TOKEN_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    DRAFT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    ACCEPTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    QUEUE_S_FIELD_NUMBER: _ClassVar[int]
    PREFILL_S_FIELD_NUMBER: _ClassVar[int]
    KV_TRANSFER_S_FIELD_NUMBER: _ClassVar[int]
    finish_reason: _inference_pb2.FinishReason
    matched_stop_token: int
    cached_tokens: int
    draft_tokens: int
    accepted_tokens: int
    queue_s: float
    prefill_s: float
    kv_transfer_s: float
    def __init__(self, finish_reason: _Optional[_Union[_inference_pb2.FinishReason, str]] = ..., matched_stop_token: _Optional[int] = ..., cached_tokens: _Optional[int] = ..., draft_tokens: _Optional[int] = ..., accepted_tokens: _Optional[int] = ..., queue_s: _Optional[float] = ..., prefill_s: _Optional[float] = ..., kv_transfer_s: _Optional[float] = ...) -> None: ...

class PrefillRequest(_message.Message):
    __slots__ = ("request_id", "incarnation", "caller_incarnation", "token_ids", "num_held_blocks", "cache_salt", "priority", "checksums")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    CALLER_INCARNATION_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    NUM_HELD_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    CHECKSUMS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    incarnation: str
    caller_incarnation: str
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    num_held_blocks: int
    cache_salt: str
    priority: int
    checksums: bool
    def __init__(self, request_id: _Optional[str] = ..., incarnation: _Optional[str] = ..., caller_incarnation: _Optional[str] = ..., token_ids: _Optional[_Iterable[int]] = ..., num_held_blocks: _Optional[int] = ..., cache_salt: _Optional[str] = ..., priority: _Optional[int] = ..., checksums: _Optional[bool] = ...) -> None: ...

class PrefillResponse(_message.Message):
    __slots__ = ("ready", "finished", "alive")
    READY_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    ALIVE_FIELD_NUMBER: _ClassVar[int]
    ready: BlocksReady
    finished: PrefillFinished
    alive: Alive
    def __init__(self, ready: _Optional[_Union[BlocksReady, _Mapping]] = ..., finished: _Optional[_Union[PrefillFinished, _Mapping]] = ..., alive: _Optional[_Union[Alive, _Mapping]] = ...) -> None: ...

class BlocksReady(_message.Message):
    __slots__ = ("lease", "ttl_s", "first_block", "block_ids", "hashes", "generations", "checksums")
    LEASE_FIELD_NUMBER: _ClassVar[int]
    TTL_S_FIELD_NUMBER: _ClassVar[int]
    FIRST_BLOCK_FIELD_NUMBER: _ClassVar[int]
    BLOCK_IDS_FIELD_NUMBER: _ClassVar[int]
    HASHES_FIELD_NUMBER: _ClassVar[int]
    GENERATIONS_FIELD_NUMBER: _ClassVar[int]
    CHECKSUMS_FIELD_NUMBER: _ClassVar[int]
    lease: bytes
    ttl_s: float
    first_block: int
    block_ids: _containers.RepeatedScalarFieldContainer[int]
    hashes: _containers.RepeatedScalarFieldContainer[bytes]
    generations: _containers.RepeatedScalarFieldContainer[int]
    checksums: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, lease: _Optional[bytes] = ..., ttl_s: _Optional[float] = ..., first_block: _Optional[int] = ..., block_ids: _Optional[_Iterable[int]] = ..., hashes: _Optional[_Iterable[bytes]] = ..., generations: _Optional[_Iterable[int]] = ..., checksums: _Optional[_Iterable[int]] = ...) -> None: ...

class PrefillFinished(_message.Message):
    __slots__ = ("num_computed_tokens", "num_cached_tokens", "queue_s", "compute_s")
    NUM_COMPUTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    QUEUE_S_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_S_FIELD_NUMBER: _ClassVar[int]
    num_computed_tokens: int
    num_cached_tokens: int
    queue_s: float
    compute_s: float
    def __init__(self, num_computed_tokens: _Optional[int] = ..., num_cached_tokens: _Optional[int] = ..., queue_s: _Optional[float] = ..., compute_s: _Optional[float] = ...) -> None: ...

class HandshakeRequest(_message.Message):
    __slots__ = ("digest", "caller_incarnation")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    CALLER_INCARNATION_FIELD_NUMBER: _ClassVar[int]
    digest: str
    caller_incarnation: str
    def __init__(self, digest: _Optional[str] = ..., caller_incarnation: _Optional[str] = ...) -> None: ...

class HandshakeResponse(_message.Message):
    __slots__ = ("incarnation", "digest", "num_blocks", "machine", "agents", "regions")
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    MACHINE_FIELD_NUMBER: _ClassVar[int]
    AGENTS_FIELD_NUMBER: _ClassVar[int]
    REGIONS_FIELD_NUMBER: _ClassVar[int]
    incarnation: str
    digest: str
    num_blocks: int
    machine: str
    agents: _containers.RepeatedCompositeFieldContainer[NixlAgent]
    regions: _containers.RepeatedCompositeFieldContainer[Region]
    def __init__(self, incarnation: _Optional[str] = ..., digest: _Optional[str] = ..., num_blocks: _Optional[int] = ..., machine: _Optional[str] = ..., agents: _Optional[_Iterable[_Union[NixlAgent, _Mapping]]] = ..., regions: _Optional[_Iterable[_Union[Region, _Mapping]]] = ...) -> None: ...

class NixlAgent(_message.Message):
    __slots__ = ("name", "metadata")
    NAME_FIELD_NUMBER: _ClassVar[int]
    METADATA_FIELD_NUMBER: _ClassVar[int]
    name: str
    metadata: bytes
    def __init__(self, name: _Optional[str] = ..., metadata: _Optional[bytes] = ...) -> None: ...

class Region(_message.Message):
    __slots__ = ("kind", "rank", "agent", "stride", "memory", "groups")
    class Kind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        KIND_UNSPECIFIED: _ClassVar[Region.Kind]
        KIND_BLOCKS: _ClassVar[Region.Kind]
        KIND_GENERATIONS: _ClassVar[Region.Kind]
    KIND_UNSPECIFIED: Region.Kind
    KIND_BLOCKS: Region.Kind
    KIND_GENERATIONS: Region.Kind
    KIND_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    AGENT_FIELD_NUMBER: _ClassVar[int]
    STRIDE_FIELD_NUMBER: _ClassVar[int]
    MEMORY_FIELD_NUMBER: _ClassVar[int]
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    kind: Region.Kind
    rank: int
    agent: str
    stride: int
    memory: Memory
    groups: _containers.RepeatedCompositeFieldContainer[LayerGroup]
    def __init__(self, kind: _Optional[_Union[Region.Kind, str]] = ..., rank: _Optional[int] = ..., agent: _Optional[str] = ..., stride: _Optional[int] = ..., memory: _Optional[_Union[Memory, _Mapping]] = ..., groups: _Optional[_Iterable[_Union[LayerGroup, _Mapping]]] = ...) -> None: ...

class LayerGroup(_message.Message):
    __slots__ = ("first_head", "num_heads", "head_bytes", "offset")
    FIRST_HEAD_FIELD_NUMBER: _ClassVar[int]
    NUM_HEADS_FIELD_NUMBER: _ClassVar[int]
    HEAD_BYTES_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    first_head: int
    num_heads: int
    head_bytes: int
    offset: int
    def __init__(self, first_head: _Optional[int] = ..., num_heads: _Optional[int] = ..., head_bytes: _Optional[int] = ..., offset: _Optional[int] = ...) -> None: ...

class Memory(_message.Message):
    __slots__ = ("address", "num_bytes", "device_id", "kind")
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    DEVICE_ID_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    address: int
    num_bytes: int
    device_id: int
    kind: str
    def __init__(self, address: _Optional[int] = ..., num_bytes: _Optional[int] = ..., device_id: _Optional[int] = ..., kind: _Optional[str] = ...) -> None: ...

class HoldRequest(_message.Message):
    __slots__ = ("caller_incarnation", "hashes")
    CALLER_INCARNATION_FIELD_NUMBER: _ClassVar[int]
    HASHES_FIELD_NUMBER: _ClassVar[int]
    caller_incarnation: str
    hashes: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, caller_incarnation: _Optional[str] = ..., hashes: _Optional[_Iterable[bytes]] = ...) -> None: ...

class HoldResponse(_message.Message):
    __slots__ = ("lease", "ttl_s", "block_ids", "generations")
    LEASE_FIELD_NUMBER: _ClassVar[int]
    TTL_S_FIELD_NUMBER: _ClassVar[int]
    BLOCK_IDS_FIELD_NUMBER: _ClassVar[int]
    GENERATIONS_FIELD_NUMBER: _ClassVar[int]
    lease: bytes
    ttl_s: float
    block_ids: _containers.RepeatedScalarFieldContainer[int]
    generations: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, lease: _Optional[bytes] = ..., ttl_s: _Optional[float] = ..., block_ids: _Optional[_Iterable[int]] = ..., generations: _Optional[_Iterable[int]] = ...) -> None: ...

class RenewRequest(_message.Message):
    __slots__ = ("caller_incarnation", "leases")
    CALLER_INCARNATION_FIELD_NUMBER: _ClassVar[int]
    LEASES_FIELD_NUMBER: _ClassVar[int]
    caller_incarnation: str
    leases: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, caller_incarnation: _Optional[str] = ..., leases: _Optional[_Iterable[bytes]] = ...) -> None: ...

class RenewResponse(_message.Message):
    __slots__ = ("unknown",)
    UNKNOWN_FIELD_NUMBER: _ClassVar[int]
    unknown: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, unknown: _Optional[_Iterable[bytes]] = ...) -> None: ...

class ReleaseRequest(_message.Message):
    __slots__ = ("caller_incarnation", "leases")
    CALLER_INCARNATION_FIELD_NUMBER: _ClassVar[int]
    LEASES_FIELD_NUMBER: _ClassVar[int]
    caller_incarnation: str
    leases: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, caller_incarnation: _Optional[str] = ..., leases: _Optional[_Iterable[bytes]] = ...) -> None: ...

class ReleaseResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
