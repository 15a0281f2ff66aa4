"""Special tokens, kept apart from texts that spell them as any other text.

Where only one text can come next, llguidance asks the tokenizer for its tokens, and a tokenizer
takes `<|im_end|>` for the token of that name: {"const": "<|im_end|>"} would end the answer there.
So it gets a tokenizer whose special tokens have names that no text spells:

    tokenizer.json --unspelled--> names behind a mark        grammar --numbered--> <|name|> as <[2]>

The library knows SentencePiece by Replace and ByteFallback, which say the same of a token's bytes
as Metaspace does.
"""

from __future__ import annotations

import json
import re
from typing import Any

from llguidance import LLTokenizer

MARK = "\U0010ffff"  # no character
# Comments, texts and regular expressions of Lark are passed over; what is left is a token by name.
# One pass: what is not closed reaches to the end of its line, where the library refuses it.
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


def unspelled(source: str) -> str:
    """The same tokenizer.json; only its added tokens are called otherwise.

    Those that merges make are text (runs of newlines, in Gemma's), and keep their names.
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
        if "ByteFallback" not in kinds:  # then <0xAB> is a text like any other, and of no use
            names |= {f"<0x{byte:02X}>": f"{MARK}<0x{byte:02X}>" for byte in range(256)}
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    model["vocab"] = _renamed(model["vocab"], names)
    return json.dumps(tokenizer)


def _merged(names: set[str], model: dict[str, Any]) -> set[str]:
    """Those of `names` that merges make, or make others of."""
    found: set[str] = set()
    for merge in model.get("merges") or () if names else ():
        # Older files write both parts as one text.
        left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
        found |= names.intersection((left, right, left + right))
    return found


def _kinds(decoder: Any) -> set[str]:
    steps = decoder["decoders"] if decoder and "decoders" in decoder else [decoder or {}]
    return {step.get("type", "") for step in steps}


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
