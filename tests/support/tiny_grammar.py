"""Grammars over the fifty tokens of `history_model`: letters, digits, marks, a few pairs."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

from engine.constraints import Matcher
from engine.sampling import SampleRow
from tests.support.history_model import VOCAB

EOS = 0
TEXTS = ["<eos>", *"abcdefghijklmnopqrstuvwxyz", *"0123456789", *'{}[]":,. ']
TEXTS += ["true", "na", '":', '{"']
assert len(TEXTS) == len(set(TEXTS)) == VOCAB
_LONGEST = max(map(len, TEXTS))


class _Library:
    """What llguidance asks of a tokenizer: the longest token at each place."""

    eos_token_id = EOS
    bos_token_id = None
    tokens = tuple(text.encode() for text in TEXTS)
    special_token_ids = (EOS,)

    def __call__(self, text: str | bytes) -> list[int]:
        return encode(text.decode() if isinstance(text, bytes) else text)


def encode(text: str) -> list[int]:
    ids = []
    while text:
        for length in range(min(_LONGEST, len(text)), 0, -1):
            if text[:length] in TEXTS[1:]:
                ids.append(TEXTS.index(text[:length]))
                text = text[length:]
                break
        else:
            raise ValueError(f"no token begins {text!r}")
    return ids


def text_of(tokens: Sequence[int]) -> str:
    return "".join(TEXTS[token] for token in tokens if token != EOS)


TOKENIZER = LLTokenizer(TokenizerWrapper(_Library()), n_vocab=VOCAB, eos_token=EOS, slices=[])


def matcher_of(grammar: str, tokens: Sequence[int] = ()) -> Matcher:
    """A matcher after `tokens`; `grammar` as one of the functions below gives it."""
    library = LLMatcher(TOKENIZER, grammar, log_level=0)
    assert not library.is_error(), library.get_error()
    matcher = Matcher(library)
    assert matcher.advance(tokens)
    return matcher


def regex(source: str) -> str:
    return LLMatcher.grammar_from_regex(source)


def lark(source: str) -> str:
    return json.dumps({"grammars": [{"lark_grammar": source}]})


def schema(value: object) -> str:
    return LLMatcher.grammar_from_json_schema(
        json.dumps(value), overrides={"whitespace_flexible": False}
    )


def mask_after(grammar: str, tokens: Sequence[int]) -> np.ndarray:
    """The mask of the next token, by a matcher that has seen nothing but the tokens."""
    mask = np.zeros(-(-VOCAB // 32), np.int32)
    matcher_of(grammar, tokens).library.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
    return mask


def masked(row: SampleRow, grammar: str, tokens: Sequence[int]) -> SampleRow:
    """The same row, with the mask."""
    return SampleRow(
        row.params,
        row.position,
        row.tokens,
        row.num_prompt,
        row.draft,
        row.banned,
        mask_after(grammar, tokens),
    )
