"""Special tokens, kept apart from texts that spell them as any other text.

Where only one text can come next, llguidance asks the tokenizer for its tokens, and a tokenizer
takes `<|im_end|>` for the token of that name: {"const": "<|im_end|>"} would end the answer there.
So it gets a tokenizer whose special tokens have names that no text spells:

    tokenizer.json --unspelled--> names behind a mark        grammar --numbered--> <|name|> as <[2]>
"""

from __future__ import annotations

import json
import re
from typing import Any

from llguidance import LLTokenizer

MARK = "\U0010ffff"  # no character
# Comments, texts and regular expressions of Lark are passed over; what is left is a token by name.
_PARTS = re.compile(r'//[^\n]*|"(?:\\.|[^"\\\n])*"|/(?:\\.|[^/\\\n])+/|(?P<token><[^<>\s\[\]"/]+>)')


def unspelled(source: str) -> str:
    """The same tokenizer.json; only its added tokens are called otherwise."""
    tokenizer = json.loads(source)
    added = tokenizer.get("added_tokens") or []
    names = {token["content"]: MARK + token["content"] for token in added}
    for token in added:
        token["content"] = names[token["content"]]
    model = tokenizer["model"]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    model["vocab"] = _renamed(model["vocab"], names)
    return json.dumps(tokenizer)


def _renamed(vocab: Any, names: dict[str, str]) -> Any:
    """Of BPE and WordPiece: {token: id}; of Unigram: [[token, score], ...]."""
    if isinstance(vocab, dict):
        return {names.get(token, token): token_id for token, token_id in vocab.items()}
    return [[names.get(token, token), *rest] for token, *rest in vocab]


def numbered(grammar: str, tokenizer: LLTokenizer) -> str:
    """A Lark grammar with the ids of special tokens in place of their names."""

    def replace(part: re.Match[str]) -> str:
        ids = tokenizer.tokenize_str(MARK + part["token"]) if part["token"] else []
        return f"<[{ids[0]}]>" if len(ids) == 1 else part[0]

    return _PARTS.sub(replace, grammar)
