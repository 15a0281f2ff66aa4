from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ListWorkersRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListWorkersResponse(_message.Message):
    __slots__ = ("workers",)
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    workers: _containers.RepeatedCompositeFieldContainer[Worker]
    def __init__(self, workers: _Optional[_Iterable[_Union[Worker, _Mapping]]] = ...) -> None: ...

class Worker(_message.Message):
    __slots__ = ("worker_id", "incarnation", "role", "state", "address", "http_address", "model", "uptime_s", "num_running", "num_waiting", "free_blocks", "cached_blocks", "held_blocks", "total_blocks", "prompt_tokens_computed", "prompt_tokens_cached", "blocks_pulled", "bytes_pulled", "pull_seconds", "stale_reads", "draft_tokens", "accepted_tokens", "quarantined_blocks", "links", "max_model_len", "kv_pool_bytes", "health", "kv_pool_limit", "budget_prompt_tokens", "budget_answers")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    HTTP_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    UPTIME_S_FIELD_NUMBER: _ClassVar[int]
    NUM_RUNNING_FIELD_NUMBER: _ClassVar[int]
    NUM_WAITING_FIELD_NUMBER: _ClassVar[int]
    FREE_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    CACHED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    HELD_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_COMPUTED_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_CACHED_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_PULLED_FIELD_NUMBER: _ClassVar[int]
    BYTES_PULLED_FIELD_NUMBER: _ClassVar[int]
    PULL_SECONDS_FIELD_NUMBER: _ClassVar[int]
    STALE_READS_FIELD_NUMBER: _ClassVar[int]
    DRAFT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    ACCEPTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    QUARANTINED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    LINKS_FIELD_NUMBER: _ClassVar[int]
    MAX_MODEL_LEN_FIELD_NUMBER: _ClassVar[int]
    KV_POOL_BYTES_FIELD_NUMBER: _ClassVar[int]
    HEALTH_FIELD_NUMBER: _ClassVar[int]
    KV_POOL_LIMIT_FIELD_NUMBER: _ClassVar[int]
    BUDGET_PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    BUDGET_ANSWERS_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    incarnation: str
    role: str
    state: str
    address: str
    http_address: str
    model: str
    uptime_s: float
    num_running: int
    num_waiting: int
    free_blocks: int
    cached_blocks: int
    held_blocks: int
    total_blocks: int
    prompt_tokens_computed: int
    prompt_tokens_cached: int
    blocks_pulled: int
    bytes_pulled: int
    pull_seconds: float
    stale_reads: int
    draft_tokens: int
    accepted_tokens: int
    quarantined_blocks: int
    links: _containers.RepeatedCompositeFieldContainer[KVLink]
    max_model_len: int
    kv_pool_bytes: int
    health: str
    kv_pool_limit: str
    budget_prompt_tokens: int
    budget_answers: int
    def __init__(self, worker_id: _Optional[str] = ..., incarnation: _Optional[str] = ..., role: _Optional[str] = ..., state: _Optional[str] = ..., address: _Optional[str] = ..., http_address: _Optional[str] = ..., model: _Optional[str] = ..., uptime_s: _Optional[float] = ..., num_running: _Optional[int] = ..., num_waiting: _Optional[int] = ..., free_blocks: _Optional[int] = ..., cached_blocks: _Optional[int] = ..., held_blocks: _Optional[int] = ..., total_blocks: _Optional[int] = ..., prompt_tokens_computed: _Optional[int] = ..., prompt_tokens_cached: _Optional[int] = ..., blocks_pulled: _Optional[int] = ..., bytes_pulled: _Optional[int] = ..., pull_seconds: _Optional[float] = ..., stale_reads: _Optional[int] = ..., draft_tokens: _Optional[int] = ..., accepted_tokens: _Optional[int] = ..., quarantined_blocks: _Optional[int] = ..., links: _Optional[_Iterable[_Union[KVLink, _Mapping]]] = ..., max_model_len: _Optional[int] = ..., kv_pool_bytes: _Optional[int] = ..., health: _Optional[str] = ..., kv_pool_limit: _Optional[str] = ..., budget_prompt_tokens: _Optional[int] = ..., budget_answers: _Optional[int] = ...) -> None: ...

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

class DrainWorkerRequest(_message.Message):
    __slots__ = ("worker_id", "deadline_s")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_S_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    deadline_s: float
    def __init__(self, worker_id: _Optional[str] = ..., deadline_s: _Optional[float] = ...) -> None: ...

class DrainWorkerResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
