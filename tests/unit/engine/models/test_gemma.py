"""Configuration files of Gemma 2 and 3, as published and as transformers 5 writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from engine.base.errors import CheckpointError
from engine.checkpoint.config import read_config
from engine.kernels.decoder import why_not_decoder
from engine.models.config import ModelConfig, RopeScaling, RopeSpec

BASE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 7,
    "head_dim": 32,
    "vocab_size": 100,
    "max_position_embeddings": 512,
    "sliding_window": 64,
    "query_pre_attn_scalar": 16,
}
LISTED = [*["full_attention", "sliding_attention"] * 3, "full_attention"]
GEMMA2: dict[str, Any] = BASE | {"model_type": "gemma2"}
GEMMA3: dict[str, Any] = BASE | {"model_type": "gemma3_text"}


def read(folder: Path, data: dict[str, Any]) -> ModelConfig:
    (folder / "config.json").write_text(json.dumps(data))
    return read_config(folder)


def test_an_older_gemma_3_file(tmp_path: Path) -> None:
    scaling = {"rope_type": "linear", "factor": 8.0}
    rope = {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": scaling}
    c = read(tmp_path, GEMMA3 | rope | {"sliding_window_pattern": 6})
    assert c.layer_windows == (64, 64, 64, 64, 64, 0, 64)
    assert c.layer_ropes == (1, 1, 1, 1, 1, 0, 1)
    assert c.ropes == (RopeSpec(1e6, RopeScaling("linear", 8.0)), RopeSpec(1e4))
    assert (c.attention_scale, c.embedding_scale, c.activation) == (0.25, 8.0, "gelu_tanh")
    assert (c.attention_softcap, c.logit_softcap, c.tie_word_embeddings) == (0.0, 0.0, True)
    assert why_not_decoder(c) == ""


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("Gemma2Config", {"final_logit_softcapping": 20.0}),
        ("Gemma2Config", {"attn_logit_softcapping": 10.0, "attention_bias": True}),
        ("Gemma3TextConfig", {}),
        ("Gemma3TextConfig", {"layer_types": LISTED}),
    ],
)
def test_what_transformers_saves(tmp_path: Path, name: str, changes: dict[str, Any]) -> None:
    import transformers

    theirs = getattr(transformers, name)(**BASE, **changes)
    theirs.save_pretrained(tmp_path)
    c = read_config(tmp_path)
    full = [kind == "full_attention" for kind in theirs.layer_types]
    assert [window == 0 for window in c.layer_windows] == full
    assert c.attention_softcap == (theirs.attn_logit_softcapping or 0.0)
    assert c.logit_softcap == (theirs.final_logit_softcapping or 0.0)
    assert c.attention_bias == theirs.attention_bias
    thetas = [c.ropes[c.rope_of(layer)].theta for layer in range(7)]
    parameters = theirs.rope_parameters
    if name == "Gemma3TextConfig":
        assert thetas == [parameters[kind]["rope_theta"] for kind in theirs.layer_types]
    else:
        assert thetas == [parameters["rope_theta"]] * 7


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_activation": "relu"}, "hidden_act 'relu' is not supported; known are silu"),
        ({"layer_types": ["full_attention"] * 6}, "layer_types"),
        ({"layer_types": ["chunked_attention"] * 7}, "layer_types"),
        ({"attn_logit_softcapping": -1}, "attn_logit_softcapping must be a number above zero"),
        ({"query_pre_attn_scalar": 0}, "query_pre_attn_scalar"),
        ({"sliding_window_pattern": "x"}, "sliding_window_pattern"),
    ],
)
def test_what_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read(tmp_path, GEMMA3 | changes)


def test_null_caps_are_none_and_absent_ones_are_gemma_2s(tmp_path: Path) -> None:
    c = read(tmp_path, GEMMA2)
    assert (c.attention_softcap, c.logit_softcap) == (50.0, 30.0)
    assert c.layer_windows == (64, 0, 64, 0, 64, 0, 64)
    nulls = {"attn_logit_softcapping": None, "final_logit_softcapping": None}
    c = read(tmp_path, GEMMA2 | nulls)
    assert (c.attention_softcap, c.logit_softcap) == (0.0, 0.0)
