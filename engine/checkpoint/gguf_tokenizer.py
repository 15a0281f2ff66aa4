"""GGUF metadata -> `tokenizer.json` and `tokenizer_config.json`.

A GGUF file holds the vocabulary and, for byte-level BPE, the merges, but only the *name* of the
pre-tokenizer (gguf_pretokenizers.py).

Some converters give control tokens the type NORMAL, and a prompt would then spell `<|im_start|>` in
letters. A NORMAL token counts as a control token if the metadata give it a role, or if only control
tokens have such a name, unless merges lead to it: then it is a word of the vocabulary. USER_DEFINED
tokens are found in any text and are not control tokens, except those that mark turns by name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from engine.base.errors import CheckpointError
from engine.checkpoint.added_tokens import END_OF_TURN, FLAGS
from engine.checkpoint.gguf_pretokenizers import PRE_TOKENIZERS, byte_level

_Json = dict[str, Any]
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4  # token types of the format
# Key in tokenizer_config.json: control tokens that the GGUF file types as text; logged at start.
CONTROL_BY_NAME = "control_tokens_by_name"
_ENDS = ("bos", "eos", "eot", "eom")  # roles that only control tokens have
_ROLES = (*_ENDS, "unknown", "padding")
# The form of control tokens, which no word has: <|name|>, also with DeepSeek's wide bars.
_CONTROL_SHAPE = re.compile(r"<\|[^\s<>|]+\|>|<\uff5c[^\s<>\uff5c]+\uff5c>")
_TURNS = END_OF_TURN | {
    *("<|im_start|>", "<start_of_turn>", "<|start_header_id|>", "<|end_header_id|>"),
    *("<s>", "<bos>", "<|begin_of_text|>", "<|user|>", "<|assistant|>", "<|system|>"),
    *("<pad>", "<unk>"),
}
_TAGS = {"<s>", "</s>"}  # of HTML in a vocabulary that has <bos> for a control token: Gemma
_PHI3_PLAIN = ("<unk>", "<s>", "<|endoftext|>")
_SPACE = "\u2581"  # how SentencePiece writes a space


def tokenizer_files(meta: Mapping[str, Any], path: Path) -> dict[str, _Json]:
    """Contents of tokenizer.json and tokenizer_config.json for GGUF metadata `meta`.

    Raises CheckpointError naming what the file lacks or what is not supported.
    """
    tokens: list[str] = meta.get("tokenizer.ggml.tokens") or []
    check_tokenizer(meta, len(tokens), path)
    types: list[int] = meta.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    is_byte_level = meta.get("tokenizer.ggml.model") == "gpt2"
    if not is_byte_level:
        tokens = _marked_spaces(tokens, types)
    vocab = {token: i for i, token in enumerate(tokens)}
    if len(vocab) != len(tokens) or len(types) != len(tokens):
        raise CheckpointError(f"{path}: tokenizer.ggml.tokens has duplicates or lacks types")
    for role in _ROLES:
        token_id = meta.get(f"tokenizer.ggml.{role}_token_id", 0)
        if type(token_id) is not int or not 0 <= token_id < len(tokens):
            raise CheckpointError(f"{path}: tokenizer.ggml.{role}_token_id names no token")
    typed, types = types, _typed(meta, tokens, types)
    by_name = [token for token, old, new in zip(tokens, typed, types, strict=True) if old != new]
    if is_byte_level:
        body, bos = _byte_level_bpe(meta, vocab, path)
    else:
        body, bos = _sentencepiece(meta, vocab, types, path)
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added_tokens(meta, tokens, types),
        **body,
        "post_processor": _template(meta, tokens, add_bos=bos),
    }
    config = _tokenizer_config(meta, tokens)
    if by_name:
        config[CONTROL_BY_NAME] = by_name
    return {"tokenizer.json": tokenizer, "tokenizer_config.json": config}


def check_tokenizer(meta: Mapping[str, Any], num_tokens: int, path: Path) -> None:
    """Raise CheckpointError for a tokenizer that is not known, or has no tokens."""
    if not num_tokens:
        raise CheckpointError(f"{path}: tokenizer.ggml.tokens is missing")
    if (model := meta.get("tokenizer.ggml.model")) not in ("gpt2", "llama"):
        raise CheckpointError(
            f"{path}: tokenizer.ggml.model {model!r} is not supported; known are 'gpt2' and 'llama'"
        )
    if model == "gpt2" and (pre := _pre(meta)) not in PRE_TOKENIZERS:
        raise CheckpointError(
            f"{path}: tokenizer.ggml.pre {pre!r} is not known; "
            f"known are {', '.join(sorted(PRE_TOKENIZERS))}"
        )


def _marked_spaces(tokens: list[str], types: list[int]) -> list[str]:
    """Runs of spaces with SentencePiece's mark: llama.cpp's converter spells them with spaces."""
    known = set(tokens)
    return [
        _SPACE * len(token)
        if t == _USER_DEFINED and token.strip(" ") == "" and _SPACE * len(token) not in known
        else token
        for token, t in zip(tokens, types, strict=False)
    ] + tokens[len(types) :]


def _pre(meta: Mapping[str, Any]) -> Any:
    """The name of the pre-tokenizer."""
    return meta.get("tokenizer.ggml.pre", "default")


def _typed(meta: Mapping[str, Any], tokens: list[str], types: list[int]) -> list[int]:
    """The types, corrected for control tokens that have another type in the file."""
    roles = {meta.get(f"tokenizer.ggml.{role}_token_id") for role in _ENDS}
    normal = [i for i, t in enumerate(types) if t == _NORMAL and len(tokens[i]) > 1]
    named = [i for i in normal if i not in roles and _looks_control(tokens[i])]
    turns = _TURNS - _TAGS if "<bos>" in tokens else _TURNS
    wrong = [i for i, t in enumerate(types) if t == _USER_DEFINED and tokens[i] in turns]
    wrong += [i for i in normal if i in roles]
    if named:
        is_word = _words(meta, tokens, types)
        wrong += [i for i in named if not is_word(tokens[i])]
    if not wrong:
        return types
    corrected = set(wrong)
    return [_CONTROL if i in corrected else t for i, t in enumerate(types)]


def _words(meta: Mapping[str, Any], tokens: list[str], types: list[int]) -> Callable[[str], bool]:
    """A test whether text can give a token: by merges, or by two pieces that join to it."""
    if merges := meta.get("tokenizer.ggml.merges"):
        made = {merge.replace(" ", "", 1) for merge in merges}
        return made.__contains__
    pieces = {token for token, t in zip(tokens, types, strict=True) if t == _NORMAL}

    def joined(token: str) -> bool:
        return any(token[:n] in pieces and token[n:] in pieces for n in range(1, len(token)))

    return joined


def _looks_control(token: str) -> bool:
    return token in _TURNS or _CONTROL_SHAPE.fullmatch(token) is not None


def _byte_level_bpe(
    meta: Mapping[str, Any], vocab: dict[str, int], path: Path
) -> tuple[_Json, bool]:
    merges: list[str] = meta.get("tokenizer.ggml.merges") or []
    if not merges:
        raise CheckpointError(f"{path}: tokenizer.ggml.merges is missing")
    pre = PRE_TOKENIZERS[_pre(meta)]
    pairs = [merge.split(" ", 1) for merge in merges]
    body = {
        "normalizer": {"type": pre.normalizer} if pre.normalizer else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": pre.steps},
        "decoder": {**byte_level(True), "add_prefix_space": True},
        "model": _bpe(vocab, pairs, ignore_merges=pre.ignore_merges),
    }
    return body, pre.add_bos


def _sentencepiece(
    meta: Mapping[str, Any], vocab: dict[str, int], types: list[int], path: Path
) -> tuple[_Json, bool]:
    """SentencePiece BPE: merges follow from the scores, unknown characters fall back to bytes."""
    scores = meta.get("tokenizer.ggml.scores") or []
    if len(scores) != len(vocab):
        raise CheckpointError(f"{path}: tokenizer.ggml.scores is missing")
    unknown = meta.get("tokenizer.ggml.unknown_token_id", 0)
    prefix = meta.get("tokenizer.ggml.add_space_prefix", True)
    to_space = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    from_space = {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    first = [{"type": "Prepend", "prepend": _SPACE}] if prefix else []
    decoders = [
        from_space,
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        *([strip] if prefix else ()),
    ]
    names = list(vocab)
    body = {
        "normalizer": {"type": "Sequence", "normalizers": [*first, to_space]},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": _bpe(vocab, _merges(vocab, scores, types), unknown=names[unknown]),
    }
    return body, True


def _merges(vocab: dict[str, int], scores: list[float], types: list[int]) -> list[list[str]]:
    """Every way to make a normal piece of two others, best score first, as SentencePiece merges
    them.
    """
    normal = {piece for piece, i in vocab.items() if types[i] == _NORMAL}
    # Runs of one character, which are whole pieces wherever they stand: the longest first.
    runs = {piece for piece, i in vocab.items() if types[i] == _USER_DEFINED and _is_run(piece)}
    known = runs | {piece for piece in normal if len(piece) == 1}
    first = [
        (-cut, cut - len(piece), piece[:cut], piece[cut:])
        for piece in runs
        for cut in range(1, len(piece))
        if piece[:cut] in known and piece[cut:] in known
    ]
    found = [
        (-scores[vocab[piece]], -cut, piece[:cut], piece[cut:])  # a longer left part goes first
        for piece in normal
        for cut in range(1, len(piece))
        if piece[:cut] in normal and piece[cut:] in normal
    ]
    return [[left, right] for _, _, left, right in (*sorted(first), *sorted(found))]


def _is_run(piece: str) -> bool:
    return len(piece) > 1 and len(set(piece)) == 1 and piece[0] in f"{_SPACE}\n\t\r"


def _bpe(
    vocab: dict[str, int],
    merges: list[list[str]],
    *,
    ignore_merges: bool = False,
    unknown: str | None = None,
) -> _Json:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": unknown,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": unknown is not None,
        "byte_fallback": unknown is not None,
        "ignore_merges": ignore_merges,
        "vocab": vocab,
        "merges": merges,
    }


def _added_tokens(meta: Mapping[str, Any], tokens: list[str], types: list[int]) -> list[_Json]:
    """The tokens that are found in a text before it is cut and merged.

    Control tokens of Phi-3's SentencePiece vocabulary take the spaces behind them; no key of the
    file states it.
    """
    keys = ("general.architecture", "tokenizer.ggml.model")
    is_phi3 = [meta.get(key) for key in keys] == ["phi3", "llama"]
    out = []
    for i, t in enumerate(types):
        if t in (_UNKNOWN, _CONTROL, _USER_DEFINED):
            special = t != _USER_DEFINED
            strip = is_phi3 and special and tokens[i] not in _PHI3_PLAIN
            flags = dict.fromkeys(FLAGS, False) | {"special": special, "rstrip": strip}
            out.append({"id": i, "content": tokens[i], **flags})
    return out


def _template(meta: Mapping[str, Any], tokens: list[str], *, add_bos: bool) -> _Json | None:
    """What `add_special_tokens` puts around a text."""
    bos, eos = (meta.get(f"tokenizer.ggml.{k}_token_id") for k in ("bos", "eos"))
    before = [bos] if bos is not None and meta.get("tokenizer.ggml.add_bos_token", add_bos) else []
    after = [eos] if eos is not None and meta.get("tokenizer.ggml.add_eos_token", False) else []
    if not before and not after:
        return None

    def piece(i: int) -> _Json:
        return {"SpecialToken": {"id": tokens[i], "type_id": 0}}

    def around(*names: str) -> list[_Json]:
        texts = [{"Sequence": {"id": name, "type_id": 0}} for name in names]
        return [*map(piece, before), *texts, *map(piece, after)]

    return {
        "type": "TemplateProcessing",
        "single": around("A"),
        "pair": around("A", "B"),
        "special_tokens": {
            tokens[i]: {"id": tokens[i], "ids": [i], "tokens": [tokens[i]]} for i in before + after
        },
    }


def _tokenizer_config(meta: Mapping[str, Any], tokens: list[str]) -> _Json:
    """Special tokens by role, as chat templates name them, and the template."""
    out: _Json = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
    }
    roles = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
    for role, short in roles.items():
        if (i := meta.get(f"tokenizer.ggml.{role}_token_id")) is not None and i < len(tokens):
            out[f"{short}_token"] = tokens[i]
    if templates := _chat_templates(meta):
        only = len(templates) == 1 and templates.get("default")
        named = [{"name": name, "template": text} for name, text in templates.items()]
        out["chat_template"] = only or named
    return out


def _chat_templates(meta: Mapping[str, Any]) -> dict[str, str]:
    """Texts by name. The list `tokenizer.chat_templates` is not used: some files lack it."""
    prefix = "tokenizer.chat_template"
    found = {"default": meta.get(prefix)}
    for key, text in meta.items():
        if key.startswith(f"{prefix}."):
            found[key.removeprefix(f"{prefix}.")] = text
    return {name: text for name, text in found.items() if isinstance(text, str) and text}
