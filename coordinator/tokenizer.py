"""Text <-> token ids of one model, read from `tokenizer.json` by the tokenizers library.

Also says what bytes each token stands for, which the streaming detokenizer is built on. Two
families of decoders exist among the models that are served, and an unknown one is refused when the
model is loaded:

    byte-level    a token is bytes; the answer is their UTF-8 (GPT-2, Llama 3, Qwen2, SmolLM2)
    SentencePiece a token is text, or one byte written <0xAB> (Llama 2, Mistral 7B)
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

from engine.checkpoint.config import ModelConfig, read_json
from engine.errors import CheckpointError

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_alphabet() -> dict[str, int]:
    """Character -> byte of GPT-2's byte-level vocabulary: printable ones stand for themselves."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in set(printable)]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


_ALPHABET = _byte_alphabet()


@dataclass(frozen=True, slots=True)
class Decoding:
    """How token texts become an answer."""

    byte_level: bool  # else SentencePiece
    strip_first_space: bool = False  # SentencePiece writes one before the first word


@dataclass(frozen=True, slots=True)
class Piece:
    """What one token adds: text of its own, or bytes that make a character only with others."""

    text: str
    raw: bytes | None  # None: `text` is complete by itself (SentencePiece, except byte tokens)


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """Immutable and safe to share between threads; encoding lets other threads run."""

    library: tokenizers.Tokenizer
    vocab_size: int  # of the model, which may have more rows than the tokenizer has tokens
    bos: int | None
    special_ids: frozenset[int]  # tokens that skip_special_tokens leaves out
    decoding: Decoding
    longest_token: int  # no token stands for more characters than this; 0: there is no bound
    _pieces: dict[int, Piece | None] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """Read a folder in Hugging Face layout. Raises CheckpointError naming the file."""
        path = folder / "tokenizer.json"
        if not path.exists():
            raise CheckpointError(f"{path}: this file is missing (tokenizer.model is not read)")
        spec = read_json(path)
        config = ModelConfig.from_folder(folder)
        try:
            library = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing more exact
            raise CheckpointError(f"{path}: not a tokenizer ({error})") from None
        library.no_truncation()
        library.no_padding()
        added = spec.get("added_tokens") or []
        return cls(
            library=library,
            vocab_size=config.vocab_size,
            bos=config.bos_token_id,
            special_ids=frozenset(t["id"] for t in added if t.get("special")),
            decoding=_decoding(spec.get("decoder"), path),
            longest_token=_longest_token(spec),
        )

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`; special tokens written in it are read as such.

        `add_special_tokens` puts around it what the model wants (a BOS for Llama, nothing for
        SmolLM2). A lone surrogate, which no UTF-8 text can hold, counts as U+FFFD.
        """
        if not text.isascii():
            text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
        # The batch call, unlike `encode`, lets go of the interpreter lock while it works.
        encodings = self.library.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        return list(encodings[0].ids)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of `ids`; ids without a token add nothing, broken UTF-8 becomes U+FFFD."""
        return str(self.library.decode(list(ids), skip_special_tokens=skip_special_tokens))

    def min_num_tokens(self, text: str) -> int:
        """No encoding of `text` is shorter than this; found without tokenizing.

        Lets a prompt of many megabytes be refused before it costs seconds and gigabytes.
        """
        if not self.longest_token:
            return 0
        return -(-len(text) // self.longest_token)

    def piece(self, token_id: int) -> Piece | None:
        """What `token_id` adds to an answer; None for an id without a token."""
        if token_id not in self._pieces:
            token = self.library.id_to_token(token_id) if token_id >= 0 else None
            self._pieces[token_id] = None if token is None else self._make_piece(token)
        return self._pieces[token_id]

    def text_of(self, token_id: int) -> str:
        """A token alone, special ones included; what is no whole character in it is U+FFFD."""
        piece = self.piece(token_id)
        if piece is None:
            return ""
        return piece.text if piece.raw is None else piece.raw.decode("utf-8", "replace")

    def raw_of(self, token_id: int) -> bytes | None:
        """A token's bytes, where they are no whole characters; else its text says all."""
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
            except KeyError:  # an added token, written plainly
                raw = token.encode()
            return Piece("", raw)
        text = token.replace("\u2581", " ")
        if match := _BYTE.fullmatch(text):
            return Piece("", bytes([int(match[1], 16)]))
        return Piece(text, None)


def _decoding(spec: dict[str, Any] | None, path: Path) -> Decoding:
    """The family of a decoder in tokenizer.json; CheckpointError for one that is neither."""
    steps = [spec] if spec and spec["type"] != "Sequence" else (spec or {}).get("decoders", [])
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return Decoding(byte_level=True)
    if kinds[:3] == ["Replace", "ByteFallback", "Fuse"] and kinds[3:] in ([], ["Strip"]):
        replace, strip = steps[0], steps[3:]
        usual = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
        if (
            replace["pattern"] == {"String": "\u2581"}
            and replace["content"] == " "
            and strip in ([], [usual])
        ):
            return Decoding(byte_level=False, strip_first_space=bool(strip))
    raise CheckpointError(
        f"{path}: decoder {' + '.join(kinds) or 'none'} is not supported; known are ByteLevel and "
        "SentencePiece's Replace + ByteFallback + Fuse [+ Strip]"
    )


def _longest_token(spec: dict[str, Any]) -> int:
    """An upper bound of the characters behind one token; 0 where one may swallow any amount."""
    added, model = spec.get("added_tokens") or [], spec["model"]
    shrink = _largest_shrink(spec.get("normalizer"))
    swallows = any(t.get("lstrip") or t.get("rstrip") for t in added) or shrink == 0
    # Some pre-tokenizers drop what they split at.
    drops = re.search("Removed|Whitespace|Bert|CharDelimiter", json.dumps(spec["pre_tokenizer"]))
    # SentencePiece fuses runs of unknown characters into one token, unless it falls back to bytes.
    fuses = model.get("fuse_unk") and not model.get("byte_fallback")
    if swallows or drops or fuses:
        return 0
    tokens = [*model.get("vocab", {}), *(t["content"] for t in added)]
    return shrink * max((len(token) for token in tokens), default=0)


def _largest_shrink(normalizer: dict[str, Any] | None) -> int:
    """How many characters a normalizer may make one of; 0: any number."""
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
