"""The options of all commands: one frozen dataclass a subject, one field an option.

A component gets only the groups that it needs.
"""

from __future__ import annotations

from dataclasses import dataclass

from engine.base.errors import ConfigError
from engine.base.option_values import (
    DISABLABLE,
    MAX_CLIENT_S,
    MAX_REQUEST_S,
    REASONING_PARSERS,
    TOOL_FORMATS,
    option,
    parse_address,
    parse_addresses,
    parse_disabled,
    parse_form,
    parse_hosts,
    parse_origins,
    parse_size,
)

_ALLOWED_HOSTS = (
    "NAME[,NAME...] allowed in the Host header of HTTP requests, *.DOMAIN for its subdomains, "
    "*: any; besides localhost, loopback addresses and the host of --http; default on a loopback "
    "address: none, on others: any"
)


@dataclass(frozen=True, slots=True)
class ModelOptions:
    """The model and its precision."""

    model: str = option(
        "smollm2",
        "hub id (owner/name, or owner/name:Q4_K_M for a GGUF file of it), folder in Hugging Face "
        "layout, GGUF file, or a name: smollm2, gemma3-270m",
    )
    model_name: str = option("", "name that clients use; default: the last part of --model")
    dtype: str = option(
        "auto",
        "precision of weights, activations and KV cache; float32 is the exact mode",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    weights: str = option(
        "auto", "packing of the weights in memory", choices=("auto", "bf16", "int8", "int4")
    )
    max_model_len: int = option(
        0, "maximum length of prompt plus output, in tokens; 0: the model's", minimum=0
    )
    draft_model: str = option(
        "",
        "model of the drafter `model`, with the same vocabulary; its KV lies in the same blocks, "
        "so all workers need the same one; first:N: the first N layers of --model",
    )
    device: str = option("auto", "where the model runs", choices=("auto", "cpu", "cuda"))
    seed_weights: int = option(
        -1, "for tests: random weights from this seed instead of the checkpoint's; -1: off"
    )


@dataclass(frozen=True, slots=True)
class CacheOptions:
    """The KV pool."""

    block_size: int = option(16, "tokens a KV block", minimum=1, maximum=256)
    kv_cache_memory: int = option(
        0,
        "size of the KV pool, such as 2GiB; 0: chosen from the available memory",
        parse=parse_size,
        minimum=0,
    )
    gpu_memory_utilization: float = option(
        0.9,
        "share of a GPU's memory for a worker's weights, activations and KV pool; local workers on "
        "one GPU divide it",
        minimum=0.01,
        maximum=1,
    )
    memory_share: str = option(
        "", "BYTES:LIMIT: a local worker's share of the host memory; set by the coordinator"
    )


@dataclass(frozen=True, slots=True)
class StepOptions:
    """The budgets of a step, and its threads."""

    max_batched_tokens: int = option(
        0, "prompt tokens a step; 0: 256 on a CPU, 8192 on a GPU", minimum=0
    )
    max_num_seqs: int = option(
        0, "concurrent outputs of one worker; 0: 64 on a CPU, 256 on a GPU", minimum=0
    )
    num_threads: int = option(
        0, "compute threads; 0: all cores (with torch, a local worker's equal share)", minimum=0
    )
    cores: str = option(
        "", "FILE:INDEX:COUNT: shared page for dividing cores; set by the coordinator"
    )


@dataclass(frozen=True, slots=True)
class DraftOptions:
    """Speculative decoding; it changes when a token arrives, never which."""

    drafter: str = option("ngram", "source of draft tokens", choices=("none", "ngram", "model"))
    draft_tokens: int = option(
        16, "maximum length of a draft; shorter ones are used where they pay", minimum=0, maximum=64
    )

    def check(self, model: ModelOptions) -> None:
        """Raise ConfigError if this contradicts `model`."""
        if self.drafter == "model" and not model.draft_model:
            raise ConfigError("--drafter model: needs --draft-model, a smaller model that drafts")
        if self.drafter == "ngram" and model.draft_model:
            raise ConfigError(
                f"--draft-model {model.draft_model}: is for --drafter model, not --drafter ngram"
            )


@dataclass(frozen=True, slots=True)
class TransferOptions:
    """Transfer of KV blocks between workers."""

    lease_ttl_s: float = option(
        20.0, "a lease on published blocks expires after this long without renewal", minimum=0.1
    )
    pull_timeout_s: float = option(
        30.0, "a read of blocks that takes longer has failed", minimum=0.1
    )
    quarantine_s: float = option(
        60.0,
        "a failed read that is still in progress after so long restarts the data plane",
        minimum=0.1,
    )
    quarantine_share: float = option(
        0.25,
        "the data plane restarts when failed reads in progress hold this share of the KV pool",
        minimum=0,
        maximum=1,
    )
    kv_checksums: bool = option(
        False, "compare a checksum of every block that comes from a prefill worker"
    )


@dataclass(frozen=True, slots=True)
class WorkerOptions:
    """A worker's ports and coordinators."""

    listen: str = option(
        "127.0.0.1:0", "HOST:PORT of the worker's gRPC services", parse=parse_address
    )
    http: str = option("127.0.0.1:0", "HOST:PORT of /metrics and /health", parse=parse_address)
    allowed_hosts: str = option("", _ALLOWED_HOSTS, parse=parse_hosts)
    advertise: str = option(
        "", "HOST by which peers reach this worker; default: the host of --listen"
    )
    coordinator: str = option(
        "127.0.0.1:50051", "HOST:PORT[,HOST:PORT...] of all coordinators", parse=parse_addresses
    )
    worker_id: str = option("", "stable id of this worker; default: role and a random part")
    drain_s: float = option(
        20.0, "at shutdown: how long running requests may take to finish", minimum=0
    )


@dataclass(frozen=True, slots=True)
class AuthOptions:
    """Authentication between the processes of a cluster."""

    cluster_token_file: str = option(
        "",
        "file with the secret that all coordinators and workers of a cluster share, at least 16 "
        "bytes; secrets on further lines are accepted too; required beyond this machine",
    )


@dataclass(frozen=True, slots=True)
class LogOptions:
    """Log lines and core dumps."""

    log_format: str = option(
        "auto",
        "format of log lines; auto: console on a terminal, else json",
        choices=("auto", "console", "json"),
    )
    log_level: str = option(
        "info", "lowest level that is written", choices=("debug", "info", "warning", "error")
    )
    core_dumps: bool = option(
        False, "allow core dumps: they contain prompts, outputs and the token, but no KV pools"
    )


@dataclass(frozen=True, slots=True)
class FrontOptions:
    """The public side of a coordinator."""

    listen: str = option("127.0.0.1:50051", "HOST:PORT of the gRPC API", parse=parse_address)
    http: str = option(
        "127.0.0.1:8000", "HOST:PORT of the OpenAI API, /metrics and /health", parse=parse_address
    )
    allowed_hosts: str = option("", _ALLOWED_HOSTS, parse=parse_hosts)
    internal_listen: str = option("", "HOST:PORT for workers alone; default: they use --listen")
    tool_format: str = option(
        "auto",
        "how the model writes tool calls; auto: detected from its chat template; none: not at all",
        choices=("auto", "none", *TOOL_FORMATS),
        parse=parse_form,
    )
    reasoning_parser: str = option(
        "auto",
        "how the model marks its reasoning; auto: as its chat template does; none: all is content",
        choices=("auto", "none", *REASONING_PARSERS),
        parse=parse_form,
    )
    generation_config: str = option(
        "model",
        "sampling of silent requests: of the model's generation_config.json, or of the protocol",
        choices=("model", "diptych"),
    )
    parse_special: str = option(
        "prompts",
        "where text like <|im_end|> is read as a special token: in raw prompts only, in texts of "
        "conversations too (all), or nowhere (none)",
        choices=("prompts", "all", "none"),
    )
    disable: str = option(
        "",
        "NAME[,NAME...] of features to switch off, in all protocols: " + ", ".join(DISABLABLE),
        parse=parse_disabled,
        repeated=True,
    )
    routing: str = option(
        "least_loaded",
        "how workers are chosen; least_loaded: the one with the fewest prompt tokens waiting, or "
        "one that has the request's blocks",
        choices=("least_loaded",),
    )
    max_request_s: float = option(
        600.0, "deadline of a request without one", minimum=0.1, maximum=MAX_REQUEST_S
    )
    client_timeout_s: float = option(
        30.0,
        "how long a client may take to send its request, to read its output, or to answer a "
        "keepalive ping",
        minimum=1,
        maximum=MAX_CLIENT_S,
    )
    http_keepalive_s: float = option(
        60.0,
        "how long an HTTP connection may be idle between two requests; set it longer than the idle "
        "timeout of a proxy before it",
        minimum=1,
        maximum=MAX_CLIENT_S,
    )
    sse_keepalive_s: float = option(
        0.0,
        "send a comment line on an event stream that was silent for so long, also before the first "
        "token: then the status is sent, and a later failure is an event; 0: never",
        minimum=0,
        maximum=MAX_CLIENT_S,
    )
    cors_origins: str = option(
        "",
        "ORIGIN[,ORIGIN...] of web pages that may call the API, such as https://chat.example.com; "
        "*: all; default: none",
        parse=parse_origins,
    )
    worker_wait_s: float = option(
        20.0, "how long a request waits for a worker to appear", minimum=0
    )
    worker_penalty_s: float = option(
        5.0, "how long other workers are preferred to one that failed a request", minimum=0
    )
    max_queued_requests: int = option(
        256, "concurrent admitted requests; further ones are refused with a retry time", minimum=1
    )
    max_queued_tokens: int = option(1_000_000, "prompt tokens of admitted requests", minimum=1)
    max_request_bytes_in_flight: int = option(
        0,
        "bytes of requests that are being received, over all connections, and of large ones that "
        "are being served; half each for gRPC messages and HTTP bodies; 0: an eighth of the "
        "available memory, from 128 MiB to 2 GiB",
        parse=parse_size,
        minimum=0,
    )
    drain_s: float = option(
        25.0, "at shutdown: how long running requests may take to finish", minimum=0
    )


@dataclass(frozen=True, slots=True)
class FleetOptions:
    """Workers that a coordinator starts and supervises on its own machine."""

    workers: str = option(
        "local", "local: start them here; external: they dial in", choices=("local", "external")
    )
    prefill_workers: int = option(1, "prefill workers to start here", minimum=0)
    decode_workers: int = option(1, "decode workers to start here", minimum=0)
    log_dir: str = option(
        "", "folder for the local workers' logs; default: under the user's state folder"
    )
    worker_hang_s: float = option(
        30.0,
        "restart a registered local worker that has been silent for so long; 0: never",
        minimum=0,
        maximum=MAX_CLIENT_S,
    )
    worker_start_s: float = option(
        1800.0,
        "restart a local worker that has not registered so long after its start, while it loads, "
        "converts and compiles; 0: never",
        minimum=0,
        maximum=MAX_CLIENT_S,
    )


@dataclass(frozen=True, slots=True)
class StartOptions:
    """All options of `coordinator start`."""

    model: ModelOptions
    front: FrontOptions
    fleet: FleetOptions
    cache: CacheOptions
    step: StepOptions
    draft: DraftOptions
    transfer: TransferOptions
    log: LogOptions
    auth: AuthOptions = AuthOptions()
    gpus: tuple[str, ...] = ()  # for local workers; found, not given


# In the order of --help, and of the fields of StartOptions.
START_GROUPS = (
    *(ModelOptions, FrontOptions, FleetOptions, CacheOptions, StepOptions, DraftOptions),
    *(TransferOptions, LogOptions, AuthOptions),
)
WORKER_GROUPS = (  # a decode worker has DraftOptions, too
    *(ModelOptions, CacheOptions, StepOptions, TransferOptions, WorkerOptions, AuthOptions),
    LogOptions,
)
