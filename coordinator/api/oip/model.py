"""The served model as the Open Inference Protocol describes it: tensors, metadata, configuration.

Every option may be a tensor too, so the list of inputs follows from the list of options.
"""

from __future__ import annotations

from dataclasses import dataclass

from coordinator.api.oip.options import OPTIONS, takes_list
from engine.base.errors import NotFound
from engine.pb.inference import grpc_service_pb2, model_config_pb2

VERSION = "1"
PLATFORM = "diptych"
EXTENSIONS = ("binary_tensor_data", "model_configuration", "parameters", "schedule_policy")
RETURN_FLAGS = {
    "return_finish_reason": "finish_reason",
    "return_cumulative_logprob": "cumulative_logprob",
    "return_logprobs": "logprobs",
    "return_num_input_tokens": "num_input_tokens",
    "return_num_output_tokens": "num_output_tokens",
}
FLAGS = ("streaming", "stream", "exclude_input_in_output", *RETURN_FLAGS)
# vLLM's object of options, and TensorRT-LLM's length of input_ids.
SAMPLING_PARAMETERS, INPUT_LENGTHS = "sampling_parameters", "input_lengths"


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor of the model; `dims` without the batch dimension, which may stand before them."""

    name: str
    datatype: str
    dims: tuple[int, ...] = (1,)


INPUTS = (
    TensorSpec("text_input", "BYTES"),
    TensorSpec("input_ids", "INT32", (-1,)),
    TensorSpec(INPUT_LENGTHS, "INT32"),
    *(TensorSpec(name, "BOOL") for name in FLAGS),
    TensorSpec(SAMPLING_PARAMETERS, "BYTES"),
    *(
        TensorSpec(name, option.datatype, (-1,) if takes_list(name) else (1,))
        for name, option in OPTIONS.items()
    ),
)
OUTPUTS = (
    TensorSpec("text_output", "BYTES", (-1,)),
    TensorSpec("finish_reason", "BYTES", (-1,)),
    TensorSpec("output_ids", "INT32", (-1,)),
    TensorSpec("num_input_tokens", "UINT32"),
    TensorSpec("num_output_tokens", "UINT32", (-1,)),
    TensorSpec("cumulative_logprob", "FP32", (-1,)),
    TensorSpec("logprobs", "BYTES", (-1,)),
    TensorSpec("prompt_logprobs", "BYTES"),
)


def is_served(name: str, version: str, served: str) -> bool:
    """Whether `name` and `version`, where they are set, are the served model's."""
    return name in ("", served) and version in ("", VERSION)


def check_served(name: str, version: str, served: str) -> None:
    """Raise NotFound unless they are the served model's."""
    if not is_served(name, version, served):
        raise NotFound(
            f"model: {name!r} version {version!r} is not served here; {served!r} version"
            f" {VERSION!r} is"
        )


def metadata(name: str) -> grpc_service_pb2.ModelMetadataResponse:
    """The response of ModelMetadata."""
    tensor = grpc_service_pb2.ModelMetadataResponse.TensorMetadata
    return grpc_service_pb2.ModelMetadataResponse(
        name=name,
        versions=[VERSION],
        platform=PLATFORM,
        inputs=[tensor(name=s.name, datatype=s.datatype, shape=s.dims) for s in INPUTS],
        outputs=[tensor(name=s.name, datatype=s.datatype, shape=s.dims) for s in OUTPUTS],
    )


def config(name: str, max_model_len: int) -> model_config_pb2.ModelConfig:
    """The response of ModelConfig. Every input is optional, but one prompt must be there."""
    length = model_config_pb2.ModelParameter(string_value=str(max_model_len))
    return model_config_pb2.ModelConfig(
        name=name,
        platform=PLATFORM,
        backend=PLATFORM,
        max_batch_size=0,
        input=[
            model_config_pb2.ModelInput(
                name=s.name, data_type=_data_type(s.datatype), dims=s.dims, optional=True
            )
            for s in INPUTS
        ],
        output=[
            model_config_pb2.ModelOutput(name=s.name, data_type=_data_type(s.datatype), dims=s.dims)
            for s in OUTPUTS
        ],
        parameters={"max_model_len": length},
        model_transaction_policy=model_config_pb2.ModelTransactionPolicy(decoupled=True),
    )


def _data_type(datatype: str) -> str:
    return "TYPE_STRING" if datatype == "BYTES" else f"TYPE_{datatype}"
