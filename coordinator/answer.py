"""One answer as its client sees it: text, stops and the end, all functions of the tokens so far.

    token -> stop token? --yes--> STOP, its text is not shown (unless the client wants it)
               |
               '-> detokenizer -> stop strings -> text that may be released -> tool calls?
                                       '-> complete? STOP      max_tokens reached? LENGTH

The token that ends the answer brings all its text: a client that has the token has the text, and
may resume from there. A constrained answer of full length may just have come to its end: whether
that is STOP or LENGTH only the worker can say. Owned by one request.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from coordinator.detokenizer import BROKEN, Detokenizer
from coordinator.request import AnswerRequest, Chunk, Ending, Placement, ToolCallPiece
from coordinator.stops import StopChecker
from coordinator.tokenizer import Tokenizer
from coordinator.tool_parser import ToolCalls, call_id
from engine.types import FinishReason, TokenLogprobs


class Answer:
    """Tokens and text of one answer; `token_ids` ends with the token that ends the answer."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        request: AnswerRequest,
        prompt: Sequence[int] = (),
        *,
        max_tokens: int,
        min_tokens: int,
    ) -> None:
        self.token_ids: list[int] = []
        self.ending: Ending | None = None
        self.max_tokens = max_tokens
        self._index = request.index
        self._is_constrained = request.constraint is not None
        self._stop_token_ids = request.stop_token_ids
        self._include_stop = request.include_stop
        self._min_tokens = min_tokens
        self._calls: ToolCalls | None = None
        markers: tuple[int, ...] = ()
        if request.tools:
            form = request.tools.format
            markers = tuple(form.tokens.values())
            make_id = partial(call_id, f"{request.request_id}/{request.index}", form.id_chars)
            self._calls = ToolCalls(request.tools, make_id)
        self._detokenizer = Detokenizer(tokenizer, request.skip_special_tokens, markers, prompt)
        # An echoed prompt and the answer make one text: decode(prompt + answer). Where the prompt
        # ends within a character, that character is the answer's; a prompt given as text is whole.
        self.broken_prompt_end = ""
        if request.echo and request.text is None and BROKEN in self._detokenizer.due:
            self.broken_prompt_end = self._detokenizer.release_due()
        self._stops = StopChecker(request.stop_strings, request.include_stop, min_tokens)
        # Tokens of an earlier connection count in everything; their text has been delivered.
        self.push(request.resumed)
        self.num_resumed = len(self.token_ids)

    @property
    def num_new(self) -> int:
        """Tokens that this connection has delivered."""
        return len(self.token_ids) - self.num_resumed

    def push(self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs] = ()) -> Chunk:
        """Take the next tokens, with what is known of each; those after the end are dropped."""
        texts, offsets, num_at_start = [], [], 0
        for token_id in token_ids:
            if self.ending is not None:
                break
            offsets.append(self._detokenizer.position)
            num_at_start += self._detokenizer.is_at_start
            texts.append(self._push(token_id))
        text, calls = self._read_calls("".join(texts))
        taken = len(texts)
        placement = Placement(tuple(offsets), num_at_start) if logprobs else Placement()
        return Chunk(
            text,
            tuple(token_ids[:taken]),
            calls,
            tuple(logprobs[:taken]),
            self._index,
            placement,
        )

    def finish(self) -> Chunk:
        """What was held back, where another than the last token ended the answer."""
        text, calls = self._read_calls(self._rest())
        return Chunk(text, (), calls, index=self._index)

    def _read_calls(self, text: str) -> tuple[str, tuple[ToolCallPiece, ...]]:
        """What of the next text is plain, and what are pieces of tool calls."""
        if self._calls is None:
            return text, ()
        parsed = self._calls.push(text)
        rest = self._calls.flush() if self.ending is not None else ""
        return parsed.text + rest, parsed.pieces

    def _push(self, token_id: int) -> str:
        self.token_ids.append(token_id)
        if token_id in self._stop_token_ids and len(self.token_ids) > self._min_tokens:
            self.ending = Ending(FinishReason.STOP, matched_token=token_id)
            return self._rest(self._detokenizer.push([token_id]) if self._include_stop else "")
        text = self._stops.push(self._detokenizer.push([token_id]))
        if self._stops.match is not None:
            self.ending = Ending(FinishReason.STOP, matched_text=self._stops.match.text)
        elif len(self.token_ids) >= self.max_tokens and not self._is_constrained:
            self.ending = Ending(FinishReason.LENGTH)
            text += self._rest()
        return text

    def _rest(self, text: str = "") -> str:
        """What was held back, then `text`, then what the detokenizer still had."""
        return self._stops.flush(text + self._detokenizer.flush())
