"""config.json of Llama, Mistral and Qwen2, in both spellings, against transformers' reading of the
same.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from engine.base.errors import CheckpointError
from engine.checkpoint.config import read_config
from engine.checkpoint.fingerprint import rope_text
from engine.checkpoint.wrappers import DEFAULTS
from engine.models.config import ModelConfig, RopeScaling

BASE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 4,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "vocab_size": 100,
    "max_position_embeddings": 512,
}


def read(folder: Path, changes: dict[str, Any], generation: Any = None) -> ModelConfig:
    (folder / "config.json").write_text(json.dumps(BASE | changes))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return read_config(folder)


def qwen2(**changes: Any) -> dict[str, Any]:
    return {"architectures": ["Qwen2ForCausalLM"], **changes}


LONG, SHORT = [2.0] * 8, [1.5] * 8
LONGROPE: dict[str, Any] = {
    "rope_type": "longrope",
    "long_factor": LONG,
    "short_factor": SHORT,
    "original_max_position_embeddings": 128,
}


def mistral(**changes: Any) -> dict[str, Any]:
    return {"architectures": ["MistralForCausalLM"], **changes}


def test_defaults(tmp_path: Path) -> None:
    config = read(tmp_path, {})
    assert config == ModelConfig(
        architecture="LlamaForCausalLM",
        num_layers=4,
        hidden_size=64,
        intermediate_size=128,
        num_heads=4,
        num_kv_heads=4,
        head_dim=16,
        vocab_size=100,
        max_position_embeddings=512,
        rms_norm_eps=1e-6,
        rope_theta=10000.0,
        rope_scaling=RopeScaling(),
        tie_word_embeddings=False,
        attention_bias=False,
        output_bias=False,
        mlp_bias=False,
        sliding_window=0,
        bos_token_id=None,
        eos_token_ids=(),
    )


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("LlamaConfig", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
        ("LlamaConfig", {"head_dim": 32, "num_key_value_heads": 2, "rope_theta": 5e5}),
        ("MistralConfig", {"sliding_window": None, "num_key_value_heads": 2}),
        ("MistralConfig", {"sliding_window": 128, "num_key_value_heads": 4}),
        ("Qwen2Config", {"tie_word_embeddings": True, "num_key_value_heads": 2}),
        ("Qwen2Config", {"use_sliding_window": True, "max_window_layers": 0, "sliding_window": 64}),
        ("Qwen2Config", {"use_sliding_window": True, "max_window_layers": 9, "sliding_window": 64}),
    ],
)
def test_what_transformers_saves(tmp_path: Path, name: str, kwargs: dict[str, Any]) -> None:
    import transformers

    heads = {"num_key_value_heads": 2}  # the default of Qwen2 is 32, whatever it is a part of
    kwargs = {k: v for k, v in BASE.items() if k != "architectures"} | heads | kwargs
    theirs = getattr(transformers, name)(**kwargs)
    theirs.save_pretrained(tmp_path)  # leaves `architectures` out
    ours = read_config(tmp_path)
    assert ours.architecture == name.replace("Config", "ForCausalLM")
    assert ours.head_dim == getattr(theirs, "head_dim", None) or 16
    assert ours.num_kv_heads == theirs.num_key_value_heads
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    assert ours.tie_word_embeddings == theirs.tie_word_embeddings
    assert ours.attention_bias == (
        name == "Qwen2Config" or getattr(theirs, "attention_bias", False)
    )
    assert ours.output_bias == getattr(theirs, "attention_bias", False)
    assert ours.mlp_bias == getattr(theirs, "mlp_bias", False)
    assert ours.rms_norm_eps == theirs.rms_norm_eps
    kinds = getattr(theirs, "layer_types", None) or []
    window = 0 if "full_attention" in kinds else getattr(theirs, "sliding_window", None)
    assert ours.sliding_window == (window or 0)


LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        ({"rope_type": "default"}, RopeScaling()),
        ({"type": "linear", "factor": 2.0}, RopeScaling("linear", 2.0)),
        ({"rope_type": "llama3", **LLAMA3}, RopeScaling("llama3", 8.0, 1.0, 4.0, 128)),
        (
            {"rope_type": "yarn", "factor": 4.0, "beta_fast": 16, "attention_factor": 1.5},
            RopeScaling(
                "yarn",
                4.0,
                original_max_position_embeddings=512,
                beta_fast=16.0,
                attention_factor=1.5,
            ),
        ),
        (
            {"rope_type": "dynamic", "factor": 2.0},
            RopeScaling("dynamic", 2.0, original_max_position_embeddings=512),
        ),
    ],
)
def test_rope_in_both_spellings(
    tmp_path: Path, rope: dict[str, Any], expected: RopeScaling
) -> None:
    old = read(tmp_path, {"rope_theta": 5e5, "rope_scaling": rope})
    new = read(tmp_path, {"rope_parameters": rope | {"rope_theta": 5e5}})
    assert old == new
    assert (new.rope_theta, new.rope_scaling) == (5e5, expected)


def test_yarn_mscale_gives_transformers_attention_factor(tmp_path: Path) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {"rope_type": "yarn", "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 0.5}
    rope |= {"rope_theta": 1e4, "original_max_position_embeddings": 128}
    ours = read(tmp_path, {"rope_parameters": rope}).rope_scaling
    _, theirs = ROPE_INIT_FUNCTIONS["yarn"](LlamaConfig.from_pretrained(tmp_path), "cpu")
    assert ours.attention_factor == pytest.approx(theirs)


@pytest.mark.parametrize(
    ("rope", "context"),
    [
        ({"rope_type": "default"}, 512),
        ({"rope_type": "linear", "factor": 2.5}, 1280),
        ({"rope_type": "linear", "factor": 4.0, "original_max_position_embeddings": 128}, 512),
        ({"rope_type": "yarn", "factor": 4.0}, 2048),
        ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}, 2048),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}, 512),
        ({"rope_type": "yarn", "original_max_position_embeddings": 128}, 512),
        ({"rope_type": "llama3", **LLAMA3}, 512),
        ({"rope_type": "dynamic", "factor": 4.0}, 512),
    ],
)
def test_the_context_is_the_one_that_the_scaling_reaches(
    tmp_path: Path, rope: dict[str, Any], context: int
) -> None:
    assert read(tmp_path, {"rope_scaling": rope}).context == context


@pytest.mark.parametrize(
    ("changes", "generation", "expected"),
    [
        ({"eos_token_id": 7}, None, (7,)),
        ({"eos_token_id": [7, 8]}, None, (7, 8)),
        ({"eos_token_id": 7}, {"eos_token_id": [1, 2]}, (1, 2, 7)),
        ({"eos_token_id": [7, 99, 100]}, {"eos_token_id": 7}, (7, 99)),
        ({"eos_token_id": -1}, None, ()),
        ({"eos_token_id": 7}, {"temperature": 1.0}, (7,)),
        ({}, None, ()),
    ],
)
def test_end_tokens(tmp_path: Path, changes: Any, generation: Any, expected: Any) -> None:
    assert read(tmp_path, changes, generation).eos_token_ids == expected


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"architectures": ["MambaForCausalLM"]}, "MambaForCausalLM"),
        ({"architectures": None, "model_type": "gemma3"}, "gemma3"),
        ({"rope_scaling": {"rope_type": "spiral", "factor": 2.0}}, "spiral"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "original_max_position"),
        (
            {"rope_scaling": {"rope_type": "longrope", "original_max_position_embeddings": 64}},
            "long_factor None is not supported; expected 8 numbers",
        ),
        ({"kv_lora_rank": 512}, r"latent KV \(multi-head latent attention, MLA\) is not built"),
        ({"architectures": ["Gemma3ForConditionalGeneration"]}, "Gemma3ForConditionalGeneration"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "original_max_position"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor is missing"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "rope_parameters"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"quantization_config": {"quant_method": "awq"}}, "awq"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"eos_token_id": "</s>"}, "eos_token_id"),
        ({"rope_scaling": {"type": "yarn", "factor": 2, "attention_factor": "x"}}, "attention_f"),
        ({"rope_scaling": {"type": "linear", "factor": float("inf")}}, "factor must be a number"),
        ({"num_hidden_layers": -1}, "num_hidden_layers"),
        ({"vocab_size": float("nan")}, "vocab_size"),
        ({"vocab_size": "many"}, "vocab_size"),
        ({"num_attention_heads": 6, "num_key_value_heads": 4}, "a divisor of"),
        ({"intermediate_size": 1.5}, "whole number"),
        (qwen2(use_sliding_window=True, layer_types=["full_attention"]), "layer_types"),
        (qwen2(use_sliding_window=True, layer_types=["linear_attention"] * 4), "layer_types"),
    ],
)
def test_what_is_not_supported_is_named(
    tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    with pytest.raises(CheckpointError, match=named) as error:
        read(tmp_path, changes)
    assert "config.json" in error.value.message


def test_mistral_without_the_key_has_the_architectures_window(tmp_path: Path) -> None:
    assert read(tmp_path, mistral()).sliding_window == 4096
    assert read(tmp_path, mistral(sliding_window=None)).sliding_window == 0


def test_later_layers_of_qwen_may_have_a_window(tmp_path: Path) -> None:
    config = read(tmp_path, qwen2(use_sliding_window=True, max_window_layers=2, sliding_window=8))
    assert (config.sliding_window, config.layer_windows) == (0, (0, 0, 8, 8))
    assert [spec.window for spec in config.attention] == [0, 0, 8, 8]
    kinds = ["full_attention", "sliding_attention"] * 2
    config = read(tmp_path, qwen2(use_sliding_window=True, layer_types=kinds, sliding_window=8))
    assert config.layer_windows == (0, 8, 0, 8)


def test_longropes_factors_are_chosen_by_the_longest_text(tmp_path: Path) -> None:
    config = read(tmp_path, {"rope_scaling": LONGROPE})
    scaling = config.rope_scaling
    assert (scaling.factor, scaling.factors, config.context) == (4.0, tuple(LONG), 512)
    for length, factors in ((0, LONG), (512, LONG), (129, LONG), (128, SHORT), (1, SHORT)):
        served = config.for_length(length)
        assert served.rope_scaling.factors == tuple(factors)
        assert (rope_text(served) == rope_text(config)) is (factors is LONG)
    plain = read(tmp_path, {})
    assert plain.for_length(1) is plain


def test_first_files_of_phi_3_name_longrope_otherwise(tmp_path: Path) -> None:
    phi = {"architectures": ["Phi3ForCausalLM"], "original_max_position_embeddings": 128}
    factors = {"long_factor": LONG, "short_factor": SHORT}
    expected = read(tmp_path, phi | {"rope_scaling": LONGROPE})
    for name in ("su", "yarn", "longrope"):
        assert read(tmp_path, phi | {"rope_scaling": factors | {"type": name}}) == expected


def test_the_text_model_of_a_wrapper(tmp_path: Path) -> None:
    text = {k: v for k, v in BASE.items() if k != "architectures"}
    text |= {"model_type": "mistral", "num_key_value_heads": 4}
    outer = {"architectures": ["Mistral3ForConditionalGeneration"], "eos_token_id": [3, 4]}
    config = read(tmp_path, outer | {"text_config": text | {"eos_token_id": 5}})
    assert (config.architecture, config.wrapper) == (
        "MistralForCausalLM",
        outer["architectures"][0],
    )
    assert (config.hidden_size, config.eos_token_ids) == (64, (3, 4, 5))  # of both
    assert not config.tie_word_embeddings
    tied = read(tmp_path, outer | {"text_config": text, "tie_word_embeddings": True})
    assert tied.tie_word_embeddings
    with pytest.raises(CheckpointError, match="Mistral3ForConditionalGeneration"):
        read(tmp_path, outer | {"text_config": text | {"model_type": "unheard_of"}})
    with pytest.raises(CheckpointError, match="MLA"):
        read(tmp_path, outer | {"text_config": text | {"kv_lora_rank": 8}})
    both_ways = {"architectures": ["PaliGemmaForConditionalGeneration"], "text_config": text}
    with pytest.raises(CheckpointError, match="attend in both directions"):
        read(tmp_path, both_ways)


@pytest.mark.parametrize("kind", DEFAULTS)
def test_a_text_config_leaves_out_the_defaults_of_its_class(tmp_path: Path, kind: str) -> None:
    import transformers

    outer = {
        "architectures": ["LlavaForConditionalGeneration"],
        "text_config": {"model_type": kind},
    }
    (tmp_path / "config.json").write_text(json.dumps(outer))
    ours = read_config(tmp_path)
    transformers.AutoConfig.for_model(kind).save_pretrained(tmp_path)
    tokens = {"bos_token_id": None, "eos_token_ids": (), "wrapper": ""}
    theirs = dataclasses.replace(read_config(tmp_path), **tokens)
    assert dataclasses.replace(ours, **tokens) == theirs


@pytest.mark.parametrize("text", ["", "{", "[]", "\x00"])
def test_broken_files(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        read_config(tmp_path)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json.*missing"):
        read_config(tmp_path)
