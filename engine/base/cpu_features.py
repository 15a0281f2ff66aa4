"""Features of this CPU, and the C compiler of this machine. Standard library only."""

from __future__ import annotations

import shutil
from pathlib import Path

from engine.base.memory import text_of

CPUINFO = Path("/proc/cpuinfo")
# The kernels (engine/kernels) need all of these flags; without them torch computes.
KERNEL_FLAGS = frozenset(("avx512_vnni", "avx512f", "avx512bw", "avx512dq", "avx512vl", "f16c"))


def compiler() -> str | None:
    """The path of this machine's C compiler, or None."""
    return shutil.which("cc") or shutil.which("gcc")


def cpu_flags(cpuinfo: Path = CPUINFO) -> frozenset[str]:
    """The CPU's flags as /proc/cpuinfo lists them; empty if it lists none."""
    lines = (line.partition(":") for line in text_of(cpuinfo).splitlines())
    flags = next((v for key, _, v in lines if key.strip().lower() in ("flags", "features")), "")
    return frozenset(flags.split())
