"""Sensible values for the protocols of others that the public port speaks: tensors that a client of
Triton's protocol sends, sampling parameters of vLLM's.

A tensor is right only as a whole (name, type, shape and elements), so it is generated as one.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from random import Random
from typing import Any

from engine.pb.inference import grpc_service_pb2 as oip
from tests.support.fuzz_constraints import choices, grammar, json_schema, regex

_OPTIONS: tuple[tuple[str, Callable[[Random], Any]], ...] = (
    ("max_tokens", lambda r: r.randrange(1, 25)),
    ("temperature", lambda r: r.choice((0.0, 1.0, "0.5"))),
    ("top_k", lambda r: r.choice((-1, 0, 40))),
    ("random_seed", lambda r: r.getrandbits(63)),
    ("stop_words", lambda r: "river"),
    ("stream", lambda r: r.random() < 0.5),
    ("exclude_input_in_output", lambda r: r.random() < 0.5),
    ("return_log_probs", lambda r: r.random() < 0.5),
    ("logprobs", lambda r: r.randrange(4)),
    ("ignore_eos", lambda r: r.choice((True, "true", 1))),
    ("priority", lambda r: r.randrange(3)),
    ("binary_data_output", lambda r: r.random() < 0.5),
    ("timeout", lambda r: 20_000_000),
    ("json_schema", lambda r: json_schema(r).decode(errors="replace")),
    ("sampling_parameters", lambda r: json.dumps({"max_tokens": 5, "stop": ["a", "b"], "seed": 1})),
    (
        "sampling_parameters",
        lambda r: r.choice(("[" * 5_000, '{"seed": 1e999}', '{"n": NaN}', "1")),
    ),
    ("sampling_parameters", lambda r: json.dumps({"guided_decoding": {"regex": "[ab]+"}})),
)
_OUTPUTS = ("text_output", "output_ids", "finish_reason", "logprobs", "cumulative_logprob", "none")


def inputs(random: Random) -> list[bytes]:
    """A prompt, and an option or two as tensors."""
    tensors = [random.choice((_text, _ids))(random)]
    for name, draw in random.sample(_OPTIONS, random.randrange(3)):
        tensors.append(_option(name, draw(random)))
    return [tensor.SerializeToString() for tensor in tensors]


def parameters(random: Random) -> list[tuple[bytes, bytes]]:
    """Options by name."""
    return [
        (name.encode(), _parameter(draw(random)))
        for name, draw in random.sample(_OPTIONS, random.randrange(4))
    ]


def outputs(random: Random) -> list[bytes]:
    """What shall come back."""
    wanted = random.sample(_OUTPUTS, random.randrange(3))
    message = oip.ModelInferRequest.InferRequestedOutputTensor
    return [message(name=name).SerializeToString() for name in wanted]


def _text(random: Random) -> Any:
    tensor = _tensor("text_input", "BYTES", random)
    tensor.contents.bytes_contents.append(random.choice((b"the river was", b"a", b"\xff", b"")))
    return tensor


def _ids(random: Random) -> Any:
    ids = [random.randrange(49152) for _ in range(random.choice((1, 5, 17)))]
    tensor = _tensor("input_ids", random.choice(("INT64", "INT32", "UINT32")), random, len(ids))
    kind = {"INT64": "int64", "INT32": "int", "UINT32": "uint"}[tensor.datatype]
    getattr(tensor.contents, f"{kind}_contents").extend(ids)
    return tensor


def _option(name: str, value: Any) -> Any:
    tensor = oip.ModelInferRequest.InferInputTensor(name=name, shape=[1])
    if isinstance(value, str):
        tensor.datatype = "BYTES"
        tensor.contents.bytes_contents.append(value.encode())
    elif isinstance(value, bool):
        tensor.datatype = "BOOL"
        tensor.contents.bool_contents.append(value)
    elif isinstance(value, float):
        tensor.datatype = "FP32"
        tensor.contents.fp32_contents.append(value)
    else:
        tensor.datatype = "INT64"
        tensor.contents.int64_contents.append(value)
    return tensor


def _tensor(name: str, datatype: str, random: Random, length: int = 1) -> Any:
    shape = random.choice(([length], [1, length]))
    return oip.ModelInferRequest.InferInputTensor(name=name, datatype=datatype, shape=shape)


def _parameter(value: Any) -> bytes:
    parameter = oip.InferParameter()
    if isinstance(value, str):
        parameter.string_param = value
    elif isinstance(value, bool):
        parameter.bool_param = value
    elif isinstance(value, float):
        parameter.double_param = value
    else:
        parameter.int64_param = value
    return parameter.SerializeToString()


BESIDE_TAME: dict[str, Any] = {
    "ModelInferRequest.model_name": lambda r: b"smollm2",
    "ModelInferRequest.model_version": lambda r: r.choice((b"", b"1")),
    "ModelInferRequest.id": lambda r: f"fuzz-{r.randrange(10**9)}".encode(),
    "ModelInferRequest.parameters": parameters,
    "ModelInferRequest.inputs": inputs,
    "ModelInferRequest.outputs": outputs,
    "ModelInferRequest.raw_input_contents": None,
    "ModelReadyRequest.name": lambda r: b"smollm2",
    "ModelMetadataRequest.name": lambda r: b"smollm2",
    "ModelConfigRequest.name": lambda r: b"smollm2",
    "version": lambda r: b"1",
    "TokenizedInput.original_text": lambda r: b"the river",
    "TokenizedInput.input_ids": lambda r: [r.randrange(49152) for _ in range(r.choice((1, 9, 20)))],
    "SamplingParams.n": lambda r: r.choice((0, 1, 2)),
    "SamplingParams.seed": lambda r: r.getrandbits(31),
    "SamplingParams.json_schema": json_schema,
    "SamplingParams.regex": regex,
    "SamplingParams.grammar": grammar,
    "ChoiceConstraint.choices": choices,
    "SamplingParams.structural_tag": None,
    "truncate_prompt_tokens": None,
    "kv_transfer_params": None,
    "kv_transfer_params_json": None,
    "mm_inputs": None,
    "extra_mm_inputs": None,
    "media_refs": None,
    "data_parallel_rank": lambda r: 0,
    "request_ids": lambda r: [b"unknown"],
}
