"""Folders that are not a model to serve: one sentence names what they are instead."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from engine.base.errors import CheckpointError
from engine.checkpoint.source import resolve
from tests.support import tiny_gguf
from tests.support.hf_folder import CONFIG, folder, tensors


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIPTYCH_CACHE_DIR", str(tmp_path / "cache"))


def refused(place: Path, match: str) -> None:
    with pytest.raises(CheckpointError, match=match) as error:
        resolve(str(place))
    assert "\n" not in error.value.message
    assert str(place) in error.value.message


@pytest.mark.parametrize(
    ("files", "named"),
    [
        (["adapter_config.json", "adapter_model.safetensors"], "a PEFT adapter"),
        (["model_index.json"], "a pipeline of diffusers"),
        (["modules.json", "config.json"], "an encoder of sentence-transformers"),
        (["params.json", "consolidated.00.safetensors"], r"Mistral's own format \(params\.json\)"),
        (["tokenizer.json", "tokenizer_config.json"], "a tokenizer without a model"),
        (["b.gguf", "a.gguf"], r"a folder of GGUF files; name one of them: a\.gguf, b\.gguf$"),
        (
            ["a-00001-of-00002.gguf", "a-00002-of-00002.gguf"],
            r"name one of them: a-00001-of-00002\.gguf$",
        ),
        (["a.gguf", "config.json"], r"a folder of GGUF files; name one of them: a\.gguf$"),
        (["notes.txt"], r"config\.json: this file of the model is missing"),
    ],
)
def test_what_a_folder_is_instead(tmp_path: Path, files: list[str], named: str) -> None:
    for file in files:
        (tmp_path / file).write_text("{}")
    refused(tmp_path, named)


@pytest.mark.parametrize(
    "changes", [{"architectures": ["LlamaForCausalLMEagle3"]}, {"draft_vocab_size": 32000}]
)
def test_an_eagle_head_is_known_by_its_configuration(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    place = folder(tmp_path / "m")
    (place / "config.json").write_text(json.dumps(CONFIG | changes))
    refused(place, "a draft head .EAGLE., which is not a model of its own")


def test_an_eagle_head_is_known_by_its_weights(tmp_path: Path) -> None:
    place = folder(tmp_path / "m")
    save_file(tensors() | {"fc.weight": torch.zeros(64, 128)}, place / "model.safetensors")
    refused(place, r"a draft head .EAGLE.*\(tensor fc\.weight\)")


@pytest.mark.parametrize(
    ("vocab", "refuses"),
    [
        ({"a": 0, "b": 127}, False),
        ({"a": 0, "b": 128}, True),
        ([["a", 0.0]] * 128, False),
        ([["a", 0.0]] * 129, True),
    ],
)
def test_a_vocabulary_beyond_the_embedding(tmp_path: Path, vocab: Any, refuses: bool) -> None:
    """An added token behind the last row is no error: Gemma 3 has one, for pictures."""
    place = folder(tmp_path / "m")
    added = [{"id": 128, "content": "<image>", "special": True}]
    spec = {"model": {"vocab": vocab}, "added_tokens": added}
    (place / "tokenizer.json").write_text(json.dumps(spec))
    if refuses:
        refused(place, r"ids up to 128 and the embedding of config\.json 128 rows")
    else:
        assert resolve(str(place)).config.vocab_size == 128


@pytest.mark.parametrize(
    ("quantisation", "named"),
    [
        ({"quant_method": "awq", "bits": 4, "group_size": 128}, "'awq' is not supported"),
        ({"quant_algo": "FP8", "ignored_layers": ["x"] * 50}, "'FP8' is not supported"),
        ({"bits": 4}, "'unknown' is not supported"),
    ],
)
def test_a_quantisation_is_named_alone(
    tmp_path: Path, quantisation: dict[str, Any], named: str
) -> None:
    place = folder(tmp_path / "m")
    config = CONFIG | {"quantization_config": quantisation}
    (place / "config.json").write_text(json.dumps(config))
    refused(place, f"quantization_config of method {named}; LlamaForCausalLM is read in no method")
    with pytest.raises(CheckpointError) as error:
        resolve(str(place))
    assert "group_size" not in error.value.message and "ignored" not in error.value.message


def test_an_unknown_architecture_names_the_known_ones(tmp_path: Path) -> None:
    place = folder(tmp_path / "m")
    (place / "config.json").write_text(json.dumps(CONFIG | {"architectures": ["Mamba"]}))
    refused(place, r"'Mamba' is not supported; known are .*LlamaForCausalLM.*docs/models\.md")
    tiny_gguf.tiny(tmp_path / "m.gguf", arch="mamba")
    refused(tmp_path / "m.gguf", r"'mamba' is not supported; known are .*llama.*docs/models\.md")
    tiny_gguf.tiny(tmp_path / "m.gguf", arch="deepseek2", numbers={"attention.kv_lora_rank": 512})
    refused(tmp_path / "m.gguf", r"'deepseek2' is not supported; its latent KV .*MLA")


def test_weights_of_other_formats_are_named(tmp_path: Path) -> None:
    place = folder(tmp_path / "m")
    (place / "model.safetensors").rename(place / "pytorch_model.bin")
    refused(place, r"no weights, neither .* \(pytorch_model\.bin is not read\)")
    (place / "m.gguf").write_text("")
    refused(place, r"no weights, neither .* \(of its GGUF files name one: m\.gguf\)")
