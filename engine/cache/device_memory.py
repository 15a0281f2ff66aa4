"""GPU memory for the KV pool, allocated by the CUDA driver.

PyTorch's allocator may return memory of an expandable segment (PYTORCH_ALLOC_CONF
expandable_segments:True, also for a plain torch.cuda.MemPool). UCX registers it without an error
and then reads it over TCP, about a hundred times slower than by cuda_ipc. Memory of cuMemAlloc can
be shared with other processes, whatever that variable is set to.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch

_OUT_OF_MEMORY = 2  # CUDA_ERROR_OUT_OF_MEMORY


class DriverMemory:
    """One allocation, freed with this object; torch keeps it while a tensor refers to it."""

    def __init__(self, num_bytes: int, driver: Any) -> None:
        """Raises torch.OutOfMemoryError, RuntimeError; the device's context is current."""
        pointer = ctypes.c_uint64()
        status = driver.cuMemAlloc_v2(ctypes.byref(pointer), ctypes.c_size_t(num_bytes))
        if status == _OUT_OF_MEMORY:
            raise torch.OutOfMemoryError(f"cuMemAlloc of {num_bytes} bytes")
        if status != 0:
            raise RuntimeError(f"cuMemAlloc of {num_bytes} bytes: CUDA error {status}")
        self.address: int = pointer.value
        self._driver = driver
        self.__cuda_array_interface__ = {
            "shape": (num_bytes,),
            "typestr": "|u1",
            "data": (self.address, False),
            "version": 3,
        }

    def __del__(self) -> None:
        if address := getattr(self, "address", 0):
            self._driver.cuMemFree_v2(ctypes.c_uint64(address))


def driver_bytes(num_bytes: int, place: torch.device) -> torch.Tensor:
    """Zeros, uint8 [num_bytes] on a GPU. Raises torch.OutOfMemoryError."""
    with torch.cuda.device(place):
        torch.zeros(1, device=place)  # makes the device's context current
        memory = DriverMemory(num_bytes, ctypes.CDLL("libcuda.so.1"))
        tensor = torch.as_tensor(memory, device=place)
    return tensor.zero_()
