"""Options: flags > environment (DIPTYCH_...) > TOML file (--config) > defaults.

The only reader of the environment.

Each subject has its own small frozen dataclass, and a component is handed only those it needs. A
field `kv_cache_memory` is the flag `--kv-cache-memory`, the variable `DIPTYCH_KV_CACHE_MEMORY` and
the TOML key `kv_cache_memory` (dashes work too).
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import tomllib
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.base.errors import ConfigError

ENV_PREFIX = "DIPTYCH_"
MAX_CLIENT_S = 1e6  # gRPC's keepalive takes milliseconds in 32 bits
MAX_REQUEST_S = 1e9  # gRPC cannot carry a deadline of some centuries; this is three decades
# What --disable can switch off: parts of requests, then protocols (coordinator/api/switches.py).
DISABLABLE = (
    *("constraints", "echo", "logit-bias", "logprobs", "n", "priority", "prompt-logprobs"),
    *("resume", "tools", "engine-protocol", "oip", "openai", "reflection"),
)
_ORIGIN = re.compile(r"^[a-z][a-z0-9+.-]*://[^\s/,?#*]+$")
_HOST = re.compile(
    r"^(\*\.)?[A-Za-z0-9_-]([A-Za-z0-9_.-]*)$|^\[?[0-9a-fA-F]*:[0-9a-fA-F.:]*:[0-9a-fA-F.]*\]?$"
)
_SIZE = re.compile(r"^\s*([0-9.]+)\s*([kmgt]?)i?b?\s*$", re.IGNORECASE)


def parse_size(text: str | int) -> int:
    """Bytes from "2GiB", "512M" or a plain number (units are powers of 1024)."""
    match = _SIZE.match(str(text))
    try:
        if match:
            return int(float(match[1]) * 1024 ** "_kmgt".index(match[2].lower() or "_"))
    except (ValueError, OverflowError):  # 1..2GiB, or hundreds of digits
        pass
    raise ValueError("expected a size such as 2GiB or 512MiB")


def parse_address(text: str) -> str:
    """HOST:PORT, checked; port 0 means any free one."""
    host, sep, port = text.rpartition(":")
    if not sep or not host or not port.isdecimal() or int(port) > 65535:
        raise ValueError("expected HOST:PORT, for example 127.0.0.1:50051")
    return text


def parse_addresses(text: str) -> str:
    """HOST:PORT[,HOST:PORT...], each checked."""
    try:
        for address in text.split(","):
            parse_address(address.strip())
    except ValueError:
        raise ValueError("expected HOST:PORT[,HOST:PORT...]") from None
    return text


def parse_origins(text: str) -> str:
    """SCHEME://HOST[:PORT][,...] as browsers send them, "*" for all, or nothing."""
    origins = [origin.strip() for origin in text.split(",")]
    if text and origins != ["*"] and not all(_ORIGIN.match(origin) for origin in origins):
        raise ValueError("expected SCHEME://HOST[:PORT][,...] without a path, or *")
    return text


def parse_hosts(text: str) -> str:
    """NAME[,NAME...] without ports; "*.example.com" for all below one, "*" for all, or nothing."""
    names = [name.strip() for name in text.split(",")]
    if text and names != ["*"] and not all(_HOST.match(name) for name in names):
        raise ValueError("expected NAME[,NAME...] without ports, *.DOMAIN, or *")
    return text


def parse_disabled(text: str) -> str:
    """NAME[,NAME...] out of `DISABLABLE`, or nothing; in order, each once."""
    names = {name.strip() for name in text.split(",")} - {""}
    if unknown := sorted(names - set(DISABLABLE)):
        raise ValueError(f"{unknown[0]!r} is unknown; expected one of {', '.join(DISABLABLE)}")
    return ",".join(sorted(names))


def _parse_bool(text: str | bool) -> bool:
    if isinstance(text, bool):
        return text
    if text.lower() in ("1", "true", "yes", "on"):
        return True
    if text.lower() in ("0", "false", "no", "off"):
        return False
    raise ValueError("expected true or false")


def option(
    default: Any,
    help: str,
    *,
    choices: Sequence[str] = (),
    parse: Callable[[str], Any] | None = None,
    minimum: float | None = None,
    maximum: float | None = None,
    repeated: bool = False,
) -> Any:
    """A dataclass field that is also a flag.

    `repeated`: a list with commas; the flag may stand several times, and in a file be an array.
    """
    meta = {"help": help, "choices": tuple(choices), "parse": parse, "min": minimum, "max": maximum}
    return dataclasses.field(default=default, metadata={**meta, "repeated": repeated})


_ALLOWED_HOSTS = (
    "NAME[,NAME...] that clients may put into the Host header of HTTP requests, *.DOMAIN for all "
    "below one, *: any; besides localhost, loopback addresses and the host of --http; default on a "
    "loopback address: none, on others: any"
)


@dataclass(frozen=True, slots=True)
class ModelOptions:
    """Which model, and in which precision."""

    model: str = option(
        "smollm2",
        "hub id, folder in Hugging Face layout, or .gguf file; smollm2: the default model",
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
        0, "longest prompt plus answer, in tokens; 0: the model's own", minimum=0
    )
    draft_model: str = option(
        "",
        "model of the drafter `model`, of the same vocabulary; its KV lies in the same blocks, so "
        "all workers name the same one; first:N: the model's own first N layers",
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
        "size of the KV pool, such as 2GiB; 0: chosen from the memory there is",
        parse=parse_size,
        minimum=0,
    )
    gpu_memory_utilization: float = option(
        0.9,
        "share of a GPU's memory for a worker's weights, activations and KV pool; local workers on"
        " one GPU divide it",
        minimum=0.01,
        maximum=1,
    )
    memory_share: str = option(
        "", "BYTES:LIMIT: a local worker's part of the memory there is; set by the coordinator"
    )


@dataclass(frozen=True, slots=True)
class StepOptions:
    """The two budgets of a step, and what bounds a pool's queue."""

    max_batched_tokens: int = option(
        0, "prompt tokens a step; 0: 256 on a CPU, 8192 on a GPU", minimum=0
    )
    max_num_seqs: int = option(
        0, "answers written at once by one worker; 0: 64 on a CPU, 256 on a GPU", minimum=0
    )
    num_threads: int = option(
        0, "compute threads; 0: all cores (with torch, a local worker's equal share)", minimum=0
    )
    cores: str = option(
        "", "FILE:INDEX:COUNT: the page by which local workers share cores; set by the coordinator"
    )


@dataclass(frozen=True, slots=True)
class DraftOptions:
    """Speculative decoding; it changes when a token arrives, never which."""

    drafter: str = option("ngram", "who proposes draft tokens", choices=("none", "ngram", "model"))
    draft_tokens: int = option(
        16, "longest draft a step; less is verified where less pays", minimum=0, maximum=64
    )

    def check(self, model: ModelOptions) -> None:
        """Raise ConfigError where this contradicts `model`."""
        if self.drafter == "model" and not model.draft_model:
            raise ConfigError("--drafter model: needs --draft-model, a smaller model that drafts")
        if self.drafter == "ngram" and model.draft_model:
            raise ConfigError(
                f"--draft-model {model.draft_model}: is for --drafter model, not --drafter ngram"
            )


@dataclass(frozen=True, slots=True)
class TransferOptions:
    """KV blocks between workers."""

    lease_ttl_s: float = option(
        20.0, "a pin on announced blocks ends after this long without renewal", minimum=0.1
    )
    pull_timeout_s: float = option(
        30.0, "a read of blocks that takes longer has failed", minimum=0.1
    )
    quarantine_s: float = option(
        60.0, "a read that failed and goes on for this long restarts the data plane", minimum=0.1
    )
    quarantine_share: float = option(
        0.25,
        "reads that failed and go on restart it when they keep this share of the KV pool",
        minimum=0,
        maximum=1,
    )
    kv_checksums: bool = option(
        False, "compare a checksum of every block that comes from a prefill worker"
    )


@dataclass(frozen=True, slots=True)
class WorkerOptions:
    """Where a worker listens, and whom it serves."""

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
    worker_id: str = option("", "stable name of this place; default: role and a random part")
    drain_s: float = option(
        20.0, "when told to end: how long requests may take to finish here", minimum=0
    )


@dataclass(frozen=True, slots=True)
class TrustOptions:
    """Who belongs to this cluster."""

    cluster_token_file: str = option(
        "",
        "file with the secret that all coordinators and workers of a cluster share, 16 bytes or "
        "more; further lines are accepted too; needed beyond this machine",
    )


@dataclass(frozen=True, slots=True)
class LogOptions:
    """Log lines: readable on a terminal, JSON elsewhere; and what a crash leaves."""

    log_format: str = option("auto", "shape of log lines", choices=("auto", "console", "json"))
    log_level: str = option(
        "info", "least level that is written", choices=("debug", "info", "warning", "error")
    )
    core_dumps: bool = option(
        False, "let the system write core dumps: prompts, answers and the token, without KV pools"
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
        "how the model writes tool calls; auto: as its chat template tells",
        choices=("auto", "hermes", "llama3", "mistral", "mistral_args"),
    )
    parse_special: str = option(
        "prompts",
        "where special tokens that a request spells are read as such: raw prompts alone, "
        "the texts of conversations too (all), or nowhere (none)",
        choices=("prompts", "all", "none"),
    )
    disable: str = option(
        "",
        "NAME[,NAME...] of what is switched off, in all protocols: " + ", ".join(DISABLABLE),
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
        600.0, "deadline of a request that brings none", minimum=0.1, maximum=MAX_REQUEST_S
    )
    client_timeout_s: float = option(
        30.0,
        "how long a client may keep the ports waiting: with its request, without reading its "
        "answer, without a sign of life",
        minimum=1,
        maximum=MAX_CLIENT_S,
    )
    http_keepalive_s: float = option(
        60.0,
        "how long an HTTP connection may rest between two requests; longer than that of a proxy "
        "before it",
        minimum=1,
        maximum=MAX_CLIENT_S,
    )
    sse_keepalive_s: float = option(
        0.0,
        "a comment line on a stream of events that was silent for so long, in the queue and before "
        "the first token too: then the status is sent, and a later failure is an event; 0: none",
        minimum=0,
        maximum=MAX_CLIENT_S,
    )
    cors_origins: str = option(
        "",
        "ORIGIN[,ORIGIN...] of pages that browsers may let call the API, such as "
        "https://chat.example.com; *: all; default: none",
        parse=parse_origins,
    )
    worker_wait_s: float = option(
        20.0, "how long a request waits for a worker to appear", minimum=0
    )
    max_queued_requests: int = option(
        256, "admitted requests at once; more are told to retry", minimum=1
    )
    max_queued_tokens: int = option(1_000_000, "their prompt tokens at once", minimum=1)
    max_request_bytes_in_flight: int = option(
        0,
        "bytes of requests that are received at once, over all connections, and of large ones that "
        "are served, a half each for gRPC messages and HTTP bodies; 0: an eighth of the memory at "
        "hand, from 128 MiB to 2 GiB",
        parse=parse_size,
        minimum=0,
    )
    drain_s: float = option(
        25.0, "when told to end: how long requests may take to finish", minimum=0
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
        "a local worker that has registered and then was silent for so long is killed and started "
        "again; 0: never",
        minimum=0,
        maximum=MAX_CLIENT_S,
    )
    worker_start_s: float = option(
        1800.0,
        "the same for a local worker that has not registered so long after its start: it loads, "
        "converts and compiles in this time; 0: never",
        minimum=0,
        maximum=MAX_CLIENT_S,
    )


def _base_type(annotation: Any) -> type:
    """The plain type of a field's annotation (`int | None` is int)."""
    if isinstance(annotation, types.UnionType):
        annotation = next(a for a in typing.get_args(annotation) if a is not type(None))
    return typing.cast(type, annotation)


def _parse(field: dataclasses.Field[Any], base: type, raw: Any, where: str) -> Any:
    """One value from any source, checked; errors name the source."""
    meta = field.metadata
    if meta.get("repeated") and isinstance(raw, list) and all(isinstance(r, str) for r in raw):
        raw = ",".join(raw)
    try:
        if base is bool:
            value = _parse_bool(raw)
        elif not isinstance(raw, str) and not _is_number(raw, base):  # only a TOML file has types
            raise ValueError(f"expected {base.__name__}")
        elif meta.get("parse"):
            value = meta["parse"](raw)
        else:
            value = base(raw)
    except (TypeError, ValueError) as error:
        reason = str(error) if "expected" in str(error) else f"expected {base.__name__}"
        raise ConfigError(f"{where}: {reason}, got {raw!r}") from None
    if meta.get("choices") and value not in meta["choices"]:
        raise ConfigError(f"{where}: expected one of {', '.join(meta['choices'])}, got {raw!r}")
    low, high = meta.get("min"), meta.get("max")
    if low is not None and not value >= low:
        raise ConfigError(f"{where}: expected at least {low:g}, got {raw!r}")
    if high is not None and not value <= high:
        raise ConfigError(f"{where}: expected at most {high:g}, got {raw!r}")
    return value


def _is_number(raw: Any, base: type) -> bool:
    """Whether a value that is no text can stand for a number of type `base` without loss."""
    if isinstance(raw, bool) or base not in (int, float):
        return False
    return isinstance(raw, int) or (base is float and isinstance(raw, float))


def _read_toml(path: str) -> dict[str, Any]:
    try:
        data = tomllib.loads(Path(path).read_text())
    except OSError as error:
        raise ConfigError(f"--config {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path}: {error}") from None
    return {key.replace("-", "_"): value for key, value in data.items()}


class _Parser(argparse.ArgumentParser):
    """Reports bad usage as a ConfigError, so that every command ends the same way."""

    def error(self, message: str) -> typing.NoReturn:
        raise ConfigError(message)


def add_flags(parser: argparse.ArgumentParser, *groups: type) -> None:
    """Give `parser` one flag a field, grouped by dataclass, with defaults shown in --help."""
    parser.add_argument("--config", metavar="FILE", help="TOML file with any of these options")
    for cls in groups:
        section = parser.add_argument_group((cls.__doc__ or "").strip().rstrip("."))
        for field in dataclasses.fields(cls):
            meta = field.metadata
            text = meta["help"] + (f" ({', '.join(meta['choices'])})" if meta["choices"] else "")
            if field.default not in ("", None):
                text += f" [{field.default}]"
            flag = "--" + field.name.replace("_", "-")
            switch: dict[str, Any] = {"action": "append"} if meta.get("repeated") else {}
            if isinstance(field.default, bool):  # a bare flag switches on
                switch = {"nargs": "?", "const": "true"}
            section.add_argument(
                flag, dest=field.name, metavar="X", help=text.replace("%", "%%"), **switch
            )


def resolve(
    args: argparse.Namespace, *groups: type[Any], environ: Mapping[str, str] | None = None
) -> tuple[Any, ...]:
    """One instance of each group from flags, environment, file and defaults. Raises ConfigError."""
    environ = os.environ if environ is None else environ
    path = args.config or environ.get(ENV_PREFIX + "CONFIG")
    file = _read_toml(path) if path else {}
    known = {field.name for cls in groups for field in dataclasses.fields(cls)}
    for key in file:
        if key not in known:
            raise ConfigError(f"--config {path}: unknown option {key!r}")
    out = []
    for cls in groups:
        hints = typing.get_type_hints(cls)
        values = {}
        for field in dataclasses.fields(cls):
            flag, env = "--" + field.name.replace("_", "-"), ENV_PREFIX + field.name.upper()
            base = _base_type(hints[field.name])
            if getattr(args, field.name, None) is not None:
                values[field.name] = _parse(field, base, getattr(args, field.name), flag)
            elif env in environ:
                values[field.name] = _parse(field, base, environ[env], env)
            elif field.name in file:
                values[field.name] = _parse(field, base, file[field.name], f"{path}: {field.name}")
        out.append(cls(**values))
    return tuple(out)


def parser(prog: str, description: str) -> argparse.ArgumentParser:
    """An argument parser that raises ConfigError instead of exiting on bad usage."""
    return _Parser(prog=prog, description=description)


def to_flags(*options: Any) -> list[str]:
    """The command line that gives a child process these options; defaults are left out."""
    flags: list[str] = []
    for group in options:
        for field in dataclasses.fields(group):
            value = getattr(group, field.name)
            if value != field.default:
                # With "=", for a value may begin with a dash.
                flags.append(f"--{field.name.replace('_', '-')}={value}")
    return flags


def cache_dir() -> Path:
    """Where converted models are kept: $DIPTYCH_CACHE_DIR, else the user's cache folder."""
    if base := os.environ.get(ENV_PREFIX + "CACHE_DIR"):
        return Path(base)
    return Path(os.environ.get("XDG_CACHE_HOME") or _home("CACHE_DIR") / ".cache") / "diptych"


def state_dir() -> Path:
    """Where logs are kept: $DIPTYCH_STATE_DIR, else the user's state folder."""
    if base := os.environ.get(ENV_PREFIX + "STATE_DIR"):
        return Path(base)
    where = os.environ.get("XDG_STATE_HOME") or _home("STATE_DIR") / ".local" / "state"
    return Path(where) / "diptych"


def _home(instead: str) -> Path:
    """The user's home folder; ConfigError where the system knows none (a container's user)."""
    try:
        return Path.home()
    except RuntimeError:
        raise ConfigError(
            f"this user has no home folder: set HOME or {ENV_PREFIX}{instead}"
        ) from None


def set_default_env(defaults: Mapping[str, str]) -> dict[str, str]:
    """Set variables of libraries (OMP_*, UCX_*) where the user set none; returns those in force."""
    for key, value in defaults.items():
        os.environ.setdefault(key, value)
    return {key: os.environ[key] for key in defaults}


def environment_with(**changes: str) -> dict[str, str]:
    """Our variables with some of them changed, for a tool that runs as a child."""
    return {**os.environ, **changes}


def extend_path(folder: str) -> None:
    """Have the programs in `folder` found too, after those that are in PATH."""
    found = os.environ.get("PATH", os.defpath)
    if folder not in found.split(os.pathsep):
        os.environ["PATH"] = f"{found}{os.pathsep}{folder}"


def unset_env(name: str) -> None:
    """Remove a variable that was meant for a library of this process, not for its children."""
    os.environ.pop(name, None)


def visible_devices() -> str | None:
    """CUDA_VISIBLE_DEVICES: the GPUs that the user lets us use; None: all."""
    return os.environ.get("CUDA_VISIBLE_DEVICES")


def child_environment() -> dict[str, str]:
    """Ours without the variables of options, for a process that gets its options as flags."""
    kept = (ENV_PREFIX + "CACHE_DIR", ENV_PREFIX + "STATE_DIR")
    return {k: v for k, v in os.environ.items() if not k.startswith(ENV_PREFIX) or k in kept}
