"""Tokenizers whose special tokens no text spells, and grammars that name them all the same."""

from __future__ import annotations

import json

from tokenizers import AddedToken, Tokenizer, models

from engine.constraints.special_tokens import MARK, unspelled

UNIGRAM = models.Unigram([("<unk>", 0.0), ("</s>", 0.0), ("a", -1.0), ("<", -2.0)], unk_id=0)
BPE = models.BPE({"<unk>": 0, "</s>": 1, "a": 2, "<": 3}, [], unk_token="<unk>")


def test_only_the_names_of_added_tokens_change() -> None:
    for model in (UNIGRAM, BPE):
        before = Tokenizer(model)
        before.add_special_tokens(["</s>", AddedToken("<more>")])
        after = Tokenizer.from_str(unspelled(before.to_str()))
        assert before.encode("a</s>").ids == [2, 1]
        assert 1 not in after.encode("a</s><more>").ids
        assert 4 not in after.encode("a</s><more>").ids
        assert after.encode(f"a{MARK}</s>{MARK}<more>").ids == [2, 1, 4]
        assert after.get_vocab_size() == before.get_vocab_size() == 5


def test_a_tokenizer_without_added_tokens_is_the_same() -> None:
    source = Tokenizer(BPE).to_str()
    assert json.loads(unspelled(source)) == json.loads(source)
