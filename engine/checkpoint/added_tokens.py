"""Added tokens of a folder in Hugging Face layout, and which tokens end an answer.

Several files name added tokens, and no single one is complete:

    tokenizer.json          added_tokens         what the tokenizers library reads
    tokenizer_config.json   added_tokens_decoder, and the roles: eos_token, pad_token, ...
    added_tokens.json       {token: id}
    special_tokens_map.json roles again, additional_special_tokens

A token ends an answer where config.json, generation_config.json, tokenizer_config.json or
special_tokens_map.json name it, and where its name alone tells (END_OF_TURN). A name counts only
for a *special* added token: a word of the vocabulary that is spelled so stays a word.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from engine.checkpoint.jsonfile import read_json
from engine.errors import CheckpointError
from engine.telemetry.log import get_logger

_log = get_logger(__name__)
TOKENIZER = "tokenizer.json"
ROLES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
# Tokens that end a turn or a text in the families that use them.
END_OF_TURN = frozenset(
    {
        *("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|eot|>", "<|eom|>", "<|endofturn|>"),
        *("<|end_of_turn|>", "<end_of_turn>", "<turn|>", "<end_of_utterance>", "<|tool_response>"),
        *("<|end|>", "<|return|>", "<|call|>", "<|calls|>", "<|flush|>"),
        *("<|endoftext|>", "<|end_of_text|>", "<eos>", "</s>", "[EOS]"),
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


def end_of_turn(names: Iterable[str]) -> list[str]:
    """Those of `names`, which are control tokens of one vocabulary, that end an answer."""
    known = set(names)
    excluded = {end for family, end in _NOT_WITH.items() if family <= known}
    return sorted((known & END_OF_TURN) - excluded)


def added_tokens(folder: Path) -> list[dict[str, Any]]:
    """All added tokens of a folder, by id, in tokenizer.json's form; raises CheckpointError.

    tokenizer.json alone decides about its own tokens, but for one thing: a token is special if any
    file makes it so. A token that it lacks comes from the other files.
    """
    found = {int(token["id"]): dict(token) for token in _in_tokenizer_json(folder / TOKENIZER)}
    config = _optional(folder / "tokenizer_config.json")
    named = {token["content"] for token in found.values()}
    special = set(special_names(folder))
    for key, value in (config.get("added_tokens_decoder") or {}).items():
        if not (str(key).isdecimal() and isinstance(value, dict) and _content(value)):
            path = folder / "tokenizer_config.json"
            raise CheckpointError(f"{path}: added_tokens_decoder[{key!r}] is no token with an id")
        token_id, content = int(key), _content(value)
        if value.get("special"):
            special.add(content)
        if token_id not in found and content not in named:
            found[token_id] = {"id": token_id, **_defaults(content), **value}
            named.add(content)
    for content, token_id in _optional(folder / "added_tokens.json").items():
        if isinstance(token_id, int) and token_id not in found and content not in named:
            found[token_id] = {"id": token_id, **_defaults(content)}
            named.add(content)
    for token in found.values():
        token["special"] = bool(token.get("special")) or token["content"] in special
    return [found[token_id] for token_id in sorted(found)]


def special_names(folder: Path) -> Iterator[str]:
    """Names of the tokens that have a role in tokenizer_config.json or special_tokens_map.json."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        roles = _optional(folder / name)
        more = roles.get("additional_special_tokens") or []
        values = more.values() if isinstance(more, dict) else more
        for value in (*(roles.get(role) for role in ROLES), *values):
            if content := _content(value):
                yield content


def eos_token_ids(folder: Path, named: Iterable[int], vocab_size: int) -> tuple[int, ...]:
    """Ids of all tokens that end an answer: `named` by config files first, then the folder's own.

    Raises CheckpointError where a file of the tokenizer cannot be read.
    """
    tokens = added_tokens(folder)
    ids = {token["content"]: int(token["id"]) for token in tokens}
    special = [token["content"] for token in tokens if token["special"]]
    files = ("tokenizer_config.json", "special_tokens_map.json")
    roles = [_content(_optional(folder / name).get("eos_token")) for name in files]
    names = [*(role for role in roles if role), *end_of_turn(special)]
    found = [*named, *(ids[name] for name in names if name in ids)]
    return tuple(dict.fromkeys(i for i in found if i < vocab_size))


def merged_tokenizer(folder: Path) -> str:
    """Text of tokenizer.json with the added tokens of all files; as it is where it has them all.

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
    """Tokens that the library would give their own ids: of the vocabulary, or the next free one."""
    vocab = (spec.get("model") or {}).get("vocab") or {}
    if not isinstance(vocab, dict):
        vocab = {token: i for i, (token, *_) in enumerate(vocab)}
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


def _in_tokenizer_json(path: Path) -> list[Mapping[str, Any]]:
    """`added_tokens` of a tokenizer.json, without parsing its megabytes of vocabulary."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return []  # whoever needs the file says what is wrong with it
    decoder, key = json.JSONDecoder(), '"added_tokens"'
    begin = text.find(key)
    while begin >= 0:
        at = begin + len(key)
        rest = text[at : at + 64].lstrip()
        if rest.startswith(":"):
            at = text.index(":", at) + 1
            while text[at : at + 1].isspace():
                at += 1
            if text[at : at + 1] == "[":  # a word of the vocabulary has a number here
                try:
                    value, _ = decoder.raw_decode(text, at)
                except ValueError:
                    return []
                return [t for t in value if isinstance(t, dict) and "id" in t and "content" in t]
        begin = text.find(key, begin + 1)
    return []


def _optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}


def _content(value: Any) -> str:
    """A token of a role, which old files write as objects; "" for none."""
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else ""


def _defaults(content: str) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    return {"content": content, **flags}
