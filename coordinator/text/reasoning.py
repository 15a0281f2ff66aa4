"""Separates the reasoning of an output from its content.

    tags      <think> reasoning </think> content; the prompt may have opened or closed the tag
    channels  <|channel|>analysis<|message|> reasoning <|end|><|start|>assistant
              <|channel|>final<|message|> content

A reader gets the text of an output in pieces of any size and releases the same texts for all of
them: what may be a marker is held. White space around reasoning belongs to neither part. Owned by
one output.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from coordinator.text.tokenizer import Tokenizer
from engine.constraints.numbers import json_after

NONE = "none"
_TAIL_TOKENS = 32  # of a prompt, which hold the marker at its end
_MAX_HEADER = 256  # characters of a message's header


@dataclass(frozen=True, slots=True)
class Split:
    """Text that one push released."""

    reasoning: str = ""
    content: str = ""


@dataclass(frozen=True, slots=True)
class ReasoningFormat:
    """How a family of models marks its reasoning; with `channel`, messages have headers."""

    name: str
    begin: str = "<think>"
    end: str = "</think>"
    between: str = ""  # after the reasoning, before content or calls
    content_begin: str = ""  # before content, in models that mark it
    content_end: str = ""
    dropped: tuple[str, ...] = ()  # markers of content without a meaning for clients
    signs: tuple[str, ...] = ()  # all stand in the source of the family's templates
    is_channels: bool = False
    # The markers that are single tokens in the model's vocabulary.
    tokens: Mapping[str, int] = field(default_factory=dict)

    def bound(self, tokenizer: Tokenizer) -> ReasoningFormat:
        """The format with the tokens of its markers in a vocabulary."""
        added = tokenizer.library.get_added_tokens_decoder()
        parts = (self.begin, self.end, self.between, self.content_begin, self.content_end)
        sample = "".join((*parts, *self.dropped))
        found = {
            token.content: token_id
            for token_id, token in added.items()
            if token.content in sample and len(token.content) > 2 and token.content[0] in "<["
        }
        longest_first = sorted(found, key=len, reverse=True)
        return replace(self, tokens={name: found[name] for name in longest_first})

    def prologue(self, is_open: bool | None, *, has_calls: bool) -> str:
        """A grammar of what stands before constrained text, which is @text; "": nothing does.

        `is_open`: see is_open(). Grammars of tool calls begin content themselves.
        """
        begin, end, between = map(self._lark, (self.begin, self.end, self.between))
        content = "" if has_calls else self._lark(self.content_begin)
        if is_open is False and not content:
            return ""
        spelled = f"/(?s:.*){_regex(self.end.strip())}(?s:.*)/"
        rules = [r"SPACE: /[ \t\r\n]{1,8}/"]
        if end.startswith("<["):
            thinks = f"THOUGHT? {end}"
            rules.append(f"THOUGHT: /(?s:.+)/ & ~{spelled}")
        else:
            thinks = "thought"
            rules.append(f"thought[lazy]: /(?s:.*)/ {end}")
        space = "" if self.is_channels else "SPACE?"
        if is_open is None:
            start = f"({begin} {thinks} {between} {space})?"
        else:
            start = f"{thinks} {between} {space}" if is_open else ""
        header = json_after(self.end.strip()) if is_open else ""
        return header + "\n".join([f"start: {start} {content} @text", *rules]) + "\n"

    def _lark(self, literal: str) -> str:
        """A literal in Lark, with tokens for markers."""
        text = literal.strip("\n") if not self.is_channels else literal
        parts = re.split(f"({'|'.join(map(re.escape, self.tokens))})", text)
        parts = parts if self.tokens else [text]
        return " ".join(
            f"<[{self.tokens[part]}]>" if part in self.tokens else json.dumps(part)
            for part in parts
            if part
        )

    def is_open(self, prompt_end: str) -> bool | None:
        """Whether a prompt has opened the reasoning; None: it has not, and has not closed it."""
        text = prompt_end.rstrip()
        if text.endswith(self.begin.rstrip()):
            return True
        return False if text.endswith(self.end.rstrip()) else None

    def reader(self, is_open: bool | None) -> ReasoningReader:
        """A reader for one output, behind a prompt of this state."""
        if self.is_channels:
            return ChannelReader(self)
        return TagReader(self, is_open)


class ReasoningReader(Protocol):
    """Splits the text of one output."""

    @property
    def is_reasoning(self) -> bool:
        """Whether the next text is reasoning, or may become it."""

    def push(self, text: str) -> Split:
        """Read the next text."""

    def flush(self) -> Split:
        """End the output: held text is released."""


def prompt_end(tokenizer: Tokenizer, prompt: Sequence[int]) -> str:
    """The last text of a prompt, special tokens included."""
    return tokenizer.decode(prompt[-_TAIL_TOKENS:], skip_special_tokens=False)


def _regex(text: str) -> str:
    """A regular expression of Lark that matches `text`."""
    return re.escape(text).replace("/", "\\/")


def detect_reasoning(source: str, vocabulary: Collection[str]) -> ReasoningFormat | None:
    """The form of the model with this template, or with <think> in its vocabulary."""
    for form in REASONING.values():
        if all(sign in source for sign in form.signs):
            return form
    known = THINK.begin in vocabulary and THINK.end in vocabulary
    return THINK if known else None


def overlap(text: str, markers: Sequence[str]) -> int:
    """Length of the longest suffix of `text` that is a proper prefix of one of the markers."""
    longest = max(map(len, markers), default=1) - 1
    for size in range(min(len(text), longest), 0, -1):
        if any(len(m) > size and m.startswith(text[-size:]) for m in markers):
            return size
    return 0


class TagReader:
    """Reasoning between two tags, at the start of an output."""

    def __init__(self, form: ReasoningFormat, is_open: bool | None) -> None:
        self._form = form
        self._begin, self._end = form.begin.strip(), form.end.strip()
        self._state = {True: "reasoning", False: "content", None: "start"}[is_open]
        self._held = ""
        self._skips_space = is_open is not False  # before the next released character

    @property
    def is_reasoning(self) -> bool:
        """See ReasoningReader."""
        return self._state == "reasoning" or (self._state == "start" and bool(self._held.strip()))

    def push(self, text: str) -> Split:
        """See ReasoningReader."""
        self._held += text
        reasoning, content = "", ""
        if self._state == "start":
            self._read_start()
        if self._state == "reasoning":
            reasoning = self._read_reasoning()
        if self._state == "content":
            content = self._read_content()
        return Split(reasoning, content)

    def flush(self) -> Split:
        """See ReasoningReader."""
        held, self._held = self._held, ""
        if self._state == "reasoning":
            return Split(reasoning=held.rstrip())
        return Split(content=held)

    def _read_start(self) -> None:
        begun = self._held.lstrip()
        if begun.startswith(self._begin):
            self._held, self._state = begun[len(self._begin) :], "reasoning"
        elif begun and not self._begin.startswith(begun):
            self._state, self._skips_space = "content", False

    def _read_reasoning(self) -> str:
        if self._skips_space:
            self._held = self._held.lstrip()
            self._skips_space = not self._held
        before, found, after = self._held.partition(self._end)
        if found:
            self._held, self._state, self._skips_space = after, "content", True
            return before.rstrip()
        # White space waits: it is dropped at the end.
        num_held = overlap(before, (self._end,))
        kept = before[: len(before) - num_held].rstrip()
        self._held = before[len(kept) :]
        return kept

    def _read_content(self) -> str:
        text = self._held
        for marker in self._form.dropped:
            text = text.replace(marker, "")
        num_held = overlap(text, self._form.dropped)
        if self._skips_space:
            text = text.lstrip()
            num_held = min(num_held, len(text))
            self._skips_space = not text
        released = text[: len(text) - num_held]
        self._held = text[len(released) :]
        return released


_CALL_HEADER = "<|channel|>commentary to={} <|constrain|>json<|message|>"


class ChannelReader:
    """Messages with headers: <|start|>assistant<|channel|>analysis<|message|>...<|end|>.

    The headers of calls are passed on, all in one form, for the parser of tool calls.
    """

    def __init__(self, form: ReasoningFormat) -> None:
        self._form = form
        self._ends = (form.end, "<|start|>")
        self._state = "header"
        self._is_first = True
        self._kind = "content"
        self._held = ""

    @property
    def is_reasoning(self) -> bool:
        """See ReasoningReader."""
        if self._state == "header":
            return bool(self._held)
        return self._kind == "reasoning"

    def push(self, text: str) -> Split:
        """See ReasoningReader."""
        self._held += text
        parts: dict[str, list[str]] = {"reasoning": [], "content": []}
        while self._read(parts):
            pass
        return Split("".join(parts["reasoning"]), "".join(parts["content"]))

    def flush(self) -> Split:
        """See ReasoningReader."""
        held, self._held = self._held, ""
        if self._state == "header":
            held = ""
        return Split(held, "") if self._kind == "reasoning" else Split("", held)

    def _read(self, parts: dict[str, list[str]]) -> bool:
        """One header or one message; False: more text is needed."""
        if self._state == "header":
            return self._read_header(parts)
        found = [(self._held.find(end), end) for end in self._ends if end in self._held]
        if found:
            at, end = min(found)
            parts[self._kind].append(self._held[:at])
            self._held = self._held[at + len(end) :]
            self._state, self._is_first = "header", False
            return True
        num_held = overlap(self._held, self._ends)
        released = self._held[: len(self._held) - num_held]
        parts[self._kind].append(released)
        self._held = self._held[len(released) :]
        return False

    def _read_header(self, parts: dict[str, list[str]]) -> bool:
        header, found, after = self._held.partition("<|message|>")
        if not found:
            if self._is_first and not self._may_be_header(header):
                self._state, self._kind = "message", "content"
                return True
            self._held = header[-_MAX_HEADER:]
            return False
        self._held, self._state = after, "message"
        self._kind, call = self._kind_of(header)
        parts["content"].append(call)
        return True

    def _may_be_header(self, text: str) -> bool:
        """Whether an output that begins so begins with a header."""
        begins = ("<|channel|>", " to=", "<|start|>assistant", "<|message|>")
        return any(text.startswith(b) or b.startswith(text) for b in begins)

    def _kind_of(self, header: str) -> tuple[str, str]:
        """The part that a message belongs to, and the header of a call as parsers read it."""
        words = header.replace("<|", " <|").replace("|>", "|> ").split()
        recipient = next((word[3:] for word in words if word.startswith("to=")), "")
        if self._form.name == "muse":
            return ("reasoning" if recipient == "self" else "content"), ""
        if recipient.startswith("functions."):
            return "content", _CALL_HEADER.format(recipient)
        return ("reasoning" if "analysis" in words else "content"), ""


def _think(name: str, tag: str, **fields: object) -> ReasoningFormat:
    begin, end = f"<{tag}>", f"</{tag}>"
    return ReasoningFormat(name, begin, end, signs=(end,), **fields)  # type: ignore[arg-type]


THINK = _think("think", "think")
# Those that look alike stand with the more special one first.
REASONING = {
    form.name: form
    for form in (
        ReasoningFormat(
            "harmony",
            "<|channel|>analysis<|message|>",
            "<|end|>",
            between="<|start|>assistant",
            content_begin="<|channel|>final<|message|>",
            dropped=("<|constrain|>",),
            signs=("<|channel|>analysis<|message|>",),
            is_channels=True,
        ),
        ReasoningFormat(
            "muse",
            " to=self<|message|>",
            "<|eom|>",
            between="<|start|>assistant",
            content_begin=" to=user<|message|>",
            signs=("to=self<|message|>",),
            is_channels=True,
        ),
        ReasoningFormat(
            "kimi_k3",
            "<|open|>think<|sep|>",
            "<|close|>think<|sep|>",
            content_begin="<|open|>response<|sep|>",
            content_end="<|close|>response<|sep|>",
            dropped=("<|open|>response<|sep|>", "<|close|>response<|sep|>"),
            signs=("<|open|>", "<|close|>"),
        ),
        ReasoningFormat(
            "solar",
            "<|think|>",
            "<|end|>",
            between="<|begin|>assistant",
            content_begin="<|content|>",
            dropped=("<|begin|>assistant", "<|content|>"),
            signs=("<|begin|>assistant<|think|>",),
        ),
        ReasoningFormat("mistral", "[THINK]", "[/THINK]", signs=("[/THINK]",)),
        ReasoningFormat(
            "command_r", "<|START_THINKING|>", "<|END_THINKING|>", signs=("<|END_THINKING|>",)
        ),
        ReasoningFormat(
            "apertus", "<|inner_prefix|>", "<|inner_suffix|>", signs=("<|inner_suffix|>",)
        ),
        ReasoningFormat("gemma4", "<|channel>thought", "<channel|>", signs=("<channel|>",)),
        ReasoningFormat(
            "apriel",
            "Here are my reasoning steps:",
            "[BEGIN FINAL RESPONSE]",
            dropped=("[END FINAL RESPONSE]",),
            signs=("[BEGIN FINAL RESPONSE]",),
        ),
        _think("seed_oss", "seed:think"),
        _think("minimax_m3", "mm:think"),
        _think("hunyuan", "think:opensource"),
        ReasoningFormat(
            "granite",
            dropped=("<response>", "</response>"),
            signs=("</think>", "<response></response>"),
        ),
        THINK,
    )
}
