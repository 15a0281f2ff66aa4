"""Converts a GGUF file to a folder in Hugging Face layout, the only layout that other modules read.

The architectures are those of engine/models that name a GGUF architecture (Mistral files use
`llama`). gguf_header.py reads the format; this module interprets its keys. It is imported only
when there is a file to convert, because numpy and gguf cost start-up time.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.base.errors import CheckpointError
from engine.checkpoint.config import read_config
from engine.checkpoint.gguf_header import TYPES, Header, gguf_architecture
from engine.checkpoint.gguf_parts import find_parts
from engine.checkpoint.gguf_tokenizer import tokenizer_files
from engine.checkpoint.gguf_weights import ROPE_FREQS, ROPE_TENSORS, PackedTensor, packed_tensors
from engine.models.config import ModelConfig
from engine.models.gguf_metadata import GGUFMetadata
from engine.telemetry.progress import bar

_PLAIN = {"F32": np.float32, "F16": np.float16}  # types that numpy has
# Files of Llama 3.1 and 3.2 store the divisors that follow from these numbers, not the numbers.
_LLAMA3_LOW, _LLAMA3_HIGH, _LLAMA3_CONTEXT = 1.0, 4.0, 8192


@dataclass(frozen=True, slots=True)
class MappedTensor:
    """One tensor of a file, memory-mapped."""

    name: str
    shape: tuple[int, ...]  # as the format has it: the fastest dimension first
    tensor_type: Any  # gguf.GGMLQuantizationType
    data: npt.NDArray[Any]  # rows of values (F32, F16) or of packed bytes, the last dimension last


@dataclass(frozen=True, slots=True)
class GGUFFile:
    """An opened file: metadata by key, tensors memory-mapped."""

    path: Path
    meta: Mapping[str, Any]
    tensors: list[MappedTensor]  # of all parts

    @property
    def architecture(self) -> str:
        """The format's name of the architecture: llama, qwen2, qwen3."""
        return str(self.meta.get("general.architecture"))

    def packed(self, config: ModelConfig) -> list[PackedTensor]:
        """The weights, still packed, under Hugging Face names and in Hugging Face row order."""
        return packed_tensors(self.tensors, config, self.path)


def open_gguf(path: Path) -> GGUFFile:
    """Read the metadata of a file, or of the parts of a split one, and map all tensors.

    Raises CheckpointError in one sentence naming the file.
    """
    with bar(total=1, desc=f"Reading {path.name}"):
        parts = find_parts(path, arrays=True)
    first = parts.headers[0]
    tensors = [tensor for header in parts.headers for tensor in _mapped(header)]
    return GGUFFile(path, {**first.scalars, **first.arrays}, tensors)


def _mapped(header: Header) -> Iterator[MappedTensor]:
    from gguf import GGMLQuantizationType

    mapped = np.memmap(header.path, np.uint8, "r")
    for t in header.tensors:
        name, num_values, num_bytes = TYPES[t.kind]
        rows = tuple(reversed(t.shape[1:]))
        raw = mapped[t.offset : t.offset + t.num_bytes]
        if name in _PLAIN:
            data = raw.view(_PLAIN[name]).reshape(*rows, t.shape[0])
        else:
            data = raw.reshape(*rows, t.shape[0] // num_values * num_bytes)
        yield MappedTensor(t.name, t.shape, GGMLQuantizationType(t.kind), data)


def convert(path: Path, folder: Path) -> None:
    """Write all but the weights into the empty folder `folder`."""
    file = open_gguf(path)
    files = {"config.json": config_json(file), "generation_config.json": _generation(file)}
    files |= tokenizer_files(file.meta, path)
    for name, content in files.items():
        _write_json(folder / name, content)
    try:
        config = read_config(folder)
    except CheckpointError as error:  # name the file: the folder is removed
        message = error.message.replace(str(folder / "config.json"), str(path))
        raise CheckpointError(message) from None
    file.packed(config)  # all tensors are there, and have the shapes of the configuration


def config_json(file: GGUFFile) -> dict[str, Any]:
    """Content of `config.json`: the keys that decoders share, then the architecture's own.

    Raises CheckpointError naming the key that is missing or not supported.
    """
    meta = _metadata(file)
    architecture, shapes = gguf_architecture(meta), meta.shapes
    if "token_embd.weight" not in shapes:
        raise CheckpointError(f"{file.path}: tensor 'token_embd.weight' is missing")
    num_heads, head_dim = meta.integer("attention.head_count"), meta.head_dim()
    keys: dict[str, Any] = {
        "architectures": [architecture.name],
        "model_type": architecture.model_type,
        "hidden_act": "silu",
        "num_hidden_layers": meta.integer("block_count"),
        "hidden_size": meta.integer("embedding_length"),
        "intermediate_size": meta.integer("feed_forward_length"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": meta.integer("attention.head_count_kv", num_heads),
        "head_dim": head_dim,
        "vocab_size": shapes["token_embd.weight"][0],
        "max_position_embeddings": meta.integer("context_length"),
        "rms_norm_eps": meta.number("attention.layer_norm_rms_epsilon", 1e-5),
        "rope_theta": meta.number("rope.freq_base", 10000.0),
        "rope_scaling": _rope_scaling(meta, head_dim),
        "tie_word_embeddings": "output.weight" not in shapes,
        "attention_bias": bool(shapes.keys() & {"blk.0.attn_q.bias", "blk.0.attn_qkv.bias"}),
        "mlp_bias": "blk.0.ffn_gate.bias" in shapes,
        "bos_token_id": file.meta.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": file.meta.get("tokenizer.ggml.eos_token_id"),
    }
    keys |= architecture.gguf_keys(meta)
    rotary_dim = round(head_dim * keys.get("partial_rotary_factor", 1.0))
    if meta.integer("rope.dimension_count", rotary_dim) != rotary_dim:
        name = f"{file.architecture}.rope.dimension_count"
        raise CheckpointError(f"{file.path}: {name} must be {rotary_dim}")
    return keys


def _metadata(file: GGUFFile) -> GGUFMetadata:
    """A float32 of the file becomes the shortest decimal that rounds to it (1e-05, not
    9.999999747378752e-06).
    """
    values = {
        key: float(str(np.float32(value))) if isinstance(value, float) else value
        for key, value in file.meta.items()
    }
    shapes = {t.name: tuple(map(int, reversed(t.shape))) for t in file.tensors}
    factors = {
        t.name: tuple(float(str(value)) for value in np.asarray(t.data, np.float32).reshape(-1))
        for t in file.tensors
        if t.name.startswith(ROPE_TENSORS)
    }
    return GGUFMetadata(file.path, file.architecture, values, shapes, factors)


def _generation(file: GGUFFile) -> dict[str, Any]:
    """All tokens that end an output by the metadata: end of sequence, of turn, of message."""
    keys = (f"tokenizer.ggml.{k}_token_id" for k in ("eos", "eot", "eom"))
    ids = [file.meta[k] for k in keys if file.meta.get(k) is not None]
    return {
        "bos_token_id": file.meta.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": list(dict.fromkeys(ids)) or None,
    }


def _rope_scaling(meta: GGUFMetadata, head_dim: int) -> dict[str, Any] | None:
    if divisors := meta.rope_factors.get(ROPE_FREQS):
        return _llama3_scaling(meta, np.asarray(divisors), head_dim)
    factor = meta.number("rope.scaling.factor", meta.number("rope.scale_linear", 1.0))
    kind = meta.get("rope.scaling.type", "linear")  # the format's default
    original = meta.get("rope.scaling.original_context_length")
    if kind == "yarn" and factor in (0.0, 1.0) and original:
        factor = meta.integer("context_length") / original
    if kind == "none" or factor in (0.0, 1.0):
        return None
    out: dict[str, Any] = {"rope_type": kind, "factor": factor}
    if original:
        out["original_max_position_embeddings"] = original
    if kind == "yarn":
        for name in ("beta_fast", "beta_slow"):
            if value := meta.get(f"rope.scaling.yarn_{name}"):
                out[name] = value
        if attention := meta.get("rope.scaling.yarn_attn_factor"):
            out["attention_factor"] = attention
        elif (attention := meta.number("rope.scaling.attn_factor", 1.0)) != 1.0:
            # The format's factor multiplies the one that follows from `factor`.
            out["attention_factor"] = attention * (0.1 * math.log(max(factor, 1.0)) + 1.0)
    elif kind != "linear":
        key = f"{meta.architecture}.rope.scaling.type"
        raise CheckpointError(f"{meta.path}: {key} {kind!r} is not supported")
    return out


def llama3_divisors(
    theta: float, head_dim: int, factor: float, low: float, high: float, context: int
) -> npt.NDArray[np.float64]:
    """[head_dim / 2] divisors of the rotary frequencies (Llama 3.1: long waves slower, short ones
    unchanged).
    """
    frequencies = theta ** (-np.arange(0, head_dim, 2) / head_dim)
    smooth = (context * frequencies / (2 * math.pi) - low) / (high - low)
    smooth = smooth.clip(0.0, 1.0)
    divisors: npt.NDArray[np.float64] = 1.0 / ((1.0 - smooth) / factor + smooth)
    return divisors


def _llama3_scaling(
    meta: GGUFMetadata, divisors: npt.NDArray[np.float64], head_dim: int
) -> dict[str, Any]:
    """The named scaling that gives exactly these divisors; anything else is refused."""
    factor, theta = float(divisors.max()), meta.number("rope.freq_base", 10000.0)
    shape = (_LLAMA3_LOW, _LLAMA3_HIGH, _LLAMA3_CONTEXT)
    expected = llama3_divisors(theta, head_dim, factor, *shape)
    if expected.shape != divisors.shape or not np.allclose(expected, divisors, rtol=1e-4):
        raise CheckpointError(f"{meta.path}: {ROPE_FREQS} is not Llama 3's scaling; not supported")
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": _LLAMA3_LOW,
        "high_freq_factor": _LLAMA3_HIGH,
        "original_max_position_embeddings": _LLAMA3_CONTEXT,
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    text = json.dumps(content, ensure_ascii=False, indent=None if len(content) > 60 else 1)
    path.write_text(text + "\n", encoding="utf-8")
