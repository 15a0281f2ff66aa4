"""GLM-4.5: the first layers are plain, the others choose experts by a corrected sigmoid.

Half of each head turns. The layers that predict further tokens (MTP) are left out.
"""

from __future__ import annotations

from collections.abc import Iterator

from engine.models.architecture import Architecture, TensorSpec
from engine.models.config import ConfigReader, ExpertSpec, ModelConfig
from engine.models.config_keys import decoder_fields, read_rope
from engine.models.decoder import HEAD_NORMS, Norms, decoder_tensors, forward
from engine.models.experts import ExpertNames

_NAME = "Glm4MoeForCausalLM"
_NORMS: Norms = {
    "input_norm": ("input_layernorm", "attn_norm"),
    "mlp_norm": ("post_attention_layernorm", "post_attention_norm"),
}
_NAMES = ExpertNames(shared="mlp.shared_experts.")


def _read_config(raw: ConfigReader) -> ModelConfig:
    raw = ConfigReader({"rms_norm_eps": 1e-5, **raw.data}, raw.path)
    fields = decoder_fields(raw, read_rope(raw, partial=0.5))
    first = int(raw.get("first_k_dense_replace", 1))
    width = raw.integer("moe_intermediate_size", 1408)
    experts = ExpertSpec(
        number=raw.integer("n_routed_experts", 128),
        per_token=raw.integer("num_experts_per_tok", 8),
        width=width,
        layers=tuple(range(first, fields["num_layers"])),
        scoring="sigmoid",
        normalise=bool(raw.get("norm_topk_prob", True)),
        scale=raw.number("routed_scaling_factor", 1.0),
        corrected=True,
        groups=raw.integer("n_group", 1),
        chosen_groups=raw.integer("topk_group", 1),
        shared_width=width * int(raw.get("n_shared_experts", 1)),
    )
    return ModelConfig(
        _NAME,
        **fields,
        attention_bias=bool(raw.get("attention_bias", False)),
        head_norms=bool(raw.get("use_qk_norm", False)),
        experts=experts,
    )


def _tensors(c: ModelConfig) -> Iterator[TensorSpec]:
    norms = {**_NORMS, **HEAD_NORMS} if c.head_norms else _NORMS
    return decoder_tensors(c, norms, expert_names=_NAMES)


def _left_out(c: ModelConfig, name: str) -> bool:
    """A layer behind the last one."""
    parts = name.removeprefix("model.layers.").split(".")
    return name != parts[0] and parts[0].isdecimal() and int(parts[0]) >= c.num_layers


ARCHITECTURES = (
    Architecture(
        _NAME, "glm4_moe", _read_config, _tensors, forward, native=False, left_out=_left_out
    ),
)
