"""The precision that `--dtype auto` means on this machine. No torch here: coordinators use it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from engine.base.cpu_features import CPUINFO, KERNEL_FLAGS, compiler, cpu_flags

_BFLOAT16_FLAGS = frozenset(("avx512_bf16", "amx_bf16", "bf16"))  # the last is Arm's


def _kernels_build() -> bool:
    """Whether there are kernels; compiles them if needed."""
    from engine.kernels import kernels  # it needs this module

    return kernels() is not None


def auto_dtype(
    *, on_gpu: bool, cpuinfo: Path = CPUINFO, kernels_build: Callable[[], bool] = _kernels_build
) -> str:
    """bfloat16 if the hardware or the CPU kernels multiply it, else float32."""
    flags = cpu_flags(cpuinfo)
    if on_gpu or _BFLOAT16_FLAGS & flags:
        return "bfloat16"
    # If the compiler fails, torch must not get a precision that it can only emulate.
    kernels = flags >= KERNEL_FLAGS and compiler() is not None and kernels_build()
    return "bfloat16" if kernels else "float32"
