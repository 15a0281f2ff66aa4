"""Random decoders of odd shapes for the CPU kernels, and what they should compute.

    python -m tests.support.random_decoder THREADS FIRST END

runs the cases FIRST .. END - 1 on so many threads and prints one digest of all logits; a pool of
threads is started once a process.
"""

from __future__ import annotations

import hashlib
import random
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from engine.attention.batch import Row
from engine.base.kv_layout import KVLayout
from engine.cache.kv_cache import KVCache
from engine.checkpoint.gguf_weights import cast
from engine.checkpoint.packed import PackedWeights
from engine.checkpoint.packing import KINDS, Matrix, pack_bf16, pack_rows, quantise
from engine.kernels import Kernels, kernels
from engine.kernels.threads import Threads
from engine.models.config import NO_ROPE, ModelConfig, RopeScaling, RopeSpec
from engine.runner.native_model import NativeModel
from tests.support import random_experts
from tests.support.packed_rows import dequantised, random_rows
from tests.support.paged import CPU, tiny_config

Floats = npt.NDArray[np.floating[Any]]
HEADS = ((1, 1), (2, 1), (3, 3), (4, 2), (7, 1), (12, 2), (13, 1), (96, 1))
WINDOWS = (0, 0, 0, 1, 2, 16, 17, 63, 64, 65, 255, 256, 257, 300)


def rounded(x: Floats) -> Floats:
    """To bfloat16 and back."""
    bits = cast(np.ascontiguousarray(x, np.float32), "bfloat16", "").astype(np.uint32) << 16
    return bits.view(np.float32)


@dataclass(frozen=True, slots=True)
class Decoder:
    """A model, and its weights as numbers."""

    model: NativeModel
    values: dict[str, Floats]  # of matrices
    vectors: dict[str, Floats]

    @property
    def config(self) -> ModelConfig:
        return self.model.config

    def pool(self, block_size: int, num_blocks: int) -> KVCache:
        """A pool full of NaN."""
        c = self.config
        layout = KVLayout(c.num_layers, c.num_kv_heads, c.head_dim, block_size, "bfloat16")
        cache = KVCache(layout, num_blocks, CPU)
        cache.pool.fill_(float("nan"))
        return cache

    def logits(self, token_ids: list[int]) -> Floats:
        """What the model computes of a text, in doubles; K and V rounded as they are in a pool."""
        c, num_tokens = self.config, len(token_ids)
        positions = np.arange(num_tokens)

        def norm(name: str, x: Floats) -> Floats:
            if name not in self.vectors:
                return x
            scale = np.sqrt((x * x).mean(-1, keepdims=True) + c.rms_norm_eps)
            out: Floats = x / scale * self.vectors[name]
            return out

        def product(name: str, x: Floats) -> Floats:
            out: Floats = x @ self.values[name].T.astype(np.float64)
            if f"{name}.bias" in self.vectors:
                out = out + self.vectors[f"{name}.bias"]
            return out

        def rotated(layer: int, x: Floats) -> Floats:
            if (table := c.rope_of(layer)) == NO_ROPE:
                return x
            dim = c.ropes[table].dim or c.head_dim
            angles = positions[:, None] * c.ropes[table].theta ** (-np.arange(0, dim, 2) / dim)
            cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
            a, b, rest = np.split(x, [dim // 2, dim], -1)
            return np.concatenate([a * cos - b * sin, b * cos + a * sin, rest], -1)

        def capped(x: Floats, cap: float) -> Floats:
            out: Floats = cap * np.tanh(x / cap) if cap else x
            return out

        def add(name: str, x: Floats, part: Floats) -> Floats:
            return x + c.residual_scale * norm(name, part)

        def activate(x: Floats) -> Floats:
            return gelu_tanh(x) if c.activation == "gelu_tanh" else x / (1 + np.exp(-x))

        x: Floats = self.values["embedding"][token_ids].astype(np.float64) * c.embedding_scale
        for i in range(c.num_layers):
            spec = c.attention[i]
            hidden = positions[None] > positions[:, None]
            if spec.window:
                hidden |= positions[None] <= positions[:, None] - spec.window
            qkv = product(f"{i}.qkv", norm(f"{i}.input_norm", x))
            qkv = qkv.reshape(num_tokens, -1, c.head_dim)
            q, k, v = np.split(qkv, [c.num_heads, c.num_heads + c.num_kv_heads], 1)
            if c.whole_qk_norm:
                q = norm(f"{i}.q_norm", q.reshape(num_tokens, -1)).reshape(q.shape)
                k = norm(f"{i}.k_norm", k.reshape(num_tokens, -1)).reshape(k.shape)
            else:
                q, k = norm(f"{i}.q_norm", q), norm(f"{i}.k_norm", k)
            group = c.num_heads // c.num_kv_heads
            k, v = (np.repeat(rounded(part), group, 1) for part in (rotated(i, k), v))
            q = rotated(i, q)
            if c.query_beta:
                growth = 1 + c.query_beta * np.log1p(positions // c.query_period)
                q = q * growth[:, None, None]
            scores = np.einsum("qhd,khd->hqk", q, k)
            scores = capped(scores * (spec.scale or c.head_dim**-0.5), spec.softcap)
            scores = np.where(hidden, -np.inf, scores)
            sinks = self.vectors.get(f"{i}.sinks", np.full(c.num_heads, -np.inf))
            scores = np.concatenate([scores, np.tile(sinks[:, None, None], (1, num_tokens, 1))], -1)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            weights = weights[..., :-1] / weights.sum(-1, keepdims=True)
            out = np.einsum("hqk,khd->qhd", weights, v).reshape(num_tokens, -1)
            x = add(f"{i}.out_norm", x, product(f"{i}.out", out))
            normed = norm(f"{i}.mlp_norm", x)
            if c.experts and i in c.experts.layers:
                vectors, values = _of_layer(self.vectors, i), _of_layer(self.values, i)
                inner = random_experts.expected(c.experts, normed, vectors, values, activate)
            else:
                gate, up = np.split(product(f"{i}.gate_up", normed), 2, -1)
                inner = product(f"{i}.down", activate(gate) * up)
            x = add(f"{i}.down_norm", x, inner)
        out = product("embedding" if c.tie_word_embeddings else "head", norm("norm", x))
        return capped(out * c.logit_scale, c.logit_softcap)


def _of_layer(found: dict[str, Floats], layer: int) -> dict[str, Floats]:
    prefix = f"{layer}."
    return {n.removeprefix(prefix): x for n, x in found.items() if n.startswith(prefix)}


def gelu_tanh(x: Floats) -> Floats:
    """The approximation of GELU by tanh."""
    out: Floats = 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    return out


def _features(rng: random.Random, num_layers: int, head_dim: int) -> dict[str, Any]:
    """What only some models have, each now and then; most decoders have none of it."""
    if rng.random() < 0.4:
        return {}
    windows = [rng.choice(WINDOWS) for _ in range(num_layers)]
    dims = [32 * rng.randint(1, head_dim // 32) for _ in range(2)]
    found: dict[str, Any] = {
        "layer_windows": tuple(windows),
        "attention_scale": rng.choice((0.02, 0.1, 0.3)),
        "attention_softcap": rng.choice((0.5, 2.0, 50.0)),
        "activation": "gelu_tanh",
        "embedding_scale": rng.choice((0.1, 3.0, 30.0)),
        "residual_scale": rng.choice((0.2, 2.0)),
        "logit_scale": rng.choice((0.06, 4.0)),
        "logit_softcap": rng.choice((0.3, 5.0, 30.0)),
        "whole_qk_norm": True,
        "query_beta": rng.choice((0.05, 0.1)),
        "rotary_dim": dims[0],
        "other_ropes": (RopeSpec(500.0, RopeScaling(), dims[1]),),
    }
    chosen = {name: value for name, value in found.items() if rng.random() < 0.5}
    if "query_beta" in chosen:
        chosen["query_period"] = rng.choice((7, 100))
    tables = range(NO_ROPE, 1 + len(chosen.get("other_ropes", ())))
    if rng.random() < 0.5:
        chosen["layer_ropes"] = tuple(rng.choice(tables) for _ in range(num_layers))
    return chosen


def _norms(rng: random.Random, c: ModelConfig) -> dict[str, int]:
    """The norms of a layer, and their sizes."""
    before, after = ["input_norm", "mlp_norm"], ["out_norm", "down_norm"]
    names = before + [name for name in after if rng.random() < 0.3]
    if rng.random() < 0.2:
        names = after  # without any, numbers grow from layer to layer
    sizes = dict.fromkeys(names, c.hidden_size)
    if c.whole_qk_norm:
        return sizes | {"q_norm": c.num_heads * c.head_dim, "k_norm": c.num_kv_heads * c.head_dim}
    if rng.random() < 0.3:
        return sizes | {"q_norm": c.head_dim, "k_norm": c.head_dim}
    return sizes


def make(rng: random.Random, library: Kernels) -> Decoder:
    """A decoder of a random shape, every matrix or part of one in a kind of its own."""
    heads, kv_heads = rng.choice(HEADS)
    head_dim = 32 if heads == 96 else rng.choice((32, 64, 96, 128, 256))
    num_layers = rng.randint(1, 3)
    features = _features(rng, num_layers, head_dim)
    c = tiny_config(
        num_layers=num_layers,
        hidden_size=32 * rng.choice((1, 2, 3, 4, 5, 8, 8)),
        intermediate_size=32 * rng.choice((1, 2, 3, 4, 5, 6, 8, 8)),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=rng.choice((1, 5, 15, 16, 17, 33, 63, 64, 65, 131)),
        sliding_window=rng.choice(WINDOWS),
        tie_word_embeddings=rng.random() < 0.5,
        experts=random_experts.random_spec(rng, num_layers),
        attention_sinks=rng.random() < 0.3,
        **features,
    )
    norms = _norms(rng, c)
    noise = np.random.default_rng(rng.randrange(1 << 30))
    matrices: dict[str, tuple[Matrix, ...]] = {}
    values: dict[str, Floats] = {}
    vectors: dict[str, npt.NDArray[np.float32]] = {"norm": np.ones(c.hidden_size, np.float32)}

    def matrix(kind: str, rows: int, columns: int) -> tuple[Matrix, Floats]:
        wanted = (noise.standard_normal((rows, columns)) * columns**-0.5).astype(np.float32)
        if kind == "bf16":
            data = pack_bf16(cast(wanted, "bfloat16", ""))
            return Matrix(kind, rows, columns, data), rounded(wanted)
        if kind in ("q4_0", "q4_1", "q8_0"):
            packed = quantise(kind, wanted)
        else:
            packed = random_rows(kind, rows, columns, noise, columns**-0.5)
        return Matrix(kind, rows, columns, pack_rows(kind, packed)), dequantised(kind, packed)

    def add(name: str, columns: int, *sizes: int) -> None:
        joined = [sum(sizes)] if rng.random() < 0.5 else sizes
        kinds = ["bf16", *(kind for kind, k in KINDS.items() if columns % k.columns == 0)]
        parts = [matrix(rng.choice(kinds), size, columns) for size in joined]
        matrices[name] = tuple(part for part, _ in parts)
        values[name] = np.concatenate([exact for _, exact in parts])
        if name != "embedding" and rng.random() < 0.4:
            bias = noise.standard_normal(sum(sizes)) * 0.1
            vectors[f"{name}.bias"] = bias.astype(np.float32)

    inner = heads * head_dim
    for i in range(c.num_layers):
        add(f"{i}.qkv", c.hidden_size, inner, *[kv_heads * head_dim] * 2)
        add(f"{i}.out", inner, c.hidden_size)
        if c.attention_sinks:
            vectors[f"{i}.sinks"] = noise.standard_normal(heads).astype(np.float32)
        if c.experts and i in c.experts.layers:
            found = random_experts.random_vectors(c.experts, c.hidden_size, noise)
            vectors |= {f"{i}.{name}": values for name, values in found.items()}
            for name, (columns, rows) in random_experts.matrices(c.experts, c.hidden_size).items():
                add(f"{i}.{name}", columns, *rows)
        else:
            add(f"{i}.gate_up", c.hidden_size, *[c.intermediate_size] * 2)
            add(f"{i}.down", c.intermediate_size, c.hidden_size)
        for name, size in norms.items():
            norm = 1 + 0.1 * noise.standard_normal(size)
            vectors[f"{i}.{name}"] = norm.astype(np.float32)
    add("embedding", c.hidden_size, c.vocab_size)
    if not c.tie_word_embeddings:
        add("head", c.hidden_size, c.vocab_size)
    model = NativeModel(c, PackedWeights(matrices, vectors), library)
    return Decoder(model, values, dict(vectors))


def check(seed: int, library: Kernels) -> bytes:
    """Some texts alone, near to the doubles; then in ragged steps: the same bits. Returns them."""
    rng = random.Random(seed)
    decoder = make(rng, library)
    block_size = rng.choice((16, 32, 48, 64, 128))
    edge = rng.choice((16, 64, 256, 320, 512)) + rng.randint(-2, 2)
    lengths = [edge, rng.randint(1, 40), rng.randint(1, 300)][: rng.randint(1, 3)]
    vocab = decoder.config.vocab_size
    texts = [[rng.randrange(vocab) for _ in range(length)] for length in lengths]
    sizes = [-(-length // block_size) for length in lengths]
    free = list(range(sum(sizes) + 1))
    rng.shuffle(free)
    tables = [[free.pop() for _ in range(size)] for size in sizes]

    def run(rows: list[Row], pool: KVCache) -> torch.Tensor:
        return decoder.model.forward(rows, pool).clone()

    alone = []
    for text, table in zip(texts, tables, strict=True):
        pool = decoder.pool(block_size, sum(sizes) + 1)
        alone.append(run([Row(text, 0, table, len(text))], pool))
        expected = decoder.logits(text)
        errors = np.abs(alone[-1].numpy() - expected).max(-1) / np.abs(expected).max()
        # Where two experts are nearly equal, rounding decides which of them a token takes.
        error = np.quantile(errors, 0.9) if decoder.config.experts else errors.max()
        assert error < 3e-2, (seed, error, decoder.config)
    pool = decoder.pool(block_size, sum(sizes) + 1)
    done = [0] * len(texts)
    while left := [i for i, text in enumerate(texts) if done[i] < len(text)]:
        rows, expected_rows = [], []
        for i in rng.sample(left, rng.randint(1, len(left))):
            start = done[i]
            count = min(rng.choice((1, 1, 2, 5, 7, 12, 13, 30, 130, 600)), len(texts[i]) - start)
            done[i] = end = start + count
            wanted = count if rng.random() < 0.8 else rng.randint(0, count)
            table = tables[i] + [0] * rng.randint(0, 3)  # longer than needed
            rows.append(Row(texts[i][start:end], start, table, wanted))
            expected_rows.append(alone[i][end - wanted : end])
        got, same = run(rows, pool), torch.cat(expected_rows)
        assert torch.equal(got, same), (seed, decoder.config, rows)
    return b"".join(logits.numpy().tobytes() for logits in alone)


def main() -> None:
    num_threads, first, end = map(int, sys.argv[1:])
    library = kernels()
    assert library is not None
    if num_threads > 1:
        assert Threads(library, num_threads).count == num_threads
    digest = hashlib.sha256()
    for seed in range(first, end):
        digest.update(check(seed, library))
    print(digest.hexdigest())


if __name__ == "__main__":
    main()
