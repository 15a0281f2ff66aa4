"""The experts of a layer in torch.

The router's product and the weights are fp32. Rows are grouped by expert. A token's sum runs over
its experts by rising id, and the shared part comes last, so that the order does not depend on the
scores or on other tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from engine.models.config import ExpertSpec, ModelConfig
from engine.runner.layers import gated

EXPERT_TENSORS = (
    *("router", "gate_experts", "up_experts", "down_experts", "correction"),
    *("shared_gate_up", "shared_down", "shared_gate"),
)


def route(
    scores: torch.Tensor, correction: torch.Tensor | None, spec: ExpertSpec
) -> tuple[torch.Tensor, torch.Tensor]:
    """The experts of each token by rising id, and their weights: [T, per_token], fp32 weights.

    scores: the router's outputs, fp32 [T, experts].
    """
    shares = scores.sigmoid() if spec.scoring == "sigmoid" else scores.softmax(-1)
    # A softmax may round different outputs to equal shares.
    ranked = shares if spec.scoring == "sigmoid" else scores
    if correction is not None:
        ranked = ranked + correction
    if spec.groups > 1:
        ranked = _in_best_groups(ranked, spec)
    ids = _best(ranked, spec.per_token).sort(-1).values
    weights = shares.gather(-1, ids)
    if spec.normalise:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return ids, weights * spec.scale


def _best(values: torch.Tensor, count: int) -> torch.Tensor:
    """Indices of the largest values [..., n]; of equal ones the first."""
    return torch.sort(values, dim=-1, descending=True, stable=True).indices[..., :count]


def _in_best_groups(ranked: torch.Tensor, spec: ExpertSpec) -> torch.Tensor:
    """-inf outside the groups whose two best experts have the largest sums."""
    by_group = ranked.view(-1, spec.groups, spec.number // spec.groups)
    sums = by_group.sort(-1, descending=True).values[..., :2].sum(-1)
    left_out = torch.ones_like(sums, dtype=torch.bool)
    left_out.scatter_(-1, _best(sums, spec.chosen_groups), False)
    return by_group.masked_fill(left_out[..., None], float("-inf")).view_as(ranked)


@dataclass(frozen=True, slots=True)
class Experts:
    """A layer's experts; called with activations [T, hidden]."""

    spec: ExpertSpec
    activation: str
    tensors: Mapping[str, torch.Tensor]  # EXPERT_TENSORS that the model has, and their biases

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """The weighted sum of each token's experts, [T, hidden] in x's dtype."""
        spec, t = self.spec, self.tensors
        scores = _product(x.float(), t["router"].float(), t.get("router.bias"))
        ids, weights = route(scores, t.get("correction"), spec)
        out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        for expert in sorted({*ids.flatten().tolist()}):
            rows, rank = (ids == expert).nonzero(as_tuple=True)
            part = self._expert(expert, x[rows]).float() * weights[rows, rank, None]
            out.index_add_(0, rows, part)
        if spec.shared_width:
            out += self._shared(x)
        return out.to(x.dtype)

    def _expert(self, expert: int, x: torch.Tensor) -> torch.Tensor:
        gate, up = self._of(expert, "gate_experts", x), self._of(expert, "up_experts", x)
        if self.spec.limit:
            inner = clamped_gate(gate, up, self.spec.alpha, self.spec.limit)
        else:
            inner = gated(torch.cat((gate, up), -1), self.activation)
        return self._of(expert, "down_experts", inner)

    def _of(self, expert: int, name: str, x: torch.Tensor) -> torch.Tensor:
        """A product with one expert's rows of a joined tensor."""
        joined, bias = self.tensors[name], self.tensors.get(f"{name}.bias")
        size = joined.shape[0] // self.spec.number
        rows = slice(expert * size, (expert + 1) * size)
        return F.linear(x, joined[rows], None if bias is None else bias[rows])

    def _shared(self, x: torch.Tensor) -> torch.Tensor:
        """What every token takes, fp32."""
        t = self.tensors
        both = F.linear(x, t["shared_gate_up"], t.get("shared_gate_up.bias"))
        inner = gated(both, self.activation)
        out = F.linear(inner, t["shared_down"], t.get("shared_down.bias")).float()
        if self.spec.shared_gated:
            out = out * F.linear(x.float(), t["shared_gate"].float()).sigmoid()
        return out


def clamped_gate(gate: torch.Tensor, up: torch.Tensor, alpha: float, limit: float) -> torch.Tensor:
    """(up + 1) * gate * sigmoid(alpha * gate) of clamped numbers."""
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return (up + 1) * gate * torch.sigmoid(alpha * gate)


def _product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return F.linear(x, weight, None if bias is None else bias.float())


def experts_of(
    config: ModelConfig, weights: Mapping[str, torch.Tensor], layer: int
) -> Experts | None:
    """The experts of a layer, if it has some."""
    if config.experts is None or layer not in config.experts.layers:
        return None
    prefix = f"{layer}."
    found = {name.removeprefix(prefix): t for name, t in weights.items() if name.startswith(prefix)}
    tensors = {n: t for n, t in found.items() if n.removesuffix(".bias") in EXPERT_TENSORS}
    return Experts(config.experts, config.activation, tensors)
