"""Chooses what computes a model on this machine, and the model that drafts for it.

No torch here: a coordinator makes the same choice, to convert weights where a person sees the
progress.
"""

from __future__ import annotations

import dataclasses

from engine.base.errors import ConfigError
from engine.base.option_groups import CacheOptions, ModelOptions
from engine.checkpoint.packed import packed_file
from engine.checkpoint.source import Checkpoint, resolve, weights
from engine.kernels import TIMES_SLOWER, Kernels, kernels, why_not
from engine.kernels.decoder import why_not_decoder
from engine.kernels.precision import auto_dtype
from engine.models.architecture import architecture_of
from engine.models.config import ModelConfig
from engine.telemetry.progress import print_line


def pick_kernels(
    config: ModelConfig, model: ModelOptions, cache: CacheOptions, dtype: str, *, on_gpu: bool
) -> Kernels | None:
    """The CPU kernels if they can compute this model; None: torch does. Raises ConfigError."""
    is_candidate = not on_gpu and dtype == "bfloat16" and model.seed_weights < 0
    fits = not why_not_decoder(config) and cache.block_size % 16 == 0
    library = kernels() if is_candidate and fits else None
    if library is None and model.weights in ("int8", "int4"):
        reason = why_torch(config, model, cache) if is_candidate else ""
        raise ConfigError(
            f"--weights {model.weights}: needs our CPU kernels (a C compiler, AVX512 with VNNI, "
            "a --block-size that is a multiple of 16); expected auto or bf16"
            + (reason and f" ({reason})")
        )
    return library


def why_torch(config: ModelConfig, model: ModelOptions, cache: CacheOptions) -> str:
    """Why torch computes on a CPU instead of the kernels; "" if they do, or torch was chosen."""
    if model.seed_weights >= 0 or model.dtype not in ("auto", "bfloat16"):
        return ""
    if reason := why_not_decoder(config):
        return reason
    if cache.block_size % 16:
        return f"--block-size {cache.block_size} is not a multiple of 16"
    return why_not()


def packing(checkpoint: Checkpoint, options: ModelOptions) -> str:
    """The packing of weights for the kernels: few files but GGUF have one already."""
    is_packed = checkpoint.gguf or architecture_of(checkpoint.config).quantisations
    return "bf16" if options.weights == "auto" and not is_packed else options.weights


def first_layers(spec: str) -> int:
    """N of a draft model `first:N`; 0 for any other. Raises ConfigError."""
    prefix, _, number = spec.partition(":")
    if prefix != "first":
        return 0
    if not number.isdecimal() or int(number) < 1:
        raise ConfigError(f"--draft-model {spec}: expected first:N with a number of layers")
    return int(number)


def resolve_draft(target: Checkpoint, spec: str, *, weights: bool) -> Checkpoint:
    """The draft model's checkpoint; of `first:N` the target's, with fewer layers.

    Raises ConfigError, CheckpointError.
    """
    if num_layers := first_layers(spec):
        if num_layers > target.config.num_layers:
            raise ConfigError(
                f"--draft-model {spec}: {target.name} has {target.config.num_layers} layers"
            )
        config = dataclasses.replace(target.config, num_layers=num_layers)
        fingerprint = f"{target.fingerprint}-{spec}"
        return dataclasses.replace(target, config=config, fingerprint=fingerprint)
    draft = resolve(spec, weights=False)  # refuse by the configuration first
    sizes = draft.config.vocab_size, target.config.vocab_size
    if sizes[0] != sizes[1]:
        raise ConfigError(
            f"--draft-model {spec}: has a vocabulary of {sizes[0]} tokens, {target.name} of "
            f"{sizes[1]}; expected the same vocabulary"
        )
    return resolve(spec, weights=True) if weights else draft


def check_length(config: ModelConfig, max_model_len: int) -> None:
    """Raise ConfigError for a length beyond the model's context."""
    limit = config.context
    if max_model_len > limit:
        dynamic = config.rope_scaling.kind == "dynamic"
        why = "; dynamic rope scaling is not computed beyond it" if dynamic else ""
        raise ConfigError(f"--max-model-len {max_model_len}: the model's context is {limit}{why}")


def prepare_weights(
    checkpoint: Checkpoint, model: ModelOptions, cache: CacheOptions, *, on_gpu: bool
) -> None:
    """Do what a worker would do at its start: compile kernels, convert or pack weights.

    Entries that exist are not read here: the workers check them.
    Raises ConfigError, CheckpointError.
    """
    if model.draft_model:
        draft = resolve_draft(checkpoint, model.draft_model, weights=True)
        if not first_layers(model.draft_model):
            alone = dataclasses.replace(model, draft_model="")
            prepare_weights(draft, alone, cache, on_gpu=on_gpu)
    if not on_gpu and (reason := why_torch(checkpoint.config, model, cache)):
        print_line(f"{checkpoint.name} runs on torch, about {TIMES_SLOWER} times slower: {reason}")
    dtype = auto_dtype(on_gpu=on_gpu) if model.dtype == "auto" else model.dtype
    if pick_kernels(checkpoint.config, model, cache, dtype, on_gpu=on_gpu) is not None:
        packed_file(checkpoint, packing(checkpoint, model), read=False)
    else:
        weights(checkpoint, dtype, read=False)
