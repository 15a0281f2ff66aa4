"""Which precision `--dtype auto` means on this machine. No torch here: a coordinator asks too."""

from __future__ import annotations

import shutil
from pathlib import Path

_CPUINFO = Path("/proc/cpuinfo")
_BFLOAT16_FLAGS = frozenset(("avx512_bf16", "amx_bf16", "bf16"))  # the last is Arm's


def auto_dtype(*, on_gpu: bool, cpuinfo: Path = _CPUINFO) -> str:
    """bfloat16 where the hardware multiplies it, else float32."""
    if on_gpu:
        return "bfloat16"
    return "bfloat16" if _BFLOAT16_FLAGS & cpu_flags(cpuinfo) else "float32"


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
