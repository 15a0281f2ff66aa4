"""Weights of a model from safetensors shards in Hugging Face's names, or from a seed.

The joined tensors are allocated first and the files' are copied into their places one by one, so
the peak is the model plus one tensor. Each must be in the architecture's list, present once and of
the right shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from engine.base.errors import CheckpointError
from engine.models.architecture import architecture_of
from engine.models.config import ModelConfig
from engine.runner.torch_model import TorchModel
from engine.telemetry.progress import Bar, bar

# Buffers that old exports carry and that follow from the configuration.
_IGNORED = ("rotary_emb.inv_freq",)
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


_Tensors = dict[str, torch.Tensor]


def _allocate(
    config: ModelConfig, dtype: torch.dtype, device: torch.device
) -> tuple[_Tensors, _Tensors]:
    """An empty model's joined weights, and the place in them of every tensor of the files."""
    weights: _Tensors = {}
    places: _Tensors = {}
    specs = architecture_of(config).tensors(config)
    for joined, group in groupby(specs, key=lambda spec: spec.joined):
        parts = list(group)
        sizes = [spec.shape[0] for spec in parts]
        whole = torch.empty(sum(sizes), *parts[0].shape[1:], dtype=dtype, device=device)
        weights[joined] = whole
        for spec, place in zip(parts, whole.split_with_sizes(sizes), strict=True):
            places[spec.hf_name] = place
    return weights, places


def _fill(place: torch.Tensor, name: str, tensor: torch.Tensor) -> None:
    """Copy one tensor of a file to its place; the error does not know the file."""
    if tensor.shape != place.shape:
        raise CheckpointError(
            f"tensor {name} has shape {list(tensor.shape)}, expected {list(place.shape)}"
        )
    if tensor.dtype not in _FLOATS:
        raise CheckpointError(f"tensor {name} has type {tensor.dtype}, expected plain floats")
    place.copy_(tensor)


def _load_shard(
    path: Path, config: ModelConfig, places: _Tensors, filled: dict[str, Path], shown: Bar
) -> None:
    """Copy a shard's tensors to their places and note in `filled` where they came from."""
    with safe_open(path, framework="pt") as shard:
        for name in shard.offset_keys():
            tied = config.tie_word_embeddings and name == "lm_head.weight"
            if tied or name.endswith(_IGNORED):
                continue
            if name not in places:
                raise CheckpointError(f"unexpected tensor {name} in a {config.architecture}")
            if name in filled:
                raise CheckpointError(f"tensor {name} is in {filled[name]} already")
            _fill(places[name], name, shard.get_tensor(name))
            filled[name] = path
            shown.update()


def load_model(
    config: ModelConfig,
    shard_paths: Sequence[Path],
    dtype: torch.dtype,
    device: torch.device,
    progress: bool = True,
) -> TorchModel:
    """Read the shards into a model. Raises CheckpointError naming the file and the tensor.

    `progress` shows how far it is on standard error.
    """
    joined, places = _allocate(config, dtype, device)
    filled: dict[str, Path] = {}
    with bar(total=len(places), desc="Loading weights", unit="tensor", show=progress) as shown:
        for path in shard_paths:
            try:
                _load_shard(path, config, places, filled, shown)
            except CheckpointError as error:
                raise CheckpointError(f"{path}: {error.message}") from None
            except FileNotFoundError:
                raise CheckpointError(f"{path}: no such file") from None
            except (SafetensorError, OSError) as error:
                raise CheckpointError(
                    f"{path}: not a readable safetensors file ({error})"
                ) from None
    missing = [name for name in places if name not in filled]
    if missing:
        files = ", ".join(str(path) for path in shard_paths) or "no files"
        raise CheckpointError(f"{files}: tensor {missing[0]} is missing ({len(missing)} in all)")
    return TorchModel(config, joined)


def random_model(
    config: ModelConfig,
    seed: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
) -> TorchModel:
    """For tests: fp32 weights that follow from `seed`, the same (rounded) in every dtype."""
    joined, places = _allocate(config, dtype, device or torch.device("cpu"))
    generator = torch.Generator().manual_seed(seed)
    for name, place in places.items():
        noise = torch.randn(place.shape, generator=generator)
        if "norm" in name:
            noise = 1 + 0.1 * noise
        elif name.endswith(".bias"):
            noise = 0.1 * noise
        elif "embed_tokens" not in name:
            noise = noise * place.shape[-1] ** -0.5
        place.copy_(noise)
    return TorchModel(config, joined)
