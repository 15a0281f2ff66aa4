"""Keeps special tokens separate from ordinary text that looks like them.

If only one text can follow, llguidance tokenizes it, and a tokenizer reads `<|im_end|>` as the
special token: {"const": "<|im_end|>"} would end the output there. So llguidance gets a tokenizer
whose special tokens have names that no text contains:

    tokenizer.json --with_unspellable_names--> names with a mark before them
    grammar        --with_token_ids--> <[2]> in place of <|name|>

llguidance detects SentencePiece by the decoders Replace and ByteFallback, which decode tokens to
the same bytes as Metaspace.
"""

from __future__ import annotations

import json
import re
from typing import Any

from llguidance import LLTokenizer

MARK = "\U0010ffff"  # no character
# Matches comments, strings and regular expressions of Lark, which stay, and tokens by name. An
# unclosed one matches to the end of its line in one pass, and llguidance refuses it.
_PARTS = re.compile(
    r'//[^\n]*|"(?:\\.|[^"\\\n])*+(?:"|\\?$)|/(?:\\.|[^/\\\n])++(?:/|\\?$)'
    r'|(?P<token><[^<>\s\[\]"/]++>)',
    re.MULTILINE,
)
_FROM_SPACE = {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}
_SENTENCEPIECE = {
    "type": "Sequence",
    "decoders": [_FROM_SPACE, {"type": "ByteFallback"}, {"type": "Fuse"}],
}


def with_unspellable_names(source: str) -> str:
    """The tokenizer.json with other names for its added tokens.

    Added tokens that merges produce are text (runs of newlines, in Gemma's), and keep their names.
    """
    tokenizer = json.loads(source)
    model = tokenizer["model"]
    added = tokenizer.get("added_tokens") or []
    texts = _merged({token["content"] for token in added if not token.get("special")}, model)
    added = [token for token in added if token["content"] not in texts]
    names = {token["content"]: MARK + token["content"] for token in added}
    for token in added:
        token["content"] = names[token["content"]]
    kinds = _kinds(tokenizer.get("decoder"))
    if "Metaspace" in kinds:
        tokenizer["decoder"] = _SENTENCEPIECE
        if "ByteFallback" not in kinds:  # then <0xAB> is ordinary text
            names |= {f"<0x{byte:02X}>": f"{MARK}<0x{byte:02X}>" for byte in range(256)}
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    model["vocab"] = _renamed(model["vocab"], names)
    return json.dumps(tokenizer)


def _merged(names: set[str], model: dict[str, Any]) -> set[str]:
    """Those of `names` that are the result or a part of a merge."""
    found: set[str] = set()
    for merge in model.get("merges") or () if names else ():
        # Older files write both parts in one string.
        left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
        found |= names.intersection((left, right, left + right))
    return found


def _kinds(decoder: Any) -> set[str]:
    steps = decoder["decoders"] if decoder and "decoders" in decoder else [decoder or {}]
    return {step.get("type", "") for step in steps}


def _renamed(vocab: Any, names: dict[str, str]) -> Any:
    """BPE and WordPiece have {token: id}; Unigram has [[token, score], ...]."""
    if isinstance(vocab, dict):
        return {names.get(token, token): token_id for token, token_id in vocab.items()}
    return [[names.get(token, token), *rest] for token, *rest in vocab]


def with_token_ids(grammar: str, tokenizer: LLTokenizer) -> str:
    """The Lark grammar with ids of special tokens in place of their names."""

    def replace(part: re.Match[str]) -> str:
        ids = tokenizer.tokenize_str(MARK + part["token"]) if part["token"] else []
        return f"<[{ids[0]}]>" if len(ids) == 1 else part[0]

    return _PARTS.sub(replace, grammar)
