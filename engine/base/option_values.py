"""How options are declared: the field of a dataclass with its help, and parsers of its value."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

MAX_CLIENT_S = 1e6  # gRPC's keepalive takes milliseconds in 32 bits
MAX_REQUEST_S = 1e9  # three decades: gRPC cannot carry a deadline of some centuries
# Values of --disable: parts of requests, then protocols (coordinator/api/switches.py).
DISABLABLE = (
    *("constraints", "echo", "logit-bias", "logprobs", "n", "priority", "prompt-logprobs"),
    *("resume", "tools", "engine-protocol", "oip", "openai", "reflection"),
)
_ORIGIN = re.compile(r"^[a-z][a-z0-9+.-]*://[^\s/,?#*]+$")
_HOST = re.compile(
    r"^(\*\.)?[A-Za-z0-9_-]([A-Za-z0-9_.-]*)$|^\[?[0-9a-fA-F]*:[0-9a-fA-F.:]*:[0-9a-fA-F.]*\]?$"
)
_SIZE = re.compile(r"^\s*([0-9.]+)\s*([kmgt]?)i?b?\s*$", re.IGNORECASE)


def parse_size(text: str | int) -> int:
    """Bytes of "2GiB", "512M" or a plain number (units are powers of 1024). Raises ValueError."""
    match = _SIZE.match(str(text))
    try:
        if match:
            return int(float(match[1]) * 1024 ** "_kmgt".index(match[2].lower() or "_"))
    except (ValueError, OverflowError):  # 1..2GiB, or an exceedingly large number
        pass
    raise ValueError("expected a size such as 2GiB or 512MiB")


def parse_address(text: str) -> str:
    """HOST:PORT, checked; port 0 means any free one. Raises ValueError."""
    host, sep, port = text.rpartition(":")
    if not sep or not host or not port.isdecimal() or int(port) > 65535:
        raise ValueError("expected HOST:PORT, for example 127.0.0.1:50051")
    return text


def parse_addresses(text: str) -> str:
    """HOST:PORT[,HOST:PORT...], each checked. Raises ValueError."""
    try:
        for address in text.split(","):
            parse_address(address.strip())
    except ValueError:
        raise ValueError("expected HOST:PORT[,HOST:PORT...]") from None
    return text


def parse_origins(text: str) -> str:
    """SCHEME://HOST[:PORT][,...] as browsers send them, "*" for all, or "". Raises ValueError."""
    return _listed(text, _ORIGIN, "SCHEME://HOST[:PORT][,...] without a path, or *")


def parse_hosts(text: str) -> str:
    """NAME[,NAME...] without ports, "*.example.com" for subdomains, "*" for all, or "".

    Raises ValueError.
    """
    return _listed(text, _HOST, "NAME[,NAME...] without ports, *.DOMAIN, or *")


def _listed(text: str, pattern: re.Pattern[str], right: str) -> str:
    names = [name.strip() for name in text.split(",")]
    if text and names != ["*"] and not all(map(pattern.match, names)):
        raise ValueError(f"expected {right}")
    return text


def parse_disabled(text: str) -> str:
    """NAME[,NAME...] out of `DISABLABLE`, or ""; sorted, without repetition. Raises ValueError."""
    names = {name.strip() for name in text.split(",")} - {""}
    if unknown := sorted(names - set(DISABLABLE)):
        raise ValueError(f"{unknown[0]!r} is unknown; expected one of {', '.join(DISABLABLE)}")
    return ",".join(sorted(names))


def parse_bool(text: str | bool) -> bool:
    """True or false in one of the usual spellings. Raises ValueError."""
    if isinstance(text, bool):
        return text
    if text.lower() in ("1", "true", "yes", "on"):
        return True
    if text.lower() in ("0", "false", "no", "off"):
        return False
    raise ValueError("expected true or false")


# The forms of tool calls, by the names of coordinator/text/tools/forms.py.
TOOL_FORMATS = (
    *("hermes", "llama3", "mistral", "mistral_args", "mistral_call_id"),
    *("apertus", "apriel", "command_r", "command_r7b", "deepseek_v3", "deepseek_v31"),
    *("deepseek_v32", "deepseek_v4", "firefunction", "functionary_v31", "gemma4", "gigachat3"),
    *("gigachat31", "glm", "granite", "harmony", "hunyuan", "kimi_k2", "kimi_k3", "lfm2"),
    *("minicpm5", "minimax_m1", "minimax_m2", "minimax_m3", "muse", "nemotron", "phi4_mini"),
    *("qwen3_coder", "seed_oss", "solar"),
)

# The forms of reasoning, by the names of coordinator/text/reasoning.py.
REASONING_PARSERS = (
    *("think", "apertus", "apriel", "command_r", "gemma4", "granite", "harmony", "hunyuan"),
    *("kimi_k3", "minimax_m3", "mistral", "muse", "seed_oss", "solar"),
)


def parse_form(value: str) -> str:
    """The name of a form, which may be written with dashes."""
    return value.strip().lower().replace("-", "_")


def option(
    default: Any,
    help: str,
    *,
    choices: Sequence[str] = (),
    parse: Callable[[str], Any] | None = None,
    minimum: float | None = None,
    maximum: float | None = None,
    repeated: bool = False,
) -> Any:
    """A dataclass field that is also a flag, with its help and the checks of its value.

    `repeated`: a list with commas; the flag may be repeated, and a file may have an array.
    """
    meta = {"help": help, "choices": tuple(choices), "parse": parse, "min": minimum, "max": maximum}
    return dataclasses.field(default=default, metadata={**meta, "repeated": repeated})
