"""Small tokenizers of every family of decoders, made here: no file of a model is needed."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import tokenizers

from coordinator.text.tokenizer import Tokenizer

SPACE = "\u2581"
SPECIAL = ["<unk>", "<s>", "</s>", "<|end|>"]
WORDS = ["the", "a", "b", "yes", "no", "worker", "reads", "The", "é", ",", "s"]
STARTS = [word[:end] for word in WORDS for end in range(1, len(word) + 1)]  # merges need them
PIECES = [SPACE, SPACE * 2, *(SPACE + start for start in STARTS), *STARTS]
PIECES += [*'thewrkadsyno.TR[]{}":_ci1 \n', "<tool>"]
_BYTES = [f"<0x{b:02X}>" for b in range(256)]
_FROM_SPACE = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
_TO_SPACE = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
_FALLBACK, _FUSE = {"type": "ByteFallback"}, {"type": "Fuse"}
_BOS = {
    "type": "TemplateProcessing",
    "single": [
        {"SpecialToken": {"id": "<s>", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
    ],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
    "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
}


def _strip(num: int) -> dict[str, Any]:
    return {"type": "Strip", "content": " ", "start": num, "stop": 0}


def _metaspace(scheme: str) -> dict[str, Any]:
    return {
        "type": "Metaspace", "replacement": SPACE, "prepend_scheme": scheme, "split": True
    }  # fmt: skip


def _sequence(*steps: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "decoders": list(steps)}


DECODERS = {
    "llama2": _sequence(_FROM_SPACE, _FALLBACK, _FUSE, _strip(1)),
    "gemma": _sequence(_FROM_SPACE, _FALLBACK, _FUSE),
    "strips two": _sequence(_FROM_SPACE, _FALLBACK, _FUSE, _strip(2)),
    "t5": _metaspace("always"),
    "metaspace first": _metaspace("first"),
    "metaspace never": _metaspace("never"),
    "metaspace, bytes": _sequence(_metaspace("always"), _FALLBACK, _FUSE),
    "bytes, metaspace": _sequence(_FALLBACK, _metaspace("always"), _FUSE),
    "bytes, metaspace, strip": _sequence(_FALLBACK, _metaspace("first"), _FUSE, _strip(1)),
}
KINDS = [*DECODERS, "byte-level"]


def tokenizer_json(kind: str) -> dict[str, Any]:
    """What its tokenizer.json holds."""
    return _byte_level() if kind == "byte-level" else _sentencepiece(DECODERS[kind])


@cache
def tiny_tokenizer(kind: str) -> Tokenizer:
    """One of KINDS; all write a BOS before a text."""
    spec = tokenizer_json(kind)
    library = tokenizers.Tokenizer.from_str(json.dumps(spec))
    return Tokenizer.of(library, spec, Path(kind), vocab_size=1000, bos=1)


def _added(names: list[str]) -> list[dict[str, Any]]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return [{"id": i, "content": c, "special": True, **flags} for i, c in enumerate(names)]


def _sentencepiece(decoder: dict[str, Any]) -> dict[str, Any]:
    tokens = list(dict.fromkeys([*SPECIAL, *_BYTES, *PIECES]))
    prepends = "never" not in json.dumps(decoder) and len(decoder.get("decoders", [0])) != 3
    first = [{"type": "Prepend", "prepend": SPACE}] if prepends else []
    return {
        "version": "1.0",
        "added_tokens": _added(SPECIAL),
        "normalizer": {"type": "Sequence", "normalizers": [*first, _TO_SPACE]},
        "pre_tokenizer": None,
        "post_processor": _BOS,
        "decoder": decoder,
        "model": {
            "type": "BPE",
            "unk_token": "<unk>",
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": _merges(tokens),
        },
    }


def _merges(tokens: list[str]) -> list[list[str]]:
    """Every way to make a token of two others, shorter ones first."""
    known = {token for token in tokens if not token.startswith("<")}
    return [
        [token[:cut], token[cut:]]
        for token in sorted(known, key=len)
        for cut in range(1, len(token))
        if token[:cut] in known and token[cut:] in known
    ]


def _byte_level() -> dict[str, Any]:
    step = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    starts = [start for start in STARTS if start.isascii()]
    spaced = ["\u0120" + start for start in starts]
    tokens = list(dict.fromkeys([*SPECIAL, *alphabet, *starts, *spaced]))
    return {
        "version": "1.0",
        "added_tokens": _added(SPECIAL),
        "normalizer": None,
        "pre_tokenizer": step,
        "post_processor": _BOS,
        "decoder": step,
        "model": {
            "type": "BPE",
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": _merges(tokens),
        },
    }
