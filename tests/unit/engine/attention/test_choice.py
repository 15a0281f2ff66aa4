"""The choice of an attention backend, and the reason in its message."""

from __future__ import annotations

import pytest

from engine.attention import choose_backend
from engine.base.kv_layout import KVLayout


def choose(
    head_dim: int = 128,
    dtype: str = "bfloat16",
    heads: int = 32,
    arch: str = "sm90",
    flashinfer: str | None = "0.7.4",
    sinks: bool = False,
) -> tuple[str, str]:
    layout = KVLayout(2, 8, head_dim, 16, dtype)
    choice = choose_backend(layout, heads, arch=arch, flashinfer=flashinfer, sinks=sinks)
    return str(choice), choice.reason


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("arch", ["sm80", "sm89", "sm90", "sm100", "sm120"])
def test_flashinfer_where_it_has_kernels(head_dim: int, arch: str) -> None:
    assert choose(head_dim, arch=arch)[0] == "flashinfer-0.7.4"
    assert choose(head_dim, "float16", arch=arch)[0] == "flashinfer-0.7.4"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"head_dim": 80}, "heads of 80, but of 64, 128, 256"),
        ({"head_dim": 96}, "heads of 96"),
        ({"head_dim": 512}, "heads of 512"),
        ({"dtype": "float32"}, "float32"),
        ({"heads": 31}, "31 heads are no multiple of 8"),
        ({"arch": "sm75"}, "needs sm80 or later, this GPU is sm75"),
        ({"flashinfer": None}, "not installed"),
        ({"sinks": True}, "attention sinks"),
        ({"arch": ""}, "CPU"),
    ],
)
def test_torch_elsewhere_and_why(change: dict[str, object], reason: str) -> None:
    name, why = choose(**change)  # type: ignore[arg-type]
    assert name.startswith("torch") and reason in why
    assert (name == "torch") == (change == {"arch": ""}), "on a GPU the profile names the version"
