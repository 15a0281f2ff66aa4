"""Options by name -> fields of a GenerateRequest, by one set of names for all carriers. Pure.

    parameters map, tensors, vLLM's JSON of parameters --take(where, name, value)--> request

Names are those of inference.proto (`temperature`, `max_tokens`, `json_schema`, ...) and the other
names that Triton's backends have for the same options. Numbers may be text, as they are there. The
frontend checks ranges.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from coordinator.api.oip.neutral import NEUTRAL, instead, is_neutral
from coordinator.text import json_bounds as nesting
from engine.base.errors import InvalidRequest
from engine.pb.diptych.v1 import inference_pb2

_PARTS: dict[str, type[Message]] = {
    "sampling": inference_pb2.Sampling,
    "stop": inference_pb2.Stop,
    "output": inference_pb2.Output,
    "constraint": inference_pb2.Constraint,
}
_CONSTRAINTS = inference_pb2.Constraint.DESCRIPTOR.fields_by_name
_TOP = ("n", "priority", "cache_salt")
_REQUEST = inference_pb2.GenerateRequest.DESCRIPTOR.fields_by_name
# Name -> (the message within the request that has it, or "", and the field's descriptor).
FIELDS: dict[str, tuple[str, Any]] = {
    field.name: (part, field)
    for part, message in _PARTS.items()
    for field in message.DESCRIPTOR.fields
} | {name: ("", _REQUEST[name]) for name in _TOP}
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


def takes_list(name: str) -> bool:
    """Whether a tensor of this option holds any number of elements."""
    return name in _LISTS or name in NEUTRAL


def known() -> str:
    """All names, for error messages."""
    return ", ".join(sorted([*FIELDS, *_ALIASES, _END_ID]))


class Options:
    """Writes options into `request`, each once.

    A repeated option is accepted with the same value: the client of vLLM's backend sends its
    options in sampling_parameters and in the parameters map.
    """

    def __init__(self, request: inference_pb2.GenerateRequest) -> None:
        self._request = request
        self._taken: dict[str, tuple[str, Any]] = {}  # name -> (its place, its value)

    def take(self, where: str, name: str, value: Any) -> None:
        """One option. Raises InvalidRequest naming its place, `where`."""
        if value is None:  # JSON's null
            return
        if name in _STRUCTURED:
            self._take_structured(where, value)
        elif name == _END_ID:
            if (token := _whole(where, value)) != -1:
                self._write(where, "stop_token_ids", [token])
        elif name in NEUTRAL:
            if not is_neutral(name, value):
                one = value[0] if isinstance(value, list) and len(value) == 1 else value
                raise InvalidRequest(where, f"{_shown(one)} is not served; {instead(name)}")
        elif (canonical := _ALIASES.get(name, name)) in FIELDS:
            if first := self._taken.get(canonical):
                if _is_same(value, first[1]):
                    return
                raise InvalidRequest(where, f"given already, as {first[0]}, with another value")
            self._taken[canonical] = (where, value)
            if canonical == "stop":  # empty ones mean none, and so does TensorRT-LLM's flag
                value = [text for text in _list(where, value) if text not in ("", False)]
            if canonical in _UNSET and _is_minus_one(value):
                return
            self._write(where, canonical, value)
        else:
            raise InvalidRequest(where, f"not known here; known are {known()}")

    def finish(self) -> None:
        """Apply what depends on several options; call it after the last one.

        A top_p of 0 is TensorRT-LLM's default. There it means that top_k alone decides, and without
        one the likeliest token.
        """
        sampling = self._request.sampling
        if sampling.HasField("top_p") and sampling.top_p == 0:
            sampling.ClearField("top_p")
            if not sampling.top_k:
                sampling.top_k = 1

    def _take_structured(self, where: str, value: Any) -> None:
        if isinstance(value, str):  # Triton's backend of vLLM takes the object's JSON alone
            value = parse_json(where, value)
        if not isinstance(value, Mapping):
            raise InvalidRequest(where, "expected an object such as {'json': schema}")
        for key, item in value.items():
            if key == _BACKEND or item is None or (item is False and key != "json"):
                continue
            name = "json_schema" if key == "json" else key
            if name not in _CONSTRAINTS:
                kinds = ", ".join(sorted(_CONSTRAINTS))
                raise InvalidRequest(f"{where}.{key}", f"not known here; known are json, {kinds}")
            self.take(f"{where}.{key}", name, item)

    def _write(self, where: str, name: str, value: Any) -> None:
        part, field = FIELDS[name]
        target: Message = getattr(self._request, part) if part else self._request
        if part == "constraint" and (other := target.WhichOneof("kind")) not in (None, name):
            first, _ = self._taken[other]
            raise InvalidRequest(where, f"{first} is there as well; expected one of them")
        try:
            _assign(target, field, where, value)
        except (TypeError, ValueError) as error:  # out of the field's range, a lone surrogate
            raise InvalidRequest(where, f"{_shown(value)}; {error}") from None


def _assign(target: Any, field: FieldDescriptor, where: str, value: Any) -> None:
    """Write a value into a field of the request, by the field's type."""
    if field.name == "logit_bias":
        for token, bias in _object(where, value).items():
            target.logit_bias[_whole(where, token)] = _real(where, bias)
    elif field.name == "choice":
        target.choice.choices.extend(_list(where, value))
    elif field.is_repeated:
        convert = _string if field.type == FieldDescriptor.TYPE_STRING else _whole
        getattr(target, field.name).extend(convert(where, item) for item in _list(where, value))
    elif field.type == FieldDescriptor.TYPE_BOOL:
        flag = flag_of(where, value)
        if flag or field.name != "json_object":  # a constraint that is off is none
            setattr(target, field.name, flag)
    elif field.type == FieldDescriptor.TYPE_FLOAT:
        setattr(target, field.name, _real(where, value))
    elif field.type == FieldDescriptor.TYPE_STRING:
        if field.name == "json_schema" and not isinstance(value, str):
            value = json.dumps(value)
        setattr(target, field.name, _string(where, value))
    else:
        setattr(target, field.name, _whole(where, value))


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


def _is_same(value: Any, other: Any) -> bool:
    """Equal; a number may be text."""
    return bool(value == other) or str(value) == str(other)


def _is_minus_one(value: Any) -> bool:
    return not isinstance(value, bool) and str(value) in ("-1", "-1.0")


def _real(where: str, value: Any) -> float:
    if not isinstance(value, bool) and isinstance(value, int | float | str):
        try:
            return float(value)
        except (ValueError, OverflowError):
            pass
    raise InvalidRequest(where, f"{_shown(value)}; expected a number")


def _whole(where: str, value: Any) -> int:
    if not isinstance(value, bool):
        if isinstance(value, int):
            return value
        if isinstance(value, float) and value.is_integer():
            return int(value)
        if isinstance(value, str):
            try:
                return int(value)
            except ValueError:
                pass
    raise InvalidRequest(where, f"{_shown(value)}; expected a whole number")


def _string(where: str, value: Any) -> str:
    if isinstance(value, str):
        return value
    raise InvalidRequest(where, f"{_shown(value)}; expected text")


def _list(where: str, value: Any) -> list[Any]:
    """A list, the JSON of one, or the one element of one."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = nesting.loads(value, may_be_deep=True)
        except ValueError:
            pass  # a text that begins with a bracket
    return value if isinstance(value, list) else [value]


def _object(where: str, value: Any) -> Mapping[Any, Any]:
    if isinstance(value, str):
        value = parse_json(where, value)
    if not isinstance(value, Mapping):
        raise InvalidRequest(where, f"{_shown(value)}; expected an object of token ids and numbers")
    return value


def _shown(value: Any) -> str:
    """A value as it stands in an error message, cut to a line."""
    if isinstance(value, float) and math.isfinite(value):
        return f"{value:g}"
    shown = repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."
