"""One answer as its client sees it: text, stops and the end, all functions of the tokens so far.

    token -> stop token? --yes--> STOP, its text is not shown (unless the client wants it)
               |
               '-> detokenizer -> stop strings -> text that may be released
                                       '-> complete? STOP      max_tokens reached? LENGTH

The token that ends the answer brings all its text: a client that has the token has the text, and
may resume from there. Owned by one request.
"""

from __future__ import annotations

from coordinator.detokenizer import Detokenizer
from coordinator.request import AnswerRequest, Chunk, Ending
from coordinator.stops import StopChecker
from coordinator.tokenizer import Tokenizer
from engine.types import FinishReason


class Answer:
    """Tokens and text of one answer; `token_ids` ends with the token that ends the answer."""

    def __init__(
        self, tokenizer: Tokenizer, request: AnswerRequest, *, max_tokens: int, min_tokens: int
    ) -> None:
        self.token_ids: list[int] = []
        self.ending: Ending | None = None
        self.max_tokens = max_tokens
        self._stop_token_ids = request.stop_token_ids
        self._include_stop = request.include_stop
        self._min_tokens = min_tokens
        self._detokenizer = Detokenizer(tokenizer, request.skip_special_tokens)
        self._stops = StopChecker(request.stop_strings, request.include_stop, min_tokens)
        # Tokens of an earlier connection count in everything; their text has been delivered.
        self.push(request.resumed)
        self.num_resumed = len(self.token_ids)

    @property
    def num_new(self) -> int:
        """Tokens that this connection has delivered."""
        return len(self.token_ids) - self.num_resumed

    def push(self, token_ids: tuple[int, ...] | list[int]) -> Chunk:
        """Take the next tokens; those after the end are dropped."""
        texts, taken = [], 0
        for token_id in token_ids:
            if self.ending is not None:
                break
            taken += 1
            texts.append(self._push(token_id))
        return Chunk("".join(texts), tuple(token_ids[:taken]))

    def finish(self) -> str:
        """The text that was held back, where another than the last token ended the answer."""
        return self._rest()

    def _push(self, token_id: int) -> str:
        self.token_ids.append(token_id)
        if token_id in self._stop_token_ids and len(self.token_ids) > self._min_tokens:
            self.ending = Ending(FinishReason.STOP, matched_token=token_id)
            return self._rest(self._detokenizer.push([token_id]) if self._include_stop else "")
        text = self._stops.push(self._detokenizer.push([token_id]))
        if self._stops.match is not None:
            self.ending = Ending(FinishReason.STOP, matched_text=self._stops.match.text)
        elif len(self.token_ids) >= self.max_tokens:
            self.ending = Ending(FinishReason.LENGTH)
            text += self._rest()
        return text

    def _rest(self, text: str = "") -> str:
        """What was held back, then `text`, then what the detokenizer still had."""
        return self._stops.flush(text + self._detokenizer.flush())
