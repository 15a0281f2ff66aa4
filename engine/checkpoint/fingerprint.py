"""The identity of a model: a short digest of its configuration and of all bytes of its weights.

Two workers may exchange KV blocks only if they hold the same weights. The digest covers the
*source* (the GGUF file, or the tensors of the shards as they were published), never a conversion.
So it does not depend on the precision that a worker computes in, nor on how tensors are spread over
shards. The configuration counts by explicit lists of fields, never by `repr()`: a field that a
later version adds leaves the digests of today's models as they are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path

from engine.base.errors import CheckpointError
from engine.base.kv_layout import digest_of
from engine.checkpoint.added_tokens import TOKENIZER, merged_tokenizer
from engine.checkpoint.digest import file_digests
from engine.checkpoint.files import FileState
from engine.checkpoint.shards import read_header, read_metadata
from engine.models.config import ExpertSpec, ModelConfig, RopeScaling, RopeSpec

_VERSION = "2"  # of the fields below and of their order
ROPE_FIELDS = (
    *("kind", "factor", "low_freq_factor", "high_freq_factor"),
    *("original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor"),
    "truncate",
)
CONFIG_FIELDS = (
    *("architecture", "num_layers", "hidden_size", "intermediate_size", "num_heads"),
    *("num_kv_heads", "head_dim", "vocab_size", "max_position_embeddings", "rms_norm_eps"),
    *("rope_theta", "rope_scaling", "tie_word_embeddings", "attention_bias", "output_bias"),
    *("mlp_bias", "sliding_window", "bos_token_id", "eos_token_ids"),
)
# Later fields count where they differ from their default, so that other models' digests stay.
ROPE_LATER_FIELDS = ("factors", "short_factors", "proportion")
_ROPE_OPTIONAL = ("rotary_dim", "other_ropes", "layer_ropes", "query_beta", "query_period")
OPTIONAL_FIELDS = (
    *("layer_windows", "attention_scale", "attention_softcap", "activation", "embedding_scale"),
    *("residual_scale", "logit_scale", "logit_softcap", *_ROPE_OPTIONAL),
    *("experts", "attention_sinks", "head_norms", "whole_qk_norm", "wrapper"),
)
EXPERT_FIELDS = (
    *("number", "per_token", "width", "layers", "scoring", "normalise", "scale", "corrected"),
    *("groups", "chosen_groups", "biased", "shared_width", "shared_gated", "limit", "alpha"),
)


def config_digest(config: ModelConfig) -> str:
    """Hex digest of the configuration: for weights that come from a seed."""
    return _digest(b"diptych-config", config_fields(config))


def config_fields(config: ModelConfig) -> list[str]:
    """`name=value` of the fields that are listed, numbers in full."""
    always = [f"{name}={_text(getattr(config, name))}" for name in CONFIG_FIELDS]
    return always + _set_fields(config, OPTIONAL_FIELDS)


def rope_text(config: ModelConfig) -> str:
    """How keys are rotated: equal texts, equal rotations."""
    first = f"{_text(config.rope_theta)} {_text(config.rope_scaling)}"
    return " ".join((first, *_set_fields(config, _ROPE_OPTIONAL)))


def _set_fields(value: ModelConfig | RopeScaling, names: Sequence[str]) -> list[str]:
    """`name=value` of the fields that differ from their default."""
    defaults = {field.name: field.default for field in dataclasses.fields(value)}
    found = {name: getattr(value, name) for name in names}
    return [f"{name}={_text(v)}" for name, v in found.items() if v != defaults[name]]


def _text(value: object) -> str:
    """A field's value: floats in hexadecimal, so that no digit is lost."""
    if isinstance(value, float):
        return value.hex()
    if isinstance(value, tuple):
        return ",".join(map(_text, value))
    if isinstance(value, RopeScaling):
        always = [f"{name}={_text(getattr(value, name))}" for name in ROPE_FIELDS]
        return " ".join(always + _set_fields(value, ROPE_LATER_FIELDS))
    if isinstance(value, ExpertSpec):
        return " ".join(f"{name}={_text(getattr(value, name))}" for name in EXPERT_FIELDS)
    if isinstance(value, RopeSpec):
        return f"{_text(value.theta)} {_text(value.scaling)} dim={value.dim}"
    if value is None or isinstance(value, bool | int | str):
        return str(value)
    raise TypeError(f"{type(value).__name__} in a digest")


def gguf_fingerprint(config: ModelConfig, digest: str) -> str:
    """Hex fingerprint of a GGUF file, by the digest of all its bytes."""
    return _digest(b"diptych-weights", [_VERSION, *config_fields(config), digest])


def shards_fingerprint(
    config: ModelConfig, shards: Sequence[Path]
) -> tuple[str, tuple[FileState, ...]]:
    """Hex fingerprint of safetensors files, and the states of the files that it is of.

    Raises CheckpointError on unreadable ones.
    """
    states, tensors, metadata = [], [], set[str]()
    for path in shards:
        entries = read_header(path)
        ranges = [(e.offset, e.offset + e.num_bytes) for e in entries]
        digested = file_digests(path, ranges)
        states.append(digested.state)
        metadata |= {f"{key}={value}" for key, value in read_metadata(path).items()}
        for entry, digest in zip(entries, digested.digests, strict=True):
            shape = _text(entry.shape)
            tensors.append(f"{entry.name} {entry.dtype} {shape} {digest}")
    fields = [_VERSION, *config_fields(config), *sorted(metadata), *sorted(tensors)]
    return _digest(b"diptych-weights", fields), tuple(states)


def tokenizer_digest(folder: Path) -> str:
    """Hex digest of the tokenizer: equal digests read and write the same token ids.

    Raises CheckpointError.
    """
    try:
        return _digest(b"diptych-tokens", [merged_tokenizer(folder)])
    except OSError as error:
        raise CheckpointError(f"{folder / TOKENIZER}: {error.strerror}") from None


def _digest(person: bytes, fields: Iterable[str]) -> str:
    return digest_of(person, *(field.encode() for field in fields)).hex()
