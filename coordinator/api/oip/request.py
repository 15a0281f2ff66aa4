"""A ModelInferRequest -> a GenerateRequest and the form of the response. Pure.

    text_input | input_ids        the prompt
    streaming (or stream)         a response a piece, on ModelStreamInfer
    exclude_input_in_output       default true; false: the prompt comes before the output
    return_..., outputs           which tensors come back
    anything else by name         an option (options.py)

Flags and options may stand in the parameters map, in tensors or in vLLM's sampling_parameters.
Unknown names are refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from coordinator.api.oip import model as oip_model
from coordinator.api.oip.neutral import NEUTRAL
from coordinator.api.oip.options import Options, flag_of, parse_json, takes_list
from coordinator.api.oip.tensors import BYTES, Tensor, read_tensors, row, scalar, text
from coordinator.api.values import GenerateRequest
from engine.base.errors import InvalidRequest
from engine.pb.inference import grpc_service_pb2

_OUTPUT_NAMES = tuple(spec.name for spec in oip_model.OUTPUTS)
_TOKEN_TYPES = ("INT32", "INT64", "UINT32", "UINT64")
_EMPTY_FINAL = "triton_enable_empty_final_response"
_TIMEOUT = "timeout"  # microseconds
_BINARY, _BINARY_OF_ONE = "binary_data_output", "binary_data"
_PREFIX = "sampling_param_"  # of options, for TensorRT-LLM's backend of its LLM API
_FLAG_ALIASES = {"exclude_input_from_output": "exclude_input_in_output"}  # there


@dataclass(frozen=True, slots=True)
class ParsedRequest:
    """One parsed request, and the form of its response. The frontend checks `generate`."""

    generate: GenerateRequest
    id: str
    outputs: tuple[str, ...]
    raw: bool  # elements as raw bytes, else as typed contents
    batched: bool  # a leading dimension of 1, as the prompt had
    empty_final: bool  # the last response of a stream has no tensors
    streaming: bool
    timeout_s: float | None


def read_request(request: grpc_service_pb2.ModelInferRequest, served: str) -> ParsedRequest:
    """Raises InvalidRequest naming the input or parameter, NotFound for another model."""
    oip_model.check_served(request.model_name, request.model_version, served)
    flags: dict[str, bool] = {}
    options = Options()
    tensors = read_tensors(request)
    tensor, prompt = _take_prompt(tensors)
    for where, name, value in _named(request, tensors):
        if (flag := _FLAG_ALIASES.get(name, name)) in oip_model.FLAGS:
            flags[flag] = flag_of(where, value)
        else:
            options.take(where, name, value)
    if not flags.get("exclude_input_in_output", True):
        options.output["echo"] = True
    outputs = _outputs(request, flags, options.output, tensor.name == "input_ids")
    if {"logprobs", "cumulative_logprob"} & set(outputs):
        options.output.setdefault("logprobs", 0)  # the token's own
    return ParsedRequest(
        GenerateRequest(request_id=request.id, model=served, **prompt, **options.fields()),
        id=request.id,
        outputs=outputs,
        raw=_raw(request),
        batched=len(tensor.shape) == 2,
        empty_final=_control(request, _EMPTY_FINAL, False),
        streaming=flags.get("streaming", flags.get("stream", False)),
        timeout_s=_timeout_s(request),
    )


def _take_prompt(tensors: dict[str, Tensor]) -> tuple[Tensor, dict[str, Any]]:
    """Take the prompt's tensor out; (it, the request's fields)."""
    both = [tensors.pop(name, None) for name in ("text_input", "input_ids")]
    prompts = [tensor for tensor in both if tensor is not None]
    if len(prompts) != 1:
        raise InvalidRequest(
            "inputs",
            f"{'both' if prompts else 'neither'} of text_input and input_ids; expected one",
        )
    tensor = prompts[0]
    field = f"inputs.{tensor.name}"
    if tensor.name == "text_input":
        if tensor.datatype != BYTES:
            raise InvalidRequest(f"{field}.datatype", f"{tensor.datatype}; expected BYTES")
        return tensor, {"text": text(field, scalar(tensor))}
    if tensor.datatype not in _TOKEN_TYPES:
        raise InvalidRequest(
            f"{field}.datatype", f"{tensor.datatype}; expected one of {', '.join(_TOKEN_TYPES)}"
        )
    ids = row(tensor)
    for i, token in enumerate(ids):
        if not 0 <= token < 1 << 32:
            raise InvalidRequest(f"{field}[{i}]", f"{token}; not a token id")
    if (length := tensors.pop(oip_model.INPUT_LENGTHS, None)) and scalar(length) != len(ids):
        raise InvalidRequest(
            f"inputs.{oip_model.INPUT_LENGTHS}", f"{scalar(length)}; input_ids has {len(ids)}"
        )
    return tensor, {"token_ids": ids}  # an empty list is refused as such


def _named(
    request: grpc_service_pb2.ModelInferRequest, tensors: dict[str, Tensor]
) -> Iterator[tuple[str, str, Any]]:
    """(place, name, value) of every flag and option."""
    if any(name.startswith("sequence_") for name in request.parameters):
        raise InvalidRequest("parameters.sequence_id", "requests of one sequence are not served")
    named = [
        (f"parameters.{name}", name.removeprefix(_PREFIX), _value(f"parameters.{name}", parameter))
        for name, parameter in sorted(request.parameters.items())
        if name not in (_EMPTY_FINAL, _TIMEOUT, _BINARY)
    ]
    for tensor in tensors.values():
        name = tensor.name.removeprefix(_PREFIX)
        named.append((f"inputs.{tensor.name}", name, _element(name, tensor)))
    for where, name, value in named:
        if name != oip_model.SAMPLING_PARAMETERS:
            yield where, name, value
            continue
        parsed = parse_json(where, value) if isinstance(value, str) else value
        if not isinstance(parsed, dict):
            raise InvalidRequest(where, "expected the JSON of an object")
        for key, item in parsed.items():
            yield f"{where}.{key}", key, item


def _value(where: str, parameter: grpc_service_pb2.InferParameter) -> Any:
    kind = parameter.WhichOneof("parameter_choice")
    if kind is None:
        raise InvalidRequest(where, "unset")
    return getattr(parameter, kind)


def _element(name: str, tensor: Tensor) -> Any:
    """The element of the tensor of option `name`, or the list of them; BYTES are text."""
    if takes_list(name):  # of words there may be rows, with their ends
        values = list(tensor.values) if name in NEUTRAL else row(tensor)
    else:
        values = [scalar(tensor)]
    if tensor.datatype == BYTES:
        values = [text(f"inputs.{tensor.name}", value) for value in values]
    return values if takes_list(name) else values[0]


def _outputs(
    request: grpc_service_pb2.ModelInferRequest,
    flags: dict[str, bool],
    output: Mapping[str, Any],  # options of the request
    token_ids: bool,
) -> tuple[str, ...]:
    """Names of the tensors of the response: those requested, or the default and flagged ones."""
    for pb in request.outputs:
        if pb.name not in _OUTPUT_NAMES:
            raise InvalidRequest(
                f"outputs.{pb.name}", f"not an output; expected {', '.join(_OUTPUT_NAMES)}"
            )
        for key in pb.parameters:
            if key != _BINARY_OF_ONE:
                raise InvalidRequest(f"outputs.{pb.name}.parameters.{key}", "not served")
    if request.outputs:
        return tuple(dict.fromkeys(pb.name for pb in request.outputs))
    names = {"text_output", "finish_reason"}
    if token_ids:
        names.add("output_ids")
    names |= {name for flag, name in oip_model.RETURN_FLAGS.items() if flags.get(flag)}
    names |= {n for n in ("logprobs", "prompt_logprobs") if n in output}
    return tuple(name for name in _OUTPUT_NAMES if name in names)


def _raw(request: grpc_service_pb2.ModelInferRequest) -> bool:
    """Whether elements are sent as raw bytes: as in the request, unless it has a flag."""
    raw = _control(request, _BINARY, bool(request.raw_input_contents))
    each = set()
    for pb in request.outputs:
        if _BINARY_OF_ONE in pb.parameters:
            where = f"outputs.{pb.name}.parameters.{_BINARY_OF_ONE}"
            each.add(flag_of(where, _value(where, pb.parameters[_BINARY_OF_ONE])))
    if len(each) > 1:
        raise InvalidRequest("outputs", "binary_data true and false; a response is all of one kind")
    return each.pop() if each else raw


def _control(request: grpc_service_pb2.ModelInferRequest, name: str, default: bool) -> bool:
    if name not in request.parameters:
        return default
    where = f"parameters.{name}"
    return flag_of(where, _value(where, request.parameters[name]))


def _timeout_s(request: grpc_service_pb2.ModelInferRequest) -> float | None:
    """Triton's timeout of a request; 0: none."""
    if _TIMEOUT not in request.parameters:
        return None
    where = f"parameters.{_TIMEOUT}"
    value = _value(where, request.parameters[_TIMEOUT])
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise InvalidRequest(where, f"{value!r}; expected microseconds, 0 or more")
    return value / 1e6 if value else None
