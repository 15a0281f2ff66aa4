"""The default model as transformers reads and computes it, in fp32: the oracle of logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from engine.checkpoint.source import resolve


def default_model() -> torch.nn.Module:
    """What from_pretrained(gguf_file=...) does, less its demand for accelerate."""
    checkpoint = resolve("smollm2")
    assert checkpoint.gguf is not None
    folder, name = checkpoint.gguf.parent, checkpoint.gguf.name
    config = transformers.AutoConfig.from_pretrained(folder, gguf_file=name)
    auto: Any = transformers.AutoModelForCausalLM
    reference: torch.nn.Module = auto.from_config(config, dtype=torch.float32).eval()
    load: Any = load_gguf_checkpoint
    read = load(checkpoint.gguf, return_tensors=True, model_to_load=reference)
    absent, extra = reference.load_state_dict(read["tensors"], strict=False)
    assert absent == ["lm_head.weight"] and not extra and config.tie_word_embeddings
    return reference


def logits_of(reference: torch.nn.Module, token_ids: Sequence[int]) -> torch.Tensor:
    """fp32 [len(token_ids), vocab]."""
    with torch.inference_mode():
        logits: torch.Tensor = reference(torch.tensor([list(token_ids)]), use_cache=False).logits[0]
        return logits
