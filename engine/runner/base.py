"""The seam between the step loop, or a drafter, and a model on its device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from engine.attention.batch import Row


class ModelRunner(Protocol):
    """Computes rows over the paged cache; on return every KV write of the step is complete."""

    def run(self, rows: Sequence[Row]) -> torch.Tensor:
        """Logits [num_logits of all rows, vocab] float32."""
        ...
