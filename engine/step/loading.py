"""Models, from a checkpoint to what runs them, and the numeric profile of how they are computed.

The C kernels compute a model on the CPU where they can, torch everywhere else.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from engine.attention import BackendChoice, choose_backend, flashinfer_version, make_backend
from engine.attention.base import AttentionBackend
from engine.base.errors import ConfigError
from engine.base.kv_columns import FULL, Columns, deal
from engine.base.kv_layout import KVLayout
from engine.base.option_groups import CacheOptions, ModelOptions, StepOptions
from engine.cache.kv_cache import DTYPES, KVCache
from engine.checkpoint.fingerprint import config_digest
from engine.checkpoint.packed import layout_version, packed_file, read_packed
from engine.checkpoint.source import Checkpoint, weights
from engine.kernels import Kernels, kernels
from engine.kernels.backend_selection import first_layers, packing, pick_kernels
from engine.kernels.precision import auto_dtype
from engine.kernels.threads import Threads
from engine.models.config import ModelConfig
from engine.process.core_share import CoreShare, usable_cores
from engine.runner.base import Model, ModelRunner, PooledRunner
from engine.runner.loader import load_model, random_model
from engine.runner.native_model import NativeModel
from engine.step.device import Device
from engine.step.self_test import SelfTest, num_scratch_blocks
from engine.telemetry.log import get_logger

_log = get_logger(__name__)


def pick_dtype(options: ModelOptions, device: Device) -> str:
    """The precision of `--dtype`; `auto` is bfloat16 where the hardware multiplies it."""
    if options.weights != "auto" and options.dtype in ("float32", "float16"):
        raise ConfigError(
            f"--weights {options.weights} contradicts --dtype {options.dtype}; "
            "expected --weights auto"
        )
    if options.dtype != "auto":
        return options.dtype
    return auto_dtype(on_gpu=device.on_gpu)


def numeric_profile(
    checkpoint: Checkpoint, options: ModelOptions, dtype: str, *, native: bool, on: str = ""
) -> str:
    """Everything that changes the numbers of an output; part of the compatibility digest.

    `on` names a GPU's architecture and attention kernels: others round differently, so their blocks
    cannot be continued.
    """
    source = checkpoint.fingerprint
    if options.seed_weights >= 0:
        source = f"random-{options.seed_weights}-{config_digest(checkpoint.config)}"
    if not native:
        return f"{source} weights={dtype} activations={dtype} kv={dtype}{on and ' ' + on}"
    choice = packing(checkpoint, options)
    version = layout_version(checkpoint, choice)
    names = {"auto": "gguf" if version == 1 else f"gguf-{version}", "bf16": "bfloat16"}
    return f"{source} weights={names.get(choice, choice)} activations=float32/int16 kv={dtype}"


def layout_of(
    config: ModelConfig, cache: CacheOptions, dtype: str, *, by_window: bool = True
) -> KVLayout:
    """The KV blocks of one model; `by_window`: layers with a window have columns of their own."""
    columns = Columns.one(config.num_layers)
    if by_window:
        columns = deal([spec.window for spec in config.attention], config.context)
    sizes = (columns.num_layers, config.num_kv_heads, config.head_dim)
    layout = KVLayout(*sizes, cache.block_size, dtype)
    if columns.windows == FULL:
        return layout
    return dataclasses.replace(layout, windows=columns.windows, places=columns.places)


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model and its runner."""

    model: Model
    runner: PooledRunner


@dataclass(frozen=True, slots=True)
class Models:
    """A model, and the one that drafts for it."""

    target: Loaded
    draft: Loaded | None

    @property
    def native(self) -> bool:
        """Whether our own kernels compute the target."""
        return self.target.model.exact

    @property
    def runners(self) -> list[ModelRunner]:
        """Of both."""
        return [each.runner for each in (self.target, self.draft) if each is not None]

    def self_tests(self, layout: KVLayout, vocab_size: int) -> list[SelfTest]:
        """Of both, on the scratch pool."""
        found = (("the model", self.target), ("the draft model", self.draft))
        sizes = {
            "block_size": layout.block_size,
            "vocab_size": vocab_size,
            "num_columns": layout.num_columns,
        }
        return [
            SelfTest(name, each.runner, exact=each.model.exact, **sizes)
            for name, each in found
            if each is not None
        ]

    def over(self, kv_cache: KVCache) -> tuple[ModelRunner, ModelRunner | None]:
        """The runners of both over another pool."""
        draft = None
        if self.draft is not None and kv_cache.draft is not None:
            draft = self.draft.runner.over(kv_cache.draft)
        return self.target.runner.over(kv_cache), draft


@dataclass(slots=True, eq=False)
class Loader:
    """Loads models, for the C kernels where these can compute them; the Host of their runners."""

    model: ModelOptions
    cache: CacheOptions
    step: StepOptions
    dtype: str
    device: Device
    _threads: Threads | None = None

    def load_all(
        self, checkpoint: Checkpoint, draft: Checkpoint | None, layout: KVLayout
    ) -> Models:
        """Both models over a scratch pool of a few blocks. Raises CheckpointError, ConfigError."""
        num_blocks = num_scratch_blocks(layout.block_size, layout.num_columns)
        scratch = KVCache(layout, num_blocks, self.device.place)
        target = self._load(checkpoint)
        loaded_draft = None
        if draft is not None and scratch.draft is not None:
            num_first = first_layers(self.model.draft_model)
            drafter = target.first_layers(num_first) if num_first else self._load(draft)
            loaded_draft = Loaded(drafter, drafter.make_runner(scratch.draft, self))
        return Models(Loaded(target, target.make_runner(scratch, self)), loaded_draft)

    def profile(self, checkpoint: Checkpoint) -> str:
        """The numeric profile of a model as it is loaded here."""
        native = self._kernels(checkpoint.config) is not None
        on, device = "", self.device
        if device.on_gpu:
            on = f"device=cuda arch={device.arch} attention={self._backend(checkpoint.config)}"
        return numeric_profile(checkpoint, self.model, self.dtype, native=native, on=on)

    def _load(self, checkpoint: Checkpoint) -> Model:
        """Map or read the weights. Raises CheckpointError."""
        config, dtype, place = checkpoint.config, DTYPES[self.dtype], self.device.place
        library = self._kernels(config)
        if library is not None:
            path = packed_file(checkpoint, packing(checkpoint, self.model))
            return NativeModel(config, read_packed(path, config), library)
        if self.model.seed_weights >= 0:
            return random_model(config, self.model.seed_weights, dtype, place)
        model = load_model(config, weights(checkpoint, self.dtype), dtype, place)
        checkpoint.check_unchanged()
        return model

    def attention(self, config: ModelConfig, kv_cache: KVCache) -> AttentionBackend[Any]:
        """The backend that suits the model and the device."""
        choice = self._backend(config)
        _log.info("attention backend", backend=str(choice), reason=choice.reason)
        return make_backend(choice, kv_cache, config)

    def threads(self) -> Threads:
        """The threads of our own kernels; started on the first call."""
        if self._threads is None:
            library = kernels()
            assert library is not None, "a model was loaded by them"
            num_threads = self.step.num_threads or usable_cores()
            self._threads = Threads(library, num_threads, CoreShare.parse(self.step.cores))
        return self._threads

    def _backend(self, config: ModelConfig) -> BackendChoice:
        layout = layout_of(config, self.cache, self.dtype)
        arch = self.device.arch
        found = flashinfer_version() if arch else None
        sinks = config.attention_sinks
        return choose_backend(layout, config.num_heads, arch=arch, flashinfer=found, sinks=sinks)

    def _kernels(self, config: ModelConfig) -> Kernels | None:
        on_gpu = self.device.on_gpu
        return pick_kernels(config, self.model, self.cache, self.dtype, on_gpu=on_gpu)
