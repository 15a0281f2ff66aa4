"""The served model of a coordinator: its name, vocabulary, tokenizer and chat template.

Tokenizing runs on threads, because a prompt of megabytes takes seconds.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from coordinator.text.chat_prompt import chat_prompt
from coordinator.text.chat_template import ChatTemplate, Messages, template_messages
from coordinator.text.reasoning import NONE, REASONING, ReasoningFormat, detect_reasoning
from coordinator.text.tokenizer import Tokenizer
from coordinator.text.tools.detection import Detected, detect
from coordinator.text.tools.format import AUTO, Tool, ToolFormat
from coordinator.text.tools.forms import FORMATS, NO_FORMAT
from coordinator.text.tools.json_forms import HERMES
from coordinator.text.values import Message
from engine.base.errors import InvalidRequest
from engine.checkpoint.fingerprint import tokenizer_digest
from engine.checkpoint.generation_config import (
    NO_SAMPLING,
    SamplingDefaults,
    read_sampling,
)
from engine.checkpoint.source import Checkpoint
from engine.constraints import Checker, Vocabulary
from engine.models.config import ModelConfig
from engine.telemetry.log import get_logger

_log = get_logger(__name__)

_NUM_THREADS = 4


@dataclass(frozen=True, slots=True)
class Limits:
    """The properties of a model that requests are checked against."""

    model: str
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    max_model_len: int  # prompt plus output, in tokens
    tool_format: ToolFormat = HERMES  # how the model writes calls
    reasoning: ReasoningFormat | None = None  # how it marks reasoning
    sampling: SamplingDefaults = NO_SAMPLING  # where a request is silent


@dataclass(eq=False)
class ServedModel:
    """One model. `max_model_len` 0: the checkpoint's context length."""

    name: str
    config: ModelConfig
    tokenizer: Tokenizer
    template: ChatTemplate
    max_model_len: int = 0
    tool_format: str = AUTO
    folder: Path | None = None  # of the checkpoint
    parse_special: str = "prompts"
    tokenizer_digest: str = ""
    reasoning_parser: str = AUTO
    sampling: SamplingDefaults = NO_SAMPLING

    def __post_init__(self) -> None:
        config, folder = self.config, self.folder
        self.max_model_len = self.max_model_len or config.context
        detected = self._detected()
        self._writes_calls = detected.writes_calls
        self.limits = Limits(
            self.name,
            config.vocab_size,
            config.eos_token_ids,
            self.max_model_len,
            detected.form.bound(self.tokenizer),
            self._reasoning(detected.form),
            self.sampling,
        )
        vocabulary = Vocabulary(folder, config.vocab_size, config.eos_token_ids) if folder else None
        self.checker = Checker(vocabulary) if vocabulary else None  # of constraints
        self._threads = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="tokenizer")

    def _reasoning(self, form: ToolFormat) -> ReasoningFormat | None:
        """The form of --reasoning-parser, or that of the template and the vocabulary."""
        option = self.reasoning_parser
        if option == NONE:
            return None
        if option != AUTO:
            found: ReasoningFormat | None = REASONING[option]
        else:
            vocabulary = self.tokenizer.library.get_vocab(with_added_tokens=True)
            source = self.template.text
            found = REASONING.get(form.name) if form.text_begin else None
            found = found or detect_reasoning(source, vocabulary) if source else found
        if found is not None:
            _log.info("form of reasoning", name=found.name)
        return found.bound(self.tokenizer) if found else None

    def _detected(self) -> Detected:
        """The form of tool calls: that of --tool-format, or the template's."""
        template, option = self.template, self.tool_format
        found = Detected(HERMES, "prompt")
        if template.templates:
            text, shows_tools = template.text, template.shows_tools
            found = detect(template.probe, text, shows_tools=shows_tools)
        if option != AUTO:
            return replace(found, form=FORMATS.get(option, NO_FORMAT), evidence="--tool-format")
        if found.form.is_unknown:
            _log.warning(
                "the form of this model's tool calls is not known; answers beside tools are text",
                option="--tool-format",
            )
        else:
            _log.info("form of tool calls", name=found.form.name, evidence=found.evidence)
        return found

    @classmethod
    def load(
        cls,
        checkpoint: Checkpoint,
        name: str,
        max_model_len: int,
        tool_format: str = AUTO,
        parse_special: str = "prompts",
        reasoning_parser: str = AUTO,
        generation_config: str = "model",
    ) -> ServedModel:
        """Read tokenizer and template of a checkpoint. Raises CheckpointError."""
        sampling = NO_SAMPLING
        if generation_config == "model":
            sampling = read_sampling(checkpoint.folder)
            if values := sampling.values():
                _log.info("sampling of generation_config.json is the default", **values)
        return cls(
            name,
            checkpoint.config,
            Tokenizer.load(checkpoint.folder),
            ChatTemplate.load(checkpoint.folder),
            max_model_len,
            tool_format,
            checkpoint.folder,
            parse_special,
            tokenizer_digest(checkpoint.folder),
            reasoning_parser,
            sampling,
        )

    def prepare(self) -> None:
        """Start slow initializations on threads, so that the first requests need not wait."""
        self._threads.submit(self.tokenizer.special.prepare)
        if self.checker is not None:
            self.checker.prepare()

    async def encode(
        self, field: str, text: str, add_special_tokens: bool, max_model_len: int
    ) -> list[int]:
        """Token ids of `text`. Raises InvalidRequest before tokenizing if it can never fit."""
        self._check_length(field, max_model_len, text)
        special_spans: list[tuple[int, int]] | None = [] if self.parse_special == "none" else None
        encode = partial(self.tokenizer.encode, text, add_special_tokens, special_spans)
        return await asyncio.get_running_loop().run_in_executor(self._threads, encode)

    def _check_length(self, field: str, max_model_len: int, text: str) -> None:
        if (minimum := self.tokenizer.min_num_tokens(text)) > max_model_len:
            raise InvalidRequest(
                field,
                f"{len(text)} characters are at least {minimum} tokens, above a context of"
                f" {max_model_len}",
            )

    async def encode_chat(
        self,
        messages: Sequence[Message],
        max_model_len: int,
        tools: Sequence[Tool] = (),
        add_generation_prompt: bool = True,
        field: str = "messages",
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Token ids of a conversation, by default with the start of the assistant's next message.

        Text of the client that looks like a special token is text, unless --parse-special is all.
        Raises InvalidRequest that names `field`.
        """
        form = self.limits.tool_format

        def render(messages: Messages, tools: Messages, kwargs: Mapping[str, Any]) -> str:
            ask = add_generation_prompt
            writes = self._writes_calls
            return self.template.render(messages, tools, ask, form, writes, kwargs)

        def encode() -> list[int]:
            prompt = chat_prompt(
                render,
                self.tokenizer.special,
                template_messages(messages, form),
                [tool.definition for tool in tools],
                partial(self._check_length, field, max_model_len),
                parse_all=self.parse_special == "all",
                kwargs=template_kwargs,
            )
            return self.tokenizer.encode(prompt.text, False, prompt.special_spans)

        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, encode)
        except InvalidRequest as error:
            raise InvalidRequest(field, error.description) from None

    async def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        """The text of `ids`."""
        loop = asyncio.get_running_loop()
        decode = self.tokenizer.decode
        return await loop.run_in_executor(self._threads, decode, ids, skip_special_tokens)

    def close(self) -> None:
        """End the threads; pending work is dropped."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        if self.checker is not None:
            self.checker.close()
