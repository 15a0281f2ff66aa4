"""The file of packed weights: made once, whole or not at all, with every tensor of the model."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from engine.base.errors import CheckpointError
from engine.checkpoint import packed
from engine.checkpoint.packed import packed_file, read_packed
from engine.checkpoint.packing import (
    Run,
    entry_name,
    entry_shape,
    pack_rows,
    quantise,
    runs_of,
)
from engine.checkpoint.source import Checkpoint, resolve


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DIPTYCH_CACHE_DIR", str(tmp_path))
    return tmp_path


@pytest.fixture
def checkpoint(cache: Path) -> Checkpoint:
    return resolve("smollm2")


def test_the_default_model_keeps_its_own_types(checkpoint: Checkpoint) -> None:
    weights = read_packed(packed_file(checkpoint, "auto"), checkpoint.config)
    matrices = {name: matrix for name, (matrix,) in weights.matrices.items()}
    kinds = {name.rsplit(".", 1)[-1]: matrix.kind for name, matrix in matrices.items()}
    assert kinds == {"qkv": "q4_1", "out": "q4_1", "gate_up": "q4_1", "down": "q4_1"} | {
        "embedding": "q8_0"
    }
    assert len(weights.matrices) == 4 * 30 + 1, "the tied head is the embedding"
    assert len(weights.vectors) == 2 * 30 + 1
    qkv = matrices["7.qkv"]
    assert (qkv.rows, qkv.columns) == (960, 576)
    assert qkv.data.shape == (60, 576 // 32 * 320)


def test_it_is_made_once_however_many_ask(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    write = packed._write

    def counted(*args: Any) -> None:
        made.append(1)
        write(*args)

    monkeypatch.setattr(packed, "_write", counted)
    threads = [threading.Thread(target=packed_file, args=(checkpoint, "auto")) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert made == [1]


def test_a_damaged_file_is_made_again(checkpoint: Checkpoint) -> None:
    path = packed_file(checkpoint, "auto")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert packed_file(checkpoint, "auto").read_bytes() == whole


def test_a_cache_that_cannot_be_written_is_named(checkpoint: Checkpoint, cache: Path) -> None:
    (cache / "packed").write_text("in the way")
    with pytest.raises(CheckpointError, match="packed"):
        packed_file(checkpoint, "auto")


def test_rows_are_padded_with_zeros_to_a_group() -> None:
    values = np.random.default_rng(1).standard_normal((5, 64)).astype(np.float32)
    data = pack_rows("q8_0", quantise("q8_0", values))
    assert data.shape == (1, 2 * (32 + 512))
    body = data.reshape(2, 544)[:, 32:].reshape(2, 16, 16, 2)
    assert body[:, :, :5].any()
    assert not body[:, :, 5:].any()


# -- a folder in Hugging Face layout whose tensors are not those of its configuration --------------

Tensors = dict[str, np.ndarray]
FIRST = "model.layers.0"
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "vocab_size": 37,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
}
SIZES = {
    "self_attn.q_proj": (64, 64),
    "self_attn.k_proj": (32, 64),
    "self_attn.v_proj": (32, 64),
    "self_attn.o_proj": (64, 64),
    "mlp.gate_proj": (96, 64),
    "mlp.up_proj": (96, 64),
    "mlp.down_proj": (64, 96),
    "input_layernorm": (64,),
    "post_attention_layernorm": (64,),
}


def tensors() -> Tensors:
    rng = np.random.default_rng(3)
    shapes = {"model.embed_tokens.weight": (37, 64), "model.norm.weight": (64,)}
    for layer in range(2):
        shapes |= {f"model.layers.{layer}.{k}.weight": size for k, size in SIZES.items()}
    return {name: rng.standard_normal(size).astype(np.float16) for name, size in shapes.items()}


def folder(place: Path, content: Tensors, **changes: object) -> Path:
    place.mkdir()
    (place / "config.json").write_text(json.dumps(CONFIG | changes))
    (place / "tokenizer.json").write_text("{}")
    save_file(content, place / "model.safetensors")
    return place


def drop(name: str) -> Callable[[Tensors], object]:
    return lambda t: t.pop(name)


def put(name: str, array: np.ndarray) -> Callable[[Tensors], object]:
    return lambda t: t.update({name: array})


WRONG: dict[str, tuple[Callable[[Tensors], object], dict[str, object], str]] = {
    "no tensor": (
        drop(f"{FIRST}.mlp.down_proj.weight"),
        {},
        r"tensor model\.layers\.0\.mlp\.down_proj\.weight is missing",
    ),
    "outputs too few": (
        put(f"{FIRST}.self_attn.o_proj.weight", np.zeros((32, 64), np.float16)),
        {},
        r"model\.safetensors: tensor .*o_proj\.weight has shape \[32, 64\], expected \[64, 64\]",
    ),
    "inputs too many": (
        put(f"{FIRST}.self_attn.q_proj.weight", np.zeros((64, 96), np.float16)),
        {},
        r"q_proj\.weight has shape \[64, 96\], expected \[64, 64\]",
    ),
    "vocabulary too short": (
        put("model.embed_tokens.weight", np.zeros((36, 64), np.float16)),
        {},
        r"embed_tokens\.weight has shape \[36, 64\], expected \[37, 64\]",
    ),
    "norm too short": (
        put("model.norm.weight", np.zeros(32, np.float16)),
        {},
        r"norm\.weight has shape \[32\], expected \[64\]",
    ),
    "integers": (
        put(f"{FIRST}.mlp.up_proj.weight", np.zeros((96, 64), np.int8)),
        {},
        r"model\.safetensors: tensor .*up_proj\.weight has type I8",
    ),
    "a bias that is never added": (
        put(f"{FIRST}.self_attn.q_proj.bias", np.zeros(64, np.float16)),
        {},
        r"unexpected tensor model\.layers\.0\.self_attn\.q_proj\.bias in a LlamaForCausalLM",
    ),
    "no bias where one is promised": (
        lambda t: None,
        {"mlp_bias": True},
        r"tensor model\.layers\.0\.mlp\.gate_proj\.bias is missing",
    ),
    "no head": (
        lambda t: None,
        {"tie_word_embeddings": False},
        r"tensor lm_head\.weight is missing",
    ),
}


@pytest.mark.parametrize(("change", "config", "message"), WRONG.values(), ids=WRONG.keys())
def test_a_wrong_tensor_is_named_with_its_file(
    change: Callable[[Tensors], object],
    config: dict[str, object],
    message: str,
    cache: Path,
) -> None:
    content = tensors()
    change(content)
    checkpoint = resolve(str(folder(cache / "model", content, **config)))
    for choice in ("bf16", "int8"):
        with pytest.raises(CheckpointError, match=message):
            packed_file(checkpoint, choice)
    assert not list((cache / "packed").glob("*.safetensors"))
    assert not list((cache / "packed").glob(".*.part")), "nothing half-written is left"


def test_a_tied_models_own_head_is_not_used(cache: Path) -> None:
    content = tensors()
    content["lm_head.weight"] = np.ones((37, 64), np.float16)
    content[f"{FIRST}.self_attn.rotary_emb.inv_freq"] = np.ones(16, np.float32)
    checkpoint = resolve(str(folder(cache / "model", content)))
    weights = read_packed(packed_file(checkpoint, "bf16"), checkpoint.config)
    assert set(weights.matrices) == {"embedding"} | {
        f"{i}.{name}" for i in range(2) for name in ("qkv", "out", "gate_up", "down")
    }


@pytest.mark.parametrize("choice", ["bf16", "int8", "int4"])
def test_pieces_of_any_size_make_the_same_file(
    choice: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A large model is never in memory at once."""
    content = tensors()
    for layer in range(2):
        for part, size in (("q", 64), ("k", 32), ("v", 32), ("o", 64)):
            name = f"model.layers.{layer}.self_attn.{part}_proj.bias"
            content[name] = np.full(size, ord(part), np.float16)
    place = folder(cache / "model", content, attention_bias=True)
    checkpoint = resolve(str(place))
    path = packed_file(checkpoint, choice)
    whole = path.read_bytes()
    bias = read_packed(path, checkpoint.config).vectors["1.qkv.bias"]
    assert bias.tolist() == [113.0] * 64 + [107.0] * 32 + [118.0] * 32
    path.unlink()
    monkeypatch.setattr(packed, "_PIECE_BYTES", 1)
    assert packed_file(checkpoint, choice).read_bytes() == whole


def test_a_file_of_another_model_is_refused(cache: Path) -> None:
    """The kernels trust what is mapped."""
    checkpoint = resolve(str(folder(cache / "model", tensors())))
    path = packed_file(checkpoint, "bf16")
    changes: list[dict[str, Any]] = [
        {"hidden_size": 128},
        {"tie_word_embeddings": False},
        {"intermediate_size": 128},
        {"num_layers": 3},
        {"attention_bias": True},
    ]
    for change in changes:
        other = dataclasses.replace(checkpoint.config, **change)
        with pytest.raises(CheckpointError, match=f"{path}: has no .* of this model's shape"):
            read_packed(path, other)


def test_a_full_disk_leaves_nothing_behind(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = resolve(str(folder(cache / "model", tensors())))

    def full(kind: str, rows: np.ndarray) -> np.ndarray:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(packed, "pack_rows", full)
    with pytest.raises(CheckpointError, match="No space left on device; DIPTYCH_CACHE_DIR"):
        packed_file(checkpoint, "int8")
    assert [p.suffix for p in (cache / "packed").iterdir()] == [".lock"]


def test_an_entrys_name_holds_the_kind_of_each_part() -> None:
    runs = [Run("q4_1", 768), Run("q8_0", 192)]
    name = entry_name("3.qkv", runs)
    assert runs_of(name) == ("3.qkv", runs)
    assert entry_shape(runs, 64) == (768 * 2 * 20 + 192 * 2 * 34,)
    assert runs_of(entry_name("head", runs[:1])) == ("head", runs[:1])
    for vector in ("norm", "3.input_norm", "3.qkv.bias", "3.qkv.q4_1.0"):
        with pytest.raises(ValueError, match=r"unpack|literal|q4_1"):
            runs_of(vector)
