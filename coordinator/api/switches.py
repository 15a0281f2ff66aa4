"""What `--disable` switches off, for all protocols in one place.

    part of a request    UNIMPLEMENTED naming the field, 400 over HTTP
    protocol             its services are not registered (UNIMPLEMENTED), its paths not served (404)

All protocols call the frontend, and the frontend checks each request here.
"""

from __future__ import annotations

from operator import attrgetter

from coordinator.api.values import GenerateRequest
from engine.base.errors import NotOffered
from engine.base.option_values import parse_disabled

# Switch -> the fields of a request that use the part, where they are not at their defaults.
_PARTS = {
    "constraints": ("constraint",),
    "echo": ("output.echo",),
    "logit-bias": ("sampling.logit_bias",),
    "logprobs": ("output.logprobs", "output.prompt_logprobs"),
    "n": ("n",),
    "priority": ("priority",),
    "prompt-logprobs": ("output.prompt_logprobs",),
    "resume": ("resume",),
    "tools": ("tools_json",),
}
_UNUSED = GenerateRequest()


class Switches:
    """The parts and protocols that are off; none by default."""

    def __init__(self, disabled: str = "") -> None:
        self.off: tuple[str, ...] = tuple(parse_disabled(disabled).split(",")) if disabled else ()
        self._parts = [(name, _PARTS[name]) for name in self.off if name in _PARTS]

    def check(self, request: GenerateRequest) -> None:
        """Raise NotOffered where a request uses what is off."""
        for name, fields in self._parts:
            for field in fields:
                value = attrgetter(field)(request)
                if value != attrgetter(field)(_UNUSED):
                    kind = f".{value.kind}" if field == "constraint" else ""
                    raise _refusal(name, field + kind)

    def check_tools(self, field: str, is_given: bool) -> None:
        """The same for tools in another request, of `field`."""
        if is_given and "tools" in self.off:
            raise _refusal("tools", field)

    def serves(self, protocol: str) -> bool:
        """Whether a protocol is on."""
        return protocol not in self.off


def _refusal(name: str, field: str) -> NotOffered:
    return NotOffered(field, f"is switched off on this server (--disable {name}); leave it unset")
