"""Which of our ways computes a model on this machine. No torch here: a coordinator asks too, to
convert weights where a person sees the progress.
"""

from __future__ import annotations

from engine.checkpoint.config import ModelConfig
from engine.checkpoint.packed import packable, packed_file
from engine.checkpoint.source import Checkpoint, weights
from engine.config import CacheOptions, ModelOptions
from engine.errors import ConfigError
from engine.native import Kernels, kernels
from engine.precision import auto_dtype


def pick_kernels(
    config: ModelConfig, model: ModelOptions, cache: CacheOptions, dtype: str, *, on_gpu: bool
) -> Kernels | None:
    """Our own kernels where they can compute this model; None: torch does. Raises ConfigError."""
    wanted = not on_gpu and dtype == "bfloat16" and model.seed_weights < 0
    fits = packable(config) and cache.block_size % 16 == 0
    library = kernels() if wanted and fits else None
    if library is None and model.weights in ("int8", "int4"):
        raise ConfigError(
            f"--weights {model.weights}: needs our CPU kernels (a C compiler, AVX512-BF16, "
            "a --block-size that is a multiple of 16); expected auto or bf16"
        )
    return library


def packing(checkpoint: Checkpoint, options: ModelOptions) -> str:
    """The packing of weights for our kernels: only a GGUF file has one of its own."""
    return "bf16" if options.weights == "auto" and checkpoint.gguf is None else options.weights


def prepare_weights(
    checkpoint: Checkpoint, model: ModelOptions, cache: CacheOptions, *, on_gpu: bool
) -> None:
    """Do now what a worker would do at its start: compile kernels, convert or pack weights.

    Raises ConfigError, CheckpointError.
    """
    dtype = auto_dtype(on_gpu=on_gpu) if model.dtype == "auto" else model.dtype
    if pick_kernels(checkpoint.config, model, cache, dtype, on_gpu=on_gpu) is not None:
        packed_file(checkpoint, packing(checkpoint, model))
    else:
        weights(checkpoint, dtype)
