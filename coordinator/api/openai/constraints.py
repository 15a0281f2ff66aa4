"""The form of an output: OpenAI's response_format and vLLM's options -> one Constraint.

    response_format      text, json_object, json_schema
    guided_*             json, regex, choice, grammar           (vLLM before 0.12)
    structured_outputs   json, regex, choice, grammar, json_object

At most one of them; grammars are Lark, as llguidance reads it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from coordinator.api.openai.models import CommonBody, ObjectFormat, SchemaFormat
from coordinator.api.values import Constraint
from engine.base.errors import InvalidRequest
from engine.constraints import schemas
from engine.constraints.schema_context import UnsupportedSchema

_KINDS = ("json", "regex", "choice", "grammar", "json_object")


def read_constraint(body: CommonBody) -> tuple[Constraint | None, str]:
    """The constraint and the option that it comes from. Raises InvalidRequest."""
    found = list(_asked(body))
    if len(found) > 1:
        raise InvalidRequest(found[1][1], f"{found[0][1]} is there as well; expected one of them")
    return found[0] if found else (None, "")


def names_of(option: str) -> dict[str, str]:
    """The name of `option` for all fields that its value may become."""
    names = {"constraint": option}
    if option != "response_format":  # which calls the kinds by the same names
        for kind in ("json_schema", *_KINDS):
            names[f"constraint.{kind}"] = option
        names["constraint.choice.choices"] = option
    return names


def _asked(body: CommonBody) -> Iterator[tuple[Constraint, str]]:
    form = body.response_format
    if isinstance(form, ObjectFormat):
        yield _of_schema(form.schema), "response_format"
    elif isinstance(form, SchemaFormat):
        schema = form.json_schema.schema
        if form.json_schema.strict and schema is not None:
            _check_formats(schema)
        yield _of_schema(schema), "response_format"
    for prefix, options in (("guided_", body), ("structured_outputs.", body.structured_outputs)):
        for kind in _KINDS:
            name = kind if options is body.structured_outputs else prefix + kind
            value = getattr(options, name, None)
            if kind == "json" and value is not None:
                yield _of_schema(value), prefix + kind
            elif value is not None and value is not False:
                yield Constraint(kind, value), prefix + kind


def _of_schema(schema: Any) -> Constraint:
    if schema is None:
        return Constraint("json_object", True)
    # vLLM takes the schema's text as well.
    return Constraint("json_schema", schema if isinstance(schema, str) else json.dumps(schema))


def _check_formats(schema: Any) -> None:
    try:
        schemas.check_formats(schema)
    except (UnsupportedSchema, RecursionError) as error:
        what = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise InvalidRequest("response_format.json_schema.schema", what) from None
