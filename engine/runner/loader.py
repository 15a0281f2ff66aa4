"""Weights of a model from safetensors shards in Hugging Face's names, or from a seed.

The joined tensors are allocated first and the files' are copied into their places one by one, so
the peak is the model plus one tensor. Each must be in the architecture's list, present once and of
the right shape.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from engine.base.errors import CheckpointError
from engine.checkpoint.fused import BLOCKS, SCALES, cut, dequantise_mxfp4, fused_tensors
from engine.models.architecture import FusedPart, TensorSpec, architecture_of, listed_name
from engine.models.config import ModelConfig
from engine.runner.torch_model import TorchModel
from engine.telemetry.progress import Bar, bar

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


_Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a tensor of the files goes."""

    spec: TensorSpec
    part: torch.Tensor  # of a joined tensor

    def fill(self, tensor: torch.Tensor) -> None:
        """Copy a tensor of a file; the error does not know the file."""
        name, part = self.spec.hf_name, self.part
        if tensor.shape != part.shape:
            raise CheckpointError(
                f"tensor {name} has shape {list(tensor.shape)}, expected {list(part.shape)}"
            )
        if tensor.dtype not in _FLOATS:
            raise CheckpointError(f"tensor {name} has type {tensor.dtype}, expected plain floats")
        order = self.spec.row_order()
        part.copy_(tensor if order is None else tensor[order])


_Places = dict[str, _Place]


def _allocate(
    config: ModelConfig, dtype: torch.dtype, device: torch.device
) -> tuple[_Tensors, _Places]:
    """An empty model's joined weights, and the place in them of every tensor of the files."""
    weights: _Tensors = {}
    places: _Places = {}
    specs = architecture_of(config).tensors(config)
    for joined, group in groupby(specs, key=lambda spec: spec.joined):
        parts = list(group)
        sizes = [spec.shape[0] for spec in parts]
        held = torch.float32 if parts[0].exact else dtype
        whole = torch.empty(sum(sizes), *parts[0].shape[1:], dtype=held, device=device)
        weights[joined] = whole
        for spec, part in zip(parts, whole.split_with_sizes(sizes), strict=True):
            places[spec.hf_name] = _Place(spec, part)
    return weights, places


@dataclass(slots=True)
class _Loading:
    """An empty model's tensors, which are filled from one shard after another."""

    config: ModelConfig
    places: _Places
    shown: Bar
    fused: Mapping[str, list[tuple[TensorSpec, FusedPart]]]
    filled: dict[str, Path] = field(default_factory=dict)
    halves: _Tensors = field(default_factory=dict)  # blocks without scales, or the other way round

    def load(self, path: Path) -> None:
        """Copy a shard's tensors to their places and note in `filled` where they came from."""
        with safe_open(path, framework="pt") as shard:
            for stored in shard.offset_keys():
                if (name := listed_name(self.config, stored)) is None:
                    continue
                for target, tensor in self._named(name, stored, shard):
                    if target in self.filled:
                        raise CheckpointError(
                            f"tensor {target} is in {self.filled[target]} already"
                        )
                    self.places[target].fill(tensor)
                    self.filled[target] = path
                    self.shown.update()

    def _named(self, name: str, stored: str, shard: Any) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors of the list that a tensor of a file gives, and their names.

        `stored` is its name in the file, `name` as in the list.
        """
        if name in self.places:
            yield name, shard.get_tensor(stored)
        elif name in self.fused:
            whole = shard.get_tensor(stored)
            for spec, part in self.fused[name]:
                yield spec.hf_name, cut(whole, part)
        elif name.endswith((BLOCKS, SCALES)) and name.rpartition("_")[0] in self.fused:
            self.halves[name] = shard.get_tensor(stored)
            yield from self._dequantised(name.rpartition("_")[0])
        else:
            raise CheckpointError(f"unexpected tensor {stored} in a {self.config.architecture}")

    def _dequantised(self, name: str) -> Iterator[tuple[str, torch.Tensor]]:
        """MXFP4, once both of its tensors are there."""
        if name + BLOCKS not in self.halves or name + SCALES not in self.halves:
            return
        halves = [self.halves.pop(name + suffix).numpy() for suffix in (BLOCKS, SCALES)]
        for spec, part in self.fused[name]:
            parts = (cut(half, part, quantised=True) for half in halves)
            yield spec.hf_name, torch.from_numpy(dequantise_mxfp4(*parts))


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
    with bar(total=len(places), desc="Loading weights", unit="tensor", show=progress) as shown:
        loading = _Loading(config, places, shown, fused_tensors(config))
        for path in shard_paths:
            try:
                loading.load(path)
            except CheckpointError as error:
                raise CheckpointError(f"{path}: {error.message}") from None
            except FileNotFoundError:
                raise CheckpointError(f"{path}: no such file") from None
            except (SafetensorError, OSError) as error:
                raise CheckpointError(
                    f"{path}: not a readable safetensors file ({error})"
                ) from None
    missing = [name for name in places if name not in loading.filled]
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
        noise = torch.randn(place.part.shape, generator=generator)
        if "norm" in name:
            noise = 1 + 0.1 * noise
        elif name.endswith(".bias"):
            noise = 0.1 * noise
        elif "embed_tokens" not in name:
            noise = noise * place.part.shape[-1] ** -0.5
        place.part.copy_(noise)
    return TorchModel(config, joined)
