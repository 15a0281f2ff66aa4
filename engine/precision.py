"""Which precision `--dtype auto` means on this machine. No torch here: a coordinator asks too."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

_CPUINFO = Path("/proc/cpuinfo")
_BFLOAT16_FLAGS = frozenset(("avx512_bf16", "amx_bf16", "bf16"))  # the last is Arm's
# What our kernels are compiled for (engine/native): all of them, or torch computes.
KERNEL_FLAGS = frozenset(("avx512_vnni", "avx512f", "avx512bw", "avx512dq", "avx512vl", "f16c"))


def _kernels_build() -> bool:
    """Whether our kernels are there; compiles them where that was not done yet."""
    from engine.native import kernels  # it needs this module

    return kernels() is not None


def auto_dtype(
    *, on_gpu: bool, cpuinfo: Path = _CPUINFO, kernels_build: Callable[[], bool] = _kernels_build
) -> str:
    """bfloat16 where the hardware or our kernels multiply it, else float32."""
    flags = cpu_flags(cpuinfo)
    if on_gpu or _BFLOAT16_FLAGS & flags:
        return "bfloat16"
    # A compiler that is there and fails must not leave torch with a precision that it emulates.
    kernels = flags >= KERNEL_FLAGS and compiler() is not None and kernels_build()
    return "bfloat16" if kernels else "float32"


def compiler() -> str | None:
    """The C compiler of this machine; None where there is none."""
    return shutil.which("cc") or shutil.which("gcc")


def cpu_flags(cpuinfo: Path = _CPUINFO) -> frozenset[str]:
    """What this CPU can do, in the kernel's words; empty where it does not tell."""
    try:
        text = cpuinfo.read_text()
    except OSError:
        return frozenset()
    lines = (line.partition(":") for line in text.splitlines())
    flags = next((v for key, _, v in lines if key.strip().lower() in ("flags", "features")), "")
    return frozenset(flags.split())
