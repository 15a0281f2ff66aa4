"""Chat templates: messages -> prompt text, as the model's authors wrote it down in Jinja.

The template comes with the model and runs sandboxed; the environment and its helpers are those that
such templates are written for (Hugging Face's): trim_blocks, lstrip_blocks, break and continue,
tojson, raise_exception, strftime_now. Special tokens are part of the rendered text, so tokenize it
with add_special_tokens=False.

A template that does not know tools is given a conversation without them: their definitions stand in
the system message, calls in the words of the model's family, and what tools said in turns of the
user.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2 import meta
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from coordinator.request import ChatMessage
from coordinator.tools import HERMES, ToolFormat
from engine.checkpoint.jsonfile import read_json
from engine.errors import CheckpointError, InvalidRequest

_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token")
_TOOL_USE = "tool_use"  # the name of a second template that some models bring


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """A model's templates, compiled; without any, `render` refuses."""

    templates: Mapping[str, jinja2.Template]
    special_tokens: Mapping[str, str]
    knowing_tools: frozenset[str]  # names of the templates that render tools
    text: str  # of all templates

    @classmethod
    def load(cls, folder: Path, *, now: Callable[[], datetime] = datetime.now) -> ChatTemplate:
        """Read `chat_template.jinja`, else `tokenizer_config.json`; neither need exist.

        `now` is the clock behind strftime_now. Raises CheckpointError if a template is not Jinja.
        """
        path = folder / "tokenizer_config.json"
        config = read_json(path) if path.exists() else {}
        environment = _environment(now)
        templates, knowing = {}, set()
        sources = _sources(folder, config)
        for name, source in sources.items():
            try:
                templates[name] = environment.from_string(source)
                if "tools" in meta.find_undeclared_variables(environment.parse(source)):
                    knowing.add(name)
            except jinja2.TemplateError as error:
                raise CheckpointError(f"{folder}: chat template {name!r}: {error}") from None
        text = "\n".join(sources.values())
        return cls(templates, _special_tokens(config), frozenset(knowing), text)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        tool_format: ToolFormat = HERMES,
    ) -> str:
        """The prompt of a conversation. Raises InvalidRequest where the template refuses it.

        `tool_format` is for a template that does not know tools.
        """
        if not self.templates:
            raise InvalidRequest("messages", "this model has no chat template; use Generate")
        name = _TOOL_USE if tools and _TOOL_USE in self.templates else "default"
        if name not in self.templates:
            name = next(iter(self.templates))
        if "developer" not in self.text:  # a role that OpenAI's clients have for system
            messages = [_without_developer(message) for message in messages]
        if name not in self.knowing_tools and (tools or any(map(_is_of_tools, messages))):
            messages, tools = _without_tools(messages, tools, tool_format), None
        render = partial(
            self.templates[name].render,
            tools=list(tools) if tools else None,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **self.special_tokens,
        )
        try:
            try:
                return render(messages=list(messages))
            except TypeError:  # older templates add arguments to strings
                if not any(message.get("tool_calls") for message in messages):
                    raise
                return render(messages=[_with_written_arguments(m) for m in messages])
        except (jinja2.TemplateError, jinja2.exceptions.SecurityError) as error:
            raise InvalidRequest("messages", error.message or "the template failed") from None
        except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
            # Templates add strings and index lists without asking first.
            raise InvalidRequest("messages", f"the chat template failed: {error}") from None


def turns(
    messages: Sequence[ChatMessage], tool_format: ToolFormat = HERMES
) -> list[dict[str, Any]]:
    """Messages as templates take them; arguments of calls are objects, not JSON.

    Ids of calls are those that the family's templates take.
    """
    out: list[dict[str, Any]] = []
    for message in messages:
        turn: dict[str, Any] = {"role": message.role, "content": message.content or ""}
        if message.name:
            turn["name"] = message.name
        answers = message.tool_call_id or message.role == "tool"
        if answers and (call_id := tool_format.call_id(message.tool_call_id)):
            turn["tool_call_id"] = call_id
        if message.tool_calls:
            turn["tool_calls"] = [
                {
                    "id": tool_format.call_id(call.id),
                    "type": "function",
                    "function": {"name": call.name, "arguments": call.arguments},
                }
                for call in message.tool_calls
            ]
        out.append(turn)
    return out


def _without_developer(message: Mapping[str, Any]) -> Mapping[str, Any]:
    return {**message, "role": "system"} if message["role"] == "developer" else message


def _with_written_arguments(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """A message whose calls have their arguments as JSON."""
    calls = [
        {**call, "function": {**call["function"], "arguments": _json(call["function"])}}
        for call in message.get("tool_calls") or ()
    ]
    return {**message, "tool_calls": calls} if calls else message


def _json(function: Mapping[str, Any]) -> str:
    return json.dumps(function["arguments"], ensure_ascii=False)


def _is_of_tools(message: Mapping[str, Any]) -> bool:
    return bool(message.get("tool_calls")) or message.get("role") == "tool"


def _without_tools(
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None,
    form: ToolFormat,
) -> list[Mapping[str, Any]]:
    """The conversation in roles and contents alone."""
    out: list[dict[str, Any]] = []
    previous = ""
    for message in messages:
        role, content = message["role"], message["content"]
        if calls := message.get("tool_calls"):
            functions = [call["function"] for call in calls]
            written = form.write([(f["name"], _json(f)) for f in functions])
            between = "" if not content or content.endswith("\n") else "\n"
            out.append({"role": role, "content": f"{content}{between}{written}"})
        elif role == "tool":
            result = f"<tool_response>\n{content}\n</tool_response>"
            if previous == "tool":
                out[-1]["content"] += "\n" + result
            else:
                out.append({"role": "user", "content": result})
        else:
            out.append(dict(message))
        previous = role
    if tools:
        told = _told(tools, form)
        if out and out[0]["role"] == "system":
            out[0]["content"] = f"{out[0]['content']}\n\n{told}"
        else:
            out.insert(0, {"role": "system", "content": told})
    return list(out)


def _told(tools: Sequence[Mapping[str, Any]], form: ToolFormat) -> str:
    """What a model is told of tools where its template does not tell it."""
    definitions = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    example = form.write([("<name>", "<arguments as a JSON object>")])
    return (
        "You can call functions. Their definitions, in JSON, one a line:\n"
        f"<tools>\n{definitions}\n</tools>\n"
        f"To call one, write nothing but:\n{example}"
    )


def _sources(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Template texts by name; files of their own go before tokenizer_config.json."""
    files = {"default": folder / "chat_template.jinja"}
    extra = folder / "additional_chat_templates"
    files |= {path.stem: path for path in sorted(extra.glob("*.jinja"))}
    try:
        found = {n: path.read_text(encoding="utf-8") for n, path in files.items() if path.exists()}
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{folder}: chat template cannot be read ({error})") from None
    if found:
        return found
    template = config.get("chat_template")
    if isinstance(template, str):
        return {"default": template}
    return {item["name"]: item["template"] for item in template or []}


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Special tokens by role, which old files write as objects."""
    out = {}
    for role in _SPECIAL:
        value = config.get(role)
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, str):
            out[role] = value
    return out


def _environment(now: Callable[[], datetime]) -> ImmutableSandboxedEnvironment:
    def to_json(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        # Jinja's own filter escapes HTML, which models have not been trained on.
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    def raise_exception(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    def strftime_now(form: str) -> str:
        return now().strftime(form)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    return environment
