"""Experts of random decoders (random_decoder.py), and what they should compute."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.models.config import ExpertSpec

Floats = npt.NDArray[np.floating[Any]]
# (number, groups, chosen groups, the most that a token takes)
CHOICES = ((1, 1, 1, 1), (2, 1, 1, 2), (5, 1, 1, 5), (12, 4, 2, 6), (16, 1, 1, 4), (33, 3, 1, 9))


def random_spec(rng: random.Random, num_layers: int) -> ExpertSpec | None:
    """Most decoders have no experts, others in some of their layers."""
    if rng.random() < 0.5:
        return None
    number, groups, chosen, most = rng.choice(CHOICES)
    shared_width = rng.choice((0, 32, 96))
    return ExpertSpec(
        number=number,
        per_token=rng.randint(1, most),
        width=32 * rng.choice((1, 2, 3, 8)),
        layers=tuple(i for i in range(num_layers) if rng.random() < 0.8),
        scoring=rng.choice(("softmax", "sigmoid")),
        normalise=rng.random() < 0.5,
        scale=rng.choice((1.0, 2.5)),
        corrected=rng.random() < 0.5,
        groups=groups,
        chosen_groups=chosen,
        biased=rng.random() < 0.5,
        shared_width=shared_width,
        shared_gated=shared_width > 0 and rng.random() < 0.5,
        limit=rng.choice((0.0, 0.0, 0.5)),
        alpha=1.7,
    )


def random_vectors(
    spec: ExpertSpec, hidden: int, noise: np.random.Generator
) -> dict[str, npt.NDArray[np.float32]]:
    """What the kernels hold in fp32."""
    sizes = {"router": spec.number * hidden}
    sizes |= {"router.bias": spec.number} if spec.biased else {}
    sizes |= {"correction": spec.number} if spec.corrected else {}
    sizes |= {"shared_gate": hidden} if spec.shared_gated else {}
    found = {name: noise.standard_normal(size) * 0.3 for name, size in sizes.items()}
    return {name: values.astype(np.float32) for name, values in found.items()}


def matrices(spec: ExpertSpec, hidden: int) -> dict[str, tuple[int, list[int]]]:
    """Columns, and the rows of parts that may differ in kind."""
    number, width, shared = spec.number, spec.width, spec.shared_width
    found = {
        "gate_experts": (hidden, [number * width]),
        "up_experts": (hidden, [number * width]),
        "down_experts": (width, [number * hidden]),
    }
    if shared:
        found |= {
            "shared_gate_up": (hidden, [shared, shared]),
            "shared_down": (shared, [hidden]),
        }
    return found


def expected(
    spec: ExpertSpec,
    x: Floats,
    vectors: Mapping[str, Floats],
    values: Mapping[str, Floats],
    activate: Callable[[Floats], Floats],
) -> Floats:
    """What the experts give for rows x, in doubles; both mappings by a layer's names."""
    number, hidden = spec.number, x.shape[1]

    def product(name: str, x: Floats, expert: int = 0, of: int = 1) -> Floats:
        weight = np.split(values[name], of)[expert]
        out: Floats = x @ weight.T.astype(np.float64)
        if f"{name}.bias" in vectors:
            out = out + np.split(vectors[f"{name}.bias"], of)[expert]
        return out

    scores = x @ vectors["router"].reshape(number, hidden).T.astype(np.float64)
    scores = scores + vectors.get("router.bias", np.zeros(number))
    shares = np.exp(scores - scores.max(-1, keepdims=True))
    shares /= shares.sum(-1, keepdims=True)
    ranked = scores
    if spec.scoring == "sigmoid":
        shares = ranked = 1 / (1 + np.exp(-scores))
    ranked = ranked + vectors.get("correction", np.zeros(number))
    out = np.zeros_like(x)
    for token, row in enumerate(x):
        ids = _chosen(spec, ranked[token])
        weights = shares[token, ids]
        weights = weights / weights.sum() if spec.normalise else weights
        for expert, weight in zip(ids, weights * spec.scale, strict=True):
            gate = product("gate_experts", row, expert, number)
            up = product("up_experts", row, expert, number)
            if spec.limit:
                gate, up = np.minimum(gate, spec.limit), np.clip(up, -spec.limit, spec.limit)
                inner = (up + 1) * gate / (1 + np.exp(-spec.alpha * gate))
            else:
                inner = activate(gate) * up
            out[token] += weight * product("down_experts", inner, expert, number)
    if spec.shared_width:
        gate, up = np.split(product("shared_gate_up", x), 2, -1)
        shared = product("shared_down", activate(gate) * up)
        if spec.shared_gated:
            shared = shared / (1 + np.exp(-(x @ vectors["shared_gate"])))[:, None]
        out = out + shared
    return out


def _chosen(spec: ExpertSpec, ranked: Floats) -> list[int]:
    """The best experts of the best groups, the first of equal ones."""
    groups = np.array_split(np.arange(spec.number), spec.groups)
    sums = [np.sort(ranked[group])[-2:].sum() for group in groups]
    best = np.argsort(-np.array(sums), kind="stable")[: spec.chosen_groups]
    allowed = np.sort(np.concatenate([groups[i] for i in best]))
    order = np.argsort(-ranked[allowed], kind="stable")[: spec.per_token]
    return sorted(int(i) for i in allowed[order])
