"""Tokenizes prompts in which only some of the special-token texts are special tokens.

A tokenizer reads every `<|im_end|>` as the special token. If some of them are ordinary text, the
real ones are replaced by names that no text can contain, and a second tokenizer, whose special
tokens have these names, reads the whole text:

    <|im_start|>user\n<|im_end|> in a text<|im_end|>
    {im_start  }user\n<|im_end|> in a text{im_end  }

So the text is split and normalized as by the first tokenizer, and if all are special tokens, the
ids are equal.
"""

from __future__ import annotations

import json
import re
import secrets
import threading
from collections.abc import Collection, Sequence
from typing import Any

import tokenizers

from coordinator.text.untrusted_text import Marks

_NO_CHARACTER = "\U0010ffff"


class SpecialTokens:
    """The special tokens of one tokenizer. Shared by threads."""

    def __init__(self, library: tokenizers.Tokenizer) -> None:
        added = library.get_added_tokens_decoder()
        self._library = library
        self._ids = {token.content: i for i, token in added.items() if token.special}
        # Some are matched in normalized text, where further ones may appear.
        normalized = any(t.special and t.normalized for t in added.values())
        self._normalizer = library.normalizer if normalized else None
        # As in tokenizers: the leftmost match of all added tokens, and of those the longest.
        contents = {t.content for t in added.values() if t.content}
        self._pattern = re.compile(_longest_of(contents)) if contents else None
        self._nonce = secrets.token_hex(8)
        self._lock = threading.Lock()
        self._renamed: tokenizers.Tokenizer | None = None
        self.marks = Marks(self._ids)

    def spelled(self, text: str) -> list[tuple[int, int]]:
        """[begin, end) of each special token in `text`."""
        if self._pattern is None:
            return []
        return [m.span() for m in self._pattern.finditer(text) if m[0] in self._ids]

    def encode(
        self, text: str, special_spans: Sequence[tuple[int, int]], add_special_tokens: bool
    ) -> list[int]:
        """Token ids of `text`; only the texts at `special_spans` are special tokens."""
        if self.spelled(text) == list(special_spans) and not self._appears(text):
            library = self._library
        else:
            library = self._renamed_tokenizer()
            pieces, at = [], 0
            for begin, end in special_spans:
                pieces += [text[at:begin], self._name(self._ids[text[begin:end]])]
                at = end
            text = "".join([*pieces, text[at:]])
        encodings = library.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        return list(encodings[0].ids)

    def prepare(self) -> None:
        """Build the second tokenizer now; it holds the GIL as long as loading the first."""
        self._renamed_tokenizer()

    def _appears(self, text: str) -> bool:
        """Whether normalization creates special tokens from other text (wide characters)."""
        if self._normalizer is None:
            return False
        normalized = self._normalizer.normalize_str(text)
        return len(self.spelled(normalized)) != len(self.spelled(text))

    def _name(self, token_id: int) -> str:
        """A name that no text contains, because of the random nonce."""
        return f"{_NO_CHARACTER}{self._nonce}:{token_id}{_NO_CHARACTER}"

    def _renamed_tokenizer(self) -> tokenizers.Tokenizer:
        """The tokenizer with renamed special tokens, built on first use."""
        with self._lock:
            if self._renamed is None:
                spec = json.loads(self._library.to_str())
                names = {content: self._name(i) for content, i in self._ids.items()}
                _rename(spec, names)
                self._renamed = tokenizers.Tokenizer.from_str(json.dumps(spec))
                self._renamed.no_truncation()
                self._renamed.no_padding()
            return self._renamed


def _longest_of(words: Collection[str]) -> str:
    """A pattern that matches the longest of these words; a trie, so thousands match as fast."""
    tails: dict[str, list[str]] = {}
    for word in words:
        if word:
            tails.setdefault(word[0], []).append(word[1:])
    branches = [re.escape(first) + _longest_of(rest) for first, rest in tails.items()]
    pattern = "|".join(branches)
    if "" in words:
        return f"(?:{pattern})?" if pattern else ""
    return f"(?:{pattern})" if len(branches) > 1 else pattern


def _rename(spec: dict[str, Any], names: dict[str, str]) -> None:
    """Rename tokens of a tokenizer.json in place."""
    for token in spec["added_tokens"]:
        if token["content"] in names:
            token |= {"content": names[token["content"]], "normalized": False}
    model = spec["model"]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(token, token): i for token, i in model["vocab"].items()}
    else:
        model["vocab"] = [[names.get(token, token), *rest] for token, *rest in model["vocab"]]
    if "merges" in model:  # text must not merge into a special token
        pairs = [m if isinstance(m, list) else m.split(" ", 1) for m in model["merges"]]
        model["merges"] = [p for p in pairs if not {*p, "".join(p)} & names.keys()]
