"""Model folders in the layout of Hugging Face, in one file or in shards."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 1,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "vocab_size": 128,
    "max_position_embeddings": 512,
}


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"model.embed_tokens.weight": (128, 64), "model.norm.weight": (64,), "a": (300, 64)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def folder(path: Path, *, shards: list[list[str]] | None = None, seed: int = 0) -> Path:
    """A model folder, in one file or in the given shards."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps(CONFIG))
    (path / "tokenizer.json").write_text("{}")
    if shards is None:
        save_file(tensors(seed), path / "model.safetensors")
        return path
    weight_map: dict[str, str] = {}
    for i, names in enumerate(shards):
        name = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        save_file({n: tensors(seed)[n] for n in names}, path / name)
        weight_map |= dict.fromkeys(names, name)
    index = {"metadata": {}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path


SHARDS = [["a"], ["model.norm.weight", "model.embed_tokens.weight"]]
