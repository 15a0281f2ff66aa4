"""Text <-> token ids of one model, from `tokenizer.json` by the tokenizers library.

It also knows the bytes of each token, for the streaming detokenizer. Two families of decoders are
supported, and others are refused when the model is loaded:

    byte-level     a token is bytes, the text is their UTF-8 (GPT-2, Llama 3, Qwen2, SmolLM2)
    SentencePiece  a token is text, or one byte written <0xAB> (Llama 2, Mistral 7B, Gemma, T5);
                   the first word of a text may lose the space before it
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tokenizers

from coordinator.text.special_tokens import SpecialTokens
from coordinator.text.untrusted_text import without_surrogates
from engine.base.errors import CheckpointError
from engine.checkpoint.added_tokens import merged_tokenizer
from engine.checkpoint.config import read_config
from engine.checkpoint.gguf_tokenizer import CONTROL_BY_NAME
from engine.checkpoint.jsonfile import read_json
from engine.telemetry.log import get_logger

_log = get_logger(__name__)

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_alphabet() -> dict[str, int]:
    """Character -> byte of GPT-2's byte-level vocabulary; printable bytes are themselves."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in set(printable)]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


_ALPHABET = _byte_alphabet()


Replacement = tuple[str, str, str]  # (old, new, new in the first token of a text)


@dataclass(frozen=True, slots=True)
class Decoding:
    """The steps of a decoder, in their order."""

    byte_level: bool  # else SentencePiece, with the steps below
    replaced: tuple[Replacement, ...] = ()  # in each token
    has_byte_tokens: bool = False
    then_replaced: tuple[Replacement, ...] = ()  # after byte tokens have become characters
    stripped: str = ""  # character that is removed from the start of a text
    num_stripped: int = 0  # at most so many


@dataclass(frozen=True, slots=True)
class Piece:
    """The content of one token: a text, or bytes that may be a part of a character."""

    text: str
    raw: bytes | None  # None: `text` is complete (SentencePiece, except byte tokens)
    first: str = ""  # the text if this is the first token of a text


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """Immutable and thread-safe; encoding releases the GIL."""

    library: tokenizers.Tokenizer
    vocab_size: int  # rows of the model's output layer, which may exceed the number of tokens
    bos: int | None
    special_ids: frozenset[int]  # tokens that skip_special_tokens omits
    decoding: Decoding
    longest_token: int  # maximum characters of a token; 0: unbounded
    special: SpecialTokens
    _pieces: dict[int, Piece | None] = field(default_factory=dict, repr=False, compare=False)
    _names: list[frozenset[str]] = field(default_factory=list, repr=False, compare=False)

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """Read a folder in Hugging Face layout. Raises CheckpointError that names the file."""
        path = folder / "tokenizer.json"
        if not path.exists():
            raise CheckpointError(f"{path}: this file is missing (tokenizer.model is not read)")
        read_json(path)  # its error names the file
        text = merged_tokenizer(folder)
        spec = json.loads(text)
        config = read_config(folder)
        try:
            library = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # tokenizers raises nothing more specific
            raise CheckpointError(f"{path}: not a tokenizer ({error})") from None
        config_path = folder / "tokenizer_config.json"
        if names := (read_json(config_path) if config_path.exists() else {}).get(CONTROL_BY_NAME):
            _log.warning(
                "control tokens of the GGUF file have the type of text; used as control tokens",
                tokens=names,
            )
        return cls.of(library, spec, path, vocab_size=config.vocab_size, bos=config.bos_token_id)

    @classmethod
    def of(
        cls,
        library: tokenizers.Tokenizer,
        spec: dict[str, Any],
        path: Path,
        *,
        vocab_size: int,
        bos: int | None,
    ) -> Tokenizer:
        """Build from the content of the tokenizer.json at `path`. Raises CheckpointError."""
        library.no_truncation()
        library.no_padding()
        added = spec.get("added_tokens") or []
        return cls(
            library=library,
            vocab_size=vocab_size,
            bos=bos,
            special_ids=frozenset(t["id"] for t in added if t.get("special")),
            decoding=_decoding(spec.get("decoder"), path),
            longest_token=_longest_token(spec),
            special=SpecialTokens(library),
        )

    def encode(
        self,
        text: str,
        add_special_tokens: bool = True,
        special_spans: Sequence[tuple[int, int]] | None = None,
    ) -> list[int]:
        """Token ids of `text`; texts of special tokens in it are read as special tokens.

        With `special_spans` only those at these [begin, end) are, and the others are text.
        `add_special_tokens` adds what the model expects (a BOS for Llama, nothing for SmolLM2). A
        lone surrogate, which UTF-8 cannot represent, counts as U+FFFD.
        """
        text = without_surrogates(text)
        if special_spans is not None:
            return self.special.encode(text, special_spans, add_special_tokens)
        # The batch call, unlike `encode`, releases the GIL.
        encodings = self.library.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        return list(encodings[0].ids)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of `ids`; ids without a token are skipped, broken UTF-8 becomes U+FFFD."""
        return str(self.library.decode(list(ids), skip_special_tokens=skip_special_tokens))

    def min_num_tokens(self, text: str) -> int:
        """A lower bound on the tokens of `text`, found without tokenizing.

        A prompt of many megabytes is refused by it before it costs seconds and gigabytes.
        """
        if not self.longest_token:
            return 0
        return -(-len(text) // self.longest_token)

    def piece(self, token_id: int) -> Piece | None:
        """The content of a token; None for an id without a token."""
        if token_id not in self._pieces:
            token = self.library.id_to_token(token_id) if token_id >= 0 else None
            self._pieces[token_id] = None if token is None else self._make_piece(token)
        return self._pieces[token_id]

    @property
    def special_names(self) -> frozenset[str]:
        """The texts of all special tokens."""
        if not self._names:
            names = (self.library.id_to_token(token_id) for token_id in self.special_ids)
            self._names.append(frozenset(name for name in names if name))
        return self._names[0]

    def special_name(self, token_id: int) -> str:
        """The text of a special token; "" for other tokens."""
        return (self.library.id_to_token(token_id) or "") if token_id in self.special_ids else ""

    def text_of(self, token_id: int) -> str:
        """The text of a single token, special or not; partial characters are U+FFFD."""
        piece = self.piece(token_id)
        if piece is None:
            return ""
        return piece.text if piece.raw is None else piece.raw.decode("utf-8", "replace")

    def text_at_start(self, token_id: int) -> str:
        """The same for the first token of a text, which may lose a space."""
        piece, decoding = self.piece(token_id), self.decoding
        if piece is None or piece.raw is not None:
            return self.text_of(token_id)
        text = piece.first
        for _ in range(decoding.num_stripped):
            text = text.removeprefix(decoding.stripped)
        return text

    def raw_of(self, token_id: int) -> bytes | None:
        """The bytes of a token with partial characters; None if its text is exact."""
        piece = self.piece(token_id)
        if piece is None or piece.raw is None:
            return None
        try:
            piece.raw.decode()
        except UnicodeDecodeError:
            return piece.raw
        return None

    def _make_piece(self, token: str) -> Piece:
        if self.decoding.byte_level:
            try:
                raw = bytes(_ALPHABET[c] for c in token)
            except KeyError:  # an added token, which is plain text
                raw = token.encode()
            return Piece("", raw)
        decoding = self.decoding
        text = _replaced(token, decoding.replaced)
        if decoding.has_byte_tokens and (match := _BYTE.fullmatch(text)):
            return Piece("", bytes([int(match[1], 16)]))
        first = _replaced(token, decoding.replaced, first=True)
        return Piece(
            _replaced(text, decoding.then_replaced),
            None,
            _replaced(first, decoding.then_replaced, first=True),
        )


def _replaced(text: str, replacements: Sequence[Replacement], *, first: bool = False) -> str:
    for old, new, new_in_first in replacements:
        text = text.replace(old, new_in_first if first else new)
    return text


# Replace and Metaspace change each token, ByteFallback joins byte tokens to characters, Fuse joins
# all tokens. Strip acts on the whole text only after Fuse, otherwise on each token.
_LETTERS = {"Replace": "r", "Metaspace": "r", "ByteFallback": "b", "Fuse": "f", "Strip": "s"}
_SENTENCEPIECE = re.compile("(r*)(b?)(r*)(f?)((?<=f)s|)")


def _decoding(spec: dict[str, Any] | None, path: Path) -> Decoding:
    """The steps of a decoder in tokenizer.json. Raises CheckpointError for an unknown family."""
    steps = [spec] if spec and spec["type"] != "Sequence" else (spec or {}).get("decoders", [])
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return Decoding(byte_level=True)
    match = _SENTENCEPIECE.fullmatch("".join(_LETTERS.get(kind, "?") for kind in kinds))
    try:
        if match and steps:
            before, after = match.span(1), match.span(3)
            strip: dict[str, Any] = (
                steps[-1] if match[5] else {"content": "", "start": 0, "stop": 0}
            )
            if strip["stop"] == 0:
                return Decoding(
                    byte_level=False,
                    replaced=tuple(_replacement(step) for step in steps[slice(*before)]),
                    has_byte_tokens=bool(match[2]),
                    then_replaced=tuple(_replacement(step) for step in steps[slice(*after)]),
                    stripped=strip["content"],
                    num_stripped=strip["start"],
                )
    except KeyError:  # a regular expression
        pass
    raise CheckpointError(
        f"{path}: decoder {' + '.join(kinds) or 'none'} is not supported; known are ByteLevel and "
        "SentencePiece's Replace or Metaspace [+ ByteFallback] [+ Fuse [+ Strip at the start]]"
    )


def _replacement(step: dict[str, Any]) -> Replacement:
    """Raises KeyError for a regular expression."""
    if step["type"] == "Replace":
        return step["pattern"]["String"], step["content"], step["content"]
    prepends = step.get("prepend_scheme", "always") != "never"
    return step["replacement"], " ", "" if prepends else " "


def _longest_token(spec: dict[str, Any]) -> int:
    """The maximum number of characters of one token; 0: unbounded."""
    added, model = spec.get("added_tokens") or [], spec["model"]
    shrink = _largest_shrink(spec.get("normalizer"))
    swallows = any(t.get("lstrip") or t.get("rstrip") for t in added) or shrink == 0
    # Some pre-tokenizers drop the text at which they split.
    drops = re.search("Removed|Whitespace|Bert|CharDelimiter", json.dumps(spec["pre_tokenizer"]))
    # SentencePiece fuses runs of unknown characters into one token, unless it falls back to bytes.
    is_unigram = model.get("type") == "Unigram"
    fuses = (model.get("fuse_unk") or is_unigram) and not model.get("byte_fallback")
    if swallows or drops or fuses:
        return 0
    vocab = [token for token, _ in model["vocab"]] if is_unigram else model.get("vocab", {})
    tokens = [*vocab, *(t["content"] for t in added)]
    return shrink * max((len(token) for token in tokens), default=0)


def _largest_shrink(normalizer: dict[str, Any] | None) -> int:
    """How many characters a normalizer may replace by one; 0: any number."""
    if normalizer is None or normalizer["type"] == "Prepend":
        return 1
    if normalizer["type"] == "NFC":
        return 4  # a letter and three marks
    if normalizer["type"] == "Replace":
        pattern = normalizer["pattern"].get("String")
        return int(pattern is not None and len(pattern) <= len(normalizer["content"]))
    if normalizer["type"] == "Sequence":
        return math.prod(map(_largest_shrink, normalizer["normalizers"]))
    return 0
