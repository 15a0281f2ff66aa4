"""Rounding to bfloat16 in the kernels equals torch's, on any CPU that they run on."""

import ctypes
import subprocess
from pathlib import Path

import pytest
import torch

import engine.kernels
from engine.base.cpu_features import compiler
from engine.kernels import kernels

SOURCE = """
#include "simd.h"
void narrow_all(bf16 *to, const float *from, long count) {
    for (long i = 0; i < count; i += 16) narrow(to + i, _mm512_loadu_ps(from + i));
}
void round_all(float *to, const float *from, long count) {
    for (long i = 0; i < count; i += 16)
        _mm512_storeu_ps(to + i, rounded(_mm512_loadu_ps(from + i)));
}
"""


@pytest.mark.skipif(kernels() is None, reason="needs a C compiler and a CPU with AVX512 and VNNI")
def test_rounding_is_torchs(tmp_path: Path) -> None:
    source, library = tmp_path / "round.c", tmp_path / "round.so"
    source.write_text(SOURCE)
    include = Path(engine.kernels.__file__).parent
    command = [str(compiler()), "-O2", "-march=native", "-shared", "-fPIC", f"-I{include}"]
    subprocess.run([*command, "-o", str(library), str(source)], check=True, timeout=60)
    loaded = ctypes.CDLL(str(library))
    # Every upper half with lower halves around the tie; subnormals, infinities and NaN included.
    halves = torch.arange(1 << 16, dtype=torch.int64) << 16
    lows = torch.tensor([0x0000, 0x0001, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    bits = (halves[:, None] + lows).flatten()
    values = torch.where(bits >= 1 << 31, bits - (1 << 32), bits).int().view(torch.float32)
    got = torch.empty(len(values), dtype=torch.bfloat16)
    wide = torch.empty_like(values)
    count = ctypes.c_long(len(values))
    for name, to in (("narrow_all", got), ("round_all", wide)):
        getattr(loaded, name)(
            ctypes.c_void_p(to.data_ptr()), ctypes.c_void_p(values.data_ptr()), count
        )
    want = values.bfloat16()
    number = ~want.isnan()
    assert torch.equal(got.view(torch.int16)[number], want.view(torch.int16)[number])
    assert torch.equal(wide[number], want.float()[number])
    assert got[~number].isnan().all()
    assert wide[~number].isnan().all()
