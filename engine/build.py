"""From options to an engine: checkpoint, identity, pool size, model, scheduler.

The pool is sized before the model is built, so that a length that cannot fit is refused at once.
"""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass

import torch
from prometheus_client import CollectorRegistry

from engine.attention import select_backend
from engine.cache.block_pool import BlockPool
from engine.cache.kv_cache import KVCache
from engine.cache.layout import KVLayout, compatibility_digest
from engine.cache.sizing import PoolBudget, PoolSize, fit_pool, host_budget
from engine.checkpoint.config import ModelConfig
from engine.checkpoint.fingerprint import tokenizer_digest
from engine.checkpoint.packed import packed_file, read_packed
from engine.checkpoint.source import Checkpoint, resolve, weights
from engine.config import CacheOptions, ModelOptions, StepOptions
from engine.constraints import Vocabulary
from engine.core import EngineCore
from engine.errors import ConfigError
from engine.memory import HostMemory, host_memory, shown
from engine.model.llama import LlamaModel
from engine.model.loader import load_model, random_model
from engine.model.native import NativeModel
from engine.native import Kernels
from engine.native.threads import Seat, Threads, usable_cores
from engine.placement import check_length, first_layers, packing, pick_kernels, resolve_draft
from engine.precision import auto_dtype
from engine.runner.base import ModelRunner
from engine.runner.runner import NativeRunner, Runner
from engine.sampling import Sampler
from engine.scheduler import Budgets, Scheduler
from engine.speculation import Drafting
from engine.telemetry.log import get_logger
from engine.telemetry.metrics import WorkerMetrics
from engine.types import NO_KV_POOL, KVPool, ModelIdentity, Role

_log = get_logger(__name__)
_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
# Prompt tokens a step: a prefill worker wants whole matrix products, a decode worker short steps.
# On a CPU products are whole at 256 already, and who comes next waits half as long.
_PROMPT_TOKENS = {Role.PREFILL: 512, Role.DECODE: 256}
_PROMPT_TOKENS_CPU = 256


@dataclass(frozen=True, slots=True)
class Engine:
    """A core with what its owner needs around it."""

    core: EngineCore
    kv_cache: KVCache
    layout: KVLayout
    identity: ModelIdentity
    metrics: WorkerMetrics
    vocabulary: Vocabulary | None = None  # None: no constraints
    kv_pool: KVPool = NO_KV_POOL


def pick_device(options: ModelOptions) -> torch.device:
    """The device asked for; `auto` is the GPU if there is one. Raises ConfigError."""
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: this machine has no CUDA device; expected auto or cpu")
    use_gpu = options.device != "cpu" and torch.cuda.is_available()
    return torch.device("cuda:0" if use_gpu else "cpu")


def pick_dtype(options: ModelOptions, device: torch.device) -> str:
    """The precision asked for; `auto` is bfloat16 where the hardware multiplies it."""
    if options.weights != "auto" and options.dtype in ("float32", "float16"):
        raise ConfigError(
            f"--weights {options.weights} contradicts --dtype {options.dtype}; "
            "expected --weights auto"
        )
    if options.dtype != "auto":
        return options.dtype
    return auto_dtype(on_gpu=device.type == "cuda")


def build_engine(
    role: Role,
    model: ModelOptions,
    cache: CacheOptions,
    step: StepOptions,
    registry: CollectorRegistry,
    drafting: Drafting | None = None,
) -> Engine:
    """Load everything; `drafting`: what the worker was asked to draft with.

    Raises ConfigError, CheckpointError.
    """
    if step.num_threads:  # else OMP_NUM_THREADS, else all cores
        torch.set_num_threads(step.num_threads)
    device = pick_device(model)
    dtype = pick_dtype(model, device)
    checkpoint = resolve(model.model, weights=model.seed_weights < 0)
    draft: Checkpoint | None = None
    if model.draft_model:
        draft = resolve_draft(checkpoint, model.draft_model, weights=model.seed_weights < 0)
    layout = _layout(checkpoint.config, cache, dtype)
    if draft is not None:
        layout = dataclasses.replace(layout, draft=_layout(draft.config, cache, dtype))
    window = min(drafting.max_draft_tokens, cache.block_size) if drafting else 0
    size = _size_pool(checkpoint.config, model, cache, layout, device, window)
    num_blocks, max_model_len = size.num_blocks, size.max_model_len
    loader = _Loader(model, cache, step, dtype, device)
    profile = loader.profile(checkpoint)
    if draft is not None:
        profile += f" draft=({loader.profile(draft)})"
    identity = _identity(checkpoint, model, layout, profile, max_model_len)
    pool = BlockPool(num_blocks)
    kv_cache = KVCache(layout, num_blocks, device)
    target = loader.load(checkpoint)
    draft_runner = None
    if draft is not None and kv_cache.draft is not None:
        num_first = first_layers(model.draft_model)
        drafter = target.first_layers(num_first) if num_first else loader.load(draft)
        draft_runner = loader.runner(drafter, kv_cache.draft)
    sampler = Sampler(checkpoint.config.vocab_size, device)
    speculation = drafting.begin(draft_runner, sampler) if drafting else None
    prompt_tokens = _PROMPT_TOKENS_CPU if device.type == "cpu" else _PROMPT_TOKENS[role]
    budgets = Budgets(step.max_batched_tokens or prompt_tokens, step.max_num_seqs)
    scheduler = Scheduler(pool, layout.block_size, budgets, speculation, max_model_len)
    metrics = WorkerMetrics(registry, identity.name)
    runner = loader.runner(target, kv_cache)
    core = EngineCore(scheduler, runner, sampler, metrics, time.monotonic, draft_runner)
    _log.info(
        "engine built",
        model=identity.name,
        profile=identity.numeric_profile,
        device=str(device),
        num_blocks=num_blocks,
        block_bytes=layout.block_bytes,
        max_model_len=max_model_len,
        native=isinstance(target, NativeModel),
    )
    config = checkpoint.config
    vocabulary = Vocabulary(checkpoint.folder, config.vocab_size, config.eos_token_ids)
    kv_pool = KVPool(size.num_bytes, size.limit)
    return Engine(core, kv_cache, layout, identity, metrics, vocabulary, kv_pool)


def numeric_profile(
    checkpoint: Checkpoint, options: ModelOptions, dtype: str, *, native: bool
) -> str:
    """Everything that changes the numbers of an answer; part of the compatibility digest."""
    source = checkpoint.fingerprint
    if options.seed_weights >= 0:
        source = f"random-{options.seed_weights}-{source}"
    if not native:
        return f"{source} weights={dtype} activations={dtype} kv={dtype}"
    kept = {"auto": "gguf", "bf16": "bfloat16"}
    choice = packing(checkpoint, options)
    return f"{source} weights={kept.get(choice, choice)} activations=float32/int16 kv={dtype}"


def _layout(config: ModelConfig, cache: CacheOptions, dtype: str) -> KVLayout:
    return KVLayout(
        num_layers=config.num_layers,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        block_size=cache.block_size,
        dtype=dtype,
    )


class _Loader:
    """Loads models, by our own kernels where they can compute them; their runners share threads."""

    def __init__(
        self,
        model: ModelOptions,
        cache: CacheOptions,
        step: StepOptions,
        dtype: str,
        device: torch.device,
    ) -> None:
        self._model = model
        self._cache = cache
        self._step = step
        self._dtype = dtype
        self._device = device
        self._threads: Threads | None = None

    def profile(self, checkpoint: Checkpoint) -> str:
        """The numeric profile of a model as it is loaded here."""
        native = self._kernels(checkpoint.config) is not None
        return numeric_profile(checkpoint, self._model, self._dtype, native=native)

    def load(self, checkpoint: Checkpoint) -> LlamaModel | NativeModel:
        """Map or read the weights. Raises CheckpointError."""
        config, dtype = checkpoint.config, _DTYPES[self._dtype]
        library = self._kernels(config)
        if library is not None:
            path = packed_file(checkpoint, packing(checkpoint, self._model))
            return NativeModel(config, read_packed(path, config), library)
        if self._model.seed_weights >= 0:
            return random_model(config, self._model.seed_weights, dtype, self._device)
        return load_model(config, weights(checkpoint, self._dtype), dtype, self._device)

    def runner(self, model: LlamaModel | NativeModel, kv_cache: KVCache) -> ModelRunner:
        """What computes `model` over its view of the pool."""
        config = model.config
        if isinstance(model, LlamaModel):
            backend = select_backend(kv_cache, config.num_heads, config.sliding_window)
            return Runner(model, kv_cache, backend)
        if self._threads is None:
            library = self._kernels(config)
            assert library is not None, "it was loaded by them"
            num_threads = self._step.num_threads or usable_cores()
            self._threads = Threads(library, num_threads, Seat.parse(self._step.cores))
        return NativeRunner(model, kv_cache, self._threads)

    def _kernels(self, config: ModelConfig) -> Kernels | None:
        on_gpu = self._device.type == "cuda"
        return pick_kernels(config, self._model, self._cache, self._dtype, on_gpu=on_gpu)


def _size_pool(
    config: ModelConfig,
    model: ModelOptions,
    cache: CacheOptions,
    layout: KVLayout,
    device: torch.device,
    draft_window: int,
) -> PoolSize:
    """One request of full length always fits."""
    check_length(config, model.max_model_len)
    wanted = model.max_model_len or config.context
    longest_bytes = layout.num_blocks(wanted + draft_window) * layout.block_bytes
    if cache.kv_cache_memory:
        budget = PoolBudget(cache.kv_cache_memory, "--kv-cache-memory")
    elif device.type == "cuda":
        budget = PoolBudget(int(torch.cuda.mem_get_info(device)[0] * 0.85))
    else:
        share = HostMemory.parse(cache.memory_share) or host_memory()
        budget = host_budget(longest_bytes, share)
    size = fit_pool(
        budget, layout, longest=wanted, asked=model.max_model_len, draft_window=draft_window
    )
    if size.max_model_len < wanted:
        _log.warning(
            "max_model_len reduced to what the KV pool holds",
            max_model_len=size.max_model_len,
            kv_pool=shown(size.num_bytes),
            limit=size.limit,
        )
    return size


def _identity(
    checkpoint: Checkpoint,
    options: ModelOptions,
    layout: KVLayout,
    profile: str,
    max_model_len: int,
) -> ModelIdentity:
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
