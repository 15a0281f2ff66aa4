"""Finds the GPUs of this machine without torch, and assigns them to local workers.

    GPUs                        GPU-a                  GPU-b
    as many workers             prefill-0              decode-0
    more workers than GPUs      prefill-0, decode-1    decode-0      equal shares of a GPU

CUDA and nvidia-smi may number GPUs differently, so GPUs are identified by UUID.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from engine.base.options import visible_devices

_PROC = Path("/proc/driver/nvidia/gpus")
_SMI_S = 20.0  # without the persistence daemon nvidia-smi loads the driver first
_UUID = re.compile(r"(?:UUID:\s*)((?:GPU|MIG)-[0-9A-Za-z/-]+)")


@dataclass(frozen=True, slots=True)
class GpuPart:
    """A worker's GPU in the form of CUDA_VISIBLE_DEVICES, and how many workers share it."""

    device: str
    num_sharing: int


def find_gpus(
    visible: str | Callable[[], str | None] | None = visible_devices,
    list_gpus: Callable[[], str | None] | None = None,
    proc: Path = _PROC,
) -> list[str]:
    """The GPUs that CUDA would show this process, in its order; [] if there are none.

    `visible` is CUDA_VISIBLE_DEVICES, or None if unset; `list_gpus` returns `nvidia-smi -L`.
    """
    text = (list_gpus or _nvidia_smi)()
    present = _parse_list(text) if text is not None else _parse_proc(proc)
    chosen = visible() if callable(visible) else visible
    if chosen is None or not present:
        return present
    names = (part.strip() for part in chosen.split(","))
    # CUDA ignores an unknown name and all that follow.
    return list(takewhile(lambda name: _exists(name, present), names))


def _exists(name: str, present: Sequence[str]) -> bool:
    """Whether `name` is an index of the list, or (a prefix of) a UUID."""
    if name.isdecimal():
        return int(name) < len(present)
    return name.startswith(("GPU-", "MIG-"))


def deal_gpus(gpus: Sequence[str], workers: Sequence[str]) -> dict[str, GpuPart]:
    """Each worker's GPU, round-robin; {} without GPUs."""
    if not gpus:
        return {}
    assigned = {worker: gpus[i % len(gpus)] for i, worker in enumerate(workers)}
    devices = list(assigned.values())
    return {worker: GpuPart(gpu, devices.count(gpu)) for worker, gpu in assigned.items()}


def _parse_list(text: str) -> list[str]:
    """One line a GPU; the lines of its MIG instances follow, and CUDA shows only those."""
    found: list[str] = []
    parent = ""
    for line in text.splitlines():
        match = _UUID.search(line)
        if match is None:
            continue
        if match[1].startswith("GPU-"):
            parent = match[1]
        elif found and found[-1] == parent:
            found.pop()
        found.append(match[1])
    return found


def _parse_proc(folder: Path) -> list[str]:
    """The driver's list, for machines without nvidia-smi; indices for GPUs without UUID."""
    found = []
    try:
        for index, gpu in enumerate(sorted(folder.iterdir())):
            match = _UUID.search((gpu / "information").read_text())
            found.append(match[1] if match else str(index))
    except OSError:
        return []
    return found


def _nvidia_smi() -> str | None:
    """The output of `nvidia-smi -L`; None if it cannot run or finds no driver."""
    try:
        done = subprocess.run(
            ["nvidia-smi", "-L"], capture_output=True, text=True, timeout=_SMI_S, check=False
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout if done.returncode == 0 else None
