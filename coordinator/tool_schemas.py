"""What becomes of tools whose schemas cannot be compiled: a strict one is refused by its name, one
that is not strict loses what cannot be held, the others keep theirs.

    the grammar of all of them compiles: nothing to do
    else each by itself    strict       refused as tools_json[i]
                           not strict   what is left of it (engine/constraints/leniency.py)
         all together      still too much for one grammar: the longest of those that are not strict
                           become any object
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

from coordinator.request import AnswerRequest
from coordinator.tools import ANY_OBJECT, Tool, ToolUse, tool_grammar
from engine.constraints import Compiler
from engine.errors import InvalidRequest
from engine.telemetry.log import get_logger
from engine.types import Constraint

_log = get_logger(__name__)


async def fitting_constraint(
    compiler: Compiler, request: AnswerRequest, error: InvalidRequest
) -> Constraint:
    """One that compiles, in place of the request's, which does not because of `error`.

    Raises InvalidRequest, of a strict tool or of the schema of text; Unavailable.
    """
    use = request.tools
    if use is None or error.field != "constraint":
        raise error
    if use.text_schema is not None:
        try:
            await compiler.fitting(use.text_schema, lenient=False)
        except InvalidRequest as of_text:
            raise InvalidRequest("constraint.json_schema", of_text.description) from None
    found = await asyncio.gather(*(_schema(compiler, use, tool) for tool in use.callable))
    schemas = {tool.name: schema for tool, schema in zip(use.callable, found, strict=True)}
    for constraint in _ever_wider(use, schemas):
        try:
            await compiler.matcher(constraint)
        except InvalidRequest as still:
            error = still
            continue
        changed = [tool.name for tool in use.callable if schemas[tool.name] != tool.schema]
        _log.info("schemas of tools are held in part", tools=changed, reason=error.description)
        return constraint
    raise InvalidRequest("tools_json", error.description)


async def _schema(compiler: Compiler, use: ToolUse, tool: Tool) -> str:
    """The tool's schema, or what is left of it. Raises InvalidRequest, naming the tool."""
    try:
        return await compiler.fitting(tool.schema, lenient=not tool.strict)
    except InvalidRequest as error:
        if not tool.strict:  # it took too long
            return ANY_OBJECT
        where = f"tools_json[{use.tools.index(tool)}].function.parameters"
        raise InvalidRequest(where, error.description) from None


def _ever_wider(use: ToolUse, schemas: dict[str, str]) -> Iterator[Constraint]:
    """With these schemas, then with more and more of them as any object."""
    yield tool_grammar(use, use.text_schema, schemas)
    lax = [tool.name for tool in use.callable if not tool.strict]
    lax.sort(key=lambda name: -len(schemas[name]))
    begin, count = 0, 1
    while begin < len(lax):
        schemas.update(dict.fromkeys(lax[begin : begin + count], ANY_OBJECT))
        yield tool_grammar(use, use.text_schema, schemas)
        begin, count = begin + count, 2 * count
