from pathlib import Path

import pytest
import torch

from engine.base.cpu_features import KERNEL_FLAGS
from engine.kernels.precision import auto_dtype


@pytest.mark.parametrize(
    ("text", "dtype"),
    [
        ("flags\t\t: fpu avx512f avx512_bf16 sse\n", "bfloat16"),
        ("flags\t\t: fpu avx512f avx512_bf16x\n", "float32"),
        ("flags\t\t: " + " ".join(sorted(KERNEL_FLAGS)) + "\n", "bfloat16"),
        ("flags\t\t: " + " ".join(sorted(KERNEL_FLAGS)[1:]) + "\n", "float32"),
        ("Features\t: fp asimd bf16 sve\n", "bfloat16"),
        ("", "float32"),
    ],
)
def test_auto_dtype(tmp_path: Path, text: str, dtype: str) -> None:
    path = tmp_path / "cpuinfo"
    path.write_text(text)
    assert auto_dtype(on_gpu=False, cpuinfo=path, kernels_build=lambda: True) == dtype
    assert auto_dtype(on_gpu=True, cpuinfo=path) == "bfloat16"
    assert auto_dtype(on_gpu=False, cpuinfo=tmp_path / "absent") == "float32"


def test_without_a_compiler_the_kernels_do_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    path = tmp_path / "cpuinfo"
    path.write_text("flags\t\t: " + " ".join(KERNEL_FLAGS))
    assert auto_dtype(on_gpu=False, cpuinfo=path) == "float32"


def test_it_agrees_with_torch_here() -> None:
    known = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    if known:
        assert auto_dtype(on_gpu=False) == "bfloat16"


def test_where_the_kernels_cannot_be_compiled_torch_gets_a_precision_that_it_computes(
    tmp_path: Path,
) -> None:
    path = tmp_path / "cpuinfo"
    path.write_text("flags\t\t: " + " ".join(KERNEL_FLAGS))
    assert auto_dtype(on_gpu=False, cpuinfo=path, kernels_build=lambda: False) == "float32"
    path.write_text("flags\t\t: avx512_bf16 " + " ".join(KERNEL_FLAGS))
    assert auto_dtype(on_gpu=False, cpuinfo=path, kernels_build=lambda: False) == "bfloat16"
