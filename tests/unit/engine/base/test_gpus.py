"""GPUs as the driver's tools list them, and their assignment to workers."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.base.gpus import GpuPart, deal_gpus, find_gpus

TWO = """GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-5f27e9b2-0000-1111-2222-aaaaaaaaaaaa)
GPU 1: NVIDIA H100 80GB HBM3 (UUID: GPU-81c0d9b2-0000-1111-2222-bbbbbbbbbbbb)
"""
A, B = "GPU-5f27e9b2-0000-1111-2222-aaaaaaaaaaaa", "GPU-81c0d9b2-0000-1111-2222-bbbbbbbbbbbb"
MIG = """GPU 0: NVIDIA A100 (UUID: GPU-a)
  MIG 3g.20gb     Device  0: (UUID: MIG-a1)
  MIG 3g.20gb     Device  1: (UUID: MIG-a2)
GPU 1: NVIDIA A100 (UUID: GPU-b)
"""
NOWHERE = Path("/nowhere")


def found(text: str | None, visible: str | None = None, proc: Path = NOWHERE) -> list[str]:
    return find_gpus(visible, lambda: text, proc)


def test_gpus_are_named_by_uuid() -> None:
    assert found(TWO) == [A, B]
    assert found(MIG) == ["MIG-a1", "MIG-a2", "GPU-b"]
    assert found(None) == found("No devices found.\n") == []


def test_the_drivers_folder_is_used_without_nvidia_smi(tmp_path: Path) -> None:
    for place, text in (("0000:17:00.0", f"Model: H100\nGPU UUID: \t {A}\n"), ("0000:65:00.0", "")):
        (tmp_path / place).mkdir()
        (tmp_path / place / "information").write_text(text)
    assert found(None, proc=tmp_path) == [A, "1"]
    assert found("", proc=tmp_path) == [], "the tool knows better"


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        ("1", ["1"]),
        ("1,0", ["1", "0"]),
        (f" {B} , 0", [B, "0"]),
        ("", []),
        ("-1", []),
        ("0,-1,1", ["0"]),
        ("NoDevFiles", []),
        ("none", []),
        ("2", []),
        ("0,7,1", ["0"]),
        ("GPU-5f27", ["GPU-5f27"]),
        ("MIG-GPU-a/1/0", ["MIG-GPU-a/1/0"]),
    ],
)
def test_only_visible_devices_are_used(visible: str, expected: list[str]) -> None:
    assert found(TWO, visible) == expected
    assert found(None, visible) == [], "without a driver there is none"


def test_the_variable_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert find_gpus(list_gpus=lambda: TWO, proc=NOWHERE) == ["1"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert find_gpus(list_gpus=lambda: TWO, proc=NOWHERE) == [A, B]


def test_gpus_are_assigned_round_robin() -> None:
    names = ["prefill-0", "decode-0"]
    assert deal_gpus([A, B], names) == {"prefill-0": GpuPart(A, 1), "decode-0": GpuPart(B, 1)}
    assert deal_gpus([A], names) == {"prefill-0": GpuPart(A, 2), "decode-0": GpuPart(A, 2)}
    dealt = deal_gpus([A, B], ["prefill-0", "decode-0", "decode-1"])
    assert dealt["decode-1"] == dealt["prefill-0"] == GpuPart(A, 2)
    assert dealt["decode-0"] == GpuPart(B, 1)
    assert deal_gpus([], names) == {}
