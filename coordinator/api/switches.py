"""What `--disable` switches off, for all protocols in one place.

    part of a request    UNIMPLEMENTED naming the field, 400 over HTTP
    protocol             its services are not registered (UNIMPLEMENTED), its paths not served (404)

All protocols call the frontend, and the frontend checks each request here.
"""

from __future__ import annotations

from collections.abc import Callable

from coordinator.api.values import GenerateRequest
from engine.base.errors import NotOffered
from engine.base.option_values import parse_disabled


def _constraint(request: GenerateRequest) -> str:
    return f"constraint.{request.constraint.kind}" if request.constraint else ""


def _logprobs(request: GenerateRequest) -> str:
    return _used("output.logprobs", request.output.logprobs is not None) or _prompt(request)


def _prompt(request: GenerateRequest) -> str:
    return _used("output.prompt_logprobs", request.output.prompt_logprobs is not None)


def _used(field: str, is_used: bool) -> str:
    return field if is_used else ""


# Switch -> the field of a request that uses the part; "" where none does.
_PARTS: dict[str, Callable[[GenerateRequest], str]] = {
    "constraints": _constraint,
    "echo": lambda request: _used("output.echo", request.output.echo),
    "logit-bias": lambda request: _used("sampling.logit_bias", bool(request.sampling.logit_bias)),
    "logprobs": _logprobs,
    "n": lambda request: _used("n", request.n > 1),
    "priority": lambda request: _used("priority", request.priority != 0),
    "prompt-logprobs": _prompt,
    "resume": lambda request: _used("resume", bool(request.resume)),
    "tools": lambda request: _used("tools_json", bool(request.tools_json)),
}


class Switches:
    """The parts and protocols that are off; none by default."""

    def __init__(self, disabled: str = "") -> None:
        self.off: tuple[str, ...] = tuple(parse_disabled(disabled).split(",")) if disabled else ()
        self._parts = [(name, _PARTS[name]) for name in self.off if name in _PARTS]

    def check(self, request: GenerateRequest) -> None:
        """Raise NotOffered where a request uses what is off."""
        for name, used in self._parts:
            if field := used(request):
                raise _refusal(name, field)

    def check_tools(self, field: str, is_given: bool) -> None:
        """The same for tools in another request, of `field`."""
        if is_given and "tools" in self.off:
            raise _refusal("tools", field)

    def serves(self, protocol: str) -> bool:
        """Whether a protocol is on."""
        return protocol not in self.off


def _refusal(name: str, field: str) -> NotOffered:
    return NotOffered(field, f"is switched off on this server (--disable {name}); leave it unset")
