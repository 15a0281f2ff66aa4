"""A decoder in torch over a paged KV cache: the forward pass of its architecture's file.

A model is its configuration and its weights; batch, cache and attention backend are handed in, so
two models (a target and a drafter) can run side by side.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F

from engine.attention.base import AttentionBackend
from engine.attention.batch import Batch
from engine.cache.kv_cache import KVCache
from engine.models.architecture import Layer, Op, architecture_of
from engine.models.config import NO_ROPE, ModelConfig
from engine.runner.base import Host
from engine.runner.experts import EXPERT_TENSORS, experts_of
from engine.runner.layers import DenseProjection, Norm, capped, gated, logits
from engine.runner.rope import make_ropes, query_growth, rotate
from engine.runner.runner import Runner


class TorchModel:
    """A decoder; immutable after construction."""

    exact = False  # the bits of a token depend on the batch

    def __init__(self, config: ModelConfig, weights: Mapping[str, torch.Tensor]) -> None:
        """`weights`: joined tensors by the names of the architecture's list.

        Raises CheckpointError for a rotary scaling that is not known.
        """
        self.config = config
        self.weights = weights
        self.device, self.dtype = weights["embedding"].device, weights["embedding"].dtype
        self.ropes = make_ropes(config, self.device)
        self._offsets = {s.joined: s.offset for s in architecture_of(config).tensors(config)}
        self.layers = tuple(self._layer(i) for i in range(config.num_layers))
        self.norm = self._norm("norm")
        self.head = weights.get("head", weights["embedding"])
        self._forward = architecture_of(config).forward

    def _layer(self, layer: int) -> Layer:
        """Matrices become projections, vectors norms; a bias belongs to its matrix."""
        prefix, ops = f"{layer}.", dict[str, Op]()
        if experts := experts_of(self.config, self.weights, layer):
            ops["experts"] = experts
        others = {prefix + name for name in (*EXPERT_TENSORS, "sinks")}
        for name, tensor in self.weights.items():
            if not name.startswith(prefix) or name.endswith(".bias") or name in others:
                continue
            if tensor.dim() == 2:
                op: Op = DenseProjection(tensor, self.weights.get(f"{name}.bias"))
            else:
                op = self._norm(name)
            ops[name.removeprefix(prefix)] = op
        return ops

    def _norm(self, name: str) -> Norm:
        return Norm(self.weights[name], self.config.rms_norm_eps, self._offsets[name])

    def first_layers(self, num_layers: int) -> TorchModel:
        """This model without its later layers: shares the weights, norm and head included."""
        if not 1 <= num_layers <= self.config.num_layers:
            raise ValueError(f"num_layers must be 1 to {self.config.num_layers}")
        return TorchModel(dataclasses.replace(self.config, num_layers=num_layers), self.weights)

    def make_runner(self, kv_cache: KVCache, host: Host) -> Runner:
        """A runner over `kv_cache`, with the attention that suits the host's device."""
        return Runner(self, kv_cache, host.attention(self.config, kv_cache))

    def forward(
        self, batch: Batch, plan: Any, kv_cache: KVCache, backend: AttentionBackend[Any]
    ) -> torch.Tensor:
        """Write the batch's KV; return logits fp32 [S, vocab] of tokens batch.logit_index.

        `plan` is the backend's, for this batch.
        """
        return self._forward(_Step(self, batch, plan, kv_cache, backend), self.layers)


class _Step:
    """One forward pass: the Step that an architecture's `forward` is written for."""

    def __init__(
        self,
        model: TorchModel,
        batch: Batch,
        plan: Any,
        kv_cache: KVCache,
        backend: AttentionBackend[Any],
    ) -> None:
        self._model = model
        self._batch = batch
        self._kv_cache = kv_cache
        self._backend = backend
        self._plan = plan
        self._tables = [rope.tables(batch.positions) for rope in model.ropes]
        self._growth = query_growth(model.config, batch.positions)

    def embed(self) -> torch.Tensor:
        x = F.embedding(self._batch.token_ids, self._model.weights["embedding"])
        scale = self._model.config.embedding_scale
        return x if scale == 1.0 else x * scale

    def rotated_heads(
        self, layer: int, qkv: torch.Tensor, q_norm: Op | None, k_norm: Op | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        c = self._model.config
        heads = qkv.view(-1, c.num_heads + 2 * c.num_kv_heads, c.head_dim)
        qk, v = heads[:, : -c.num_kv_heads], heads[:, -c.num_kv_heads :]
        if q_norm is not None and k_norm is not None:
            q, k = qk[:, : c.num_heads], qk[:, c.num_heads :]
            if c.whole_qk_norm:
                q, k = q_norm(q.flatten(1)).view_as(q), k_norm(k.flatten(1)).view_as(k)
            else:
                q, k = q_norm(q), k_norm(k)
            qk = torch.cat((q, k), dim=1)
        if (table := c.rope_of(layer)) != NO_ROPE:
            qk = rotate(qk, *self._tables[table])  # together: a kernel less for each operation
        q = qk[:, : c.num_heads]
        return q if self._growth is None else q * self._growth, qk[:, c.num_heads :], v

    def attend(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> torch.Tensor | None:
        batch = self._batch
        column, _ = self._kv_cache.layout.place(layer)
        self._kv_cache.write(layer, batch.blocks[column], batch.offsets, k, v)
        if layer == self._model.config.num_layers - 1 and batch.num_logits == 0:
            return None
        sinks = self._model.weights.get(f"{layer}.sinks")
        return self._backend.run(self._plan, layer, q, self._kv_cache, sinks).flatten(1)

    def gated(self, gate_up: torch.Tensor) -> torch.Tensor:
        return gated(gate_up, self._model.config.activation)

    def add(self, x: torch.Tensor, part: torch.Tensor, norm: Op | None) -> torch.Tensor:
        part = norm(part) if norm else part
        scale = self._model.config.residual_scale
        return x + (part if scale == 1.0 else part * scale)

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        model, c = self._model, self._model.config
        out = logits(model.norm(x.index_select(0, self._batch.logit_index)), model.head)
        return capped(out if c.logit_scale == 1.0 else out * c.logit_scale, c.logit_softcap)

    def no_logits(self) -> torch.Tensor:
        size = (0, self._model.config.vocab_size)
        return torch.empty(size, dtype=torch.float32, device=self._model.device)
