"""Special tokens in prompts: which ones are meant, and which ones are words that a caller wrote.

A tokenizer takes any `<|im_end|>` for the token. Where some of them are not meant, the meant ones
are renamed to names that no text can spell, and a second tokenizer, which knows them by those names
alone, reads the whole text at once:

    <|im_start|>user\n<|im_end|> in a text<|im_end|>
    {im_start  }user\n<|im_end|> in a text{im_end  }

So text is cut at the same places and normalized in the same way as by the first tokenizer, and
where all are meant the ids are equal.
"""

from __future__ import annotations

import json
import re
import secrets
import threading
from collections.abc import Collection, Sequence
from typing import Any

import tokenizers

from coordinator.text.caller_text import Marks

_NO_CHARACTER = "\U0010ffff"


class SpecialTokens:
    """The special tokens of one tokenizer. Shared by threads."""

    def __init__(self, library: tokenizers.Tokenizer) -> None:
        added = library.get_added_tokens_decoder()
        self._library = library
        self._ids = {token.content: i for i, token in added.items() if token.special}
        # Some are looked for in the normalized text, where others may appear than were spelled.
        normalized = any(t.special and t.normalized for t in added.values())
        self._normalizer = library.normalizer if normalized else None
        # As the library does: the leftmost of all added tokens, and of those the longest.
        contents = {t.content for t in added.values() if t.content}
        self._pattern = re.compile(_longest_of(contents)) if contents else None
        self._nonce = secrets.token_hex(8)
        self._lock = threading.Lock()
        self._renamed: tokenizers.Tokenizer | None = None
        self.marks = Marks(self._ids)

    def spelled(self, text: str) -> list[tuple[int, int]]:
        """[begin, end) of each special token that `text` spells."""
        if self._pattern is None:
            return []
        return [m.span() for m in self._pattern.finditer(text) if m[0] in self._ids]

    def encode(
        self, text: str, meant: Sequence[tuple[int, int]], add_special_tokens: bool
    ) -> list[int]:
        """Token ids of `text`, in which the special tokens at `meant` are read as such."""
        if self.spelled(text) == list(meant) and not self._appears(text):
            library = self._library
        else:
            library = self._by_other_names()
            pieces, at = [], 0
            for begin, end in meant:
                pieces += [text[at:begin], self._name(self._ids[text[begin:end]])]
                at = end
            text = "".join([*pieces, text[at:]])
        encodings = library.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        return list(encodings[0].ids)

    def prepare(self) -> None:
        """Make the other tokenizer now: it holds up the interpreter for as long as a load does."""
        self._by_other_names()

    def _appears(self, text: str) -> bool:
        """Whether normalizing makes special tokens of other text (of wide characters, say)."""
        if self._normalizer is None:
            return False
        normalized = self._normalizer.normalize_str(text)
        return len(self.spelled(normalized)) != len(self.spelled(text))

    def _name(self, token_id: int) -> str:
        """No text spells it: the nonce is of this process."""
        return f"{_NO_CHARACTER}{self._nonce}:{token_id}{_NO_CHARACTER}"

    def _by_other_names(self) -> tokenizers.Tokenizer:
        """The same tokenizer with its special tokens renamed; made when it is first needed."""
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
    """A pattern of the longest of these words, as a trie: thousands cost no more than a few."""
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
    """Give tokens of a tokenizer.json other names."""
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
    if "merges" in model:  # text is not to merge into a special token
        pairs = [m if isinstance(m, list) else m.split(" ", 1) for m in model["merges"]]
        model["merges"] = [p for p in pairs if not {*p, "".join(p)} & names.keys()]
