"""Added tokens and end-of-turn tokens: the union of all files of a folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import structlog
from tokenizers import Tokenizer

from engine.base.errors import CheckpointError
from engine.checkpoint.added_tokens import added_tokens, end_of_turn, merged_tokenizer
from engine.checkpoint.config import read_config
from engine.checkpoint.fingerprint import tokenizer_digest

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 1,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "vocab_size": 20,
    "max_position_embeddings": 64,
}


def token(token_id: int, content: str, special: bool = True) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": token_id, "content": content, **flags, "special": special}


def folder(
    place: Path, added: list[dict[str, Any]], vocab: dict[str, int] | None = None, **files: Any
) -> Path:
    vocab = vocab or {"a": 0, "b": 1, '"added_tokens"': 2, "added_tokens": 3}
    model = {"type": "BPE", "vocab": vocab, "merges": [], "unk_token": None}
    spec = {"version": "1.0", "model": model, "added_tokens": added}  # in an order of our own
    (place / "tokenizer.json").write_text(json.dumps(spec))
    (place / "config.json").write_text(json.dumps(CONFIG | files.pop("config", {})))
    for name, content in files.items():
        (place / f"{name}.json").write_text(json.dumps(content))
    return place


def ends(place: Path) -> tuple[int, ...]:
    return read_config(place).eos_token_ids


ADDED = [token(4, "<s>"), token(5, "</s>"), token(6, "<|x|>"), token(7, "word", False)]


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, (5,)),
        ({"config": {"eos_token_id": 6}}, (6, 5)),
        ({"generation_config": {"eos_token_id": [7]}, "config": {"eos_token_id": 6}}, (7, 6, 5)),
        ({"tokenizer_config": {"eos_token": "<|x|>"}}, (6, 5)),
        ({"tokenizer_config": {"eos_token": {"content": "<|x|>", "special": True}}}, (6, 5)),
        ({"tokenizer_config": {"eos_token": "word"}}, (7, 5)),
        ({"tokenizer_config": {"eos_token": None}}, (5,)),
        ({"special_tokens_map": {"eos_token": {"content": "<|x|>"}}}, (6, 5)),
        ({"special_tokens_map": {"eos_token": "no such token"}}, (5,)),
    ],
)
def test_every_file_may_name_an_end(tmp_path: Path, files: Any, expected: Any) -> None:
    assert ends(folder(tmp_path, ADDED, **files)) == expected


def test_a_wrapper_and_its_text_model_may_both_name_ends(tmp_path: Path) -> None:
    heads = {"num_key_value_heads": 4}
    outer = {
        "architectures": ["Mistral3ForConditionalGeneration"],
        "model_type": "mistral3",
        "eos_token_id": 6,
        "text_config": {**CONFIG, "model_type": "mistral", "eos_token_id": [7], **heads},
    }
    assert ends(folder(tmp_path, ADDED, config=outer)) == (6, 7, 5)


def test_a_name_counts_for_control_tokens_alone(tmp_path: Path) -> None:
    vocab = {"a": 0, "<|im_end|>": 1}  # a word
    added = [token(2, "<|eot_id|>", False), token(3, "<|im_start|>"), token(4, "<end_of_turn>")]
    assert ends(folder(tmp_path, added, vocab)) == (4,)


def test_ends_of_turns_of_many_families() -> None:
    names = ["<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>", "<|END_OF_TURN_TOKEN|>"]
    names += ["<|assistant_end|>", "<|role_end|>", "<|end_of_msg|>", "<seed:eos>", "[e~["]
    assert end_of_turn([*names, "<|im_start|>", "<|sep|>"]) == sorted(names)


def test_families_that_use_a_name_otherwise() -> None:
    assert end_of_turn(["<|end|>", "<|user|>"]) == ["<|end|>"]
    assert end_of_turn(["<|end|>", "<|return|>", "<|call|>"]) == ["<|call|>", "<|return|>"]
    assert end_of_turn(["</s>", "<turn|>", "<|tool_response>"]) == ["<turn|>", "<|tool_response>"]


def test_added_tokens_may_stand_in_other_files_alone(tmp_path: Path) -> None:
    decoder = {
        "4": {"content": "<s>", "special": True, "lstrip": False},
        "5": {"content": "<|im_end|>", "special": True},
        "6": {"content": "<think>", "special": False},
    }
    before = tokenizer_digest(folder(tmp_path, []))
    folder(
        tmp_path,
        [],
        tokenizer_config={"added_tokens_decoder": decoder, "eos_token": "<|im_end|>"},
        added_tokens={"<|im_end|>": 5, "<|y|>": 7, "b": 1},
    )
    found = {t["content"]: (t["id"], t["special"]) for t in added_tokens(tmp_path)}
    expected = {"<s>": (4, True), "<|im_end|>": (5, True), "<think>": (6, False)}
    assert found == expected | {"<|y|>": (7, False), "b": (1, False)}
    library = Tokenizer.from_str(merged_tokenizer(tmp_path))
    assert library.encode("a<|im_end|><think><|y|>").ids == [0, 5, 6, 7]
    assert ends(tmp_path) == (5,)
    assert tokenizer_digest(tmp_path) != before


def test_a_token_with_a_role_is_special(tmp_path: Path) -> None:
    added = [token(4, "<end>", False), token(5, "<more>", False)]
    roles = {"eos_token": "<end>", "additional_special_tokens": [{"content": "<more>"}]}
    folder(tmp_path, added, special_tokens_map=roles)
    assert all(t["special"] for t in json.loads(merged_tokenizer(tmp_path))["added_tokens"])


@pytest.mark.parametrize(
    "roles",
    [
        {"extra_special_tokens": ["<end>"]},
        {"extra_special_tokens": {"image_token": "<end>"}},
        {"model_specific_special_tokens": {"eot_token": {"content": "<end>"}}},
        {"eot_token": "<end>"},
        {"additional_special_tokens": "<end>"},
    ],
)
def test_special_tokens_of_transformers_five(tmp_path: Path, roles: Any) -> None:
    added = [token(4, "<end>", False), token(5, "<more>", False)]
    folder(tmp_path, added, tokenizer_config=roles | {"add_bos_token": True, "name": "x"})
    assert [t["special"] for t in added_tokens(tmp_path)] == [True, False]


@pytest.mark.parametrize("file", ["tokenizer_config", "special_tokens_map"])
def test_an_end_may_stand_in_the_vocabulary_alone(tmp_path: Path, file: str) -> None:
    vocab = {"a": 0, "<fin>": 1, "b": 2, "!": 3}
    roles = {"eos_token": "<fin>", "bos_token": "<no such>", "pad_token": "!"}
    folder(tmp_path, [token(4, "<s>")], vocab, **{file: roles})
    assert ends(tmp_path) == (1,)
    library = Tokenizer.from_str(merged_tokenizer(tmp_path))
    assert library.encode("a<fin>b!").ids == [0, 1, 2, 3]
    assert {t["content"] for t in added_tokens(tmp_path)} == {"<s>", "<fin>"}  # no word to pad with


def test_flags_that_are_null_or_unknown_are_not_set(tmp_path: Path) -> None:
    decoder = {"4": {"content": "<far>", "special": True, "lstrip": None, "other": 1}}
    folder(tmp_path, [], tokenizer_config={"added_tokens_decoder": decoder})
    assert Tokenizer.from_str(merged_tokenizer(tmp_path)).encode("a<far>").ids == [0, 4]


def test_a_token_whose_id_the_library_would_not_give_is_left_out(tmp_path: Path) -> None:
    decoder = {"9": {"content": "<far>", "special": True}}
    folder(tmp_path, ADDED, tokenizer_config={"added_tokens_decoder": decoder})
    with structlog.testing.capture_logs() as lines:
        merged = json.loads(merged_tokenizer(tmp_path))
    assert [t["content"] for t in merged["added_tokens"]] == [t["content"] for t in ADDED]
    assert "<far>" in str(lines)


@pytest.mark.parametrize(
    "decoder", [{"x": {"content": "a"}}, {"4": "a"}, {"4": {"content": 1}}, [{"content": "a"}], "a"]
)
def test_a_broken_list_is_named(tmp_path: Path, decoder: Any) -> None:
    folder(tmp_path, ADDED, tokenizer_config={"added_tokens_decoder": decoder})
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json: added_tokens_decoder"):
        added_tokens(tmp_path)


def test_a_whole_file_is_taken_as_it_is(tmp_path: Path) -> None:
    folder(tmp_path, ADDED)
    assert merged_tokenizer(tmp_path) == (tmp_path / "tokenizer.json").read_text()
