"""GGUF files whose tensors are of several types: what stays packed, and what is widened."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import structlog

from engine.base.option_groups import ModelOptions
from engine.checkpoint.packed import layout_version, packed_file, read_packed
from engine.checkpoint.source import Checkpoint, resolve, weights
from engine.kernels import kernels
from engine.runner.loader import load_model
from engine.runner.native_model import NativeModel
from engine.step.loading import numeric_profile
from tests.support import tiny_gguf
from tests.support.packed_rows import random_rows
from tests.support.paged import CPU, Bench, bfloat16_kv

WIDTH, VOCAB = 256, 269
SHAPES = {
    "attn_q": (256, WIDTH),
    "attn_k": (128, WIDTH),
    "attn_v": (128, WIDTH),
    "attn_output": (WIDTH, 256),
    "ffn_gate": (512, WIDTH),
    "ffn_up": (512, WIDTH),
    "ffn_down": (WIDTH, 512),
}
NUMBERS = tiny_gguf.NUMBERS | {
    "block_count": 1,
    "embedding_length": WIDTH,
    "feed_forward_length": 512,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
}
# As llama.cpp's Q4_K_M has them, and with parts that are not quantised.
MIXED = {"attn_v": "q6_k", "ffn_down": "q6_k", "token_embd": "q6_k"}
TYPES: dict[str, tuple[str, Mapping[str, str]]] = {
    "Q4_K_M": ("q4_k", MIXED),
    "Q5_K_M": ("q5_k", MIXED | {"ffn_up": "q5_0"}),
    "Q4_K_M of odd widths": ("q5_0", {"attn_v": "q8_0", "ffn_down": "q4_k"}),
    "IQ4_XS": ("iq4_xs", {"attn_k": "iq4_nl", "attn_v": "q5_1", "token_embd": "q8_0"}),
    "MXFP4": ("mxfp4", {"attn_k": "f32", "ffn_gate": "f32", "token_embd": "q8_0"}),
}


def gguf_file(path: Path, kind: str, others: Mapping[str, str]) -> Path:
    """A model of one layer, each tensor's type by its short name, or `kind`."""
    rng = np.random.default_rng(5)
    shapes = {f"blk.0.{name}": shape for name, shape in SHAPES.items()}
    shapes["token_embd"] = (VOCAB, WIDTH)
    norms = ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm")
    tensors = {f"{name}.weight": np.ones(WIDTH, np.float32) for name in norms}
    packed = {}
    for name, (rows, columns) in shapes.items():
        chosen = others.get(name.rpartition(".")[2], kind)
        if chosen == "f32":
            values = rng.standard_normal((rows, columns), dtype=np.float32)
            tensors[f"{name}.weight"] = values * np.float32(columns**-0.5)
        else:
            data = random_rows(chosen, rows, columns, rng, columns**-0.5)
            packed[f"{name}.weight"] = (chosen, data)
    return tiny_gguf.write(path, arch="llama", numbers=NUMBERS, tensors=tensors, packed=packed)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIPTYCH_CACHE_DIR", str(tmp_path / "cache"))


def logits(model: object, prompt: list[int]) -> np.ndarray:
    bench = Bench(model, block_size=16)  # type: ignore[arg-type]
    return bench.step((bench.sequence(prompt), len(prompt), len(prompt))).numpy().copy()


@pytest.mark.parametrize("types", TYPES.values(), ids=TYPES.keys())
def test_a_file_of_several_types_stays_packed(
    types: tuple[str, Mapping[str, str]], tmp_path: Path
) -> None:
    import torch

    path = gguf_file(tmp_path / "m.gguf", *types)
    checkpoint = resolve(str(path))
    packed = packed_file(checkpoint, "auto")
    found = read_packed(packed, checkpoint.config)
    kind, others = types
    qkv = [others.get(name, kind).replace("f32", "bf16") for name in ("attn_q", "attn_k", "attn_v")]
    merged = [k for i, k in enumerate(qkv) if i == 0 or qkv[i - 1] != k]
    assert [part.kind for part in found.matrices["0.qkv"]] == merged
    if "f32" not in others.values():
        assert packed.stat().st_size <= path.stat().st_size + 4096, "no more than the file"
    prompt = [random.Random(i).randrange(VOCAB) for i in range(40)]
    exact = load_model(checkpoint.config, weights(checkpoint, "float32"), torch.float32, CPU)
    with bfloat16_kv():
        expected = logits(exact, prompt)
    if (library := kernels()) is not None:
        got = logits(NativeModel(checkpoint.config, found, library), prompt)
        assert np.abs(got - expected).max() < 3e-3 * np.abs(expected).max()


def checkpoint_of(path: Path, kind: str, others: Mapping[str, str]) -> Checkpoint:
    return resolve(str(gguf_file(path, kind, others)))


def test_only_files_that_come_out_otherwise_have_another_name(tmp_path: Path) -> None:
    same = [("q8_0", {}), ("q4_0", {"token_embd": "q8_0"}), ("f32", {"ffn_down": "q4_1"})]
    for i, (kind, others) in enumerate(same):
        checkpoint = checkpoint_of(tmp_path / f"{i}.gguf", kind, others)
        assert layout_version(checkpoint, "auto") == 1, kind
    differing = [*TYPES.values(), ("q8_0", {"attn_v": "q4_0"}), ("f32", {"ffn_up": "q8_0"})]
    for i, (kind, others) in enumerate(differing):
        checkpoint = checkpoint_of(tmp_path / f"other-{i}.gguf", kind, others)
        assert layout_version(checkpoint, "auto") == 2, kind
        assert layout_version(checkpoint, "bf16") == 1
        profile = numeric_profile(checkpoint, ModelOptions(), "bfloat16", native=True)
        assert " weights=gguf-2 " in profile


def test_a_type_without_a_kernel_is_widened_and_the_log_names_it(tmp_path: Path) -> None:
    checkpoint = checkpoint_of(tmp_path / "m.gguf", "q8_0", {"ffn_up": "q2_k", "ffn_down": "q2_k"})
    with structlog.testing.capture_logs() as lines:
        path = packed_file(checkpoint, "auto")
    (line,) = (line for line in lines if "widened" in line["event"])
    assert line["event"].startswith("Q2_K is widened to bfloat16")
    assert line["tensors"] == 2
    matrices = read_packed(path, checkpoint.config).matrices
    assert [part.kind for part in matrices["0.gate_up"]] == ["q8_0", "bf16"]
