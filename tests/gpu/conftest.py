"""Where the FlashInfer backend runs: on a GPU, or else on the CPU with the kernels replaced."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from unittest import mock

import pytest
import torch

from tests.support.flashinfer_cpu import flashinfer_on_cpu
from tests.support.flashinfer_kernels import Launches


def _needs_flashinfer() -> None:
    if find_spec("flashinfer") is None:
        pytest.skip("needs flashinfer (`make test` installs it)")


@pytest.fixture
def flashinfer_kernels(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launches]:
    """FlashInfer without a GPU, and which of its kernels ran."""
    _needs_flashinfer()
    small = mock.patch("engine.attention.flashinfer_backend.WORKSPACE_BYTES", 4 << 20)
    with flashinfer_on_cpu(tmp_path_factory.getbasetemp()) as launches, small:
        yield launches


@pytest.fixture
def flashinfer_device(request: pytest.FixtureRequest) -> torch.device:
    """A GPU, or else the CPU with FlashInfer's kernels replaced."""
    _needs_flashinfer()
    if torch.cuda.is_available():
        return torch.device("cuda:0")
    request.getfixturevalue("flashinfer_kernels")
    return torch.device("cpu")
