"""Weights of a Llama-family model from safetensors shards in Hugging Face's names, or from a seed.

The joined tensors are allocated first and the files' are copied into their places one by one, so
the peak is the model plus one tensor. Each must be expected, present once and of the right shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from engine.base.errors import CheckpointError
from engine.checkpoint.config import ModelConfig
from engine.models.layers import LayerWeights, ModelWeights
from engine.models.llama import LlamaModel
from engine.telemetry.progress import Bar, bar

# Buffers that old exports carry and that follow from the configuration.
_IGNORED = ("rotary_emb.inv_freq",)
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class _Places:
    """An empty model, and the place in it of every tensor of the files."""

    weights: ModelWeights
    by_name: dict[str, torch.Tensor]


class _Allocator:
    """Hands out empty tensors and remembers under which names the files fill them."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._dtype, self._device = dtype, device
        self.by_name: dict[str, torch.Tensor] = {}

    def tensor(self, name: str, *shape: int) -> torch.Tensor:
        """One tensor of the file."""
        self.by_name[name] = torch.empty(*shape, dtype=self._dtype, device=self._device)
        return self.by_name[name]

    def linear(
        self, names: Sequence[str], sizes: Sequence[int], num_inputs: int, bias: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Weight and bias of projections joined along their outputs, in the order of `names`."""
        weight = self._joined(names, "weight", sizes, (num_inputs,))
        return weight, self._joined(names, "bias", sizes, ()) if bias else None

    def _joined(
        self, names: Sequence[str], kind: str, sizes: Sequence[int], inner: tuple[int, ...]
    ) -> torch.Tensor:
        whole = torch.empty(sum(sizes), *inner, dtype=self._dtype, device=self._device)
        first = 0
        for name, size in zip(names, sizes, strict=True):
            self.by_name[f"{name}.{kind}"] = whole[first : first + size]
            first += size
        return whole


def _allocate(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> _Places:
    c, new = config, _Allocator(dtype, device)
    q_size, kv_size = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    qkv_sizes, gate_up_sizes = (q_size, kv_size, kv_size), (c.intermediate_size,) * 2
    layers = []
    for i in range(c.num_layers):
        at = f"model.layers.{i}"
        qkv_names = [f"{at}.self_attn.{x}_proj" for x in "qkv"]
        gate_up_names = [f"{at}.mlp.{x}_proj" for x in ("gate", "up")]
        qkv, qkv_bias = new.linear(qkv_names, qkv_sizes, c.hidden_size, c.attention_bias)
        out, out_bias = new.linear(
            [f"{at}.self_attn.o_proj"], [c.hidden_size], q_size, c.output_bias
        )
        gate_up, gate_up_bias = new.linear(gate_up_names, gate_up_sizes, c.hidden_size, c.mlp_bias)
        down, down_bias = new.linear(
            [f"{at}.mlp.down_proj"], [c.hidden_size], c.intermediate_size, c.mlp_bias
        )
        layers.append(
            LayerWeights(
                input_norm=new.tensor(f"{at}.input_layernorm.weight", c.hidden_size),
                qkv=qkv,
                qkv_bias=qkv_bias,
                out=out,
                out_bias=out_bias,
                mlp_norm=new.tensor(f"{at}.post_attention_layernorm.weight", c.hidden_size),
                gate_up=gate_up,
                gate_up_bias=gate_up_bias,
                down=down,
                down_bias=down_bias,
            )
        )
    norm = new.tensor("model.norm.weight", c.hidden_size)
    embedding = new.tensor("model.embed_tokens.weight", c.vocab_size, c.hidden_size)
    head = embedding
    if not c.tie_word_embeddings:
        head = new.tensor("lm_head.weight", c.vocab_size, c.hidden_size)
    return _Places(ModelWeights(embedding, tuple(layers), norm, head), new.by_name)


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a checkpoint of this architecture must hold."""
    places = _allocate(config, torch.float32, torch.device("meta"))
    return {name: tuple(place.shape) for name, place in places.by_name.items()}


def _fill(place: torch.Tensor, name: str, tensor: torch.Tensor) -> None:
    """Copy one tensor of a file to its place; the error does not know the file."""
    if tensor.shape != place.shape:
        raise CheckpointError(
            f"tensor {name} has shape {list(tensor.shape)}, expected {list(place.shape)}"
        )
    if tensor.dtype not in _FLOATS:
        raise CheckpointError(f"tensor {name} has type {tensor.dtype}, expected plain floats")
    place.copy_(tensor)


def _load_shard(
    path: Path, config: ModelConfig, places: _Places, filled: dict[str, Path], shown: Bar
) -> None:
    """Copy a shard's tensors to their places and note in `filled` where they came from."""
    with safe_open(path, framework="pt") as shard:
        for name in shard.offset_keys():
            tied = config.tie_word_embeddings and name == "lm_head.weight"
            if tied or name.endswith(_IGNORED):
                continue
            if name not in places.by_name:
                raise CheckpointError(f"unexpected tensor {name} in a {config.architecture}")
            if name in filled:
                raise CheckpointError(f"tensor {name} is in {filled[name]} already")
            _fill(places.by_name[name], name, shard.get_tensor(name))
            filled[name] = path
            shown.update()


def load_model(
    config: ModelConfig,
    shard_paths: Sequence[Path],
    dtype: torch.dtype,
    device: torch.device,
    progress: bool = True,
) -> LlamaModel:
    """Read the shards into a model. Raises CheckpointError naming the file and the tensor.

    `progress` shows how far it is on standard error.
    """
    places = _allocate(config, dtype, device)
    filled: dict[str, Path] = {}
    num_tensors = len(places.by_name)
    with bar(total=num_tensors, desc="Loading weights", unit="tensor", show=progress) as shown:
        for path in shard_paths:
            try:
                _load_shard(path, config, places, filled, shown)
            except CheckpointError as error:
                raise CheckpointError(f"{path}: {error.message}") from None
            except FileNotFoundError:
                raise CheckpointError(f"{path}: no such file") from None
            except (SafetensorError, OSError) as error:
                raise CheckpointError(
                    f"{path}: not a readable safetensors file ({error})"
                ) from None
    missing = [name for name in places.by_name if name not in filled]
    if missing:
        files = ", ".join(str(path) for path in shard_paths) or "no files"
        raise CheckpointError(f"{files}: tensor {missing[0]} is missing ({len(missing)} in all)")
    return LlamaModel(config, places.weights)


def random_model(
    config: ModelConfig,
    seed: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
) -> LlamaModel:
    """For tests: weights drawn in fp32 from `seed`, the same (rounded) in every dtype."""
    places = _allocate(config, dtype, device or torch.device("cpu"))
    generator = torch.Generator().manual_seed(seed)
    for name, place in places.by_name.items():
        noise = torch.randn(place.shape, generator=generator)
        if "norm" in name:
            noise = 1 + 0.1 * noise
        elif name.endswith(".bias"):
            noise = 0.1 * noise
        elif "embed_tokens" not in name:
            noise = noise * place.shape[-1] ** -0.5
        place.copy_(noise)
    return LlamaModel(config, places.weights)
