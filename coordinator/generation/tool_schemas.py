"""Tools with schemas that cannot be compiled. A strict one is refused by name; one that is not
strict loses what cannot be held; the others keep their schemas.

    the grammar of all of them compiles: nothing to do
    else one at a time     strict       refused as tools_json[i]
                           not strict   reduced (engine/constraints/leniency.py)
         all together      still too much for one grammar: the longest of those that are not strict
                           become any object

After MAX_CPU_S of CPU time all of those that are not strict become any object at once.
"""

from __future__ import annotations

from collections.abc import Iterator

from coordinator.generation.request import GenerationRequest
from coordinator.text.tools.format import ANY_OBJECT, Tool, ToolUse
from coordinator.text.tools.grammar import tool_grammar
from engine.base.errors import InvalidRequest
from engine.base.types import Constraint
from engine.constraints import Checker
from engine.constraints.grammar import Grammar
from engine.telemetry.log import get_logger

_log = get_logger(__name__)
MAX_CPU_S = 3.0


async def fitting_constraint(
    checker: Checker, request: GenerationRequest, error: InvalidRequest
) -> Constraint:
    """One that compiles, in place of the request's, which does not because of `error`.

    Raises InvalidRequest, of a strict tool or of the schema of text; Unavailable.
    """
    use = request.tools
    if use is None or not use.callable or error.field != "constraint":
        raise error
    fitting = _Fitting(checker)
    if use.text_schema is not None:
        of_text = await fitting.schema(use.text_schema, lenient=False)
        if of_text.reason:
            raise InvalidRequest("constraint.json_schema", of_text.reason)
    # One after the other: the tries of one request do not delay those of another one.
    schemas = {tool.name: await _schema(fitting, use, tool) for tool in use.callable}
    for constraint in _ever_wider(fitting, use, schemas):
        if reason := (await fitting.grammar(constraint)).reason:
            error = InvalidRequest("tools_json", reason)
            continue
        changed = [tool.name for tool in use.callable if schemas[tool.name] != tool.schema]
        _log.info("schemas of tools are held in part", tools=changed, reason=error.description)
        return constraint
    raise InvalidRequest("tools_json", error.description)


class _Fitting:
    """The compilations of one request, and their CPU time."""

    def __init__(self, checker: Checker) -> None:
        self._checker = checker
        self._cpu_s = 0.0

    @property
    def spent(self) -> bool:
        """Whether the CPU time is spent."""
        return self._cpu_s > MAX_CPU_S

    async def schema(self, schema: str, lenient: bool) -> Grammar:
        """As Checker.compilable_schema, while there is time left."""
        if self.spent:
            return Grammar(reason="the tools together take too long to compile")
        return self._took(await self._checker.compilable_schema(schema, lenient))

    async def grammar(self, constraint: Constraint) -> Grammar:
        """As Checker.tried."""
        return self._took(await self._checker.check(constraint))

    def _took(self, found: Grammar) -> Grammar:
        self._cpu_s += found.cpu_s
        return found


async def _schema(fitting: _Fitting, use: ToolUse, tool: Tool) -> str:
    """The tool's schema, reduced where needed. Raises InvalidRequest, naming the tool."""
    found = await fitting.schema(tool.schema, lenient=not tool.strict)
    if not found.reason:
        return found.text
    if not tool.strict:  # it took too long
        return ANY_OBJECT
    where = f"tools_json[{use.tools.index(tool)}].function.parameters"
    raise InvalidRequest(where, found.reason)


def _ever_wider(fitting: _Fitting, use: ToolUse, schemas: dict[str, str]) -> Iterator[Constraint]:
    """With these schemas, then with more and more of them as any object."""
    yield tool_grammar(use, use.text_schema, schemas)
    lax = [tool.name for tool in use.callable if not tool.strict]
    lax.sort(key=lambda name: -len(schemas[name]))
    begin, count = 0, 1
    while begin < len(lax):
        count = len(lax) if fitting.spent else count
        schemas.update(dict.fromkeys(lax[begin : begin + count], ANY_OBJECT))
        yield tool_grammar(use, use.text_schema, schemas)
        begin, count = begin + count, 2 * count
