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

from coordinator.text.reasoning_readers import ChannelReader, ReasoningReader, TagReader
from coordinator.text.tokenizer import Tokenizer
from engine.constraints.numbers import json_after

NONE = "none"
_TAIL_TOKENS = 32  # of a prompt, which hold the marker at its end


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
        ReasoningFormat(
            "hunyuan", "<think:opensource>", "</think:opensource>", signs=("</think{}>",)
        ),
        ReasoningFormat(
            "granite",
            dropped=("<response>", "</response>"),
            signs=("</think>", "<response></response>"),
        ),
        THINK,
    )
}
