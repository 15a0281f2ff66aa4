"""One output as its client sees it: text, stops and the end, all functions of the tokens so far.

    token -> stop token? --yes--> STOP, its text is not shown (unless the client wants it)
               |
               '-> detokenizer -> reasoning -> tool calls -> content -> stop strings -> text
                                                    |                       '-> complete? STOP
                                                    '-> calls               max_tokens? LENGTH

Stop strings, and stop tokens that the client named, act on content. A part of a tool call, or what
may become one, is no content. A special token ends an output also where a stop string spells it and
no text shows it. The token that ends the output brings all of its text: a client that has the token
has the text, and may resume from there. A constrained output of full length may just have come to
its end: only the worker knows whether that is STOP or LENGTH. Owned by one request.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, field
from functools import partial

from coordinator.generation.events import Delta, Ending
from coordinator.generation.request import GenerationRequest
from coordinator.text.detokenizer import BROKEN, Detokenizer, scored_token
from coordinator.text.reasoning import prompt_end
from coordinator.text.reasoning_readers import ReasoningReader
from coordinator.text.stops import StopChecker, StopSet
from coordinator.text.tokenizer import Tokenizer
from coordinator.text.tools.parser import ToolCalls, call_id
from coordinator.text.values import ScoredToken, ToolCallPiece
from engine.base.types import FinishReason, TokenLogprobs

_PIECE_TOKENS = 64  # a millisecond of work


@dataclass(eq=False)
class Output:
    """Tokens and text of one output; `token_ids` ends with the token that ends the output.

    `catch_up` takes what the request resumes.
    """

    tokenizer: Tokenizer
    request: GenerationRequest
    prompt: Sequence[int] = ()
    _: KW_ONLY
    max_tokens: int
    min_tokens: int
    stops: StopSet | None = None  # those of the request; None: they are made here
    token_ids: list[int] = field(default_factory=list)
    ending: Ending | None = None
    num_resumed: int = 0
    # An echoed prompt and the output make one text: decode(prompt + output). Where the prompt ends
    # within a character, that character belongs to the output. A prompt given as text is whole.
    broken_prompt_end: str = ""
    num_reasoning: int = 0  # tokens of reasoning
    _reasoning: ReasoningReader | None = None
    _thoughts: list[str] = field(default_factory=list)  # reasoning since the last time
    _calls: ToolCalls | None = None
    _ended_calls: list[ToolCallPiece] = field(default_factory=list)

    def __post_init__(self) -> None:
        request, tokenizer = self.request, self.tokenizer
        markers: tuple[int, ...] = ()
        if request.tools and request.tools.callable:
            form = request.tools.format
            markers = tuple(form.tokens.values())
            make_id = partial(call_id, f"{request.request_id}/{request.index}", form)
            self._calls = ToolCalls(request.tools, make_id)
        if (reasoning := request.reasoning) is not None:
            markers += tuple(reasoning.tokens.values())
            is_open = reasoning.is_open(prompt_end(tokenizer, self.prompt))
            self._reasoning = reasoning.reader(is_open)
        skips = request.skip_special_tokens
        self._detokenizer = Detokenizer(tokenizer, skips, markers, self.prompt)
        if request.echo and request.text is None and BROKEN in self._detokenizer.due:
            self.broken_prompt_end = self._detokenizer.release_due()
        names = tokenizer.special_names if request.stop_strings else ()
        stops = self.stops or StopSet(request.stop_strings, names)
        self._checker = StopChecker(stops, request.include_stop, self.min_tokens)

    def catch_up(self) -> Iterator[bool]:
        """Take the tokens of an earlier connection, one piece a step, before all others.

        They count in everything; their text was delivered then.
        """
        resumed = self.request.resume.token_ids
        for start in range(0, len(resumed), _PIECE_TOKENS):
            self.push(resumed[start : start + _PIECE_TOKENS])
            self.num_resumed = len(self.token_ids)
            yield True

    @property
    def num_new(self) -> int:
        """Tokens that this connection has delivered."""
        return len(self.token_ids) - self.num_resumed

    def push(self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs] = ()) -> Delta:
        """Take the next tokens, each with its log-probabilities; drops those after the end."""
        texts: list[str] = []
        scored: list[ScoredToken] = []
        for i, token_id in enumerate(token_ids):
            if self.ending is not None:
                break
            if logprobs:
                stream = self._detokenizer
                offset, is_at_start = stream.position_of(token_id), stream.is_at_start
                scored.append(
                    scored_token(self.tokenizer, token_id, logprobs[i], offset, is_at_start)
                )
            texts.append(self._push(token_id))
        ids = tuple(token_ids[: len(texts)])
        return self._delta("".join(texts), ids, scored)

    def finish(self) -> Delta:
        """What was held back, where something else than the last token ended the output."""
        return self._delta(self._rest())

    def _delta(
        self, text: str, ids: tuple[int, ...] = (), scored: Sequence[ScoredToken] = ()
    ) -> Delta:
        reasoning, self._thoughts = "".join(self._thoughts), []
        return Delta(self.request.index, text, ids, scored, self._take_calls(), reasoning)

    def _take_calls(self) -> tuple[ToolCallPiece, ...]:
        """Calls that have ended since the last time."""
        calls, self._ended_calls = tuple(self._ended_calls), []
        return calls

    @property
    def ended_here(self) -> bool:
        """Whether it has ended by something that the worker does not know."""
        ending = self.ending
        return ending is not None and (
            ending.matched_text is not None or ending.matched_token in self.request.content_stop_ids
        )

    def _push(self, token_id: int) -> str:
        """Text that a token releases; it may end the output."""
        self.token_ids.append(token_id)
        was_reasoning = self._is_reasoning
        text = self._read(token_id)
        self.num_reasoning += was_reasoning or self._is_reasoning
        return text

    @property
    def _is_reasoning(self) -> bool:
        return self._reasoning is not None and self._reasoning.is_reasoning

    def _read(self, token_id: int) -> str:
        if self._is_stop_token(token_id):
            self.ending = Ending(FinishReason.STOP, matched_token=token_id)
            return self._end_at(token_id)
        name, shown = (
            self._special(token_id) if token_id in self.tokenizer.special_ids else ("", "")
        )
        if name and not shown:
            text = self._push_hidden(name)
        elif self._calls or self._reasoning:  # a special token that is shown is a marker
            text = self._checker.push(self._content(self._detokenizer.push((token_id,))))
        else:
            text = self._detokenizer.push((token_id,)).removesuffix(shown)
            text = self._checker.push(text, name, shown)
        self._stop_if_matched()
        if (
            len(self.token_ids) >= self.max_tokens
            and self.ending is None
            and self.request.constraint is None
        ):
            self.ending = Ending(FinishReason.LENGTH)
            text += self._rest()
        return text

    def _content(self, text: str) -> str:
        """The part of the next text that belongs to no call, and is no reasoning."""
        if self._reasoning is not None:
            split = self._reasoning.push(text)
            self._thoughts.append(split.reasoning)
            text = split.content
        return self._without_calls(text)

    def _without_calls(self, text: str) -> str:
        if self._calls is None:
            return text
        parsed = self._calls.push(text)
        self._ended_calls += parsed.pieces
        return parsed.text

    def _is_stop_token(self, token_id: int) -> bool:
        if len(self.token_ids) <= self.min_tokens:
            return False
        if token_id in self.request.stop_token_ids:
            return True
        is_named = token_id in self.request.content_stop_ids
        return is_named and (
            self._calls is None or self._calls.is_content(self.tokenizer.text_of(token_id))
        )

    def _special(self, token_id: int) -> tuple[str, str]:
        """A special token's name, and the text that is shown of it."""
        name = self.tokenizer.special_name(token_id)
        hidden = not name or self._detokenizer.hides(token_id)
        return name, "" if hidden else self.tokenizer.text_of(token_id)

    def _push_hidden(self, name: str) -> str:
        """Text that may be released after a special token that no text shows.

        Only a stop string acts on it; all text that is still held stands before it then.
        """
        is_inside = self._is_reasoning or (self._calls and self._calls.is_in_call)
        if not self._checker.names(name) or is_inside:
            return self._checker.push("")
        before = self._calls.held_text if self._calls else ""
        before += self._detokenizer.peek()
        if not before:
            return self._checker.push("", name)
        trial = self._checker.fork()
        text = trial.push(before, name)
        if trial.match is None:  # the output goes on, and the text stays held
            return self._checker.push("", name)
        self._checker = trial
        return text

    def _end_at(self, token_id: int) -> str:
        """The rest of an output that a stop token ends; its own text is seldom asked for."""
        text = self._detokenizer.push((token_id,)) if self.request.include_stop else ""
        text += self._detokenizer.flush()
        name, shown = self._special(token_id)
        shown = shown if self.request.include_stop else ""
        content = self._last_content(text.removesuffix(shown), is_cut=False)
        text = self._checker.push(content, name, shown) + self._checker.flush()
        self._stop_if_matched()
        return text

    def _rest(self) -> str:
        """What was held back of an output that ends behind its last token."""
        if self._checker.match is not None:
            return ""
        is_cut = self.ending is not None and self.ending.reason is FinishReason.LENGTH
        content = self._last_content(self._detokenizer.flush(), is_cut=is_cut)
        text = self._checker.flush(content)
        self._stop_if_matched()
        return text

    def _last_content(self, text: str, is_cut: bool) -> str:
        """The content of the last text; what waited for the end of the output is decided."""
        content = self._content(text)
        if self._reasoning is not None:
            split = self._reasoning.flush()
            self._thoughts.append(split.reasoning)
            content += self._without_calls(split.content)
        if self._calls is not None:
            rest = self._calls.flush(is_cut)
            self._ended_calls += rest.pieces
            content += rest.text
        return content

    def _stop_if_matched(self) -> None:
        if self._checker.match is not None:
            self.ending = Ending(FinishReason.STOP, matched_text=self._checker.match.text)
