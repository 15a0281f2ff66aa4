"""An engine with a draft model, from options: what two workers must agree on, and its memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from decode.cli import ask_drafting
from decode.speculative.draft_model import ModelDrafter
from engine.build import Engine, build_engine
from engine.config import CacheOptions, DraftOptions, ModelOptions, StepOptions
from engine.errors import ConfigError
from engine.types import Role

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_hidden_layers": 3,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 101,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two models of one vocabulary, of configurations alone: weights come from a seed."""
    for name, changes in (("big", {}), ("small", {"num_hidden_layers": 1, "hidden_size": 32})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(CONFIG | changes))
        (tmp_path / name / "tokenizer.json").write_text("{}")
    return tmp_path


def build(folder: Path, draft: str, role: Role = Role.DECODE, drafter: str = "model") -> Engine:
    model = ModelOptions(
        model=str(folder / "big"),
        dtype="float32",
        device="cpu",
        seed_weights=1,
        draft_model=draft,
    )
    cache = CacheOptions(kv_cache_memory=1 << 20)
    drafting = ask_drafting(model, DraftOptions(drafter)) if role is Role.DECODE else None
    return build_engine(role, model, cache, StepOptions(), CollectorRegistry(), drafting)


def test_both_panels_agree_and_nobody_else_does(folder: Path) -> None:
    small = str(folder / "small")
    decode, prefill = build(folder, small), build(folder, small, Role.PREFILL)
    assert decode.identity.digest == prefill.identity.digest
    assert decode.identity.digest == build(folder, small, drafter="none").identity.digest
    others = [build(folder, "", drafter="none"), build(folder, "first:1"), build(folder, "first:2")]
    digests = {engine.identity.digest for engine in (decode, *others)}
    assert len(digests) == 4


def test_the_pool_holds_both(folder: Path) -> None:
    engine = build(folder, str(folder / "small"))
    # keys and values of 16 tokens in fp32: 3 layers of 2 heads of 16, 1 layer of 2 heads of 8
    assert engine.layout.block_bytes == 2 * 16 * 4 * (3 * 2 * 16 + 2 * 8)
    assert engine.core.pool.num_blocks == (1 << 20) // engine.layout.block_bytes
    assert engine.kv_cache.num_bytes == engine.core.pool.num_blocks * engine.layout.block_bytes
    assert engine.core.scheduler.speculation is not None
    assert isinstance(engine.core.scheduler.speculation.drafter, ModelDrafter)


def test_first_layers_share_the_targets_weights(folder: Path) -> None:
    core = build(folder, "first:2").core
    target, draft = core._runner._model, core._draft_runner._model  # type: ignore[attr-defined,union-attr]
    assert draft.weights.layers[1] is target.weights.layers[1]
    assert draft.weights.head is target.weights.head


def test_what_cannot_be_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="needs --draft-model"):
        build(folder, "")
    config = folder / "small" / "config.json"
    config.write_text(json.dumps(CONFIG | {"vocab_size": 99}))
    with pytest.raises(ConfigError, match="vocabulary of 99 tokens, big of 101"):
        build(folder, str(folder / "small"))
