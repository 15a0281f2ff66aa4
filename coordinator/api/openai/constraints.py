"""What the answer must be: OpenAI's response_format and vLLM's ways to say it -> one Constraint.

    response_format      text, json_object, json_schema
    guided_*             json, regex, choice, grammar           (vLLM before 0.12)
    structured_outputs   json, regex, choice, grammar, json_object

At most one of them; grammars are Lark, as llguidance reads it.
"""

from __future__ import annotations

import json
from typing import Any

from coordinator.api.openai.errors import unsupported
from coordinator.api.openai.fields import Fields
from coordinator.api.values import Constraint
from engine.base.errors import InvalidRequest
from engine.constraints import schemas

_GUIDED = ("json", "regex", "choice", "grammar")


def read_constraint(fields: Fields) -> tuple[Constraint | None, str]:
    """The constraint and the option that asked for it. Raises InvalidRequest, Refused."""
    found = list(_asked(fields))
    if len(found) > 1:
        raise InvalidRequest(found[1][1], f"{found[0][1]} is there as well; expected one of them")
    return found[0] if found else (None, "")


def names_of(asked: str) -> dict[str, str]:
    """The option that asked, for the fields that its value became."""
    names = {"constraint": asked}
    if asked != "response_format":  # which calls the kinds by the same names
        for kind in ("json_schema", "json_object", "regex", "grammar", "choice"):
            names[f"constraint.{kind}"] = asked
        names["constraint.choice.choices"] = asked
    return names


def _asked(fields: Fields) -> list[tuple[Constraint, str]]:
    found = []
    if (constraint := _response_format(fields)) is not None:
        found.append((constraint, "response_format"))
    for kind in _GUIDED:
        value = fields.take(f"guided_{kind}")
        if value is not None:
            found.append((_constraint(f"guided_{kind}", kind, value), f"guided_{kind}"))
    fields.neutral({"guided_whitespace_pattern": (), "structural_tag": ()})
    if (outputs := fields.object("structured_outputs")) is not None:
        path = "structured_outputs"
        for kind in _GUIDED:
            value = outputs.take(kind)
            if value is not None:
                found.append((_constraint(f"{path}.{kind}", kind, value), f"{path}.{kind}"))
        if outputs.boolean("json_object"):
            found.append((Constraint("json_object", True), f"{path}.json_object"))
        outputs.neutral({"structural_tag": (), "whitespace_pattern": ()})
        outputs.end(
            (
                "backend",
                "disable_additional_properties",
                "disable_any_whitespace",
                "disable_fallback",
            )
        )
    return found


def _response_format(fields: Fields) -> Constraint | None:
    form = fields.object("response_format")
    if form is None:
        return None
    kind = form.text("type")
    if kind == "text":
        form.end()
        return None
    if kind == "json_object":
        schema = form.take("schema")  # llama.cpp's and others' way to say which object
        form.end()
        if schema is None:
            return Constraint("json_object", True)
        return _constraint("response_format.schema", "json", schema)
    if kind != "json_schema":
        if kind in ("structural_tag", "grammar", "python"):
            raise unsupported("response_format.type", kind)
        raise InvalidRequest("response_format.type", "expected text, json_object or json_schema")
    wrapper = form.object("json_schema")
    if wrapper is None:
        raise InvalidRequest("response_format.json_schema", "unset; expected a schema and its name")
    wrapper.text("name")
    wrapper.text("description")
    strict = wrapper.boolean("strict")  # the schema is held in either case
    schema = wrapper.take("schema")
    wrapper.end()
    form.end()
    if schema is None:
        return Constraint("json_object", True)
    path = "response_format.json_schema.schema"
    if strict:
        try:
            schemas.check_formats(schema)
        except (schemas.Refused, RecursionError) as error:
            what = "nested too deeply" if isinstance(error, RecursionError) else str(error)
            raise InvalidRequest(path, what) from None
    return _constraint(path, "json", schema)


def _constraint(path: str, kind: str, value: Any) -> Constraint:
    match kind:
        case "json":
            if isinstance(value, str):  # vLLM takes the schema's text as well
                return Constraint("json_schema", value)
            if not isinstance(value, dict | bool):
                raise InvalidRequest(path, "expected a JSON schema, an object")
            return Constraint("json_schema", json.dumps(value))
        case "choice":
            texts = isinstance(value, list) and all(isinstance(text, str) for text in value)
            if not texts or not value:
                raise InvalidRequest(path, "expected an array of at least one text")
            return Constraint("choice", value)
    if not isinstance(value, str):
        raise InvalidRequest(path, "expected text")
    return Constraint(kind, value)
