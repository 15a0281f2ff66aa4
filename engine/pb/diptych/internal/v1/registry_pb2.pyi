from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Role(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ROLE_UNSPECIFIED: _ClassVar[Role]
    ROLE_PREFILL: _ClassVar[Role]
    ROLE_DECODE: _ClassVar[Role]

class Health(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    HEALTH_UNSPECIFIED: _ClassVar[Health]
    HEALTH_DEGRADED: _ClassVar[Health]
    HEALTH_SICK: _ClassVar[Health]
ROLE_UNSPECIFIED: Role
ROLE_PREFILL: Role
ROLE_DECODE: Role
HEALTH_UNSPECIFIED: Health
HEALTH_DEGRADED: Health
HEALTH_SICK: Health

class Stall(_message.Message):
    __slots__ = ("worker_id", "incarnation", "lag_s")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    LAG_S_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    incarnation: str
    lag_s: float
    def __init__(self, worker_id: _Optional[str] = ..., incarnation: _Optional[str] = ..., lag_s: _Optional[float] = ...) -> None: ...

class StallNoted(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class WorkerMessage(_message.Message):
    __slots__ = ("hello", "load")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    load: Load
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., load: _Optional[_Union[Load, _Mapping]] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("worker_id", "incarnation", "role", "address", "http_address", "model", "protocol_version", "kv_pool")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    HTTP_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    KV_POOL_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    incarnation: str
    role: Role
    address: str
    http_address: str
    model: ModelIdentity
    protocol_version: int
    kv_pool: KVPool
    def __init__(self, worker_id: _Optional[str] = ..., incarnation: _Optional[str] = ..., role: _Optional[_Union[Role, str]] = ..., address: _Optional[str] = ..., http_address: _Optional[str] = ..., model: _Optional[_Union[ModelIdentity, _Mapping]] = ..., protocol_version: _Optional[int] = ..., kv_pool: _Optional[_Union[KVPool, _Mapping]] = ...) -> None: ...

class KVPool(_message.Message):
    __slots__ = ("num_bytes", "limit")
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    num_bytes: int
    limit: str
    def __init__(self, num_bytes: _Optional[int] = ..., limit: _Optional[str] = ...) -> None: ...

class ModelIdentity(_message.Message):
    __slots__ = ("name", "digest", "numeric_profile", "max_model_len", "block_size", "vocab_size", "tokenizer_digest")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    NUMERIC_PROFILE_FIELD_NUMBER: _ClassVar[int]
    MAX_MODEL_LEN_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    TOKENIZER_DIGEST_FIELD_NUMBER: _ClassVar[int]
    name: str
    digest: str
    numeric_profile: str
    max_model_len: int
    block_size: int
    vocab_size: int
    tokenizer_digest: str
    def __init__(self, name: _Optional[str] = ..., digest: _Optional[str] = ..., numeric_profile: _Optional[str] = ..., max_model_len: _Optional[int] = ..., block_size: _Optional[int] = ..., vocab_size: _Optional[int] = ..., tokenizer_digest: _Optional[str] = ...) -> None: ...

class Load(_message.Message):
    __slots__ = ("num_running", "num_waiting", "waiting_tokens", "free_blocks", "cached_blocks", "held_blocks", "total_blocks", "draining", "totals", "links", "health", "quarantined_blocks", "role_budgets")
    NUM_RUNNING_FIELD_NUMBER: _ClassVar[int]
    NUM_WAITING_FIELD_NUMBER: _ClassVar[int]
    WAITING_TOKENS_FIELD_NUMBER: _ClassVar[int]
    FREE_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    CACHED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    HELD_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    TOTALS_FIELD_NUMBER: _ClassVar[int]
    LINKS_FIELD_NUMBER: _ClassVar[int]
    HEALTH_FIELD_NUMBER: _ClassVar[int]
    QUARANTINED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    ROLE_BUDGETS_FIELD_NUMBER: _ClassVar[int]
    num_running: int
    num_waiting: int
    waiting_tokens: int
    free_blocks: int
    cached_blocks: int
    held_blocks: int
    total_blocks: int
    draining: bool
    totals: Totals
    links: _containers.RepeatedCompositeFieldContainer[KVLink]
    health: Health
    quarantined_blocks: int
    role_budgets: RoleBudgets
    def __init__(self, num_running: _Optional[int] = ..., num_waiting: _Optional[int] = ..., waiting_tokens: _Optional[int] = ..., free_blocks: _Optional[int] = ..., cached_blocks: _Optional[int] = ..., held_blocks: _Optional[int] = ..., total_blocks: _Optional[int] = ..., draining: _Optional[bool] = ..., totals: _Optional[_Union[Totals, _Mapping]] = ..., links: _Optional[_Iterable[_Union[KVLink, _Mapping]]] = ..., health: _Optional[_Union[Health, str]] = ..., quarantined_blocks: _Optional[int] = ..., role_budgets: _Optional[_Union[RoleBudgets, _Mapping]] = ...) -> None: ...

class RoleBudgets(_message.Message):
    __slots__ = ("prompt_tokens", "answers")
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    ANSWERS_FIELD_NUMBER: _ClassVar[int]
    prompt_tokens: int
    answers: int
    def __init__(self, prompt_tokens: _Optional[int] = ..., answers: _Optional[int] = ...) -> None: ...

class KVLink(_message.Message):
    __slots__ = ("worker_id", "lane", "bytes_per_s", "num_bytes", "memory")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    LANE_FIELD_NUMBER: _ClassVar[int]
    BYTES_PER_S_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    MEMORY_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    lane: str
    bytes_per_s: float
    num_bytes: int
    memory: str
    def __init__(self, worker_id: _Optional[str] = ..., lane: _Optional[str] = ..., bytes_per_s: _Optional[float] = ..., num_bytes: _Optional[int] = ..., memory: _Optional[str] = ...) -> None: ...

class Totals(_message.Message):
    __slots__ = ("prompt_tokens_computed", "prompt_tokens_cached", "blocks_pulled", "bytes_pulled", "pull_seconds", "stale_reads", "draft_tokens", "accepted_tokens")
    PROMPT_TOKENS_COMPUTED_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_CACHED_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_PULLED_FIELD_NUMBER: _ClassVar[int]
    BYTES_PULLED_FIELD_NUMBER: _ClassVar[int]
    PULL_SECONDS_FIELD_NUMBER: _ClassVar[int]
    STALE_READS_FIELD_NUMBER: _ClassVar[int]
    DRAFT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    ACCEPTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    prompt_tokens_computed: int
    prompt_tokens_cached: int
    blocks_pulled: int
    bytes_pulled: int
    pull_seconds: float
    stale_reads: int
    draft_tokens: int
    accepted_tokens: int
    def __init__(self, prompt_tokens_computed: _Optional[int] = ..., prompt_tokens_cached: _Optional[int] = ..., blocks_pulled: _Optional[int] = ..., bytes_pulled: _Optional[int] = ..., pull_seconds: _Optional[float] = ..., stale_reads: _Optional[int] = ..., draft_tokens: _Optional[int] = ..., accepted_tokens: _Optional[int] = ...) -> None: ...

class CoordinatorMessage(_message.Message):
    __slots__ = ("welcome", "refused", "drain", "forget", "role_budgets")
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    DRAIN_FIELD_NUMBER: _ClassVar[int]
    FORGET_FIELD_NUMBER: _ClassVar[int]
    ROLE_BUDGETS_FIELD_NUMBER: _ClassVar[int]
    welcome: Welcome
    refused: Refused
    drain: Drain
    forget: Forget
    role_budgets: RoleBudgets
    def __init__(self, welcome: _Optional[_Union[Welcome, _Mapping]] = ..., refused: _Optional[_Union[Refused, _Mapping]] = ..., drain: _Optional[_Union[Drain, _Mapping]] = ..., forget: _Optional[_Union[Forget, _Mapping]] = ..., role_budgets: _Optional[_Union[RoleBudgets, _Mapping]] = ...) -> None: ...

class Drain(_message.Message):
    __slots__ = ("deadline_s",)
    DEADLINE_S_FIELD_NUMBER: _ClassVar[int]
    deadline_s: float
    def __init__(self, deadline_s: _Optional[float] = ...) -> None: ...

class Forget(_message.Message):
    __slots__ = ("incarnation",)
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    incarnation: str
    def __init__(self, incarnation: _Optional[str] = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ("coordinator_id", "heartbeat_s")
    COORDINATOR_ID_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_S_FIELD_NUMBER: _ClassVar[int]
    coordinator_id: str
    heartbeat_s: float
    def __init__(self, coordinator_id: _Optional[str] = ..., heartbeat_s: _Optional[float] = ...) -> None: ...

class Refused(_message.Message):
    __slots__ = ("reason",)
    REASON_FIELD_NUMBER: _ClassVar[int]
    reason: str
    def __init__(self, reason: _Optional[str] = ...) -> None: ...
