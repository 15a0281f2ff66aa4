"""From options to an engine: checkpoint, model, warm-up, KV pool, scheduler.

    budget known (a CPU, --kv-cache-memory)   pool sized -> weights -> warm-up -> pool
    a GPU                                     weights -> warm-up -> pool sized -> pool

Where its budget is known the pool is sized first, so that a length that cannot fit is refused at
once. On a GPU weights, activations and workspaces have their memory before the pool is sized.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from prometheus_client import CollectorRegistry

from engine.base.errors import ConfigError
from engine.base.kv_layout import KVLayout, compatibility_digest
from engine.base.memory import HostMemory, host_memory, readable_size
from engine.base.option_groups import CacheOptions, ModelOptions, StepOptions
from engine.base.types import NO_KV_POOL, KVPool, ModelIdentity, Role, RoleBudgets
from engine.cache.kv_cache import KVCache
from engine.cache.sizing import GpuMemory, PoolBudget, PoolSize, fit_pool, gpu_budget, host_budget
from engine.checkpoint.fingerprint import rope_text, tokenizer_digest
from engine.checkpoint.source import Checkpoint, resolve
from engine.constraints import Vocabulary
from engine.kernels.backend_selection import check_length, resolve_draft
from engine.models.config import ModelConfig
from engine.sampling import Sampler
from engine.scheduling.block_pool import BlockPool
from engine.scheduling.plan import Budgets, blocks_ahead
from engine.scheduling.scheduler import Scheduler
from engine.step.core import EngineCore
from engine.step.device import Device, pick_device
from engine.step.drafting import Drafting
from engine.step.health import EngineHealth
from engine.step.loading import Loader, Models, layout_of, pick_dtype
from engine.step.self_test import SelfTest
from engine.step.warmup import smallest_shape, step_shapes, warm_up
from engine.telemetry.log import get_logger
from engine.telemetry.metrics import WorkerMetrics

_log = get_logger(__name__)
# (prompt tokens a step, answers at once). On a CPU matrix products are efficient at 256 tokens, and
# the next request waits half as long; on a GPU the values of vLLM.
_CPU_BUDGETS, _GPU_BUDGETS = (256, 64), (8192, 256)
_GPU_LOGITS = 1024  # of a step on a GPU: fp32 ones of 128,256 tokens take 0.5 GiB


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


def pick_budgets(options: StepOptions, device: Device) -> Budgets:
    """The budgets of a step: those of the options, else the device's."""
    prompt_tokens, num_seqs = _GPU_BUDGETS if device.on_gpu else _CPU_BUDGETS
    num_seqs = options.max_num_seqs or num_seqs
    budgets = Budgets(options.max_batched_tokens or prompt_tokens, num_seqs)
    if device.on_gpu:
        budgets = dataclasses.replace(budgets, num_logits=max(_GPU_LOGITS, 2 * num_seqs))
    return budgets


def default_budgets(role: Role, budgets: Budgets) -> RoleBudgets:
    """What a worker started in this role takes from others until a coordinator changes it."""
    if role is Role.PREFILL:
        return RoleBudgets(budgets.prompt_tokens, 0)
    return RoleBudgets(0, budgets.num_seqs)


def build_engine(
    role: Role,
    model: ModelOptions,
    cache: CacheOptions,
    step: StepOptions,
    registry: CollectorRegistry,
    drafting: Drafting | None = None,
    device: Device | None = None,
) -> Engine:
    """Load everything; `drafting`: the worker's speculation, needed where it has a draft model.

    Raises ConfigError, also where a GPU's memory is too small, CheckpointError, SelfTestFailed.
    """
    if step.num_threads:  # else OMP_NUM_THREADS, else all cores
        torch.set_num_threads(step.num_threads)
    device = device or pick_device(model)
    with memory_errors(device, cache.gpu_memory_utilization):
        return _build(role, model, cache, step, registry, drafting, device)


def _build(
    role: Role,
    model: ModelOptions,
    cache: CacheOptions,
    step: StepOptions,
    registry: CollectorRegistry,
    drafting: Drafting | None,
    device: Device,
) -> Engine:
    dtype = pick_dtype(model, device)
    checkpoint, draft = _checkpoints(model)
    layout = _layout(checkpoint, draft, cache, dtype)
    budgets = pick_budgets(step, device)
    window = min(drafting.max_draft_tokens, cache.block_size) if drafting else 0
    ahead = blocks_ahead(budgets.prompt_tokens, layout.block_size)
    pool_of = _PoolSizer(checkpoint.config, model, cache, layout, window, ahead)
    size = None if device.on_gpu and not cache.kv_cache_memory else pool_of(device)
    loader = Loader(model, cache, step, dtype, device)
    models = loader.load_all(checkpoint, draft, layout)
    sampler = Sampler(checkpoint.config.vocab_size, device.place)
    _warm_up(models, sampler, budgets, layout, pool_of.length, window, device)
    self_tests = models.self_tests(layout, checkpoint.config.vocab_size)
    _test(self_tests)
    size = size or pool_of(device)
    kv_cache = KVCache(layout, size.num_blocks, device.place, device.allocate)
    runner, draft_runner = models.over(kv_cache)

    profile = loader.profile(checkpoint)
    if draft is not None:
        profile += f" draft=({loader.profile(draft)})"
    identity = _identity(checkpoint, model, layout, profile, size.max_model_len)
    if draft_runner is not None and drafting is None:
        raise ValueError("a draft model needs a drafter, which computes its KV")
    speculation = drafting.begin(draft_runner, sampler, layout.block_size) if drafting else None
    pool = BlockPool(size.num_blocks)
    length = size.max_model_len
    scheduler = Scheduler(pool, layout.block_size, budgets, speculation, length, layout.windows)
    scheduler.set_role_budgets(default_budgets(role, budgets))
    metrics = WorkerMetrics(registry, identity.name)
    health = EngineHealth(kv_cache, self_tests)
    core = EngineCore(scheduler, runner, sampler, metrics, time.monotonic, health)
    _log.info(
        "engine built",
        model=identity.name,
        role=role.value,
        profile=identity.numeric_profile,
        device=device.name,
        num_blocks=size.num_blocks,
        block_bytes=layout.block_bytes,
        max_model_len=size.max_model_len,
        native=models.native,
        prompt_tokens=budgets.prompt_tokens,
        num_seqs=budgets.num_seqs,
    )
    config = checkpoint.config
    vocabulary = Vocabulary(checkpoint.folder, config.vocab_size, config.eos_token_ids)
    kv_pool = KVPool(size.num_bytes, size.limit)
    return Engine(core, kv_cache, layout, identity, metrics, vocabulary, kv_pool)


def _layout(
    checkpoint: Checkpoint, draft: Checkpoint | None, cache: CacheOptions, dtype: str
) -> KVLayout:
    """The blocks of both. A draft model's layers lie in them: then each layer keeps every block."""
    layout = layout_of(checkpoint.config, cache, dtype, by_window=draft is None)
    if draft is None:
        return layout
    drafts = layout_of(draft.config, cache, dtype, by_window=False)
    return dataclasses.replace(layout, draft=drafts)


def _checkpoints(model: ModelOptions) -> tuple[Checkpoint, Checkpoint | None]:
    """The model and its draft model, for the texts that are served."""
    weights, length = model.seed_weights < 0, model.max_model_len
    checkpoint = resolve(model.model, weights=weights).for_length(length)
    if not model.draft_model:
        return checkpoint, None
    draft = resolve_draft(checkpoint, model.draft_model, weights=weights)
    return checkpoint, draft.for_length(length or checkpoint.config.context)


@contextmanager
def memory_errors(device: Device, utilization: float) -> Iterator[None]:
    """While an engine starts: memory that runs out is a ConfigError with figures and options."""
    try:
        yield
    except (torch.OutOfMemoryError, RuntimeError) as error:
        full = isinstance(error, torch.OutOfMemoryError) or any(
            words in str(error) for words in ("out of memory", "ALLOC_FAILED")
        )
        if not full or device.memory is None:
            raise
        raise ConfigError(
            f"{device.name}: GPU memory ran out at the start{_figures(device.memory)}; expected a"
            f" smaller model, --max-batched-tokens, --max-num-seqs, or --gpu-memory-utilization"
            f" (now {utilization:g}); or another GPU"
        ) from error


def _figures(memory: Callable[[], GpuMemory]) -> str:
    try:
        now = memory()
    except RuntimeError:  # not even a context fits
        return ""
    total, free, taken = map(readable_size, (now.total_bytes, now.free_bytes, now.reserved_bytes))
    return f" ({total} in all, {free} free, {taken} taken here)"


def _warm_up(
    models: Models,
    sampler: Sampler,
    budgets: Budgets,
    layout: KVLayout,
    max_model_len: int,
    window: int,
    device: Device,
) -> None:
    block_size = layout.block_size
    shapes = [smallest_shape(draft_window=window, block_size=block_size)]
    if device.on_gpu:
        _log.info("loading or compiling GPU kernels: minutes at the first start on a machine")
        shapes = step_shapes(
            budgets, draft_window=window, block_size=block_size, max_model_len=max_model_len
        )
    seconds = warm_up(shapes, models.runners, sampler, show=device.on_gpu)
    _log.info("warmed up", seconds=round(seconds, 2))


def _test(self_tests: Sequence[SelfTest]) -> None:
    """Raise SelfTestFailed before any request is served."""
    begun_s = time.monotonic()
    for test in self_tests:
        test()
    _log.info("self-test passed", seconds=round(time.monotonic() - begun_s, 3))


class _PoolSizer:
    """Sizes the pool by what its device has left; one request of full length always fits."""

    def __init__(
        self,
        config: ModelConfig,
        model: ModelOptions,
        cache: CacheOptions,
        layout: KVLayout,
        draft_window: int,
        ahead: int,
    ) -> None:
        """`ahead` as kv_columns has it. Raises ConfigError for a length that the model lacks."""
        check_length(config, model.max_model_len)
        self.length = model.max_model_len or config.context
        self._requested = model.max_model_len
        self._cache = cache
        self._layout = layout
        self._draft_window = draft_window
        self._ahead = ahead

    def __call__(self, device: Device) -> PoolSize:
        """The size that fits now. Raises ConfigError."""
        layout, window = self._layout, self._draft_window
        lengths = {"longest": self.length, "requested": self._requested, "draft_window": window}
        size = fit_pool(self._budget(device), layout, **lengths, ahead=self._ahead)
        if size.max_model_len < self.length:
            _log.warning(
                "max_model_len reduced to what the KV pool holds",
                max_model_len=size.max_model_len,
                kv_pool=readable_size(size.num_bytes),
                limit=size.limit,
            )
        return size

    def _budget(self, device: Device) -> PoolBudget:
        cache, layout = self._cache, self._layout
        if cache.kv_cache_memory:
            return PoolBudget(cache.kv_cache_memory, "--kv-cache-memory")
        if device.memory is not None:
            return gpu_budget(device.memory(), cache.gpu_memory_utilization)
        longest = self.length + self._draft_window
        longest_bytes = layout.pool_blocks(longest, self._ahead) * layout.block_bytes
        memory = HostMemory.parse(cache.memory_share) or host_memory()
        return host_budget(longest_bytes, memory)


def _identity(
    checkpoint: Checkpoint,
    options: ModelOptions,
    layout: KVLayout,
    profile: str,
    max_model_len: int,
) -> ModelIdentity:
    config, tokens = checkpoint.config, tokenizer_digest(checkpoint.folder)
    digest = compatibility_digest(
        numeric_profile=profile, tokenizer_digest=tokens, layout=layout, rope=rope_text(config)
    )
    return ModelIdentity(
        name=options.model_name or checkpoint.name,
        digest=digest,
        numeric_profile=profile,
        max_model_len=max_model_len,
        block_size=layout.block_size,
        vocab_size=config.vocab_size,
        tokenizer_digest=tokens,
    )
