"""Options by name -> the parts of a GenerateRequest, by one set of names for all carriers. Pure.

    parameters map, tensors, vLLM's JSON of parameters --take(where, name, value)--> parts

Names are those of inference.proto (`temperature`, `max_tokens`, `json_schema`, ...) and the other
names that Triton's backends have for the same options. Numbers may be text, as they are there. The
frontend checks ranges other than those of the wire's types.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from coordinator.api.oip.neutral import NEUTRAL, instead, is_neutral
from coordinator.api.values import Constraint, Output, Sampling, Stop
from coordinator.text import json_bounds as nesting
from engine.base.errors import InvalidRequest


@dataclass(frozen=True, slots=True)
class Option:
    """A field of `part` of a GenerateRequest, or of the request itself where that is ""."""

    part: str
    datatype: str  # of its tensor
    type: type  # of its value, or of the elements of its list
    low: float = -math.inf
    high: float = math.inf


def _of(part: str, names: str, *kind: Any) -> dict[str, Option]:
    return dict.fromkeys(names.split(), Option(part, *kind))


_NUMBER, _FLAG, _TEXT = ("FP32", float), ("BOOL", bool), ("BYTES", str)
_COUNT, _SEED = ("INT32", int, 0, 2**32 - 1), ("UINT64", int, 0, 2**64 - 1)
_PENALTIES = "frequency_penalty presence_penalty repetition_penalty"
OPTIONS: dict[str, Option] = {
    **_of("sampling", f"temperature top_p min_p {_PENALTIES}", *_NUMBER),
    **_of("sampling", "top_k", *_COUNT),
    **_of("sampling", "seed", *_SEED),
    **_of("sampling", "logit_bias", *_TEXT),
    **_of("stop", "max_tokens min_tokens stop_token_ids", *_COUNT),
    **_of("stop", "stop", *_TEXT),
    **_of("stop", "ignore_eos include_stop_str_in_output", *_FLAG),
    **_of("output", "logprobs prompt_logprobs", *_COUNT),
    **_of("output", "echo skip_special_tokens", *_FLAG),
    **_of("constraint", "json_schema regex grammar choice", *_TEXT),
    **_of("constraint", "json_object", *_FLAG),
    **_of("", "n", *_COUNT),
    **_of("", "priority", "INT32", int, -(2**31), 2**31 - 1),
    **_of("", "cache_salt", *_TEXT),
}
_CONSTRAINTS = sorted(name for name, option in OPTIONS.items() if option.part == "constraint")
_ALIASES = {
    "random_seed": "seed",
    "stop_words": "stop",
    "min_length": "min_tokens",
    "request_output_len": "max_tokens",
    "num_return_sequences": "n",
    "runtime_top_k": "top_k",
    "runtime_top_p": "top_p",
}
_END_ID = "end_id"  # of TensorRT-LLM: one more stop token; -1: none
_STRUCTURED = ("structured_outputs", "guided_decoding")  # of vLLM: a constraint in an object,
_BACKEND = "backend"  # in which it may name one of its own compilers
_UNSET = ("top_k", "seed")  # for which -1 means unset
_LISTS = {"choice", "stop", "stop_token_ids", "stop_words"}
_EXPECTED = {float: "a number", int: "a whole number", str: "text"}


def takes_list(name: str) -> bool:
    """Whether a tensor of this option holds any number of elements."""
    return name in _LISTS or name in NEUTRAL


def known() -> str:
    """All names, for error messages."""
    return ", ".join(sorted([*OPTIONS, *_ALIASES, _END_ID]))


class Options:
    """Collects options, each once.

    A repeated option is accepted with the same value: the client of vLLM's backend sends its
    options in sampling_parameters and in the parameters map.
    """

    def __init__(self) -> None:
        self._taken: dict[str, tuple[str, Any]] = {}  # name -> (its place, its value)
        self._parts: dict[str, dict[str, Any]] = {o.part: {} for o in OPTIONS.values()}
        self.output = self._parts["output"]

    def take(self, where: str, name: str, value: Any) -> None:
        """One option. Raises InvalidRequest naming its place, `where`."""
        if value is None:  # JSON's null
            return
        if name in _STRUCTURED:
            self._take_structured(where, value)
        elif name == _END_ID:
            if (token := _element(where, OPTIONS["priority"], value)) != -1:
                self._write(where, "stop_token_ids", [token])
        elif name in NEUTRAL:
            if not is_neutral(name, value):
                one = value[0] if isinstance(value, list) and len(value) == 1 else value
                raise InvalidRequest(where, f"{_shown(one)} is not served; {instead(name)}")
        elif (canonical := _ALIASES.get(name, name)) in OPTIONS:
            if first := self._taken.get(canonical):
                if value == first[1] or str(value) == str(first[1]):  # a number may be text
                    return
                raise InvalidRequest(where, f"given already, as {first[0]}, with another value")
            self._taken[canonical] = (where, value)
            if canonical == "stop":  # empty ones mean none, and so does TensorRT-LLM's flag
                value = [text for text in _list(value) if text not in ("", False)]
            if canonical in _UNSET and str(value) in ("-1", "-1.0"):
                return
            self._write(where, canonical, value)
        else:
            raise InvalidRequest(where, f"not known here; known are {known()}")

    def fields(self) -> dict[str, Any]:
        """The fields of a GenerateRequest, after the last option.

        A top_p of 0 is TensorRT-LLM's default. There it means that top_k alone decides, and without
        one the likeliest token.
        """
        parts = self._parts
        sampling = parts["sampling"]
        if sampling.get("top_p") == 0:
            del sampling["top_p"]
            sampling["top_k"] = sampling.get("top_k") or 1
        constraint = [Constraint(*item) for item in parts["constraint"].items()]
        return {
            **parts[""],
            "sampling": Sampling(**sampling),
            "stop": Stop(**parts["stop"]),
            "output": Output(**self.output),
            "constraint": constraint[0] if constraint else None,
        }

    def _take_structured(self, where: str, value: Any) -> None:
        # Triton's backend of vLLM takes the object's JSON alone.
        value = _object(where, value, "an object such as {'json': schema}")
        for key, item in value.items():
            if key == _BACKEND or item is None or (item is False and key != "json"):
                continue
            name = "json_schema" if key == "json" else key
            if name not in _CONSTRAINTS:
                kinds = ", ".join(_CONSTRAINTS)
                raise InvalidRequest(f"{where}.{key}", f"not known here; known are json, {kinds}")
            self.take(f"{where}.{key}", name, item)

    def _write(self, where: str, name: str, value: Any) -> None:
        option = OPTIONS[name]
        fields = self._parts[option.part]
        if option.part == "constraint" and fields:
            first, _ = self._taken[next(iter(fields))]
            raise InvalidRequest(where, f"{first} is there as well; expected one of them")
        if name == "logit_bias":
            value = _object(where, value, "an object of token ids and numbers")
            token, bias = OPTIONS["top_k"], OPTIONS["temperature"]
            fields[name] = {
                _element(where, token, k): _element(where, bias, v) for k, v in value.items()
            }
        elif name in _LISTS:
            found = [_element(where, option, item) for item in _list(value)]
            fields[name] = [*fields.get(name, ()), *found]
        else:
            if name == "json_schema" and not isinstance(value, str):
                value = json.dumps(value)
            found = _element(where, option, value)
            if found or name != "json_object":  # a constraint that is off is none
                fields[name] = found


def _element(where: str, option: Option, value: Any) -> Any:
    """A value, or an element of a list; numbers and flags may be text."""
    if option.type is bool:
        return flag_of(where, value)
    try:
        found: Any = msgspec.convert(value, option.type, strict=option.type is str)
        if option.type is str:
            found.encode()  # no half of a character
    except (msgspec.ValidationError, UnicodeEncodeError):
        raise InvalidRequest(where, f"{_shown(value)}; expected {_EXPECTED[option.type]}") from None
    if option.type is int and not option.low <= found <= option.high:
        raise InvalidRequest(where, f"{_shown(value)}; expected {option.low} to {option.high}")
    return found


def parse_json(where: str, text: str) -> Any:
    """Raises InvalidRequest where `text` is no JSON."""
    try:
        return nesting.loads(text, may_be_deep=True)
    except ValueError as error:
        raise InvalidRequest(where, f"not valid JSON ({error})") from None


def flag_of(where: str, value: Any) -> bool:
    """A bool, or the word for one."""
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    raise InvalidRequest(where, f"{_shown(value)}; expected true or false")


def _list(value: Any) -> list[Any]:
    """A list, the JSON of one, or the one element of one."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = nesting.loads(value, may_be_deep=True)
        except ValueError:
            pass  # a text that begins with a bracket
    return value if isinstance(value, list) else [value]


def _object(where: str, value: Any, expected: str) -> Mapping[Any, Any]:
    if isinstance(value, str):
        value = parse_json(where, value)
    if not isinstance(value, Mapping):
        raise InvalidRequest(where, f"{_shown(value)}; expected {expected}")
    return value


def _shown(value: Any) -> str:
    """A value as it stands in an error message, cut to a line."""
    if isinstance(value, float) and math.isfinite(value):
        return f"{value:g}"
    shown = repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."
