"""Streaming detokenization: the text of an answer, token by token, never half a character.

What is released after token i depends on tokens 0..i alone, however they arrive, and all that is
released plus `flush` equals the whole answer's decode. The state is a few bytes, so a push costs
the same at any length.

    byte-level     bytes -> incremental UTF-8; a broken sequence becomes U+FFFD once it is known
    SentencePiece  text passes; a run of byte tokens waits for its end, because one bad byte turns
                   the *whole run* into U+FFFD, one a byte (so does the library's decode)
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable

from coordinator.tokenizer import Tokenizer


class Detokenizer:
    """One answer's text. Owned by the request; not shared."""

    __slots__ = ("_run", "_skipped", "_strip", "_tokenizer", "_utf8")

    def __init__(
        self,
        tokenizer: Tokenizer,
        skip_special_tokens: bool = True,
        shown: Iterable[int] = (),  # special tokens that are not skipped
    ) -> None:
        self._tokenizer = tokenizer
        skipped = tokenizer.special_ids if skip_special_tokens else frozenset[int]()
        self._skipped = skipped.difference(shown)
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._run = bytearray()  # SentencePiece: byte tokens whose run has not ended
        self._strip = tokenizer.decoding.strip_first_space

    def push(self, ids: Iterable[int]) -> str:
        """Text that these tokens made final; may be empty while a character is incomplete."""
        step = self._push_bytes if self._tokenizer.decoding.byte_level else self._push_text
        return "".join([step(token_id) for token_id in ids])

    def flush(self) -> str:
        """The rest at the end of an answer: whatever was incomplete, as U+FFFD."""
        if self._tokenizer.decoding.byte_level:
            return self._utf8.decode(b"", final=True)
        return self._stripped(self._end_run())

    def _push_bytes(self, token_id: int) -> str:
        piece = None if token_id in self._skipped else self._tokenizer.piece(token_id)
        if piece is None or piece.raw is None:
            return ""
        return self._utf8.decode(piece.raw)

    def _push_text(self, token_id: int) -> str:
        piece = None if token_id in self._skipped else self._tokenizer.piece(token_id)
        if piece is None:
            return ""
        if piece.raw is not None:
            self._run += piece.raw
            return ""
        return self._stripped(self._end_run() + piece.text)

    def _end_run(self) -> str:
        """The text of the byte tokens that were waiting."""
        run, self._run = bytes(self._run), bytearray()
        try:
            return run.decode()
        except UnicodeDecodeError:
            return "\ufffd" * len(run)

    def _stripped(self, text: str) -> str:
        """Without the space that SentencePiece writes before the first word of a text."""
        if self._strip and text:
            self._strip = False
            return text.removeprefix(" ")
        return text
