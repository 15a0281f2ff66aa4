"""One choice of an output: delivers each part once, over any number of calls.

    tokens, and text with them    the next call gets them as `resume`, and continues after them
    text without a token          is released by the end of the output; each call repeats it
    the end                       the same

Owned by its stream.
"""

from __future__ import annotations

from collections import Counter

from coordinator.client.events import TextDelta
from engine.pb.diptych.v1 import inference_pb2 as pb


class Choice:
    """The state of one choice: what the client's user has received of it."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.token_ids: list[int] = []
        self.finished = False
        self._affinity_token = ""  # names the worker of the last tokens; "": unknown
        self._rest: Counter[str] = Counter()  # characters since the last token, by field
        self._repeated: Counter[str] = Counter()  # of those, what the current call will repeat

    @property
    def begun(self) -> bool:
        """Whether anything of it has been delivered."""
        return bool(self.token_ids or self._rest or self.finished)

    def call_again(self) -> pb.Resume | None:
        """Begin a new call, which repeats text without a token.

        Returns its `resume` entry; None if it needs none.
        """
        self._repeated = self._rest.copy()
        if not self.token_ids and not self.finished:
            return None
        return pb.Resume(
            index=self.index,
            token_ids=self.token_ids,
            finished=self.finished or None,
            affinity_token=self._affinity_token or None,
        )

    def take(self, delta: pb.Delta) -> TextDelta | None:
        """The new part of a message, or None."""
        if self.finished:
            return None
        self._affinity_token = delta.affinity_token or self._affinity_token
        if delta.token_ids:
            self.token_ids += delta.token_ids
            self._rest.clear()
            self._repeated.clear()
            calls = tuple(delta.tool_calls)
            ids, logprobs = tuple(delta.token_ids), tuple(delta.logprobs)
            return TextDelta(delta.text, ids, self.index, logprobs, calls, delta.reasoning)
        text = self._new("text", delta.text)
        calls = tuple(filter(None, map(self._new_piece, delta.tool_calls)))
        reasoning = self._new("reasoning", delta.reasoning)
        if not (text or calls or reasoning):
            return None
        return TextDelta(text, (), self.index, (), calls, reasoning)

    def _new_piece(self, piece: pb.ToolCallDelta) -> pb.ToolCallDelta | None:
        """The new part of a piece of a tool call, or None."""
        fields = {
            name: self._new(f"{piece.index}.{name}", getattr(piece, name))
            for name in ("id", "name", "arguments")
        }
        return pb.ToolCallDelta(index=piece.index, **fields) if any(fields.values()) else None

    def _new(self, field: str, text: str) -> str:
        """`text` without the part of this field that is already delivered."""
        num_known = min(self._repeated[field], len(text))
        self._repeated[field] -= num_known
        text = text[num_known:]
        if text:
            self._rest[field] += len(text)
        return text
