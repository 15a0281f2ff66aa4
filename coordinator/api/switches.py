"""What an operator has switched off with `--disable`, for all protocols in one place.

    part of a request    UNIMPLEMENTED naming the field, 400 over HTTP
    protocol             its services are not registered (UNIMPLEMENTED), its paths not served (404)

All protocols end in requests of our own gRPC API, and those are looked at here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from engine.base.errors import NotOffered
from engine.base.options import parse_disabled


def _constraint(request: Any) -> str:
    kind = request.constraint.WhichOneof("kind")
    return f"constraint.{kind}" if kind else ""


def _logprobs(request: Any) -> str:
    return _given("output.logprobs", request.output.HasField("logprobs")) or _prompt(request)


def _prompt(request: Any) -> str:
    return _given("output.prompt_logprobs", request.output.HasField("prompt_logprobs"))


def _given(field: str, is_given: bool) -> str:
    return field if is_given else ""


# Switch -> the field of a GenerateRequest or ChatRequest that uses it; "" where none does.
_PARTS: dict[str, Callable[[Any], str]] = {
    "constraints": _constraint,
    "echo": lambda request: _given("output.echo", request.output.echo),
    "logit-bias": lambda request: _given("sampling.logit_bias", bool(request.sampling.logit_bias)),
    "logprobs": _logprobs,
    "n": lambda request: _given("n", request.n > 1),
    "priority": lambda request: _given("priority", request.priority != 0),
    "prompt-logprobs": _prompt,
    "resume": lambda request: _given("resume", bool(request.resume)),
    "tools": lambda request: _given("tools_json", bool(getattr(request, "tools_json", ""))),
}


class Switches:
    """What is off; nothing by default."""

    def __init__(self, disabled: str = "") -> None:
        self.off: tuple[str, ...] = tuple(parse_disabled(disabled).split(",")) if disabled else ()
        self._parts = [(name, _PARTS[name]) for name in self.off if name in _PARTS]

    def check(self, request: Any) -> None:
        """Raise NotOffered where a GenerateRequest or ChatRequest uses what is off."""
        for name, used in self._parts:
            if field := used(request):
                raise _refusal(name, field)

    def check_tools(self, field: str, is_given: bool) -> None:
        """The same, for tools in a message of another kind."""
        if is_given and "tools" in self.off:
            raise _refusal("tools", field)

    def serves(self, protocol: str) -> bool:
        """Whether a protocol is on."""
        return protocol not in self.off


def _refusal(name: str, field: str) -> NotOffered:
    return NotOffered(field, f"is switched off on this server (--disable {name}); leave it unset")
