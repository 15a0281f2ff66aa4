"""The Llama family's forward pass over a paged KV cache: Llama, Mistral, Qwen2, SmolLM2.

A model is its configuration and its weights; batch, cache and attention backend are handed in, so
two models (a target and a drafter) can run side by side.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F

from engine.attention.base import AttentionBackend
from engine.attention.batch import Batch
from engine.cache.kv_cache import KVCache
from engine.checkpoint.config import ModelConfig
from engine.models.layers import LayerWeights, ModelWeights, logits, mlp, rms_norm
from engine.models.rope import make_rope, rotate


class LlamaModel:
    """A decoder; immutable after construction."""

    def __init__(self, config: ModelConfig, weights: ModelWeights) -> None:
        """Raises CheckpointError for a rotary scaling that is not known."""
        self.config = config
        self.weights = weights
        self.rope = make_rope(config, weights.embedding.device)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.weights.embedding.device

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and activations."""
        return self.weights.embedding.dtype

    def first_layers(self, num_layers: int) -> LlamaModel:
        """This model without its later layers: shares the weights, norm and head included."""
        if not 1 <= num_layers <= self.config.num_layers:
            raise ValueError(f"num_layers must be 1 to {self.config.num_layers}")
        config = dataclasses.replace(self.config, num_layers=num_layers)
        layers = self.weights.layers[:num_layers]
        return LlamaModel(config, dataclasses.replace(self.weights, layers=layers))

    def forward(
        self, batch: Batch, kv_cache: KVCache, backend: AttentionBackend[Any]
    ) -> torch.Tensor:
        """Write the batch's KV; return logits fp32 [S, vocab] of tokens batch.logit_index."""
        plan = backend.plan(batch)
        cos, sin = self.rope.tables(batch.positions)
        x = F.embedding(batch.token_ids, self.weights.embedding)  # [T, hidden]
        eps, last = self.config.rms_norm_eps, len(self.weights.layers) - 1
        for index, layer in enumerate(self.weights.layers):
            q, k, v = self._qkv(rms_norm(x, layer.input_norm, eps), layer, cos, sin)
            kv_cache.write(index, batch.blocks, batch.offsets, k, v)
            if index == last and batch.num_logits == 0:
                break  # nobody reads what comes after the last layer's KV
            attended = backend.run(plan, index, q, kv_cache).flatten(1)
            x = x + F.linear(attended, layer.out, layer.out_bias)
            x = x + mlp(rms_norm(x, layer.mlp_norm, eps), layer)
        if batch.num_logits == 0:
            return torch.empty(0, self.config.vocab_size, dtype=torch.float32, device=self.device)
        wanted = x.index_select(0, batch.logit_index)
        return logits(rms_norm(wanted, self.weights.norm, eps), self.weights.head)

    def _qkv(
        self, x: torch.Tensor, layer: LayerWeights, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q [T, num_heads, head_dim] and k, v [T, num_kv_heads, head_dim] of x; q, k rotated."""
        c = self.config
        heads = F.linear(x, layer.qkv, layer.qkv_bias).view(
            -1, c.num_heads + 2 * c.num_kv_heads, c.head_dim
        )
        turned = rotate(heads[:, : c.num_heads + c.num_kv_heads], cos, sin)
        return (
            turned[:, : c.num_heads],
            turned[:, c.num_heads :],
            heads[:, c.num_heads + c.num_kv_heads :],
        )
