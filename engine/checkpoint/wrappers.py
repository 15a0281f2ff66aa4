"""The text model of a checkpoint that also reads pictures or sound: keys of its configuration.

    config.json   {"architectures": ["Mistral3ForConditionalGeneration"], "text_config": {...}, ...}

The names of its tensors are `listed_name`'s matter (engine/models/architecture.py).
"""

from __future__ import annotations

from typing import Any

from engine.models.architecture import architectures
from engine.models.config import ConfigReader

# Keys of the outer object that hold for the text model.
_OUTER_KEYS = ("tie_word_embeddings", "bos_token_id", "eos_token_id", "quantization_config")
_READ_BOTH_WAYS = ("PaliGemmaForConditionalGeneration",)
_LLAMA: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
}
_MISTRAL = _LLAMA | {
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
}
_QWEN = _LLAMA | {
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
}
_GEMMA3 = {
    "vocab_size": 262208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 131072,
}
# `text_config` leaves out what equals transformers' class of its type.
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "granite": _LLAMA,
    "mistral": _MISTRAL,
    "qwen2": _QWEN,
    "qwen3": _QWEN,
    "gemma3_text": _GEMMA3,
}


def text_model(raw: ConfigReader) -> tuple[ConfigReader, str]:
    """The keys of the text model, and the name of the wrapper that they are a part of, or "".

    Raises CheckpointError for a wrapper whose text model is not computed as one alone.
    """
    text, name = raw.get("text_config"), outer_name(raw)
    if not isinstance(text, dict) or name in {a.name for a in architectures()}:
        return raw, ""
    if name in _READ_BOTH_WAYS:
        raise raw.refuse("architecture", name, "its prompts attend in both directions")
    kind, of_kinds = str(text.get("model_type")), {a.model_type: a.name for a in architectures()}
    if kind not in of_kinds:
        return raw, ""
    outer = {key: raw.data[key] for key in _OUTER_KEYS if raw.get(key) is not None}
    given = {key: value for key, value in text.items() if value is not None or key not in _LLAMA}
    data = DEFAULTS.get(kind, {}) | given | outer | {"architectures": [of_kinds[kind]]}
    return ConfigReader(data, raw.path), str(name)


def outer_name(raw: ConfigReader) -> object:
    """The first of `architectures`, else the model's type."""
    names = raw.get("architectures") or raw.get("model_type")
    return names[0] if isinstance(names, list) and names else names
