"""The device that a worker computes on: its kind, its memory, the allocation of the KV pool."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from engine.base.errors import ConfigError
from engine.base.option_groups import ModelOptions
from engine.cache.device_memory import driver_bytes
from engine.cache.kv_cache import zeroed_pages
from engine.cache.sizing import GpuMemory


@dataclass(frozen=True, slots=True)
class Device:
    """A CPU, or the first GPU that this process may see."""

    place: torch.device
    arch: str = ""  # of a GPU, such as sm90
    name: str = "CPU"
    memory: Callable[[], GpuMemory] | None = None  # of a GPU, at this moment
    allocate: Callable[[int], torch.Tensor] = zeroed_pages  # uint8 zeros for the KV pool

    @property
    def on_gpu(self) -> bool:
        """Whether it is a GPU."""
        return self.memory is not None


def pick_device(options: ModelOptions) -> Device:
    """The device of the options; `auto` is the GPU if there is one. Raises ConfigError."""
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: this machine has no CUDA device; expected auto or cpu")
    if options.device == "cpu" or not torch.cuda.is_available():
        return Device(torch.device("cpu"))
    place = torch.device("cuda:0")
    major, minor = torch.cuda.get_device_capability(place)
    return Device(
        place,
        f"sm{major}{minor}",
        torch.cuda.get_device_name(place),
        partial(_gpu_memory, place),
        partial(driver_bytes, place=place),
    )


def _gpu_memory(place: torch.device) -> GpuMemory:
    free, total = torch.cuda.mem_get_info(place)
    return GpuMemory(total, free, torch.cuda.memory_reserved(place))
