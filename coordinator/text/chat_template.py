"""Renders messages to a prompt with the model's chat template, which is written in Jinja.

The template comes with the model and runs sandboxed (template_environment.py). Special tokens are
part of the rendered text, so tokenize it with add_special_tokens=False. With a broken template the
model still serves Generate, and Chat fails with the reason.

For a template without tools the conversation is rewritten: definitions go to the system message,
calls are written in the form of the model's family, and results become user messages.
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

from coordinator.text.template_budget import TooCostly, rendering
from coordinator.text.template_environment import template_environment
from coordinator.text.tools.format import ToolFormat
from coordinator.text.tools.json_forms import HERMES
from coordinator.text.untrusted_text import joined
from coordinator.text.values import Message
from engine.base.errors import InvalidRequest
from engine.checkpoint.added_tokens import ROLES
from engine.checkpoint.jsonfile import read_json
from engine.telemetry.log import get_logger

_log = get_logger(__name__)
Messages = Sequence[Mapping[str, Any]]
_TOOL_USE = "tool_use"  # the name of a second template of some models


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """A model's compiled templates; without one, `render` raises InvalidRequest."""

    templates: Mapping[str, jinja2.Template]
    special_tokens: Mapping[str, str]
    knowing_tools: frozenset[str]  # names of the templates that render tools
    text: str  # the source of all templates
    broken: Mapping[str, str]  # unusable templates, with the reason

    @classmethod
    def load(cls, folder: Path, *, now: Callable[[], datetime] = datetime.now) -> ChatTemplate:
        """Read the templates of a folder, which may have none; `now` is strftime_now's clock.

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
                broken[name] = _reason(error)
        for name, reason in broken.items():
            _log.warning("chat template cannot be used; Generate works", name=name, reason=reason)
        text = "\n".join(sources.values())
        special = _special_tokens(folder)
        return cls(templates, special, frozenset(knowing), text, broken)

    def _named(self, tools: bool) -> str:
        """The template for a request. Raises InvalidRequest if there is none."""
        names = [*self.templates, *self.broken]
        if not names:
            raise InvalidRequest("messages", "this model has no chat template; use Generate")
        preferred = _TOOL_USE if tools and _TOOL_USE in names else "default"
        name = preferred if preferred in names else names[0]
        if name in self.broken:
            raise InvalidRequest(
                "messages",
                f"this model's chat template {name!r} cannot be used ({self.broken[name]}); "
                "use Generate",
            )
        return name

    def render(
        self,
        messages: Messages,
        tools: Messages | None = None,
        add_generation_prompt: bool = True,
        tool_format: ToolFormat = HERMES,
        writes_calls: bool = True,
        kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt of a conversation. Raises InvalidRequest if the template refuses it.

        `tool_format` is the form of calls for a template without tools, or one that shows tools but
        does not write calls. `kwargs` are further variables, of the client.
        """
        render = partial(self._render, kwargs=kwargs)
        name = self._named(bool(tools))
        if "developer" not in self.text:  # OpenAI's newer name for the system role
            messages = [
                {**m, "role": "system"} if m["role"] == "developer" else m for m in messages
            ]
        if name in self.knowing_tools and not writes_calls and not tool_format.is_unknown:
            messages = [_with_written_calls(message, tool_format) for message in messages]
        if name in self.knowing_tools or not (tools or any(map(_is_of_tools, messages))):
            return render(name, messages, tools, add_generation_prompt)
        plain_messages = _without_tools(messages, tools, tool_format)
        try:
            return render(name, plain_messages, None, add_generation_prompt)
        except InvalidRequest:
            if not tools or messages[0]["role"] == "system":
                raise
            # Some templates refuse a system message; its text goes before the first message.
            return render(name, _without_system(plain_messages), None, add_generation_prompt)

    @property
    def shows_tools(self) -> bool:
        """Whether the template for requests with tools writes their definitions."""
        names = [name for name in (_TOOL_USE, "default") if name in self.templates]
        return any(name in self.knowing_tools for name in names or self.templates)

    def probe(self, messages: Messages, tools: Messages) -> str:
        """What the template itself writes. Raises InvalidRequest."""
        return self._render(self._named(bool(tools)), messages, tools, False)

    def _render(
        self,
        name: str,
        messages: Messages,
        tools: Messages | None,
        add_generation_prompt: bool,
        kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        own: dict[str, Any] = {"add_generation_prompt": add_generation_prompt, "documents": None}
        own |= {"tools": list(tools) if tools else None, **self.special_tokens}
        render = partial(self.templates[name].render, {**(kwargs or {}), **own})
        try:
            with rendering():
                try:
                    return render(messages=list(messages))
                except TypeError:  # older templates concatenate arguments with strings
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
        except RecursionError:  # from a macro that walks through a schema
            raise InvalidRequest("messages", "nested too deeply for the chat template") from None
        except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
            # Templates add strings and index lists without checks.
            raise InvalidRequest("messages", f"the chat template failed: {error}") from None


def _reason(error: Exception) -> str:
    """Why a template does not compile, with the line."""
    what = " ".join(str(error).split()) or type(error).__name__
    line = getattr(error, "lineno", None)
    return f"line {line}: {what}" if line else what


def template_messages(
    messages: Sequence[Message], tool_format: ToolFormat = HERMES
) -> list[dict[str, Any]]:
    """Messages in the form of templates: arguments of calls are objects, not JSON texts.

    Call ids have the form that the family's templates accept.
    """
    out: list[dict[str, Any]] = []
    for message in messages:
        turn: dict[str, Any] = {"role": message.role, "content": message.content or ""}
        if message.name:
            turn["name"] = message.name
        if message.reasoning:
            turn["reasoning_content"] = message.reasoning
        is_result = message.tool_call_id or message.role == "tool"
        if is_result and (call_id := tool_format.call_id(message.tool_call_id)):
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
    return _with_numbered_ids(out) if tool_format.numbered_ids else out


def _with_numbered_ids(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages with ids functions.NAME:INDEX, counted through the conversation."""
    ids: dict[str, str] = {}
    num_calls = 0
    for message in messages:
        for call in message.get("tool_calls") or ():
            name = f"functions.{call['function']['name']}:{num_calls}"
            ids[call["id"]] = call["id"] = name
            num_calls += 1
        if "tool_call_id" in message:
            message["tool_call_id"] = ids.get(message["tool_call_id"], message["tool_call_id"])
    return messages


def _with_written_arguments(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """The message with arguments of calls as JSON texts."""
    calls = [
        {**call, "function": {**call["function"], "arguments": _json(call["function"])}}
        for call in message.get("tool_calls") or ()
    ]
    return {**message, "tool_calls": calls} if calls else message


def _json(function: Mapping[str, Any]) -> str:
    return json.dumps(function["arguments"], ensure_ascii=False)


def _is_of_tools(message: Mapping[str, Any]) -> bool:
    return bool(message.get("tool_calls")) or message.get("role") == "tool"


def _with_written_calls(message: Mapping[str, Any], form: ToolFormat) -> Mapping[str, Any]:
    """The message with its calls as a part of the content."""
    content, calls = message["content"], message.get("tool_calls")
    if not calls:
        return message
    functions = [call["function"] for call in calls]
    written = form.write([(f["name"], _json(f)) for f in functions])
    between = "" if not content or content.endswith("\n") else "\n"
    rest = {key: value for key, value in message.items() if key != "tool_calls"}
    return {**rest, "content": joined((content, between, written))}


def _without_tools(messages: Messages, tools: Messages | None, form: ToolFormat) -> Messages:
    """The conversation with roles and contents only."""
    out: list[dict[str, Any]] = []
    previous = ""
    for message in messages:
        role, content = message["role"], message["content"]
        if message.get("tool_calls"):
            out.append({"role": role, "content": _with_written_calls(message, form)["content"]})
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
        prompt = _tools_prompt(tools, form)
        if out and out[0]["role"] == "system":
            out[0]["content"] = joined((out[0]["content"], f"\n\n{prompt}"))
        else:
            out.insert(0, {"role": "system", "content": prompt})
    return out


def _without_system(messages: Messages) -> Messages:
    """The messages with the system message's content put before the next message's."""
    system, first, *rest = messages
    content = joined((system["content"], "\n\n", first["content"]))
    return [{**first, "content": content}, *rest]


def _tools_prompt(tools: Messages, form: ToolFormat) -> str:
    """The description of tools for a template without tools."""
    definitions = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    example = form.write([("<name>", "<arguments as a JSON object>")])
    return (
        "You can call functions. Their definitions, in JSON, one a line:\n"
        f"<tools>\n{definitions}\n</tools>\n"
        f"To call one, write nothing but:\n{example}"
    )


def _sources(folder: Path) -> tuple[dict[str, str], dict[str, str]]:
    """(sources by name, reasons of unreadable ones), found in the places of transformers.

    chat_template.jinja has precedence over tokenizer_config.json, and that over chat_template.json
    of processors; additional_chat_templates/ adds further names.
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
    """Sources by name, from a text, [{"name": ..., "template": ...}] or {name: text}."""
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
    """Special tokens by role; old files have objects in place of texts."""
    out: dict[str, str] = {}
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        config = read_json(folder / file) if (folder / file).exists() else {}
        for role in ROLES:
            value = config.get(role)
            value = value.get("content") if isinstance(value, dict) else value
            if isinstance(value, str):
                out[role] = value
    return out
