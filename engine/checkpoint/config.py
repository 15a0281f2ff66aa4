"""A folder's `config.json` and `generation_config.json` as a ModelConfig. No torch here.

The architecture's own file reads its keys (engine/models/); here are its choice and what all
architectures share: the tokens that end an output.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.checkpoint.added_tokens import eos_token_ids
from engine.checkpoint.jsonfile import read_json
from engine.checkpoint.wrappers import outer_name, text_model
from engine.models.architecture import Architecture, architectures
from engine.models.config import ConfigReader, ModelConfig


def read_config(folder: Path) -> ModelConfig:
    """The configuration of a folder in Hugging Face layout.

    Tokens that end an output are those that any file of the folder names (added_tokens.py).
    Raises CheckpointError naming the file and the key that is missing or not supported.
    """
    path = folder / "config.json"
    whole = ConfigReader(read_json(path), path)
    raw, wrapper = text_model(whole)
    _refuse_latent(raw)
    architecture = _architecture(raw)
    _refuse_quantisation(raw, architecture)
    config = architecture.read_config(raw)
    generation = folder / "generation_config.json"
    tokens = read_json(generation) if generation.exists() else {}
    # Each file may name some of the tokens that end an output, and none is complete.
    text = whole.get("text_config")  # of a wrapper, whose own keys win in `raw`
    files = (tokens, raw.data, text if isinstance(text, dict) else {})
    named = [i for data in files for i in _ids(data, "eos_token_id", raw)]
    first = [i for data in files for i in _ids(data, "bos_token_id", raw)]
    return dataclasses.replace(
        config,
        wrapper=wrapper,
        bos_token_id=next(iter(first), None),
        eos_token_ids=eos_token_ids(folder, named, config.vocab_size),
    )


def _refuse_quantisation(raw: ConfigReader, architecture: Architecture) -> None:
    """Raise CheckpointError that names the method, where it is not read."""
    found = raw.get("quantization_config")
    if not found:
        return
    keys = found if isinstance(found, dict) else {"quant_method": found}
    method = keys.get("quant_method") or keys.get("quant_algo") or "unknown"
    if method not in architecture.quantisations:
        read = " and ".join(architecture.quantisations) or "no method"
        right = f"{architecture.name} is read in {read}; use unquantised weights or a GGUF file"
        raise raw.refuse("quantization_config of method", method, right)


def _refuse_latent(raw: ConfigReader) -> None:
    if raw.get("kv_lora_rank") is not None:
        right = "its latent KV (multi-head latent attention, MLA) is not built"
        raise raw.refuse("architecture", outer_name(raw), right)


def _architecture(raw: ConfigReader) -> Architecture:
    by_type = {a.model_type: a.name for a in architectures()}
    names = raw.get("architectures") or [by_type.get(str(raw.get("model_type")))]
    name = names[0] if isinstance(names, list) and names else names
    for architecture in architectures():
        if architecture.name == name:
            return architecture
    known = ", ".join(a.name for a in architectures())
    right = f"known are {known} (docs/models.md: how to add one)"
    raise raw.refuse("architecture", name or raw.get("model_type"), right)


def _ids(data: Mapping[str, Any], key: str, raw: ConfigReader) -> list[int]:
    """Ids under `key`, an int or a list."""
    value = data.get(key)
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) and i >= -1 for i in ids):
        raise raw.refuse(key, value, "expected a token id or a list of them")
    return [i for i in ids if i >= 0]  # -1: none, as some files write it
