"""FlashInfer's own wrapper classes on CPU tensors: the package's code, all but its kernels.

`JitSpec.build_and_load` compiles a kernel module with nvcc and loads it; here it returns torch code
(`flashinfer_kernels`). What differs from a run on a GPU is in `flashinfer_on_cpu`, nowhere else.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from tests.support.flashinfer_kernels import DecodeModule, Launches, PrefillModule
from tests.support.flashinfer_memory import Compiled, KernelError


@contextlib.contextmanager
def flashinfer_on_cpu(folder: Path) -> Iterator[Launches]:
    """FlashInfer without a GPU; `folder` takes the CUDA source that it generates."""
    # Which GPU to generate source for, as there is none to ask; read at the first import.
    os.environ.setdefault("FLASHINFER_CUDA_ARCH_LIST", "9.0a")
    os.environ.setdefault("FLASHINFER_WORKSPACE_BASE", str(folder))
    from flashinfer import decode, prefill
    from flashinfer.jit.core import JitSpec

    launches, empty = Launches(), torch.empty

    def load(spec: Any) -> DecodeModule | PrefillModule:
        assert all(Path(source).exists() for source in spec.sources), "nothing to compile"
        if "kv_stride_independent" in spec.name:
            raise KernelError("K and V have different strides: that is another module")
        launches.modules.append(spec.name)
        kind = DecodeModule if spec.name.startswith("batch_decode") else PrefillModule
        return kind(Compiled.of(spec.name), launches)

    def unpinned(*args: Any, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        return empty(*args, **options)

    loaders = (decode.get_batch_decode_module, prefill.get_batch_prefill_module)
    with (
        mock.patch.object(JitSpec, "build_and_load", load),
        mock.patch.object(torch, "empty", unpinned),  # a CPU build of torch cannot pin memory
    ):
        for loader in loaders:
            loader.cache_clear()
        try:
            yield launches
        finally:
            for loader in loaders:
                loader.cache_clear()
