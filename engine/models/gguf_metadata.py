"""A GGUF file's metadata as the architectures' files read them. No torch, no numpy.

engine/checkpoint/gguf.py writes the keys of `config.json` that all decoders share; the architecture
adds its own (`Architecture.gguf_keys`), which take precedence.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.base.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class GGUFMetadata:
    """Checked access to the keys below the architecture's name; errors name file and key."""

    path: Path
    architecture: str  # the format's name: llama, gemma3, ...
    values: Mapping[str, Any]  # by whole keys; floats are the shortest decimals of their float32
    shapes: Mapping[str, tuple[int, ...]]  # of the tensors, [outputs, inputs]
    rope_factors: Mapping[str, tuple[float, ...]]  # tensors "rope_*.weight": they become keys

    def get(self, key: str, default: Any = None) -> Any:
        """The value of `<architecture>.<key>`, unchecked."""
        value = self.values.get(f"{self.architecture}.{key}")
        return default if value is None else value

    def integer(self, key: str, default: int | None = None) -> int:
        """A whole number above zero. Raises CheckpointError."""
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
            raise CheckpointError(
                f"{self.path}: {self.architecture}.{key} must be a whole number above zero, "
                f"not {value!r}"
            )
        return value

    def number(self, key: str, default: float) -> float:
        """A number. Raises CheckpointError."""
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise CheckpointError(
                f"{self.path}: {self.architecture}.{key} must be a number, not {value!r}"
            )
        return float(value)

    def head_dim(self) -> int:
        """The size of a head."""
        whole = self.integer("embedding_length") // self.integer("attention.head_count")
        return self.integer("attention.key_length", whole)

    def rotary_share(self) -> float:
        """`partial_rotary_factor`."""
        return self.integer("rope.dimension_count", self.head_dim()) / self.head_dim()

    def windows(self, period: int, window: int = 0) -> dict[str, Any]:
        """`sliding_window` and `layer_types`.

        The file lists the layers with a window, or gives a period of layers whose last one sees
        everything, or leaves it to the architecture: `period`, and `window` for the size. Without
        a window all layers see everything.
        """
        num_layers = self.integer("block_count")
        window = self.get("attention.sliding_window", window)
        pattern = self.get("attention.sliding_window_pattern", period)
        if isinstance(pattern, int):
            pattern = [(i + 1) % max(pattern, 1) != 0 for i in range(num_layers)]
        if not isinstance(pattern, list) or len(pattern) != num_layers:
            key = f"{self.architecture}.attention.sliding_window_pattern"
            raise CheckpointError(f"{self.path}: {key} must have one value for each layer")
        kinds = [
            "sliding_attention" if window and windowed else "full_attention" for windowed in pattern
        ]
        return {"sliding_window": window or None, "layer_types": kinds}


def no_keys(file: GGUFMetadata) -> dict[str, Any]:
    """For an architecture whose `config.json` has the shared keys alone."""
    del file
    return {}
