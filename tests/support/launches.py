"""What a step asks of a GPU, counted on the `meta` device: kernels, and copies from the host.

`meta` tensors have shapes and no values: whatever would wait for the GPU (`item`, `nonzero`, a copy
to the host) raises there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# Composite operators that are one kernel on CUDA.
_ONE_KERNEL = {"aten::rms_norm", "aten::linear"}
_FREE = ("aten::empty", "aten::new_empty", "aten::detach", "aten::lift_fresh", "aten::_unsafe_view")


class LaunchCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts while it is entered; `names` are operators that launch, in order."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []
        self.copies = 0  # from the host

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        name = func.name().split(".")[0]
        if name not in _ONE_KERNEL and func.namespace == "aten":
            with self:
                parts = _decompose(func, args, kwargs)
            if parts is not NotImplemented:
                return parts
        out = func(*args, **kwargs)
        given = list(_tensors((args, kwargs)))
        on_gpu = [x.is_meta for x in given]
        if any(x.is_meta for x in _tensors(out)) and given and not all(on_gpu):
            self.copies += not any(on_gpu) or name == "aten::copy_"
            if name not in ("aten::copy_", "aten::_to_copy"):
                raise RuntimeError(f"{name} mixes tensors of the host and of the GPU")
        elif any(on_gpu) and not func.is_view and not name.startswith(_FREE):
            self.names.append(name)
        return out


def _decompose(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """As outside inference mode: a composite operator is what it calls."""
    composite = torch._C.DispatchKey.CompositeImplicitAutograd
    if not func.has_kernel_for_dispatch_key(composite):  # type: ignore[attr-defined]
        return NotImplemented
    return func.decompose(*args, **kwargs)  # type: ignore[attr-defined]


def _tensors(tree: Any) -> list[torch.Tensor]:
    leaves = torch.utils._pytree.tree_leaves(tree)
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
