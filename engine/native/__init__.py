"""C kernels for the CPU: compiled once on the machine that runs them, called through ctypes.

`kernels()` gives None where there is no compiler or the CPU lacks AVX512-BF16; callers then use
torch. The shared object is kept under the cache folder, named by a digest of source, compiler and
CPU flags, and appears by one rename, so that workers may start at once.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from engine.config import cache_dir
from engine.precision import cpu_flags
from engine.telemetry.log import get_logger

_log = get_logger(__name__)
_FOLDER = Path(__file__).parent
_FLAGS = ("-O3", "-march=native", "-fopenmp", "-shared", "-fPIC")
_LIBRARIES = ("-lm",)
_NEEDED = {"avx512_bf16", "avx512f", "avx512bw", "avx512vl"}
_COMPILE_S = 120.0


@dataclass(frozen=True, slots=True)
class Kernels:
    """The loaded library."""

    library: ctypes.CDLL

    def linear(
        self,
        kind: str,
        packed: torch.Tensor,
        scales: torch.Tensor,
        x: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        """out [M, N] = x [M, K] bfloat16, contiguous, times the packed weight transposed.

        `kind` is "q4_1" or "q8_0", `packed` and `scales` are laid out as kernels.c says; `out` is
        bfloat16 or float32, contiguous.
        """
        narrow = int(out.dtype is torch.bfloat16)
        pointers = [ctypes.c_void_p(t.data_ptr()) for t in (packed, scales, x, out)]
        call = self.library[f"diptych_linear_{kind}"]
        call(*pointers, narrow, *x.shape, out.shape[1], torch.get_num_threads())

    def attention(
        self,
        layer: torch.Tensor,
        block_tables: torch.Tensor,
        query_start: torch.Tensor,
        context_lens: torch.Tensor,
        q: torch.Tensor,
        group: int,
        window: int,
    ) -> torch.Tensor:
        """Causal attention of q [T, heads, head_dim] over one layer of the pool; same shape.

        `layer` is [num_blocks, 2, kv_heads, block_size, head_dim], a strided view; the index arrays
        are int64: [R, max_blocks], [R + 1], [R]. `window` 0: every query sees all before it.
        """
        out = torch.empty_like(q)
        _, _, kv_heads, block_size, head_dim = layer.shape
        failed = self.library.diptych_attention(
            ctypes.c_void_p(layer.data_ptr()),
            ctypes.c_int64(layer.stride(0)),
            ctypes.c_void_p(block_tables.data_ptr()),
            ctypes.c_int64(block_tables.stride(0)),
            *(ctypes.c_void_p(t.data_ptr()) for t in (query_start, context_lens, q, out)),
            *(len(context_lens), kv_heads, group, head_dim, block_size, window),
            ctypes.c_float(head_dim**-0.5),
            torch.get_num_threads(),
        )
        if failed:
            raise MemoryError("no memory for attention scores")
        return out

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """x [T, width] bfloat16 over its root mean square, times weight; in fp32, rounded once."""
        x, out = x.contiguous(), torch.empty_like(x)
        pointers = [ctypes.c_void_p(t.data_ptr()) for t in (x, weight, out)]
        self.library.diptych_rms_norm(*pointers, *x.shape, ctypes.c_float(eps))
        return out

    @property
    def max_columns(self) -> int:
        """The widest input that `linear` takes."""
        return int(self.library.diptych_max_columns())


@cache
def kernels() -> Kernels | None:
    """The kernels for this CPU, compiled on the first call on a machine; None where there are none.

    Never raises: everything here has a slower way in torch.
    """
    compiler = shutil.which("cc") or shutil.which("gcc")
    flags = cpu_flags()
    if compiler is None or not flags >= _NEEDED:
        _log.info("no native kernels", compiler=compiler, missing=sorted(_NEEDED - flags))
        return None
    try:
        return Kernels(ctypes.CDLL(str(_compiled(compiler, flags))))
    except (OSError, subprocess.SubprocessError) as error:
        _log.warning("native kernels could not be built, using torch", reason=str(error))
        return None


def _compiled(compiler: str, flags: frozenset[str]) -> Path:
    """The shared object for this source, compiler and CPU; compiled if it is not there yet."""
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
