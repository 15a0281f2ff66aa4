"""Chat templates: messages -> prompt text, as the model's authors wrote it down in Jinja.

The template comes with the model and runs sandboxed (template_environment.py). Special tokens are
part of the rendered text, so tokenize it with add_special_tokens=False. A template that is not
Jinja stops no start: the model still serves Generate, and Chat answers with the reason.

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
from typing import Any

import jinja2
from jinja2 import meta

from coordinator.text.caller_text import joined
from coordinator.text.template_budget import TooCostly, rendering
from coordinator.text.template_environment import template_environment
from coordinator.text.tool_format import HERMES, ToolFormat
from coordinator.text.values import ChatMessage
from engine.base.errors import InvalidRequest
from engine.checkpoint.added_tokens import ROLES
from engine.checkpoint.jsonfile import read_json
from engine.telemetry.log import get_logger

_log = get_logger(__name__)
_TOOL_USE = "tool_use"  # the name of a second template that some models bring


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """A model's templates, compiled; without any, `render` refuses."""

    templates: Mapping[str, jinja2.Template]
    special_tokens: Mapping[str, str]
    knowing_tools: frozenset[str]  # names of the templates that render tools
    text: str  # of all templates
    broken: Mapping[str, str]  # templates that cannot be used, with the reason

    @classmethod
    def load(cls, folder: Path, *, now: Callable[[], datetime] = datetime.now) -> ChatTemplate:
        """Read the templates of a folder, which need not have any; `now` is strftime_now's clock.

        Raises CheckpointError if one of the tokenizer's files is not JSON.
        """
        environment = template_environment(now)
        templates, knowing = {}, set()
        sources, broken = _sources(folder)
        for name, source in sources.items():
            try:
                templates[name] = environment.from_string(source)
                if "tools" in meta.find_undeclared_variables(environment.parse(source)):
                    knowing.add(name)
            except (jinja2.TemplateError, SyntaxError, RecursionError) as error:
                broken[name] = " ".join(str(error).split()) or type(error).__name__
        for name, reason in broken.items():
            _log.warning("chat template cannot be used; Generate works", name=name, reason=reason)
        text = "\n".join(sources.values())
        special = _special_tokens(folder)
        return cls(templates, special, frozenset(knowing), text, broken)

    def _named(self, tools: bool) -> str:
        """The template that a request is rendered by. Raises InvalidRequest where none can be."""
        names = [*self.templates, *self.broken]
        if not names:
            raise InvalidRequest("messages", "this model has no chat template; use Generate")
        wanted = _TOOL_USE if tools and _TOOL_USE in names else "default"
        name = wanted if wanted in names else names[0]
        if name in self.broken:
            raise InvalidRequest(
                "messages",
                f"this model's chat template {name!r} cannot be used ({self.broken[name]}); "
                "use Generate",
            )
        return name

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
        name = self._named(bool(tools))
        if "developer" not in self.text:  # a role that OpenAI's clients have for system
            messages = [_without_developer(message) for message in messages]
        if name in self.knowing_tools or not (tools or any(map(_is_of_tools, messages))):
            return self._render(name, messages, tools, add_generation_prompt)
        told = _without_tools(messages, tools, tool_format)
        try:
            return self._render(name, told, None, add_generation_prompt)
        except InvalidRequest:
            if not tools or messages[0]["role"] == "system":
                raise
            # Some templates take no system message; what it would say goes before the first words.
            return self._render(name, _without_system(told), None, add_generation_prompt)

    def _render(
        self,
        name: str,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        add_generation_prompt: bool,
    ) -> str:
        render = partial(
            self.templates[name].render,
            tools=list(tools) if tools else None,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **self.special_tokens,
        )
        try:
            with rendering():
                try:
                    return render(messages=list(messages))
                except TypeError:  # older templates add arguments to strings
                    if not any(message.get("tool_calls") for message in messages):
                        raise
                    return render(messages=[_with_written_arguments(m) for m in messages])
        except TooCostly as error:
            _log.warning("chat template ended", name=name, reason=str(error))
            raise InvalidRequest("messages", f"too much for the chat template: {error}") from None
        except MemoryError:
            raise InvalidRequest("messages", "too long for the chat template") from None
        except (jinja2.TemplateError, jinja2.exceptions.SecurityError) as error:
            raise InvalidRequest("messages", error.message or "the template failed") from None
        except RecursionError:  # a macro that walks through a schema
            raise InvalidRequest("messages", "nested too deeply for the chat template") from None
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
            out.append({"role": role, "content": joined((content, between, written))})
        elif role == "tool":
            result = joined(("<tool_response>\n", content, "\n</tool_response>"))
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
            out[0]["content"] = joined((out[0]["content"], f"\n\n{told}"))
        else:
            out.insert(0, {"role": "system", "content": told})
    return list(out)


def _without_system(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The first message's content before the second one's."""
    system, first, *rest = messages
    content = joined((system["content"], "\n\n", first["content"]))
    return [{**first, "content": content}, *rest]


def _told(tools: Sequence[Mapping[str, Any]], form: ToolFormat) -> str:
    """What a model is told of tools where its template does not tell it."""
    definitions = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    example = form.write([("<name>", "<arguments as a JSON object>")])
    return (
        "You can call functions. Their definitions, in JSON, one a line:\n"
        f"<tools>\n{definitions}\n</tools>\n"
        f"To call one, write nothing but:\n{example}"
    )


def _sources(folder: Path) -> tuple[dict[str, str], dict[str, str]]:
    """(texts by name, reasons why others cannot be read), as transformers looks for them.

    chat_template.jinja goes before tokenizer_config.json and that before chat_template.json, where
    processors keep it; additional_chat_templates/ adds names.
    """
    found: dict[str, str] = {}
    broken: dict[str, str] = {}
    files = {"default": folder / "chat_template.jinja"}
    extra = folder / "additional_chat_templates"
    files |= {path.stem: path for path in sorted(extra.glob("*.jinja"))}
    for name, path in files.items():
        try:
            if path.exists():
                found[name] = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            broken[name] = f"{path.name}: {error}"
    if "default" in {*found, *broken}:
        return found, broken
    for path in (folder / "tokenizer_config.json", folder / "chat_template.json"):
        value = read_json(path).get("chat_template") if path.exists() else None
        if value:
            return _templates(value) | found, broken
    return found, broken


def _templates(value: Any) -> dict[str, str]:
    """Of one text, or of several with names: [{"name": ..., "template": ...}] or {name: text}."""
    if isinstance(value, str):
        return {"default": value}
    if isinstance(value, dict):
        value = [{"name": name, "template": text} for name, text in value.items()]
    items = [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []
    return {
        str(item["name"]): item["template"]
        for item in items
        if "name" in item and isinstance(item.get("template"), str)
    }


def _special_tokens(folder: Path) -> dict[str, str]:
    """Special tokens by role, which old files write as objects."""
    out: dict[str, str] = {}
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        config = read_json(folder / file) if (folder / file).exists() else {}
        for role in ROLES:
            value = config.get(role)
            value = value.get("content") if isinstance(value, dict) else value
            if isinstance(value, str):
                out[role] = value
    return out
