"""Which precision `--dtype auto` means on this machine. No torch here: a coordinator asks too."""

from __future__ import annotations

import shutil
from pathlib import Path

_CPUINFO = Path("/proc/cpuinfo")
_BFLOAT16_FLAGS = frozenset(("avx512_bf16", "amx_bf16", "bf16"))  # the last is Arm's
# What our kernels are compiled for (engine/native): all of them, or torch computes.
KERNEL_FLAGS = frozenset(("avx512_vnni", "avx512f", "avx512bw", "avx512dq", "avx512vl", "f16c"))


def auto_dtype(*, on_gpu: bool, cpuinfo: Path = _CPUINFO) -> str:
    """bfloat16 where the hardware or our kernels multiply it, else float32."""
    flags = cpu_flags(cpuinfo)
    kernels = flags >= KERNEL_FLAGS and compiler() is not None
    return "bfloat16" if on_gpu or kernels or _BFLOAT16_FLAGS & flags else "float32"


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


def has_gpu() -> bool:
    """Whether this machine seems to have an NVIDIA GPU; a worker asks torch, which knows."""
    return shutil.which("nvidia-smi") is not None
