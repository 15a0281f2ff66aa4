"""C kernels for the CPU: compiled once on the machine that runs them, called through ctypes.

`kernels()` gives None where there is no compiler or the CPU lacks the instructions; callers then
use torch. The shared object is kept under the cache folder, named by a digest of sources, compiler
and CPU flags, and appears by one rename, so that workers may start at once.

    decoder.c      one call a step: rows in, logits out; KV written on the way
    matmul.c       packed and dense products      attention.c   paged attention
    threads.c      loops over cores that local workers share
    sampling.c     tokens from logits             logprobs.c    their log-probabilities
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from engine.config import cache_dir
from engine.precision import KERNEL_FLAGS, compiler, cpu_flags
from engine.telemetry.log import get_logger

_log = get_logger(__name__)
_FOLDER = Path(__file__).parent
# No contraction: an expression must round the same wherever the compiler put it.
_FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-shared", "-fPIC", "-pthread")
_LIBRARIES = ("-lm",)
_COMPILE_S = 120.0


@dataclass(frozen=True, slots=True)
class Kernels:
    """The loaded library."""

    library: ctypes.CDLL


@cache
def kernels() -> Kernels | None:
    """The kernels for this CPU, compiled on the first call on a machine; None where there are none.

    Never raises: everything here has a slower way in torch.
    """
    command, flags = compiler(), cpu_flags()
    if command is None or not flags >= KERNEL_FLAGS:
        _log.info("no native kernels", compiler=command, missing=sorted(KERNEL_FLAGS - flags))
        return None
    try:
        return Kernels(ctypes.CDLL(str(_compiled(command, flags))))
    except (OSError, subprocess.SubprocessError) as error:
        _log.warning("native kernels could not be built, using torch", reason=_reason(error))
        return None


def _reason(error: Exception) -> str:
    said = getattr(error, "stderr", None)
    return said.decode(errors="replace")[-2000:] if said else str(error)


def _compiled(compiler: str, flags: frozenset[str]) -> Path:
    """The shared object for these sources, compiler and CPU; compiled if it is not there yet."""
    version = subprocess.run(
        [compiler, "--version"], capture_output=True, timeout=_COMPILE_S, check=True
    ).stdout
    key = hashlib.blake2b(digest_size=8)
    sources = sorted(_FOLDER.glob("*.c"))
    texts = [path.read_bytes() for path in [*sources, *sorted(_FOLDER.glob("*.h"))]]
    for part in (*texts, version, repr((_FLAGS, sorted(flags))).encode()):
        key.update(part)
    path = cache_dir() / "native" / f"kernels-{key.hexdigest()}.so"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        part_path = path.with_suffix(f".{os.getpid()}.part")
        command = [compiler, *_FLAGS, "-o", str(part_path), *map(str, sources), *_LIBRARIES]
        subprocess.run(command, capture_output=True, timeout=_COMPILE_S, check=True)
        part_path.rename(path)
    return path
