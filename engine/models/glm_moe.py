"""GLM-4.5: the first layers are plain, the others choose experts by a corrected sigmoid.

Half of each head turns. The layers that predict further tokens (MTP) are left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from engine.models.architecture import Architecture, TensorSpec
from engine.models.config import ConfigReader, ExpertSpec, ModelConfig
from engine.models.config_keys import decoder_fields, read_rope
from engine.models.decoder import HEAD_NORMS, Norms, decoder_tensors, forward
from engine.models.experts import ExpertNames, checked, gguf_expert_keys
from engine.models.gguf_metadata import GGUFMetadata

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
        experts=checked(raw, experts),
    )


def _tensors(c: ModelConfig) -> Iterator[TensorSpec]:
    norms = {**_NORMS, **HEAD_NORMS} if c.head_norms else _NORMS
    return decoder_tensors(c, norms, expert_names=_NAMES)


def _left_out(c: ModelConfig, name: str) -> bool:
    """A layer behind the last one."""
    parts = name.removeprefix("model.layers.").split(".")
    return name != parts[0] and parts[0].isdecimal() and int(parts[0]) >= c.num_layers


def _gguf_keys(file: GGUFMetadata) -> dict[str, Any]:
    """The format counts the layers of MTP, too."""
    num_layers = file.integer("block_count") - int(file.get("nextn_predict_layers", 0))
    head_dim = file.head_dim()
    rotary_dim = file.integer("rope.dimension_count", head_dim)
    return gguf_expert_keys(file, "n_routed_experts") | {
        "num_hidden_layers": num_layers,
        "first_k_dense_replace": int(file.get("leading_dense_block_count", 0)),
        "moe_intermediate_size": file.integer("expert_feed_forward_length"),
        "n_shared_experts": int(file.get("expert_shared_count", 0)),
        "n_group": file.integer("expert_group_count", 1),
        "topk_group": file.integer("expert_group_used_count", 1),
        "norm_topk_prob": bool(file.get("expert_weights_norm", False)),
        "routed_scaling_factor": file.number("expert_weights_scale", 1.0),
        "partial_rotary_factor": rotary_dim / head_dim,
        "use_qk_norm": "blk.0.attn_q_norm.weight" in file.shapes,
    }


ARCHITECTURES = (
    Architecture(
        _NAME,
        "glm4_moe",
        _read_config,
        _tensors,
        forward,
        gguf="glm4moe",
        gguf_experts=True,
        gguf_keys=_gguf_keys,
        left_out=_left_out,
    ),
)
