"""Streaming detokenization: the text of an output, token by token, without partial characters.

The text of an output is decode(prompt + output) without decode(prompt): what a tokenizer does at
the start of a text (SentencePiece removes a space) happens at the start of the prompt only. Text
released after token i depends on the prompt and tokens 0..i only, however they arrive. The state is
a few bytes, so the cost of a push does not depend on the length.

    byte-level     bytes -> incremental UTF-8; a broken sequence becomes U+FFFD when it is detected
    SentencePiece  text is released; a run of byte tokens waits for its end, because one bad byte
                   turns the *whole run* into U+FFFD, one a byte (as in tokenizers' decode)

A prompt may end within a character or a run. Then decode(prompt) ends with U+FFFD (or with the
run's characters), and the output's text begins where decode(prompt + output) differs:

    decode(prompt)            The caf|?          `?` is U+FFFD, the `due` text
    decode(prompt + output)   The caf|é s        text of the output: "é s"
    decode(prompt + output)   The caf|? s        text of the output: " s"
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator, Sequence

from coordinator.text.tokenizer import Piece, Tokenizer
from coordinator.text.values import Logprob, ScoredToken
from engine.base.types import TokenLogprobs

BROKEN = "\ufffd"
_MAX_CHAR_BYTES = 4


class Detokenizer:
    """The text of one output. Owned by the request."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        skip_special_tokens: bool = True,
        shown: Iterable[int] = (),  # special tokens that are not skipped
        prompt: Sequence[int] = (),  # tokens before the output
    ) -> None:
        self._tokenizer = tokenizer
        skipped = tokenizer.special_ids if skip_special_tokens else frozenset[int]()
        self._skipped = skipped
        self._is_byte_level = tokenizer.decoding.byte_level
        self._utf8 = _utf8_decoder()
        self._run = bytearray()  # SentencePiece: the current run of byte tokens
        self._run_utf8 = _utf8_decoder()  # counts the characters of the run
        self._is_first = True  # SentencePiece: no token so far
        self._num_to_strip = tokenizer.decoding.num_stripped
        self.due = ""  # the end of decode(prompt) that the output's first tokens may change
        self._num_released = self._num_run_chars = 0
        self._read_prompt(prompt)
        self._num_released = self._num_run_chars = 0
        self._skipped = skipped.difference(shown)

    def position_of(self, token_id: int) -> int:
        """The offset of this token in the output's text, if it came next, in characters.

        A token that continues a character has that character's offset; one that breaks it follows.
        """
        piece = self._piece(token_id)
        if piece is None or (piece.raw is not None and not self._is_byte_level):
            return self._num_released + self._num_run_chars
        if piece.raw is None:
            before = self._incomplete()
        else:
            begun = self._utf8.getstate()[0]
            before = (begun + piece.raw[:1]).decode("utf-8", "replace")[:-1] if begun else ""
        return self._num_released + len(before) - _num_common(self.due, before)

    @property
    def is_at_start(self) -> bool:
        """Whether the next token may be the first of the whole text, and so lose a space."""
        if self._run:
            decoding = self._tokenizer.decoding
            text = self._text_of_run(bytes(self._run), self._is_first)
            return bool(_strip(text, decoding.stripped, self._num_to_strip)[1])
        return not self._is_byte_level and bool(self._is_first or self._num_to_strip)

    @property
    def stripped_next(self) -> str:
        """The characters that would be removed from the start of the next text."""
        return self._tokenizer.decoding.stripped * self._num_to_strip

    def hides(self, token_id: int) -> bool:
        """Whether this token is never part of the text."""
        return token_id in self._skipped

    def release_due(self) -> str:
        """Return `due` as text of the output, for a prompt that is shown without it."""
        due, self.due = self.due, ""
        self._num_run_chars = len(_utf8_decoder().decode(bytes(self._run)))
        return due

    def peek(self) -> str:
        """The result of `flush` if the output ended here; does not change the state."""
        text = self._incomplete()
        return text[_num_common(self.due, text) :]

    def push(self, ids: Iterable[int]) -> str:
        """The text that these tokens complete; may be empty while a character is incomplete."""
        step = self._push_bytes if self._is_byte_level else self._push_text
        return self._released("".join([step(token_id) for token_id in ids]))

    def flush(self) -> str:
        """The rest at the end of an output; incomplete characters become U+FFFD."""
        if self._is_byte_level:
            return self._released(self._utf8.decode(b"", final=True))
        return self._released(self._stripped(self._end_run()))

    def _piece(self, token_id: int) -> Piece | None:
        return None if token_id in self._skipped else self._tokenizer.piece(token_id)

    def _push_bytes(self, token_id: int) -> str:
        piece = self._piece(token_id)
        if piece is None or piece.raw is None:
            return ""
        return self._utf8.decode(piece.raw)

    def _push_text(self, token_id: int) -> str:
        piece = self._piece(token_id)
        if piece is None:
            return ""
        if piece.raw is not None:
            self._run += piece.raw
            self._num_run_chars += len(self._run_utf8.decode(piece.raw))
            return ""
        if self._run:
            return self._stripped(self._end_run() + piece.text)
        text = piece.first if self._is_first else piece.text
        self._is_first = False
        return self._stripped(text)

    def _end_run(self) -> str:
        """The text of the current run, which ends here."""
        if not self._run:
            return ""
        run, self._run = bytes(self._run), bytearray()
        self._run_utf8.reset()
        self._num_run_chars = 0
        is_first, self._is_first = self._is_first, False
        return self._text_of_run(run, is_first)

    def _text_of_run(self, run: bytes, is_first: bool) -> str:
        try:
            text = run.decode()
        except UnicodeDecodeError:
            return BROKEN * len(run)
        for old, new, new_in_first in self._tokenizer.decoding.then_replaced:
            text = text.replace(old, new_in_first if is_first else new)
        return text

    def _incomplete(self) -> str:
        """The text of the incomplete character or run, as it is so far."""
        decoding = self._tokenizer.decoding
        if self._is_byte_level:
            return self._utf8.getstate()[0].decode("utf-8", "replace")
        text = self._text_of_run(bytes(self._run), self._is_first) if self._run else ""
        return _strip(text, decoding.stripped, self._num_to_strip)[0]

    def _stripped(self, text: str) -> str:
        """`text` without the space that SentencePiece writes before the first word."""
        if not self._num_to_strip:
            return text
        text, self._num_to_strip = _strip(
            text, self._tokenizer.decoding.stripped, self._num_to_strip
        )
        return text

    def _released(self, text: str) -> str:
        """`text` without what decode(prompt) ends with already."""
        if self.due and text:
            common = _num_common(self.due, text)
            self.due = self.due[common:] if common == len(text) else ""
            text = text[common:]
        self._num_released += len(text)
        return text

    def _read_prompt(self, prompt: Sequence[int]) -> None:
        """Read the start and the end of the prompt: tokens in between do not affect the state."""
        begin = 0
        while begin < len(prompt) and (self._run or self.is_at_start):
            self.push(prompt[begin : begin + 1])
            begin += 1
        self.push(reversed(self._tail(prompt, begin)))
        self.due = self._incomplete()

    def _tail(self, prompt: Sequence[int], begin: int) -> list[int]:
        """The last tokens, in reverse, that may belong to an incomplete character or run."""
        tail, num_bytes = [], 0
        for i in range(len(prompt) - 1, begin - 1, -1):
            piece = self._piece(prompt[i])
            if piece is None:
                continue
            if piece.raw is None:
                break
            tail.append(prompt[i])
            num_bytes += len(piece.raw)
            if self._is_byte_level and num_bytes >= _MAX_CHAR_BYTES:
                break
        return tail


def leading_text_of(tokenizer: Tokenizer, prompt: Sequence[int], skip_special_tokens: bool) -> str:
    """What an output writes before its text, because the tokenizer strips it from the start.

    Grammars constrain the text. At the start of a text, " yes" is written "▁▁yes".
    """
    return Detokenizer(tokenizer, skip_special_tokens, prompt=prompt).stripped_next


def scored_token(
    tokenizer: Tokenizer, token_id: int, scores: TokenLogprobs, offset: int, is_at_start: bool
) -> ScoredToken:
    """A token with the texts of it and of the likeliest ones at its place."""

    def entry(token_id: int, logprob: float) -> Logprob:
        text = tokenizer.text_at_start(token_id) if is_at_start else tokenizer.text_of(token_id)
        raw = tokenizer.raw_of(token_id) if BROKEN in text else None
        return Logprob(token_id, logprob, text, raw)

    top = tuple(map(entry, scores.token_ids, scores.logprobs))
    return ScoredToken(entry(token_id, scores.chosen), top, offset)


def scored_prompt(
    tokenizer: Tokenizer,
    ids: Sequence[int],
    scores: Sequence[TokenLogprobs],  # of tokens 1, 2, ...
    text: str,
    skip_special_tokens: bool,
) -> Iterator[ScoredToken]:
    """A prompt's tokens but the first; special tokens may be spelled out in its `text`."""
    stream = Detokenizer(tokenizer, skip_special_tokens)
    num_released, at = 0, 0
    for token_id, of_token in zip(ids, (None, *scores), strict=True):
        if of_token is not None:
            offset = min(at + stream.position_of(token_id) - num_released, len(text))
            yield scored_token(tokenizer, token_id, of_token, offset, stream.is_at_start)
        if skip_special_tokens and token_id in tokenizer.special_ids:
            name = tokenizer.text_of(token_id)
            at += len(name) * text.startswith(name, at)
            continue
        released = stream.push((token_id,))
        num_released += len(released)
        if not text.startswith(released, at):  # some tokenizers add a space after special tokens
            released = released.removeprefix(" ")
        at += len(released)


def _utf8_decoder() -> codecs.IncrementalDecoder:
    return codecs.getincrementaldecoder("utf-8")("replace")


def _num_common(one: str, other: str) -> int:
    """Length of the common prefix."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


def _strip(text: str, char: str, at_most: int) -> tuple[str, int]:
    """(`text` without up to `at_most` leading `char`, how many the next text may lose)."""
    num = 0
    while num < at_most and text[num : num + 1] == char:
        num += 1
    return text[num:], at_most - num if num == len(text) else 0
