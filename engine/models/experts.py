"""The tensors of a Mixture of Experts.

    router [experts, hidden]     (correction [experts])
    for each expert: gate and up [width, hidden], down [hidden, width]
    (shared: gate and up, down, and a gate [1, hidden])

Each expert's tensors are specifications of their own. They are joined along their outputs, expert
by expert, so a joined tensor is [experts * outputs, inputs]; gate and up are not joined, because a
GGUF file may quantise them in two ways.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from engine.models.architecture import FusedPart, TensorSpec
from engine.models.config import ConfigReader, ExpertSpec, ModelConfig
from engine.models.gguf_metadata import GGUFMetadata

# Joined tensors that have a bias where the model's experts have one.
EXPERT_BIASES = frozenset(("router", "gate_experts", "up_experts", "down_experts"))


@dataclass(frozen=True, slots=True)
class ExpertNames:
    """Names in Hugging Face layout, without layer and suffix."""

    router: str = "mlp.gate"
    expert: str = "mlp.experts.{}."  # of one expert, by its number
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    fused: str = "mlp.experts."  # of all experts in one tensor
    interleaved: bool = False  # fused gate and up alternate, and are [inputs, outputs]
    correction: str = "mlp.gate.e_score_correction_bias"
    shared: str = "mlp.shared_expert."
    shared_gate: str = "mlp.shared_expert_gate"


def checked(raw: ConfigReader, spec: ExpertSpec) -> ExpertSpec:
    """The description, if a token can take so many experts of it. Raises CheckpointError."""
    groups, chosen = spec.groups, spec.chosen_groups
    if spec.number % groups:
        raise raw.refuse("n_group", groups, f"expected a divisor of the {spec.number} experts")
    if chosen > groups:
        raise raw.refuse("topk_group", chosen, f"expected at most n_group, {groups}")
    if spec.per_token > (most := spec.number // groups * chosen):
        right = f"expected at most {most}, the experts that can be taken"
        raise raw.refuse("num_experts_per_tok", spec.per_token, right)
    return spec


def expert_weights(c: ModelConfig, spec: ExpertSpec, names: ExpertNames) -> list[TensorSpec]:
    """The weights of a layer's experts, named as `layer_tensors` takes them."""
    hidden = c.hidden_size
    weights = [
        TensorSpec(
            "router",
            names.router,
            "ffn_gate_inp",
            (spec.number, hidden),
            "router",
            None,
            exact=True,
        )
    ]
    for part in ("gate", "up", "down"):
        weights += (_expert(part, e, hidden, spec, names) for e in range(spec.number))
    return weights + list(_shared(hidden, spec, names))


def _expert(
    part: str, expert: int, hidden: int, spec: ExpertSpec, names: ExpertNames
) -> TensorSpec:
    """One of an expert's three tensors."""
    width, is_down = spec.width, part == "down"
    first, step = (width * (part == "up"), 1) if not names.interleaved else (part == "up", 2)
    outputs = (0, hidden, 1) if is_down else (int(first), width * step + first, step)
    fused = names.fused + ("down_proj" if is_down else "gate_up_proj")
    return TensorSpec(
        f"experts.{expert}.{part}",
        names.expert.format(expert) + getattr(names, part),
        f"ffn_{part}_exps",
        (hidden, width) if is_down else (width, hidden),
        f"{part}_experts",
        1 if is_down else 0,
        expert=expert,
        fused=FusedPart(fused, expert, outputs, transposed=names.interleaved),
    )


def _shared(hidden: int, spec: ExpertSpec, names: ExpertNames) -> Iterator[TensorSpec]:
    """What every token takes: a feed-forward, and its weight."""
    inner = spec.shared_width
    if not inner:
        return
    for part in ("gate", "up"):
        hf_name, gguf_name = f"{names.shared}{part}_proj", f"ffn_{part}_shexp"
        yield TensorSpec(f"shared_{part}", hf_name, gguf_name, (inner, hidden), "shared_gate_up", 0)
    down = f"{names.shared}down_proj"
    yield TensorSpec("shared_down", down, "ffn_down_shexp", (hidden, inner), "shared_down", 1)
    if spec.shared_gated:
        gate = names.shared_gate
        yield TensorSpec(
            *("shared_gate", gate, "ffn_gate_inp_shexp", (1, hidden), "shared_gate", None),
            exact=True,
        )


def expert_vectors(spec: ExpertSpec, names: ExpertNames) -> list[TensorSpec]:
    """Vectors that are neither weights nor biases of a product."""
    if not spec.corrected:
        return []
    files = (names.correction, "exp_probs_b.bias")
    return [TensorSpec("correction", *files, (spec.number,), "correction", None, exact=True)]


def gguf_expert_keys(file: GGUFMetadata, number: str = "num_experts") -> dict[str, Any]:
    """Keys of `config.json` for a GGUF file's experts; `number` is what the count is called."""
    return {
        number: file.integer("expert_count"),
        "num_experts_per_tok": file.integer("expert_used_count"),
    }
