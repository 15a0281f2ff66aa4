"""Tiny GGUF files, written the way llama.cpp's converter writes them (q and k rows permuted for
llama).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.quants import quantize

Q8_0 = gguf.GGMLQuantizationType.Q8_0
TEXT = "hello world, 12345 hallo welt! the theatre's there"


def byte_level_vocab() -> tuple[list[str], list[str]]:
    """(tokens, merges): three control tokens, the 256 bytes, and a few merges."""
    from tokenizers.pre_tokenizers import ByteLevel

    merges = ["h e", "l l", "he ll", "t he", "Ġ the", "Ġ w", "1 2", "12 3", "4 5", "123 45"]
    tokens = ["<|end|>", "<s>", "<|im|>", *sorted(ByteLevel.alphabet())]
    tokens += [m.replace(" ", "") for m in merges]
    return tokens, merges


def permute(rows: np.ndarray, num_heads: int) -> np.ndarray:
    """llama.cpp's order of q and k rows: the two halves of a head are interleaved."""
    half = rows.shape[0] // num_heads // 2
    order = [
        h * 2 * half + part * half + i
        for h in range(num_heads)
        for i in range(half)
        for part in (0, 1)
    ]
    return rows[order]


def write(
    path: Path,
    *,
    arch: str,
    numbers: dict[str, int | float],
    tensors: dict[str, np.ndarray],
    quantized: frozenset[str] = frozenset(),
    packed: Mapping[str, tuple[str, np.ndarray]] | None = None,
    meta: dict[str, Any] | None = None,
    pre: str = "smollm",
    tokens_more: Sequence[tuple[str, int]] = (),
    part_tensors: int = 0,
) -> Path:
    """`numbers` are keys under `arch.`, `meta` whole keys; `tensors` by GGUF name, fp32.

    `packed` are types and rows of bytes; `tokens_more` are (token, type) behind the usual
    vocabulary. Files of at most `part_tensors` tensors where that is not 0:
    path-00001-of-0000N.gguf.
    """
    writer = gguf.GGUFWriter(path, arch, split_max_tensors=part_tensors)
    for key, value in numbers.items():
        if isinstance(value, int):
            writer.add_uint32(f"{arch}.{key}", value)
        else:
            writer.add_float32(f"{arch}.{key}", value)
    tokens, merges = byte_level_vocab()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    types = [3, 3, 4] + [1] * (len(tokens) - 3)
    writer.add_token_list(tokens + [token for token, _ in tokens_more])
    writer.add_token_types(types + [kind for _, kind in tokens_more])
    writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(0)
    for key, value in (meta or {}).items():
        adders: dict[type, Any] = {
            bool: writer.add_bool,
            int: writer.add_uint32,
            list: writer.add_array,
            str: writer.add_string,
        }
        adders[type(value)](key, value)
    for name, values in tensors.items():
        if name in quantized:
            writer.add_tensor(name, quantize(values, Q8_0), raw_dtype=Q8_0)
        else:
            writer.add_tensor(name, values)
    for name, (kind, rows) in (packed or {}).items():
        writer.add_tensor(name, rows, raw_dtype=gguf.GGMLQuantizationType[kind.upper()])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _layers(
    vocab: int, num_layers: int, *, bias: bool, qk_norm: bool, head_dim: int, seed: int
) -> dict[str, Any]:
    """{gguf name: (Hugging Face name, values in Hugging Face order)} of hidden 64, 4 heads, 2 KV
    heads.
    """
    q, kv = 4 * head_dim, 2 * head_dim
    r = np.random.default_rng(seed)

    def values(*shape: int) -> np.ndarray:
        return r.standard_normal(shape, dtype=np.float32)

    out: dict[str, Any] = {"token_embd.weight": ("model.embed_tokens.weight", values(vocab, 64))}
    shapes = {
        "attn_norm": ("input_layernorm", (64,)),
        "attn_q": ("self_attn.q_proj", (q, 64)),
        "attn_k": ("self_attn.k_proj", (kv, 64)),
        "attn_v": ("self_attn.v_proj", (kv, 64)),
        "attn_output": ("self_attn.o_proj", (64, q)),
        "ffn_norm": ("post_attention_layernorm", (64,)),
        "ffn_gate": ("mlp.gate_proj", (96, 64)),
        "ffn_up": ("mlp.up_proj", (96, 64)),
        "ffn_down": ("mlp.down_proj", (64, 96)),
    }
    if qk_norm:
        shapes["attn_q_norm"] = ("self_attn.q_norm", (head_dim,))
        shapes["attn_k_norm"] = ("self_attn.k_norm", (head_dim,))
    for i in range(num_layers):
        for short, (name, shape) in shapes.items():
            out[f"blk.{i}.{short}.weight"] = (f"model.layers.{i}.{name}.weight", values(*shape))
            if bias and short in ("attn_q", "attn_k", "attn_v"):
                bias_name = f"model.layers.{i}.{name}.bias"
                out[f"blk.{i}.{short}.bias"] = (bias_name, values(shape[0]))
    out["output_norm.weight"] = ("model.norm.weight", values(64))
    return out


NUMBERS: dict[str, int | float] = {
    "block_count": 2,
    "context_length": 512,
    "embedding_length": 64,
    "feed_forward_length": 96,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "rope.freq_base": 10000.0,
}


def tiny(
    path: Path,
    *,
    arch: str = "llama",
    bias: bool = False,
    untied: bool = False,
    head_dim: int = 16,
    numbers: dict[str, Any] | None = None,
    extra: dict[str, np.ndarray] | None = None,
    quantized: frozenset[str] = frozenset(),
    seed: int = 0,
    tokens_more: Sequence[tuple[str, int]] = (),
    **kwargs: Any,
) -> dict[str, np.ndarray]:
    """Write a random model; returns its weights under Hugging Face names, before quantisation."""
    vocab = len(byte_level_vocab()[0]) + len(tokens_more)
    qk_norm = arch == "qwen3"
    tensors = _layers(vocab, 2, bias=bias, qk_norm=qk_norm, head_dim=head_dim, seed=seed)
    if head_dim != 16:
        numbers = {"attention.key_length": head_dim} | (numbers or {})
    if untied:
        head = np.random.default_rng(seed + 1).standard_normal((vocab, 64), dtype=np.float32)
        tensors["output.weight"] = ("lm_head.weight", head)
    stored = {name: values for name, (_, values) in tensors.items()}
    if arch == "llama":
        for name in stored:
            if ".attn_q." in name or ".attn_k." in name:
                stored[name] = permute(stored[name], 4 if ".attn_q." in name else 2)
    write(
        path,
        arch=arch,
        numbers={k: v for k, v in (NUMBERS | (numbers or {})).items() if v is not None},
        tensors=stored | (extra or {}),
        quantized=quantized,
        tokens_more=tokens_more,
        **kwargs,
    )
    return dict(tensors.values())
