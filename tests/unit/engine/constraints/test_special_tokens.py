"""Special tokens get names that no text contains, and grammars can still name them."""

from __future__ import annotations

import json

from llguidance import LLMatcher, LLTokenizer
from tokenizers import AddedToken, Tokenizer, models

from engine.constraints.special_tokens import MARK, with_unspellable_names
from tests.support.tiny_tokenizer import tokenizer_json

UNIGRAM = models.Unigram([("<unk>", 0.0), ("</s>", 0.0), ("a", -1.0), ("<", -2.0)], unk_id=0)
BPE = models.BPE({"<unk>": 0, "</s>": 1, "a": 2, "<": 3}, [], unk_token="<unk>")


def test_only_the_names_of_added_tokens_change() -> None:
    for model in (UNIGRAM, BPE):
        before = Tokenizer(model)
        before.add_special_tokens(["</s>", AddedToken("<more>")])
        after = Tokenizer.from_str(with_unspellable_names(before.to_str()))
        assert before.encode("a</s>").ids == [2, 1]
        assert 1 not in after.encode("a</s><more>").ids
        assert 4 not in after.encode("a</s><more>").ids
        assert after.encode(f"a{MARK}</s>{MARK}<more>").ids == [2, 1, 4]
        assert after.get_vocab_size() == before.get_vocab_size() == 5


def test_a_tokenizer_without_added_tokens_is_the_same() -> None:
    source = Tokenizer(BPE).to_str()
    assert json.loads(with_unspellable_names(source)) == json.loads(source)


def test_text_that_is_an_added_token_too_keeps_its_name() -> None:
    """Merges produce Gemma's runs of newlines, and a vocabulary without them is refused."""
    vocab = {"<unk>": 0, "\n": 1, "\n\n": 2, "\n\n\n": 3, "<h1>": 4, "<end>": 5}
    merges = [("\n", "\n"), ("\n\n", "\n")]
    before = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>"))
    before.add_tokens(["\n", "\n\n\n", "<h1>"])
    before.add_special_tokens(["<end>"])
    after = Tokenizer.from_str(with_unspellable_names(before.to_str()))
    assert [after.id_to_token(i) for i in (1, 2, 3)] == ["\n", "\n\n", "\n\n\n"]
    assert [after.id_to_token(i) for i in (4, 5)] == [f"{MARK}<h1>", f"{MARK}<end>"]


def test_metaspace_becomes_decoders_that_llguidance_knows() -> None:
    for kind, has_bytes in (("t5", False), ("metaspace, bytes", True)):
        spec = tokenizer_json(kind)
        tokenizer = LLTokenizer(with_unspellable_names(json.dumps(spec)))
        bits = LLMatcher(tokenizer, LLMatcher.grammar_from_regex(" (yes|no)")).compute_bitmask()
        vocab = spec["model"]["vocab"]
        allowed = {token for token, i in vocab.items() if bits[i // 8] >> i % 8 & 1}
        assert {"\u2581", "\u2581yes"} < allowed
        assert ("<0x20>" in allowed) == has_bytes  # otherwise it is ordinary text
