"""From options to an engine: checkpoint, identity, pool size, model, scheduler.

The pool is sized before the model is built, so that a length that cannot fit is refused at once.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

import torch
from prometheus_client import CollectorRegistry

from engine.attention import select_backend
from engine.cache.block_pool import BlockPool
from engine.cache.kv_cache import KVCache
from engine.cache.layout import KVLayout, compatibility_digest
from engine.checkpoint.config import ModelConfig
from engine.checkpoint.fingerprint import tokenizer_digest
from engine.checkpoint.source import Checkpoint, resolve, weights
from engine.config import CacheOptions, ModelOptions, StepOptions
from engine.core import EngineCore
from engine.errors import ConfigError
from engine.model.llama import LlamaModel
from engine.model.loader import load_model, random_model
from engine.model.packed import add_packed
from engine.precision import auto_dtype
from engine.runner.runner import Runner
from engine.sampling import Sampler
from engine.scheduler import Budgets, Scheduler
from engine.speculation import Speculation
from engine.telemetry.log import get_logger
from engine.telemetry.metrics import WorkerMetrics
from engine.types import ModelIdentity, Role

_log = get_logger(__name__)
_GIB = 1024**3
_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
# Prompt tokens a step: a prefill worker wants whole matrix products, a decode worker short steps.
_PROMPT_TOKENS = {Role.PREFILL: 512, Role.DECODE: 256}


@dataclass(frozen=True, slots=True)
class Engine:
    """A core with what its owner needs around it."""

    core: EngineCore
    kv_cache: KVCache
    layout: KVLayout
    identity: ModelIdentity
    metrics: WorkerMetrics


def pick_device(options: ModelOptions) -> torch.device:
    """The device asked for; `auto` is the GPU if there is one. Raises ConfigError."""
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: this machine has no CUDA device; expected auto or cpu")
    use_gpu = options.device != "cpu" and torch.cuda.is_available()
    return torch.device("cuda:0" if use_gpu else "cpu")


def pick_dtype(options: ModelOptions, device: torch.device) -> str:
    """The precision asked for; `auto` is bfloat16 where the hardware multiplies it."""
    if options.weights in ("int8", "int4"):
        raise ConfigError(f"--weights {options.weights}: not available yet; expected auto or bf16")
    if options.weights == "bf16" and options.dtype == "float32":
        raise ConfigError("--weights bf16 contradicts --dtype float32; expected --weights auto")
    if options.dtype != "auto":
        return options.dtype
    return auto_dtype(on_gpu=device.type == "cuda")


def build_engine(
    role: Role,
    model: ModelOptions,
    cache: CacheOptions,
    step: StepOptions,
    registry: CollectorRegistry,
    speculation: Speculation | None = None,
) -> Engine:
    """Load everything. Raises ConfigError, CheckpointError."""
    if step.num_threads:  # else OMP_NUM_THREADS, else all cores
        torch.set_num_threads(step.num_threads)
    device = pick_device(model)
    dtype = pick_dtype(model, device)
    checkpoint = resolve(model.model, weights=model.seed_weights < 0)
    layout = KVLayout(
        num_layers=checkpoint.config.num_layers,
        num_kv_heads=checkpoint.config.num_kv_heads,
        head_dim=checkpoint.config.head_dim,
        block_size=cache.block_size,
        dtype=dtype,
    )
    target = _load(role, checkpoint, model, dtype, device)
    window = speculation.max_draft_tokens if speculation else 0
    num_blocks, max_model_len = _size_pool(checkpoint.config, model, cache, layout, device, window)
    identity = _identity(checkpoint, model, layout, dtype, max_model_len)
    pool = BlockPool(num_blocks)
    kv_cache = KVCache(layout, num_blocks, device)
    budgets = Budgets(step.max_batched_tokens or _PROMPT_TOKENS[role], step.max_num_seqs)
    scheduler = Scheduler(pool, layout.block_size, budgets, speculation, max_model_len)
    metrics = WorkerMetrics(registry, identity.name)
    config = checkpoint.config
    backend = select_backend(layout, config.num_heads, config.sliding_window, device)
    core = EngineCore(
        scheduler,
        Runner(target, kv_cache, backend),
        Sampler(config.vocab_size, device),
        metrics,
        time.monotonic,
    )
    _log.info(
        "engine built",
        model=identity.name,
        profile=identity.numeric_profile,
        device=str(device),
        num_blocks=num_blocks,
        block_bytes=layout.block_bytes,
        max_model_len=max_model_len,
        threads=torch.get_num_threads(),
    )
    return Engine(core, kv_cache, layout, identity, metrics)


def _load(
    role: Role, checkpoint: Checkpoint, options: ModelOptions, dtype: str, device: torch.device
) -> LlamaModel:
    if options.seed_weights >= 0:
        return random_model(checkpoint.config, options.seed_weights, _DTYPES[dtype], device)
    paths = weights(checkpoint, dtype)
    model = load_model(checkpoint.config, paths, _DTYPES[dtype], device)
    # Few rows want packed weights, many want dense ones: a decode worker meets both.
    wants_packed = role is Role.DECODE and options.weights == "auto"
    return add_packed(model, checkpoint) if wants_packed else model


def _size_pool(
    config: ModelConfig,
    model: ModelOptions,
    cache: CacheOptions,
    layout: KVLayout,
    device: torch.device,
    draft_window: int,
) -> tuple[int, int]:
    """(num_blocks, max_model_len): one request of full length always fits."""
    limit = config.max_position_embeddings
    if model.max_model_len > limit:
        raise ConfigError(f"--max-model-len {model.max_model_len}: the model's context is {limit}")
    num_bytes = cache.kv_cache_memory or _default_pool_bytes(device)
    num_blocks = num_bytes // layout.block_bytes
    fits = num_blocks * layout.block_size - draft_window
    wanted = model.max_model_len or limit
    least = model.max_model_len or 2 * layout.block_size
    if fits < least:
        needed = layout.num_blocks(least + draft_window) * layout.block_bytes
        raise ConfigError(
            f"--kv-cache-memory {num_bytes}: one request of {least} tokens needs {needed} bytes"
        )
    if fits < wanted:
        _log.warning("max_model_len reduced to what the KV pool holds", max_model_len=fits)
    return num_blocks, min(wanted, fits)


def _default_pool_bytes(device: torch.device) -> int:
    """Most of a GPU's free memory; on a CPU a modest share of what is available."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] * 0.85)
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return int(min(_GIB, available // 8))


def _identity(
    checkpoint: Checkpoint, options: ModelOptions, layout: KVLayout, dtype: str, max_model_len: int
) -> ModelIdentity:
    source = checkpoint.fingerprint
    if options.seed_weights >= 0:
        source = f"random-{options.seed_weights}-{source}"
    profile = f"{source} weights={dtype} activations={dtype} kv={dtype}"
    config = checkpoint.config
    digest = compatibility_digest(
        numeric_profile=profile,
        tokenizer_digest=tokenizer_digest(checkpoint.folder),
        layout=layout,
        rope=f"{config.rope_theta} {config.rope_scaling}",
    )
    return ModelIdentity(
        name=options.model_name or checkpoint.name,
        digest=digest,
        numeric_profile=profile,
        max_model_len=max_model_len,
        block_size=layout.block_size,
        vocab_size=config.vocab_size,
    )
