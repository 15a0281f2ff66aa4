"""The GPUs of this machine without torch, and which local worker gets which.

    gpus      GPU-a        GPU-b                      CUDA_VISIBLE_DEVICES of each worker
    workers   prefill-0    decode-0                   one each
              prefill-0, decode-1    decode-0         more workers than GPUs: equal parts of one

CUDA and nvidia-smi may number GPUs differently: a UUID names the same one to both.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from engine.base.options import visible_devices

_PROC = Path("/proc/driver/nvidia/gpus")
_SMI_S = 20.0  # without the persistence daemon the driver loads first
_UUID = re.compile(r"(?:UUID:\s*)((?:GPU|MIG)-[0-9A-Za-z/-]+)")


@dataclass(frozen=True, slots=True)
class GpuPart:
    """A worker's GPU, as CUDA_VISIBLE_DEVICES names it, and how many workers share it."""

    device: str
    num_sharing: int


def find_gpus(
    visible: str | Callable[[], str | None] | None = visible_devices,
    list_gpus: Callable[[], str | None] | None = None,
    proc: Path = _PROC,
) -> list[str]:
    """The GPUs that CUDA would show this process, in its order; [] where there are none.

    `visible` is CUDA_VISIBLE_DEVICES, None where it is unset; `list_gpus` gives `nvidia-smi -L`.
    """
    text = (list_gpus or _nvidia_smi)()
    present = _parse_list(text) if text is not None else _parse_proc(proc)
    chosen = visible() if callable(visible) else visible
    if chosen is None or not present:
        return present
    names = []
    for name in (part.strip() for part in chosen.split(",")):
        if not _exists(name, present):  # CUDA takes what comes before such a name
            break
        names.append(name)
    return names


def _exists(name: str, present: Sequence[str]) -> bool:
    """A number in the list, or a UUID, of which the beginning will do."""
    if name.isdecimal():
        return int(name) < len(present)
    return name.startswith(("GPU-", "MIG-"))


def deal_gpus(gpus: Sequence[str], workers: Sequence[str]) -> dict[str, GpuPart]:
    """Each worker's GPU, in turns; {} without GPUs."""
    if not gpus:
        return {}
    dealt = {worker: gpus[i % len(gpus)] for i, worker in enumerate(workers)}
    devices = list(dealt.values())
    return {worker: GpuPart(gpu, devices.count(gpu)) for worker, gpu in dealt.items()}


def _parse_list(text: str) -> list[str]:
    """A line a GPU; its MIG instances follow it, and then CUDA sees only them."""
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
    """The driver's own list, for machines without nvidia-smi; numbers where it has no UUID."""
    found = []
    try:
        places = sorted(folder.iterdir())
        for index, place in enumerate(places):
            match = _UUID.search((place / "information").read_text())
            found.append(match[1] if match else str(index))
    except OSError:
        return []
    return found


def _nvidia_smi() -> str | None:
    """None where it cannot be run or finds no driver."""
    try:
        done = subprocess.run(
            ["nvidia-smi", "-L"], capture_output=True, text=True, timeout=_SMI_S, check=False
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout if done.returncode == 0 else None
