"""Added tokens of a folder in Hugging Face layout, and the tokens that end an output.

Several files name added tokens, and no single one is complete:

    tokenizer.json          added_tokens         what the tokenizers library reads
    tokenizer_config.json   added_tokens_decoder, and the roles: eos_token, pad_token, ...
    added_tokens.json       {token: id}
    special_tokens_map.json roles again, additional_special_tokens

A token ends an output if config.json, generation_config.json, tokenizer_config.json or
special_tokens_map.json gives it that role, or if its name is in END_OF_TURN. A name counts only for
a *special* added token: an ordinary word of the vocabulary with the same spelling stays a word.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from engine.base.errors import CheckpointError
from engine.checkpoint.jsonfile import read_json
from engine.telemetry.log import get_logger

_log = get_logger(__name__)
TOKENIZER = "tokenizer.json"
ROLES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
_ENDS = ("bos_token", "eos_token")
_ROLE_FILES = ("tokenizer_config.json", "special_tokens_map.json")
# Further special tokens, in a list or by name.
_MORE_SPECIAL = (
    "additional_special_tokens",
    "extra_special_tokens",
    "model_specific_special_tokens",
)
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
# Tokens that end a turn or a text in the families that use them.
END_OF_TURN = frozenset(
    {
        *("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|eot|>", "<|eom|>", "<|endofturn|>"),
        *("<|end_of_turn|>", "<end_of_turn>", "<turn|>", "<end_of_utterance>", "<|tool_response>"),
        *("<|end|>", "<|return|>", "<|call|>", "<|calls|>", "<|flush|>"),
        *("<|endoftext|>", "<|end_of_text|>", "<eos>", "</s>", "[EOS]"),
        *("<|END_OF_TURN_TOKEN|>", "<|assistant_end|>", "<|role_end|>", "<|end_of_msg|>"),
        *("<seed:eos>", "[e~[", "<end_of_sentence>"),
        *("<EOT>", "_<EOT>", "\u2581<EOT>", "[EOT]"),
        "<\uff5cend\u2581of\u2581sentence\uff5c>",
    }
)
# A family that has all tokens of the key does not end with the value.
_NOT_WITH = {
    frozenset({"<|return|>", "<|call|>"}): "<|end|>",  # ends one message of several
    frozenset({"<|flush|>", "<|calls|>"}): "<|end|>",
    frozenset({"<|tool_response>"}): "</s>",
}


class _TokenizerJson(msgspec.Struct):
    """The part of tokenizer.json that is parsed; the rest is skipped."""

    added_tokens: Any = ()


def end_of_turn(names: Iterable[str]) -> list[str]:
    """Those of `names`, which are control tokens of one vocabulary, that end an output."""
    known = set(names)
    excluded = {end for family, end in _NOT_WITH.items() if family <= known}
    return sorted((known & END_OF_TURN) - excluded)


def added_tokens(folder: Path) -> list[dict[str, Any]]:
    """All added tokens of a folder, by id, in tokenizer.json's form; raises CheckpointError.

    The entries of tokenizer.json take precedence, except that a token is special if any file marks
    it so. The other files add the tokens that tokenizer.json lacks.
    """
    found = {int(token["id"]): dict(token) for token in _in_tokenizer_json(folder / TOKENIZER)}
    named = {token["content"] for token in found.values()}
    special = set(special_names(folder))

    def add(token_id: int, content: str, flags: Mapping[str, Any]) -> None:
        if token_id not in found and content not in named:
            set_flags = {flag: bool(flags.get(flag)) for flag in FLAGS}
            found[token_id] = {"id": token_id, "content": content, **set_flags}
            named.add(content)

    for token_id, value in _decoder(folder / "tokenizer_config.json"):
        if value.get("special"):
            special.add(_content(value))
        add(token_id, _content(value), value)
    for content, token_id in _optional(folder / "added_tokens.json").items():
        if isinstance(token_id, int):
            add(token_id, content, {})
    # transformers takes these from the vocabulary too, where no file adds them.
    if lacking := [name for role in _ENDS for name in _roles(folder, role) if name not in named]:
        vocab = _vocabulary(_optional(folder / TOKENIZER))
        for content in lacking:
            if content in vocab:
                add(vocab[content], content, {})
    for token in found.values():
        token["special"] = bool(token.get("special")) or token["content"] in special
    return [found[token_id] for token_id in sorted(found)]


def special_names(folder: Path) -> Iterator[str]:
    """Names of the tokens that tokenizer_config.json or special_tokens_map.json give a role."""
    for file in _ROLE_FILES:
        for key, value in _optional(folder / file).items():
            if key.endswith("_token"):  # transformers takes any: eot_token, image_token
                values = [value]
            elif key in _MORE_SPECIAL:
                values = list(value.values()) if isinstance(value, dict) else value
                values = values if isinstance(values, list) else [values]
            else:
                continue
            yield from filter(None, map(_content, values))


def _roles(folder: Path, role: str) -> list[str]:
    """The tokens that the files name for a role."""
    names = (_content(_optional(folder / file).get(role)) for file in _ROLE_FILES)
    return [name for name in names if name]


def eos_token_ids(folder: Path, named: Iterable[int], vocab_size: int) -> tuple[int, ...]:
    """Ids of all tokens that end an output: first those that config files name, then the others.

    Raises CheckpointError where a file of the tokenizer cannot be read.
    """
    tokens = added_tokens(folder)
    ids = {token["content"]: int(token["id"]) for token in tokens}
    special = [token["content"] for token in tokens if token["special"]]
    names = [*_roles(folder, "eos_token"), *end_of_turn(special)]
    found = [*named, *(ids[name] for name in names if name in ids)]
    return tuple(dict.fromkeys(i for i in found if i < vocab_size))


def merged_tokenizer(folder: Path) -> str:
    """Text of tokenizer.json with the added tokens of all files; unchanged if it has them all.

    Raises CheckpointError.
    """
    path = folder / TOKENIZER
    tokens = added_tokens(folder)
    own = {t["id"]: bool(t.get("special")) for t in _in_tokenizer_json(path)}
    if own == {t["id"]: t["special"] for t in tokens}:
        return path.read_text(encoding="utf-8")
    spec = read_json(path)
    spec["added_tokens"] = [token for token in tokens if token["id"] in own]
    spec["added_tokens"] += _loadable(spec, (t for t in tokens if t["id"] not in own), path)
    return json.dumps(spec, ensure_ascii=False)


def _loadable(
    spec: Mapping[str, Any], more: Iterable[Mapping[str, Any]], path: Path
) -> list[Mapping[str, Any]]:
    """Tokens that the library gives the right id: the one in the vocabulary, or the next free."""
    vocab = _vocabulary(spec)
    names = {token["content"] for token in spec["added_tokens"]}
    highest = max([len(vocab) - 1, *(int(t["id"]) for t in spec["added_tokens"])])
    out = []
    for token in more:
        if token["content"] in names or vocab.get(token["content"], highest + 1) != token["id"]:
            _log.warning(
                "added token left out: its id is neither the vocabulary's nor the next free one",
                token=token["content"],
                id=token["id"],
                path=str(path),
            )
            continue
        out.append(token)
        highest = max(highest, int(token["id"]))
    return out


def _decoder(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """`added_tokens_decoder` of tokenizer_config.json. Raises CheckpointError."""
    decoder = _optional(path).get("added_tokens_decoder") or {}
    if not isinstance(decoder, dict):
        raise CheckpointError(f"{path}: added_tokens_decoder is no object of tokens by id")
    for key, value in decoder.items():
        if not (key.isdecimal() and isinstance(value, dict) and _content(value)):
            raise CheckpointError(f"{path}: added_tokens_decoder[{key!r}] is no token with an id")
        yield int(key), value


def _vocabulary(spec: Mapping[str, Any]) -> dict[str, int]:
    """Ids by token of a tokenizer.json's model."""
    vocab = (spec.get("model") or {}).get("vocab") or {}
    if isinstance(vocab, dict):
        return vocab
    return {token: i for i, (token, *_) in enumerate(vocab)}


def _in_tokenizer_json(path: Path) -> list[Mapping[str, Any]]:
    """`added_tokens` of a tokenizer.json, without parsing its megabytes of vocabulary."""
    try:
        found = msgspec.json.decode(path.read_bytes(), type=_TokenizerJson).added_tokens
    except (OSError, msgspec.MsgspecError):
        return []  # the reader of the file reports the error
    tokens = [t for t in found if isinstance(t, dict)] if isinstance(found, list) else []
    return [t for t in tokens if isinstance(t.get("id"), int) and _content(t)]


def _optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}


def _content(value: Any) -> str:
    """A token of a role, which old files write as objects; "" for none."""
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else ""
