"""Whether jsonschema accepts a text.

Numbers are read as decimals: in doubles 0.3 would not be a multiple of 0.1.
"""

from __future__ import annotations

import decimal
import json
import re
from typing import Any

from jsonschema import Draft202012Validator, FormatChecker
from jsonschema.exceptions import SchemaError
from jsonschema.protocols import Validator
from jsonschema.validators import validator_for

from tests.ecosystem.conformance.sources import Case

_ROOMY = decimal.Context(prec=4000, Emin=-100_000, Emax=100_000)


class NotChecked(Exception):
    """The schema cannot be used by jsonschema; the message has the reason."""


def validator(case: Case, *, formats: bool = False) -> Validator:
    """By the draft that the schema names, else 2020-12. Raises NotChecked."""
    schema = _read(case.source)
    if isinstance(schema, dict) and isinstance(schema.get("$schema"), str):
        schema["$schema"] = _as_named(schema["$schema"])
    kind: Any = validator_for(schema, default=Draft202012Validator)
    try:
        kind.check_schema(json.loads(case.source), format_checker=FormatChecker(()))
    except SchemaError as error:
        raise NotChecked(f"not valid under its own draft: {error.message[:100]}") from None
    checker = FormatChecker() if formats else None
    made: Validator = kind(schema, registry=case.registry, format_checker=checker)
    return made


def fault(checker: Validator, text: str) -> str:
    """Why the text is not valid; "" if it is. Raises NotChecked."""
    try:
        value = _read(text)
    except ValueError as error:
        return f"not JSON: {error}"
    try:
        with decimal.localcontext(_ROOMY):
            errors = [error.message for error in checker.iter_errors(value)]
    except re.error as error:
        raise NotChecked(f"a pattern is none of Python's: {error}") from None
    return errors[0][:300] if errors else ""


def _as_named(draft: str) -> str:
    """https: in place of http: is read as the draft that is meant, as in the stack."""
    scheme = "https:" if "/draft/20" in draft else "http:"
    return re.sub(r"^https?:(?=//json-schema\.org/draft)", scheme, draft)


def _read(text: str) -> Any:
    return json.loads(text, parse_float=decimal.Decimal)
