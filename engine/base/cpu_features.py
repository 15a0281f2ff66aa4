"""What this CPU can do. Standard library only."""

from __future__ import annotations

import shutil
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
# What our kernels are compiled for (engine/kernels): all of them, or torch computes.
KERNEL_FLAGS = frozenset(("avx512_vnni", "avx512f", "avx512bw", "avx512dq", "avx512vl", "f16c"))


def compiler() -> str | None:
    """The C compiler of this machine; None where there is none."""
    return shutil.which("cc") or shutil.which("gcc")


def cpu_flags(cpuinfo: Path = CPUINFO) -> frozenset[str]:
    """What this CPU can do, in the kernel's words; empty where it does not tell."""
    try:
        text = cpuinfo.read_text()
    except OSError:
        return frozenset()
    lines = (line.partition(":") for line in text.splitlines())
    flags = next((v for key, _, v in lines if key.strip().lower() in ("flags", "features")), "")
    return frozenset(flags.split())
