"""Prompts of an exact number of tokens, cut from real text by a seed.

A prompt starts and ends between words of the text and survives a round trip through the tokenizer,
so systems that take text and systems that take ids see the same tokens.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

DEFAULT_TEXT = Path(__file__).parent / "data" / "moby_dick.txt"
_TRIES = 1000

Ids = tuple[int, ...]


class Codec(Protocol):
    """The part of `coordinator.text.tokenizer.Tokenizer` that the corpus uses."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`."""

    def decode(self, ids: Ids, skip_special_tokens: bool = True) -> str:
        """Text of `ids`."""


class Corpus:
    """One text as the tokens of one model."""

    def __init__(self, text: str, codec: Codec) -> None:
        self._codec = codec
        self._prefix = tuple(codec.encode("", True))  # a BOS, for models that want one
        self._ids = tuple(codec.encode(text, False))

    def __len__(self) -> int:
        """Number of tokens."""
        return len(self._ids)

    def cut(self, rng: random.Random, num_tokens: int) -> Ids:
        """`count` tokens of the text, from an offset that `rng` picks."""
        if num_tokens > len(self._ids):
            raise ValueError(f"the text has {len(self._ids)} tokens, {num_tokens} are wanted")
        for _ in range(_TRIES):
            start = rng.randint(0, len(self._ids) - num_tokens)
            ids = self._ids[start : start + num_tokens]
            if self._text(ids[:1])[:1].isspace() and self.is_stable(ids):
                return ids
        raise ValueError(f"no {num_tokens} tokens of the text survive a round trip")

    def is_stable(self, ids: Ids) -> bool:
        """Whether the text of `ids` encodes to `ids`."""
        return tuple(self._codec.encode(self._text(ids), False)) == ids

    def complete(self, ids: Ids) -> Ids:
        """The ids with the tokenizer's prefix (BOS); as many tokens go from the end."""
        return self._prefix + ids[len(self._prefix) :]

    def _text(self, ids: Ids) -> str:
        return self._codec.decode(ids, False)


class PromptShape(Protocol):
    """What the prompts of one lane have in common."""

    def make(self, corpus: Corpus, rng: random.Random, num: int) -> list[Ids]:
        """`count` prompts; equal corpus and state of `rng` give equal prompts."""


@dataclass(frozen=True, slots=True)
class Plain:
    """Unrelated prompts; of several lengths in turn where more than one is given."""

    num_tokens: tuple[int, ...]

    def make(self, corpus: Corpus, rng: random.Random, num: int) -> list[Ids]:
        """Prompts from different offsets of the text."""
        lengths = (self.num_tokens[i % len(self.num_tokens)] for i in range(num))
        return [corpus.complete(corpus.cut(rng, n)) for n in lengths]


@dataclass(frozen=True, slots=True)
class SharedPrefix:
    """Prompts that begin with the same tokens and end with their own."""

    prefix_tokens: int
    own_tokens: int

    def make(self, corpus: Corpus, rng: random.Random, num: int) -> list[Ids]:
        """Prompts that share one prefix."""
        prefix = corpus.cut(rng, self.prefix_tokens)
        return [corpus.complete(prefix + corpus.cut(rng, self.own_tokens)) for _ in range(num)]


@dataclass(frozen=True, slots=True)
class Repeated:
    """A text twice, and its beginning again: input for which n-gram drafts succeed."""

    text_tokens: int
    begun_tokens: int

    def make(self, corpus: Corpus, rng: random.Random, num: int) -> list[Ids]:
        """Prompts, each of which repeats another text."""
        prompts = []
        while len(prompts) < num:
            text = corpus.cut(rng, self.text_tokens)
            ids = text + text + text[: self.begun_tokens]
            if corpus.is_stable(ids):
                prompts.append(corpus.complete(ids))
        return prompts
