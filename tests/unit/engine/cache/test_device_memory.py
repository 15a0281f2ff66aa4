"""The KV pool's memory on a GPU comes from the driver; a list of calls stands for the driver."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch

from engine.base.option_groups import ModelOptions
from engine.cache.device_memory import DriverMemory, driver_bytes
from engine.step.device import pick_device


class Driver:
    def __init__(self, status: int = 0) -> None:
        self.status = status
        self.calls: list[tuple[str, int]] = []

    def cuMemAlloc_v2(self, pointer: Any, size: ctypes.c_size_t) -> int:
        self.calls.append(("alloc", size.value))
        pointer._obj.value = 0x7F0000000000
        return self.status

    def cuMemFree_v2(self, address: ctypes.c_uint64) -> int:
        self.calls.append(("free", address.value))
        return 0


def test_memory_is_the_drivers_own_and_goes_back_to_it() -> None:
    driver = Driver()
    memory = DriverMemory(3 << 30, driver)
    described = memory.__cuda_array_interface__
    assert described["data"] == (0x7F0000000000, False)
    assert (described["shape"], described["typestr"]) == ((3 << 30,), "|u1")
    del memory
    assert driver.calls == [("alloc", 3 << 30), ("free", 0x7F0000000000)]


def test_a_driver_without_memory_or_with_an_error() -> None:
    with pytest.raises(torch.OutOfMemoryError):
        DriverMemory(1, Driver(2))
    driver = Driver(201)
    with pytest.raises(RuntimeError, match="CUDA error 201"):
        DriverMemory(1, driver)
    assert driver.calls == [("alloc", 1)], "memory that was not allocated is not freed"


def test_a_gpus_pool_never_comes_from_pytorchs_allocator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its segments may be expandable, and NIXL reads those over TCP."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda place: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda place: "H100")
    device = pick_device(ModelOptions())
    assert getattr(device.allocate, "func", None) is driver_bytes
    assert (str(device.place), device.arch, device.on_gpu) == ("cuda:0", "sm90", True)
    assert not pick_device(ModelOptions(device="cpu")).on_gpu
